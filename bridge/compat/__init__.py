"""Other projects' names for what is here. ``python -m bridge.compat install`` lets ``import torch2trt`` find them."""
