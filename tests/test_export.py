"""From torch to an ONNX file that computes the same: names, nesting, dtypes, axes, and exporters that err silently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bridge
from bridge import TRTModule
from bridge.errors import ExportError, UsageError
from bridge.result import ConversionResult

from .support import RTX, convert, run_onnx


@dataclass
class State:
    hidden: torch.Tensor
    cell: torch.Tensor


torch.export.register_dataclass(State)


class Calls(nn.Module):
    """A module whose forward is the given function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def rewritten(source: Any, inputs: Any, folder: Path, **options: Any) -> ConversionResult:
    result = convert(source, inputs, workdir=folder, build=False, **options)
    assert result.status == "rewritten", result.error
    return result


def failure(source: Any, inputs: Any, folder: Path, **options: Any) -> str:
    result = convert(source, inputs, workdir=folder, build=False, **options)
    assert (result.status, result.stage) == ("failed", "export"), (result.status, result.stage, result.error)
    assert not (folder / "exported.onnx").exists() and not (folder / ".partial").exists()
    return result.error or ""


def names_of(result: ConversionResult) -> tuple[list[str], list[str]]:
    assert result.exported_onnx is not None
    graph = onnx.load(str(result.exported_onnx)).graph
    found = [item.name for item in graph.input], [item.name for item in graph.output]
    assert found == ([item.name for item in result.inputs], [item.name for item in result.outputs])
    return found


# --- names and nesting -------------------------------------------------------------------------------------------


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + 2 * y


def nested(batch: dict[str, Any], state: State, *, scale: float, mode: str = "sum") -> dict[str, Any]:
    total = batch["image"] * scale + batch["masks"][0] + batch["masks"][1]
    return {"total": total, "state": State(state.hidden + 1, state.cell + total), "mode": mode}


def variadic(first: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return first + rest[1], [rest[0] * 2, more["last"] - first]


X, Y, Z = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)


@pytest.mark.parametrize("target", [RTX, "tensorrt-8.5"])  # dynamo first, and the older exporter first
@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (add, (X, Y), (["x", "y"], ["output"])),
        (add, {"y": Y, "x": X}, (["y", "x"], ["output"])),
        (
            nested,
            {"batch": {"image": X, "masks": [Y, Z]}, "state": State(X, Y), "scale": 0.5},
            (
                ["batch.image", "batch.masks.0", "batch.masks.1", "state.hidden", "state.cell"],
                ["total", "output.state.hidden", "output.state.cell"],
            ),
        ),
        (lambda x, w=None, flag=True: x if w is None and flag else w, (X, None, True), (["x"], ["output"])),
        (lambda x, y: (x, y, x), (X, Y), (["x", "y"], ["output.0", "output.1", "output.2"])),
        (lambda a, b: {"b": a - b, "c": {"d": a}}, (X, Y), (["a", "b"], ["output.b", "c.d"])),
    ],
    ids=["positional", "keywords", "nested", "constants", "inputs-as-outputs", "an-output-named-as-an-input"],
)
def test_names_follow_the_parameters_and_the_keys_of_the_result(
    tmp_path: Path, function: Any, inputs: Any, expected: Any, target: str
) -> None:
    assert names_of(rewritten(Calls(function), inputs, tmp_path, target=target)) == expected


def test_arguments_with_a_star_are_numbered_and_keywords_named(tmp_path: Path) -> None:
    class Variadic(nn.Module):
        def forward(self, first: Any, *rest: Any) -> Any:
            return first + rest[1], [rest[0] * 2]

    result = rewritten(Variadic(), (X, Y, Z), tmp_path)
    assert names_of(result) == (["first", "rest.0", "rest.1"], ["output.0", "output.1.0"])


