"""``bridge diff``, ``bisect`` and ``verify``: where an error comes from, which nodes to keep in float32, what two runs
changed, and whether an engine holds.

Exit status of ``diff``: 0 where all agrees, or nothing regressed; 1 where not, or where a metric could not be measured.
Of ``bisect``: 0 where a precision holds; 1 where none was found. Of ``verify``: 0 where the engine agrees with the
evidence; 1 where it does not, or the evidence is damaged; 2 where the engine cannot run here. Of all: 2 for a wrong
call, 1 for other failures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cli
from .errors import BridgeError, UsageError
from .workspace import GOLDEN

if TYPE_CHECKING:
    from .diff.model import DiffReport
    from .diff.verification import VerifyReport
    from .result import Tolerance
    from .spec import ModelSpec

_DIFF = """\
MODEL is an .onnx file or package.module:function, as for `bridge convert`, a manifest with --only NAME, or the folder
of a conversion: then its files are compared as they are, and --module is the module that they were made of. Of a folder
with a diff.json, --tolerance alone judges anew what was measured, and runs nothing.

RUN is a folder that `bridge convert -o DIR` wrote, its summary.json, or a model's result.json.

Exit status: 0 where all agrees, or no model regressed beyond the limits; 1 where not, or where --metric could not be
measured; 2 for a wrong call.
"""
_VERIFY = """\
DIR is the folder of a conversion with --golden (its golden.json, golden.npz and model.engine), or that of a run of
such, which are then verified one after the other. What the engine computes is kept there as engine-run.json and
engine-run.npz; --tolerance then judges that anew, and runs nothing.

Exit status: 0 where the engine agrees; 1 where it does not, or a file was cut short or changed; 2 for a wrong call, and
where the engine cannot run here.
"""
_BISECT = """\
Finds a small set of nodes that have to stay in float32 for the tolerance to hold, by measuring how sensitive each is
and by few builds, and writes DIR/precision.yaml, which `bridge convert --precision` takes. Where no GPU here can run
the engines, the model is evaluated with every value really rounded instead.

Exit status: 0 where such a set was found, or none is needed; 1 where not; 2 for a wrong call.
"""
_TOLERANCE = "outputs agree where |candidate - reference| <= ATOL + RTOL * |reference|; repeat for more outputs"
_OF_A_MODEL = (
    *("target", "precision", "inputs", "profiles", "tolerance", "seed", "plugins", "only", "calibration"),
    *("samples", "metric", "stages", "module", "layers", "build", "builder", "cache"),
)
_NOT_BISECTED = ("task_check", "build", "prove", "layers", "latency", "golden")
"""What of a model's options says how it is converted once, and nothing of what it computes."""
_OF_RUNS = ("status", "accuracy", "latency", "size", "noise")


def describe_diff(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_diff)
    add = parser.add_argument
    add("first", metavar="MODEL | RUN", help="a model, or the run to compare with")
    add("second", metavar="RUN", nargs="?", help="the run that is judged")
    add("-o", "--output", type=Path, metavar="DIR", help="the folder that the reports go to")
    add("--json", action="store_true", help="print what was found as JSON, for programs")
    model = parser.add_argument_group("of a model").add_argument
    _describe_model(model)
    model("--precision", help="what is computed in what, as for `bridge convert`")
    model("--metric", metavar="PACKAGE.MODULE:FUNCTION", help="a task metric, which is given outputs and inputs")
    model("--stages", type=_listed, metavar="STAGE,STAGE", help="of torch, exported, rewritten, typed and engine")
    model("--no-layers", dest="layers", action="store_false", default=None, help="compare no layers")
    model("--module", metavar="PACKAGE.MODULE:FUNCTION", help="of a folder, what it was converted from")
    model("--no-build", dest="build", action="store_false", default=None, help="build no engine")
    runs = parser.add_argument_group("of two runs: what is a regression, which makes the exit status 1").add_argument
    runs("--status", choices=("drop", "failed", "off"), help="a lower status (the default), a failure alone, or none")
    runs("--accuracy", type=_factor, metavar="FACTOR", help="how many times as large an error may be (default: 2)")
    runs("--latency", type=_factor, metavar="FACTOR", help="how many times as long a call may take (default: 1.1)")
    runs("--size", type=_factor, metavar="FACTOR", help="how many times as large an engine may be (default: 1.1)")
    runs("--noise", type=float, metavar="SHARE", help="of the tolerance, below which errors are not compared (0.01)")


