"""``torch2trt`` has torch2trt's parameters, with their meaning, and gives a TRTModule; TensorRT-RTX builds for real."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge import ListDataset, RunError, TRTModule, UsageError, as_torch2trt, pipeline, torch2trt
from bridge.build_settings import BuildSettings
from bridge.errors import BridgeError, ExportError

from .support import RTX, RTX_INSTALLED

needs_rtx = pytest.mark.skipif(not RTX_INSTALLED, reason="tensorrt_rtx is not installed")
X = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, state: Mapping[str, torch.Tensor], keep: torch.Tensor) -> dict[str, Any]:
        return {"sum": x + state["h"], "rest": (state["h"] * 2, torch.where(keep, x, 0.0))}


class DeviceType(Enum):
    """As TensorRT's enums are: members with a name."""

    GPU = 0
    DLA = 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``convert`` is called with; it is not run."""
    seen: dict[str, Any] = {}

    @functools.wraps(pipeline.convert)
    def convert(source: Any, inputs: Any, **options: Any) -> NoReturn:
        seen.update(options, source=source, inputs=inputs)
        raise ExportError("stopped by the test")

    monkeypatch.setattr(as_torch2trt, "convert", convert)
    monkeypatch.setattr(as_torch2trt, "_check_engine", lambda options: None)  # whatever is installed
    return seen


def ask(*args: Any, **options: Any) -> None:
    with pytest.raises(ExportError, match="stopped by the test"):
        torch2trt(*args, **options)


def test_the_parameters_are_torch2trts_in_its_order() -> None:
    assert " ".join(inspect.signature(torch2trt).parameters) == (
        "module inputs input_names output_names log_level fp16_mode max_workspace_size strict_type_constraints "
        "keep_network int8_mode int8_calib_dataset int8_calib_algorithm use_onnx default_device_type dla_core "
        "gpu_fallback device_types min_shapes max_shapes opt_shapes onnx_opset max_batch_size "
        "avg_timing_iterations options"
    )


@needs_rtx
def test_the_engine_is_a_module_with_its_conversion(tmp_path: Path) -> None:
    module = torch2trt(net(), [X], max_batch_size=4, target=RTX, workdir=tmp_path)
    assert isinstance(module, TRTModule)
    assert module.conversion is not None and module.conversion.status == "built"
    assert (module.input_names, module.output_names) == (["input_0"], ["output_0"])
    assert module.conversion.inputs[0].profiles == [[[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]]
    assert (tmp_path / "report.html").is_file() and (tmp_path / "model.engine").is_file()
    assert module.network.num_inputs == 1 and module.network is module.network
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match=r"without CUDA|no NVIDIA GPU"):
            module(X)


@needs_rtx
def test_nested_integer_and_boolean_arguments_are_converted(tmp_path: Path) -> None:
    example = {
        "x": torch.randn(2, 4),
        "state": {"h": torch.randn(2, 4)},
        "keep": torch.tensor([True, False, True, True]),
    }
    module = torch2trt(Nested(), example, target=RTX, keep_network=False)
    assert module.input_names == ["input_0", "input_1", "input_2"]
    assert module.output_names == ["output_0", "output_1", "output_2"]
    assert not hasattr(module, "network")
    flattener = module.input_flattener
    assert flattener is not None and flattener.schema == {"x": 0, "state": {"h": 1}, "keep": 2}
    assert module.output_flattener is not None
    assert module.output_flattener.unflatten([1, 2, 3]) == {"sum": 1, "rest": (2, 3)}


@needs_rtx
def test_lists_and_tuples_stand_for_one_another_in_a_call() -> None:
    class Neck(nn.Module):
        def forward(self, levels: list[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
            return [level * scale for level in levels]

    a, b, scale = torch.randn(1, 2), torch.randn(1, 4), torch.ones(1)
    made = torch2trt(Neck(), ([a, b], scale), target=RTX)
    loaded = TRTModule()
    loaded.load_state_dict(made.state_dict())
    for module in (made, loaded):
        assert module._calling is not None
        for levels in ([a, b], (a, b)):
            assert module._calling.flatten((levels, scale), {}) == [a, b, scale]
        with pytest.raises(RunError, match="levels: has 1 elements, and the example has 2"):
            module._calling.flatten(([a], scale), {})


@needs_rtx
def test_without_a_workdir_the_files_go_with_the_conversion() -> None:
    module = torch2trt(net(), [X], target=RTX)
    assert module.conversion is not None and module.conversion.engine is not None
    folder = module.conversion.engine.parent
    assert folder.is_dir()
    del module
    gc.collect()
    assert not folder.exists()


@needs_rtx
def test_a_failed_conversion_raises_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such thing")

    with pytest.raises(ExportError, match="no such thing"):
        torch2trt(Broken(), [X], target=RTX)
    with pytest.raises(UsageError, match="max_batch_size: is 1, and the inputs have 2"):
        torch2trt(net(), [X], max_batch_size=1, target=RTX)
    assert not list(tmp_path.glob("torch2trt-*"))


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({}, {"precision": "fp32", "opset": None, "output_names": ["output_0"], "input_names": ["input_0"]}),
        ({"fp16_mode": True}, {"precision": "fp16"}),
        ({"bf16_mode": True}, {"precision": "bf16"}),
        ({"int8_mode": True}, {"precision": "int8"}),
        ({"int8_mode": True, "fp16_mode": True}, {"precision": "int8+fp16"}),
        ({"int8_mode": True, "int8_calib_algorithm": 3}, {"calibration_algorithm": "MINMAX_CALIBRATION"}),
        ({"int8_mode": True, "int8_calib_dataset": [[X]]}, {"calibration": [[X]]}),
        ({"input_names": ["pixels"], "output_names": ["map"]}, {"input_names": ["pixels"], "output_names": ["map"]}),
        ({"max_workspace_size": 1 << 25}, {"builder": BuildSettings(workspace=1 << 25)}),
        ({"strict_type_constraints": True}, {"builder": BuildSettings(strict_types=True)}),
        ({"avg_timing_iterations": 8}, {"builder": BuildSettings(avg_timing_iterations=8)}),
        (
            {"max_workspace_size": 5, "builder": {"tf32": True}},
            {"builder": BuildSettings(workspace=5, tf32=True)},
        ),
        (
            {"default_device_type": DeviceType.DLA, "dla_core": 1, "device_types": {"0": "GPU"}},
            {"builder": BuildSettings(default_device="DLA", dla_core=1, gpu_fallback=True, device_types={"0": "GPU"})},
        ),
        ({"onnx_opset": 17}, {"opset": 17}),
        ({"min_shapes": [(1, 3, 8, 8)]}, {"profiles": {"input_0": [(1, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)]}}),
        (
            {"max_shapes": [torch.Size((9, 3, 8, 8))], "opt_shapes": [[4, 3, 8, 8]]},
            {"profiles": {"input_0": [(2, 3, 8, 8), (4, 3, 8, 8), (9, 3, 8, 8)]}},
        ),
        ({"max_batch_size": 16}, {"profiles": {"input_0": [(1, 3, 8, 8), (2, 3, 8, 8), (16, 3, 8, 8)]}}),
        ({"profiles": [{}, {}]}, {"profiles": [{}, {}]}),
        ({"tolerance": bridge.Tolerance(1, 1), "seed": 3, "name": "n"}, {"seed": 3, "name": "n"}),
    ],
)
def test_every_parameter_reaches_convert(
    asked: dict[str, Any], options: dict[str, Any], reached: dict[str, Any]
) -> None:
    ask(net(), [X], **options)
    assert {key: asked.get(key) for key in reached} == reached


def test_torch2trts_small_workspace_is_not_the_default(asked: dict[str, Any]) -> None:
    ask(net(), [X], dla_core=0, gpu_fallback=True)
    assert "builder" not in asked, "TensorRT's own default"


def test_submodules_may_be_given_themselves(asked: dict[str, Any]) -> None:
    module = net()
    ask(module, [X], device_types={module[0]: DeviceType.DLA})  # type: ignore[index]
    assert asked["builder"].device_types == {"0": "DLA"}
    with pytest.raises(UsageError, match=r"device_types: .* is neither a submodule"):
        torch2trt(module, [X], device_types={nn.ReLU(): "DLA"})


def test_a_dataset_is_example_shapes_and_calibration(asked: dict[str, Any]) -> None:
    dataset = ListDataset([(X,), (torch.randn(1, 3, 8, 8),), (torch.randn(5, 3, 16, 8),), (torch.randn(2, 3, 8, 8),)])
    ask(net(), dataset, int8_mode=True)
    assert asked["profiles"] == {"input_0": [(1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 16, 8)]}
    assert asked["inputs"] is dataset[0]
    assert [tuple(item[0].shape) for item in asked["calibration"]] == [(2, 3, 8, 8)] * 2
    ask(net(), dataset, opt_shapes=[(3, 3, 8, 8)], max_shapes=[(6, 3, 16, 8)])
    assert asked["profiles"] == {"input_0": [(1, 3, 8, 8), (3, 3, 8, 8), (6, 3, 16, 8)]}
    with pytest.raises(UsageError, match="the ListDataset is empty"):
        torch2trt(net(), ListDataset())


def test_shapes_are_nested_like_the_inputs(asked: dict[str, Any]) -> None:
    x = torch.randn(2, 4)
    ask(Nested(), (x, {"h": x}, x > 0), max_shapes=((5, 4), {"h": (5, 4)}, (5, 4)))
    assert {name: shapes[2] for name, shapes in asked["profiles"].items()} == dict.fromkeys(asked["profiles"], (5, 4))
    with pytest.raises(UsageError, match=r"max_shapes: state: 'h' missing.*nested like the inputs, .*\(2, 4\)"):
        torch2trt(Nested(), (x, {"h": x}, x > 0), max_shapes=((5, 4), {}, (5, 4)))
    for module, inputs in ((net(), X), (torch.export.export(net(), (X,)), [X])):
        ask(module, inputs, max_shapes=[(np.int64(4), 3, 8, 8)])
        assert asked["profiles"]["input_0"][2] == (4, 3, 8, 8)
    ask(net(), X, max_shapes=(4, 3, 8, 8))
    assert asked["profiles"]["input_0"][2] == (4, 3, 8, 8)


def test_an_unknown_keyword_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'fp16_mod'\. Did you mean 'fp16_mode'\?"):
        torch2trt(net(), [X], fp16_mod=True)
    with pytest.raises(TypeError, match=r"'int8_calib_batch_size'\. Leave it out: each item of int8_calib_dataset"):
        torch2trt(net(), [X], int8_calib_batch_size=32)
    with pytest.raises(
        TypeError, match=r"'dynamic_axes'\. Leave it out: axes along which min_shapes and max_shapes differ"
    ):
        torch2trt(net(), [X], dynamic_axes={"input_0": [0]})
    with pytest.raises(TypeError, match=r"'options'$"):  # what holds the others is no name
        torch2trt(net(), [X], options={})
    for name in ("check", "opset", "source"):
        with pytest.raises(TypeError, match=name):
            torch2trt(**{"module": net(), "inputs": [X], name: 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"default_device_type": "TPU"}, "default_device_type: 'TPU' is none of GPU, DLA"),
        ({"log_level": 9}, "log_level: 9 is none of INTERNAL_ERROR"),
        ({"int8_calib_algorithm": "best"}, "int8_calib_algorithm: 'best' is none of"),
        ({"int8_calib_algorithm": 3, "calibration_algorithm": "minmax"}, "are the same; give one"),
        ({"precision": "fp32", "fp16_mode": True}, "the modes ask for fp16"),
        ({"profiles": {"input_0": [[1]] * 3}, "max_batch_size": 3}, "profiles: say the shapes too"),
        (
            {"builder": {"workspace": 3}, "max_workspace_size": 4},
            "builder: workspace: torch2trt's parameters say it too",
        ),
        ({"int8_mode": True, "calibration": [], "int8_calib_dataset": []}, "are the same; give one"),
        ({"max_workspace_size": 0}, "builder: workspace: 0 is no whole number of at least 1"),
        ({"avg_timing_iterations": 0}, "builder: avg_timing_iterations: 0 is no whole number"),
        ({"device_types": [nn.ReLU()]}, "device_types: a list; give a dict"),
        ({"max_batch_size": 0}, "max_batch_size: 0 is no whole number"),
        ({"max_batch_size": "16"}, "max_batch_size: '16' is no whole number"),
        ({"max_shapes": (4, 3, 8, 8)}, r"max_shapes: forward\(\) takes 1 .*like the inputs, which have \(2, 3, 8, 8\)"),
        ({"max_shapes": [(4.0, 3, 8, 8)]}, "max_shapes: input: is a tuple, where a tensor or a shape of whole numbers"),
        ({"max_shapes": 4}, "max_shapes: a int; give shapes"),
        ({"input_names": "x"}, "input_names: is the word 'x'; give a list"),
        ({"output_names": "y"}, "output_names: is the word 'y'; give a list"),
        ({"input_names": [1]}, "input_names: 1 is no word; give a list"),
        ({"fp16_mode": "false"}, "fp16_mode: is the word 'false'; give True or False"),
        ({"onnx_opset": "17"}, "opset: '17' is no whole number"),
    ],
)
def test_what_cannot_be_meant_is_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        torch2trt(net(), [X], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tensorrt-9.9"}, "target: TensorRT 9.9 is not installed here, and makes no engine"),
        ({"target": RTX, "build": False}, "build: without a build there is no engine"),
    ],
)
@needs_rtx
def test_what_would_make_no_engine_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(
        as_torch2trt, "convert", functools.wraps(pipeline.convert)(lambda *a, **k: pytest.fail("started"))
    )
    with pytest.raises(UsageError, match=words):
        torch2trt(net(), [X], **options)


@needs_rtx
def test_a_workdir_that_is_a_file_is_told_by_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BridgeError, match=r"file: File exists"):
        torch2trt(net(), [X], target=RTX, workdir=tmp_path / "file")


@pytest.mark.parametrize("options", [{"default_device_type": 1}, {"avg_timing_iterations": 4}])
@needs_rtx
def test_what_the_target_cannot_do_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        torch2trt(net(), [X], target=RTX, **options)


def test_there_is_no_way_but_onnx(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(as_torch2trt, "_warned_of_converters", False)
    with pytest.warns(UserWarning, match="use_onnx=False") as caught:
        ask(net(), [X], use_onnx=False)
        ask(net(), [X], use_onnx=False)
    assert len(caught) == 1, "once in a process"


def test_a_calibration_set_that_is_not_used_is_warned_of(asked: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="int8_mode is off"):
        ask(net(), [X], int8_calib_dataset=[[X]])


@needs_rtx
def test_messages_of_the_asked_severity_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="VERBOSE"):
        torch2trt(net(), [X], target=RTX, log_level="VERBOSE", workdir=tmp_path)
    shown = [line.removeprefix("[TensorRT] ") for line in capsys.readouterr().err.splitlines() if "[TensorRT]" in line]
    assert shown == [line for line in (tmp_path / "build.log").read_text().splitlines() if line.startswith("[")]


def test_importing_the_function_is_not_importing_a_module() -> None:
    assert callable(bridge.torch2trt) and bridge.torch2trt is torch2trt


@needs_rtx
def test_classes_that_no_file_could_name_are_returned_all_the_same() -> None:
    class Pair(NamedTuple):
        more: Any
        twice: Any

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(x + 1, x * 2)

    flattener = torch2trt(Both(), [X], target=RTX).output_flattener
    assert flattener is not None and flattener.unflatten([1, 2]) == Pair(1, 2)


@needs_rtx
def test_an_exported_program_is_called_as_its_module() -> None:
    x = torch.randn(2, 4)
    program = torch.export.export(Nested(), (x,), {"state": {"h": x}, "keep": x > 0})
    module = torch2trt(program, (x, {"h": x}, x > 0), target=RTX)
    assert module.conversion is not None and module.conversion.calling is not None
    assert module.conversion.calling.flatten((x,), {"keep": X, "state": {"h": x}}) == [x, x, X]
