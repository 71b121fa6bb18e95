"""A TRTModule around a run: arguments, types, shapes, streams, threads, copies and files. Here a stand-in computes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridge import RunError, UsageError
from bridge.runtime import context, graphs, launch
from bridge.runtime.flattener import Flattener
from bridge.runtime.module import TRTModule

from . import fake_trt

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture(params=[True, False], ids=["compiled", "interpreted"])
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> fake_trt.Gpu:
    if request.param and launch.Launch is None:
        pytest.skip("the package was installed without a C compiler")
    if not request.param:
        monkeypatch.setattr(context, "ContextLaunch", None)
        monkeypatch.setattr(graphs, "GraphLaunch", None)
    return fake_trt.install(monkeypatch)


def module(**changes: Any) -> TRTModule:
    return TRTModule(fake_trt.plan(**changes))


TWO_INPUTS = {
    "inputs": {"x": ["FLOAT", [-1, 3]], "b": ["FLOAT", [1, 3]]},
    "profiles": [{"x": [[1, 3], [4, 3], [8, 3]]}],
}


def test_arguments_go_in_by_position_or_name_and_one_output_comes_back_as_a_tensor(gpu: fake_trt.Gpu) -> None:
    made, bias = module(**TWO_INPUTS), torch.ones(1, 3)
    for y in (made(X, bias), made(X, b=bias), made(b=bias, x=X)):
        assert torch.equal(y, 2 * X + 1)


def test_what_has_to_be_converted_is_converted_anew_in_each_call(gpu: fake_trt.Gpu) -> None:
    made = module()
    for stream in (0, 0, 7, 7):
        with gpu.use(fake_trt.Stream(stream)):
            wide, turned = torch.rand(4, 3, dtype=torch.float64), torch.rand(3, 4).T
            for x in (wide, turned, wide + 1, turned + 1, torch.rand(4, 3)):
                assert torch.equal(made(x), 2 * x.float())
    with pytest.raises(RunError, match="is int32, and the engine takes"):
        made(wide.int())


def test_each_call_has_outputs_of_its_own(gpu: fake_trt.Gpu) -> None:
    made = module()
    first = made(X)
    made(X + 1)
    assert torch.equal(first, 2 * X)


def test_the_next_calls_outputs_are_allocated_while_the_gpu_is_at_work(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module()
    kept = [(x, made(x)) for x in torch.rand(4, 2, 3)]
    assert all(torch.equal(y, 2 * x) for x, y in kept)
    (name,) = made.output_names or ()
    ahead = made.context.addresses[name]
    assert ahead not in {y.data_ptr() for _, y in kept}
    assert made(X).data_ptr() == ahead and made.context.addresses[name] != ahead
    with gpu.use(fake_trt.Stream(7)):  # whose memory is another one
        assert torch.equal(made(X), 2 * X)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        waiting = made.context.addresses[name]
        captured = made(X)
        assert torch.equal(captured, 2 * X) and made.context.addresses[name] == captured.data_ptr() != waiting


@pytest.mark.parametrize(("bound", "ahead"), [(24, True), (23, False)])
def test_large_outputs_are_not_held_ahead(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch, bound: int, ahead: bool
) -> None:
    monkeypatch.setattr(context, "PREPARED", bound)
    made = module()
    y = made(X)
    assert (made.context.addresses[(made.output_names or [""])[0]] != y.data_ptr()) == ahead


def test_a_stream_that_is_left_at_once_costs_one_output_and_calls_in_a_row_are_allocated_for_together(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, allocated = module(), []

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        allocated.append(1)
        return torch.empty_like(*args, **kwargs)

    monkeypatch.setattr(context, "_empty_like", allocate)
    for stream in (1, 2) * 10:
        with gpu.use(fake_trt.Stream(stream)):
            assert torch.equal(made(X), 2 * X)
    assert len(allocated) == 40
    kept, most = [], 0
    for _ in range(50):
        before = len(allocated)
        kept.append(made(X + len(kept)))
        most = max(most, len(allocated) - before)
    assert most == context.AHEAD and len(allocated) - 40 <= 50 + context.AHEAD + 1
    assert all(torch.equal(y, 2 * (X + index)) for index, y in enumerate(kept))


def test_a_captured_call_between_others_does_not_lead_their_outputs_astray(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept = module(), []
    for index in range(9):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda index=index: index % 3 == 2)
        kept.append(made(X + index))
    assert all(torch.equal(y, 2 * (X + index)) for index, y in enumerate(kept))


def test_hooks_are_called_and_a_compiled_forward_is_used(gpu: fake_trt.Gpu) -> None:
    made, seen = module(), []
    assert torch.equal(made(X), 2 * X) and not seen
    own = [
        made.register_forward_pre_hook(lambda module, args: seen.append("before")),
        made.register_forward_hook(lambda module, args, output: output + 1),
    ]
    everywhere = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append("all"))
    try:
        assert torch.equal(made(X), 2 * X + 1) and seen == ["all", "before"]
        for hook in own:
            hook.remove()
        assert torch.equal(made(X), 2 * X) and seen == ["all", "before", "all"]
    finally:
        everywhere.remove()
    assert torch.equal(made(X), 2 * X) and len(seen) == 3
    made.compile(backend="eager")
    net = torch.compile(nn.Sequential(nn.Identity(), made), backend="eager")
    assert torch.equal(made(X), 2 * X) and torch.equal(net(X), 2 * X)


def test_a_call_has_done_its_work_though_there_is_no_memory_for_the_next_one(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, allocated = module(), []

    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        allocated.append(1)
        if len(allocated) > 1:
            raise torch.cuda.OutOfMemoryError("none left")
        return torch.empty_like(*args, **kwargs)

    monkeypatch.setattr(context, "_empty_like", allocate)
    assert torch.equal(made(X), 2 * X)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        made(X)


def test_shapes_are_told_to_tensorrt_when_they_change_and_not_else(gpu: fake_trt.Gpu) -> None:
    made = module()
    for rows in (2, 2, 2, 5, 5, 2):
        x = torch.rand(rows, 3)
        assert torch.equal(made(x), 2 * x)
    assert made.context.reshaped == 3


def test_an_input_that_is_not_contiguous_is_read_as_it_looks(gpu: fake_trt.Gpu) -> None:
    x = torch.rand(3, 4).T
    assert torch.equal(module()(x), 2 * x)


def test_what_was_kept_in_inference_mode_serves_outside_of_it_and_the_other_way_round(gpu: fake_trt.Gpu) -> None:
    made, turned = module(), torch.rand(3, 4, requires_grad=True).T
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.enable_grad, torch.inference_mode)):
        for mode in (first, second, first):
            with mode():
                assert torch.equal(made(turned), 2 * turned)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), "input 'x': is float16, and the engine takes float64 or float32"),
        (torch.zeros(2, 3, 1), r"input 'x': has 3 axes \(\[2, 3, 1\]\), and the engine takes 2"),
        (torch.zeros(9, 3), r"input 'x': has the shape \[9, 3\], and the engine takes \[1, 3\] to \[8, 3\]"),
        (torch.zeros(2, 4), r"input 'x': has the shape \[2, 4\]"),
        (torch.zeros(2, 3, device="meta"), "input 'x': is on meta, and the engine on cpu"),
        (torch.ones(2, 3).to_sparse(), r"input 'x': is of layout sparse_coo, .*x\.to_dense\(\)"),
    ],
)
def test_an_input_that_the_engine_does_not_take_is_named_with_the_reason(
    gpu: fake_trt.Gpu, x: torch.Tensor, words: str
) -> None:
    made = module()
    with pytest.raises(RunError, match=words):
        made(x)
    assert torch.equal(made(X), 2 * X)  # and the module lives


def test_int64_becomes_int32_only_where_the_engine_has_no_int64(gpu: fake_trt.Gpu) -> None:
    narrow = {"inputs": {"x": ["INT32", [-1, 3]]}, "outputs": {"y": ["INT32", [-1, 3]]}}
    assert torch.equal(module(**narrow)(X.long()), (2 * X).int())
    with pytest.raises(RunError, match="is int32, and the engine takes int64"):
        wide = {"inputs": {"x": ["INT64", [-1, 3]]}, "outputs": {"y": ["INT64", [-1, 3]]}}
        module(**wide)(X.int())


def test_what_the_torch_module_has_as_int64_comes_back_as_int64(gpu: fake_trt.Gpu, tmp_path: Path) -> None:
    made = TRTModule(with_sidecar(tmp_path, inputs={"x": ["INT32", [-1, 3]]}, outputs={"y": ["INT32", [-1, 3]]}))
    y = made(X.long())
    assert y.dtype == torch.int64 and torch.equal(y, (2 * X).long())


def with_sidecar(folder: Path, version: str = fake_trt.__version__, branches: bool = False, **changes: Any) -> Path:
    """An engine file of a module that has int64 where the engine has int32, with what convert writes beside it."""
    import hashlib

    plan = fake_trt.plan(**changes)
    path = folder / "model.engine"
    path.write_bytes(plan)
    values = json.loads(plan)
    source = {"INT32": "int64", "FLOAT": "float32"}
    engine_type = {"INT32": "int32", "FLOAT": "float32"}

    def infos(tensors: Any) -> list[dict[str, str]]:
        return [{"name": k, "dtype": engine_type[v[0]], "source_dtype": source[v[0]]} for k, v in tensors.items()]

    sidecar = {
        "target": {"flavour": "tensorrt", "version": version},
        "compute_capabilities": ["9.0"],
        "inputs": infos(values["inputs"]),
        "outputs": infos(values["outputs"]),
        "plugins": [],
        "branches": branches,
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
    }
    path.with_name("model.engine.json").write_text(json.dumps(sidecar))
    return path


def test_an_if_is_not_captured_where_that_ends_the_process(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fake_trt, "__version__", "8.5.3")
    made = TRTModule(with_sidecar(tmp_path, "8.5.3", branches=True))
    with pytest.raises(RunError, match=r"there is an If in it, and TensorRT 8\.5\.3 ends the process"):
        made.capture(X)
    made.cuda_graphs = True
    assert all(torch.equal(made(x), 2 * x) for x in torch.rand(6, 2, 3)), "by themselves there are none, either"


def test_an_engine_file_that_is_cut_short_is_refused_before_tensorrt_sees_it(tmp_path: Path) -> None:
    path = with_sidecar(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"model\.engine: its checksum is not the one"):
        TRTModule(path)


def test_plan_bytes_that_are_cut_short_are_an_error_with_tensorrts_words(gpu: fake_trt.Gpu) -> None:
    made = TRTModule(fake_trt.plan()[:-5])
    with pytest.raises(RunError, match=r"(?s)does not load the engine.*Magic tag does not match"):
        made(X)


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [
        ("10.2.0", (9, 0), "it was built by version 10.2.0, and TensorRT 10.3.0 is installed. Convert the model again"),
        (fake_trt.__version__, (8, 6), "built for GPUs of compute capability 9.0, and the one here has 8.6"),
    ],
)
def test_an_engine_of_another_tensorrt_or_gpu_is_refused_with_what_to_do(
    gpu: fake_trt.Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, capability: Any, words: str
) -> None:
    from bridge.runtime import engine

    monkeypatch.setattr(engine, "capability", lambda device: capability)
    made = TRTModule(with_sidecar(tmp_path, version))
    with pytest.raises(RunError, match=words):
        made(X)


def test_the_profile_that_fits_is_chosen(gpu: fake_trt.Gpu) -> None:
    made = module(profiles=[{"x": [[1, 3], [2, 3], [2, 3]]}, {"x": [[4, 3], [6, 3], [8, 3]]}])
    for rows, profile in ((1, 0), (8, 1), (2, 0)):
        x = torch.rand(rows, 3)
        assert torch.equal(made(x), 2 * x)
        assert made.context.active_optimization_profile == profile
    with pytest.raises(RunError, match=r"\[3, 3\], and the engine takes \[1, 3\] to \[2, 3\] or \[4, 3\] to \[8, 3\]"):
        made(torch.rand(3, 3))


def test_outputs_whose_size_the_run_finds_out(gpu: fake_trt.Gpu) -> None:
    made = module(op="nonzero", outputs={"y": ["INT32", [-1]]})
    first, second = made(X), made(torch.zeros(2, 3))
    assert first.tolist() == [1, 2, 3, 4, 5]
    assert second.tolist() == []


def test_empty_inputs_have_an_address(gpu: fake_trt.Gpu) -> None:
    assert module(profiles=[{"x": [[0, 3], [4, 3], [8, 3]]}])(torch.empty(0, 3)).shape == (0, 3)


def test_a_run_that_tensorrt_refuses_is_an_error_and_the_next_one_works(gpu: fake_trt.Gpu) -> None:
    made = module()
    made(X)
    made.context.refuses = True
    with pytest.raises(RunError, match="TensorRT refuses to run"):
        made(X)
    made.context.refuses = False
    assert torch.equal(made(X), 2 * X)


def test_another_stream_waits_for_the_last_run(gpu: fake_trt.Gpu) -> None:
    made, side = module(), fake_trt.Stream(7)
    made(X)
    with gpu.use(side):
        assert torch.equal(made(X), 2 * X)
        made(X)
    assert side.waits == [0]


def test_each_thread_has_a_context(gpu: fake_trt.Gpu) -> None:
    made = module()
    made(X)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(made(X + 1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, 2 * (X + 1)) for y in results) and len(results) == 3
    assert made.engine is not None and made.engine.contexts == 4


def test_where_contexts_cannot_share_a_profile_threads_share_a_context(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trt, "__version__", "8.5.3")
    made = module()
    made(X)
    thread = threading.Thread(target=made, args=(X,))
    thread.start()
    thread.join()
    assert made.engine is not None and made.engine.contexts == 1


def test_a_size_that_the_run_finds_out_makes_threads_share_a_context_too(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trt, "__version__", "8.5.3")
    made = module(op="nonzero", inputs={"x": ["FLOAT", [2, 3]]}, outputs={"y": ["INT32", [-1]]}, profiles=[{}])
    found = [made(X).tolist()]
    thread = threading.Thread(target=lambda: found.append(made(X).tolist()))
    thread.start()
    thread.join()
    assert found == [[1, 2, 3, 4, 5]] * 2
    static = module(inputs={"x": ["FLOAT", [2, 3]]}, outputs={"y": ["FLOAT", [2, 3]]}, profiles=[{}])
    static(X)
    thread = threading.Thread(target=static, args=(X,))
    thread.start()
    thread.join()
    assert static.engine is not None and static.engine.contexts == 2


def test_after_a_refit_no_context_is_left_that_holds_the_profile(
    gpu: fake_trt.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_trt, "__version__", "8.5.3")
    monkeypatch.setattr("bridge.runtime.refit.refit", lambda engine, target, weights: None)
    made = module(refittable=True)
    made(X)
    made.refit({})
    assert torch.equal(made(X), 2 * X)
    assert made.context.active_optimization_profile == 0


def test_a_deep_copy_shares_the_engine_and_not_the_context(gpu: fake_trt.Gpu) -> None:
    made = module()
    made(X)
    other = copy.deepcopy(nn.Sequential(made, nn.ReLU()))
    assert torch.equal(other(X), 2 * X)
    assert other[0].engine is made.engine and other[0].context is not made.context


def test_a_deep_copy_of_an_engine_whose_weights_can_change_has_its_own(gpu: fake_trt.Gpu) -> None:
    made = module(refittable=True)
    made(X)
    other = copy.deepcopy(made)
    assert torch.equal(other(X), 2 * X)
    assert other.engine is not made.engine


def test_a_pickled_module_computes_the_same(gpu: fake_trt.Gpu) -> None:
    made = module(**TWO_INPUTS)
    made(X, torch.ones(1, 3))
    assert torch.equal(pickle.loads(pickle.dumps(made))(X, b=torch.ones(1, 3)), 2 * X + 1)


class Nested(nn.Module):
    """What users build around engines."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)["features"])


