"""Work for the pool of benchmarks/workers.py, in a module that takes no time to import."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.workers import Say, Work


def make(setting: Any) -> Work:
    def work(task: Any, say: Say) -> dict[str, Any]:
        say(f"step of {task}")
        if task == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if task == "hang":
            time.sleep(100)
        return {"status": "ok", "pid": os.getpid(), "replace_worker": task == "spoilt"}

    return work


def broken(setting: Any) -> Work:
    raise RuntimeError("no GPU")
