"""The rules over their attributes, ranks and axes: same outputs in ONNX Runtime, an engine from TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import pytest

from bridge import target as targets
from passes import Log, read, rewrite
from passes.framework import Builder, Names, example
from passes.model import to_proto, write
from tests.support import example_inputs, parse, run_onnx

RTX = targets.resolve("tensorrt-rtx-1.7")

Outputs = dict[str, np.ndarray]


def rewritten(graph: gs.Graph, folder: Path) -> tuple[onnx.ModelProto, Log]:
    write(graph, folder / "before.onnx")
    after = read(folder / "before.onnx")
    log = rewrite(after, RTX)
    write(after, folder / "after.onnx")
    model = onnx.load(folder / "after.onnx")
    onnx.checker.check_model(model)
    return model, log


def check(
    graph: gs.Graph,
    folder: Path,
    rule: str,
    feeds: Outputs | None = None,
    expected: Outputs | None = None,
    builds: bool = True,
    tolerance: float = 1e-5,
) -> None:
    """``rule`` applies, the outputs stay as they were (or are as expected), and an engine comes out."""
    original = to_proto(graph)
    feeds = feeds or example_inputs(original)
    wanted = expected or run_onnx(original, feeds)
    model, log = rewritten(graph, folder)
    assert rule in log.nodes, f"{rule} did not apply: {log.declined}"
    found = run_onnx(model, feeds)
    for name, array in wanted.items():
        scale = max(1.0, float(np.abs(array).max(initial=0))) if array.dtype.kind == "f" else 1
        bound = tolerance * scale if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(found[name], array, rtol=0, atol=bound, err_msg=name)
        assert found[name].dtype == array.dtype
    if builds:
        refused = parse(folder / "after.onnx")
        assert not refused, refused


def check_declined(graph: gs.Graph, folder: Path, rule: str, reason: str) -> None:
    _, log = rewritten(graph, folder)
    declined = [str(said) for (name, _), said in log.declined.items() if name == rule]
    assert rule not in log.nodes
    assert declined and reason in declined[0], log.declined


def inside_if(shape: list[Any], body: Callable[[Builder, gs.Tensor], gs.Tensor]) -> gs.Graph:
    """A model that computes ``body`` of its input in one branch of an If, and its double in the other."""
    graph = gs.Graph(name="outer", opset=20, ir_version=10)
    x = gs.Variable("x", np.float32, shape)
    condition = gs.Variable("condition", np.bool_, [])
    branches = {}
    names = Names(graph)
    names.taken |= {"x", "condition", "y"}
    kinds: list[gs.Tensor] = []
    for name, build in (("then_branch", body), ("else_branch", lambda g, x: g.op.Add(body(g, x), body(g, x)))):
        g = Builder(names, 20, name)
        result = build(g, x)
        kinds.append(result)
        branches[name] = gs.Graph(g.made, [], [result], name=name, opset=20)
    y = gs.Variable("y", kinds[0].dtype, kinds[0].shape)
    graph.nodes.append(gs.Node("If", "choice", branches, [condition], [y], domain=""))
    graph.inputs, graph.outputs = [condition, x], [y]
    return graph


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize(
    ("rule", "shape", "body"),
    [
        ("dft_as_matmul", [2, 8, 1], lambda g, x: g.op.DFT(x, None, g.constant(1), onesided=1)),
        ("dilated_maxpool_as_slices", [1, 2, 8], lambda g, x: g.op.MaxPool(x, kernel_shape=[2], dilations=[2])),
        ("det_by_cofactors", [2, 3, 3], lambda g, x: g.op.Det(x)),
        ("col2im_as_transposed_convolution", [1, 8, 9], lambda g, x: g.op.Col2Im(x, [4, 4], [2, 2])),
    ],
)
def test_rules_reach_into_the_branches_of_an_if(condition, rule, shape, body, tmp_path: Path) -> None:
    graph = inside_if(shape, body)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    check(graph, tmp_path, rule, {"condition": np.array(condition), "x": x})


# --- Fourier -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("length", [None, 5, 12])
@pytest.mark.parametrize(
    ("parts", "attrs"), [(1, {}), (1, {"onesided": 1}), (2, {}), (2, {"inverse": 1}), (1, {"inverse": 1})]
)
def test_dft_of_any_axis_length_and_direction_is_numpys(axis, length, parts, attrs, tmp_path: Path) -> None:
    given = None if length is None else np.array(length, np.int64)
    graph = example(
        {"x": ("float32", [8, 7, 9, parts])},
        lambda g, x: g.op.DFT(x, None if given is None else g.constant(given), g.constant(axis), **attrs),
    )
    feeds = example_inputs(to_proto(graph))
    x = feeds["x"][..., 0] + (1j * feeds["x"][..., 1] if parts == 2 else 0)
    name = "ifft" if "inverse" in attrs else "rfft" if "onesided" in attrs else "fft"
    place = axis if axis >= 0 else axis + 1
    y = getattr(np.fft, name)(x, length, place)
    expected = {graph.outputs[0].name: np.stack([y.real, y.imag], -1).astype(np.float32)}
    check(graph, tmp_path, "dft_as_matmul", feeds, expected)


@pytest.mark.parametrize(("bins", "length"), [(9, None), (9, 16), (9, 17), (5, 16), (9, 12), (4097, 8192)])
def test_irfft_is_numpys(bins: int, length: int | None, tmp_path: Path) -> None:
    given = None if length is None else np.array(length, np.int64)
    graph = example(
        {"x": ("float32", [3, bins, 2])},
        lambda g, x: g.op.DFT(x, None if given is None else g.constant(given), g.constant(1), inverse=1, onesided=1),
    )
    feeds = example_inputs(to_proto(graph))
    y = np.fft.irfft(feeds["x"][..., 0] + 1j * feeds["x"][..., 1], length, axis=1)[..., None].astype(np.float32)
    check(graph, tmp_path, "dft_as_matmul", feeds, {graph.outputs[0].name: y})


@pytest.mark.parametrize("length", [4096, 6000, 16000])
def test_long_transforms_keep_float32s_accuracy(length: int, tmp_path: Path) -> None:
    graph = example({"x": ("float32", [1, length, 1])}, lambda g, x: g.op.DFT(x, None, g.constant(1), onesided=1))
    feeds = example_inputs(to_proto(graph))
    y = np.fft.rfft(feeds["x"][..., 0].astype(np.float64))
    expected = {graph.outputs[0].name: np.stack([y.real, y.imag], -1).astype(np.float32)}
    check(graph, tmp_path, "dft_as_matmul", feeds, expected, tolerance=3e-6)


def test_the_inverse_of_half_a_spectrum_of_dynamic_length_is_declined_with_the_axis(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [2, "t", 2])}, lambda g, x: g.op.DFT(x, None, g.constant(1), inverse=1, onesided=1)
    )
    check_declined(graph, tmp_path, "dft_as_matmul", "axis 1")


def test_a_dft_whose_length_is_a_large_prime_is_declined(tmp_path: Path) -> None:
    graph = example({"x": ("float32", [1, 10007, 1])}, lambda g, x: g.op.DFT(x, None, g.constant(1)))
    check_declined(graph, tmp_path, "dft_as_matmul", "10007")


# --- Col2Im ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
@pytest.mark.parametrize("dilations", [[1, 1], [2, 1]])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 2, 1, 2], [0, 1, 2, 0]])
def test_col2im_adds_as_onnx_runtime_does(strides, dilations, pads, tmp_path: Path) -> None:
    image, block = [7, 8], [3, 2]
    reach = [(k - 1) * d + 1 for k, d in zip(block, dilations, strict=True)]
    blocks = [(image[i] + pads[i] + pads[2 + i] - reach[i]) // strides[i] + 1 for i in range(2)]
    graph = example(
        {"x": ("float32", ["n", 3 * 6, blocks[0] * blocks[1]])},
        lambda g, x: g.op.Col2Im(x, image, block, strides=strides, dilations=dilations, pads=pads),
    )
    check(graph, tmp_path, "col2im_as_transposed_convolution")


# --- scatter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
@pytest.mark.parametrize("axis", [0, -1])
def test_scatter_elements_reduces(reduction: str, dtype: str, axis: int, tmp_path: Path) -> None:
    shape = [5, 3, 4]

    def build(dtype: str) -> gs.Graph:
        return example(
            {"x": (dtype, shape), "i": ("int64", [3, 3, 4]), "u": (dtype, [3, 3, 4])},
            lambda g, x, i, u: g.op.ScatterElements(x, i, u, axis=axis, reduction=reduction),
            18,
        )

    feeds = example_inputs(to_proto(build(dtype)))
    feeds["i"] = np.random.default_rng(1).integers(-shape[axis], shape[axis], [3, 3, 4])
    if dtype.startswith("int") and reduction != "mul":
        feeds["u"] = feeds["u"] * 100_000_003 - 99_999  # sums that float32 would round
    expected = None
    if dtype == "float16":  # in which ONNX Runtime does not reduce
        single = {name: array.astype(np.float32 if name != "i" else np.int64) for name, array in feeds.items()}
        expected = run_onnx(to_proto(build("float32")), single)
        expected = {name: array.astype(dtype) for name, array in expected.items()}
    tolerance = 2e-3 if dtype == "float16" else 1e-6
    check(build(dtype), tmp_path, "scatter_elements_with_reduction", feeds, expected, tolerance=tolerance)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_scatter_nd_reduces(reduction: str, depth: int, dtype: str, tmp_path: Path) -> None:
    shape: list[int | str] = [4, 3, 5]
    graph = example(
        {"x": (dtype, shape), "i": ("int64", [2, 6, depth]), "u": (dtype, [2, 6, *shape[depth:]])},
        lambda g, x, i, u: g.op.ScatterND(x, i, u, reduction=reduction),
        18,
    )
    feeds = example_inputs(to_proto(graph))
    feeds["i"] = np.stack([np.random.default_rng(1).integers(-n, n, [2, 6]) for n in (4, 3, 5)[:depth]], -1)
    check(graph, tmp_path, "scatter_nd_with_reduction", feeds, tolerance=1e-6)


@pytest.mark.parametrize("data", [["n", 3, "k"], ["n", "m", 3]])
def test_scatter_nd_of_dynamic_sizes(data: list[int | str], tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", data), "i": ("int64", ["count", 2]), "u": ("float32", ["count", data[2]])},
        lambda g, x, i, u: g.op.ScatterND(x, i, u, reduction="add"),
    )
    check(graph, tmp_path, "scatter_nd_with_reduction")


def test_scatter_elements_of_unlike_dynamic_sizes(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", ["n", 4]), "i": ("int64", ["m", 3]), "u": ("float32", ["m", 3])},
        lambda g, x, i, u: g.op.ScatterElements(x, i, u, axis=1, reduction="add"),
    )
    feeds = example_inputs(to_proto(graph))
    check(graph, tmp_path, "scatter_elements_with_reduction", {**feeds, "i": feeds["i"][:2], "u": feeds["u"][:2]})


def test_rows_that_are_infinite_stay_where_they_are(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [6, 4]), "i": ("int64", [3, 1]), "u": ("float32", [3, 4])},
        lambda g, x, i, u: g.op.ScatterND(x, i, u, reduction="add"),
    )
    feeds = example_inputs(to_proto(graph))
    feeds["u"][0] = -np.inf
    model, _ = rewritten(graph, tmp_path)
    found = next(iter(run_onnx(model, feeds).values()))
    assert np.isinf(found).sum() == 4 and not np.isnan(found).any(), found


def test_a_scatter_too_large_to_compare_is_declined_with_the_figure(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [100_000]), "i": ("int64", [100_000]), "u": ("float32", [100_000])},
        lambda g, x, i, u: g.op.ScatterElements(x, i, u, axis=0, reduction="add"),
    )
    check_declined(graph, tmp_path, "scatter_elements_with_reduction", "10,000,000,000 elements")


# --- Resize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(7, 5), (16, 40), (1, 1), (15, 16)])
def test_antialiased_resize_is_torchs(aligned: bool, mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    graph = example(
        {"x": ("float32", ["n", 3, 16, 21])},
        lambda g, x: g.op.Resize(
            g.op.Identity(x),
            None,
            None,
            list(size),
            axes=[2, 3],
            mode=mode,
            antialias=1,
            exclude_outside=1,
            cubic_coeff_a=-0.5,
            coordinate_transformation_mode="align_corners" if aligned else "half_pixel",
        ),
    )
    feeds = example_inputs(to_proto(graph))
    y = torch.nn.functional.interpolate(
        torch.from_numpy(feeds["x"]),
        size=size,
        mode={"linear": "bilinear", "cubic": "bicubic"}[mode],
        align_corners=aligned,
        antialias=True,
    )
    expected = {graph.outputs[0].name: y.numpy()}
    check(graph, tmp_path, "resize_as_matmul", feeds, expected, tolerance=3e-6)


def test_antialiasing_over_a_dynamic_axis_with_repeated_edges_is_declined(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [1, 3, "h", 16])},
        lambda g, x: g.op.Resize(x, None, None, [1, 3, 5, 5], mode="linear", antialias=1),
    )
    check_declined(graph, tmp_path, "resize_as_matmul", "whose edges are repeated")


# --- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_dilated_pooling(spatial: int, ceil: int, stride: int, op: str, tmp_path: Path) -> None:
    rules = {"MaxPool": "dilated_maxpool_as_slices", "AveragePool": "dilated_averagepool_as_slices"}
    for include in (0, 1) if op == "AveragePool" else (None,):
        graph = example(
            {"x": ("float32", ["n", 2, *[9, 8, 10][:spatial]])},
            lambda g, x, include=include: g.node(
                op,
                [x],
                {
                    "kernel_shape": [2, 3, 2][:spatial],
                    "strides": [stride] * spatial,
                    "dilations": [2, 1, 3][:spatial],
                    "pads": [1, 0, 1][:spatial] + [0, 1, 1][:spatial],
                    "ceil_mode": ceil,
                    "count_include_pad": include,
                },
            ),
        )
        check(graph, tmp_path, rules[op])


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_places_of_equal_maxima_are_the_first(spatial: int, tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [2, 2, *[6] * spatial])},
        lambda g, x: g.op.MaxPool(x, outputs=2, kernel_shape=[3] * spatial, strides=[2] * spatial),
    )
    feeds = {"x": np.random.default_rng(0).integers(0, 2, [2, 2, *[6] * spatial]).astype(np.float32)}
    check(graph, tmp_path, "maxpool_with_indices_as_slices", feeds)


def test_ceil_mode_over_a_dynamic_length_counts_the_windows_at_run_time(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [1, 2, "t"])},
        lambda g, x: g.op.MaxPool(x, kernel_shape=[3], strides=[2], dilations=[2], ceil_mode=1),
    )
    for length in (7, 8, 9, 10):
        feeds = {"x": np.random.default_rng(length).standard_normal((1, 2, length)).astype(np.float32)}
        check(graph, tmp_path, "dilated_maxpool_as_slices", feeds, builds=length == 7)


def test_dilated_windows_padded_automatically_are_declined(tmp_path: Path) -> None:
    graph = example(
        {"x": ("float32", [1, 2, 9])},
        lambda g, x: g.op.MaxPool(x, kernel_shape=[3], dilations=[2], auto_pad="SAME_UPPER"),
    )
    check_declined(graph, tmp_path, "dilated_maxpool_as_slices", "auto_pad SAME_UPPER")


# --- integers ----------------------------------------------------------------------------------------------------


def spread(dtype: str, shape: tuple[int, ...] = (64,), seed: int = 0) -> np.ndarray:
    limits = np.iinfo(dtype)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    values.reshape(-1)[:4] = [limits.min, limits.max, 0, 1]
    return values


@pytest.mark.parametrize("op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
@pytest.mark.parametrize("dtype", ["int32", "int64", "int8", "uint8"])
@pytest.mark.parametrize("mask", [None, 15, -1, 0, 0x5A, "each"])
def test_bitwise_operators_are_exact(op: str, dtype: str, mask: int | str | None, tmp_path: Path) -> None:
    def build(g: Builder, *inputs: gs.Tensor) -> gs.Tensor:
        if mask is None:
            return g.node(op, list(inputs), {})
        values = spread(dtype, (64,), 3) if mask == "each" else np.array(mask, np.int64).astype(dtype)
        return g.node(op, [g.constant(values), inputs[0]], {})

    names = ["x", "y"] if mask is None else ["x"]
    graph = example({name: (dtype, ["n"]) for name in names}, build)
    feeds = {name: spread(dtype, seed=seed) for seed, name in enumerate(names)}
    rules = {"BitwiseAnd": "bitwise_and_as_remainders", "BitwiseOr": "bitwise_or_as_sum"}
    check(graph, tmp_path, rules.get(op, "bitwise_xor_as_sum"), feeds)


@pytest.mark.parametrize("mask", [None, 0x80000001, 0xF0F0F0F0])
def test_the_uppermost_bit_of_uint32_is_a_bit_like_others(mask: int | None, tmp_path: Path) -> None:
    """Once taken for a sign, which it is not in the int64 that carries it."""

    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
        other = g.cast(y, np.uint32) if mask is None else g.constant(np.uint32(mask))
        return g.cast(g.op.BitwiseAnd(g.cast(x, np.uint32), other), np.int64)

    graph = example({"x": ("int64", [64]), "y": ("int64", [64])}, build)
    feeds = {name: spread("uint32", seed=seed).astype(np.int64) for seed, name in enumerate("xy")}
    check(graph, tmp_path, "bitwise_and_as_remainders", feeds)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("amount", [None, 0, 1, 7, "each"])
def test_shifts_are_exact(direction: str, dtype: str, amount: int | str | None, tmp_path: Path) -> None:
    signed = dtype[1:] if dtype in ("uint32", "uint64") else "int32"
    width = np.iinfo(dtype).bits

    def build(g: Builder, x: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
        by = g.cast(y, dtype)
        if amount is not None:
            by = g.constant(np.arange(64) % width if amount == "each" else np.array(amount), dtype)
        return g.cast(g.op.BitShift(g.cast(x, dtype), by, direction=direction), signed)

    graph = example({"x": (signed, ["n"]), "y": (signed, ["n"])}, build)
    feeds = {"x": spread(signed), "y": (np.arange(64) % width).astype(signed)}
    by = feeds["y"] if amount in (None, "each") else np.array(amount)
    shift = np.left_shift if direction == "LEFT" else np.right_shift
    y = shift(feeds["x"].astype(dtype), by.astype(dtype)).astype(signed)  # ONNX Runtime shifts no uint16
    check(graph, tmp_path, "bitshift_as_power_of_two", feeds, {graph.outputs[0].name: y})


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_shifts_of_opset_28_take_signs_and_any_amount(direction: str, dtype: str, tmp_path: Path) -> None:
    if onnx.defs.onnx_opset_version() < 28:
        pytest.skip("this onnx has no opset 28")
    width = np.iinfo(dtype).bits
    graph = example(
        {"x": (dtype, ["n"]), "y": (dtype, ["n"])}, lambda g, x, y: g.op.BitShift(x, y, direction=direction), opset=28
    )
    feeds = {"x": spread(dtype), "y": (np.arange(64) % (width + 3) - 1).astype(dtype)}
    model, log = rewritten(graph, tmp_path)
    assert "bitshift_as_power_of_two" in log.nodes, log.declined
    with np.errstate(over="ignore"):
        found = onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]  # ONNX Runtime has no opset 28 yet
    shift = np.left_shift if direction == "LEFT" else np.right_shift
    inside = (feeds["y"] >= 0) & (feeds["y"] < width)
    rest = np.where((feeds["x"] < 0) & (direction == "RIGHT"), -1, 0)
    expected = np.where(inside, shift(feeds["x"], np.where(inside, feeds["y"], 0).astype(dtype)), rest)
    np.testing.assert_array_equal(found, expected)


def test_a_torch_shift_of_negative_int64_is_exact(tmp_path: Path) -> None:
    """As torch exports ``x >> 2``: through uint64, with the sign's bits put back by BitwiseOr."""

    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        shifted = g.op.BitShift(g.cast(x, np.uint64), g.constant(np.uint64(2)), direction="RIGHT")
        signed = g.op.BitwiseOr(shifted, g.constant(np.uint64(3 << 62)))
        return g.op.Where(g.op.Less(x, g.constant(0)), g.cast(signed, np.int64), g.cast(shifted, np.int64))

    graph = example({"x": ("int64", ["n"])}, build)
    x = spread("int64")
    check(graph, tmp_path, "bitshift_as_power_of_two", {"x": x}, {graph.outputs[0].name: x >> 2})


