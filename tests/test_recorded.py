"""Modules that torch.export does not trace are exported as the operators that ran in them."""

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
from passes.provenance import origin_of

NOTE = "exported as the operators that ran in the module, since torch.export does not"


def rewritten(module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, **options: Any) -> ConversionResult:
    result = convert(module.eval(), inputs, workdir=folder, target="tensorrt-rtx", build=False, **options)
    assert result.ok, result.error
    assert result.exporter == "dynamo"
    return result


class Potential(nn.Module):
    """Energy and forces of atoms, as SchNet's kind has them: autograd is run in forward, on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
        self.energy = nn.Linear(8, 1)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        places.requires_grad_()
        apart = places[:, None] - places[None]
        squared = (apart**2).sum(-1, keepdim=True) + torch.eye(places.shape[0])[..., None]
        filters = self.filters(torch.exp(-((squared.sqrt() - torch.linspace(0, 3, 4)) ** 2)))
        energy = self.energy(filters.sum(1)).sum()
        return energy, -torch.autograd.grad(energy, places)[0]


def test_forces_are_derivatives_of_an_energy_for_any_number_of_atoms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    profiles = {"places": ((2, 3), (3, 3), (7, 3))}  # of three axes as long as one another, one varies
    result = rewritten(Potential(), (torch.randn(3, 3),), tmp_path, profiles=profiles)
    assert {item.inputs for item in result.comparisons} == {"example", "min", "max"}
    assert any(note.startswith(NOTE) for note in result.notes), result.notes
    assert result.exported_onnx is not None
    names = {item.name for item in onnx.load(str(result.exported_onnx)).graph.initializer}
    assert {"bridge_module.filters.0.bias", "bridge_module.energy.bias"} <= names


class Transformed(nn.Module):
    def __init__(self, transform: Callable[..., Any], *between: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), *between, nn.Tanh(), nn.Linear(8, 1))
        self.transform = transform

    def forward(self, x: Tensor) -> Any:
        return self.transform(lambda y: self.net(y).sum(), x)


def test_functional_derivatives_are_taken_of_any_batch(tmp_path: Path) -> None:
    module = Transformed(lambda function, x: torch.func.grad_and_value(function)(x), nn.LayerNorm(8))
    rewritten(module, (torch.randn(2, 4),), tmp_path, profiles={"x": ((1, 4), (2, 4), (5, 4))})


def test_forward_derivatives_are_taken_and_leave_torch_as_it_was(tmp_path: Path) -> None:
    module = Transformed(lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)))
    rewritten(module, (torch.randn(2, 4),), tmp_path)
    value, slope = torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    assert (value.item(), slope.item()) == (0, 1)


class Slopes(nn.Module):
    """The derivative of each function by x, weighted so that no two elements of an output count alike."""

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        with torch.enable_grad():
            for name, function in self.functions.items():
                at = x.detach().requires_grad_()
                y = function(at)
                weights = torch.linspace(-1, 1, y[0].numel()).view(y.shape[1:])
                found[name] = torch.autograd.grad((y * weights).sum(), at)[0]
        return found


KERNEL = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: F.conv2d(x, KERNEL),
    "strided": lambda x: F.conv2d(x, KERNEL, stride=(2, 3), padding=(1, 2)),
    "dilated": lambda x: F.conv2d(x, KERNEL, stride=2, dilation=2, padding=2),
    "grouped": lambda x: F.conv2d(x, KERNEL[:, :2], groups=2, padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, KERNEL, stride=2, padding=1, output_padding=1),
    "transposed_in_groups": lambda x: F.conv_transpose2d(x, KERNEL[:, :2], stride=(1, 2), groups=2, dilation=2),
    "in_one_axis": lambda x: F.conv1d(x.flatten(2), KERNEL[..., 0], stride=2),
    "in_three": lambda x: F.conv3d(x[:, None], KERNEL[None, :1], stride=2, padding=1),
    "by_the_weights": lambda x: (
        F.conv2d(x[:, :, :7], x[:1, :, 2:5, 1:4].transpose(0, 1), groups=1, stride=2)
        if x.shape[1] == 1
        else F.conv2d(x, x[:1, :, 2:5, 1:4], stride=2, padding=1)
    ),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_of_what_there_is": lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_rounded_up": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg_over": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_in_one_axis": lambda x: F.avg_pool1d(x.flatten(2), 5, 3),
    "avg_in_three": lambda x: F.avg_pool3d(x[:, None], (2, 3, 2), 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive_in_three": lambda x: F.adaptive_avg_pool3d(x[:, None], (3, 2, 5)),
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_in_three": lambda x: F.max_pool3d(x[:, None], (2, 3, 2), 1),
    "replicated": lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"),
    "replicated_in_one_axis": lambda x: F.pad(x.flatten(2), (2, 1), mode="replicate"),
    "replicated_in_three": lambda x: F.pad(x[:, None], (1, 2, 3, 0, 2, 1), mode="replicate"),
    "reflected": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
}
RESIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=1.7),
    "nearest_exact": lambda x: F.interpolate(x, size=(5, 13), mode="nearest-exact"),
    "linear": lambda x: F.interpolate(x.flatten(2), size=100, mode="linear"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=(0.6, 2), mode="bilinear"),
    "bilinear_by_corners": lambda x: F.interpolate(x, size=(5, 13), mode="bilinear", align_corners=True),
    "trilinear": lambda x: F.interpolate(x[:, None], size=(5, 4, 9), mode="trilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(5, 13), mode="bicubic"),
    "bilinear_smoothed": lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", antialias=True),
    "bicubic_smoothed": lambda x: F.interpolate(x, size=(5, 13), mode="bicubic", antialias=True),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "hardtanh": F.hardtanh,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(2), x, is_causal=True),
    "normalised": lambda x: F.group_norm(F.layer_norm(x, x.shape[3:]), 2),
    "city_blocks": lambda x: torch.cdist(x, x.flip(2) * 2, p=1),
    "distances": lambda x: torch.cdist(x, x.flip(2) * 2),
    "cubic_distances": lambda x: torch.cdist(x, x.flip(2) * 2, p=3),
    "largest": lambda x: x.amax(1, keepdim=True) + x.logsumexp(2, keepdim=True),
    "picked": lambda x: x.gather(3, (x.abs() * 7).long() % x.shape[3]),
}


@pytest.mark.parametrize("functions", [CONVOLUTIONS, POOLS, RESIZES, OTHERS], ids=lambda item: next(iter(item)))
def test_operators_of_backward_are_what_torch_computes(
    functions: dict[str, Callable[[Tensor], Tensor]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    profiles = {"x": ((1, 4, 8, 9), (2, 4, 8, 9), (3, 4, 8, 9))}
    result = rewritten(Slopes(functions), (torch.randn(2, 4, 8, 9),), tmp_path, profiles=profiles)
    assert {item.name for item in result.outputs} == set(functions)


def test_a_scripted_part_is_exported_with_the_names_of_its_parameters(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            for times in range(3):
                x = F.relu(x) * float(times + 1)
            return self.norm(self.linear(x)).view(x.size(0), 2, -1)

    scripted = torch.jit.script(Block().eval())  # type: ignore[no-untyped-call]
    result = rewritten(nn.Sequential(scripted, nn.Linear(4, 2)), (torch.randn(3, 4),), tmp_path)
    assert result.exported_onnx is not None
    names = {item.name for item in onnx.load(str(result.exported_onnx)).graph.initializer}
    assert {"bridge_module.0.linear.bias", "bridge_module.1.bias"} <= names


def test_what_of_a_backward_cannot_be_written_is_said(tmp_path: Path) -> None:
    functions = {"by_the_weights_of_groups": lambda x: F.conv2d(x, x[:1, :, 2:5, 1:4].transpose(0, 1), groups=4)}
    result = convert(Slopes(functions), (torch.randn(2, 4, 8, 9),), workdir=tmp_path, build=False)
    assert "the derivative by the weights of a convolution in groups" in (result.error or ""), result.error


def test_modules_are_told_apart_where_one_of_them_raises(tmp_path: Path) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    class Either(Potential):
        def __init__(self) -> None:
            super().__init__()
            self.refuses = Refuses()

        def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
            try:
                return self.refuses(places)
            except ValueError:
                return super().forward(places)

    result = rewritten(Either(), (torch.randn(3, 3),), tmp_path)
    assert result.exported_onnx is not None
    nodes = onnx.load(str(result.exported_onnx)).graph.node
    told = {origin_of(node.name, {item.key: item.value for item in node.metadata_props}).module for node in nodes}
    assert {"filters.0", "filters.2", "energy"} <= told and "refuses" not in told, told