def test_given_names_are_those_of_the_model_and_of_the_comparisons(tmp_path: Path) -> None:
    result = rewritten(Calls(add), (X, Y), tmp_path, input_names=["pixels", "mask"], output_names=["scores"])
    assert names_of(result) == (["pixels", "mask"], ["scores"])
    assert {item.output for item in result.comparisons} == {"scores"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_names": ["a", "b"]}, r"output_names: \['a', 'b'\] for 1 outputs \(output\)"),
        ({"input_names": ["a"]}, r"input_names: \['a'\] for 2 inputs \(x, y\)"),
        ({"input_names": ["a", "a"]}, "all different"),
        ({"output_names": ["x"]}, "output_names: 'x' is the name of an input"),
    ],
)
def test_given_names_of_a_wrong_number_or_twice_the_same_are_a_wrong_call(
    tmp_path: Path, options: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        bridge.convert(Calls(add), (X, Y), workdir=tmp_path, target=RTX, **options)
    assert list(tmp_path.iterdir()) == []


def test_two_outputs_that_would_be_named_the_same_ask_for_output_names(tmp_path: Path) -> None:
    module = Calls(lambda x: {"a.b": x + 1, "a": {"b": x + 2}})
    with pytest.raises(UsageError, match="output_names"):
        bridge.convert(module, (X,), workdir=tmp_path, target=RTX)
    assert names_of(rewritten(module, (X,), tmp_path, output_names=["a", "b"]))[1] == ["a", "b"]


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [RTX, "tensorrt-8.5"])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int8", "int32", "int64", "uint8", "bool"]
)
def test_every_dtype_goes_through_and_comes_out_with_the_same_values(tmp_path: Path, dtype: str, target: str) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype))
    result = rewritten(Calls(lambda x: (x.reshape(3, 2), x.to(torch.float32) + 1)), (x,), tmp_path, target=target)
    assert result.inputs[0].source_dtype == dtype
    assert [item.source_dtype for item in result.outputs] == [dtype, "float32"]
    assert [item.max_abs_error for item in result.comparisons] == [0.0] * 4


def test_float64_is_cast_in_the_graph_and_said(tmp_path: Path) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    result = rewritten(Calls(lambda x: x * 2), (x,), tmp_path)
    tensors = [*result.inputs, *result.outputs]
    assert [(item.dtype, item.source_dtype) for item in tensors] == [("float32", "float64")] * 2
    assert any("float64" in note for note in result.notes), result.notes


def test_int64_at_the_boundary_is_narrowed_for_a_target_without_it_and_said(tmp_path: Path) -> None:
    x = torch.tensor([1, 2, 3])
    old = rewritten(Calls(lambda x: x + 1), (x,), tmp_path, target="tensorrt-8.5")
    assert [(item.dtype, item.source_dtype) for item in (*old.inputs, *old.outputs)] == [("int32", "int64")] * 2
    assert any("int64" in note for note in old.notes), old.notes
    new = rewritten(Calls(lambda x: x + 1), (x,), tmp_path, target=RTX)
    assert [item.dtype for item in (*new.inputs, *new.outputs)] == ["int64", "int64"]


def test_complex_outputs_become_pairs_of_reals(tmp_path: Path) -> None:
    result = rewritten(Calls(lambda x: torch.complex(x, 2 * x).conj()), (X,), tmp_path)
    assert result.comparisons[0].reference_shape == [2, 3, 2]


# --- what the module is left as ----------------------------------------------------------------------------------