@pytest.mark.parametrize("through", ["uint8", "uint16", "uint32", "uint64", "int16"])
@pytest.mark.parametrize("given", ["int32", "int64"])
def test_a_detour_through_a_missing_type_wraps(through: str, given: str, tmp_path: Path) -> None:
    graph = example({"x": (given, ["n"])}, lambda g, x: g.cast(g.cast(x, through), np.int64))
    check(graph, tmp_path, "cast_past_missing_type", {"x": spread(given)})


# --- quantisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16"])
@pytest.mark.parametrize("zero", [0, 3, 100])
@pytest.mark.parametrize("channels", [False, True])
def test_a_quantisation_pair_keeps_its_grid(dtype: str, zero: int, channels: bool, tmp_path: Path) -> None:
    if dtype == "int8" and zero == 0:
        pytest.skip("native")
    scales = np.array([0.02, 0.5, 0.001], np.float32) if channels else np.array(0.03, np.float32)
    zeros = np.full(scales.shape, zero, dtype)

    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        stored = g.op.QuantizeLinear(x, g.constant(scales), g.constant(zeros), axis=1)
        return g.op.DequantizeLinear(stored, g.constant(scales), g.constant(zeros), axis=1)

    graph = example({"x": ("float32", ["n", 3, 50])}, build, 21 if dtype == "uint16" else 13)
    feeds = example_inputs(to_proto(graph))
    feeds["x"] *= 3
    check(graph, tmp_path, "dequantize_in_float", feeds)


