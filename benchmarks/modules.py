"""Every torch model of a collection as a TRTModule, called in the ways that users call modules.

    python -m benchmarks.modules MODELS.py --json OUT.json [--jobs 15] [--seconds 300] [--only NAME …] [--skip FILE …]

MODELS.py is of the form that ``benchmarks.torch_models`` takes. Each model is converted, with its dynamic axes where it
has some, and called with its example, with other values, with other sizes within the profile, with inputs that are not
contiguous, on a side stream, from two threads at once, and as a CUDA graph. Each result is compared with the torch
module's on the same inputs, on the GPU without TF32, and on the CPU; where the module cannot run on the GPU (it holds
tensors of the CPU), on the CPU alone. It agrees where it agrees with one of the two; where these two differ, that is
said: then torch leaves open what is right.

The workers keep torch and TensorRT loaded, and each crash costs the model that it was at. --skip takes what --json
wrote before, so that a run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .timing import read_json, words, write_json
from .workers import Pool, Row, Say, Work, onnx_runtime_threads

SECONDS = 120
"""That a model may take, conversion included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="write the rows here, after each model")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--skip", type=Path, nargs="*", default=[], help="rows of earlier runs")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--seconds", type=float, default=1e9, help="for all of it")
    parser.add_argument("--each", type=float, default=SECONDS, help="seconds for one model")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument(
        "--device", default="cuda", help="cpu: the module itself in the place of the engine, as a check"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended

    from .torch_models import load

    rows: dict[str, Row] = {}
    names = options.only or list(load(options.models))
    for path in options.skip:
        done = (read_json(path) or {"rows": {}})["rows"]
        names = [name for name in names if name not in done]
    setting = {"models": str(options.models.absolute()), "target": options.target, "device": options.device}
    report = {"device": options.device, "tolerance": "rtol 1e-3, atol 1e-3; float16 1e-2, bfloat16 5e-2", "rows": rows}

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        write_json(options.json, report)
        print(f"{len(rows)}/{len(names)} {one_line(name, row)}", flush=True)

    with tempfile.TemporaryDirectory() as logs:
        pool = Pool(make_checker, setting, options.jobs, options.each, Path(logs))
        left = pool.run(names, deadline, keep)
    report["not_reached"] = left
    write_json(options.json, report)
    print(summary(rows, left))
    sys.exit(0 if all(row["status"] in ("ok", "not converted") for row in rows.values()) else 1)


def one_line(name: str, row: Row) -> str:
    wrong = [key for key, check in row.get("checks", {}).items() if check["status"] not in ("ok", "left out")]
    what = ", ".join(wrong) if wrong else " ".join(row.get("error", "").split())[:160]
    return f"{row['status']:13} {name:28} {row['seconds']:6.1f} s  {what}"


def summary(rows: dict[str, Row], left: list[str]) -> str:
    counts = Counter(row["status"] for row in rows.values())
    checks: dict[str, Counter[str]] = {}
    for row in rows.values():
        for key, check in row.get("checks", {}).items():
            checks.setdefault(key, Counter())[check["status"]] += 1
    lines = [", ".join(f"{count} {status}" for status, count in counts.most_common()) + f" of {len(rows)}"]
    lines += [f"  {key}: " + ", ".join(f"{n} {status}" for status, n in found.items()) for key, found in checks.items()]
    lines += [
        f"not ok: {one_line(name, row)}"
        for name, row in sorted(rows.items())
        if row["status"] not in ("ok", "not converted")
    ]
    lines += [f"not reached: {len(left)}: {' '.join(left)}"] if left else []
    return "\n".join(lines)


# in a worker


def make_checker(setting: dict[str, Any]) -> Work:
    import torch

    from .torch_models import load

    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):  # threads are there already
        torch.set_num_interop_threads(1)
    models = load(Path(setting["models"]))
    if setting["device"] == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.cuda.init()
        onnx_runtime_threads(1)
        import bridge.as_torch2trt  # noqa: F401 (once, before the first model)
    return functools.partial(check_model, models, setting)


