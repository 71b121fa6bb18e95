"""Calibration inputs: from data sets, loaders, functions and files, in the shapes and types that the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bridge import torch_source
from bridge.calibration import Calibration, check_calibration, file_reader, torch_reader, write_calibration
from bridge.errors import UsageError
from bridge.inputs import Profile
from bridge.ranges import measure
from bridge.runtime.dataset import FolderDataset, ListDataset, TensorBatchDataset
from bridge.tensors import to_numpy
from passes.framework import example as model_of


class Image(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Words(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, labels: Any = None) -> torch.Tensor:
        return ids if mask is None else ids * mask


ROWS = np.arange(60, dtype=np.float32).reshape(10, 6)


def calibrated(given: Any, folder: Path, rows: int = 2, most: int | None = None, **options: Any) -> Calibration:
    """Of a model with one input "x" of ``rows`` times 6 numbers, up to ``most`` rows."""
    source = torch_source.make_source(Image(), (torch.zeros(rows, 6),), None, None)
    allowed = {"x": Profile((min(rows, most or rows), 6), (rows, 6), (most or rows, 6))}
    example = {"x": np.zeros((rows, 6), np.float32)}
    check_calibration(given, "minmax", True)
    cache = folder / "cache"
    return write_calibration(given, torch_reader(source), example, allowed, folder / "c", "minmax", cache, **options)


def firsts(made: Calibration) -> list[float]:
    return [float(sample["x"][0, 0]) for sample in made.samples()]


def pairs() -> TensorDataset:
    return TensorDataset(torch.from_numpy(ROWS), torch.arange(10))


def test_inputs_keep_names_that_numpy_has_as_arguments_of_its_own(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, file: torch.Tensor, allow_pickle: torch.Tensor) -> torch.Tensor:
            return file + allow_pickle

    example = {name: ROWS[:2] + place for place, name in enumerate(("file", "allow_pickle"))}
    source = torch_source.make_source(Named(), tuple(map(torch.from_numpy, example.values())), None, None)
    allowed = {name: Profile((2, 6), (2, 6), (2, 6)) for name in example}
    made = write_calibration(None, torch_reader(source), example, allowed, tmp_path, "minmax", tmp_path / "cache")
    (sample,) = made.samples()
    assert list(sample) == list(example) and all((sample[name] == example[name]).all() for name in example)


@pytest.mark.parametrize(
    "given",
    [
        [(torch.from_numpy(ROWS[:2]),), torch.from_numpy(ROWS[2:4]), {"x": ROWS[4:6]}],
        ListDataset([(torch.from_numpy(ROWS[index : index + 2]),) for index in (0, 2, 4)]),
        lambda: ((torch.from_numpy(ROWS[index : index + 2]),) for index in (0, 2, 4)),
        lambda: [ROWS[0:2], ROWS[2:4], ROWS[4:6]],
        TensorDataset(torch.from_numpy(ROWS[:6]).reshape(3, 2, 6), torch.arange(3)),
        DataLoader(TensorDataset(torch.from_numpy(ROWS[:6]), torch.arange(6)), batch_size=2),
    ],
    ids=["sequence", "Dataset", "generator", "function", "pairs", "DataLoader"],
)
def test_inputs_come_from_whatever_holds_them(given: Any, tmp_path: Path) -> None:
    made = calibrated(given, tmp_path)
    assert firsts(made) == [0, 12, 24] and made.shapes == {"x": (2, 6)} and not made.notes
    assert np.array_equal(next(iter(made.samples()))["x"], ROWS[:2])


def test_data_sets_of_the_bridge_in_batches_and_in_folders(tmp_path: Path) -> None:
    assert firsts(calibrated(TensorBatchDataset((torch.from_numpy(ROWS),)), tmp_path, 1)) == [
        6.0 * i for i in range(10)
    ]
    folder = FolderDataset(tmp_path / "data")
    folder.insert((torch.from_numpy(ROWS[4:6]),))
    assert firsts(calibrated(folder, tmp_path)) == [24]


@pytest.mark.parametrize("given", [lambda: (torch.from_numpy(ROWS[:2]),), lambda: {"x": ROWS[:2]}, lambda: ROWS[:2]])
def test_a_function_may_return_the_inputs_of_one_call(given: Any, tmp_path: Path) -> None:
    assert firsts(calibrated(given, tmp_path)) == [0]


def test_a_loader_s_batches_are_cut_to_the_model_s_and_its_last_one_is_left_out_where_it_is_smaller(
    tmp_path: Path,
) -> None:
    cut = calibrated(DataLoader(pairs(), batch_size=5), tmp_path / "a")
    assert firsts(cut) == [0, 12, 30, 42], "two times two of five rows"
    last = calibrated(DataLoader(pairs(), batch_size=4), tmp_path / "b", 4, 8)
    assert firsts(last) == [0, 24] and last.notes == (
        "calibration: the last batch is smaller than the others, and left out",
    )
    every = calibrated(DataLoader(pairs(), batch_size=4), tmp_path / "d", 2, 8, one_shape=False)
    assert [sample["x"].shape[0] for sample in every.samples()] == [4, 4, 2] and not every.notes
    static = calibrated(DataLoader(pairs(), batch_size=4), tmp_path / "g", 4, one_shape=False)
    assert firsts(static) == [0, 24] and static.notes, "the model takes four rows, and two are left over"
    uneven = [torch.from_numpy(ROWS[:4]), torch.from_numpy(ROWS[4:6])]
    with pytest.raises(UsageError, match=r"item 1: 'x' has the shape .*TensorRT calibrates at one shape"):
        calibrated(uneven, tmp_path / "e", 2, 8)
    assert len(calibrated(uneven, tmp_path / "f", 2, 8, one_shape=False).files) == 2


def test_a_loader_of_mappings_gives_what_the_module_takes(tmp_path: Path) -> None:
    rows = [
        {"ids": torch.full((3,), i), "labels": torch.tensor(i), "mask": torch.ones(3, dtype=torch.int64)}
        for i in range(4)
    ]
    source = torch_source.make_source(
        Words(), {"ids": torch.zeros(2, 3).long(), "mask": torch.ones(2, 3).long()}, None, None
    )
    example = {name: to_numpy(tensor) for name, tensor in source.call.tensors.items()}
    allowed = {name: Profile((2, 3), (2, 3), (2, 3)) for name in example}
    loader = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    made = write_calibration(loader, torch_reader(source), example, allowed, tmp_path, "minmax", tmp_path / "cache")
    assert [sample["ids"].tolist() for sample in made.samples()] == [[[0] * 3, [1] * 3], [[2] * 3, [3] * 3]]
    assert all(set(sample) == {"ids", "mask"} for sample in made.samples())


def test_a_function_may_return_a_data_set_or_a_loader(tmp_path: Path) -> None:
    rows = TensorDataset(torch.from_numpy(ROWS), torch.arange(len(ROWS)))
    calls = TensorDataset(torch.from_numpy(ROWS.reshape(5, 2, 6)), torch.arange(5))
    assert firsts(calibrated(lambda: calls, tmp_path / "a")) == [0, 12, 24, 36, 48]
    loader = DataLoader(rows, batch_size=5)
    assert firsts(calibrated(lambda: loader, tmp_path / "b")) == firsts(calibrated(loader, tmp_path / "c"))

    graph = model_of({"a": ("float32", [2, 6])}, lambda g, a: g.op.Neg(a))
    example, allowed = {"a": ROWS[:2]}, {"a": Profile((2, 6), (2, 6), (2, 6))}
    options: tuple[Any, ...] = (example, allowed, tmp_path / "d", "minmax", tmp_path / "cache")
    made = write_calibration(lambda: loader, file_reader(graph), *options)
    assert [sample["a"][0, 0] for sample in made.samples()] == [0, 12, 30, 42], "five rows are two calls, and one over"


def test_a_folder_has_a_file_for_each_call_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "b.npz", x=ROWS[2:4].astype(np.float64))
    np.save(folder / "a.npy", ROWS[:2])
    np.savez(folder / "c.npz", ROWS[4:6])
    (folder / "notes.txt").write_text("not an input")
    made = calibrated(folder, tmp_path)
    assert firsts(made) == [0, 12, 24] and all(sample["x"].dtype == np.float32 for sample in made.samples())
    assert firsts(calibrated(str(folder), tmp_path / "again")) == [0, 12, 24]


def test_one_file_holds_the_samples_along_its_first_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=ROWS)
    assert firsts(calibrated(tmp_path / "rows.npz", tmp_path / "a", 4)) == [0, 24], "two are left over"
    np.savez(tmp_path / "calls.npz", x=ROWS.reshape(5, 2, 6))
    assert firsts(calibrated(tmp_path / "calls.npz", tmp_path / "b")) == [0, 12, 24, 36, 48]
    np.save(tmp_path / "rows.npy", ROWS)
    assert firsts(calibrated(tmp_path / "rows.npy", tmp_path / "d", 5)) == [0, 30]


def test_files_are_read_for_an_onnx_file_too(tmp_path: Path) -> None:
    graph = model_of({"a": ("float32", ["n", 6]), "b": ("int64", ["n"])}, lambda g, a, b: g.op.Neg(a))
    example = {"a": ROWS[:2], "b": np.zeros(2, np.int64)}
    allowed = {"a": Profile((1, 6), (2, 6), (4, 6)), "b": Profile((1,), (2,), (4,))}
    np.savez(tmp_path / "all.npz", a=ROWS, b=np.arange(10, dtype=np.int32))
    options: tuple[Any, ...] = (example, allowed, tmp_path / "c", "minmax", tmp_path / "cache")
    made = write_calibration(tmp_path / "all.npz", file_reader(graph), *options)
    assert [sample["b"].tolist() for sample in made.samples()] == [[i, i + 1] for i in range(0, 10, 2)]
    assert all(sample["b"].dtype == np.int64 for sample in made.samples())


def test_a_source_that_cannot_be_used_is_refused_with_what_can(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    np.savez(tmp_path / "other.npz", y=ROWS)
    np.savez(tmp_path / "bytes.npz", x=ROWS.astype(np.uint8))
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:200])
    (tmp_path / "text.csv").write_text("1,2")
    cases: Mapping[Any, str] = {
        tmp_path / "nowhere": "there is no .*nowhere; give a sequence of inputs",
        empty: "the folder .*empty holds no .npy or .npz files",
        tmp_path / "text.csv": "text.csv is no .npy or .npz file",
        tmp_path / "other.npz": r"other.npz holds 'y'; the model takes 'x'. Save each input under its name.",
        tmp_path / "bytes.npz": "sample 0 of bytes.npz: 'x' is uint8, and the example float32",
        tmp_path / "broken.npz": "broken.npz cannot be read",
        tmp_path / "cut.npz": "cut.npz cannot be read: File is not a zip file",
        (lambda: None): "calibration: the function returned a NoneType, and no inputs; give a sequence",
        (lambda: 1 // 0): r"<lambda>\(\) raises ZeroDivisionError",
        TensorDataset: "TensorDataset is a class; give one of it, or a function that returns one",
        7: "a int; give a sequence of inputs",
    }
    for given, words in cases.items():
        with pytest.raises(UsageError, match=words):
            calibrated(given, tmp_path / "out")
    with pytest.raises(UsageError, match="item 0: inputs"):
        calibrated([(torch.from_numpy(ROWS[:2]), torch.zeros(2))], tmp_path / "out")
    with pytest.raises(UsageError, match="item 0: cannot be read: ZeroDivisionError"):
        calibrated(lambda: (1 / 0 for _ in range(2)), tmp_path / "out")
    with pytest.raises(UsageError, match="the first axis is that of the samples, and has the sizes 'a' 3, 'b' 4"):
        graph = model_of({"a": ("float32", [6]), "b": ("float32", [6])}, lambda g, a, b: g.op.Add(a, b))
        np.savez(tmp_path / "uneven.npz", a=ROWS[:3], b=ROWS[:4])
        sizes = Profile((6,), (6,), (6,))
        example = {"a": ROWS[0], "b": ROWS[0]}
        options: tuple[Any, ...] = (example, {"a": sizes, "b": sizes}, tmp_path / "out", "minmax", tmp_path / "cache")
        write_calibration(tmp_path / "uneven.npz", file_reader(graph), *options)


def test_what_was_written_is_what_ranges_are_measured_with(tmp_path: Path) -> None:
    from passes import write

    graph = model_of({"x": ("float32", ["n", 6])}, lambda g, x: g.op.Neg(x))
    write(graph, tmp_path / "model.onnx")
    made = calibrated(DataLoader(pairs(), batch_size=4), tmp_path, 2, 8, one_shape=False)
    found = measure(tmp_path / "model.onnx", made.samples())
    assert (found["x"].low, found["x"].high) == (0, 59) and len(found) == 2
