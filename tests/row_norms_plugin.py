"""A user's plugin: written in Python, with torch inside."""

from __future__ import annotations

from typing import Any, ClassVar

from bridge.plugins.python import TorchPlugin


class RowNorms(TorchPlugin):
    name = "RowNorms"
    attributes: ClassVar = {"order": 2, "scale": 1.0}

    def output_types(self, inputs: Any) -> list[str]:
        return [inputs[0]]

    def output_shapes(self, inputs: Any, sizes: Any) -> Any:
        return [inputs[0][:-1]]

    def run(self, inputs: Any, outputs: Any) -> None:
        import torch

        norms = torch.linalg.vector_norm(inputs[0], self.values["order"], -1)
        outputs[0].copy_(norms * self.values["scale"])
