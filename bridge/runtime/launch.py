"""The compiled part of a call, ``_launch``, and what it asks torch before it begins.

None stands in the place of each of its names where there is none: the package was installed without a C compiler, or
torch is older than DLPack's C exchange API. Calls are the same without it, and take longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._launch import ContextLaunch, GraphLaunch, Launch, Launches, launched
else:
    try:
        from ._launch import ContextLaunch, GraphLaunch, Launch, Launches, launched
    except ImportError:
        ContextLaunch = GraphLaunch = Launch = Launches = launched = None

__all__ = ["ContextLaunch", "GraphLaunch", "Launch", "Launches", "launched"]


def current_handle() -> Callable[[int], int]:
    """What gives the current stream of a GPU by its number, as CUDA knows it; torch's public way takes longer."""
    quick: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return quick or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def capturing_now() -> Callable[[], bool]:
    """As above, of whether the current stream is being captured."""
    quick: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", capturing)
    return quick if torch.version.cuda is not None else capturing


def capturing() -> bool:
    """Whether the caller is making a CUDA graph, which goes on using whatever memory is used now."""
    return torch.cuda.is_current_stream_capturing()
