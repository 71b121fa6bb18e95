"""ScriptModules, whole and as parts, are converted like the modules that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge import ConversionResult, convert
from bridge.torch_source import make_source

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROFILES = {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (5, 3, 8, 8))}


class Net(nn.Module):
    """Reads sizes, and returns tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.norm(self.conv(x)))
        return {"scores": self.head(y.mean((2, 3))), "flat": y.view(x.size(0), -1)}


class Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.first = part, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.part(self.first(x))


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module.eval())  # type: ignore[no-untyped-call, no-any-return]


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module.eval(), X, strict=False)  # type: ignore[no-untyped-call, no-any-return]


def rewritten(module: nn.Module, folder: Path, **options: Any) -> ConversionResult:
    result = convert(module, (X,), workdir=folder, target="tensorrt-rtx", build=False, **options)
    assert result.ok, result.error
    assert result.exporter == "dynamo"
    return result


@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("profiles", [None, PROFILES])
def test_a_whole_one_is_converted(tmp_path: Path, make: Callable[[nn.Module], nn.Module], profiles: Any) -> None:
    result = rewritten(make(Net()), tmp_path, profiles=profiles)
    assert (result.name, [item.name for item in result.outputs]) == ("Net", ["scores", "flat"])
    assert result.notes == [] and len(result.comparisons) == (12 if profiles else 4)


def test_one_of_a_file_is_converted(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.freeze(scripted(Net())), str(tmp_path / "net.pt"))  # type: ignore[no-untyped-call]
    loaded = torch.jit.load(str(tmp_path / "net.pt"))  # type: ignore[no-untyped-call]
    rewritten(loaded, tmp_path / "out", profiles=PROFILES)


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_part_is_converted_at_any_batch_with_the_names_of_its_parameters(
    tmp_path: Path, make: Callable[[nn.Module], nn.Module]
) -> None:
    whole = Around(make(Net())).eval()
    part = whole.part
    result = rewritten(whole, tmp_path, profiles=PROFILES)
    assert whole.part is part and isinstance(part, torch.jit.ScriptModule)
    assert result.exported_onnx is not None
    names = {item.name for item in onnx.load(str(result.exported_onnx)).graph.initializer}
    assert {"bridge_module.part.head.bias", "bridge_module.first.bias"} <= names


def test_what_torch_does_not_convert_is_exported_as_the_operators_that_ran(tmp_path: Path) -> None:
    class Asked(Around):
        def forward(self, x: Tensor) -> Any:
            return self.part.halved(self.part(x))

    class Halving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

        @torch.jit.export
        def halved(self, x: Tensor) -> Tensor:
            return x / 2

    result = rewritten(Asked(scripted(Halving())).eval(), tmp_path)
    assert any(note.startswith("exported as the operators that ran") for note in result.notes), result.notes


def test_a_whole_one_that_does_not_export_is_not_named_by_a_name_of_the_bridges_own(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(x.size(0)):
                x = x * 2
            return x

    result = convert(scripted(Steps()), (X,), workdir=tmp_path, target="tensorrt-rtx", build=False, profiles=PROFILES)
    assert not result.ok and "give the nn.Module it was scripted from" in (result.error or ""), result.error


def test_arguments_are_those_of_the_script() -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, shift: int = 0) -> Tensor:
            return x * scale + shift

    source = make_source(scripted(Options()), {"x": X, "shift": 3}, None, None)
    assert torch.equal(torch.from_numpy(source.run({"x": X.numpy()})["output"]), X * 2 + 3)
