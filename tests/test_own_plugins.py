"""The bridge's own plugins: what their kernels compute, against ONNX Runtime, and on CUDA against the CPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bridge.plugins import deform_conv, nms, nonzero, python  # noqa: E402
from bridge.plugins.python import TorchPlugin, evaluate  # noqa: E402

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
BOTH = pytest.mark.parametrize("device", ["cpu", CUDA])


def on(device: str, plugin: TorchPlugin, inputs: list[Any]) -> list[Any]:
    return [tensor.cpu() for tensor in evaluate(plugin, [tensor.to(device) for tensor in inputs])]


def in_onnx_runtime(op: str, inputs: list[Any], opset: int = 20, **attributes: Any) -> np.ndarray:
    """The operator's first output; None is an input left out."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    names = [f"x{index}" if item is not None else "" for index, item in enumerate(inputs)]
    feeds = {name: item.numpy() for name, item in zip(names, inputs, strict=True) if name}
    helper = onnx.helper
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)], "one", infos, [onnx.ValueInfoProto(name="y")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, feeds)[0]
    return found


# --- NonZero -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4, 5), (1, 1), (0, 3), (5, 0)])
@pytest.mark.parametrize("kind", ["float32", "float16", "bool", "int64", "int8"])
def test_nonzero_is_torchs(device: str, shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, shape, generator=generator).to(getattr(torch, kind))
    for case in (x, torch.zeros_like(x), torch.ones_like(x)):
        indices, count = on(device, nonzero.NonZero(), [case])
        expected = torch.nonzero(case).T
        assert int(count) == expected.shape[1] and indices.dtype == torch.int64 and count.dtype == torch.int32
        assert torch.equal(indices, expected), f"{shape} {kind}"


def test_nonzero_of_a_scalar_counts_and_has_no_indices() -> None:
    for value, expected in ((3.0, 1), (0.0, 0)):
        indices, count = evaluate(nonzero.NonZero(), [torch.tensor(value)])
        assert tuple(indices.shape) == (0, expected) and int(count) == expected


# --- NonMaxSuppression -------------------------------------------------------------------------------------------


