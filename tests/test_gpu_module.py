"""A TRTModule on a GPU: what it returns, on which stream, in which thread, and what its faults say."""

from __future__ import annotations

import copy
import ctypes
import io
import json
import math
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge import BuildSettings, RunError, TRTModule
from bridge.runtime import narrowing
from bridge.runtime.context import Context
from bridge.target import gpu_compute_capabilities, installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_compute_capabilities(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA"),
    pytest.mark.skipif(installed("tensorrt") is None, reason="the Python package 'tensorrt' is not installed"),
]

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.relu(self.norm(self.conv(image)))
        return {"map": features, "logits": self.head(features.mean((2, 3)))}


class Tokens(nn.Module):
    """int64 in, int64 out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        logits = self.head(x)
        return logits, logits.argmax(-1)


class Selects(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(x > 0)


def converted(module: nn.Module, inputs: Any, folder: Path, **options: Any) -> TRTModule:
    result = bridge.convert(
        module.eval(), inputs, workdir=folder, target="tensorrt", cache=False, check=True, **options
    )
    return TRTModule.from_result(result)


def image(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.fixture(scope="module")
def net_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    converted(
        Net(),
        (torch.randn(2, 3, 16, 16),),
        folder,
        profiles={"image": ((1, 3, 16, 16), (2, 3, 16, 16), (8, 3, 16, 16))},
        builder=BuildSettings(refittable=True),
    )
    return folder


@pytest.fixture
def net(net_folder: Path) -> TRTModule:
    return TRTModule(net_folder / "model.engine")


@pytest.fixture
def reference() -> Iterator[nn.Module]:
    with torch.no_grad():
        yield Net().eval().cuda()


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_other_inputs_other_batches_and_strided_inputs(net: TRTModule, reference: nn.Module) -> None:
    for batch in (2, 1, 8, 8, 3):
        agree(net(image(batch, batch)), reference(image(batch, batch)))
    strided = image(4).permute(0, 1, 3, 2)
    agree(net(strided), reference(strided))
    agree(net(image=image(4)[::2]), reference(image(4)[::2]))


def test_on_a_side_stream_with_temporary_inputs(net: TRTModule, reference: nn.Module) -> None:
    """Memory of inputs that are gone is used again at once; the run must have read it before."""
    expected = [reference(image(4, seed)) for seed in range(20)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    found = []
    with torch.cuda.stream(stream):
        for seed in range(20):
            found.append(net(image(4, seed).to(memory_format=torch.channels_last)))
            torch.full((4, 3, 16, 16), float("nan"), device="cuda")
    stream.synchronize()
    agree(found, expected)


def test_streams_take_turns(net: TRTModule, reference: nn.Module) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [image(8, seed) for seed in range(30)]
    expected = [reference(x) for x in inputs]
    torch.cuda.synchronize()
    found = []
    for place, x in enumerate(inputs):
        with torch.cuda.stream(streams[place % 3]):
            found.append(net(x))
    torch.cuda.synchronize()
    agree(found, expected)


@pytest.mark.parametrize("graphs", [False, True])
def test_threads_at_the_same_time(net: TRTModule, reference: nn.Module, graphs: bool) -> None:
    net.cuda_graphs = graphs
    inputs = [[image(1 + thread, 10 * thread + call) for call in range(10)] for thread in range(4)]
    expected = [[reference(x) for x in row] for row in inputs]
    found: list[Any] = [None] * 4
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                found[thread] = [net(x) for x in inputs[thread]]
                torch.cuda.current_stream().synchronize()
        except RunError as error:
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    agree(found, expected)


def test_graphs_by_themselves_and_another_shape_between(net: TRTModule, reference: nn.Module) -> None:
    net.cuda_graphs = True
    kept = []
    for batch in (2, 2, 2, 2, 2, 2, 5, 2, 5, 5, 5, 5, 5, 5, 2):
        seed = len(kept)
        kept.append((net(image(batch, seed)), reference(image(batch, seed))))
    for found, expected in kept:  # what was returned is not overwritten by later calls
        agree(found, expected)
    assert net._local.session.graphs, net._local.session.refused


def test_captured_for_shapes(net: TRTModule, reference: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = 0
    run = Context.run

    def counted(self: Context, inputs: Any) -> Any:
        nonlocal plain
        plain += 1
        return run(self, inputs)

    monkeypatch.setattr(Context, "run", counted)
    net.capture((4, 3, 16, 16))
    agree(net(image(4, 1)), reference(image(4, 1)))
    with torch.inference_mode():
        agree(net(image(4, 2)), reference(image(4, 2)))
    agree(net(image(4, 3).requires_grad_()), reference(image(4, 3)))
    agree(net(image(4, 4)), reference(image(4, 4)))
    assert plain == 0
    with torch.cuda.stream(torch.cuda.Stream()):
        agree(net(image(4, 4)), reference(image(4, 4)))
    agree(net(image(3)), reference(image(3)))
    assert plain == 1


def test_in_a_graph_of_the_users(net: TRTModule, reference: nn.Module) -> None:
    whole = nn.Sequential(net)
    x = image(2)
    whole(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = whole(x)
    x.copy_(image(2, 7))
    graph.replay()
    agree(y, reference(image(2, 7)))


def test_copies_moves_and_files(net: TRTModule, reference: nn.Module, tmp_path: Path) -> None:
    x = image(3)
    expected = reference(x)
    agree(net(x), expected)
    agree(copy.deepcopy(nn.Sequential(net)).to("cuda")(x), expected)
    agree(net.cpu().cuda()(x), expected)
    agree(net.half()(x), expected)
    file = io.BytesIO()
    torch.save(nn.Sequential(net).state_dict(), file)
    file.seek(0)
    other = nn.Sequential(TRTModule())
    other.load_state_dict(torch.load(file, weights_only=True))
    agree(other(x), expected)


def test_pickled_into_another_process(net: TRTModule, reference: nn.Module, tmp_path: Path) -> None:
    x = image(2)
    net(x)
    torch.save(net, tmp_path / "module.pt")
    torch.save(x.cpu(), tmp_path / "x.pt")
    program = """
        import sys, torch
        module, x = (torch.load(sys.argv[1] + name, weights_only=False) for name in ("/module.pt", "/x.pt"))
        y = module(x.cuda())
        torch.save({key: value.cpu() for key, value in y.items()}, sys.argv[1] + "/y.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True)
    agree(torch.load(tmp_path / "y.pt"), {key: value.cpu() for key, value in reference(x).items()})


def test_refit_with_other_weights(net: TRTModule, net_folder: Path, tmp_path: Path) -> None:
    other = Net().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    net(image())
    profiles = {"image": ((1, 3, 16, 16), (2, 3, 16, 16), (8, 3, 16, 16))}
    example = (torch.randn(2, 3, 16, 16),)
    model = bridge.convert(
        other, example, workdir=tmp_path, target="tensorrt", profiles=profiles, build=False, check=True
    ).onnx
    assert model is not None
    net.refit(model)
    with torch.no_grad():
        agree(net(image(3)), other.cuda()(image(3)))
    with pytest.raises(RunError, match="the engine has no weights called 'nothing'"):
        net.refit({"nothing": np.zeros(1, np.float32)})


def test_profiling(net: TRTModule) -> None:
    net.enable_profiling()
    for _ in range(3):
        net(image())
    layers = net.layers
    assert layers and all(layer.calls == 3 for layer in layers)
    assert sum(layer.milliseconds for layer in layers) > 0  # a reshape takes no time
    assert sum(layer.share for layer in layers) == pytest.approx(1)


def test_integers_keywords_and_an_omitted_argument(tmp_path: Path) -> None:
    module = Tokens().eval()
    ids, mask = torch.randint(0, 50, (2, 7)), torch.rand(2, 7)
    made = converted(module, {"ids": ids, "mask": mask}, tmp_path)
    ids, mask = torch.randint(0, 50, (2, 7), device="cuda"), torch.rand(2, 7, device="cuda")
    with torch.no_grad():
        expected = module.cuda()(ids, mask)
    for found in (made(ids, mask), made(mask=mask, ids=ids), made.capture(ids, mask)(ids, mask)):
        agree(found, expected)
        assert found[1].dtype == torch.int64
    with pytest.raises(RunError, match="missing a required argument: 'mask'"):
        made(ids)


class Wide(nn.Module):
    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ids.float() * 2 + scale.float()


def test_64_bits_are_converted_anew_in_each_call(tmp_path: Path) -> None:
    def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(-(2**20), 2**20, (3, 333), generator=random)
        return ids, torch.randn(3, 333, dtype=torch.float64, generator=random) * 1e3

    made = converted(Wide(), drawn(0), tmp_path)
    for call in (made, TRTModule.from_result(made.conversion).capture(*(tensor.cuda() for tensor in drawn(0)))):
        for seed in range(20):
            ids, scale = (tensor.cuda() for tensor in drawn(seed))
            agree(call(ids, scale), ids.float() * 2 + scale.float())
            strided = torch.stack((scale, scale), 2)[..., 1]
            agree(call(ids, strided), ids.float() * 2 + scale.float())


def test_the_kernel_narrows_as_torch_does() -> None:
    integers = torch.tensor([0, -1, 2**31, -(2**40) + 5, 7] * 100, device="cuda")
    floats = torch.tensor([1 + 2**-30, -0.0, 1e300, 1e-40, 1e-300, math.nan, -1e5] * 50, dtype=torch.float64).cuda()
    into = torch.zeros(500, dtype=torch.int32, device="cuda"), torch.zeros(351, device="cuda")
    loaded = narrowing.kernel(torch.cuda.current_device())
    assert loaded is not None
    described = (ctypes.c_uint64 * 8)(
        *(into[0].data_ptr(), integers.data_ptr(), 500, 0), *(into[1].data_ptr(), floats.data_ptr(), 350, 1)
    )
    number, address = ctypes.c_uint, ctypes.c_void_p
    launch = ctypes.CFUNCTYPE(ctypes.c_int, address, *[number] * 7, address, ctypes.POINTER(address), address)(
        loaded[0]
    )
    arguments = (address * 1)(ctypes.addressof(described))
    stream = torch.cuda.current_stream().cuda_stream
    assert launch(loaded[1], 2, 2, 1, narrowing.THREADS, 1, 1, 0, stream, arguments, None) == 0
    assert torch.equal(into[0], integers.int())
    torch.testing.assert_close(into[1][:350], floats.float(), rtol=0, atol=0, equal_nan=True)
    assert into[1][350] == 0, "nothing is written beyond the end"


def test_a_size_that_the_run_finds_out(tmp_path: Path) -> None:
    made = converted(Selects(), (torch.tensor([[0.0, 1, 2, 0], [0, 0, 0, 5]]),), tmp_path)
    for _ in range(5):
        x = torch.randn(2, 4, device="cuda")
        assert torch.equal(made(x), torch.nonzero(x > 0))
    assert made(-torch.ones(2, 4, device="cuda")).shape == (0, 2)
    with pytest.raises(RunError, match="no CUDA graph can be made of this engine"):
        made.capture((2, 4))
    made.cuda_graphs = True
    for _ in range(6):
        x = torch.randn(2, 4, device="cuda")
        assert torch.equal(made(x), torch.nonzero(x > 0))


def test_two_profiles(tmp_path: Path) -> None:
    shapes = [{"image": ((n, 3, 16, 16), (m, 3, 16, 16), (m, 3, 16, 16))} for n, m in ((1, 2), (4, 8))]
    made = converted(Net(), (torch.randn(2, 3, 16, 16),), tmp_path, profiles=shapes)
    reference = Net().eval().cuda()
    with torch.no_grad():
        for batch in (1, 8, 2, 4, 4):
            agree(made(image(batch)), reference(image(batch)))
    with pytest.raises(RunError, match=r"the engine takes \[1, 3, 16, 16\] to \[2, 3, 16, 16\] or \[4, 3"):
        made(image(3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: image().half(), "is float16, and the engine takes float32"),
        (lambda: image().cpu(), "is on the CPU, and the engine on cuda:0"),
        (lambda: image()[0], "has 3 axes"),
        (lambda: image(9), r"has the shape \[9, 3, 16, 16\]"),
    ],
)
def test_wrong_inputs_are_named_and_the_process_lives(
    net: TRTModule, reference: nn.Module, make: Any, words: str
) -> None:
    with pytest.raises(RunError, match=words):
        net(make())
    agree(net(image()), reference(image()))


