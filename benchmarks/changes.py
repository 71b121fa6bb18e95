"""Other inputs for a model than its example: of the same kind, and such that the model's result is well defined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Run = Callable[[Any], Any]
"""The module on the CPU, from inputs to the tensors of its output."""

TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of types that cannot be held to the 1e-3 of all others."""
ATOL = RTOL = 1e-3


def disagreements(expected: Sequence[Any], found: Sequence[Any], part: float = 1.0) -> list[str]:
    """What of the outputs differs by more than ``part`` of the tolerance, or in shape; NaN equals NaN, integers are
    equal. A type that differs is no disagreement here: the values are compared."""
    if len(expected) != len(found):
        return [f"{len(found)} outputs, and torch has {len(expected)}"]
    problems = []
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if one != other and not isinstance(other, torch.Tensor):
                problems.append(f"output {index}: {other!r}, and torch has {one!r}")
            continue
        if one.shape != other.shape:
            problems.append(f"output {index}: shape {list(other.shape)}, and torch has {list(one.shape)}")
            continue
        tolerance = part * TOLERANCES.get(one.dtype, ATOL)
        a, b = one.detach().cpu(), other.detach().cpu()
        if not (a.is_floating_point() or b.is_floating_point()):
            wrong = int((a.long() != b.long()).sum())
            if wrong:
                problems.append(f"output {index}: {wrong} of {a.numel()} integers differ")
            continue
        a, b = a.double(), b.double()
        close = torch.isclose(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not bool(close.all()):
            error = (a - b).abs()[~close]
            problems.append(
                f"output {index}: {int((~close).sum())} of {a.numel()} off, by up to {float(error.max()):.3g}"
            )
    return problems


def leaves(value: Any) -> list[Any]:
    return [item for item in pytree.tree_leaves(value) if item is not None]


def copied(inputs: Any) -> Any:
    """The same with tensors of its own, so that a module may write into them."""
    return pytree.tree_map(lambda item: item.clone() if isinstance(item, torch.Tensor) else item, inputs)


def on(inputs: Any, device: str) -> Any:
    return pytree.tree_map(lambda item: item.to(device) if isinstance(item, torch.Tensor) else item, inputs)


def spread(inputs: Any) -> Any:
    """The same values in tensors that are not contiguous, with NaN or 0 between them."""

    def strided(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or item.dim() == 0 or item.numel() < 2:
            return item
        wide = item.new_full((*item.shape[:-1], 2 * item.shape[-1]), float("nan") if item.is_floating_point() else 0)
        wide[..., ::2] = item
        return wide[..., ::2]

    return pytree.tree_map(strided, inputs)


def resized(tensor: torch.Tensor, axes: dict[int, int]) -> torch.Tensor:
    """Cut or repeated along each axis until it has that size: the values stay in their range."""
    for axis, size in axes.items():
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor.contiguous()


def _others(tensor: torch.Tensor, draw: torch.Generator) -> Iterator[torch.Tensor]:
    """Other values of the same kind: drawn between the example's, or permuted; else the example's, smaller."""
    if tensor.dim() == 3 and tensor.shape[-1] == tensor.shape[-2] and torch.equal(tensor, tensor.mT):
        order = torch.randperm(tensor.shape[-1], generator=draw)  # stays symmetric, and positive definite if it was
        yield tensor[:, order][:, :, order] * 0.9
        return
    flat = tensor.flatten()
    if tensor.is_floating_point():
        first, second = (torch.randint(0, flat.numel(), (flat.numel(),), generator=draw) for _ in range(2))
        part = torch.rand(flat.numel(), generator=draw).to(flat.dtype)
        yield (flat[first] * part + flat[second] * (1 - part)).reshape(tensor.shape)
        yield tensor * 0.75
    else:
        for _ in range(2):
            yield flat[torch.randperm(flat.numel(), generator=draw)].reshape(tensor.shape)


def changed(run: Run, example: Any, seed: int) -> tuple[Any, list[int]]:
    """Inputs of the example's shapes with other values, and which of them could not be changed.

    Each input is changed by itself, where the module takes it so: it raises nothing, its outputs are finite where the
    example's are, and a relative change of 1e-6 does not show in them (no tie, no threshold, nothing ill-conditioned).
    """
    draw = torch.Generator().manual_seed(seed)
    items, spec = pytree.tree_flatten(example)
    finite = _finite(run(copied(example)))
    kept = []
    for index, item in enumerate(items):
        if not isinstance(item, torch.Tensor):
            continue
        for other in _others(item, draw) if item.numel() else ():
            trial = [*items[:index], other, *items[index + 1 :]]
            if not torch.equal(other, item) and _well_defined(run, pytree.tree_unflatten(trial, spec), finite):
                items = trial
                break
        else:
            kept.append(index)
    return pytree.tree_unflatten(items, spec), kept


def _finite(outputs: Sequence[Any]) -> bool:
    return all(bool(torch.isfinite(item).all()) for item in outputs if isinstance(item, torch.Tensor))


def _well_defined(run: Run, inputs: Any, finite: bool) -> bool:
    def nudged(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not item.is_floating_point():
            return item
        return item * (1 + 1e-6 * torch.randn(item.shape).to(item.dtype))

    try:
        outputs = run(copied(inputs))
        near = run(pytree.tree_map(nudged, inputs))
    except Exception:  # noqa: BLE001 (the module does not take such inputs: that is what is asked)
        return False
    return _finite(outputs) >= finite and not disagreements(outputs, near, 0.3)