def random_boxes(count: int, batches: int, classes: int, seed: int, levels: int = 0) -> list[Any]:
    """Overlapping boxes; with few ``levels`` of scores many are equal."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, 10, (batches, count, 2))
    boxes = np.concatenate([low, low + random.uniform(0.5, 5, (batches, count, 2))], -1)
    scores = random.uniform(0, 1, (batches, classes, count))
    if levels:
        scores = np.round(scores * levels) / levels
    return [torch.from_numpy(array.astype(np.float32)) for array in (boxes, scores)]


@BOTH
@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize(
    ("most", "iou", "score", "center", "levels"),
    [(5, 0.3, 0.2, 0, 0), (100, 0.5, 0.0, 0, 5), (3, 0.0, 0.5, 1, 0), (100, 1.0, 0.9, 0, 0), (0, 0.5, 0.0, 0, 0)],
)
def test_non_max_suppression_is_onnx_runtimes_and_on_cuda_what_it_is_on_the_cpu(
    device: str, block: int, most: int, iou: float, score: float, center: int, levels: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(nms, "BLOCK", block)
    limits = [torch.tensor([most]), torch.tensor([iou]), torch.tensor([score])]
    for seed in range(3):
        inputs = [*random_boxes(40, 2, 3, seed, levels), *limits]
        plugin = nms.NonMaxSuppression({"center_point_box": center, "most": most})
        chosen, count = on(device, plugin, inputs)
        if device == "cpu":
            expected = in_onnx_runtime("NonMaxSuppression", inputs, center_point_box=center)
        else:
            expected = on("cpu", plugin, inputs)[0].numpy()
        np.testing.assert_array_equal(chosen.numpy(), expected)
        assert int(count) == len(expected)


def test_corners_in_any_order_and_boxes_without_area() -> None:
    boxes = torch.tensor([[[4.0, 4, 0, 0], [0, 0, 4, 4], [1, 1, 1, 1], [0, 4, 4, 0]]])
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.5]]])
    inputs = [boxes, scores, torch.tensor([9]), torch.tensor([0.4]), torch.tensor([0.0])]
    expected = in_onnx_runtime("NonMaxSuppression", inputs)
    np.testing.assert_array_equal(evaluate(nms.NonMaxSuppression(), inputs)[0].numpy(), expected)


# --- DeformConv --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("bias", "mask"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    ("group", "offset_group", "strides", "pads", "dilations"),
    [
        (1, 1, [1, 1], [1, 1, 1, 1], [1, 1]),
        (2, 2, [2, 1], [0, 2, 1, 0], [1, 1]),
        (4, 1, [1, 2], [2, 2, 2, 2], [2, 1]),
        (1, 4, [1, 1], [0, 0, 0, 0], [1, 1]),
    ],
)
def test_deform_conv_is_onnx_runtimes_and_on_cuda_what_it_is_on_the_cpu(
    device: str, bias: bool, mask: bool, group: int, offset_group: int, strides: Any, pads: Any, dilations: Any
) -> None:
    options = {"group": group, "offset_group": offset_group, "strides": strides, "pads": pads, "dilations": dilations}
    rows, columns, height, width = 3, 2, 7, 8
    size = [
        (span + pads[axis] + pads[axis + 2] - dilations[axis] * (kernel - 1) - 1) // strides[axis] + 1
        for axis, (span, kernel) in enumerate(((height, rows), (width, columns)))
    ]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, height, width, generator=generator)
    weight = torch.randn(8, 4 // group, rows, columns, generator=generator)
    offset = torch.randn(2, offset_group * rows * columns * 2, *size, generator=generator) * 2
    masks = torch.rand(2, offset_group * rows * columns, *size, generator=generator) if mask else None
    biases = torch.randn(8, generator=generator) if bias else None
    given = [x, weight, offset, *(item for item in (biases, masks) if item is not None)]
    plugin = deform_conv.DeformConv({**options, "bias": int(bias), "mask": int(mask)})
    if device == "cpu":
        expected = in_onnx_runtime("DeformConv", [x, weight, offset, biases, masks][: 5 if mask else 4], **options)
    else:
        expected = on("cpu", plugin, given)[0].numpy()
    torch.backends.cuda.matmul.allow_tf32 = False
    (found,) = on(device, plugin, given)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    kinds = (torch.float16, torch.bfloat16) if device == "cuda" else (torch.bfloat16,)
    for kind in kinds:
        (low,) = on(device, plugin, [item.to(kind) for item in given])
        assert low.dtype == kind
        np.testing.assert_allclose(low.float().numpy(), expected, rtol=0.1, atol=0.2)


def test_batches_are_done_one_by_one_where_memory_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, offset = torch.randn(3, 2, 5, 5), torch.randn(2, 2, 3, 3), torch.randn(3, 18, 3, 3)
    whole = evaluate(deform_conv.DeformConv(), [x, weight, offset])
    monkeypatch.setattr(deform_conv, "LARGEST_COLUMNS", 1)
    torch.testing.assert_close(evaluate(deform_conv.DeformConv(), [x, weight, offset]), whole)


def test_offsets_far_outside_or_not_a_number_read_nothing() -> None:
    x, weight = torch.randn(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    for value in (1e9, -1e9, float("inf"), float("nan")):
        found = deform_conv.deform_conv(x, weight, torch.full((1, 2, 4, 4), value))
        assert torch.equal(found, torch.zeros_like(x)), value


@BOTH
def test_the_kernels_are_torchvisions(device: str) -> None:
    vision = pytest.importorskip("torchvision").ops
    boxes, scores = random_boxes(500, 1, 1, seed=4)
    limits = [torch.tensor([500]), torch.tensor([0.4]), torch.tensor([0.0])]
    chosen = on(device, nms.NonMaxSuppression(), [boxes, scores, *limits])[0]
    assert torch.equal(chosen[:, 2], vision.nms(boxes[0].to(device), scores[0, 0].to(device), 0.4).cpu())
    x, weight, bias = torch.randn(2, 8, 16, 16), torch.randn(6, 4, 3, 3), torch.randn(6)
    offset, mask = torch.randn(2, 36, 8, 8), torch.rand(2, 18, 8, 8)
    given = [item.to(device) for item in (x, offset, weight, bias)]
    expected = vision.deform_conv2d(*given, stride=2, padding=2, dilation=2, mask=mask.to(device)).cpu()
    options = {
        "strides": [2, 2],
        "pads": [2] * 4,
        "dilations": [2, 2],
        "group": 2,
        "offset_group": 2,
        "bias": 1,
        "mask": 1,
    }
    (found,) = on(device, deform_conv.DeformConv(options), [x, weight, offset, bias, mask])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- TensorRT's side ---------------------------------------------------------------------------------------------


def test_the_plugins_are_what_the_passes_take_them_for() -> None:
    pytest.importorskip("onnx_graphsurgeon")
    from passes.plugins import DEFORM_CONV, NON_MAX_SUPPRESSION, NON_ZERO

    classes = {
        NON_ZERO: nonzero.NonZero,
        NON_MAX_SUPPRESSION: nms.NonMaxSuppression,
        DEFORM_CONV: deform_conv.DeformConv,
    }
    for known, own in classes.items():
        assert known.key == (own.namespace, own.name, own.version)
        assert dict(known.attributes) == dict(own.attributes)
        assert known.module is not None and own in vars(importlib.import_module(known.module)).values()
    assert NON_MAX_SUPPRESSION.outputs == nms.NonMaxSuppression.outputs


class Twice(TorchPlugin):
    name = "Twice"
    attributes: ClassVar = {"factor": 2.0, "count": 3, "mode": "plain", "sizes": [1, 2], "scales": [0.5]}

    def output_types(self, inputs: Any) -> list[str]:
        return list(inputs)

    def output_shapes(self, inputs: Any, sizes: Any) -> Any:
        return list(inputs)

    def run(self, inputs: Any, outputs: Any) -> None:
        outputs[0].copy_(inputs[0] * self.values["factor"])


def fake_tensorrt() -> Any:
    """As much of TensorRT's module as a plugin's class is made of."""
    empty = [type(name, (), {}) for name in ("A", "B", "C", "D", "E")]
    kinds = SimpleNamespace(**{name: name for name in python.TYPES.values()})
    return SimpleNamespace(
        **dict(zip(("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime"), empty, strict=False)),
        IPluginCreatorV3One=empty[4],
        DataType=kinds,
        PluginFieldType=SimpleNamespace(CHAR="CHAR", FLOAT32="FLOAT32", INT32="INT32"),
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, kind=kind),
        PluginFieldCollection=list,
        TensorFormat=SimpleNamespace(LINEAR="LINEAR"),
        __hash__=lambda self: 0,
    )


class FakeTensorRT(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_attributes_survive_being_written_into_an_engine() -> None:
    trt = FakeTensorRT(**vars(fake_tensorrt()))
    creator = python._creator_class(trt)(Twice)
    values = {"factor": 1.5, "count": -4, "mode": "grün", "sizes": [7, 8, 9], "scales": [0.25, 4.0]}
    plugin = python._plugin_class(trt)(Twice(values))
    again = creator.create_plugin("name", plugin.get_fields_to_serialize(), None)
    assert again.inner.values == values and again.clone().inner.values == values
    assert creator.create_plugin("name", [], None).inner.values == dict(Twice.attributes)
    assert [field.kind for field in creator.field_names] == ["FLOAT32", "INT32", "CHAR", "INT32", "FLOAT32"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", sorted(python.TYPES))
def test_a_plugin_works_on_memory_that_it_is_given_and_on_the_stream(kind: str) -> None:
    trt = FakeTensorRT(**vars(fake_tensorrt()))
    plugin = python._plugin_class(trt)(nonzero.NonZero())
    x = torch.tensor([[0, 1, 1], [1, 0, 0]], device="cuda").to(getattr(torch, kind))
    indices = torch.full((2, 6), -1, device="cuda")
    count = torch.full((), -1, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    described = [SimpleNamespace(type=python.TYPES[kind], dims=(2, 3))]
    made = [SimpleNamespace(type="INT64", dims=(2, -1)), SimpleNamespace(type="INT32", dims=())]
    torch.cuda.synchronize()
    plugin.enqueue(described, made, [x.data_ptr()], [indices.data_ptr(), count.data_ptr()], 0, stream.cuda_stream)
    stream.synchronize()
    assert int(count) == 3
    assert torch.equal(indices.view(-1)[:6].view(2, 3).cpu(), torch.tensor([[0, 0, 1], [1, 2, 0]]))
