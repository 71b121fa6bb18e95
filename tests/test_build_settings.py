"""Settings of the builder: refused at the door where a target has not got them, and there in the builder's process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bridge
from bridge import BuildSettings, build, target
from bridge.builder_config import APPLIED, node_of
from bridge.calibration import check_calibration, write_calibration
from bridge.errors import BuildError, UsageError
from bridge.inputs import Profile
from bridge.precision import Precision, check_precision
from bridge.runtime.runner import fitting_profile
from bridge.target import Target, resolve
from passes.provenance import origin_of

from . import support

ROOT = Path(__file__).parents[1]
NO_OPERATORS: frozenset[str] = frozenset()
X = torch.randn(2, 3)
needs_rtx = pytest.mark.skipif(not support.RTX_INSTALLED, reason="tensorrt_rtx is not installed")


def tensorrt(version: str) -> Target:
    return Target("tensorrt", tuple(map(int, version.split("."))), False, NO_OPERATORS)


RTX = Target("tensorrt-rtx", (1, 7), False, NO_OPERATORS)

# --- at the door -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"workspace": 0}, "workspace: 0 is no whole number of at least 1"),
        ({"workspace": 1.5}, "workspace: 1.5 is no whole number"),
        ({"workspace": 1 << 63}, "workspace: 9223372036854775808 is more than TensorRT takes, 9223372036854775807"),
        ({"max_aux_streams": 1 << 31}, "max_aux_streams: 2147483648 is more than TensorRT takes"),
        ({"optimization_level": 6}, "optimization_level: 6 is no whole number from 0 to 5"),
        ({"optimization_level": True}, "optimization_level: True is no whole number"),
        ({"tf32": "yes"}, "tf32: 'yes' is neither True nor False"),
        ({"hardware_compatibility": "all"}, "'all' is none of None, 'ampere_plus', 'same_compute_capability'"),
        ({"default_device": "TPU"}, "default_device: 'TPU' is none of 'GPU', 'DLA'"),
        ({"device_types": {"head": "TPU"}}, "is no mapping from the paths of modules to 'GPU' or 'DLA'"),
        ({"max_aux_streams": -1}, "max_aux_streams: -1 is no whole number of at least 0"),
        ({"wrkspace": 1}, "unknown setting 'wrkspace'; did you mean 'workspace'?"),
        ([("workspace", 1)], "a list; give a bridge.BuildSettings, or a mapping"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        BuildSettings.of(given)
    assert str(caught.value).startswith("builder: ") and words in str(caught.value)


def test_settings_are_plain_values_and_what_is_left_as_it_is_is_not_told() -> None:
    settings = BuildSettings(workspace=1 << 30, tf32=True, default_device="DLA", device_types={"head": "GPU"})
    plain = {"workspace": 1 << 30, "tf32": True, "default_device": "DLA", "device_types": {"head": "GPU"}}
    assert settings.given() == plain and BuildSettings.of(json.loads(json.dumps(plain))) == settings
    assert BuildSettings().given() == {} and BuildSettings.of(None) == BuildSettings()


@pytest.mark.parametrize(
    ("given", "to", "words"),
    [
        ({"optimization_level": 5}, tensorrt("8.5.3"), "TensorRT 8.5.3 has no such setting, TensorRT 8.6 is the first"),
        ({"version_compatible": True}, tensorrt("8.5.3"), "TensorRT 8.6 is the first"),
        ({"hardware_compatibility": "ampere_plus"}, tensorrt("8.5.3"), "TensorRT 8.6 is the first"),
        ({"strip_weights": True}, tensorrt("9.3"), "TensorRT 10 is the first"),
        ({"weight_streaming": True}, tensorrt("10.3"), "strongly typed networks alone"),
        ({"optimization_level": 5}, RTX, "builds the same engine at every level"),
        ({"hardware_compatibility": "ampere_plus"}, RTX, "has compute_capabilities for this"),
        ({"avg_timing_iterations": 2}, RTX, "it times no kernels"),
        ({"default_device": "DLA"}, RTX, "builds for GPUs alone"),
        ({"refittable": True}, RTX, "needs a GPU to build such an engine"),
    ],
)
def test_what_a_target_has_not_is_refused_with_the_reason_and_the_way_out(
    given: dict[str, Any], to: Target, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "gpu_compute_capabilities", tuple)
    with pytest.raises(UsageError) as caught:
        BuildSettings.of(given).check(to, "fp16", None)
    (name,) = given
    assert f"builder: {name}: {to}" in str(caught.value) and words in str(caught.value)
    assert "leave it out" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "to"),
    [
        ({"workspace": 1, "tf32": True, "sparsity": True, "avg_timing_iterations": 2}, tensorrt("8.5")),
        ({"optimization_level": 0, "version_compatible": True, "max_aux_streams": 0}, tensorrt("8.6")),
        ({"strip_weights": True, "hardware_compatibility": "same_compute_capability"}, tensorrt("10.12")),
        ({"weight_streaming": True}, tensorrt("11.0")),
        ({"weight_streaming": True, "workspace": 1, "max_aux_streams": 0, "tf32": True}, RTX),
    ],
)
def test_what_a_target_has_is_taken(given: dict[str, Any], to: Target) -> None:
    BuildSettings.of(given).check(to, "fp32", None)


def test_on_a_machine_with_a_gpu_rtx_builds_refittable_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "gpu_compute_capabilities", lambda: ((8, 9),))
    assert RTX.lacks_setting("refittable") == RTX.lacks_setting("strip_weights") == ""


def test_every_setting_has_a_way_to_the_builder() -> None:
    assert set(APPLIED) == {item.name for item in dataclasses.fields(BuildSettings)}


@pytest.mark.parametrize(
    ("precision", "profiles", "words"),
    [
        ("fp16", {"x": ((1, 3), (2, 3), (2, 3))}, "takes no dynamic shapes"),
        ("fp16", [{"x": ((1, 3),) * 3}, {"x": ((2, 3),) * 3}], "takes no dynamic shapes"),
        ("fp32", None, "computes in fp16 and int8 alone"),
    ],
)
def test_what_a_dla_cannot_do_is_refused_at_the_door(precision: str, profiles: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BuildSettings(default_device="DLA").check(tensorrt("8.5"), precision, profiles)
    BuildSettings(default_device="DLA").check(tensorrt("8.5"), "fp16", {"x": [[2, 3], (2, 3), (2, 3)]})


def test_a_setting_of_a_dla_without_one_is_refused() -> None:
    with pytest.raises(UsageError, match="gpu_fallback: nothing is given to a DLA"):
        BuildSettings(gpu_fallback=True).check(tensorrt("8.5"), "fp16", None)


def test_the_innermost_module_says_where_a_layer_runs_and_an_unknown_one_is_refused() -> None:
    settings = BuildSettings(device_types={"encoder": "DLA", "encoder.layers.3": "GPU"})
    found = [settings.device_of(path) for path in ("encoder", "encoder.layers.2.attn", "encoder.layers.3.attn", "head")]
    assert found == ["DLA", "DLA", "GPU", None]
    assert settings.device_of("encoder2.conv") is None, "a name that begins alike is another module"
    with pytest.raises(UsageError, match=r"there is no module 'encoder'\. Did you mean 'decoder'\?"):
        settings.check_modules(["", "decoder", "head"])


@pytest.mark.parametrize(
    ("precision", "to", "words"),
    [
        ("fp17", tensorrt("8.5"), "'fp17': not one of fp32, fp16, bf16, int8, fp8, int4"),
        ("bf16", tensorrt("8.6"), "has no bfloat16; TensorRT 10 is the first"),
        ("fp8", tensorrt("8.6"), "has no fp8"),
    ],
)
def test_a_precision_that_a_target_has_not_is_refused(precision: str, to: Target, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_precision(Precision.of(precision), to, None)
    assert words in str(caught.value), str(caught.value)
    check_precision(Precision.of("bf16"), tensorrt("10.0"), None)


# --- calibration -------------------------------------------------------------------------------------------------


ANY = {"x": Profile((1, 3), (2, 3), (9, 3))}


def read(item: Any) -> dict[str, np.ndarray]:
    return {"x": item}


def test_calibration_inputs_are_files_of_one_shape_told_apart_by_their_content(tmp_path: Path) -> None:
    items = [np.full((2, 3), value, np.float32) for value in range(3)]
    example = {"x": items[0]}
    made = write_calibration(items, read, example, ANY, tmp_path / "a", "minmax", tmp_path / "cache")
    assert [float(np.load(file)["x"][0, 0]) for file in made.files] == [0, 1, 2]
    assert made.job()["profile"] == {"x": {"min": [2, 3], "opt": [2, 3], "max": [2, 3]}}
    again = write_calibration(iter(items), read, example, ANY, tmp_path / "b", "minmax", tmp_path / "cache")
    other = write_calibration(items[:2], read, example, ANY, tmp_path / "c", "minmax", tmp_path / "cache")
    assert made.digest == again.digest != other.digest
    alone = write_calibration(None, read, example, ANY, tmp_path / "d", "minmax", tmp_path / "cache")
    assert len(alone.files) == 1 and np.array_equal(np.load(alone.files[0])["x"], items[0])


def test_calibration_inputs_that_do_not_fit_are_refused_by_their_number(tmp_path: Path) -> None:
    good, example = np.zeros((2, 3), np.float32), {"x": np.zeros((2, 3), np.float32)}
    for items, words in (
        ([good, np.zeros((4, 3), np.float32)], r"item 1: 'x' has the shape \[4, 3\], and the first item \[2, 3\]"),
        ([], "holds no inputs"),
        ([good, good[0]], r"item 1: 'x' has the shape \[3\], outside of \[1, 3\] to \[9, 3\]"),
        ([np.zeros((10, 3), np.float32)], r"item 0: 'x' has the shape \[10, 3\], outside of"),
        ([good.astype(np.int64)], "item 0: 'x' is int64, and the example float32"),
        ((1 / 0 for _ in range(2)), "item 0: cannot be read: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UsageError, match=words):
            write_calibration(items, read, example, ANY, tmp_path, "minmax", tmp_path / "cache")
    with pytest.raises(UsageError, match="item 0: lacks the input 'x'"):
        write_calibration([1], lambda item: {}, example, ANY, tmp_path, "minmax", tmp_path / "cache")
    with pytest.raises(UsageError, match="'percentile': not one of"):
        check_calibration(None, "percentile", True)
    with pytest.raises(UsageError, match="nothing is computed in a lower precision"):
        check_calibration([good], "entropy", False)
    with pytest.raises(UsageError, match="calibration: a dict; give a sequence"):
        check_calibration({"x": good}, "entropy", True)


# --- in the builder's process ------------------------------------------------------------------------------------


def configured(**job: Any) -> dict[str, Any]:
    """What a TensorRT 8.5 is told."""
    shapes = {"x": {"min": [1, 3], "opt": [2, 3], "max": [4, 3]}}
    whole = {"flavour": "tensorrt", "of_tensorrt_8": True, "onnx": "m", "engine": "e", "profiles": [shapes], **job}
    command = [sys.executable, "-m", "tests.fake_builder"]
    done = subprocess.run(command, input=json.dumps(whole), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_by_default_an_engine_computes_in_float32_and_not_in_tf32() -> None:
    told = configured()
    assert told["flags"] == [] and told["pools"] == {} and told["layers"] == {}
    assert told["profiles"] == [{"x": [[1, 3], [2, 3], [4, 3]]}]


def test_timings_go_through_polygraphy_into_the_one_cache_that_a_configuration_takes(tmp_path: Path) -> None:
    file = str(tmp_path / "gpu.cache")
    for known in ([], ["measured"], ["measured"]):
        assert configured(timing_cache=file)["timings"] == [known, []]


TWO_LAYERS: dict[str, Any] = {
    "layers": ["conv", "pow"],
    "kinds": ["CONVOLUTION", "ELEMENTWISE"],
    "made_by": {"conv_out": "conv", "pow_out": "pow"},
    "layer_precisions": {"conv": "fp16", "pow": "fp32"},
}


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"builder": {"workspace": 1 << 26}}, {"pools": {"WORKSPACE": 1 << 26}}),
        ({"builder": {"tf32": True}}, {"flags": ["TF32"]}),
        ({"builder": {"sparsity": True, "refittable": True}}, {"flags": ["REFIT", "SPARSE_WEIGHTS"]}),
        ({"builder": {"avg_timing_iterations": 4}}, {"timing": 4}),
        ({"builder": {"strict_types": True}, "precision": "fp16"}, {"flags": ["FP16", "OBEY_PRECISION_CONSTRAINTS"]}),
        ({"builder": {"strict_types": True}, "strongly_typed": True}, {"flags": []}),
        ({"precision": "int8+fp16"}, {"flags": ["FP16", "INT8"]}),
        ({"kinds": ["QUANTIZE"]}, {"flags": ["INT8"], "verbosity": "DETAILED"}),
        ({"low_types": ["fp16"]}, {"flags": ["FP16"], "precisions": {}}),
        ({"precision": "fp16", "kinds": ["CONVOLUTION", "ACTIVATION"], "layers": ["conv", "relu"]},
         {"flags": ["FP16", "OBEY_PRECISION_CONSTRAINTS"], "precisions": {"conv": "HALF"}, "selects": False}),
        (
            {"precision": "fp16", **TWO_LAYERS},
            {"flags": ["FP16", "OBEY_PRECISION_CONSTRAINTS"], "precisions": {"conv": "HALF", "pow": "FLOAT"},
             "selects": True,
             "outputs": {"pow": ["FLOAT"]}, "verbosity": "DETAILED"},
        ),
        (
            {"precision": "fp16", "constraints": "prefer", **TWO_LAYERS},
            {"flags": ["FP16", "PREFER_PRECISION_CONSTRAINTS"]},
        ),
        ({"precision": "fp16", "constraints": "ignore", **TWO_LAYERS}, {"flags": ["FP16"], "selects": False}),
        ({"precision": "fp32", **TWO_LAYERS}, {"flags": [], "precisions": {}}),
        ({"precision": "int4"}, {"refused": "precision int4: it has no BuilderFlag.INT4"}),
        (
            {"builder": {"default_device": "DLA", "gpu_fallback": True}, "precision": "fp16", "cores": 2},
            {"device": "DLA", "core": 0, "flags": ["FP16", "GPU_FALLBACK", "OBEY_PRECISION_CONSTRAINTS"]},
        ),
        ({"builder": {"default_device": "DLA", "dla_core": 1}, "cores": 2}, {"core": 1}),
        (
            {"devices": {"conv": "DLA", "/a/relu": "GPU"}, "layers": ["conv_12", "/a/relu", "(Unnamed Layer* 3)"],
             "kinds": ["CONVOLUTION"] * 3, "cores": 1},
            {"layers": {"conv_12": "DLA", "/a/relu": "GPU"}, "core": 0, "device": "GPU"},
        ),
        ({"builder": {"default_device": "DLA"}}, {"refused": "there is no DLA on this machine"}),
        ({"builder": {"default_device": "DLA", "dla_core": 2}, "cores": 2}, {"refused": "this machine has 2 of them"}),
        ({"builder": {"optimization_level": 5}}, {"refused": "has no IBuilderConfig.builder_optimization_level"}),
        (
            {"builder": {"hardware_compatibility": "ampere_plus"}},
            {"refused": "has no HardwareCompatibilityLevel.AMPERE_PLUS"},
        ),
    ],
)  # fmt: skip
def test_each_setting_reaches_the_builder_or_is_refused_there(job: dict[str, Any], told: dict[str, Any]) -> None:
    found = configured(**job)
    for key, value in told.items():
        assert value in found[key] if key == "refused" else found[key] == value, found


@pytest.mark.parametrize(("algorithm", "name"), [("entropy", "EntropyCalibrator2"), ("minmax", "MinMaxCalibrator")])
def test_int8_is_calibrated_at_the_shape_of_the_given_inputs(tmp_path: Path, algorithm: str, name: str) -> None:
    items = [np.zeros((3, 3), np.float16), np.ones((3, 3), np.float16)]
    made = write_calibration(items, read, {"x": items[0]}, ANY, tmp_path, algorithm, tmp_path / "cache")
    told = configured(precision="int8", calibration=made.job())
    assert told["calibrator"] == f"IInt8{name}" and told["flags"] == ["INT8"]
    assert told["calibration_profile"] == {"x": [[3, 3]] * 3} != told["profiles"][0]
    assert told["batches"] == [{"x": ["float32", [3, 3]]}] * 2, "TensorRT calibrates in float32"
    quantised = configured(precision="int8", calibration=made.job(), kinds=["DEQUANTIZE"])
    assert quantised["calibrator"] is None and quantised["flags"] == ["INT8"]


def test_a_run_takes_the_first_profile_that_holds_all_its_shapes() -> None:
    class Engine:
        num_optimization_profiles = 2
        spans = (((1, 3), (1, 3), (4, 3)), ((2, 3), (8, 3), (64, 3)))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (-1, 3) if name in "xy" else (5,)

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            return self.spans[index]

    found = [
        fitting_profile(Engine(), {"x": (first, 3), "y": (second, 3), "static": (5,)})
        for first, second in ((1, 4), (2, 5), (64, 64), (1, 64))
    ]
    assert found == [0, 1, 1, 0], "where none holds them, TensorRT says so itself"


def test_a_layer_is_found_by_what_the_parser_says_of_it() -> None:
    nodes = {"conv": 1, "conv_1": 2}
    assert node_of("conv_1", "", nodes) == "conv_1" and node_of("conv_7", "", nodes) == "conv"
    assert node_of("(Unnamed Layer* 1)", "[ONNX Layer: conv]", nodes) == "conv" and node_of("x", "", nodes) is None


# --- real builds -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)))


def engine(folder: Path, **builder: Any) -> bytes:
    result = support.convert(Net(), (X,), workdir=folder, builder=builder, cache=False)
    assert result.ok, result.error
    assert result.engine is not None
    return result.engine.read_bytes()


@needs_rtx
def test_tf32_is_off_unless_it_is_asked_for_and_settings_change_the_engine(tmp_path: Path) -> None:
    plain = engine(tmp_path / "plain")
    assert engine(tmp_path / "again") == plain
    for name, value in (("tf32", True), ("workspace", 1 << 30), ("weight_streaming", True)):
        assert engine(tmp_path / name, **{name: value}) != plain, name


@needs_rtx
def test_a_workspace_that_is_too_small_is_the_builders_error(tmp_path: Path) -> None:
    result = support.convert(Net(), (X,), workdir=tmp_path, builder={"workspace": 1}, cache=False)
    assert result.status == "failed" and isinstance(result.exception, BuildError), result.error
    assert "workspace" in str(result.error)


@needs_rtx
def test_strict_types_are_fulfilled_by_strong_typing_which_a_note_says(tmp_path: Path) -> None:
    result = support.convert(Net(), (X,), workdir=tmp_path, builder=BuildSettings(strict_types=True))
    assert result.ok and any(note.startswith("strict_types: TensorRT-RTX") for note in result.notes), result.notes


@needs_rtx
def test_what_the_convert_call_is_told_reaches_the_childs_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    child: Callable[..., Any] = build._run_child
    monkeypatch.setattr(build, "_run_child", lambda job, timeout: jobs.append(job) or child(job, timeout))
    settings = {"workspace": 1 << 30, "max_aux_streams": 0}
    result = support.convert(Net(), (X,), workdir=tmp_path, builder=settings, cache=False)
    assert result.ok, result.error
    assert result.builder == settings == json.loads((tmp_path / "result.json").read_text())["builder"]
    assert [(job.builder, job.precision, job.devices, job.calibration) for job in jobs] == [(settings, "fp32", {}, {})]


def test_int8_is_planned_for_a_weakly_typed_target_from_the_modules_own_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it goes without TensorRT 8.5: up to the job."""
    here = dataclasses.replace(resolve("tensorrt-8.5"), installed=True)
    monkeypatch.setattr(Target, "why_not_run", lambda self: "it is not here")
    monkeypatch.setattr("bridge.caching.gpu_here", lambda: "none")
    jobs = []

    def child(job: build.BuildJob, timeout: Any) -> Any:
        jobs.append(job)
        batches = [dict(np.load(file)) for file in job.calibration.get("files", ())]
        jobs.append(batches)
        Path(job.engine).write_bytes(b"engine")
        if job.calibration:
            Path(job.calibration["cache"]).write_text("TRT-8503-EntropyCalibration2\n")
        return json.dumps(dataclasses.asdict(build.BuildOutcome())), "", 0

    monkeypatch.setattr(build, "_run_child", child)
    options: dict[str, Any] = {"target": here, "cache": False, "builder": {"device_types": {"body": "GPU"}}}
    options["calibration_algorithm"] = "ENTROPY_CALIBRATION_2"  # the name of a calibrator of TensorRT's
    typical = [(torch.full((2, 3), float(value)),) for value in range(3)]
    result = bridge.convert(Net(), (X,), workdir=tmp_path, precision="int8+fp16", calibration=typical, **options)
    assert result.status == "built", result.error
    job, batches = jobs
    assert [float(batch["x"][0, 0]) for batch in batches] == [0, 1, 2]
    assert (job.precision, job.calibration["algorithm"]) == ("int8+fp16", "entropy")
    nodes = onnx.load(str(tmp_path / "rewritten.onnx")).graph.node
    modules = {
        node.name: origin_of(node.name, {item.key: item.value for item in node.metadata_props}).module for node in nodes
    }
    assert job.devices == {name: "GPU" for name, module in modules.items() if module == "body"} != {}
    assert "head" in modules.values()
    assert (tmp_path / "calibration.cache").read_text().startswith("TRT-8503") and not (tmp_path / ".partial").exists()
    assert result.onnx == tmp_path / "rewritten.onnx"
    del options["calibration_algorithm"]
    result = bridge.convert(Net(), (X,), workdir=tmp_path / "graph", precision="int8+fp16", **options)
    assert result.onnx == tmp_path / "graph" / "quantised.onnx" and not jobs[2].calibration and not jobs[3]
    assert jobs[2].onnx == str(result.onnx) and not (tmp_path / "graph" / "calibration.cache").exists()
    with pytest.raises(UsageError, match="calibration, item 1: "):
        bad = [*typical[:1], {"nothing": X}]
        bridge.convert(Net(), (X,), workdir=tmp_path, precision="int8", calibration=bad, **options)
    with pytest.raises(UsageError, match="there is no module 'bodi'"):
        bridge.convert(Net(), (X,), workdir=tmp_path, **{**options, "builder": {"device_types": {"bodi": "GPU"}}})