def test_uint8_around_128_keeps_an_int8_pair(tmp_path: Path) -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        steps, zero = g.constant(np.float32(0.05)), g.constant(np.uint8(128))
        return g.op.DequantizeLinear(g.op.QuantizeLinear(x, steps, zero), steps, zero)

    graph = example({"x": ("float32", [4, 8])}, build)
    check(graph, tmp_path, "dequantize_in_float")
    assert [node.op_type for node in onnx.load(tmp_path / "after.onnx").graph.node] == [
        "QuantizeLinear",
        "DequantizeLinear",
    ]


def test_int8_around_zero_is_left_alone(tmp_path: Path) -> None:
    def build(g: Builder, x: gs.Tensor) -> gs.Tensor:
        steps, zero = g.constant(np.float32(0.05)), g.constant(np.int8(0))
        return g.op.DequantizeLinear(g.op.QuantizeLinear(x, steps, zero), steps, zero)

    _, log = rewritten(example({"x": ("float32", [4, 8])}, build), tmp_path)
    assert not log.changes, log.nodes


# --- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [[], ["n"], [2, "n"]])
def test_determinants(n: int, batch: list[int | str], tmp_path: Path) -> None:
    check(example({"x": ("float32", [*batch, n, n])}, lambda g, x: g.op.Det(x)), tmp_path, "det_by_cofactors")


def test_a_large_determinant_is_declined(tmp_path: Path) -> None:
    graph = example({"x": ("float32", [5, 5])}, lambda g, x: g.op.Det(x))
    check_declined(graph, tmp_path, "det_by_cofactors", "5 by 5")


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [None, [0], [-1, 1]])
def test_extremes_of_bool(op: str, keepdims: int, axes: list[int] | None, tmp_path: Path) -> None:
    graph = example({"x": ("bool", ["n", 3, 4])}, lambda g, x: g.node(op, [x, axes], {"keepdims": keepdims}))
    check(graph, tmp_path, "reduce_bool_as_int32")


@pytest.mark.parametrize(
    ("a", "b"), [([3], ["n", 3, 4]), ([3], [2, "n", 3, 4]), (["n", 4, 3], [3]), ([2, 2, "n", 3], [3])]
)
def test_vectors_times_stacks(a: list[int | str], b: list[int | str], tmp_path: Path) -> None:
    graph = example({"a": ("float32", a), "b": ("float32", b)}, lambda g, a, b: g.op.MatMul(a, b))
    check(graph, tmp_path, "vector_times_stack")
