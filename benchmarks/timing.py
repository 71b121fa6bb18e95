"""Latency of several ways to do one thing, measured in turns, so that a clock that drifts moves all of them alike."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


def quantile(values: Sequence[float], part: float) -> float:
    """Between the two nearest values, by distance; ``values`` need not be sorted."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Median, p10 and p90; in the unit of ``values``."""
    return {
        "median": round(median(values), 3),
        "p10": round(quantile(values, 0.1), 3),
        "p90": round(quantile(values, 0.9), 3),
        "samples": len(values),
    }


class HostClock:
    """Stands in for the GPU's clock where there is none."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def back_to_back(self, call: Call, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) * 1e6 / times


class GpuClock:
    """The current stream's: waits for it, and takes times with events on it."""

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def synchronize(self) -> None:
        self._torch.cuda.current_stream().synchronize()

    def back_to_back(self, call: Call, times: int) -> float:
        """Microseconds of GPU time of each of so many calls, launched one after the other without waiting."""
        first, last = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3 / times


Clock = HostClock | GpuClock


def host_times(call: Call, clock: Clock, times: int) -> list[float]:
    """Microseconds of each of so many calls, from the call to the end of its work on the GPU."""
    found = []
    clock.synchronize()
    for _ in range(times):
        began = time.perf_counter_ns()
        call()
        clock.synchronize()
        found.append((time.perf_counter_ns() - began) / 1e3)
    return found


def warm_up(call: Call, clock: Clock, calls: int, seconds: float) -> None:
    """At least so many calls, and for at least so long."""
    end = time.perf_counter() + seconds
    done = 0
    while done < calls or time.perf_counter() < end:
        call()
        done += 1
        if done % 8 == 0:
            clock.synchronize()
    clock.synchronize()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector stays out of what is timed."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Blocks:
    """What was measured: for each way its host times and its GPU time, round by round."""

    def __init__(self, names: Sequence[str]) -> None:
        self.host: dict[str, list[list[float]]] = {name: [] for name in names}
        self.gpu: dict[str, list[float]] = {name: [] for name in names}
        self.failed: dict[str, str] = {}
        """What a way raised that was given up; nothing is kept of its times."""

    def give_up(self, name: str, error: BaseException) -> None:
        self.failed[name] = words(error, 600)
        del self.host[name], self.gpu[name]

    def rows(self) -> dict[str, dict[str, Any]]:
        """By way: ``host_us`` of single calls, ``gpu_us`` of calls back to back."""
        return {
            name: {"host_us": summary([one for block in blocks for one in block]), "gpu_us": summary(self.gpu[name])}
            for name, blocks in self.host.items()
            if blocks
        }

    def difference(self, one: str, other: str) -> dict[str, float] | None:
        """How much longer a call of ``one`` takes than one of ``other``: the median over the rounds, in each of which
        both were measured; None where one of them was not."""
        pairs = list(zip(self.host.get(one, ()), self.host.get(other, ()), strict=False))
        if not pairs:
            return None
        host = [(median(a), median(b)) for a, b in pairs]
        gpu = list(zip(self.gpu[one], self.gpu[other], strict=False))
        return {
            "host_us": round(median([a - b for a, b in host]), 3),
            "host_percent": round(median([100 * (a / b - 1) for a, b in host]), 3),
            "gpu_us": round(median([a - b for a, b in gpu]), 3),
            "gpu_percent": round(median([100 * (a / b - 1) for a, b in gpu]), 3),
        }


def interleaved(
    ways: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int = 10,
    calls: int = 20,
    launches: int = 6,
    warm_calls: int = 10,
    warm_seconds: float = 0.1,
) -> Blocks:
    """Measures every way in each of ``rounds`` rounds, forwards and backwards in turns: ``calls`` single calls, then
    ``launches`` back to back."""
    blocks = Blocks(list(ways))

    def attempt(name: str, work: Call) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 (the other ways are measured still, and this one is named)
            blocks.give_up(name, error)

    def measure(name: str, call: Call) -> None:
        warm_up(call, clock, 2, 0.0)
        blocks.host[name].append(host_times(call, clock, calls))
        blocks.gpu[name].append(clock.back_to_back(call, launches))

    for name, call in ways.items():
        attempt(name, functools.partial(warm_up, call, clock, warm_calls, warm_seconds))
    with no_collection():
        for turn in range(rounds):
            order = [(name, call) for name, call in ways.items() if name in blocks.host]
            for name, call in order if turn % 2 == 0 else reversed(order):
                attempt(name, functools.partial(measure, name, call))
    return blocks


WARM_PAIRS = 5
"""Calls that are not counted: a way that was not used for a while is slower."""


def paired(one: Call, other: Call, clock: Clock, pairs: int = 100) -> dict[str, float]:
    """How much longer a call of ``one`` takes than one of ``other``, from the call to the end of its work: they are
    called in turns, so that what slows a GPU of several milliseconds a call moves both alike."""
    calls, found = (one, other), []
    with no_collection():
        for turn in range(WARM_PAIRS + pairs):
            times = [0.0, 0.0]
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                times[place] = host_times(calls[place], clock, 1)[0]
            found.append((times[0] - times[1], 100 * (times[0] / times[1] - 1)))
    differences, shares = zip(*found[WARM_PAIRS:], strict=True)
    return {"host_us": round(median(differences), 3), "host_percent": round(median(shares), 3), "pairs": pairs}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk when it returns."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote; None where there is nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def words(error: BaseException, limit: int = 1500) -> str:
    """An exception for a report: its type and what it says."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :]