def test_the_module_keeps_its_mode_and_parameters_and_the_result_says_that_eval_was_used(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    module[2].eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    result = rewritten(module, (X,), tmp_path)
    assert [item.training for item in module.modules()] == [True, True, True, False]
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "BatchNorm's statistics did not move"
    assert any("training mode" in note for note in result.notes)
    assert not any("training mode" in note for note in rewritten(module.eval(), (X,), tmp_path).notes)
    assert not any(item.training for item in module.modules())


def test_the_module_keeps_its_mode_where_it_raises(tmp_path: Path) -> None:
    class Raises(nn.Module):
        def forward(self, x: Any) -> Any:
            raise ValueError("no")

    module = Raises().train()
    failure(module, (X,), tmp_path)
    assert module.training


def test_the_module_and_its_inputs_stay_on_their_device_and_keep_their_gradients(tmp_path: Path) -> None:
    module, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    rewritten(module, (x,), tmp_path)
    assert x.requires_grad and x.grad is None
    assert all(item.requires_grad and item.device.type == "cpu" for item in module.parameters())


def test_a_forward_that_works_in_place_leaves_the_example_inputs_as_they_were(tmp_path: Path) -> None:
    x = torch.zeros(2, 3)
    result = rewritten(Calls(lambda x: x.add_(1).mul_(3)), (x,), tmp_path)
    assert torch.equal(x, torch.zeros(2, 3))
    assert result.comparisons[0].max_abs_error == 0.0
    assert run_onnx(result.onnx, {"x": np.zeros((2, 3), np.float32)})["output"].tolist() == [[3.0] * 3] * 2


# --- exported programs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [None, (X, Y), {"x": X, "y": Y}])
def test_an_exported_program_is_converted_with_and_without_inputs(tmp_path: Path, inputs: Any) -> None:
    class Adds(nn.Module):
        def forward(self, x: Any, y: Any) -> Any:
            return {"sum": x + 2 * y}

    program = torch.export.export(Adds(), (X, Y))
    result = rewritten(program, inputs, tmp_path)
    assert names_of(result) == (["x", "y"], ["sum"])
    assert result.exporter == "dynamo" and result.comparisons[0].agreed


def test_an_exported_program_with_dynamic_axes_takes_profiles(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    result = rewritten(program, None, tmp_path, profiles={"input": ((1, 3), (2, 3), (5, 3))})
    assert [(item.inputs, item.reference_shape) for item in result.comparisons if item.reference == "torch"] == [
        ("example", [2, 2]),
        ("min", [1, 2]),
        ("max", [5, 2]),
    ]


def test_an_exported_program_with_static_axes_and_a_dynamic_profile_names_the_axis(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2), (X,))
    profiles = {"input": ((1, 3), (2, 3), (5, 3))}
    with pytest.raises(UsageError, match="'input', axis 0: the ExportedProgram has the constant 2 there"):
        bridge.convert(program, workdir=tmp_path, target=RTX, profiles=profiles)


def test_an_exported_program_keeps_what_it_takes_by_position_by_keyword_and_as_constants(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Any, n: int, nothing: Any, *, more: dict[str, Any]) -> Any:
            return x * n + more["y"]

    program = torch.export.export(Mixed(), (X, 3, None), {"more": {"y": Y}})
    result = rewritten(program, None, tmp_path)
    assert names_of(result)[0] == ["x", "more.y"]
    again = rewritten(program, {"more": {"y": Z}, "x": X, "n": 3, "nothing": None}, tmp_path)
    assert names_of(again)[0] == ["x", "more.y"]


# --- dynamic axes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [RTX, "tensorrt-8.5"])
def test_dynamic_axes_are_compared_at_min_and_max_even_from_an_example_of_one(tmp_path: Path, target: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    profiles = {"input": ((1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 12))}
    result = rewritten(module, (torch.randn(1, 3, 8, 8),), tmp_path, profiles=profiles, target=target)
    assert [(item.reference, item.inputs, item.reference_shape) for item in result.comparisons] == [
        ("torch", "example", [1, 4]),
        ("torch", "max", [4, 4]),
        ("exported", "example", [1, 4]),
        ("exported", "max", [4, 4]),
    ]
    assert all(isinstance(result.inputs[0].shape[axis], str) for axis in (0, 3)), result.inputs
    assert result.inputs[0].shape[1:3] == [3, 8]
    assert result.inputs[0].profiles == [[[1, 3, 8, 8], [1, 3, 8, 8], [4, 3, 8, 12]]]


def test_an_axis_that_the_module_makes_constant_is_named_and_the_other_exporter_tried(tmp_path: Path) -> None:
    class Unrolls(nn.Module):
        def forward(self, start: Any, x: Any) -> Any:
            for index in range(x.shape[0]):
                start = start + x[index]
            return start

    profiles = {"x": ((1, 3), (2, 3), (5, 3))}
    error = failure(Unrolls(), (torch.randn(3), torch.randn(2, 3)), tmp_path, profiles=profiles)
    assert "dynamo: axis 0 of 'x' was declared dynamic and has become the constant 2 in the module's code" in error
    assert "torchscript: the exported model does not run" in error, error


def test_a_model_of_dynamo_that_does_not_run_at_another_shape_is_replaced_by_the_older_exporters(
    tmp_path: Path,
) -> None:
    """torch 2.13's dynamo exporter makes an LSTM that runs at the traced number of steps alone, and says nothing."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: Any) -> Any:
            return self.lstm(x)[0]

    profiles = {"x": ((1, 2, 3), (2, 2, 3), (5, 2, 3))}
    result = rewritten(Recurrent(), (torch.randn(2, 2, 3),), tmp_path, profiles=profiles)
    assert {item.inputs for item in result.comparisons} == {"example", "min", "max"}
    if result.exporter == "torchscript":
        [note] = [note for note in result.notes if "dynamo" in note]
        assert "\n" not in note and "the exported model does not run" in note and "onnxruntime_src" not in note, note


def test_a_branch_on_the_shape_that_an_exporter_bakes_in_ends_as_a_failure(tmp_path: Path) -> None:
    """Both exporters trace one side; at the other allowed shape the module takes the other one."""

    class Branches(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2 if torch.sym_int(x.shape[0]) < 3 else x * 5

    error = failure(Branches(), (torch.randn(2, 3),), tmp_path, profiles={"x": ((1, 3), (2, 3), (5, 3))})
    assert "differ" in error and "max" in error, error


def test_a_branch_on_the_data_that_the_older_exporter_bakes_in_is_found_by_no_example_but_dynamos_reason_is_noted(
    tmp_path: Path,
) -> None:
    class Branches(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2 if x.sum() > 10 else x * 5

    error = failure(Branches(), (torch.ones(2, 3),), tmp_path, profiles={"x": ((1, 3), (2, 3), (5, 3))})
    assert "torchscript: exported and torch differ: output 'output' at the max shapes" in error, error
    static = rewritten(Branches(), (torch.ones(2, 3),), tmp_path)
    assert static.exporter == "torchscript"
    [note] = [note for note in static.notes if "dynamo" in note]
    assert "\n" not in note and "older exporter" in note, note


def test_an_exporter_that_errs_silently_is_caught(tmp_path: Path) -> None:
    """torch 2.13's dynamo exporter writes scatter_reduce('mean') without its reduction."""

    class Means(nn.Module):
        def forward(self, x: Any, index: Any) -> Any:
            return torch.zeros(3, 4).scatter_reduce(0, index, x, "mean", include_self=False)

    inputs = (torch.randn(5, 4), torch.randint(0, 3, (5, 4)))
    result = bridge.convert(Means(), inputs, workdir=tmp_path, target=RTX, build=False)
    if result.ok:  # an exporter that does it right
        assert all(item.agreed for item in result.comparisons)
    else:
        assert result.stage == "export" and "differ: output 'output'" in str(result.error), result.error


def test_a_module_that_draws_random_numbers_is_told_to_be_so(tmp_path: Path) -> None:
    error = failure(Calls(lambda x: x + torch.rand_like(x)), (X,), tmp_path)
    assert "random" in error, error


# --- errors ------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, torch.ones(7, 7))  # the line of the error


def test_a_module_that_raises_is_reported_with_the_line_of_the_users_code_and_the_inputs(tmp_path: Path) -> None:
    error = failure(nn.Sequential(nn.Identity(), Inner()), (X,), tmp_path)
    with Path(__file__).open() as file:
        line = next(number for number, text in enumerate(file, 1) if "# the line of the error" in text)
    assert "raises in forward: RuntimeError" in error
    assert f"{Path(__file__).name}:{line}" in error, error
    assert "input float32[2, 3]" in error, error


def test_what_no_exporter_knows_is_said_once_and_printed_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Fits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.lstsq(x, x.sum(-1, keepdim=True))[0]

    assert "linalg_lstsq" in failure(Fits(), (torch.randn(4, 4),), tmp_path)
    assert "graph" not in capfd.readouterr().out


def test_a_module_that_fails_at_the_max_shapes_alone_is_reported_with_those_shapes(tmp_path: Path) -> None:
    table = nn.Embedding(4, 2)
    module = Calls(lambda x: table(torch.arange(x.shape[0])))
    error = failure(module, (X,), tmp_path, profiles={"x": ((1, 3), (2, 3), (9, 3))})
    assert "IndexError" in error and "x float32[9, 3]" in error, error


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (TRTModule(), "the module is a TRTModule"),
        (nn.Sequential(nn.ReLU(), TRTModule()), "Sequential: '1' is a TRTModule"),
    ],
)
def test_what_is_an_engine_already_is_not_converted_again(tmp_path: Path, module: nn.Module, words: str) -> None:
    with pytest.raises(UsageError, match=f"{words}, an engine already: convert the module that it was made from"):
        bridge.convert(module, (X,), workdir=tmp_path, target=RTX)


