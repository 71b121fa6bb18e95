"""What an export is held to: cases that the module takes, at every shape, in the types in which it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from bridge import ConversionResult, convert
from bridge.errors import UsageError
from bridge.inputs import make_cases, read_profiles, with_numbers_that_fit
from bridge.tensors import to_numpy
from bridge.torch_source import make_source


def rewritten(module: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path, **options: object) -> ConversionResult:
    return convert(module.eval(), inputs, workdir=folder, target="tensorrt-rtx", build=False, **options)


class Neighbours(nn.Module):
    """Sums over a graph's edges: the values of ``edges`` are places along ``x``'s first axis."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])


EDGES = torch.tensor([[0, 1, 4, 3], [2, 4, 0, 1]])
EDGE_PROFILES = {"x": ((1, 3), (5, 3), (9, 3)), "edges": ((2, 1), (2, 4), (2, 8))}


def test_places_along_an_axis_fit_where_it_is_shorter(tmp_path: Path) -> None:
    result = rewritten(Neighbours(), (torch.randn(5, 3), EDGES), tmp_path, profiles=EDGE_PROFILES)
    assert result.ok, result.error
    assert {item.inputs for item in result.comparisons} == {"example", "min", "max"}
    assert "at the min shapes, which are too small for the example's whole numbers, these are 0 at most" in result.notes


class Lengths(nn.Module):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if int(lengths.min()) < 1 or int(lengths.max()) > x.shape[1]:
            raise ValueError(f"lengths {lengths.tolist()} of {x.shape[1]} steps")
        return x.cumsum(1)


def test_lengths_may_be_as_large_as_the_axis() -> None:
    profiles = {"x": ((2, 2), (2, 5), (2, 8))}
    inputs = torch.randn(2, 5), torch.tensor([5, 3])
    made = make_source(Lengths(), inputs, None, None)
    example = {name: to_numpy(tensor) for name, tensor in made.call.tensors.items()}
    cases = make_cases(example, read_profiles(profiles, {name: array.shape for name, array in example.items()}))
    most, fitting = next(with_numbers_that_fit(cases[1], cases[0]))
    assert most == 2 and fitting.feeds["lengths"].tolist() == [2, 2]
    assert list(made.run(fitting.feeds))


def test_shapes_that_a_module_does_not_take_are_told_from_an_example_that_it_does_not(tmp_path: Path) -> None:
    class Together(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    inputs = torch.randn(3, 4), torch.randn(3, 4)
    result = rewritten(Together(), inputs, tmp_path, profiles={"x": ((2, 4), (3, 4), (5, 4))})
    assert not result.ok
    assert (
        "These are the example's values at the min shapes of the profiles: allow only shapes that the module takes"
        in (result.error or "")
    )


class Mixed(nn.Module):
    """Multiplies in 16 bits, and returns float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.first, self.second = dtype, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            y = self.first(x)
            y = y @ y.mT
        return self.second(y.float() @ x)


@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_model_that_computes_in_16_bits_is_held_to_them_though_it_returns_float32(
    dtype: torch.dtype, half: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    result = rewritten(Mixed(dtype), (torch.randn(2, 8, 64),), tmp_path)
    assert result.ok, result.error
    assert result.half == half
    assert all(item.tolerance.whole and item.candidate_dtype == "float32" for item in result.comparisons)


def test_a_model_in_float32_is_held_to_float32(tmp_path: Path) -> None:
    result = rewritten(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path)
    assert result.half == ""
    assert all(item.tolerance.rtol == 1e-3 and not item.tolerance.whole for item in result.comparisons)


@dataclass
class Answer:
    start: torch.Tensor
    end: torch.Tensor


class Reader(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Answer]:
        return x.sum(), Answer(x + 1, x - 1)


def test_a_dataclass_of_tensors_is_not_left_out_in_silence(tmp_path: Path) -> None:
    result = rewritten(Reader(), (torch.randn(3),), tmp_path / "unregistered")
    assert "returns Answer as 'output.1'" in (result.error or ""), result.error
    assert "torch.export.register_dataclass(Answer)" in (result.error or "")
    torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")
    result = rewritten(Reader(), (torch.randn(3),), tmp_path / "registered")
    assert [item.name for item in result.outputs] == ["output.0", "output.1.start", "output.1.end"]


class Enlarges(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.linspace(0, 1, x.shape[2])
        return torch.nn.functional.interpolate(x + grid * math.sqrt(x.shape[2]), size=int(x.shape[2] * 1.5))


def test_a_number_made_of_a_size_follows_it(tmp_path: Path) -> None:
    profiles = {"x": ((1, 2, 2), (1, 2, 4), (1, 2, 9))}
    result = rewritten(Enlarges(), (torch.randn(1, 2, 4),), tmp_path, profiles=profiles)
    assert result.ok, result.error
    assert (result.exporter, len(result.comparisons)) == ("dynamo", 6)


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line of the branch
            return x * 2
        return x - 1


def test_a_branch_that_was_traced_one_way_is_told_with_its_line(tmp_path: Path) -> None:
    result = rewritten(Decides(), (torch.ones(2),), tmp_path)
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("# the line of the branch"))
    assert result.exporter == "torchscript"
    assert any(f"{Path(__file__).name}:{line}: the code decides by values" in note for note in result.notes), (
        result.notes
    )


class Routed(nn.Module):
    """Of the rows that an expert takes there may be any number, as in most models of the kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for row in (x[:, 0] > 0).nonzero():  # the line of the loop
            result[row] = x[row] * 2
        return result


def test_a_loop_over_what_values_choose_is_told_in_plain_words_with_its_line(tmp_path: Path) -> None:
    result = convert(Routed(), (torch.randn(3, 4),), workdir=tmp_path, build=False)
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("# the line of the loop"))
    error = result.error or ""
    assert f"dynamo: {__file__}:{line}: the code decides by values of a tensor: a branch on it, a loop" in error, error
    assert "data-dependent" not in error and error.count("decides by values") == 1, error


