"""Models for the rule of passes/rules/four_bits.py."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from passes.framework import Builder
from passes.rules.quantised_operators import foreign

from . import Case, Sketch, Tensors, strategy


@strategy("matmul_of_few_bits_as_matmul")
def products(s: Sketch) -> Case:
    opset, block, bits = s.pick(18, 20, 21, 23), s.pick(16, 32), s.pick(4, 4, 8)
    rows = s.pick(block, 2 * block, 3 * block, 2 * block - 5)
    columns, count = s.integer(1, 5), -(-rows // block)
    batch = s.sizes(0, 2)
    s.input("x", "float32", [*batch, s.integer(1, 4), rows])
    s.constants["weights"] = s.random.integers(0, 256, (columns, count, block * bits // 8), np.uint8)
    s.constants["scales"] = s.random.uniform(0.01, 1, (columns, count)).astype(np.float32)
    zeros, bias = s.flag(), s.flag()
    if zeros:
        s.constants["zeros"] = s.random.integers(0, 256, (columns, -(-count * bits // 8)), np.uint8)
    if bias:
        s.constants["bias"] = s.random.standard_normal(columns).astype(np.float32)
    sizes = {"K": rows, "N": columns, "bits": bits, "block_size": block}

    def build(g: Builder, t: Tensors) -> gs.Tensor:
        nothing = gs.Variable.empty()
        given = [t["x"], t["weights"], t["scales"], t.get("zeros", nothing), nothing, t.get("bias", nothing)]
        while given[-1] is nothing:
            given.pop()
        return foreign(g, "MatMulNBits", given, np.float32, [*g.shape(t["x"])[:-1], columns], **sizes)

    return s.model(build, opset=opset)
