"""Which optimization profile of an engine the shapes of a call are within."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import RunError
from .engine import IOTensor

Key = tuple[torch.Size, ...]
"""The shapes of all inputs."""


def fitting_profile(inputs: Sequence[IOTensor], key: Key, current: int) -> int:
    """The first profile that the shapes are within, the one in use before others. Raises RunError without one."""
    count = len(inputs[0].profiles) if inputs else 1
    profiles: list[int] = [current, *range(count)]
    for profile in profiles:
        if all(_within(spec, shape, profile) for spec, shape in zip(inputs, key, strict=True)):
            return profile
    raise RunError(_beyond(inputs, key))


def _within(spec: IOTensor, shape: torch.Size, profile: int) -> bool:
    if len(shape) != len(spec.shape):
        return False
    if -1 not in spec.shape:
        return tuple(shape) == spec.shape
    low, _, high = spec.profiles[profile]
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _beyond(specs: Sequence[IOTensor], key: Key) -> str:
    """Why shapes are in no profile."""
    for spec, shape in zip(specs, key, strict=True):
        if len(shape) != len(spec.shape):
            return (
                f"input {spec.name!r}: has {len(shape)} axes ({list(shape)}), and the engine takes {len(spec.shape)}."
            )
        ranges = [(spec.shape, spec.shape)] if -1 not in spec.shape else [(low, high) for low, _, high in spec.profiles]
        if not any(all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)) for low, high in ranges):
            allowed = " or ".join(
                f"{list(low)}" if low == high else f"{list(low)} to {list(high)}" for low, high in dict.fromkeys(ranges)
            )
            return (
                f"input {spec.name!r}: has the shape {list(shape)}, and the engine takes {allowed}. Convert with a "
                "profile that holds it (profiles=, or min_shapes and max_shapes)."
            )
    shapes = ", ".join(f"{spec.name!r} {list(shape)}" for spec, shape in zip(specs, key, strict=True))
    return f"the inputs' shapes are allowed by themselves, and together are in no one profile: {shapes}."