def test_a_plan_that_is_cut_short(net_folder: Path) -> None:
    plan = (net_folder / "model.engine").read_bytes()
    for size in (0, 10, 1000, len(plan) // 2, len(plan) - 1):
        with pytest.raises(RunError, match="does not load the engine"):
            TRTModule(plan[:size])(image())
    damaged = bytearray(plan)
    damaged[len(plan) // 2] ^= 0xFF
    state = TRTModule(plan).state_dict()
    state["engine"] = torch.frombuffer(damaged, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="its checksum is not the one"):
        TRTModule().load_state_dict(state)


def test_a_plan_of_another_tensorrt_or_gpu(net_folder: Path, tmp_path: Path) -> None:
    plan, sidecar = (net_folder / "model.engine"), (net_folder / "model.engine.json")
    (tmp_path / plan.name).write_bytes(plan.read_bytes())
    values = json.loads(sidecar.read_text())
    assert values["compute_capabilities"] == [".".join(map(str, gpu_compute_capabilities()[0]))]
    for changed in (
        {"target": {**values["target"], "version": "8.4.1.5"}},
        {"compute_capabilities": ["7.2"]},
    ):
        (tmp_path / sidecar.name).write_text(json.dumps({**values, **changed}))
        with pytest.raises(RunError, match="the engine cannot run here: it was built"):
            TRTModule(tmp_path / plan.name)(image())


def test_too_little_memory_for_a_build_is_one_error(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (100 << 20), dtype=torch.uint8, device="cuda")
    try:
        result = bridge.convert(
            Net().eval(), (torch.randn(2, 3, 16, 16),), workdir=tmp_path, target="tensorrt", cache=False
        )
        assert (result.status, result.stage) == ("failed", "build"), result.error
        assert "memory" in str(result.error), result.error
    finally:
        del hog
        torch.cuda.empty_cache()
    result = bridge.convert(
        Net().eval(), (torch.randn(2, 3, 16, 16),), workdir=tmp_path, target="tensorrt", cache=False
    )
    assert result.status == "verified", result.error
