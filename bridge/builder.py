"""The child process that parses and builds: ``python -m bridge.builder REPLY_FD``, a job as a JSON line on stdin.

Nothing here is called by the parent: TensorRT may crash, abort, hang or be killed in this process.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .build import BuildJob, BuildOutcome
from .builder_config import SettingRefused, make_config
from .gpu import why_it_cannot_be_used
from .inspection import built_layers, examine, low_subgraphs
from .layer_precisions import Demands, fused_with_others, lowered
from .network_layers import quantised_types
from .plugins.loading import NeededPlugin, PluginError, add_import_paths, load_plugins
from .subgraphs import Selection
from .target import MODULES, gpu_compute_capabilities
from .timing import TimingCache


def main() -> None:
    job = BuildJob(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_die_with_parent, daemon=True).start()
    outcome = run(job)
    with os.fdopen(int(sys.argv[1]), "w") as reply:
        json.dump(asdict(outcome), reply)


def _die_with_parent() -> None:
    sys.stdin.read()  # returns when the parent is gone
    os._exit(1)


def run(job: BuildJob) -> BuildOutcome:
    """Parses, builds through Polygraphy's loaders, checks what came out, and writes the engine."""
    trt, logger = _start(job)
    try:
        add_import_paths(job.paths)
        load_plugins([NeededPlugin(**plugin) for plugin in job.plugins], trt)
    except PluginError as error:
        return BuildOutcome(error=str(error))
    outcome, unquantised = _attempt(job, trt, logger)
    if unquantised and job.calibration and set(job.precision.split("+")) > {unquantised}:
        # Of kernels that are calibrated for both, the builder has taken the other ones throughout, as the faster ones.
        again, _ = _attempt(job, trt, logger, insist=True)
        outcome = outcome if again.error else again
    return outcome


def _attempt(job: BuildJob, trt: Any, logger: Any, *, insist: bool = False) -> tuple[BuildOutcome, str]:
    """What comes of a build; and the quantised precision that was asked for, and nothing of the engine is in.

    ``insist``: products that are to be in it are told so, and not left to TensorRT's choice.
    """
    from polygraphy.backend.trt import CreateNetwork
    from polygraphy.exception import PolygraphyException

    try:
        builder, network = CreateNetwork()()[:2]
    except (PolygraphyException, TypeError) as error:  # TypeError: the builder's constructor returned null
        cause = why_it_cannot_be_used() or logger.last_error or str(error)  # TensorRT may say nothing
        return BuildOutcome(error=f"the builder does not start: {cause}"), ""
    parser = trt.OnnxParser(network, logger)
    began = time.perf_counter()
    if not parser.parse_from_file(job.onnx):
        refusals = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
        return BuildOutcome(error="the parser refuses the model and does not say why", refusals=refusals), ""
    described: dict[str, Any] = {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
    }
    if not job.engine:
        return BuildOutcome(**described), ""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    inputs = (network.get_input(index) for index in range(network.num_inputs))
    described["by_value"] = any(tensor.is_shape_tensor for tensor in inputs)
    described["branches"] = any(layer.type.name == "CONDITION" for layer in layers)
    timings = TimingCache(Path(job.timing_cache)) if job.timing_cache else None
    try:
        engine, obeyed, told = _engine(job, trt, (builder, network, parser), logger, timings, insist)
    except SettingRefused as error:
        return BuildOutcome(error=str(error), **described), ""
    except PolygraphyException as error:
        # Polygraphy only knows that there is no engine; why, TensorRT has told its logger.
        why = f"the builder refuses the model: {logger.last_error or error}{_way_out(job, network)}"
        return BuildOutcome(error=why, **described), ""
    described["seconds"] = round(time.perf_counter() - began, 4)
    if timings is not None:
        timings.save()
    verdict = examine(job, trt, logger, network, engine, obeyed=obeyed)
    notes = [
        *told,
        *_sizes_by_value(network, job.values),
        *(timings.notes if timings is not None else ()),
        *verdict.notes,
    ]
    described |= {"notes": notes, "precisions": verdict.shares, "not_as_asked": verdict.others}
    if verdict.error:
        return BuildOutcome(error=verdict.error, **described), verdict.unquantised
    return _written(job, engine, described), ""


def _way_out(job: BuildJob, network: Any) -> str:
    """What helps where a weakly typed builder may lack kernels for what the bridge has quantised; empty elsewhere."""
    if job.strongly_typed or "int8" not in job.precision.split("+") or "int8" not in quantised_types(network):
        return ""
    return (
        ". If that is for want of an int8 kernel: a precision file keeps a node out of int8 (fp32: ['node:NAME']), and "
        "calibration_algorithm='ENTROPY_CALIBRATION_2' leaves it to TensorRT what is quantised"
    )


def _sizes_by_value(network: Any, values: Mapping[str, list[int]]) -> list[str]:
    """What is to be said of inputs whose values are sizes: profiles are of shapes, so the example's values it is, or
    Polygraphy's default, which is 1."""
    inputs = (network.get_input(index) for index in range(network.num_inputs))
    return [
        f"input {tensor.name!r}: its values are sizes or places in shapes (a shape tensor), of which a profile of "
        f"shapes says nothing: the engine takes no values but {_listed(values.get(tensor.name))}. Make it a constant, "
        "or take it from the shape of another input"
        for tensor in inputs
        if tensor.is_shape_tensor
    ]


