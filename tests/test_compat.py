"""``import torch2trt`` finds the bridge after one command, and not after another; a real torch2trt is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import warnings
from pathlib import Path

import pytest

import bridge
from bridge.errors import UsageError

ROOT = Path(__file__).parents[1]
PATH_FILE = "torch-tensorrt-bridge-torch2trt.pth"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own, which sees the packages of this one but not the bridge."""
    folder = tmp_path_factory.mktemp("compat") / "venv"
    venv.create(folder, with_pip=False)
    done = subprocess.run(
        [folder / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(done.stdout.strip()) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def site_of(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*")) / "site-packages"


def run(python: Path, *arguments: str, cwd: Path, bridge_is_here: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if bridge_is_here:
        environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def compat(python: Path, action: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "bridge.compat", action, cwd=cwd, bridge_is_here=True)


USER = """
import torch2trt
from torch2trt import torch2trt as convert, TRTModule, get_arg, tensorrt_converter
from torch2trt.torch2trt import *
from torch2trt.trt_module import TRTModule as Same
from torch2trt.dataset import Dataset, ListDataset, TensorBatchDataset, FolderDataset, DatasetRecorder
from torch2trt.flattener import Flattener
from torch2trt.dataset_calibrator import DEFAULT_CALIBRATION_ALGORITHM, DatasetCalibrator
from torch2trt.calibration import TensorBatchDataset as SameSet
from torch2trt.contrib.qat.layers.quant_conv import QuantConv2d
from torch2trt.flatten_module import Flatten, Unflatten
import torch2trt.converters, torch2trt.utils, torch2trt.plugins
import bridge
assert convert is bridge.torch2trt is torch2trt.torch2trt and TRTModule is Same is bridge.TRTModule
assert ListDataset is bridge.ListDataset and Flattener is bridge.Flattener and SameSet is TensorBatchDataset
for name in (get_arg, DatasetCalibrator, QuantConv2d, torch2trt.converters.convert_conv):
    try:
        name("torch.relu")
    except bridge.UsageError as error:
        print(error)
    else:
        raise SystemExit(f"{name} does nothing")
"""


def test_it_is_installed_by_one_command_and_removed_by_another(python: Path, tmp_path: Path) -> None:
    assert compat(python, "status", tmp_path).returncode == 1
    done = compat(python, "install", tmp_path)
    assert done.returncode == 0, done.stderr
    used = run(python, "-c", USER, cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert "bridge.register_plugin" in used.stdout and "int8_calib_dataset=dataset" in used.stdout
    assert compat(python, "status", tmp_path).returncode == 0
    assert "already" in compat(python, "install", tmp_path).stdout
    assert "removed" in compat(python, "uninstall", tmp_path).stdout
    assert not (site_of(python) / PATH_FILE).exists()
    assert "No module named 'torch2trt'" in run(python, "-c", "import torch2trt", cwd=tmp_path).stderr
    assert "nothing to remove" in compat(python, "uninstall", tmp_path).stdout


def test_a_real_torch2trt_is_not_shadowed(python: Path, tmp_path: Path) -> None:
    real = site_of(python) / "torch2trt.py"
    real.write_text("")
    try:
        done = compat(python, "install", tmp_path)
        assert done.returncode == 1 and f"torch2trt is installed: {real}" in done.stderr
        assert not (site_of(python) / PATH_FILE).exists()
    finally:
        real.unlink()


def test_types_are_translated_both_ways() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    import torch

    from bridge.compat.torch2trt.misc_utils import torch_dtype_from_trt, torch_dtype_to_trt

    for dtype in (torch.float32, torch.float16, torch.int32, torch.int64, torch.bool):
        assert torch_dtype_from_trt(torch_dtype_to_trt(dtype)) == dtype
    assert torch_dtype_from_trt(trt.float16) == torch.float16
    with pytest.raises(TypeError, match="complex64 is not supported"):
        torch_dtype_to_trt(torch.complex64)


def test_tensorrt_is_imported_from_where_torch2trts_users_import_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from bridge.compat import torch2trt as names
    from bridge.compat.torch2trt import trt as first
    from bridge.compat.torch2trt.torch2trt import trt as second

    assert first.Logger in (trt.Logger, getattr(sys.modules.get("tensorrt"), "Logger", None)) and second is first
    assert not hasattr(names, "nothing")
    assert names.dataset.ListDataset is bridge.ListDataset


CONVERTER = """
from torch2trt.torch2trt import *
from torch2trt.module_test import add_module_test
from torch2trt.converters.sigmoid import convert_sigmoid

class Calibrator(DatasetCalibrator):
    pass

@tensorrt_converter("torch.nn.functional.normalize", enabled=trt_version() >= "1.0")
def convert_normalize(ctx):
    return ctx.network.add_elementwise(get_arg(ctx, "x", pos=0, default=None), trt.ElementWiseOperation.SUM)

@add_module_test(torch.float32, torch.device("cuda"), [(1, 3)])
@add_module_test(torch.float32, torch.device("cuda"), [(1, 3)], fp16_mode=True)
def test_normalize():
    return nn.Sequential(nn.ReLU())

assert convert_normalize.__name__ == "convert_normalize" and isinstance(test_normalize(), torch.nn.Module)
assert np.float32 and F.normalize and not CONVERTERS
"""
"""As modules with converters of one's own are written."""


def test_modules_with_converters_of_ones_own_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.syspath_prepend(str(ROOT / "bridge/compat"))
    with pytest.warns(UserWarning, match=r"The one of torch\.nn\.functional\.normalize is not used"):
        exec(compile(CONVERTER, "converters.py", "exec"), {"__name__": "converters"})


def test_a_module_is_made_flat_and_nested_again() -> None:
    import torch
    from torch import nn

    from bridge.compat.torch2trt.flatten_module import Flatten, Unflatten

    class Nested(nn.Module):
        def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sum": x + state["h"], "twice": 2 * x}

    x, h = torch.ones(2), torch.arange(2.0)
    structures = [bridge.Flattener.from_value(value) for value in ((x, {"h": h}), Nested()(x, {"h": h}))]
    flat = Flatten(Nested(), *structures)
    assert [item.tolist() for item in flat(x, h)] == [[1, 2], [2, 2]]
    nested = Unflatten(flat, *structures)(x, {"h": h})
    assert nested["sum"].tolist() == [1, 2] and nested["twice"].tolist() == [2, 2]


def test_inputs_and_outputs_of_an_engine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from bridge.compat import torch2trt as names

    from . import fake_trt

    fake_trt.install(monkeypatch)
    monkeypatch.setattr(names.version_utils, "tensorrt", lambda: fake_trt)
    engine = fake_trt.Engine(json.loads(fake_trt.plan(inputs={"x": ["FLOAT", [1]], "b": ["FLOAT", [1]]})))
    assert (names.trt_num_inputs(engine), names.trt_num_outputs(engine)) == (2, 1)
    assert names.infer_dynamic_axes([(1, 3, 8)], [(4, 3, 16)]) == [[0, 2]]


def test_versions_are_compared_as_numbers() -> None:
    from bridge.compat.torch2trt.version_utils import Version, torch_version

    assert Version("10.1") >= "9.3.2" and Version("8.5.3.1") == "8.5.3" and not Version("10.0") < Version("9.9")
    assert torch_version() >= "1.5"


def test_a_converter_that_is_registered_is_left_alone_with_a_warning_of_what_takes_its_place() -> None:
    from bridge.compat import torch2trt as names

    def convert_relu(ctx: object) -> None:
        raise AssertionError("nothing calls it")

    with pytest.warns(
        UserWarning, match=r"bridge\.register_plugin.*passes/README\.md.* torch\.nn\.ReLU\.forward is not"
    ):
        assert names.tensorrt_converter("torch.nn.ReLU.forward")(convert_relu) is convert_relu
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names.tensorrt_converter("torch.nn.ReLU.forward", enabled=False)(convert_relu) is convert_relu


def test_what_only_a_converter_would_call_says_what_takes_its_place() -> None:
    from bridge.compat import torch2trt as names

    with pytest.raises(UsageError, match=r"torch2trt\.get_arg: .*bridge\.register_plugin.*passes/README\.md"):
        names.get_arg(None, "dim", 1, None)
    assert names.torch2trt is bridge.torch2trt and sys.modules["bridge.compat.torch2trt.torch2trt"]
