"""What only a GPU shows of precision on weakly typed targets: what the builder's kernels compute in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bridge
from bridge import build as build_module
from bridge.assignment import assign
from bridge.build import BuildOutcome, build
from bridge.build_plan import BuildPlan, plan_build
from bridge.build_settings import BuildSettings
from bridge.calibration import Calibration
from bridge.errors import BuildError
from bridge.inputs import Profile
from bridge.inspection import engine_layers, inspect
from bridge.precision import Precision
from bridge.ranges import measure
from bridge.target import gpu_compute_capabilities, installed, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
    pytest.mark.skipif(
        getattr(installed("tensorrt"), "strongly_typed", False), reason="this TensorRT is strongly typed"
    ),
]

IMAGE = torch.randn(4, 16, 32, 32, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(size, size, 3, padding=1), nn.Conv2d(size, size, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(size), nn.BatchNorm2d(size)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(y)) + x)


class ResNet(nn.Module):
    """A residual network in small."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(16, 64, 3, padding=1)
        self.body = nn.Sequential(Block(64), Block(64))
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(torch.relu(self.stem(image))).mean((2, 3)))


class Transformer(nn.Module):
    """What TensorRT's compiler takes as a whole, and tells nothing of in version 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(self.layer(x)), -1)


class Overflowing(nn.Module):
    """A transformer in which a sum of squares leaves float16's range; so many ``layers`` come after it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.before = nn.Conv2d(16, 64, 3, 2), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.energy = Energy()
        self.after = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(layers)))
        self.head = nn.Linear(64, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = torch.relu(self.stem(image)).flatten(2).transpose(1, 2)
        return self.head(self.after(self.energy(self.before(tokens))))


class Energy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 60
        return x / torch.sqrt(torch.einsum("btd,btd->bt", x, x) / x.shape[-1]).unsqueeze(-1)


class Tiny(nn.Module):
    """So small that a builder's own choice would as well be fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(image)).mean((2, 3)))


def rewritten(module: nn.Module, folder: Path, *inputs: torch.Tensor) -> Path:
    """The model for the parser, in float32."""
    result = bridge.convert(module.eval(), inputs, workdir=folder, target="tensorrt", build=False, cache=False)
    assert result.onnx is not None, result.error
    return result.onnx


def profile_of(model: Path, axis: int | None = None) -> dict[str, Profile]:
    """Each input's shape; with ``axis``, which the model leaves open, of 1 to 8."""
    shapes = {}
    for info in onnx.load(str(model), load_external_data=False).graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        ends = [tuple(size if at == axis else own for at, own in enumerate(shape)) for size in (1, 4, 8)]
        shapes[info.name] = Profile(*ends)
    return shapes


def plan_for(model: Path, precision: Any, **changes: Any) -> BuildPlan:
    """As the pipeline makes it: what the nodes are assigned, and the model's own types."""
    from passes import read

    graph, setting = read(model), Precision.of(precision)
    assigned = assign(graph, setting, None, resolve("tensorrt"))
    settings: Any = SimpleNamespace(precision=setting, builder=BuildSettings())
    plan = plan_build(settings, graph, False, assigned.nodes)
    return BuildPlan(**{**vars(plan), **changes})


def built(model: Path, folder: Path, plan: BuildPlan, profiles: Any = None, **options: Any) -> BuildOutcome:
    folder.mkdir(exist_ok=True)
    given = [profiles or profile_of(model)]
    target = resolve("tensorrt")
    return build(model, folder / "m.engine", folder / "log", target=target, profiles=given, plan=plan, **options)


def precisions(folder: Path, shapes: Mapping[str, Any] | None = None) -> dict[str, str]:
    """By node, what TensorRT's inspector says of the engine's layers."""
    import tensorrt as trt

    from bridge.runtime.logger import trt_logger

    told = inspect(trt, trt_logger(trt), (folder / "m.engine").read_bytes(), shapes or {})
    return {name: layer.precision for layer in engine_layers(told) for name in layer.names}


def nodes_of(model: Path, operator: str = "Conv") -> list[str]:
    return [node.name for node in onnx.load(str(model)).graph.node if node.op_type == operator]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewritten(ResNet(), tmp_path_factory.mktemp("resnet"), IMAGE)


def test_fp16_computes_its_convolutions_in_half(resnet: Path, tmp_path: Path) -> None:
    found = built(resnet, tmp_path, plan_for(resnet, "fp16"))
    assert found.precisions["fp16"] > 0.95, found
    told = precisions(tmp_path)
    assert {told[name] for name in nodes_of(resnet)} == {"fp16"}, told


def test_without_a_lower_precision_everything_is_in_fp32(resnet: Path, tmp_path: Path) -> None:
    found = built(resnet, tmp_path, plan_for(resnet, "fp32"))
    assert found.precisions == {"fp32": 1.0}
    told = precisions(tmp_path)
    assert {told[name] for name in nodes_of(resnet)} == {"fp32"}, told


def test_fp16_with_all_layers_in_fp32_is_no_success(resnet: Path, tmp_path: Path) -> None:
    whole = dict.fromkeys(plan_for(resnet, "fp16").layer_precisions, "fp32")
    with pytest.raises(BuildError, match="fp16 was asked for, and all of the engine is in fp32") as raised:
        built(resnet, tmp_path, plan_for(resnet, "fp16", layer_precisions=whole))
    assert raised.value.stage == "build" and not (tmp_path / "m.engine").exists()


FORCED = """
import bridge.builder, bridge.builder_config
def constrain(job, trt, network, demands):
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.ELEMENTWISE, trt.LayerType.ACTIVATION):
            layer.precision = trt.float32
    return True
bridge.builder_config.constrain = constrain
bridge.builder.main()
"""


def test_a_builder_that_does_fp32_behind_ones_back_is_found_out(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "COMMAND", (sys.executable, "-c", FORCED))
    with pytest.raises(BuildError, match=r"fp16 was asked for, and (all|9\d%|100%) of .* in fp32"):
        built(resnet, tmp_path, plan_for(resnet, "fp16"))


def test_the_rules_of_a_precision_file_are_obeyed(resnet: Path, tmp_path: Path) -> None:
    file = tmp_path / "precision.yaml"
    file.write_text("precision: fp16\nfp32: [body.1, 'op:Gemm']\n")
    plan = plan_for(resnet, file)
    found = built(resnet, tmp_path, plan)
    told = precisions(tmp_path)
    expected = {name: plan.layer_precisions[name] for name in nodes_of(resnet)}
    assert sorted(expected.values()) == ["fp16"] * 3 + ["fp32"] * 2
    assert {name: told[name] for name in expected} == expected
    assert [told[name] for name in nodes_of(resnet, "Gemm")] == ["fp32"]
    assert 0.3 < found.precisions["fp16"] < 0.7, found.precisions


def test_a_small_model_is_in_half_too(tmp_path: Path) -> None:
    model = rewritten(Tiny(), tmp_path / "onnx", torch.randn(2, 3, 8, 8))
    found = built(model, tmp_path, plan_for(model, "fp16"))
    assert found.precisions["fp16"] > 0.9, found


def test_one_product_alone_is_in_half_beside_what_is_fused_into_it(tmp_path: Path) -> None:
    """TensorRT 8.5 has no kernel for a product in half and its activation in float32."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    asked = {"precision": "fp32", "fp16": ["2"]}
    found = bridge.convert(module, (torch.randn(24, 64),), workdir=tmp_path, target="tensorrt", precision=asked)
    assert found.status == "verified", found.error
    assert 0.2 < found.precisions["fp16"] < 0.5, (found.precisions, found.notes)


@pytest.mark.parametrize("layers", [0, 1])
def test_what_overflows_stays_in_float32_inside_of_a_transformer(tmp_path: Path, layers: int) -> None:
    """Also where all timings of kernels are known before; the convolution is in half before the transformer."""
    module = Overflowing(layers).eval()
    asked = {"precision": "fp16", "fp16": ["op:*"], "fp32": ["energy"]}
    for attempt, workspace in enumerate((1 << 28, 1 << 29)):
        options: dict[str, Any] = {"precision": asked, "cache": tmp_path / "cache", "builder": {"workspace": workspace}}
        result = bridge.convert(module, (IMAGE,), workdir=tmp_path / str(attempt), target="tensorrt", **options)
        assert result.status == "verified", result.error
        assert result.precisions["fp16"] > 0.9 and result.precisions.get("unknown", 0) < 0.01, result.precisions


def test_a_transformer_is_quantised_by_what_the_model_says(tmp_path: Path) -> None:
    inputs = torch.randn(8, 64, 64)
    options: dict[str, Any] = {"target": "tensorrt", "precision": "int8+fp16", "calibration": [(inputs,)]}
    result = bridge.convert(Transformer().eval(), (inputs,), workdir=tmp_path, **options)
    assert result.status == "verified", result.error
    assert result.onnx == tmp_path / "quantised.onnx"
    assert result.precisions.get("int8", 0) + result.precisions.get("unknown", 0) > 0.9, result.precisions


def test_the_types_of_dynamic_engines_are_told(tmp_path: Path) -> None:
    profiles = {"image": ((1, 16, 32, 32), (4, 16, 32, 32), (8, 16, 32, 32))}
    result = bridge.convert(
        ResNet().eval(), (IMAGE,), workdir=tmp_path / "onnx", target="tensorrt", build=False, profiles=profiles
    )
    assert result.onnx is not None
    shapes = profile_of(result.onnx, axis=0)
    found = built(result.onnx, tmp_path, plan_for(result.onnx, "fp16"), shapes)
    assert found.precisions["fp16"] > 0.95 and found.precisions.get("unknown", 0) < 0.01, found


def test_a_transformer_is_in_half_or_said_to_be_unknown(tmp_path: Path) -> None:
    model = rewritten(Transformer(), tmp_path / "onnx", torch.randn(2, 16, 64))
    found = built(model, tmp_path, plan_for(model, "fp16"))
    shares = found.precisions
    assert shares.get("fp16", 0) + shares.get("unknown", 0) > 0.9, found
    assert shares.get("unknown", 0) < 0.01 or any("does not tell" in note for note in found.notes), found


def test_a_module_of_half_computes_in_half(tmp_path: Path) -> None:
    """TensorRT 8.5 refuses such layers unless float16 is allowed: it is, though nobody asked for it by name."""
    model = rewritten(ResNet().half(), tmp_path / "onnx", IMAGE.half())
    plan = plan_for(model, "fp32")
    assert plan.low_types == ("fp16",)
    found = built(model, tmp_path, plan)
    assert found.precisions["fp16"] > 0.95, found


@pytest.mark.parametrize("precision", ["int8", "int8+fp16"])
def test_int8_by_tensorrts_calibrator(resnet: Path, tmp_path: Path, precision: str) -> None:
    (name,) = profile_of(resnet)
    files = []
    for index in range(3):
        files.append(tmp_path / f"{index}.npz")
        np.savez(files[-1], **{name: np.random.default_rng(index).standard_normal(IMAGE.shape).astype(np.float32)})
    shapes = {name: tuple(IMAGE.shape)}
    calibration = Calibration(tuple(files), shapes, "entropy", "", tmp_path / "cache")
    found = built(resnet, tmp_path, plan_for(resnet, precision, calibration=calibration))
    assert found.precisions["int8"] > 0.5, found


def test_int8_by_quantisation_in_the_graph(resnet: Path, tmp_path: Path) -> None:
    from passes import read, write
    from passes.quantisation import quantise

    (name,) = profile_of(resnet)
    graph = read(resnet)
    nodes = assign(graph, Precision.of("int8+fp16"), None, resolve("tensorrt")).of("int8")
    assert set(nodes_of(resnet)) <= nodes
    quantise(graph, "int8", measure(resnet, [{name: IMAGE.numpy()}]), nodes)
    write(graph, tmp_path / "q.onnx")
    plan = plan_for(tmp_path / "q.onnx", "int8+fp16")
    found = built(tmp_path / "q.onnx", tmp_path, plan)
    assert found.precisions["int8"] > 0.9, found
    told = precisions(tmp_path)
    assert {told[item] for item in nodes_of(resnet)} == {"int8"}, told


def test_what_nobody_asked_for_by_node_is_in_half_as_well(resnet: Path, tmp_path: Path) -> None:
    """A request by name alone, without an assignment."""
    found = built(resnet, tmp_path, BuildPlan(precision="fp16"))
    assert found.precisions["fp16"] > 0.9, found
