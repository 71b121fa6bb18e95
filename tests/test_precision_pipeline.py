"""A precision, from the setting to the engine: what is built, what is said of it, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

import bridge
from bridge.diff import diff
from bridge.errors import CompareError, PrecisionError, UsageError
from bridge.runtime.record import record_of, sidecar_of

from . import support

pytestmark = pytest.mark.skipif(not support.RTX_INSTALLED, reason="the Python package 'tensorrt_rtx' is not installed")

BUILT = ("built", "verified")
CASTS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


class Cnn(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.body, self.head = nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(channels, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.norm(self.stem(image)))
        return self.head((found + torch.relu(self.body(found))).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 128), nn.Linear(128, 5)
        layer = nn.TransformerEncoderLayer(128, 4, 128, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(rows)).mean(1)).softmax(-1)


class Overflow(nn.Module):
    """Its square leaves float16's range for the calibration inputs, and not for the example."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.after(self.before(rows).square() * 0.01)


def seeded(kind: type[nn.Module], *shape: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(shape)


def convert(source: Any, example: torch.Tensor, folder: Path, precision: Any, **options: Any) -> Any:
    return bridge.convert(source, (example,), workdir=folder, precision=precision, target=support.RTX, **options)


def typical(example: torch.Tensor, count: int = 4) -> list[tuple[torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn_like(example),) for _ in range(count)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BRIDGE_CACHE_DIR", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def types_of(model: Path) -> dict[str, str]:
    """By node, the type of what it returns, at the type of its first floating-point output."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(model))
    known = {info.name: info.type.tensor_type.elem_type for info in (*proto.graph.value_info, *proto.graph.output)}
    return {node.name: CASTS[known[node.output[0]]] for node in proto.graph.node if known.get(node.output[0]) in CASTS}


CASES = [
    *((kind, precision) for kind in (Cnn, Transformer) for precision in ("fp16", "bf16", "int8", "int8+fp16")),
    *((Transformer, precision) for precision in ("fp8", "int4", "int4+fp16")),
]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_each_precision_is_built_and_said(tmp_path: Path, kind: type[nn.Module], precision: str) -> None:
    module, example = seeded(kind, *((2, 3, 16, 16) if kind is Cnn else (2, 7, 12)))
    result = convert(module, example, tmp_path, precision, calibration=typical(example))
    assert result.status in BUILT, result.error
    assert result.onnx == tmp_path / "typed.onnx" and result.rewritten_onnx == tmp_path / "rewritten.onnx"
    onnx.checker.check_model(str(result.onnx), full_check=True)
    onnx.checker.check_model(str(result.rewritten_onnx), full_check=True)
    assert not (tmp_path / ".partial").exists()

    first = precision.split("+")[0]
    assert result.precisions[first] > (0.5 if first != "int4" else 0.3), result.precisions
    assert sum(result.precisions.values()) == pytest.approx(1, abs=1e-4)
    steps = [item for item in result.comparisons if item.candidate == "typed"]
    assert {item.inputs for item in steps} == {"example", *(f"calibration {index}" for index in range(4))}
    assert all(item.agreed for item in steps)
    assert 0 < result.source_error.relative < 0.05, result.source_error
    assert result.layers and result.layers[0].introduced.relative > 0
    if "16" in precision:
        reasons = [reason for reason, nodes in result.kept.items() if "node_mean" in nodes]
        assert reasons == ["by default: it adds up many elements"], result.kept
    again = bridge.ConversionResult.load(tmp_path / "result.json")
    assert (again.precisions, again.kept, again.layers) == (result.precisions, result.kept, result.layers)


def test_products_that_stay_unquantised_are_named(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    result = convert(module, example, tmp_path, "fp8+fp16")
    assert result.status in BUILT, result.error
    assert len(result.kept["Conv is not among what is quantised to fp8"]) == 2, result.kept
    assert any("of the multiply-adds are in fp8" in note for note in result.notes), result.notes


def test_a_precision_file_says_it_by_module_operator_and_node(tmp_path: Path) -> None:
    module, example = seeded(Transformer, 2, 7, 12)
    nodes = convert(module, example, tmp_path / "names", "fp16", build=False)
    first, *_, last = [layer.node for layer in nodes.layers if layer.module == "embed" or layer.node == "node_linear"]
    file = tmp_path / "precision.yaml"
    file.write_text(f'precision: fp16\nfp32: [blocks, "op:Softmax"]\nfp16: ["node:{first}"]\n')
    result = convert(module, example, tmp_path / "out", file)
    assert result.status in BUILT, result.error
    found = types_of(result.onnx)
    softmaxes = {node.name for node in onnx.load(result.onnx).graph.node if node.op_type == "Softmax"}
    assert softmaxes and {found[name] for name in softmaxes} == {"float32"}
    assert found[first] == "float16" and last
    inside = [name for name in found if "scaled_dot_product" in name or "layer_norm" in name]
    assert inside and {found[name] for name in inside} == {"float32"}


def test_a_rule_for_a_node_goes_before_its_module_and_its_operator(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    stem, body = [node.name for node in onnx_nodes(module, example, tmp_path) if node.op_type == "Conv"]
    file = tmp_path / "precision.json"
    rules = {"precision": "fp16", "fp32": ["stem", "op:Conv"], "fp16": [f"node:{stem}"]}
    file.write_text(json.dumps(rules))
    result = convert(module, example, tmp_path / "out", str(file))
    found = types_of(result.onnx)
    assert (found[stem], found[body]) == ("float16", "float32"), found


def onnx_nodes(module: nn.Module, example: torch.Tensor, folder: Path) -> list[onnx.NodeProto]:
    plain = convert(module, example, folder / "plain", "fp32", build=False)
    return list(onnx.load(plain.onnx).graph.node)


def test_a_rule_that_fits_nothing_is_refused_with_what_is_near(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    with pytest.raises(UsageError, match=r"'haed' fits no node of the model; near are head"):
        convert(module, example, tmp_path, {"precision": "fp16", "fp32": ["haed"]})
    assert not (tmp_path / ".partial").exists() and not (tmp_path / "typed.onnx").exists()


def test_inputs_and_outputs_take_the_low_type_where_that_is_asked(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    result = convert(module, example, tmp_path, {"precision": "fp16", "io": "convert"})
    assert result.status in BUILT, result.error
    tensors = [*result.inputs, *result.outputs]
    assert [(item.dtype, item.source_dtype) for item in tensors] == [("float16", "float32")] * 2
    model = onnx.load(result.onnx)
    ends = (*model.graph.input, *model.graph.output)
    assert {item.type.tensor_type.elem_type for item in ends} == {TensorProto.FLOAT16}
    sidecar = sidecar_of(result.engine)
    assert sidecar is not None
    assert record_of(sidecar).source_types == {"image": "float32", "output": "float32"}, "what a TRTModule converts by"
    kept = convert(module, example, tmp_path / "kept", "fp16")
    assert {item.dtype for item in (*kept.inputs, *kept.outputs)} == {"float32"}


def test_an_input_that_its_low_type_does_not_hold_is_answered_with_the_setting_that_keeps_it(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, income: torch.Tensor) -> torch.Tensor:
            return self.layer(income / 1e5)

    module, incomes = Scaled(), torch.full((2, 4), 2e5)
    result = convert(module, incomes, tmp_path, {"precision": "fp16", "io": "convert"}, build=False)
    assert (result.status, result.stage) == ("failed", "compare"), result.error
    assert "io: keep, if inputs or outputs need more than the range and digits of fp16" in result.error
    assert convert(module, incomes, tmp_path / "kept", "fp16", build=False).status == "rewritten"


def test_where_no_engine_runs_the_task_check_is_given_what_the_low_precision_computes(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    asked: list[np.ndarray] = []

    def rounded(run: Any) -> str:
        (output,) = run({"image": example.numpy()}).values()
        asked.append(output)
        assert np.array_equal(output, output.astype(np.float16).astype(np.float32)), "not rounded to float16"
        return "rounded"

    result = convert(module, example, tmp_path, "fp16", task_check=rounded)
    assert result.status in BUILT, result.error
    assert result.task_check.ran_on == ("typed" if result.status == "built" else "engine") and len(asked) == 1
    assert asked[0].dtype == np.float32 and asked[0].shape == (2, 10)


def test_an_error_over_the_tolerance_names_the_layers(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    options: dict[str, Any] = {"tolerance": bridge.Tolerance(1e-7, 1e-7), "build": False}
    result = convert(module, example, tmp_path, "bf16", **options)
    assert (result.status, result.stage) == ("failed", "compare") and isinstance(result.exception, CompareError)
    assert "in bf16 the model computes something else" in result.error
    assert result.layers and result.layers[0].node in result.error
    assert "precision file" in result.error
    unnamed = convert(module, example, tmp_path, "bf16", layers=False, **options)
    assert unnamed.layers == [] and "layers=True names the layers" in unnamed.error


def test_values_of_the_calibration_that_leave_the_range_stay_in_fp32(tmp_path: Path) -> None:
    module, example = seeded(Overflow, 2, 16)
    large = [(example * 1000,)]
    result = convert(module, example, tmp_path, "fp16", calibration=large)
    assert result.status in BUILT, result.error
    reasons = [reason for reason in result.kept if "range" in reason or "float16" in reason]
    assert reasons, result.kept
    assert all(item.candidate_inf == item.candidate_nan == 0 for item in result.comparisons)
    assert result.source_error.non_finite == 0


def test_nothing_to_quantise_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    result = convert(module, example, tmp_path, "int4")
    assert (result.status, result.stage) == ("failed", "precision") and isinstance(result.exception, PrecisionError)
    assert "int4 was asked for, and nothing can be quantised" in result.error
    assert "the 16 rows of its weight are no multiple of 128 or 64" in result.error
    assert "ReduceMean" not in result.error, "only what could have been quantised is of interest"
    assert result.error.endswith("Ask for int8, which takes convolutions and weights of any size, or for fp32 alone.")
    ruled = convert(module, example, tmp_path / "ruled", {"precision": "int8+fp16", "fp32": ["op:Conv", "op:Gemm"]})
    assert "rules ask for other types of all that could be. Ask for fp32 alone." in ruled.error
    left = {path.name for path in tmp_path.iterdir()} - {"ruled"}
    assert left == {"exported.onnx", "rewritten.onnx", "result.json", "cache"} - ({"cache"} - left), left
    assert bridge.ConversionResult.load(tmp_path / "result.json").stage == "precision"


class Stepped(nn.Module):
    """Rounds what it computes to steps, as ONNX Runtime's and torch's quantised models do."""

    def __init__(self, zero: int) -> None:
        super().__init__()
        self.zero = zero
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = torch.fake_quantize_per_tensor_affine(layer(rows), 0.03, self.zero, -128, 127)
        return rows


@pytest.mark.parametrize("zero", [0, 5])
def test_a_model_that_quantises_by_itself_is_held_to_its_steps_where_the_rest_is_rounded(
    tmp_path: Path, zero: int
) -> None:
    torch.manual_seed(0)
    result = convert(Stepped(zero).eval(), torch.randn(9, 64), tmp_path, "fp16")
    assert result.status in BUILT, result.error
    typed = next(item for item in result.comparisons if item.candidate == "typed")
    assert result.source_error.relative > 1e-2, "more than fp16 alone is allowed: a value went to the next step"
    assert typed.tolerance.rtol == 0.2 and typed.agreed
    assert next(item for item in result.comparisons if item.candidate == "rewritten").tolerance.rtol == 1e-3
    limits = {row.stage: row.tolerance.rtol for row in diff(tmp_path, layers=False).stages if row.tolerance}
    assert limits == {"rewritten": 1e-3, "typed": 0.2}, "and so it is in a diff"


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_a_module_that_is_in_16_bits_already_converts_as_it_is(
    tmp_path: Path, dtype: torch.dtype, precision: str
) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    module, example = module.to(dtype), example.to(dtype)
    for asked in ("fp32", precision):
        result = convert(module, example, tmp_path / asked, asked)
        assert result.status in BUILT, result.error
        assert result.precisions[precision] > 0.9, result.precisions
        assert result.onnx == result.rewritten_onnx
        assert result.source_error.relative < 0.02


@pytest.mark.parametrize(("dtype", "own"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_a_module_that_is_in_16_bits_is_quantised_where_that_is_asked(
    tmp_path: Path, dtype: torch.dtype, own: str
) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    module, example = module.to(dtype), example.to(dtype)
    asked = {"precision": "int8", "fp32": ["head"]}
    result = convert(module, example, tmp_path, asked, calibration=typical(example))
    assert result.status in BUILT, result.error
    assert result.precisions["int8"] > 0.9 and result.precisions[own] > 0 and "fp32" not in result.precisions
    assert not result.kept and 0 < result.source_error.relative < 0.05
    assert any("rules for float types (head) have no effect" in note for note in result.notes), result.notes


class Experts(nn.Module):
    """A mixture of two linear layers, said in Einstein's way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, 32) / 4)
        self.cell = nn.GRU(32, 8, batch_first=True)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        both = torch.einsum("btd,ndf->bntf", rows, self.weight)
        return self.cell(torch.relu(both).sum(1))[0]


@pytest.mark.parametrize("precision", ["int8", "int8+fp16", "int8+bf16"])
def test_an_einsum_is_quantised_as_products_and_what_cannot_be_is_named(tmp_path: Path, precision: str) -> None:
    module, example = seeded(Experts, 2, 5, 16)
    result = convert(module, example, tmp_path, precision, calibration=typical(example))
    assert result.status in BUILT, result.error
    assert result.precisions["int8"] > 0.5, result.precisions
    assert any("GRU" in reason for reason in result.kept), result.kept
    assert not any(reason.startswith("not quantised") for reason in result.kept), result.kept


def test_a_rule_alone_may_ask_for_a_low_precision(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    result = convert(module, example, tmp_path, {"precision": "fp32", "fp16": ["body"]})
    assert result.status in BUILT, result.error
    assert result.precision == "fp16" and 0.3 < result.precisions["fp16"] < 0.9, result.precisions


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids)) * scale.float()


@pytest.mark.parametrize("precision", ["fp16", "int8+fp16"])
@pytest.mark.parametrize("target", ["tensorrt-8.5", "tensorrt-rtx"])
def test_a_calibration_has_the_types_of_the_source_where_the_target_lacks_them(
    tmp_path: Path, target: str, precision: str
) -> None:
    inputs = (torch.randint(20, (2, 5)), torch.rand(1, dtype=torch.float64))
    options: dict[str, Any] = {"workdir": tmp_path, "target": target, "build": False, "precision": precision}
    result = bridge.convert(Tokens().eval(), inputs, calibration=[inputs] * 2, **options)
    assert result.status == "rewritten", result.error
    assert result.source_error is not None


class Scaled(nn.Module):
    """Two products, and between them what is to be in half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(rows)) * 0.5)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_a_weakly_typed_target_is_given_the_quantisation_alone(tmp_path: Path, precision: str) -> None:
    """Its builder chooses float types itself, within what it is told; ``typed.onnx`` shows what that comes to."""
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"target": "tensorrt-8.5", "build": False, "precision": precision}
    result = bridge.convert(Scaled().eval(), (rows,), workdir=tmp_path, calibration=[(rows,)], **options)
    assert result.status == "rewritten", result.error
    half = precision == "int8+fp16"
    assert result.onnx == tmp_path / ("quantised.onnx" if half else "typed.onnx")
    assert (tmp_path / "quantised.onnx").exists() == half
    found, shown = operators(result.onnx), operators(tmp_path / "typed.onnx")
    assert found["QuantizeLinear"] == shown["QuantizeLinear"] == 4 and not found["Cast"]
    assert bool(shown["Cast"]) == half
    session = onnxruntime.InferenceSession(str(result.onnx), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    error = np.linalg.norm(scores - Scaled().eval()(rows).detach().numpy()) / np.linalg.norm(scores)
    assert 1e-4 < error < 0.05
    assert result.source_error is not None and result.source_error.relative == pytest.approx(error, rel=0.3)


class Contraction(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,bkj->bik", x, y).relu()


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_an_einsum_is_quantised_as_products_on_weakly_typed_targets_too(tmp_path: Path, precision: str) -> None:
    inputs = (torch.randn(2, 8, 16), torch.randn(2, 8, 16))
    options: dict[str, Any] = {"target": "tensorrt-8.5", "build": False, "precision": precision}
    result = bridge.convert(Contraction().eval(), inputs, workdir=tmp_path, calibration=[inputs], **options)
    assert result.status == "rewritten" and result.onnx is not None, result.error
    for path in (result.onnx, tmp_path / "typed.onnx"):
        found = operators(path)
        assert found["QuantizeLinear"] == 2 and not found["Einsum"], found


def test_where_tensorrt_has_no_calibrator_the_algorithm_that_is_like_it_is_used(tmp_path: Path) -> None:
    rows = torch.randn(6, 16)
    options: dict[str, Any] = {"target": "tensorrt-rtx-1.7", "build": False, "precision": "int8"}
    result = bridge.convert(
        Scaled().eval(), (rows,), workdir=tmp_path, calibration_algorithm="MINMAX_CALIBRATION", **options
    )
    assert result.status == "rewritten" and operators(tmp_path / "typed.onnx")["QuantizeLinear"], result.error
    assert [note for note in result.notes if "has no calibrators: the model is quantised, by minmax" in note]
    options |= {"target": "tensorrt-8.5", "precision": "fp16"}  # which calibrates nothing, and has calibrators
    result = bridge.convert(
        Scaled().eval(), (rows,), workdir=tmp_path, calibration_algorithm="MINMAX_CALIBRATION", **options
    )
    assert not [note for note in result.notes if "calibrators" in note], result.notes


def test_what_tensorrt_calibrates_is_not_quantised_in_the_model(tmp_path: Path) -> None:
    rows = torch.randn(6, 16)
    options: dict[str, Any] = {"target": "tensorrt-8.5", "build": False, "precision": "int8"}
    asked = bridge.convert(
        Scaled().eval(), (rows,), workdir=tmp_path / "asked", calibration_algorithm="MINMAX_CALIBRATION", **options
    )
    half = bridge.convert(Scaled().eval().half(), (rows.half(),), workdir=tmp_path / "half", **options)
    dla = bridge.convert(
        Scaled().eval(), (rows,), workdir=tmp_path / "dla", builder={"default_device": "DLA"}, **options
    )
    for result in (asked, half, dla):
        assert result.status == "rewritten" and result.onnx == result.rewritten_onnx, result.error
        assert any("calibrated with the example" in note for note in result.notes), result.notes


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.gelu(self.norm(torch.einsum("bi,bj->bij", rows, rows))))


@pytest.mark.parametrize("target", ["tensorrt-8.5", "tensorrt-10", "tensorrt-rtx"])
def test_a_rule_means_the_same_whatever_the_passes_make_of_an_operator(tmp_path: Path, target: str) -> None:
    module, example = seeded(Norms, 2, 16)
    asked = {"precision": "fp16", "fp32": ["op:LayerNormalization", "op:Einsum", "node:node_gelu"]}
    options: dict[str, Any] = {"workdir": tmp_path, "target": target, "build": False, "precision": asked}
    result = bridge.convert(module, (example,), **options)
    assert result.status == "rewritten", result.error
    types = types_of(tmp_path / "typed.onnx")
    low = [name for name, kind in types.items() if kind == "float16" and "/cast_" not in name]
    assert not [name for name in low if any(part in name for part in ("norm", "einsum", "gelu"))], low
    assert any("linear" in name for name in low), low
    assert not result.kept


def test_the_same_is_taken_from_the_cache_and_nothing_else_is(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    calibrations = {"one": typical(example), "other": [(torch.randn_like(example) * 3,)]}
    steps: list[tuple[Any, str, bool]] = [
        ("int8", "one", False),
        ("int8", "one", True),
        ("int8", "other", False),
        ("int8+fp16", "one", False),
        ({"precision": "int8", "fp32": ["head"]}, "one", False),
        ("int8", "one", True),
    ]
    for index, (precision, calibration, hit) in enumerate(steps):
        folder = tmp_path / str(index)
        result = convert(module, example, folder, precision, calibration=calibrations[calibration])
        assert result.status in BUILT, result.error
        assert result.from_cache is hit, f"step {index}: {precision} with {calibration}"
        assert sum(result.precisions.values()) == pytest.approx(1, abs=1e-4), "the cache remembers the shares"


def test_several_precisions_are_set_side_by_side(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    (tmp_path / "careful.yaml").write_text("precision: int8+fp16\nfp32: [head]\n")
    asked = ["fp32", "fp16", str(tmp_path / "careful.yaml"), "int4"]
    made = convert(module, example, tmp_path / "out", asked, calibration=typical(example))
    assert isinstance(made, bridge.TradeOff)
    assert [row.precision for row in made.rows] == ["fp32", "fp16", "careful", "int4"]
    assert [row.status in BUILT for row in made.rows] == [True, True, True, False] and not made.ok
    errors = [row.source_error.relative for row in made.rows[:3]]
    assert errors[0] < errors[1] < errors[2], errors
    assert made["careful"].engine == tmp_path / "out" / "careful" / "model.engine"
    assert made.rows[2].engine_bytes == made["careful"].engine.stat().st_size
    table = made.table().splitlines()
    assert table[0].split() == ["precision", "status", "engine", "error", "latency", "computes", "in"]
    assert "failed (precision)" in table[4] and table[5].startswith("int4: int4 was asked for")
    written = json.loads((tmp_path / "out" / "trade_off.json").read_text())
    assert [row["precisions"] for row in written["rows"]] == [row.precisions for row in made.rows]
    if made.rows[0].status == "built":
        assert all(row.latency is None for row in made.rows) and table[1].count("not run") == 1
    with pytest.raises(PrecisionError, match="nothing can be quantised"):
        convert(module, example, tmp_path / "out", ["fp16", "int4"], check=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "the list is empty"),
        (["fp16", "fp16"], "fp16 stands there twice"),
        (["fp16", "fp17"], "'fp17'"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_is_started(tmp_path: Path, asked: list[str], message: str) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    with pytest.raises(UsageError, match=message):
        convert(module, example, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_torch2trt_makes_one_module(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    with pytest.raises(UsageError, match="torch2trt makes one module"):
        bridge.torch2trt(module, [example], precision=["fp32", "fp16"], workdir=tmp_path / "out")


ZOO = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 4)), (torch.randn(2, 3, 16, 16),)

def typical():
    torch.manual_seed(1)
    return [(torch.randn(2, 3, 16, 16),) for _ in range(3)]
"""


@pytest.mark.parametrize("way", ["command line", "manifest"])
def test_a_batch_makes_an_engine_of_each_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    from bridge.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.py").write_text(ZOO)
    (tmp_path / "careful.yaml").write_text("precision: fp16\nfp32: ['op:Gemm']\n")
    (tmp_path / "models.yaml").write_text(
        "models:\n  - {name: net, source: 'zoo:net', calibration: 'zoo:typical',\n"
        "     precision: [fp32, careful.yaml, int8]}\n"
    )
    options = ["-o", "out", "--target", support.RTX]
    given = ["--precision", "fp32,careful.yaml,int8", "--calibration", "zoo:typical"]
    wanted = ["models.yaml"] if way == "manifest" else ["zoo:net", *given]
    assert main(["convert", *wanted, *options]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed[printed.index("\nnet\n") :].splitlines()[3:6]]
    assert [row[0] for row in rows] == ["fp32", "careful", "int8"] and all(row[1] in BUILT for row in rows), printed
    names = [row["precision"] for row in json.loads((tmp_path / "out" / "net.trade_off.json").read_text())["rows"]]
    assert names == ["fp32", "careful", "int8"]

    page = (tmp_path / "out" / "net-careful" / "report.html").read_text()
    assert "What the engine computes in" in page and "Error by layer" in page
    index = (tmp_path / "out" / "index.html").read_text()
    assert "3 precisions" in index and index.count("trade-off") >= 1


def test_the_layers_of_a_result_are_those_that_introduce_the_error(tmp_path: Path) -> None:
    module, example = seeded(Cnn, 2, 3, 16, 16)
    with torch.no_grad():
        module.body.weight.mul_(1e-7)  # type: ignore[union-attr, operator]  # below what float16 can hold well
        module.body.bias.zero_()  # type: ignore[union-attr, operator]
        module.norm.weight.mul_(1e-4)  # type: ignore[union-attr, operator]
        module.norm.bias.zero_()  # type: ignore[union-attr, operator]
    result = convert(module, example, tmp_path, {"precision": "fp32", "fp16": ["body"]}, build=False)
    worst = result.layers[0]
    assert (worst.module, worst.operator, worst.precision) == ("body", "Conv", "float16"), worst
    assert worst.introduced is not None and worst.introduced.relative is not None
    assert np.isfinite(worst.introduced.relative) and worst.introduced.relative > 0.01
