"""Which operators are customarily computed in float32, and what of operators and numbers counts for precision.

``soundness`` decides by these tables.
"""

from __future__ import annotations

from collections.abc import Mapping

PLACED = "it is given places in an image"
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "it adds up many elements": (
        *("CumProd", "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd"),
        *("ReduceSum", "ReduceSumSquare", "GlobalLpPool", "LpPool", "LpNormalization", "MeanVarianceNormalization"),
    ),
    "its results easily leave the range of 16 bits, or vanish": (
        *("Cosh", "Exp", "Log", "Pow", "Reciprocal", "Sinh", "Sqrt"),
    ),
    "it magnifies the rounding of what it is given": (*("Acos", "Acosh", "Asin", "Atanh", "Cos", "Det", "Sin", "Tan"),),
    PLACED: ("AffineGrid", "GridSample", "MaxRoiPool", "RoiAlign"),
    "it draws numbers": (
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    ),
    "it writes into a tensor of the caller's": ("TensorScatter",),
    "it is a loss": ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"),
}
"""Operators that are left in float32 by default, by the reason why."""

REASONS = {operator: reason for reason, operators in DEFAULTS.items() for operator in operators}

ARITHMETIC = frozenset(
    (
        *("Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "Round", "Sign"),
        *("Sub", "Sum", "Where"),
    )
)
"""Operators that compute element by element, and little."""
MOVEMENT = frozenset(
    (
        *("Cast", "Compress", "Concat", "DepthToSpace", "DequantizeLinear", "Dropout", "Expand", "Flatten", "Gather"),
        *("GatherElements", "GatherND", "Identity", "Pad", "Reshape", "ReverseSequence", "ScatterElements"),
        *("ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze"),
    )
)
"""Operators that hand values on."""
EXACT: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Ceil", "Cos", "Floor", "NonMaxSuppression", "Round", "Sin", "Tan"), (0,)),
    "Mod": (0, 1),
    **dict.fromkeys(("GridSample", "MaxRoiPool", "RoiAlign"), (1,)),
}
"""Inputs that are places, phases or numbers to be cut off: a small relative error is a large one in the result."""
ABSORBING = frozenset(
    (
        *("ArgMax", "ArgMin", "Attention", "Clip", "Equal", "Erf", "Exp", "Greater", "GreaterOrEqual", "HardSigmoid"),
        *("Hardmax", "Less", "LessOrEqual", "Not", "Relu", "Sigmoid", "Softmax", "Tanh"),
    )
)
"""Operators for which a large value is as good as an infinite one."""
ONE_SIDED = frozenset(("Clip", "Exp", "Relu"))
"""Those of them that large positive values go through."""
PASSING = frozenset(("GlobalMaxPool", "LogSoftmax", "MaxPool", "ReduceMax", "ReduceMin", "TopK"))
"""Operators that hand on some of the values that they are given."""
CHOOSING = frozenset(("GlobalMaxPool", "Max", "MaxPool", "Min", "ReduceMax", "ReduceMin", "TopK", "Where"))
"""Operators whose results are some of their inputs' values."""
COMPARISONS = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"))
SCALES = frozenset(("Div", "Exp", "Pow", "Reciprocal", "Sqrt"))
"""What computes factors that may be very large or small."""
WIDE = frozenset(("CumProd", "CumSum", "Exp", "Pow", "ReduceL1", "ReduceProd", "ReduceSum", "ReduceSumSquare"))
"""What makes large values, which are often scaled down next."""
FEW_DIGITS = 16
"""Tensors whose largest value is not so many times the smallest that has all its digits lose too many of them; of
others, float16's smallest step is below a 2**14th of the largest."""
CANCELLED: Mapping[str, int] = {"float16": 32, "bfloat16": 8, "exact": 4}
"""Terms that are so many times as large as their sum cancel five of 11 binary digits, or three of 8. Those of float32
have more digits than that, which only rounding takes."""
PRODUCTS = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
"""Operators whose terms cannot be told one by one: what leads to such a sum is not looked for beyond them."""
LINEAR = frozenset(("Abs", "Add", "AffineGrid", "Neg", "ReduceMean", "ReduceSum", "Sub", "Sum", "Where"))
"""Operators whose results are about as far off as what they are given."""
IN_SPACE = 4
"""Terms of a product that turns or moves points: homogeneous coordinates have four."""
ARGUMENTS: Mapping[str, Mapping[str, float]] = {
    "float16": {**dict.fromkeys(("Cos", "Exp", "Sin", "Tan"), 16.0), "Softmax": 128.0},
    "bfloat16": {**dict.fromkeys(("Cos", "Exp", "Sin", "Tan"), 8.0), "Softmax": 64.0},
}
"""Operators of which an absolute error of the argument is a relative one of the result, by low type, and up to which
argument rounding leaves digits enough. A softmax averages, and few of its terms are near the largest."""
TERMS: Mapping[str, slice] = {
    **dict.fromkeys(("Add", "Sub", "Sum"), slice(None)),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), slice(2, 3)),
}
"""Operators that add, and which of their inputs are added."""
SUMS = frozenset(
    (
        *("Add", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "CumSum", "Gemm", "GlobalAveragePool"),
        *("MatMul", "Mean", "ReduceMean", "ReduceSum", "Sub", "Sum"),
    )
)
"""Operators that add up; where the terms have both signs, a small sum has the rounding of large terms."""
PROPORTIONAL = frozenset(
    (
        *("Abs", "Clip", "Div", "Max", "MaxPool", "Min", "Mul", "Neg", "Pow", "Reciprocal", "ReduceL1", "ReduceL2"),
        *("ReduceMax", "ReduceMin", "ReduceSumSquare", "Relu", "Sqrt", "Where"),
    )
)
"""Operators whose results are as exact, each for its size, as what they are given."""
SPREAD = 1024
"""A logarithm of values that are so many times apart shows the rounding of the small ones."""
MASKS = 1e30
"""A magnitude that nobody computes: it stands for infinity."""
NEAR = 0.02
"""How much a mask may move by what it is added to."""
