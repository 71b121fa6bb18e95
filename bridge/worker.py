"""One model, converted in a process of its own, so that a native library which crashes costs one model.

Both ends of the pipe live here. The parent writes one line of JSON, ``{"spec": …, "folder": …}``, to the child's stdin
and holds it open; its closing tells the child that the parent is gone. The child answers on a pipe of its own with
lines of JSON: ``{"event": "stage", "stage": …}``, and at last ``{"event": "done"}`` once ``result.json`` is written, or
``{"event": "failed", "stage": …, "error": …, "usage": …}``. Whatever it or a library prints goes to ``convert.log``.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import BridgeError, UsageError

if TYPE_CHECKING:
    from .spec import ModelSpec

LOG = "convert.log"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_ROOT = str(Path(__file__).resolve().parents[1])
COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {_ROOT!r}); from bridge.worker import main; main()",
)
"""Starts a child; the number of its event pipe is added. A test may give another that stands in for the pipeline."""


class Worker:
    """The parent's end of one child. Raises OSError where no process can be started."""

    def __init__(self, spec: ModelSpec, folder: Path, command: Sequence[str] = COMMAND) -> None:
        self.stage = "export"
        self.last: dict[str, Any] | None = None
        """The ``done`` or ``failed`` event, once there is one."""
        self.stages: dict[str, float] = {}
        """Seconds in each stage."""
        self._unread = b""
        self._open = True
        self.started = self._stage_started = time.monotonic()
        self.events, write = os.pipe()
        try:
            with (folder / LOG).open("wb") as log:
                self.process = subprocess.Popen(
                    [*command, str(write)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write,),
                    start_new_session=True,  # the terminal's Ctrl-C is the parent's to deal with
                )
        except OSError:
            os.close(self.events)
            raise
        finally:
            os.close(write)
        os.set_blocking(self.events, False)
        job = {"spec": spec.model_dump(mode="json", exclude_unset=True), "folder": str(folder)}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which its exit status will tell
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def read_events(self) -> Iterator[str]:
        """Takes in what the child has said; yields the name of each stage that it entered."""
        with contextlib.suppress(BlockingIOError):
            while self._open:
                data = os.read(self.events, 65536)
                self._open = bool(data)
                self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "stage":
                if event["stage"] != self.stage:
                    self._leave_stage(event["stage"])
                    yield event["stage"]
            else:
                self.last = event

    def _leave_stage(self, following: str) -> None:
        now = time.monotonic()
        self.stages[self.stage] = self.stages.get(self.stage, 0.0) + now - self._stage_started
        self.stage, self._stage_started = following, now

    @property
    def ended(self) -> bool:
        """Whether the child is dead, or has closed its pipe (a process that it forked may hold that open)."""
        return not self._open or self.process.poll() is not None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def wait(self, grace: float = 5.0) -> int:
        """The exit status (below 0: the signal that killed it); sweeps up what the child left running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        self._signal(signal.SIGKILL)
        status = self.process.wait()
        for _ in self.read_events():
            pass
        self._leave_stage(self.stage)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self.events)
        return status

    def stop(self) -> None:
        """Ends the child and its process group."""
        self._signal(signal.SIGTERM)
        self.wait(grace=1.0)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def main() -> None:
    """The child's end."""
    faulthandler.enable()
    events = int(sys.argv[-1])
    os.set_inheritable(events, False)
    parent = os.fdopen(os.dup(0), "rb", buffering=0)
    with open(os.devnull) as nothing:  # noqa: PTH123 - a device, not a path
        os.dup2(nothing.fileno(), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that a crash loses none of it

    job = json.loads(parent.readline())
    threading.Thread(target=_die_with_parent, args=(parent,), daemon=True).start()
    sys.path.insert(0, str(Path.cwd()))

    stage = "export"

    def send(**event: Any) -> None:
        nonlocal stage
        stage = event.get("stage") or stage
        os.write(events, json.dumps(event).encode() + b"\n")

    try:
        _convert(job["spec"], Path(job["folder"]), lambda name: send(event="stage", stage=name))
        send(event="done")
    except BridgeError as error:
        _log_traceback()
        send(event="failed", stage=error.stage, error=str(error), usage=isinstance(error, UsageError))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it costs this model alone, and is told
        _log_traceback()
        send(event="failed", stage=stage, error=describe(error, job["folder"]), usage=False)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(0)  # the result is written: a library that crashes while it is unloaded must not spoil it


def _log_traceback() -> None:
    with contextlib.suppress(OSError):  # the log may be on the full disk that is to be told of
        traceback.print_exc()


def _die_with_parent(parent: IO[bytes]) -> None:
    parent.read(1)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


SEEN_TO_HERE = {"source", "inputs", "tolerance", "task_check", "timeout", "plugins", "calibration"}
"""What of a ModelSpec is no plain argument of ``bridge.convert``."""


def _convert(values: dict[str, Any], folder: Path, on_stage: Callable[[str], None]) -> None:
    from . import convert
    from .spec import ModelSpec

    spec = ModelSpec.model_validate(values)
    source, inputs = load_model(spec)
    convert(source, inputs, workdir=folder, on_stage=on_stage, **convert_options(spec))


def convert_options(spec: ModelSpec) -> dict[str, Any]:
    """What ``bridge.convert`` takes of a model's options; calls the functions that they name."""
    options = {key: value for key, value in spec.model_dump(exclude=SEEN_TO_HERE).items() if value is not None}
    if spec.task_check is not None:
        options["task_check"] = find_function(spec.task_check)
    if spec.calibration is not None:
        options["calibration"] = call(spec.calibration)
    if spec.tolerance is not None:
        from .result import Tolerance

        one_each = spec.tolerance if isinstance(spec.tolerance, dict) else {"": spec.tolerance}
        tolerances = {name: Tolerance(one.rtol, one.atol) for name, one in one_each.items()}
        options["tolerance"] = tolerances if isinstance(spec.tolerance, dict) else tolerances[""]
    return options


def load_model(spec: ModelSpec) -> tuple[Any, Any]:
    """The source and the inputs that ``bridge.convert`` takes; makes the model's plugins known first."""
    for function in spec.plugins or ():
        call(function)
    source, inputs = _load_source(spec.source, spec.inputs is not None)
    if spec.inputs is not None:
        inputs = call(spec.inputs) if isinstance(spec.inputs, str) else _load_arrays(spec.inputs)
    return source, inputs


def _load_source(source: str, has_inputs: bool) -> tuple[Any, Any]:
    """The module or path, and its inputs; ``has_inputs`` where others than the source's are given."""
    if source.endswith(".onnx"):
        return Path(source), None
    found = find_function(source)
    made = found if _is_module(found) else call(source)
    if _is_module(made):
        if has_inputs:
            return made, None
        raise UsageError(
            f"{source} is a module without inputs: name a function that returns (module, inputs), or give the model "
            "`inputs` in a manifest"
        )
    if not isinstance(made, tuple) or len(made) != 2:
        raise UsageError(f"{source} must return (module, inputs) or (path of an .onnx file, inputs), not {made!r:.80}")
    return made


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")  # not imported for its sake: who has a module has torch
    return torch is not None and isinstance(value, torch.nn.Module)


def _load_arrays(files: dict[str, str]) -> dict[str, Any]:
    import numpy as np

    arrays = {}
    for name, path in files.items():
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"input {name!r}: {path} is no .npy file that can be read: {error}") from error
    return arrays


def call(path: str) -> Any:
    """What the function ``package.module:function`` returns. Raises UsageError where there is no such function."""
    function = find_function(path)
    try:
        return function()
    except BridgeError:
        raise
    except Exception as error:
        raise BridgeError(f"{path} raised {describe(error)}") from error


def find_function(path: str) -> Any:
    """The function ``package.module:function``. Raises UsageError where there is none."""
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            places = f"the current directory {Path.cwd()} and Python's path were searched"
            raise UsageError(f"{path}: there is no module {error.name!r}; {places}") from error
        raise BridgeError(f"{path} could not be imported: {describe(error)}") from error
    except Exception as error:
        raise BridgeError(f"{path} could not be imported: {describe(error)}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise UsageError(f"{path}: {module} has no {part!r}") from error
    if not callable(found):
        raise UsageError(f"{path}: is a {type(found).__name__}, not a function")
    return found


def describe(error: BaseException, folder: str = "") -> str:
    """An exception in a line: its kind, its message, and the line of the user's code that it came from."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"cannot write {error.filename or folder or 'a file'}: {error.strerror}; make room, and run it again"
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    libraries = ("<", str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f"{text} (at {own[-1].filename}:{own[-1].lineno})" if own else text
