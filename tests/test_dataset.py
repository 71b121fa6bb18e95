"""Datasets record what a module is called with, keep it, and say which shapes an engine needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from bridge import Dataset, FolderDataset, ListDataset, TensorBatchDataset, UsageError

Make = Callable[[], Dataset]


@pytest.fixture(params=["list", "folder"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    return ListDataset if request.param == "list" else lambda: FolderDataset(tmp_path / "set")


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        x += 1
        return x * scale if mask is None else x * mask


def test_shapes_are_those_of_the_items(make: Make) -> None:
    dataset = make()
    for batch in (4, 1, 2):
        dataset.insert((torch.zeros(batch, 3), {"h": torch.zeros(batch)}))
    assert len(dataset) == 3 and dataset.num_inputs() == 2
    assert dataset.flattener.schema == (0, {"h": 1})
    assert dataset.shapes() == ([(4, 3), (1, 3), (2, 3)], {"h": [(4,), (1,), (2,)]})
    assert dataset.shapes_for_index(1) == ((1, 3), {"h": (1,)})
    assert dataset.min_shapes() == ((1, 3), {"h": (1,)})
    assert dataset.max_shapes(flat=True) == [(4, 3), (4,)]
    assert dataset.median_numel_shapes() == ((2, 3), {"h": (2,)})
    assert dataset.infer_dynamic_axes() == ([0], {"h": [0]})
    assert dataset.item_numel(0) == 16
    assert [tuple(item.shape) for item in dataset.getitem_flat(2)] == [(2, 3), (2,)]


def test_min_and_max_are_taken_axis_by_axis() -> None:
    dataset = ListDataset([(torch.zeros(1, 8),), (torch.zeros(4, 2),)])
    assert (dataset.min_shapes(), dataset.max_shapes()) == (((1, 2),), ((4, 8),))
    assert dataset.infer_dynamic_axes() == ([0, 1],)


def test_a_module_is_recorded_before_it_overwrites_its_inputs(make: Make) -> None:
    dataset, module = make(), InPlace()
    with dataset.record(module):
        module(torch.zeros(2, requires_grad=False))
        module(torch.zeros(3))
    module(torch.zeros(4))
    assert len(dataset) == 2, "the hook is gone"
    assert torch.equal(dataset[0][0], torch.zeros(2)) and torch.equal(dataset[1][0], torch.zeros(3))
    assert not dataset[0][0].requires_grad


def test_keyword_arguments_are_recorded_by_name(make: Make) -> None:
    dataset, module = make(), InPlace()
    with dataset.record(module):
        module(torch.zeros(2), mask=torch.ones(2))
    assert list(dataset[0]) == ["x", "mask"] and dataset.num_inputs() == 2


class Variadic(nn.Module):
    def forward(self, *tensors: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return sum(tensors) * scale


def test_a_call_that_is_neither_a_tuple_nor_a_dict_is_refused() -> None:
    dataset = ListDataset()
    with dataset.record(Variadic()) as recorder, pytest.raises(UsageError, match=r"with keywords and with \*tensors"):
        recorder.module(torch.ones(1), scale=2.0)


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    dataset = FolderDataset(tmp_path)
    for index in range(12):
        dataset.insert((torch.full((1,), index),))
    assert [path.name for path in dataset.file_paths()] == [f"input_{index}.pth" for index in range(12)]
    assert [int(item[0]) for item in FolderDataset(tmp_path)] == list(range(12))
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_of_torch2trts_is_read(tmp_path: Path) -> None:
    torch.save([torch.ones(2), torch.ones(3)], tmp_path / "input_0.pth")  # it keeps lists
    assert FolderDataset(tmp_path).min_shapes(flat=True) == [(2,), (3,)]


INSERT = """
import sys, torch
from bridge import FolderDataset
for index in range(20):
    FolderDataset(sys.argv[1]).insert((torch.full((1,), int(sys.argv[2]) + index),))
