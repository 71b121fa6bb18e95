"""A model's folder. Files are made in its ``.partial`` folder and renamed into place whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
EXPORTED = "exported.onnx"
REWRITTEN = "rewritten.onnx"
TYPED = "typed.onnx"
QUANTISED = "quantised.onnx"
ENGINE = "model.engine"
SIDECAR = "model.engine.json"
BUILD_LOG = "build.log"
RESULT = "result.json"
CALIBRATION = "calibration.cache"
TRADE_OFF = "trade_off.json"
GOLDEN, GOLDEN_ARRAYS = "golden.json", "golden.npz"
ENGINE_RUN, ENGINE_RUN_ARRAYS = "engine-run.json", "engine-run.npz"

OUTPUT_FILES = (
    EXPORTED,
    EXPORTED + ".data",
    REWRITTEN,
    REWRITTEN + ".data",
    TYPED,
    TYPED + ".data",
    QUANTISED,
    QUANTISED + ".data",
    ENGINE,
    SIDECAR,
    BUILD_LOG,
    CALIBRATION,
    GOLDEN,
    GOLDEN_ARRAYS,
    ENGINE_RUN,
    ENGINE_RUN_ARRAYS,
    RESULT,
    "report.html",
    *(f"diff.{suffix}" for suffix in ("json", "html", "md")),
    "convert.log",
)
"""Every file that a conversion may leave in its model's folder."""


def write_text(path: Path, text: str) -> None:
    """Writes ``path`` whole or leaves it as it was. Raises OSError (a full disk, say), naming ``path``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, with its suffix: it takes that one's place at the end, and is gone after an error.

    Raises OSError, naming ``path``.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


class Workspace:
    """The folder of one conversion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.partial = self.folder / PARTIAL

    def path(self, name: str) -> Path:
        return self.folder / name

    def publish(self, *names: str) -> None:
        """Moves finished files from ``.partial`` into place; a model's data file goes before the model."""
        for name in names:
            (self.partial / name).replace(self.folder / name)

    def adopt(self, other: Workspace) -> None:
        """Takes the files of another conversion in place of its own; those that it has not are removed."""
        for name in OUTPUT_FILES:
            if other.path(name).exists():
                other.path(name).replace(self.path(name))
            elif name != "convert.log":
                self.path(name).unlink(missing_ok=True)

    @contextmanager
    def opened(self) -> Iterator[Workspace]:
        """Removes what an earlier conversion left, and ``.partial`` whatever happens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in OUTPUT_FILES:
            if name != "convert.log":  # the batch's, open already
                self.path(name).unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()
        try:
            yield self
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