def _describe_model(add: Any) -> None:
    """What `diff` and `bisect` have of `convert`."""
    add("--only", metavar="NAME", help="of a manifest, this model")
    add("--target", help=cli._TARGET)
    add("--tolerance", type=cli._tolerance, action="append", metavar="[OUTPUT=]RTOL,ATOL", help=_TOLERANCE)
    add("--samples", metavar="DATA", help="real inputs: a folder, an .npz file, or package.module:function")
    add("--shapes", dest="profiles", type=cli._shapes, action="append", metavar="INPUT=MIN:OPT:MAX", help=cli._SHAPES)
    add("--inputs", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns example inputs")
    add("--calibration", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns typical inputs")
    add("--builder", type=cli._setting, action="append", metavar="NAME=VALUE", help=cli._BUILDER)
    add("--seed", type=int, help="of the inputs that are made up")
    add("--plugins", action="append", metavar="PACKAGE.MODULE:FUNCTION", help=cli._PLUGINS)
    add("--cache", type=cli._folder, metavar="DIR", default=None, help=cli._CACHE)
    add("--no-cache", dest="cache", action="store_false", help="build each engine anew, and keep none")


def describe_bisect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bisect)
    add = parser.add_argument
    add("first", metavar="MODEL", help="an ONNX file, package.module:function, or a manifest with --only NAME")
    add("--precision", required=True, help="the one in which the model is beyond its tolerance, such as fp16")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder that the precision file goes to")
    add("--builds", type=int, default=15, metavar="N", help="how many engines may be built or evaluated (default: 15)")
    add("--json", action="store_true", help="print what was found as JSON, for programs")
    _describe_model(add)


def describe_verify(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_verify)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a conversion's folder with its evidence (--golden)")
    add("--tolerance", type=cli._tolerance, action="append", metavar="[OUTPUT=]RTOL,ATOL", help=_TOLERANCE)
    add("--engine", type=Path, metavar="FILE", help="another engine of the same model, built on this machine, say")
    add("--against", default="rewritten", metavar="STAGE", help="rewritten (the default), or torch (exported)")
    add("--json", action="store_true", help="print what was found as JSON, for programs")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--run", dest="again", action="store_true", default=None, help="run it whatever is known of it")
    either.add_argument(
        "--recorded", dest="again", action="store_false", help="judge what it computed when it last ran"
    )


def add_commands(commands: Any) -> None:
    """Adds them to the subparsers of ``bridge``."""
    for name, words, epilog, describe in (
        ("diff", "say which stage and layer an error comes from, or compare two runs", _DIFF, describe_diff),
        ("bisect", "find the few nodes that a low precision must leave in float32", _BISECT, describe_bisect),
        ("verify", "hold an engine to what it is to compute, where it runs", _VERIFY, describe_verify),
    ):
        style = argparse.RawDescriptionHelpFormatter
        text = f"{words[0].upper()}{words[1:]}."
        describe(commands.add_parser(name, help=words, description=text, epilog=epilog, formatter_class=style))


def _factor(text: str) -> float | str:
    if text == "off":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a factor, such as 1.5, nor 'off'") from error


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def tolerances(pairs: Sequence[tuple[str, Mapping[str, float]]] | None) -> Tolerance | dict[str, Tolerance] | None:
    """Of --tolerance. Raises UsageError where one is given twice, or both for all outputs and for one."""
    from .result import Tolerance

    found: dict[str, Tolerance] = {}
    for name, numbers in pairs or ():
        if name in found:
            raise UsageError(f"--tolerance was given twice for {name!r}")
        if not all(0 <= number < float("inf") for number in numbers.values()):
            raise UsageError(f"--tolerance: {numbers['rtol']},{numbers['atol']}: give two finite numbers from 0 on")
        found[name] = Tolerance(numbers["rtol"], numbers["atol"])
    if "" in found and len(found) > 1:
        raise UsageError("--tolerance: give one for all outputs, or one for each output, not both")
    return found.get("") or found or None


# --- diff --------------------------------------------------------------------------------------------------------


def _diff(arguments: argparse.Namespace) -> int:
    if arguments.second is not None:
        _refuse(arguments, _OF_A_MODEL, "is of a model, and two runs were given")
        return _diff_runs(arguments)
    _refuse(arguments, _OF_RUNS, "is of two runs, and one model was given")
    report, folder = _diff_model(arguments)
    if folder is not None:
        _write(folder, _model_files(report))
    sys.stdout.write(report.to_json() if arguments.json else f"{report.verdict}\n")
    if folder is not None and not arguments.json:
        print(f"see {folder / 'diff.html'}")
    for metric in report.metrics:
        if metric.failed:
            print(f"bridge: metric {metric.name!r} at {metric.stage}: {metric.note}", file=sys.stderr)
    return report.exit_status


def _refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            option = {"profiles": "shapes", "layers": "no-layers", "build": "no-build"}.get(name, name)
            raise UsageError(f"--{option} {why}")


def _diff_runs(arguments: argparse.Namespace) -> int:
    from .diff.runs import Limits, compare_runs
    from .diff.runs_report import as_html, as_junit, as_markdown, as_text

    given = {name: getattr(arguments, name) for name in _OF_RUNS if getattr(arguments, name) is not None}
    chosen: dict[str, Any] = {name: None if value == "off" else value for name, value in given.items()}
    limits = Limits(**chosen)
    report = compare_runs(arguments.first, arguments.second, limits)
    if arguments.output is not None:
        files = {"runs.json": report.to_json(), "runs.xml": as_junit(report), "runs.md": as_markdown(report)}
        _write(arguments.output, {**files, "runs.html": as_html(report)})
    sys.stdout.write(report.to_json() if arguments.json else as_text(report))
    return report.exit_status


def _write(folder: Path, files: Mapping[str, str]) -> None:
    from .workspace import write_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise BridgeError(f"{error.filename or folder}: {error.strerror or error}") from error


def _model_files(report: DiffReport) -> dict[str, str]:
    from .diff.render import render_html, render_markdown

    return {"diff.json": report.to_json(), "diff.html": render_html(report), "diff.md": render_markdown(report)}


def _diff_model(arguments: argparse.Namespace) -> tuple[DiffReport, Path | None]:
    """The report, and the folder that it goes to."""
    folder = Path(arguments.first)
    if not folder.is_dir():
        return _convert_and_diff(arguments)
    given = [name for name in _OF_A_MODEL if getattr(arguments, name) is not None]
    if given == ["tolerance"] and (folder / "diff.json").is_file():
        from .diff.model import DiffReport
        from .diff.rejudge import rejudge

        report = rejudge(DiffReport.load(folder / "diff.json"), tolerances(arguments.tolerance))
        return _seen_from(report, folder, arguments.output), arguments.output
    return _diff_folder(arguments, folder), arguments.output or folder


def _seen_from(report: DiffReport, folder: Path, output: Path | None) -> DiffReport:
    """With the way to the worst sample's file from the folder ``output``."""
    samples = report.samples
    if output is None or samples is None or not samples.worst_file:
        return report
    path = os.path.relpath(folder / samples.worst_file, output)
    return replace(report, samples=replace(samples, worst_file=Path(path).as_posix()))


def _convert_and_diff(arguments: argparse.Namespace) -> tuple[DiffReport, Path]:
    from .worker import convert_options, load_model

    spec = _spec(arguments)
    if arguments.output is None:
        raise UsageError("-o DIR: name the folder that the conversion and the reports go to")
    if arguments.module is not None:
        raise UsageError(f"--module is of a conversion's folder, and {arguments.first} is none")
    sys.path.insert(0, str(Path.cwd()))
    with contextlib.redirect_stdout(sys.stderr):  # what an exporter prints is no part of the answer
        from .diff.measure import diff

        source, inputs = load_model(spec)
        options = {**convert_options(spec), **_measuring(arguments)}
        report = diff(source, inputs, workdir=arguments.output, **options)
    return report, arguments.output


def _spec(arguments: argparse.Namespace) -> ModelSpec:
    """The one model that is meant."""
    from .manifest import read_sources

    specs = read_sources([arguments.first], cli._overrides(arguments))
    chosen = cli._only(specs, [arguments.only]) if arguments.only else specs
    if len(chosen) != 1:
        raise UsageError(f"{arguments.first}: holds {len(chosen)} models; choose one with --only NAME")
    if isinstance(chosen[0].precision, list):
        raise UsageError(f"{chosen[0].name}: has several precisions; choose one with --precision")
    return chosen[0]


def _diff_folder(arguments: argparse.Namespace, folder: Path) -> DiffReport:
    from .diff.measure import diff
    from .worker import call

    for name in ("only", "target", "precision", "build", "builder", "cache", "calibration"):
        _refuse(arguments, [name], f"is of a conversion, and {folder} is a finished one")
    overrides = cli._overrides(argparse.Namespace(profiles=arguments.profiles, seed=arguments.seed))
    sys.path.insert(0, str(Path.cwd()))
    with contextlib.redirect_stdout(sys.stderr):
        for function in arguments.plugins or ():
            call(function)
        module, inputs = call(arguments.module) if arguments.module is not None else (None, None)
        if arguments.inputs is not None:
            inputs = call(arguments.inputs)
        limits = {"tolerance": tolerances(arguments.tolerance), "workdir": arguments.output, "module": module}
        return diff(folder, inputs, **limits, **overrides, **_measuring(arguments))


def _measuring(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said of the diff itself."""
    from .spec import FUNCTION
    from .worker import find_function

    names = ("samples", "metric", "stages", "layers")
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    samples = given.get("samples")
    if samples is not None and not Path(samples).exists() and FUNCTION.fullmatch(samples):
        given["samples"] = find_function(samples)
    return given


def _bisect(arguments: argparse.Namespace) -> int:
    from .worker import convert_options, load_model

    spec = _spec(arguments)
    sys.path.insert(0, str(Path.cwd()))
    with contextlib.redirect_stdout(sys.stderr):
        from .diff.bisection import bisect

        source, inputs = load_model(spec)
        options = {key: value for key, value in convert_options(spec).items() if key not in _NOT_BISECTED}
        samples = _measuring(arguments).get("samples")
        found = bisect(source, inputs, workdir=arguments.output, builds=arguments.builds, samples=samples, **options)
    if arguments.json:
        print(found.to_json())
    else:
        print("\n".join([found.verdict, *(f"  {kept}" for kept in found.kept), *([found.latency] * bool(found.kept))]))
        if found.file is not None:
            print(f"see {found.file}")
        for note in found.notes:
            print(f"note: {note}")
    return 0 if found.status in ("held", "found") else 1


# --- verify ------------------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    """Of one conversion, or of each of a run; a damaged one costs itself."""
    folder: Path = arguments.folder
    inner = [] if (folder / GOLDEN).is_file() else sorted(path.parent for path in folder.glob(f"*/{GOLDEN}"))
    if not inner:
        report = _verified(arguments, folder)
        sys.stdout.write(report.to_json() if arguments.json else str(report))
        return report.exit_status
    if arguments.engine is not None:
        raise UsageError(f"--engine is of one conversion, and {folder} holds {len(inner)}")
    reports, damaged = [], []
    for one in inner:
        try:
            reports.append(_verified(arguments, one))
        except UsageError:
            raise
        except BridgeError as error:
            damaged.append(str(error))
            print(f"bridge: {error}", file=sys.stderr)
        else:
            sys.stdout.write("" if arguments.json else str(reports[-1]))
    if arguments.json:
        print(
            json.dumps({"schema": 1, "models": [report.to_dict() for report in reports], "damaged": damaged}, indent=2)
        )
    found = {report.exit_status for report in reports} | ({1} if damaged else set())
    return 1 if 1 in found else max(found)


def _verified(arguments: argparse.Namespace, folder: Path) -> VerifyReport:
    from .diff.evidence import verify

    limits, engine = tolerances(arguments.tolerance), arguments.engine
    return verify(folder, limits, engine=engine, against=arguments.against, run=arguments.again)
