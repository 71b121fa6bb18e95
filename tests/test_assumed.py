"""Sizes between min and max where the module's code goes another way than at the example, at min and at max."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from .support import convert, run_onnx
from .test_export import Calls, failure, rewritten

EVEN = {"x": ((2, 2), (2, 8), (2, 16))}


def of_odd_sizes(x: Any) -> Any:
    return x * 3 if x.shape[1] % 2 else x * 2


def of_one_size(x: Any) -> Any:
    return x * 3 if x.shape[1] == 7 else x * 2


@pytest.mark.parametrize(
    ("function", "shape", "assumed"),
    [(of_odd_sizes, "x [2, 3]", "(x.shape[1] % 2) == 0"), (of_one_size, "x [2, 7]", "x.shape[1] != 7")],
)
def test_a_size_that_the_code_treats_otherwise_is_found_and_what_was_assumed_named(
    tmp_path: Path, function: Any, shape: str, assumed: str
) -> None:
    dynamo, torchscript = failure(Calls(function), (torch.randn(2, 8),), tmp_path, profiles=EVEN).splitlines()[1:]
    for reason in (dynamo, torchscript):
        assert f"differ: output 'output' at the {shape} shapes" in reason, reason
    assert f"torch.export took for granted that {assumed}" in dynamo, dynamo


def test_profiles_that_are_static_each_are_shapes_to_export_at(tmp_path: Path) -> None:
    profiles = [{"x": ((2, size),) * 3} for size in (8, 7)]
    error = failure(Calls(of_one_size), (torch.randn(2, 8),), tmp_path, profiles=profiles)
    assert "torch.export took for granted that x.shape[1] != 7" in error, error


def refuses_odd_sizes(x: Any) -> Any:
    if x.shape[1] % 2:
        raise ValueError("an even number, please")
    return x.reshape(2, -1, 2).sum(2)


def test_sizes_that_the_module_does_not_take_are_no_failure(tmp_path: Path) -> None:
    result = rewritten(Calls(refuses_odd_sizes), (torch.randn(2, 8),), tmp_path, profiles=EVEN)
    assert result.exporter == "dynamo"
    assert {item.inputs for item in result.comparisons} == {"example", "min", "max"}


class Windows(nn.Module):
    """Pads to whole windows where they are not, as image models do."""

    def forward(self, x: Any) -> Any:
        _, _, height, width = x.shape
        below, beside = -height % 4, -width % 4
        if below or beside:
            x = functional.pad(x, (0, beside, 0, below))
        return functional.avg_pool2d(x, 4).repeat_interleave(4, 2)[:, :, :height]


@pytest.mark.parametrize("most", [32, 31])
def test_a_model_is_exported_at_a_shape_that_takes_the_general_way(tmp_path: Path, most: int) -> None:
    """Whether or not the max shows that the way of the example, min and max is not the only one."""
    profiles = {"x": ((1, 2, 8, 8), (1, 2, 16, 16), (1, 2, most, most))}
    result = rewritten(Windows(), (torch.randn(1, 2, 16, 16),), tmp_path, profiles=profiles)
    assert result.exporter == "dynamo" and any("since at the example's" in note for note in result.notes), result.notes
    for height, width in ((9, 9), (12, 16), (13, 8), (8, 15)):
        x = torch.randn(1, 2, height, width)
        [found] = run_onnx(result.onnx, {"x": x.numpy()}).values()
        torch.testing.assert_close(torch.from_numpy(found), Windows()(x))


def resized_where_needed(x: Any, y: Any) -> Any:
    return x + (y if x.shape == y.shape else functional.interpolate(y, x.shape[2:]))


def test_sizes_that_the_example_alone_has_in_common_are_told_apart(tmp_path: Path) -> None:
    profiles = {"x": ((1, 2, 8), (1, 2, 16), (1, 2, 32)), "y": ((1, 2, 4), (1, 2, 16), (1, 2, 16))}
    given = (torch.randn(1, 2, 16), torch.randn(1, 2, 16))
    result = rewritten(Calls(resized_where_needed), given, tmp_path, profiles=profiles)
    assert any("since at the example's" in note for note in result.notes), result.notes


def of_squares(x: Any) -> Any:
    return x * 2 if x.shape[0] == x.shape[1] else x * 3


def test_an_image_that_is_not_square_is_tried_where_the_code_asks(tmp_path: Path) -> None:
    error = failure(Calls(of_squares), (torch.randn(8, 8),), tmp_path, profiles={"x": ((4, 4), (8, 8), (16, 16))})
    assert "took for granted that x.shape[1] == x.shape[0]" in error, error


def test_sizes_that_belong_together_are_tried_together(tmp_path: Path) -> None:
    """Alone, either would be a shape that no caller gives, and torch broadcasts."""

    def weighted(x: Any, mask: Any) -> Any:
        return (x * mask[:, :, None]).reshape(x.shape[0] * x.shape[1], -1).sum(0)

    profiles = {"x": ((1, 1, 4), (2, 5, 4), (4, 9, 4)), "mask": ((1, 1), (2, 5), (4, 9))}
    result = convert(
        Calls(weighted), (torch.randn(2, 5, 4), torch.ones(2, 5)), workdir=tmp_path, build=False, profiles=profiles
    )
    assert (result.status, result.exporter) == ("rewritten", "dynamo"), result.error


def sizes_of_patches(x: Any) -> Any:
    """As heads that are given the number of patches: ``int()`` makes a constant of it where the code is run."""
    height, width = (size // 4 for size in x.shape[2:])
    places = torch.arange(16.0).reshape(1, 1, 4, 4)
    if height * width != 16:
        places = functional.interpolate(places, (height, width), mode="bilinear")
    return functional.interpolate(functional.avg_pool2d(x, 4) + places, (int(height * 4), int(width * 4)))


def test_a_shape_to_export_at_is_read_where_running_it_makes_constants(tmp_path: Path) -> None:
    profiles = {"x": ((1, 2, 8, 8), (1, 2, 16, 16), (1, 2, 40, 40))}
    result = rewritten(Calls(sizes_of_patches), (torch.randn(1, 2, 16, 16),), tmp_path, profiles=profiles)
    assert result.exporter == "dynamo", result.notes
