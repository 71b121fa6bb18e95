"""Models for the rules of passes/rules/training.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.ir import Node
from passes.rules.training import STEPS, TRAINING

from . import Case, Sketch, Tensors, strategy


@strategy("optimiser_step_as_arithmetic")
def steps(s: Sketch) -> Case:
    op = s.pick(*STEPS)
    count, each = STEPS[op][0], s.integer(1, 2)
    sizes = [s.sizes(0, 3) for _ in range(each)]
    s.operand("rate", np.asarray(s.random.uniform(0.01, 1), np.float32))
    s.operand("times", np.asarray(s.integer(0, 3), np.int64))
    for index in range(count * each):
        s.input(f"x{index}", "float32", np.abs(s.values("float32", sizes[index % each])))
    attrs = {name: s.pick(0.1, 0.5) for name in ("epsilon", "norm_coefficient")}
    attrs |= {"Adagrad": {"decay_factor": 0.1}, "Adam": {"alpha": 0.9, "norm_coefficient_post": 0.1}}.get(op, {})
    if op == "Momentum":
        del attrs["epsilon"]
        attrs |= {"alpha": 0.9, "beta": 0.7, "mode": s.pick("standard", "nesterov")}

    def build(g: Builder, t: Tensors) -> list[gs.Tensor]:
        given = [t["rate"], t["times"], *(t[f"x{index}"] for index in range(count * each))]
        made = range(each * (count - 1))
        results = [gs.Variable(f"y{i}", np.dtype(np.float32), list(sizes[i % each])) for i in made]
        g.made.append(Node(op, op, attrs, given, results, domain=TRAINING))
        return results

    return s.model(build)
