"""How long each layer of an engine takes, as TensorRT's own profiler reports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerTime:
    """One layer of an engine over all profiled calls."""

    name: str
    calls: int
    milliseconds: float
    """Mean of a call."""
    share: float
    """Of the time of all layers, 0 to 1."""


class Profile:
    """Collects the time of each layer; several contexts may report to one."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def profiler(self, trt: Any) -> Any:
        """An ``IProfiler`` of TensorRT's module ``trt`` that reports here."""
        times = self._times

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        return Profiler()

    @property
    def layers(self) -> list[LayerTime]:
        """The layers in the engine's order."""
        total = sum(map(sum, self._times.values()))
        return [
            LayerTime(name, len(times), sum(times) / len(times), sum(times) / total if total else 0.0)
            for name, times in self._times.items()
        ]

    def table(self) -> str:
        """The layers with their mean time and share, slowest first, for people."""
        rows = sorted(self.layers, key=lambda layer: -layer.share)
        width = max([5, *(len(row.name) for row in rows)])
        lines = [f"{'layer':{width}}  {'ms':>9}  {'share':>6}"]
        lines += [f"{row.name:{width}}  {row.milliseconds:9.4f}  {row.share:6.1%}" for row in rows]
        return "\n".join(lines)
