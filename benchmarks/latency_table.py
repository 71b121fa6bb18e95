"""The table of ``benchmarks/README.md``, from what ``benchmarks.latency`` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .models import CASES
from .timing import read_json

HEAD = (
    "| model, batch | raw enqueue | TRTModule | more, in rows | in turns | with CUDA graph | raw graph and copy "
    "| more, in rows | in turns | torch2trt's way | eager | torch.compile | error |"
)


def table(out: Path) -> str:
    """Medians in milliseconds of single calls, from the call to the end of its work; a dash where there is none.

    How much more a call takes is the median of what it is from round to round, where each way is called several times
    in a row, and where the two are called in turns.
    """
    run = read_json(out / "run.json") or {"cases": {}}
    compiled = read_json(out / "compile.json") or {"rows": {}}
    build = read_json(out / "build.json") or {"cases": {}}
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    lines += [line(name, run["cases"].get(name, {}), compiled["rows"]) for name in CASES]
    waiting = [name for name, row in run["cases"].items() if row.get("enqueue_waits")]
    if waiting:
        lines += ["", f"TensorRT's enqueue returns when the GPU is done: {', '.join(waiting)}"]
    notes = [
        f"- {name}: {what}"
        for name in CASES
        for what in (*troubles(build["cases"].get(name), "build"), *troubles(run["cases"].get(name), "run"))
    ]
    notes += [
        f"- torch.compile {key}: {row['status']}, {one_line(row.get('error', ''))}"
        for key, row in compiled["rows"].items()
        if row["status"] != "ok"
    ]
    return "\n".join(lines) + ("\n\nWhat is missing:\n\n" + "\n".join(notes) if notes else "")


def line(name: str, row: dict[str, Any], compiled: dict[str, Any]) -> str:
    case, ways = CASES[name], row.get("ways", {})
    gaps = row.get("differences", {})
    module, graph = gaps.get("module - raw"), gaps.get("module_graph - raw_graph")
    cells = [
        f"{case.model}, {case.batch}, {case.precision}",
        milliseconds(ways.get("raw")),
        milliseconds(ways.get("module")),
        f"{module['in_rows']['host_us']:+.1f} us" if module else "–",
        f"{module['host_us']:+.1f} us" if module else "–",
        milliseconds(ways.get("module_graph")),
        milliseconds(ways.get("raw_graph")),
        f"{graph['in_rows']['host_percent']:+.1f} %" if graph else "–",
        f"{graph['host_percent']:+.1f} %" if graph else "–",
        milliseconds(ways.get("allocating")),
        milliseconds(fastest(ways, ("eager", "eager_channels_last"))),
        best_mode(name, compiled),
        f"{row['errors']['module']['max_abs']:.1e}" if row.get("errors", {}).get("module") else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def milliseconds(way: dict[str, Any] | None) -> str:
    return f"{way['host_us']['median'] / 1e3:.3f}" if way else "–"


def fastest(ways: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    found = [ways[name] for name in names if name in ways]
    return min(found, key=lambda way: way["host_us"]["median"], default=None)


def best_mode(name: str, rows: dict[str, Any]) -> str:
    """The fastest mode, named; with how many of the modes were measured where that is not all."""
    found = {key.split(" ", 1)[1]: row for key, row in rows.items() if key.split(" ", 1)[0] == name}
    timed = {mode: row for mode, row in found.items() if row.get("host_us")}
    if not timed:
        return "–"
    mode = min(timed, key=lambda key: timed[key]["host_us"]["median"])
    short = "" if len(timed) == 3 else f", best of {len(timed)}"
    return f"{milliseconds(timed[mode])} ({mode}{short})"


def troubles(row: dict[str, Any] | None, stage: str) -> list[str]:
    if row is None:
        return [f"no {stage}"]
    found = [f"{way}: {one_line(why)}" for way, why in row.get("failed_ways", {}).items()]
    return found if row["status"] == "ok" else [f"{stage} {row['status']}: {one_line(row.get('error', ''))}", *found]


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