def check_model(models: dict[str, Any], setting: dict[str, Any], name: str, say: Say) -> Row:
    """Converts a model and makes every check of it; nothing of it is left on the GPU."""
    import torch

    gpu = setting["device"] == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    row: Row = {"status": "ok", "notes": [], "checks": {}, "stages": {}}
    try:
        with torch.no_grad():
            _check(models[name], name, setting, row, say)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other models go on, and it is in the report)
        row |= {"status": "failed", "error": words(error), "step": row.get("step", "")}
    bad = [check["status"] for check in row["checks"].values() if check["status"] not in ("ok", "left out")]
    if row["status"] == "ok" and bad:
        row["status"] = "wrong" if "wrong" in bad else "raised"
    if "raised" in bad or (row["checks"].get("graph", {}).get("status") == "left out" and gpu):
        row["replace_worker"] = True  # a capture that fails may leave torch's allocator in a state of its own
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # the exporter's and torch's own caches hold the module
    gc.collect()
    if gpu:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            row["left_on_gpu"] = torch.cuda.memory_allocated() - before
        except RuntimeError as error:  # an error of CUDA's stays for the rest of the process
            row["notes"].append(f"CUDA is out of order after this model: {words(error, 200)}")
            row["replace_worker"] = True
    return row


def _check(case: Any, name: str, setting: dict[str, Any], row: Row, say: Say) -> None:
    import torch

    constructor, inputs, axes = case[:3]
    torch.manual_seed(0)
    module = constructor().eval()
    began = time.monotonic()
    say("convert")
    engine, dynamic = convert(module, inputs, axes, name, setting, row)
    row["stages"]["convert"] = round(time.monotonic() - began, 2)
    if engine is None:
        return
    checks = Checks(module, engine, inputs, setting["device"], row, say)
    checks.all(axes if dynamic else None)


def convert(module: Any, inputs: Any, axes: Any, name: str, setting: dict[str, Any], row: Row) -> tuple[Any, bool]:
    """The TRTModule, dynamic where the model has such axes and converts so; (None, False) where it does not convert."""
    if setting["device"] == "cpu":
        return module, bool(axes)
    from bridge import BridgeError, torch2trt

    profiles = dynamic_profile(inputs, axes) if axes else None
    for given in [profiles, None] if profiles else [None]:
        try:
            made = torch2trt(module, inputs, target=setting["target"], name=name, profiles=given, cache=False)
        except BridgeError as error:
            if given is not None:
                row["notes"].append(f"not converted with dynamic axes: {words(error, 400)}")
                continue
            row |= {"status": "not converted", "error": words(error), "step": str(getattr(error, "stage", ""))}
            return None, False
        row["stages"] |= {f"convert {key}": value for key, value in made.conversion.seconds.items()}
        row["conversion"] = made.conversion.status
        return made, given is not None
    raise AssertionError("one of them returned")


def dynamic_profile(inputs: Any, axes: Any) -> dict[str, Any]:
    """The first input's dynamic axes from 1 to twice the example and 1, as in ``benchmarks.torch_models``."""
    shape = list(inputs[0].shape)
    low = [1 if axis in axes else size for axis, size in enumerate(shape)]
    high = [2 * size + 1 if axis in axes else size for axis, size in enumerate(shape)]
    return {"input_0": (low, shape, high)}


