"""``python -m bridge.compat install``: lets ``import torch2trt`` find the bridge's; ``uninstall`` undoes it.

A path file in site-packages names this folder, in which the package ``torch2trt`` is. Python looks there last: a real
torch2trt goes before it, and where there is one, nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
NAME = "torch-tensorrt-bridge-torch2trt.pth"
ASK = "import importlib.util as u; s = u.find_spec({!r}); print(s.origin if s else '')"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridge.compat", description=__doc__)
    parser.add_argument("action", choices=("install", "uninstall", "status"))
    action = parser.parse_args(arguments).action
    return {"install": _install, "uninstall": _uninstall, "status": _status}[action]()


def _found(module: str, *, anywhere: bool = True) -> str:
    """The file that a new Python would import ``module`` from; empty where there is none.

    ``anywhere`` False leaves PYTHONPATH out, which another Python may not have.
    """
    environment = {key: value for key, value in os.environ.items() if anywhere or key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as empty:  # Python looks in the current folder too
        done = subprocess.run(
            [sys.executable, "-c", ASK.format(module)],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.strip()


def _folders() -> list[Path]:
    """Where path files are read: the interpreter's own site-packages, and the user's."""
    folders = [Path(sysconfig.get_path("purelib"))]
    return [*folders, Path(site.getusersitepackages())] if site.ENABLE_USER_SITE else folders


def _ours(origin: str) -> bool:
    return bool(origin) and Path(origin).resolve().is_relative_to(FOLDER)


def _install() -> int:
    origin = _found("torch2trt")
    if _ours(origin):
        print(f"torch2trt is the bridge's already: {origin}")
        return 0
    if origin:
        print(f"torch2trt is installed: {origin}. Uninstall it first (pip uninstall torch2trt).", file=sys.stderr)
        return 1
    lines = [str(FOLDER)] if _found("bridge", anywhere=False) else [str(FOLDER), str(ROOT)]
    reasons = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        print(f"import torch2trt now finds the bridge's, by {folder / NAME}")
        return 0
    print(f"nowhere to write the path file: {'; '.join(reasons)}", file=sys.stderr)
    return 1


def _uninstall() -> int:
    removed = [folder / NAME for folder in _folders() if (folder / NAME).exists()]
    for path in removed:
        path.unlink()
        print(f"removed {path}")
    if not removed:
        print("there was nothing to remove")
    return 0


def _status() -> int:
    origin = _found("torch2trt")
    print(f"import torch2trt finds {'the bridge: ' if _ours(origin) else ''}{origin or 'nothing'}")
    return 0 if _ours(origin) else 1


if __name__ == "__main__":
    sys.exit(main())