class Reads(nn.Module):
    """Makes tensors of what Python reads from one, which torch.export cannot follow."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] != self.first:
            raise ValueError("these are not the values of the example")
        return x * torch.tensor([x[0, 1], x[1, 0]])


class ReadsAny(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([x[0, 1], x[1, 0]])


def test_what_python_reads_from_the_example_is_no_constant_in_silence(tmp_path: Path) -> None:
    x = torch.rand(2, 2) + 1
    result = rewritten(ReadsAny(0), (x,), tmp_path / "any")
    assert "torchscript: at other values of the inputs, exported and torch differ" in (result.error or ""), result.error
    result = rewritten(Reads(float(x[0, 0])), (x,), tmp_path / "one")
    assert result.ok, result.error
    assert "was compared at the example's values alone: the module takes no others that were tried" in result.notes


class Doubles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 100 else x


def test_a_scripted_part_that_does_not_export_is_named(tmp_path: Path) -> None:
    scripted = torch.jit.script(Doubles())  # type: ignore[no-untyped-call]
    profiles = {"input": ((1, 4), (2, 4), (200, 4))}
    result = rewritten(nn.Sequential(nn.Linear(4, 4), scripted), (torch.ones(2, 4),), tmp_path, profiles=profiles)
    assert not result.ok
    assert "in the place of '1' put the nn.Module it was scripted from" in (result.error or ""), result.error


def test_a_complex_input_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'input': is torch\.complex64.*torch\.view_as_real"):
        rewritten(nn.Identity(), (torch.ones(2, dtype=torch.complex64),), tmp_path)


class Gated(nn.Module):
    """Writes to two views of one tensor, as ``nn.GRUCell`` does inside: torch allows it where no gradients are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.both = nn.GRUCell(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(4) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.both(self.cell(x)).chunk(2, 1)
        gate.sigmoid_()
        return value.mul_(gate) * self.scale.clamp_(-1, 1)


def test_what_torch_allows_without_gradients_alone_is_exported(tmp_path: Path) -> None:
    profiles = {"x": ((1, 8), (2, 8), (5, 8))}
    result = rewritten(Gated(), (torch.randn(2, 8),), tmp_path, profiles=profiles)
    assert result.ok, result.error
    assert (result.exporter, result.notes) == ("dynamo", [])
