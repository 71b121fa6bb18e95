"""What onnxscript's optimiser takes for nothing: ``x + 1e-10``, ``x * 1.000009``.

It drops sums with 0 and products with 1, and compares constants with these by tolerances of 1e-8 and 1e-5. That loses
the small number that a logarithm, a root or a quotient is guarded by.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest import mock


def exact() -> AbstractContextManager[Any]:
    """Within it, 0 and 1 in the optimiser's patterns are 0 and 1."""
    try:
        from onnxscript.rewriter import _matcher
    except ImportError:  # of a release that has it elsewhere; what it drops the comparison with torch finds
        return contextlib.nullcontext()
    return mock.patch.object(_matcher, "math", SimpleNamespace(**{**vars(math), "isclose": _is_close}))


def _is_close(found: float, wanted: float, **tolerances: float) -> bool:
    return found == wanted if wanted in (0, 1) else math.isclose(found, wanted, **tolerances)
