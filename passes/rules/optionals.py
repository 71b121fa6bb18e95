"""Values that may be missing, where it is known whether they are: TensorRT has tensors alone."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, lacks, rule


@rule("OptionalHasElement", when=lacks("OptionalHasElement"))
def presence_of_a_value(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no optional values; whether one is there is known, unless the caller decides it."""
    value = g.input(node, 0)
    return g.op.Identity(g.constant(np.bool_(value is not None and _element(g, value) is not None)))


@rule("OptionalGetElement", when=lacks("OptionalGetElement"))
def value_of_an_optional(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no optional values; that of one is the tensor that was put in."""
    element = _element(g, node.inputs[0])
    if element is None:
        g.decline("the optional value is missing")
    return g.op.Identity(element)


def _element(g: Builder, value: gs.Tensor) -> gs.Tensor | None:
    """What the optional holds, or None where it holds nothing; a tensor holds itself."""
    while value.inputs and value.inputs[0].op == "Identity":
        value = value.inputs[0].inputs[0]
    if value.dtype is not None:
        return value
    if value.inputs and value.inputs[0].op == "Optional":
        return g.input(value.inputs[0], 0)
    return g.decline("whether the optional value is there is decided at run time")


@presence_of_a_value.example
def of_a_tensor_and_of_nothing() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        there = g.op.OptionalHasElement(g.op.Optional(x))
        return [g.op.Not(there), g.op.OptionalHasElement(x), g.op.OptionalHasElement(), g.op.Neg(x)]

    return example({"x": ("float32", ["n", 3])}, build)


@value_of_an_optional.example
def taken_out_again() -> gs.Graph:
    def build(g: Builder, x: gs.Tensor) -> list[gs.Tensor]:
        return [g.op.OptionalGetElement(g.op.Optional(g.op.Neg(x))), g.op.OptionalGetElement(x)]

    return example({"x": ("float32", ["n", 3])}, build)
