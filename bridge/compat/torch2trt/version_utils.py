"""``torch2trt.version_utils``."""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any

import torch

from bridge.target import MODULES, likely_flavour


@functools.total_ordering
class Version:
    """Numbers with dots, which compare with strings too: ``Version("10.1") >= "8.5"``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.numbers = tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])

    def _padded(self) -> tuple[int, ...]:
        return (*self.numbers, 0, 0, 0)[:3]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (str, Version)) and self._padded() == Version(str(other))._padded()

    def __lt__(self, other: object) -> bool:
        return self._padded() < Version(str(other))._padded()

    def __hash__(self) -> int:
        return hash(self._padded())

    def __str__(self) -> str:
        return self.text


def tensorrt() -> Any:
    """The TensorRT that is installed."""
    return importlib.import_module(MODULES[likely_flavour()])


def trt_version() -> Version:
    return Version(tensorrt().__version__)


def torch_version() -> Version:
    return Version(torch.__version__)


class _TensorRT(ModuleType):
    """TensorRT, imported when it is first asked for something and not before."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt(), name)


trt = _TensorRT("tensorrt")
