"""Steps of optimisers (ai.onnx.preview.training): Adagrad, Adam and Momentum are arithmetic. TensorRT lacks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder, Replacement, example, rule
from passes.ir import Node

TRAINING = "ai.onnx.preview.training"

Step = Callable[["Builder", gs.Node, gs.Tensor, gs.Tensor, list[gs.Tensor]], list[gs.Tensor]]
"""From learning rate, count and the tensors of one parameter to its new ones."""


def _number(g: Builder, node: gs.Node, name: str, default: float, like: gs.Tensor) -> gs.Tensor:
    return g.constant(np.asarray(float(node.attrs.get(name, default)), g.dtype(like)))


def _regularised(g: Builder, node: gs.Node, x: gs.Tensor, slope: gs.Tensor) -> gs.Tensor:
    weight = float(node.attrs.get("norm_coefficient", 0.0))
    return slope if weight == 0 else g.op.Add(g.op.Mul(g.constant(np.asarray(weight, g.dtype(x))), x), slope)


def _adagrad(g: Builder, node: gs.Node, rate: gs.Tensor, count: gs.Tensor, tensors: list[gs.Tensor]) -> list[gs.Tensor]:
    x, slope, squares = tensors
    decay = float(node.attrs.get("decay_factor", 0.0))
    one = g.constant(1, g.dtype(rate))
    slowed = g.op.Add(one, g.op.Mul(g.cast(count, g.dtype(rate)), g.constant(np.asarray(decay, g.dtype(rate)))))
    slope = _regularised(g, node, x, slope)
    squares = g.op.Add(squares, g.op.Mul(slope, slope))
    size = g.op.Add(g.op.Sqrt(squares), _number(g, node, "epsilon", 0.0, x))
    return [g.op.Sub(x, g.op.Div(g.op.Mul(_as(g, g.op.Div(rate, slowed), x), slope), size)), squares]


def _adam(g: Builder, node: gs.Node, rate: gs.Tensor, count: gs.Tensor, tensors: list[gs.Tensor]) -> list[gs.Tensor]:
    x, slope, mean, squares = tensors
    kind = g.dtype(x)
    slope = _regularised(g, node, x, slope)
    a, b = (float(node.attrs.get(name, default)) for name, default in (("alpha", 0.9), ("beta", 0.999)))

    def mixed(weight: float, old: gs.Tensor, new: gs.Tensor) -> gs.Tensor:
        old_part = g.op.Mul(g.constant(np.asarray(weight, kind)), old)
        total: gs.Tensor = g.op.Add(old_part, g.op.Mul(g.constant(np.asarray(1 - weight, kind)), new))
        return total

    mean, squares = mixed(a, mean, slope), mixed(b, squares, g.op.Mul(slope, slope))
    size = g.op.Add(g.op.Sqrt(squares), _number(g, node, "epsilon", 0.0, x))
    times = g.cast(count, g.dtype(rate))
    one = g.constant(1, g.dtype(rate))
    first, second = (g.op.Sub(one, g.op.Pow(g.constant(np.asarray(weight, g.dtype(rate))), times)) for weight in (a, b))
    corrected = g.op.Div(g.op.Mul(rate, g.op.Sqrt(second)), first)
    started = g.op.Where(g.op.Greater(times, g.constant(0, g.dtype(rate))), corrected, rate)
    moved = g.op.Sub(x, g.op.Div(g.op.Mul(_as(g, started, x), mean), size))
    weight = float(node.attrs.get("norm_coefficient_post", 0.0))
    return [moved if weight == 0 else g.op.Mul(g.constant(np.asarray(1 - weight, kind)), moved), mean, squares]


def _momentum(
    g: Builder, node: gs.Node, rate: gs.Tensor, count: gs.Tensor, tensors: list[gs.Tensor]
) -> list[gs.Tensor]:
    x, slope, velocity = tensors
    slope = _regularised(g, node, x, slope)
    alpha, beta = _number(g, node, "alpha", 0.0, x), _number(g, node, "beta", 0.0, x)
    zero = g.constant(0, g.dtype(count))
    weight = g.op.Where(g.op.Greater(count, zero), beta, g.constant(1, g.dtype(x)))  # none at the first step
    velocity = g.op.Add(g.op.Mul(alpha, velocity), g.op.Mul(weight, slope))
    direction = velocity
    if node.attrs["mode"] == "nesterov":
        direction = g.op.Add(slope, g.op.Mul(alpha, velocity))
    return [g.op.Sub(x, g.op.Mul(_as(g, rate, x), direction)), velocity]


def _as(g: Builder, number: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
    return g.cast(number, g.dtype(like))


STEPS: dict[str, tuple[int, Step]] = {"Adagrad": (3, _adagrad), "Adam": (4, _adam), "Momentum": (3, _momentum)}
"""How many tensors each parameter has, and what a step makes of them."""


@rule(*STEPS, domain=TRAINING)
def optimiser_step_as_arithmetic(node: gs.Node, g: Builder) -> Replacement:
    """TensorRT has no optimisers; a step of one is arithmetic."""
    groups, step = STEPS[node.op]
    rate, count, *tensors = node.inputs
    each = len(tensors) // groups
    made = [step(g, node, rate, count, tensors[index::each]) for index in range(each)]
    return [results[place] for place in range(groups - 1) for results in made]


def _optimiser(op: str, **attrs: Any) -> gs.Graph:
    count = STEPS[op][0]

    def build(g: Builder, rate: gs.Tensor, times: gs.Tensor, *tensors: gs.Tensor) -> list[gs.Tensor]:
        positive = [g.op.Abs(tensor) for tensor in tensors[-2:]]
        inputs = [rate, times, *tensors[:-2], *positive]
        results = [gs.Variable(f"y{index}", np.dtype(np.float32), [3]) for index in range(2 * (count - 1))]
        g.made.append(Node(op, op, attrs, inputs, results, domain=TRAINING))
        return results

    tensors = {f"x{index}": ("float32", [3]) for index in range(2 * count)}
    return example({"rate": ("float32", []), "times": ("int64", []), **tensors}, build)


@optimiser_step_as_arithmetic.example
def adagrad_of_two_parameters() -> gs.Graph:
    return _optimiser("Adagrad", decay_factor=0.1, epsilon=0.01, norm_coefficient=0.001)


@optimiser_step_as_arithmetic.example
def adam_of_two_parameters() -> gs.Graph:
    return _optimiser("Adam", alpha=0.95, beta=0.1, epsilon=0.01, norm_coefficient=0.001, norm_coefficient_post=0.1)


@optimiser_step_as_arithmetic.example
def nesterov_momentum_of_two_parameters() -> gs.Graph:
    return _optimiser("Momentum", alpha=0.95, beta=1.0, norm_coefficient=0.01, mode="nesterov")
