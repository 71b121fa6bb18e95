"""Planted causes of a failing low precision: is each found and named, with few nodes in float32, in few builds?

    python -m benchmarks.bisection [NAME …] [--target tensorrt-rtx] [--blocks 12] [--folder OUT]

Each case is a transformer with a fault in the middle. The bars: the first node that is named comes from the planted
module, at most 5 % of the nodes are raised, at most 15 builds are used, and ``convert`` with the precision file is
within its tolerance. Exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bridge
from bridge.diff.bisection import Bisection, bisect
from bridge.precision import Precision, Rule

WIDTH, HEADS, TOKENS, BATCH = 64, 4, 16, 4
SHARE, BUILDS = 0.05, 15


class Energy(nn.Module):
    """Divides by the root of a mean square: the sum of squares leaves float16's range, and its root does not."""

    def __init__(self, factor: float = 60) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.factor
        energy = torch.einsum("btd,btd->bt", y, y)
        return y / torch.sqrt(energy / x.shape[-1] + 1e-6).unsqueeze(-1)


class Cancellation(nn.Module):
    """A small difference of large numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifted = x + 3000
        return shifted - 3000


class Outlier(nn.Module):
    """A projection of which one channel is read that is hundreds of times as large as the others, and cancelled."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.ones(width))
        self.scale[3] = 400
        self.projection = nn.Linear(width, width)
        with torch.no_grad():
            self.projection.weight[:, 3] /= 400

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x * self.scale)


class Pair(nn.Module):
    """Two faults that have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.cancellation = Energy(), Cancellation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cancellation(self.energy(x))


class Block(nn.Module):
    """A transformer's, with an optional fault in it, before the second norm (``raw``) or behind it."""

    def __init__(self, fault: nn.Module | None, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries, self.mixed = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.fault = fault if fault is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.queries(self.first(x)).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        x = x + self.mixed(mixed.transpose(1, 2).reshape(batch, tokens, width))
        inner = self.second(self.fault(x)) if self.raw else self.fault(self.second(x))
        return x + self.narrow(nn.functional.gelu(self.wide(inner)))


class Transformer(nn.Module):
    """``blocks`` blocks, the one in the middle with a fault."""

    def __init__(self, fault: nn.Module, blocks: int, raw: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(fault if place == blocks // 2 else None, raw) for place in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A planted cause."""

    fault: Callable[[], nn.Module]
    precision: str
    unprotected: bool = False
    """Whether every node is forced into the low type, whatever its values are."""
    quiet: bool = False
    """Whether the example is so quiet that protection by its values sees nothing; the samples are not."""
    tolerance: bridge.Tolerance | None = None


CASES = {
    "overflow": Case(Energy, "fp16", unprotected=True),
    "quiet": Case(lambda: Energy(8), "fp16", quiet=True),
    "cancellation": Case(Cancellation, "fp16", unprotected=True),
    "pair": Case(Pair, "fp16", unprotected=True),
    "outlier": Case(Outlier, "int8", tolerance=bridge.Tolerance(0.05, 1e-3, whole=True)),
    "outlier+fp16": Case(Outlier, "int8+fp16", tolerance=bridge.Tolerance(0.05, 1e-3, whole=True)),
}


def precision_of(case: Case) -> Precision:
    """What is asked for."""
    asked = Precision.of(case.precision)
    return Precision(asked.low, asked.quantised, (Rule(asked.low, "*", "op"),)) if case.unprotected else asked


def run(case: Case, blocks: int, folder: Path, target: str) -> tuple[Bisection, Any, float]:
    """The bisection, the conversion with its file, and the bisection's seconds.

    What is so ``quiet`` that the conversion would see nothing is held to the samples in another bisection.
    """
    model = Transformer(case.fault(), blocks, case.quiet).eval()
    torch.manual_seed(1)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    samples = [(5 * x,)] if case.quiet else None
    x = x / 50 if case.quiet else x
    began = time.perf_counter()
    common: dict[str, Any] = {"target": target, "tolerance": case.tolerance}
    found = bisect(
        model,
        (x,),
        precision=precision_of(case),
        fixed_rules=not case.unprotected,
        workdir=folder / "found",
        builds=BUILDS,
        samples=samples,
        **common,
    )
    seconds = time.perf_counter() - began
    after = None
    if found.file is not None:
        after = bridge.convert(model, (x,), precision=found.file, workdir=folder / "after", build=False, **common)
    if found.file is not None and samples is not None:
        again = bisect(model, (x,), precision=found.file, samples=samples, builds=2, workdir=folder / "again", **common)
        assert again.status == "held", again.verdict
    return found, after, seconds


def missed(found: Bisection, after: Any) -> list[str]:
    """The bars that were not kept, in words."""
    if after is None:
        return [found.verdict]
    wrong = []
    if after.status == "failed":
        wrong.append(f"convert with the file: {after.error}")
    if ".fault" not in found.kept[0].module or not found.kept[0].source:
        wrong.append(f"named first: {found.kept[0]}")
    if found.share > SHARE:
        wrong.append(f"{found.share:.1%} of the nodes")
    if found.builds > BUILDS:
        wrong.append(f"{found.builds} builds")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*CASES, []])
    parser.add_argument("--target", default="tensorrt-rtx")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where files go; by default a temporary folder")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.name or CASES:
            folder = (options.folder or Path(temporary)) / name
            found, after, seconds = run(CASES[name], options.blocks, folder, options.target)
            wrong = missed(found, after)
            failed += bool(wrong)
            print(f"{name}: {found.verdict}\n  {seconds:.1f} s; minimal: {found.minimal}; latency: {found.latency}")
            for kept in found.kept:
                print(f"  {kept}")
            for trial in found.trials:
                print(f"  tried {trial.raised} nodes: {trial.judgement.error:.3g} of the tolerance")
            print(f"  {'MISSED: ' + '; '.join(wrong) if wrong else 'all bars kept'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