"""


def test_whatever_a_folder_has_of_torch_files_is_an_item(tmp_path: Path) -> None:
    dataset = FolderDataset(tmp_path)
    torch.save([torch.ones(5)], tmp_path / "kitchen.pth")
    dataset.insert((torch.ones(2),))
    assert [path.name for path in dataset.file_paths()] == ["input_0.pth", "kitchen.pth"]
    assert dataset.max_shapes() == ((5,),) and dataset[1][0].shape == (5,)


def test_a_file_that_torch_does_not_load_is_named_with_the_way_out(tmp_path: Path) -> None:
    dataset = FolderDataset(tmp_path)
    (tmp_path / "input_0.pth").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"input_0\.pth: is damaged"):
        dataset[0]
    dataset.insert((Pair(torch.ones(2), torch.ones(3)),))
    with pytest.raises(UsageError, match=r"input_1\.pth: holds a .*\.Pair, .*add_safe_globals\(\[.*\.Pair\]\)"):
        dataset[1]
    with torch.serialization.safe_globals([Pair]):
        assert dataset[1][0].right.shape == (3,)


def test_shapes_are_torchs_own(make: Make) -> None:
    dataset = make()
    dataset.insert((torch.zeros(4, 3),))
    for shapes in (dataset.shapes_for_index(0), dataset.min_shapes(), dataset.median_numel_shapes()):
        assert isinstance(shapes[0], torch.Size) and shapes[0].numel() == 12


def test_processes_may_insert_at_the_same_time(tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", INSERT, str(tmp_path), base]) for base in ("0", "100", "200")]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    found = sorted(int(item[0]) for item in FolderDataset(tmp_path))
    assert found == [*range(20), *range(100, 120), *range(200, 220)]


def test_a_batch_is_a_set_of_its_rows() -> None:
    dataset = TensorBatchDataset([torch.arange(6.0).reshape(3, 2), torch.arange(3)])
    dataset.insert((torch.full((1, 2), 9.0), torch.tensor([9])))
    assert len(dataset) == 4 and dataset.num_inputs() == 2
    assert torch.equal(dataset[1][0], torch.tensor([[2.0, 3.0]])) and dataset[-1][1].tolist() == [9]
    assert [item[1].item() for item in dataset] == [0, 1, 2, 9]
    with pytest.raises(IndexError):
        dataset[4]


def test_rows_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="no first axis in common"):
        TensorBatchDataset((torch.ones(2, 2), torch.ones(3)))
    dataset = TensorBatchDataset((torch.ones(2, 2),))
    with pytest.raises(UsageError, match=r"\(1, 3\) does not go behind \(2, 2\)"):
        dataset.insert((torch.ones(1, 3),))


@pytest.mark.parametrize("item", [3, "x", (object(),)])
def test_what_is_no_call_is_not_inserted(make: Make, item: Any) -> None:
    dataset = make()
    with pytest.raises(UsageError, match=r"item.*(a tuple or a dict|neither a tensor nor a constant)"):
        dataset.insert(item)
    assert len(dataset) == 0


def test_items_of_another_structure_or_rank_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"ListDataset: item 1 is not as item 0, .* has 2 elements, and the example has 1"
    ):
        ListDataset([(torch.ones(1),), (torch.ones(1), torch.ones(1))]).min_shapes()
    with pytest.raises(UsageError, match="item 1 has the shapes"):
        ListDataset([(torch.ones(1),), (torch.ones(1, 1),)]).max_shapes()


def test_an_empty_set_has_no_shapes(make: Make) -> None:
    with pytest.raises(UsageError, match="is empty; insert or record"):
        make().min_shapes()


def test_items_of_a_users_own_set_may_be_lists_tuples_and_single_tensors() -> None:
    class Mine(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            row = torch.ones(index + 1)
            return ([row], (row,), row)[index]

    assert Mine().shapes(flat=True) == [[(1,), (2,), (3,)]] and Mine().max_shapes() == ((3,),)


def test_a_single_tensor_is_the_only_argument() -> None:
    assert ListDataset([torch.ones(2)]).shapes_for_index(0) == ((2,),)
