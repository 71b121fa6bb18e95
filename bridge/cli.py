"""The command line: ``bridge convert SOURCE… -o DIR``, ``bridge explain``, ``bridge passes``, ``bridge cache`` and,
in ``cli_diff``, ``bridge diff``, ``bridge bisect`` and ``bridge verify``.

Exit status of ``convert``: 0 where every model was verified, built or rewritten; 2 for a wrong call, and where every
model that failed was wrongly described (an unknown input, a source that is not there); 1 for any other failure, a file
of the run that could not be written, and Ctrl-C. Of ``explain``: 0 where nothing is refused; 2 for a wrong call; or 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BridgeError, UsageError

if TYPE_CHECKING:
    from .result import ConversionResult
    from .spec import ModelSpec

_SOURCES = """\
A SOURCE is one of
  models.yaml               a manifest: `defaults`, and `models` with a name, a source and options for each
  model.onnx                an ONNX file; the model is named after it
  package.module:function   a function without arguments that returns (module, inputs), or (path of an .onnx
                            file, inputs); it is looked for in the current directory too, and names the model

The options hold for every model, and win over what a manifest says.

Each model gets a folder DIR/NAME: the models on the way, the engine, result.json, report.html, build.log (the
builder's own words) and convert.log (all else that was printed). DIR/summary.json and DIR/index.html hold the run.

Exit status: 0 where every model was verified, built or rewritten; 2 for a wrong call, and where every model that
failed was wrongly described; 1 for any other failure.
"""


_TARGET = "tensorrt or tensorrt-rtx, with a version where it is not the installed one (default: auto)"
_PLUGINS = "a function that makes plugins known (bridge.register_plugin); repeat for more"
_PRECISION = (
    "what is computed in what: fp32 (the default), fp16, bf16, int8, fp8, int4, two of them (int8+fp16), or the path "
    "of a precision file; several with commas between them (fp32,fp16) make an engine of each, and a table of what "
    "each costs"
)
_LAYERS = "do not measure how far each layer of a lower precision is off, which takes long for large models"
_BUILDER = "a setting of the builder (bridge.BuildSettings), such as workspace=1073741824; repeat for more"
_SHAPES = (
    "the shapes of an input, such as x=1x3x224x224:8x3x224x224:16x3x224x224; "
    "one shape alone makes it static; repeat for more inputs, and for the same input to make more optimization profiles"
)
_CONSTANT = "an input of an ONNX file that is a constant of the engine, such as use_cache_branch=true; repeat for more"
_CACHE = "the folder of engines that were built before (default: $BRIDGE_CACHE_DIR, or one of the user's)"
_EXPLAIN = """\
MODEL is an .onnx file or package.module:function, as for `bridge convert`, or a manifest with --only NAME.

The model is rewritten for the target; then the target's parser, and where that takes all its builder, is asked about
the rest. Of a target that is not installed here, a table of its operators is all that is known.

Exit status: 0 where nothing is refused; 2 for a wrong call; 1 where something is, and for any other failure.
"""


def main(argv: Sequence[str] | None = None, prog: str = "bridge") -> int:
    """The console script ``bridge``."""
    parser = argparse.ArgumentParser(prog=prog, description=sys.modules[__package__].__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _describe_convert(
        commands.add_parser(
            "convert",
            help="convert models to TensorRT engines",
            description="Converts models to TensorRT engines, and reports how far every step moved the outputs.",
            epilog=_SOURCES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _describe_explain(
        commands.add_parser(
            "explain",
            help="list what a target refuses of a model, and what would help",
            description="Lists each node that a target refuses, in its own words, and what would help.",
            epilog=_EXPLAIN,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _describe_cache(
        commands.add_parser(
            "cache",
            help="list the engines that are kept, or remove them",
            description="Lists the engines of the cache, the least recently used first.",
        )
    )
    _describe_passes(
        commands.add_parser(
            "passes",
            help="list the rules and passes that rewrite models",
            description="Lists the rules: what each replaces, why, and for which targets.",
        )
    )
    from .cli_diff import add_commands

    add_commands(commands)
    return _run(parser, argv)


def convert_main(argv: Sequence[str] | None = None) -> int:
    """``bridge convert`` without its first word, for ``scripts/convert.py``."""
    parser = argparse.ArgumentParser(
        description="Converts models to TensorRT engines, and reports how far every step moved the outputs.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _describe_convert(parser)
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    arguments = parser.parse_args(argv)
    arguments.command = [Path(parser.prog).name, *(sys.argv[1:] if argv is None else argv)]
    try:
        status: int = arguments.run(arguments)
    except UsageError as error:
        _complain(parser, str(error))
        return 2
    except BridgeError as error:
        _complain(parser, str(error))
        return 1
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to do but to go
        _complain(parser, str(error) or "interrupted")
        return 1
    return status


def _complain(parser: argparse.ArgumentParser, text: str) -> None:
    print(f"{parser.prog}: {text}", file=sys.stderr)


def _describe_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="a manifest, an ONNX file, or package.module:function (see below)")
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder that the results go to")
    add("--jobs", type=_count, default=1, metavar="N", help="models converted at the same time (default: 1)")
    add("--only", action="append", metavar="NAME", help="of all models, this one alone; repeat for more")
    options = parser.add_argument_group("options of the conversion")
    add = options.add_argument
    add("--target", help=_TARGET)
    add("--precision", type=_precisions, metavar="PRECISION[,PRECISION…]", help=_PRECISION)
    add("--calibration", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns typical inputs")
    add(
        "--calibration-algorithm",
        metavar="NAME",
        help="entropy (the default), minmax, …, or the name of a calibrator of TensorRT's",
    )
    add("--inputs", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns the inputs to compare with")
    add(
        "--shapes",
        dest="profiles",
        type=_shapes,
        action="append",
        metavar="INPUT=MIN:OPT:MAX",
        help=_SHAPES,
    )
    add(
        "--tolerance",
        type=_tolerance,
        action="append",
        metavar="[OUTPUT=]RTOL,ATOL",
        help="outputs agree where |candidate - reference| <= ATOL + RTOL * |reference|; repeat for more outputs",
    )
    add("--task-check", metavar="PACKAGE.MODULE:FUNCTION", help="whether the converted model still does its job")
    add("--timeout", type=float, metavar="SECONDS", help="for each model, from its start to its report")
    add("--build-timeout", type=float, metavar="SECONDS", help="for the build of each engine")
    add(
        "--compute-capability",
        dest="compute_capabilities",
        action="append",
        metavar="X.Y",
        help="of the GPUs that an engine is for, where none is here to ask; repeat for more",
    )
    add("--no-build", dest="build", action="store_false", default=None, help="stop at the model for the parser")
    add("--builder", type=_setting, action="append", metavar="NAME=VALUE", help=_BUILDER)
    add("--constant", dest="constants", type=_setting, action="append", metavar="INPUT=VALUE", help=_CONSTANT)
    add("--seed", type=int, help="of the inputs that are made up")
    add("--plugins", action="append", metavar="PACKAGE.MODULE:FUNCTION", help=_PLUGINS)
    add("--prove", action="store_true", default=None, help="run each match of the passes before and after, by itself")
    add("--latency", action="store_true", default=None, help="time a call of each engine, where a GPU here runs it")
    add("--no-layers", dest="layers", action="store_false", default=None, help=_LAYERS)
    add("--golden", action="store_true", default=None, help="keep inputs and outputs, for `bridge verify`")
    either = options.add_mutually_exclusive_group()
    either.add_argument("--cache", type=_folder, metavar="DIR", help=_CACHE)
    either.add_argument("--no-cache", dest="cache", action="store_false", help="build each engine anew, and keep none")
    parser.set_defaults(cache=None)


def _describe_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_explain)
    add = parser.add_argument
    add("source", metavar="MODEL", help="an ONNX file, or package.module:function (see below)")
    add("--target", help=_TARGET)
    add("--shapes", dest="profiles", type=_shapes, action="append", metavar="INPUT=MIN:OPT:MAX", help=_SHAPES)
    add("--inputs", metavar="PACKAGE.MODULE:FUNCTION", help="a function that returns example inputs")
    add("--constant", dest="constants", type=_setting, action="append", metavar="INPUT=VALUE", help=_CONSTANT)
    add("--only", metavar="NAME", help="of a manifest, the model to explain")
    add("--plugins", action="append", metavar="PACKAGE.MODULE:FUNCTION", help=_PLUGINS)
    add("--build-timeout", type=float, metavar="SECONDS", help="for each question to the parser or builder")
    add("--no-build", dest="build", action="store_false", default=None, help="ask the parser alone")
    add("--json", action="store_true", help="for programs: all that is known of each node")


def _describe_cache(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_cache)
    parser.add_argument("--cache", type=_folder, metavar="DIR", help=_CACHE)
    parser.add_argument("--clear", action="store_true", help="remove all that no other process is using")


def _describe_passes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_passes)
    parser.add_argument("--target", help="only what applies to this one, such as tensorrt-8.5")
    parser.add_argument("--json", action="store_true", help="for programs")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of models")
    return int(text)


def _shapes(text: str) -> tuple[str, Any]:
    from .spec import read_profile

    name, equals, shapes = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} names no input; write INPUT=SHAPE or INPUT=MIN:OPT:MAX")
    try:
        return name, read_profile(shapes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"input {name!r}: {error}") from error


def _precisions(text: str) -> str | list[str]:
    return text if Path(text).is_file() or "," not in text else [part.strip() for part in text.split(",")]


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE, such as optimization_level=5")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"True": True, "False": False}.get(value, value)


def _tolerance(text: str) -> tuple[str, Mapping[str, float]]:
    output, _, numbers = text.rpartition("=")
    try:
        rtol, atol = (float(number) for number in numbers.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form RTOL,ATOL or OUTPUT=RTOL,ATOL") from error
    return output, {"rtol": rtol, "atol": atol}


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as the keys of a manifest."""
    from .spec import Options

    given = {key: getattr(arguments, key, None) for key in Options.model_fields}
    given["profiles"] = _profiles(given["profiles"] or [])
    for key in ("tolerance", "builder", "constants"):
        pairs = given[key] or []
        twice = sorted({name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1})
        if twice:
            raise UsageError(f"--{key.removesuffix('s')} was given twice for {' and '.join(map(repr, twice))}")
        given[key] = dict(pairs) or None
    tolerance = given["tolerance"]
    if tolerance and "" in tolerance:
        if len(tolerance) > 1:
            raise UsageError("--tolerance: give one for all outputs, or one for each output, not both")
        given["tolerance"] = tolerance[""]
    return {key: value for key, value in given.items() if value is not None}


def _profiles(pairs: Sequence[tuple[str, Any]]) -> Any:
    """The first shapes of each input are the first optimization profile, the second ones the second, and so on.

    An input that is given once has these shapes in all of them.
    """
    shapes: dict[str, list[Any]] = {}
    for name, given in pairs:
        shapes.setdefault(name, []).append(given)
    count = max(map(len, shapes.values()), default=0)
    for name, given in shapes.items():
        if len(given) not in (1, count):
            raise UsageError(
                f"--shapes was given {len(given)} times for {name!r} and {count} times for another input; for several "
                "optimization profiles, give each input as often, or once for all of them"
            )
    listed = [{name: given[min(index, len(given) - 1)] for name, given in shapes.items()} for index in range(count)]
    return listed if count > 1 else listed[0] if listed else None


def _convert(arguments: argparse.Namespace) -> int:
    from .batch import BatchError, BatchInterrupted, run_batch
    from .manifest import read_sources
    from .progress import make_progress, print_results
    from .spec import by_precision
    from .trade_off import trade_offs

    specs = read_sources(arguments.sources, _overrides(arguments))
    if arguments.only:
        specs = _only(specs, arguments.only)
    try:
        results = run_batch(
            specs,
            arguments.output,
            progress=make_progress(sum(len(by_precision(spec)) or 1 for spec in specs)),
            jobs=arguments.jobs,
            command=arguments.command,
        )
    except (BatchError, BatchInterrupted) as error:
        if error.results:
            print_results(error.results, arguments.output)
        raise
    print_results(results, arguments.output)
    for made in trade_offs(specs, results):
        print(f"\n{made.name}\n{made.table()}")
    return exit_status(results)


def _explain(arguments: argparse.Namespace) -> int:
    from .manifest import read_sources

    specs = read_sources([arguments.source], _overrides(arguments))
    if arguments.only:
        specs = _only(specs, [arguments.only])
    if len(specs) != 1:
        raise UsageError(f"{arguments.source}: holds {len(specs)} models; choose one with --only NAME")
    sys.path.insert(0, str(Path.cwd()))
    from .explanation import explain
    from .worker import load_model

    spec = specs[0]
    keys = ("target", "profiles", "input_names", "output_names", "constants", "build", "build_timeout")
    options = {key: getattr(spec, key) for key in keys if getattr(spec, key) is not None}
    with contextlib.redirect_stdout(sys.stderr):  # what an exporter prints is no part of the answer
        source, inputs = load_model(spec)
        found = explain(source, inputs, name=spec.name, **options)
    sys.stdout.write(found.to_json() if arguments.json else str(found))
    return 0 if found.ok else 1


def _passes(arguments: argparse.Namespace) -> int:
    from .listing import as_json, as_text, library
    from .target import resolve

    target = resolve(arguments.target) if arguments.target is not None else None
    entries = library(target)
    sys.stdout.write(as_json(entries) if arguments.json else as_text(entries, target))
    return 0


def _folder(text: str) -> str:
    return str(Path(text).expanduser().absolute())


def _cache(arguments: argparse.Namespace) -> int:
    from .cache import EngineCache, as_text

    cache = EngineCache(arguments.cache)
    try:
        if arguments.clear:
            count = cache.clear()
            print(f"{cache.folder}: {count} engine{'' if count == 1 else 's'} removed")
        else:
            print(as_text(cache))
    except OSError as error:
        raise BridgeError(f"{error.filename or cache.folder}: {error.strerror or error}") from error
    return 0


def _only(specs: Sequence[ModelSpec], names: Sequence[str]) -> list[ModelSpec]:
    known = [spec.name for spec in specs]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--only: no model is called {' or '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [spec for spec in specs if spec.name in names]


def exit_status(results: Sequence[ConversionResult]) -> int:
    """0, 1 or 2, as the module says."""
    failed = [result for result in results if not result.ok]
    if not failed:
        return 0
    return 2 if all(isinstance(result.exception, UsageError) for result in failed) else 1
