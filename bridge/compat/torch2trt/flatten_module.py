"""``torch2trt.flatten_module``: a module whose arguments and outputs are tensors alone, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bridge import Flattener


class Flatten(nn.Module):
    """Takes the tensors of the module's arguments one by one, and returns those of its output."""

    def __init__(
        self, module: nn.Module, input_flattener: Flattener | None = None, output_flattener: Flattener | None = None
    ) -> None:
        super().__init__()
        self.module, self.input_flattener, self.output_flattener = module, input_flattener, output_flattener

    def forward(self, *tensors: torch.Tensor) -> Any:
        args = tensors if self.input_flattener is None else self.input_flattener.unflatten(list(tensors))
        output = self.module(*args)
        return output if self.output_flattener is None else self.output_flattener.flatten(output)


class Unflatten(Flatten):
    """Takes nested arguments, calls the module with their tensors, and nests what it returns."""

    def forward(self, *args: Any) -> Any:
        tensors = args if self.input_flattener is None else self.input_flattener.flatten(args)
        output = self.module(*tensors)
        return output if self.output_flattener is None else self.output_flattener.unflatten(output)


__all__ = ["Flatten", "Unflatten"]
