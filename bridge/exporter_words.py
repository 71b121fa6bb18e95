"""What exporters say when they fail, for the person whose module it is."""

from __future__ import annotations

import re
import sysconfig
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_SPECIALISED = (
    re.compile(r"You marked (?P<what>.+?) as dynamic but your code specialized it to be a constant \((?P<size>\d+)\)"),
    re.compile(r"tracing inferred a static shape of (?P<size>\d+) for dimension (?P<what>.+?\.shape\[\d+\])"),
)
"""How torch.export says that a dynamic axis has become constant; they stand for one another from release to release."""
_PLACE = re.compile(r"\['(?:tensors|flat_args)'\]\[(?P<input>\d+)\]\.(?:shape|size\(\))\[(?P<axis>\d+)\]")


ADVICE = (
    ": a loop over it, a branch on it, int() or float() of it make it one; compute with the size as it is (size // 2, "
    "size * 0.5), or with tensors"
)


BY_SIZES = "the code decides by sizes, and the exported model has the way that the example took alone"

BY_VALUES = (
    "the code decides by values of a tensor: a branch on it, a loop over what nonzero() found or over tolist(), int() "
    "of it for a size; compute with tensors (torch.where, torch.cond, a mask)"
)


def one_line(error: BaseException, inputs: Sequence[str] = ()) -> str:
    """The innermost cause of an exporter's error, in one line, with ``inputs`` for the names of the wrapper's."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _ANSI.sub("", str(error))
    for match in filter(None, (pattern.search(text) for pattern in _SPECIALISED)):
        place = _PLACE.search(match["what"])
        what = f"axis {place['axis']} of {inputs[int(place['input'])]!r}" if place and inputs else match["what"]
        return f"{what} was declared dynamic and has become the constant {match['size']} in the module's code{ADVICE}"
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return f"{code_line(error)}{BY_VALUES}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and set(line.strip()) - set("=-#*")]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


def user_line(error: BaseException) -> str:
    """`` (file:line)`` of the innermost frame that is neither Python's, a library's nor ours; empty without one."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def code_line(error: BaseException) -> str:
    """``file:line: `` of the innermost frame that is neither Python's, torch's nor ours; empty without one."""
    import torch

    def is_torchs(file: str) -> bool:
        libraries = file.startswith(tuple(map(sysconfig.get_path, ("purelib", "platlib"))))
        return file.startswith(str(Path(torch.__file__).parent)) or not (libraries or _is_users(file))

    frames = [item for item in traceback.extract_tb(error.__traceback__) if not is_torchs(item.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _is_users(file: str) -> bool:
    return not file.startswith(
        ("<", str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
    )


def branches_taken(warned: Sequence[warnings.WarningMessage]) -> list[str]:
    """Of a tracer's warnings, where the user's code decides by values, of which the trace has one way alone."""
    found = [item for item in warned if "to a Python boolean" in str(item.message) and _is_users(item.filename)]
    if not found:
        return []
    lines = ", ".join(sorted({f"{item.filename}:{item.lineno}" for item in found}))
    return [
        f"{lines}: the code decides by values or sizes there, and the exported model has the way that the example took "
        "alone; torch.where and torch.cond are followed"
    ]


def scripted_parts(module: torch.nn.Module) -> str:
    """What to do about ScriptModules inside of a module that does not export; empty where there are none."""
    import torch

    from .scripted import Scripted

    found = [name for name, item in module.named_modules() if isinstance(item, torch.jit.ScriptModule)]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not outer:
        return ""
    names = ", ".join(map(repr, outer[:3])) + ", …" * (len(outer) > 3)
    instead = "give" if isinstance(module, Scripted) else f"in the place of {names} put"
    return (
        "Not all that a ScriptModule does is exported, and less of it at other sizes than the example's: "
        f"{instead} the nn.Module it was scripted from."
    )