def _listed(values: list[int] | None) -> str:
    if values is None:
        return "1 there"
    return f"the example's ({', '.join(map(str, values[:8]))}{', …' * (len(values) > 8)})"


def _start(job: BuildJob) -> tuple[Any, Any]:
    """TensorRT's module for the job, and the one logger of this process."""
    from polygraphy import config as polygraphy_config

    if job.flavour == "tensorrt-rtx":
        polygraphy_config.USE_TENSORRT_RTX = True  # read when polygraphy.backend.trt is imported
    import importlib

    trt = importlib.import_module(MODULES["tensorrt-rtx" if job.flavour == "tensorrt-rtx" else "tensorrt"])
    from polygraphy.backend.trt import util as polygraphy_trt
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    logger = _logger(trt)
    polygraphy_trt.TRT_LOGGER = logger  # the first logger of a process stays, so there is one
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    return trt, logger


def _written(job: BuildJob, engine: Any, described: dict[str, Any]) -> BuildOutcome:
    try:
        _write(Path(job.engine), engine)
    except OSError as error:
        return BuildOutcome(error=f"the engine cannot be written to {job.engine}: {error.strerror}", **described)
    here = [] if job.flavour == "tensorrt-rtx" else [list(pair) for pair in gpu_compute_capabilities()[:1]]
    return BuildOutcome(**described, compute_capabilities=job.compute_capabilities or here)


def _engine(
    job: BuildJob, trt: Any, parsed: tuple[Any, Any, Any], logger: Any, timings: TimingCache | None, insist: bool
) -> tuple[Any, bool, list[str]]:
    """The serialised engine; whether it keeps to the precisions of its layers; and what is to be said of that."""
    from polygraphy.backend.trt import EngineBytesFromNetwork
    from polygraphy.exception import PolygraphyException

    network, demands = parsed[1], Demands(insist=insist)
    loosened = ""
    while True:
        selection = Selection(job.of_tensorrt_8)
        config = make_config(job, trt, *parsed[:2], demands, None if demands.untimed else timings, selection)
        try:
            engine = EngineBytesFromNetwork(parsed, config=config)()
            looked_into = selection.wide and not demands.untimed
            if looked_into and selection.missed(low_subgraphs(built_layers(job, trt, logger, network, engine))):
                demands = replace(demands, untimed=True)
                continue
            return engine, not loosened, [*filter(None, [loosened]), *_freed(demands)]
        except PolygraphyException:
            refusal = next((words for words in logger.errors if _NO_KERNEL.search(words)), "")
            if not refusal or not lowered(job) or not job.layer_precisions or "strict_types" in job.builder:
                raise
            fused = fused_with_others(network, refusal) - demands.freed
            if fused:
                demands = replace(demands, freed=demands.freed | fused)
            elif demands.constraints == "obey":
                demands = replace(demands, constraints="prefer")
                loosened = f"{_LOOSENED['prefer']} ({refusal})"
            elif demands.constraints == "prefer" and quantised_types(network):
                demands = replace(demands, constraints="ignore")
                loosened = f"{_LOOSENED['ignore']} ({refusal})"
            else:
                raise
            logger.errors.clear()


def _freed(demands: Demands) -> list[str]:
    names = sorted(demands.freed)
    if not names:
        return []
    shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
    return [f"TensorRT has no kernel of two precisions for what it fuses: in that of the product before are {shown}"]


_NO_KERNEL = re.compile(
    r"requested constraints|PRECISION_CONSTRAINTS|find any implementation|incorrectly marked as an int8 node",
    re.IGNORECASE,
)
"""What TensorRT says where it has no kernel of the types that a layer was given."""
_LOOSENED = {
    "prefer": "TensorRT has no kernels that keep to the precision of every layer: they were preferred to others, and "
    "not obeyed at all costs",
    "ignore": "TensorRT has no kernels for what the model quantises beside layers whose precision is fixed: that was "
    "left to it",
}


def _refusal(error: Any) -> dict[str, Any]:
    """A parser's error; where its words are only 'false', the check that failed says more."""
    words = error.desc()
    check = error.func() if hasattr(error, "func") else ""
    if words.strip() in ("", "false") and check:
        words = f"{check} failed"
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    node = error.node_name() if hasattr(error, "node_name") else ""
    if not node and "In node " in words:
        node = words.split("with name: ", 1)[-1].split(" and operator", 1)[0]
    return {
        "operator": operator,
        "node": node,
        "index": error.node(),
        "words": _NO_GPU.sub("", " ".join(words.split())),
    }


_NO_GPU = re.compile(
    r"\[\S*catchCudaError\S*\] Error Code \d+: Cuda Runtime \(In catchCudaError.*?\(cudaError 35: [^)]*\)\) ?"
)
"""What TensorRT-RTX says among its words on every machine without a GPU."""


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).rsplit(".", 1)[-1], "shape": list(tensor.shape)}


def _write(path: Path, engine: Any) -> None:
    with path.open("wb") as file:
        file.write(memoryview(engine))


def _logger(trt: Any) -> Any:
    letters = {"INTERNAL_ERROR": "E", "ERROR": "E", "WARNING": "W", "INFO": "I"}

    class Logger(trt.ILogger):  # type: ignore[misc]
        """TensorRT's messages, one line each, to stderr."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            letter = letters.get(str(severity).rsplit(".", 1)[-1])
            if letter == "E":
                self.last_error = message
                self.errors.append(message)
            if letter:
                print(f"[{letter}] {message}", file=sys.stderr, flush=True)

    return Logger()


if __name__ == "__main__":
    main()