class Checks:
    """The checks of one model; each has a line in the row, and none keeps another from being made."""

    def __init__(self, module: Any, engine: Any, inputs: Any, device: str, row: Row, say: Say) -> None:
        import torch

        from .changes import copied, disagreements, leaves

        self.torch, self.module, self.engine, self.device, self.row, self.say = torch, module, engine, device, row, say
        self.inputs = copied(tuple(inputs))
        self.on_gpu: Any = self._module_on_gpu()
        once = leaves(module(*copied(self.inputs)))
        again = leaves(module(*copied(self.inputs)))
        self.random = bool(disagreements(once, again, 0.0))
        if self.random:
            row["notes"].append("torch gives other outputs when it is run again: only shapes are compared")
        self._notes(once)

    def all(self, axes: Any) -> None:
        from .changes import changed, copied, leaves, on, resized

        torch, module = self.torch, self.module

        def run(inputs: Any) -> Any:
            return leaves(module(*inputs))

        self._check("example", lambda: self._compare([self.inputs], self._plain))
        self.say("other inputs")
        began = time.monotonic()
        other, kept = changed(run, self.inputs, 1)
        third, _ = changed(run, self.inputs, 2)
        self.row["stages"]["other inputs"] = round(time.monotonic() - began, 2)
        if kept:
            self.row["notes"].append(f"inputs that keep the example's values, the module takes no others: {kept}")
        self._check("changed", lambda: self._compare([other], self._plain))
        if axes:
            first = self.inputs[0]
            for label, pick in (("smallest", lambda size: 1), ("larger", lambda size: size + 1), ("largest", _twice)):
                sizes = {axis: pick(first.shape[axis]) for axis in axes}
                sized = (resized(other[0], sizes), *copied(other[1:]))
                self._check(f"dynamic {label}", functools.partial(self._compare, [sized], self._plain))
        self._check("non-contiguous", lambda: self._compare([other], self._spread))
        self._check("side stream", lambda: self._compare([third], self._side_stream))
        self._check("threads", lambda: self._compare([other, third], self._threads))
        self._check("graph", lambda: self._compare([other, third], self._graph))
        if self.device == "cuda":
            torch.cuda.synchronize()
            untouched = on(self.inputs, "cuda")
            twin = copied(untouched)
            self.engine(*untouched)
            pairs = zip(leaves(untouched), leaves(twin), strict=True)
            if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs):
                self.row["notes"].append("the engine's call changes its inputs")

    def _check(self, name: str, make: Callable[[], Row]) -> None:
        self.say(name)
        self.row["step"] = name
        began = time.monotonic()
        try:
            found = make()
        except LeftOut as why:
            found = {"status": "left out", "error": str(why)}
        except Exception as error:  # noqa: BLE001 (it is this check's result)
            found = {"status": "raised", "error": words(error, 600)}
        self.row["checks"][name] = found
        self.row["stages"][name] = round(time.monotonic() - began, 3)

    # torch

    def _module_on_gpu(self) -> Any:
        """A copy there; None where the module cannot run there, which a note says."""
        import copy

        from .changes import copied, on

        if self.device != "cuda":
            return None
        try:
            moved = copy.deepcopy(self.module).cuda()
            moved(*on(copied(self.inputs), "cuda"))
            self.torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self.row["notes"].append(f"torch on the CPU alone: {words(error, 150)}")
            return None
        return moved

    def _expected(self, inputs: Any) -> list[list[Any]]:
        """What torch has for these inputs: on the GPU, if it can, and on the CPU."""
        from .changes import copied, disagreements, leaves, on

        try:
            found = [leaves(self.module(*copied(inputs)))]
            if self.on_gpu is not None:
                found.insert(0, leaves(self.on_gpu(*on(copied(inputs), "cuda"))))
        except Exception as error:
            raise LeftOut(f"torch itself raises: {words(error, 300)}") from error
        if self.on_gpu is not None:
            apart = disagreements(found[1], found[0])
            if apart and "torch on the GPU and on the CPU differ" not in " ".join(self.row["notes"]):
                self.row["notes"].append(f"torch on the GPU and on the CPU differ: {apart[0]}")
        return found

    def _notes(self, outputs: list[Any]) -> None:
        """Says where torch's outputs are views of its inputs, or it writes into them."""
        from .changes import copied, leaves

        torch = self.torch
        given = copied(self.inputs)
        before = copied(given)
        found = self.module(*given)
        places = {item.untyped_storage().data_ptr() for item in leaves(given) if isinstance(item, torch.Tensor)}
        if any(isinstance(o, torch.Tensor) and o.untyped_storage().data_ptr() in places for o in leaves(found)):
            self.row["notes"].append("torch's output is a view of its input; the engine's has memory of its own")
        pairs = zip(leaves(given), leaves(before), strict=True)
        if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs):
            self.row["notes"].append("torch writes into its input")

    # the engine

    def _compare(self, sets: list[Any], call: Callable[[list[Any]], list[Any]]) -> Row:
        """``call`` gives the module's outputs for each of the sets of inputs, which are compared with torch's."""
        from .changes import disagreements, leaves

        expected = [self._expected(inputs) for inputs in sets]
        results = call(sets)
        worst: Row = {"status": "ok"}
        for candidates, result in zip(expected, results, strict=True):
            found = leaves(result)
            self._note_types(candidates[-1], found)
            if self.random:
                problems = [
                    text for text in disagreements(candidates[0], found) if "shape" in text or "torch has" in text
                ]
            else:
                attempts = [disagreements(one, found) for one in candidates]
                problems = [] if [] in attempts else attempts[0]
                if attempts[0] and not problems:
                    worst["agrees_with"] = "torch on the CPU, not with torch on the GPU"
            if problems:
                worst |= {"status": "wrong", "error": "; ".join(problems)[:600]}
        return worst

    def _note_types(self, expected: list[Any], found: list[Any]) -> None:
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            a, b = getattr(one, "dtype", None), getattr(other, "dtype", None)
            note = f"output {index} is {b}, and torch's is {a}"
            if a != b and note not in self.row["notes"]:
                self.row["notes"].append(note)

    def _plain(self, sets: list[Any]) -> list[Any]:
        from .changes import on

        return [self.engine(*on(inputs, self.device)) for inputs in sets]

    def _spread(self, sets: list[Any]) -> list[Any]:
        from .changes import on, spread

        return [self.engine(*spread(on(inputs, self.device))) for inputs in sets]

    def _side_stream(self, sets: list[Any]) -> list[Any]:
        """The inputs are written by the stream itself, late, and given back to torch's allocator right after the call:
        a run that does not keep to the stream reads something else."""
        from .changes import copied, leaves, on

        torch = self.torch
        if self.device != "cuda":
            raise LeftOut("there is no GPU")
        sources = [on(inputs, "cuda") for inputs in sets]
        torch.cuda.synchronize()
        stream, results = torch.cuda.Stream(), []
        with torch.cuda.stream(stream):
            for source in sources:
                torch.cuda._sleep(2_000_000)  # about a millisecond
                given = copied(source)
                results.append(self.engine(*given))
                sizes = [(item.shape, item.dtype, item.device) for item in leaves(given) if hasattr(item, "device")]
                del given
                for shape, dtype, device in sizes:  # takes the memory that the inputs had, and writes into it
                    torch.full(shape, 1, dtype=dtype, device=device)
        stream.synchronize()
        return results

    def _threads(self, sets: list[Any]) -> list[Any]:
        """One thread for each set of inputs, all at once, each on a stream of its own, each calling three times."""
        results: list[Any] = [None] * len(sets)
        problems: list[BaseException] = []
        start = threading.Barrier(len(sets))

        def work(index: int) -> None:
            try:
                with self._stream(), self.torch.no_grad():
                    given = self._there(sets[index])
                    start.wait(30)
                    for _ in range(3):
                        results[index] = self.engine(*given)
                    self._wait()
            except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that asks)
                problems.append(error)
                start.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in problems:
            if not isinstance(error, threading.BrokenBarrierError) or len(problems) == 1:
                raise error
        return results

    def _graph(self, sets: list[Any]) -> list[Any]:
        """Captured for the example, then called with both sets."""
        from .changes import on

        if self.device != "cuda":
            raise LeftOut("there is no GPU")
        from bridge.errors import RunError

        try:
            self.engine.capture(*on(self.inputs, "cuda"))
        except RunError as error:
            raise LeftOut(f"no graph: {words(error, 300)}") from error
        return [self.engine(*on(inputs, "cuda")) for inputs in sets]

    def _there(self, inputs: Any) -> Any:
        from .changes import on

        return on(inputs, self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.current_stream().synchronize()

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        if self.device != "cuda":
            yield
            return
        with self.torch.cuda.stream(self.torch.cuda.Stream()):
            yield


class LeftOut(Exception):
    """This check cannot be made of this model, and that is no failure."""


def _twice(size: int) -> int:
    return 2 * size + 1


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    main()