def test_nested_modules_are_saved_and_loaded_with_their_structure(gpu: fake_trt.Gpu) -> None:
    outputs = Flattener.from_value({"features": X})
    made = Nested(TRTModule(fake_trt.plan(), ["x"], ["y"], Flattener.from_value((X,)), outputs))
    expected = made(X)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = Nested(TRTModule())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), expected)
    assert (other.backbone.input_names, other.backbone.output_names) == (["x"], ["y"])


def test_a_damaged_state_dict_is_refused(gpu: fake_trt.Gpu) -> None:
    state = module().state_dict()
    state["engine"] = state["engine"][:-1]
    with pytest.raises(RuntimeError, match="its checksum is not the one"):
        TRTModule().load_state_dict(state)


def test_a_state_dict_without_an_engine_is_refused(gpu: fake_trt.Gpu) -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"engine"'):
        TRTModule().load_state_dict({})


def test_a_state_dict_of_torch2trts_is_taken(gpu: fake_trt.Gpu) -> None:
    state = {
        "engine": bytearray(fake_trt.plan(**TWO_INPUTS)),
        "input_names": ["x", "b"],
        "output_names": ["y"],
        "input_flattener": {"schema": (0, {"bias": 1}), "size": 2},
        "output_flattener": {"schema": [0], "size": 1},
    }
    made = TRTModule()
    made.load_state_dict(state)
    (y,) = made(X, {"bias": torch.ones(1, 3)})
    assert torch.equal(y, 2 * X + 1)


