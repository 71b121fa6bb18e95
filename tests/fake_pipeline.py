"""A stand-in for ``bridge.pipeline`` in worker processes: the batch is tested without PyTorch and TensorRT.

A model is then a function ``model(stage, workdir)`` that is called in every stage, and may misbehave there. ``ZOO`` is
a module of such models.
"""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_INSTALL = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import fake_pipeline; "
WORKER = (sys.executable, "-c", _INSTALL + "fake_pipeline.install(); from bridge.worker import main; main()")
CLI = (sys.executable, "-c", _INSTALL + "fake_pipeline.main()")

ZOO = """
import os, signal, subprocess, sys, time
from pathlib import Path
from bridge.errors import BuildError, UsageError

def _model(stage, workdir):
    print("noise of", stage)
    os.system("echo noise of a native library")

def good():
    return _model, None

def other():
    return _model, None

def raises():
    wanted = {}
    return wanted["weights"], None

def segfaults():
    os.kill(os.getpid(), signal.SIGSEGV)

def segfaults_in_build():
    return (lambda stage, workdir: stage == "build" and os.kill(os.getpid(), signal.SIGSEGV)), None

def leaves():
    os._exit(3)

def hangs():
    def model(stage, workdir):
        if stage == "build":
            Path("hanging").write_text(str(os.getpid()))
            time.sleep(600)
    return model, None

def leaves_a_fork_behind():
    if os.fork() == 0:
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)

def refused():
    def model(stage, workdir):
        if stage == "build":
            raise BuildError("the parser refused DFT")
    return model, None

def misdescribed():
    def model(stage, workdir):
        raise UsageError("there is no input 'y'; the inputs are 'x'")
    return model, None

def no_tuple():
    return 5

def waits_for_the_other(stage, workdir):
    Path(workdir.name).touch()
    end = time.monotonic() + 20
    while not (Path("left").exists() and Path("right").exists()):
        assert time.monotonic() < end, "the two models are not at work at the same time"
        time.sleep(0.01)

def left():
    return waits_for_the_other, None

right = left

def big():
    def model(stage, workdir):
        if stage == "build":
            with open(workdir / ".partial" / "model.engine", "wb") as file:
                file.write(bytes(1 << 20))
    return model, None
"""


def convert(source: Any, inputs: Any = None, *, name: str, workdir: Path, on_stage: Any, **options: Any) -> Any:
    from bridge.result import ConversionResult
    from bridge.workspace import Workspace, write_text

    result = ConversionResult(name, status="verified", source=str(options))
    with Workspace(workdir).opened() as space:
        for stage in ("export", "rewrite", "build", "run", "compare"):
            on_stage(stage)
            (space.partial / "model.engine").write_text("an engine in the making")
            if callable(source):
                source(stage, workdir)
        space.publish("model.engine")
        result.engine = workdir / "model.engine"
        write_text(workdir / "result.json", result.to_json(workdir))
    return result


def install() -> None:
    module = types.ModuleType("bridge.pipeline")
    module.convert = convert  # type: ignore[attr-defined]
    sys.modules["bridge.pipeline"] = module


def main() -> None:
    """``bridge``, with workers that have this pipeline."""
    from bridge import cli, worker

    worker.COMMAND = WORKER
    sys.exit(cli.main())


def run_cli(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, **options)
