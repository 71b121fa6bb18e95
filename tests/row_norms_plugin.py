"""A user's plugin: written in Python, with torch inside."""

from __future__ import annotations

from typing import Any, ClassVar

import bridge
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


def meaning(g: Any, x: Any, weight: Any = None, *, order: int, scale: float) -> Any:
    norms = g.reduce("ReduceL2" if order == 2 else "ReduceL1", x, [-1])
    norms = g.op.Mul(norms, g.constant(scale, x.dtype))
    return norms if weight is None else g.op.Mul(norms, weight)


def register_for_files() -> None:
    bridge.register_plugin(RowNorms, reference=meaning, replaces=("their.lib", "Norms"))
