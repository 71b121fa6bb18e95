"""Latency of engines as modules, beside TensorRT's own enqueue, torch2trt's way, eager torch and torch.compile.

    python -m benchmarks.latency build OUT [--jobs 6] [--only NAME …]
    python -m benchmarks.latency run OUT [--only NAME …]
    python -m benchmarks.latency prepare OUT      (fills Inductor's cache, times nothing)
    python -m benchmarks.latency compile OUT      (in any Python with torch and triton; needs no bridge)
    python -m benchmarks.latency table OUT

Each writes OUT/build.json, run.json or compile.json after each step, goes on where a case fails, and leaves out what
the file has done already. ``--seconds`` is the time after which it stops. While ``run`` and ``compile`` are timing,
nothing else should use the GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from .models import CASES, MODELS
from .timing import Call, GpuClock, interleaved, paired, read_json, words, write_json
from .workers import Pool, Row, Say, Work, onnx_runtime_threads

NEVER = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "run", "prepare", "compile", "table"))
    parser.add_argument("out", type=Path, help="the folder of engines and results")
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="these cases")
    parser.add_argument("--modes", nargs="*", help="of torch.compile")
    parser.add_argument("--jobs", type=int, help="at the same time (build, prepare, compile); 6, 9 and 9 by default")
    parser.add_argument("--seconds", type=float, default=NEVER, help="for the whole command")
    parser.add_argument("--each", type=float, default=420, help="seconds for one build, case or compilation")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--target", default="tensorrt")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    if options.command == "table":
        from .latency_table import table

        print(table(options.out))
    elif options.command in ("prepare", "compile"):
        from .compiled import compile_all

        compile_all(options, deadline)
    else:
        run_cases(options, deadline)


def run_cases(options: argparse.Namespace, deadline: float) -> None:
    """``build``: several at a time, the longest first; ``run``: one by one."""
    building = options.command == "build"
    path = options.out / f"{options.command}.json"
    report = read_json(path) or {"machine": None, "cases": {}}
    names = options.only or list(CASES)
    if building:  # ResNet-50 in fp16, where the choice of kernels matters most, when the GPU is less busy
        names = sorted(names, key=lambda name: (CASES[name].half and name.startswith("resnet"), "vit" not in name))
    names = [name for name in names if report["cases"].get(name, {}).get("status") != "ok"]

    def keep(name: str, row: Row) -> None:
        report["machine"] = row.pop("machine", report["machine"])
        report["cases"][name] = row
        write_json(path, report)
        print(
            f"{options.command} {name}: {row['status']} after {row['seconds']} s {row.get('error', '')[:500]}",
            flush=True,
        )

    pool = Pool(
        make_builder if building else make_timer,
        {"out": str(options.out), "rounds": options.rounds, "target": options.target},
        jobs=(options.jobs or 6) if building else 1,
        seconds=options.each,
        logs=options.out / "logs" / options.command,
        tasks_each=1 if building else None,
    )
    report["not_reached"] = pool.run(names, deadline, keep)
    write_json(path, report)
    if report["not_reached"]:
        print(f"{options.command}: not reached: {', '.join(report['not_reached'])}", flush=True)


def machine() -> dict[str, Any]:
    import torch

    from .ways import exact

    exact()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found = {"gpu": gpu, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if "tensorrt" in sys.modules:
        found["tensorrt"] = sys.modules["tensorrt"].__version__
    return found


# build


def make_builder(setting: dict[str, Any]) -> Work:
    onnx_runtime_threads(3)
    return functools.partial(build_one, Path(setting["out"]), setting["target"])


def build_one(out: Path, target: str, name: str, say: Say) -> Row:
    """Converts a case with static shapes; leaves ``module.pt``, a state dict, in its folder."""
    import torch

    from bridge import Tolerance, torch2trt

    case, folder = CASES[name], out / "engines" / name
    torch.set_num_threads(2)
    model = MODELS[case.model]
    typical = [model.inputs(case.batch, seed) for seed in range(1, 5)]
    loose = 1.0 if case.half else 1e-2  # how far it is off is measured by `run`, and no reason to have no engine
    say("convert")
    began = time.monotonic()
    try:
        module = torch2trt(
            model.module(),
            model.inputs(case.batch),
            precision=case.precision,
            calibration=typical if case.quantised else None,
            layers=False,
            name=name,
            target=target,
            tolerance=Tolerance(loose, loose),
            cache=out / "cache",
        )
        took = time.monotonic() - began
        say("save")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), folder / "module.pt")
        size = len(module.serialize())
    except Exception as error:  # noqa: BLE001 (whatever it is, the other cases go on, and it is in the report)
        return {"status": "failed", "error": words(error), "machine": machine()}
    result = module.conversion
    assert result is not None
    return {
        "status": "ok",
        "conversion": result.status,
        "convert_seconds": round(took, 2),
        "stages": result.seconds,
        "engine_bytes": size,
        "notes": result.notes,
        "precisions": result.precisions,
        "in_float32": {reason: len(nodes) for reason, nodes in result.kept.items()},
        "machine": machine(),
    }


# run


def make_timer(setting: dict[str, Any]) -> Work:
    import tensorrt  # noqa: F401 (before anything is timed)
    import torch

    torch.cuda.init()
    return functools.partial(time_one, Path(setting["out"]), setting["rounds"])


def time_one(out: Path, rounds: int, name: str, say: Say) -> Row:
    """Times every way of running a case's engine, in turns, on a stream of its own."""
    import torch

    folder = out / "engines" / name
    if not (folder / "module.pt").is_file():
        return {"status": "failed", "error": "there is no engine: it was not built"}
    machine()
    row: Row = {"status": "ok", "failed_ways": {}, "notes": []}
    try:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            session = Session(folder, name, row, say)
            say("time")
            blocks = interleaved(session.ways, GpuClock(), rounds=rounds)
            row["ways"], row["differences"] = blocks.rows(), differences(session.ways, blocks)
            row["failed_ways"] |= blocks.failed
            say("polygraphy")
            session.polygraphy(rounds)
        say("default stream")
        with torch.no_grad():
            few = {key: session.ways[key] for key in ("module", "module_graph", "allocating") if key in session.ways}
            row["on_the_default_stream"] = interleaved(few, GpuClock(), rounds=max(2, rounds // 3)).rows()
        del session
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # noqa: BLE001 (as above; what was measured until then is in the row)
        row |= {"status": "failed", "error": words(error)}
    if row["status"] == "failed" or row["failed_ways"]:
        row["replace_worker"] = True  # CUDA may be out of order in this process
    row["machine"] = machine()
    return row


BARS = (("module", "raw"), ("module_engine_types", "raw"), ("module_graph", "raw_graph"))
"""What the bars are about."""
CONTEXTS = ("raw_elsewhere", "raw")
"""How far two contexts of one engine are apart, with no code of the bridge in either."""
OTHERS = (("module_graph", "raw_graph_copied_out"), ("allocating", "raw"), ("module", "allocating"))


def differences(ways: dict[str, Call], blocks: Any) -> dict[str, Any]:
    """Of the calls in rows, round by round (``in_rows``). What the bars are about also of call and call in turns."""
    found: dict[str, Any] = {}
    for one, other in (*BARS, CONTEXTS, *OTHERS):
        if one not in blocks.host or other not in blocks.host:
            continue
        row = found[f"{one} - {other}"] = {"in_rows": blocks.difference(one, other)}
        if (one, other) in (*BARS, CONTEXTS):
            row.update(paired(ways[one], ways[other], GpuClock()))
    return found


class Session:
    """A case's engine and module on the GPU, and the ways of running them. A way that cannot be made is named in
    ``failed_ways`` of the row."""

    def __init__(self, folder: Path, name: str, row: Row, say: Say) -> None:
        import torch

        from . import ways
        from .ways import errors, on_device

        self.row, self.say, self.torch = row, say, torch
        self.case = CASES[name]
        model = MODELS[self.case.model]
        self.ways: dict[str, Call] = {}
        self.module = model.module()
        drawn = model.inputs(self.case.batch, seed=1)
        self.inputs = on_device(drawn, ways.DEVICE, half=False, channels_last=False)
        say("eager fp32")
        self.expected = self.module.to(ways.DEVICE)(*self.inputs)
        row["errors"] = {}

        say("module")
        self.plain = load(folder)
        self.plain.cuda_graphs = False
        row["errors"]["module"] = errors(self.expected, self.plain(*self.inputs))
        self.engine = self.plain.engine.trt_engine
        row["engine"] = {"layers": self.engine.num_layers, "memory": getattr(self.engine, "device_memory_size", None)}
        self.given = {f"input_{index}": tensor for index, tensor in enumerate(self.inputs)}
        self.feeds = ways.by_name(self.engine, self.given)
        self._try("raw", self._raw)
        self._try("raw_elsewhere", self._raw_elsewhere)
        self.ways["module"] = functools.partial(self.plain, *self.inputs)
        self._try("module_engine_types", self._module_engine_types)
        self._try("allocating", self._allocating)
        self._try("eager", lambda: self._eager(False))
        if model.convolutional:
            self._try("eager_channels_last", lambda: self._eager(True))
        # Captures come last: one that fails may leave torch's allocator in a state of its own.
        self._try("raw_graph", self._raw_graph)
        self._try("module_graph", lambda: self._module_graph(folder))

    def _try(self, way: str, make: Any) -> None:
        self.say(way)
        try:
            call = make()
            if call is not None:
                call()
                self.torch.cuda.current_stream().synchronize()
                self.ways[way] = call
        except Exception as error:  # noqa: BLE001 (the other ways are measured still, and this one is named)
            self.row["failed_ways"][way] = words(error, 600)

    def _raw(self) -> Call:
        """Of the module's own context, which was told by the module where to read and write (to the output that it
        returned last): contexts of one engine differ among each other in how long their launch takes."""
        from .ways import enqueued, waits

        call = enqueued(self.plain.context, self.torch.cuda.current_stream().cuda_stream)
        self.row["enqueue_waits"] = waits(call)
        return call

    def _raw_elsewhere(self) -> Call:
        from .ways import Raw, errors

        self.raw = Raw(self.engine, self.feeds)
        call = self.raw.call(self.torch.cuda.current_stream().cuda_stream)
        call()
        self.row["errors"]["raw"] = errors(self.expected, list(self.raw.outputs.values()))
        return call

    def _module_engine_types(self) -> Call | None:
        """Only where these differ from the module's: what the conversion costs."""
        given = [self.feeds[name] for name in self.given]
        if all(one.dtype == other.dtype for one, other in zip(given, self.inputs, strict=True)):
            return None
        return functools.partial(self.plain, *given)

    def _allocating(self) -> Call:
        from .ways import AllocatingCall, errors

        logic, given = AllocatingCall(self.engine), list(self.feeds.values())
        self.row["errors"]["allocating"] = errors(self.expected, logic(*given))
        return functools.partial(logic, *given)

    def _eager(self, channels_last: bool) -> Call:
        from .ways import DEVICE, errors, on_device, prepared

        module = prepared(self.module, self.case, DEVICE, channels_last)
        inputs = on_device(self.inputs, DEVICE, self.case.half, channels_last)
        way = "eager_channels_last" if channels_last else "eager"
        self.row["errors"][way] = errors(self.expected, module(*inputs))
        return functools.partial(module, *inputs)

    def _raw_graph(self) -> Call:
        from .ways import RawGraph, errors

        raw = self.raw_graph = RawGraph(self.engine, self.feeds)  # the graph needs its context's memory
        call = raw.replay(self.given)
        call()
        self.row["errors"]["raw_graph"] = errors(self.expected, list(raw.outputs.values()))
        outputs = list(raw.outputs.values())

        def copied_out() -> Any:
            call()
            return [output.clone() for output in outputs]

        self.ways["raw_graph_copied_out"] = copied_out
        return call

    def _module_graph(self, folder: Path) -> Call:
        from .ways import errors

        graphed = load(folder)
        graphed.capture(*self.inputs)
        call = functools.partial(graphed, *self.inputs)
        self.row["errors"]["module_graph"] = errors(self.expected, call())
        return call

    def polygraphy(self, rounds: int) -> None:
        """Its runner, by host time alone, beside the raw enqueue: it waits for its own stream in each call."""
        try:
            from polygraphy.backend.trt import TrtRunner

            with TrtRunner(self.engine) as runner:

                def infer() -> Any:
                    return runner.infer(self.feeds, check_inputs=False, copy_outputs_to_host=False)

                pair = {"raw": self.ways["raw"], "polygraphy": infer}
                blocks = interleaved(pair, GpuClock(), rounds=max(2, rounds // 2))
                self.row["polygraphy"] = {
                    "host_us": blocks.rows()["polygraphy"]["host_us"],
                    "minus_raw_host_us": (blocks.difference("polygraphy", "raw") or {}).get("host_us"),
                }
        except Exception as error:  # noqa: BLE001 (it is not what is measured here)
            self.row["notes"].append(f"Polygraphy's runner: {words(error, 400)}")


def load(folder: Path) -> Any:
    """The engine as a user loads it: from a state dict."""
    import torch

    from bridge import TRTModule

    module = TRTModule()
    module.load_state_dict(torch.load(folder / "module.pt", weights_only=True))
    return module


def quiet_worker_environment() -> None:
    """Few threads in each of several processes."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "2")


if __name__ == "__main__":
    quiet_worker_environment()
    main()