def test_names_put_inputs_in_the_modules_order(gpu: fake_trt.Gpu) -> None:
    made = TRTModule(fake_trt.plan(**TWO_INPUTS), input_names=["b", "x"])
    assert torch.equal(made(torch.ones(1, 3), X), 2 * X + 1)


def test_names_that_the_engine_has_not_are_refused(gpu: fake_trt.Gpu) -> None:
    with pytest.raises(RunError, match="the engine's outputs are not the module's: z is not of y"):
        TRTModule(fake_trt.plan(), output_names=["z"])(X)
    with pytest.raises(UsageError, match="the word 'y'; give lists of names"):
        TRTModule(fake_trt.plan(), output_names="y")


def test_an_engine_object_is_taken_too(gpu: fake_trt.Gpu) -> None:
    engine = fake_trt.Engine(json.loads(fake_trt.plan()))
    assert torch.equal(TRTModule(engine)(X), 2 * X)


def test_profiling_lists_the_layers(gpu: fake_trt.Gpu) -> None:
    made = module()
    made.enable_profiling()
    made(X)
    made(X)
    (layer,) = made.layers
    assert (layer.name, layer.calls, layer.milliseconds, layer.share) == ("affine", 2, 0.25, 1.0)
    assert "affine" in made.layer_table() and "100.0%" in made.layer_table()
    made.disable_profiling()
    with pytest.raises(RunError, match="profiling is off"):
        made.layers  # noqa: B018


def test_without_an_engine_a_call_says_so() -> None:
    with pytest.raises(RunError, match="holds no engine"):
        TRTModule()(X)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_there_is_no_gpu_the_module_exists_and_its_call_says_what_is_missing() -> None:
    made = TRTModule(fake_trt.plan())
    other = TRTModule()
    other.load_state_dict(made.state_dict())
    with pytest.raises(RunError, match="It was built, and not run"):
        copy.deepcopy(nn.Sequential(other))(X)
