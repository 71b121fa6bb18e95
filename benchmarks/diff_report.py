"""How large the report of a large model's diff is, and how soon a browser has its table ready.

    python -m benchmarks.diff_report                    # bytes, and seconds to write it
    python -m benchmarks.diff_report --browser /usr/bin/chromium -o report.html

The report is made up: a decoder of 5,000 nodes, all pairs of stages measured, 15,500 rows in all. The time is from the
request for the page until its table has been sorted once by a click, the median of several loads, each in a context of
its own; the browser's start is not in it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bridge.diff.model import (
    DiffReport,
    Error,
    Heat,
    LayerDiff,
    Metric,
    OutputData,
    Percentiles,
    SampleError,
    Samples,
    ShapeError,
    StageError,
    StageName,
)
from bridge.diff.render import render_html
from bridge.result import Histogram, TargetInfo, Tolerance

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_OPERATORS = ("MatMul", "Add", "Mul", "Reshape", "Transpose", "Softmax", "ReduceMean", "Sqrt", "Div", "Pow")
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn", "mlp.gate_proj", "mlp.down_proj", "input_layernorm")
_SMALLEST: dict[tuple[StageName, StageName], float] = {
    ("torch", "exported"): 2e-7,
    ("exported", "rewritten"): 0.0,
    ("rewritten", "typed"): 4e-4,
    ("typed", "engine"): 2e-5,
}
"""What a layer introduces between two stages, give or take a decade."""


def report_of(nodes: int = 5000, outputs: int = 4, seed: int = 0) -> DiffReport:
    """A diff of a decoder in float16 whose norm overflows half way."""
    draw = random.Random(seed)
    layers: list[LayerDiff] = []
    for pair, scale in _SMALLEST.items():
        # Of what torch ran, a module's outputs are known, not each node's.
        layers += _layers(pair, scale, range(0, nodes, 10 if pair[0] == "torch" else 1), nodes, draw)
    first = next(index for index, layer in enumerate(layers) if layer.diverges)
    ranking = sorted(range(len(layers)), key=lambda index: layers[index].badness, reverse=True)[:100]
    guilty = layers[first]
    return DiffReport(
        "decoder-24",
        verdict=f"The rewritten and the typed model differ from {guilty.operator} {guilty.node} on, which "
        f"{guilty.module} makes at {guilty.source}: 12 elements are no longer finite in float16.",
        ok=False,
        target=TargetInfo("tensorrt-rtx", "1.7.1.116", installed=True, strongly_typed=True),
        precision="fp16",
        stages=[item for place in range(outputs) for item in _stages(f"output_{place}", bad=place == 0)],
        layers=layers,
        first_diverging=first,
        ranking=ranking,
        shapes=list(_shapes()),
        samples=_samples(draw),
        metrics=[
            Metric("top-1", "torch", 0.763),
            Metric("top-1", "exported", 0.763),
            Metric("top-1", "rewritten", 0.763),
            Metric("top-1", "typed", 0.041),
            Metric("top-1", "engine", None, "not run"),
        ],
        outputs=[_data(f"output_{place}", draw) for place in range(outputs)],
        notes=["The engine was built, not run: no NVIDIA GPU is here."],
        seconds={"running the stages": 12.4, "layers": 31.9, "shapes": 6.2},
    )


def _layers(
    pair: tuple[StageName, StageName], scale: float, places: range, nodes: int, draw: random.Random
) -> Iterator[LayerDiff]:
    culprit = nodes // 2 + 7
    carried = scale
    for place in places:
        block, part = place * 24 // nodes, _PARTS[place // 7 % len(_PARTS)]
        operator = _OPERATORS[place % len(_OPERATORS)]
        bad = place == culprit and pair == ("rewritten", "typed")
        error = 10 ** draw.gauss(math.log10(scale), 0.5) if scale and draw.random() < 0.9 else 0.0
        carried = math.hypot(carried, error)
        beyond = pair == ("rewritten", "typed") and place > culprit
        yield LayerDiff(
            *pair,
            tensor=f"{operator.lower()}_{place}",
            node=f"node_{operator.lower()}_{place}",
            operator=operator,
            module=f"model.layers.{block}.{part}",
            source=f"/home/me/decoder/modeling/layers.py:{120 + 3 * (place % 97)}",
            precision="float16" if pair[1] in ("typed", "engine") else "float32",
            shape=[1, 128, 896] if place % 3 else [1, 14, 128, 128],
            largest=draw.uniform(0.5, 400.0) if not bad else 91230.0,
            introduced=Error(2.4e-2 if bad else error, error * 3, non_finite=12 if bad else 0),
            carried=Error(min(1.0, carried + (0.3 if beyond else 0)), carried * 5, non_finite=128 if beyond else 0),
            diverges=bad,
        )


def _stages(output: str, *, bad: bool) -> Iterator[StageError]:
    def error(relative: float, agreed: bool = True) -> Error:
        used = relative * 900
        return Error(relative, relative * 14, relative / 3, 2.1, 1 - relative, 70.0, 0 if agreed else 41, used, agreed)

    limit = Tolerance(1e-3, 1e-4)
    yield StageError("torch", output, "32 samples")
    yield StageError("exported", output, "32 samples", "torch", error(2.1e-7), error(2.1e-7), limit)
    yield StageError("rewritten", output, "32 samples", "exported", error(2.1e-7), Error(0.0, 0.0, agreed=True), limit)
    step = error(0.31, False) if bad else error(6.2e-4)
    yield StageError("typed", output, "32 samples", "rewritten", step, step, Tolerance(1e-2, 1e-3))
    yield StageError("engine", output, "32 samples", "typed", note="no GPU here can run the engine")


def _shapes() -> Iterator[ShapeError]:
    for case, length in (("min", 1), ("opt", 128), ("max", 2048)):
        for stage in ("exported", "rewritten", "typed"):
            found = Error(3e-7 * length, 1e-5, agreed=length < 2000, tolerance_used=length / 1900)
            yield ShapeError(case, {"input_ids": [1, length]}, stage, "output_0", found, found)  # type: ignore[arg-type]


def _samples(draw: random.Random) -> Samples:
    errors = [
        SampleError(f"sample {place}", "typed", 0.31 / (place + 1), 4.2 / (place + 1), place > 4) for place in range(32)
    ]
    return Samples(
        32,
        [
            Percentiles("exported", "relative", 1.6e-7, 2.0e-7, 2.1e-7, 2.1e-7),
            Percentiles("typed", "relative", 7.1e-4, 3.9e-2, 0.29, 0.31),
        ],
        errors,
        "sample 0",
        "worst-sample.npz",
    )


def _data(output: str, draw: random.Random) -> OutputData:
    expected = [draw.gauss(0, 3) for _ in range(2000)]
    actual = [value + draw.gauss(0, 0.05) + (draw.random() < 0.01) * 2 for value in expected]
    counts = [0, 3, 40, 900, 40_000, 800_000, 120_000, 900, 12]
    cells = [
        [1e-3 * (1 + 20 * math.exp(-((row - 40) ** 2 + (column - 20) ** 2) / 90)) for column in range(64)]
        for row in range(64)
    ]
    histogram = Histogram([10.0**power for power in range(-9, 1)], counts, 40_000)
    return OutputData(output, "torch", "typed", "sample 0", expected, actual, histogram, Heat(128, 128, cells))


def seconds_until_ready(page: Path, browser: str, loads: int) -> list[float]:
    """From the request for the page until a click has sorted its table."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        for _ in range(loads):
            tab = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="commit")
            tab.click("th[data-key=carried] button")
            tab.wait_for_selector("th[data-key=carried][aria-sort=descending]")
            found.append(time.perf_counter() - start)
            tab.context.close()
        chromium.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--outputs", type=int, default=4)
    parser.add_argument("--browser", metavar="CHROMIUM", help="its executable; without it, no time is taken")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="keep the report here")
    options = parser.parse_args()
    report = report_of(options.nodes, options.outputs)
    render_html(report_of(50, 1))  # what is imported, is imported
    start = time.perf_counter()
    html = render_html(report)
    written = time.perf_counter() - start
    print(f"{options.nodes:,} nodes, {len(report.layers):,} rows: {len(html.encode()):,} bytes in {written:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        page = options.output or Path(folder) / "diff.html"
        page.write_text(html, encoding="utf-8")
        if options.browser:
            times = seconds_until_ready(page.resolve(), options.browser, options.loads)
            print(f"ready after {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
