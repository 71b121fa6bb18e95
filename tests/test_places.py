"""Loops over the places that nonzero() finds, as routed experts have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bridge.translations.places import NOTE

from .support import RTX, RTX_INSTALLED, convert, run_onnx

PROFILES = {"x": ((1, 1, 8), (2, 5, 8), (3, 9, 8))}


class Experts(nn.Module):
    """Each token goes to two of five experts, whose results are added up, weighted."""

    def __init__(self, used: Callable[[Tensor], Iterable[Any]]) -> None:
        super().__init__()
        self.gate, self.used = nn.Linear(8, 5), used
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 8)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        taken = functional.one_hot(chosen, 5).permute(2, 1, 0)
        result = torch.zeros_like(tokens)
        for expert in self.used(taken.sum((1, 2)) > 0):
            place, token = torch.where(taken[expert].squeeze(0))
            if token.numel() > 0:
                found = self.experts[expert](tokens[token]) * weights[token, place, None]
                result.index_add_(0, token, found)
        return result.reshape(x.shape)


@pytest.mark.parametrize(
    "used",
    [
        lambda used: used.nonzero(),
        lambda used: used.nonzero().flatten().tolist(),
        lambda used: torch.where(used)[0][:],
        lambda used: range(len(used)),  # which asks whether there are any rows alone
    ],
)
def test_experts_are_routed_at_any_batch_and_length(used: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Experts(used).eval()
    result = convert(module, (torch.randn(2, 5, 8),), workdir=tmp_path, profiles=PROFILES, target=RTX, cache=False)
    assert result.status == ("built" if RTX_INSTALLED else "rewritten"), result.error
    assert result.exporter == "dynamo" and NOTE in result.notes, result.notes
    for batch, length in ((1, 1), (2, 5), (3, 2)):
        x = torch.randn(batch, length, 8)
        [found] = run_onnx(result.exported_onnx, {"x": x.numpy()}).values()
        torch.testing.assert_close(torch.from_numpy(found), module(x))


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found = x[:, 0]
        for place in (x > 0).any(0).nonzero():
            found = found + x[:, place].squeeze(1).clamp(max=0) + 1  # also for a place that is not found
        return found


class Otherwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found = x[x > 0]
        return x + found.sum() if found.numel() > 0 else x - 100


@pytest.mark.parametrize(
    ("module", "x"),
    [(Counts(), torch.tensor([[4.0, -5, -6], [1, 2, 3]])), (Otherwise(), torch.tensor([[-1.0, -2], [3, 4]]))],
)
def test_what_is_done_for_none_is_found_at_other_values(module: nn.Module, x: Tensor, tmp_path: Path) -> None:
    """Of the example's values every place is found."""
    result = convert(module, (x,), workdir=tmp_path, build=False, target=RTX)
    assert result.status == "failed" and result.stage == "export"
    assert "the code decides by values of a tensor" in (result.error or ""), result.error
    assert "something is done where nonzero() finds nothing" in (result.error or ""), result.error


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found = x[x > 0]
        return found * 2 if found.numel() > 3 else found * 3


def test_a_number_that_is_not_none_is_no_guess(tmp_path: Path) -> None:
    result = convert(Sizes(), (torch.tensor([1.0, -1, -2, -3, 4]),), workdir=tmp_path, build=False, target=RTX)
    assert result.status == "failed" and "decides by values" in (result.error or ""), result.error


class Padded(nn.Module):
    """As many transformers ask whether there is padding at all."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if (mask == 0).any():
            x = x.masked_fill(mask[..., None] == 0, 0)
        return x.cumsum(1)


def test_a_mask_that_the_example_has_no_use_for_is_tried(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.int64))
    result = convert(Padded(), inputs, workdir=tmp_path, build=False, target=RTX)
    assert result.status == "failed", result.notes
    assert "torchscript: at other values of the inputs, exported and torch differ" in (result.error or ""), result.error