def test_a_module_without_values_is_refused_with_the_way_to_load_them(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to("meta")
    with pytest.raises(
        UsageError, match=r"Sequential: 0\.weight, 0\.bias, 1\.weight, … are on the meta device.*to_empty"
    ):
        bridge.convert(module, (X,), workdir=tmp_path, target=RTX)


@pytest.mark.parametrize("result", [None, 3, {"a": "text"}, ()])
def test_a_module_without_tensors_in_its_result_is_refused(tmp_path: Path, result: Any) -> None:
    assert "returns no tensor" in failure(Calls(lambda x: result), (X,), tmp_path)


def test_a_module_without_inputs_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give example inputs"):
        bridge.convert(nn.Linear(3, 2), workdir=tmp_path, target=RTX)


def test_an_opset_that_is_asked_for_is_used_or_said_not_to_be(tmp_path: Path) -> None:
    result = rewritten(nn.Linear(3, 2), (X,), tmp_path, opset=19)
    assert result.exported_onnx is not None
    assert onnx.load(str(result.exported_onnx)).opset_import[0].version == 19


def test_check_raises_the_error_of_the_result(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="returns no tensor"):
        bridge.convert(Calls(lambda x: None), (X,), workdir=tmp_path, target=RTX, check=True)
    assert ConversionResult.load(tmp_path / "result.json").status == "failed"


class Named(dict):  # type: ignore[type-arg]
    """An output like those of transformers: registered with pytree, without names for its children."""


torch.utils._pytree.register_pytree_node(
    Named, lambda item: (list(item.values()), list(item)), lambda values, keys: Named(zip(keys, values, strict=True))
)


def test_outputs_of_a_class_registered_without_names_are_named_by_its_keys(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Named:
            return Named(hidden=x * 2, pooled=(x.sum(1),))

    result = bridge.convert(Net(), (torch.randn(2, 3),), workdir=tmp_path, target=RTX, build=False)
    assert result.status == "rewritten", result.error
    assert [tensor.name for tensor in result.outputs] == ["hidden", "pooled.0"]


def test_a_convolution_in_bfloat16_is_exported_at_an_opset_that_has_it(tmp_path: Path) -> None:
    module, image = torch.nn.Conv2d(3, 4, 3).bfloat16(), torch.randn(1, 3, 8, 8).bfloat16()
    result = bridge.convert(module, (image,), workdir=tmp_path, target=RTX, build=False)
    assert result.status == "rewritten", result.error
    assert result.exporter == "dynamo" and result.inputs[0].dtype == "bfloat16"


def test_autocast_to_bfloat16_inside_of_the_module_is_exported_at_an_opset_that_has_it(tmp_path: Path) -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found = self.body(image)
                return self.head(found.relu().mean((2, 3)))

    result = bridge.convert(Autocast(), (torch.randn(1, 3, 8, 8),), workdir=tmp_path, target=RTX, build=False)
    assert result.status == "rewritten", result.error
    assert result.exporter == "dynamo" and result.inputs[0].dtype == "float32"


def test_inputs_and_outputs_may_be_called_as_the_exporter_calls_what_is_inside(tmp_path: Path) -> None:
    class Statistics(nn.Module):
        def forward(self, add: torch.Tensor) -> dict[str, torch.Tensor]:
            total = add + 1
            return {"mul": total * 2, "mean": total.mean(), "sub": total.mean(1) - 1}

    result = bridge.convert(Statistics(), (torch.randn(2, 3),), workdir=tmp_path, target=RTX, build=False)
    assert result.status == "rewritten", result.error
    assert result.exporter == "dynamo" and not any("older exporter" in note for note in result.notes), result.notes
    assert [item.name for item in (*result.inputs, *result.outputs)] == ["add", "mul", "mean", "sub"]


def test_a_buffer_that_a_module_returns_is_what_it_was_after_that_run(tmp_path: Path) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.copy_(x.sum(0) * 2)
            return self.kept

    result = convert(Kept(), (torch.randn(2, 3),), workdir=tmp_path, profiles={"x": ((1, 3), (2, 3), (4, 3))})
    assert result.ok, result.error
