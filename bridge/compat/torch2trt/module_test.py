"""``torch2trt.module_test``, whose decorator stands beside converters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .gone import TESTS, gone

_Test = TypeVar("_Test", bound=Callable[..., Any])

MODULE_TESTS: list[Any] = []
"""None: what ``add_module_test`` is given is not run."""
ModuleTest = gone("module_test.ModuleTest", TESTS)


def add_module_test(*args: Any, **options: Any) -> Callable[[_Test], _Test]:
    """A decorator that leaves a test as it is; ``tensorrt_converter`` has warned that its converter is not used."""
    return lambda test: test


__all__ = ["MODULE_TESTS", "ModuleTest", "add_module_test"]
