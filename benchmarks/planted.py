"""Are planted faults found? One layer's weights are changed in a finished conversion, and the diff has to name it.

Each node of the rewritten (or exported) model that has weights of its own is changed in turn, by noise of a share of
its weights, and the first layer that the report names is compared with it::

    python -m benchmarks.planted FILE_OF_MODELS resnetish attn_mha …    # FILE has M: {name: (constructor, inputs, …)}
    python -m benchmarks.planted FILE_OF_MODELS resnetish … --in precision --target tensorrt

``--in precision`` changes no weights: the node computes in float16 and all others in float32, in the engine too where
one can run here. ``--in nothing`` plants none: no layer may be said to diverge, of the models named or else of all.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from bridge.diff.measure import diff
from bridge.diff.model import DiffReport
from passes.provenance import origin_of

from .torch_models import load

NOISE = 0.05
"""Of the weights' root mean square."""


def weighted(model: ModelProto) -> Iterator[tuple[NodeProto, str]]:
    """The nodes with a weight of several floats that no other node reads, and that weight's name."""
    floats = {
        item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT and np.prod(item.dims) >= 4
    }
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in model.graph.node:
        for name in node.input:
            if name in floats and readers[name] == 1:
                yield node, name
                break


def plant(path: Path, weight: str, seed: int = 0, noise: float = NOISE) -> None:
    """Adds noise to a weight of the ONNX file."""
    model = onnx.load(str(path))
    item = next(item for item in model.graph.initializer if item.name == weight)
    values = onnx.numpy_helper.to_array(item)
    scale = noise * float(np.sqrt(np.mean(np.square(values.astype(np.float64))))) or noise
    changed = values + scale * np.random.default_rng(seed).standard_normal(values.shape).astype(values.dtype)
    item.CopyFrom(onnx.numpy_helper.from_array(changed.astype(values.dtype), weight))
    onnx.save(model, str(path))


def places(path: Path, most: int | None) -> list[tuple[NodeProto, str]]:
    """Where faults are put; ``most``: so many, spread over the model."""
    found = list(weighted(onnx.load(str(path))))
    if most is None or len(found) <= most:
        return found
    return [found[(2 * index + 1) * len(found) // (2 * most)] for index in range(most)]


@dataclass(frozen=True)
class Outcome:
    """One fault."""

    node: str
    named: str
    found: bool
    seconds: float
    verdict: str


def named(report: DiffReport) -> Any:
    """The layer that the report names first; None where it names none."""
    index = report.first_diverging if report.first_diverging is not None else next(iter(report.ranking), None)
    return report.layers[index] if index is not None else None


def outcomes(
    folder: Path, inputs: Any, module: Any, which: str = "rewritten", most: int | None = None
) -> Iterator[Outcome]:
    """What the diff makes of a fault in each weighted node of one of a conversion's models."""
    path = folder / f"{which}.onnx"
    for node, weight in places(path, most):
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "conversion"
            shutil.copytree(folder, copy)
            plant(copy / path.name, weight)
            if which == "exported":  # what was made of it has the fault too
                plant_same(copy / "rewritten.onnx", weight)
            start = time.perf_counter()
            report = diff(copy, inputs, module=module)
            layer = named(report)
            found = layer is not None and (layer.tensor in node.output or layer.node == node.name)
            if which == "exported" and layer is not None and layer.reference == "torch":
                found = found or _around(layer.module, node, onnx.load(str(path)).graph.node)
            yield Outcome(node.name, str(layer), found, time.perf_counter() - start, report.verdict)


def outcomes_of_precision(
    folder: Path, inputs: Any, module: Any, target: str, most: int | None = None
) -> Iterator[Outcome]:
    """What the diff makes of each weighted node that alone computes in float16; the folder has the same in float32."""
    import bridge

    for node, _ in places(folder / "rewritten.onnx", most):
        with tempfile.TemporaryDirectory() as name:
            precision = {"precision": "fp32", "fp16": [f"node:{node.name}"]}
            result = bridge.convert(module, inputs, workdir=name, target=target, precision=precision, layers=False)
            start = time.perf_counter()
            report = diff(name, inputs, module=module)
            layer = named(report)
            found = layer is not None and layer.node == node.name
            own = [item for item in report.layers if item.node == node.name]
            shown = "; ".join(
                f"{item} at {item.candidate} introduces {item.introduced.relative if item.introduced else None}"
                for item in ([layer] if layer is not None else []) + own
            )
            shown = shown or f"nothing; {result.status}"
            said = "\n    ".join([report.verdict, *report.notes])
            yield Outcome(node.name, shown, found, time.perf_counter() - start, said)


def outcome_of_nothing(folder: Path, inputs: Any, module: Any) -> Iterator[Outcome]:
    """Whether the diff of a sound conversion finds it so."""
    start = time.perf_counter()
    report = diff(folder, inputs, module=module)
    index = report.first_diverging
    layer = "" if index is None else str(report.layers[index])
    yield Outcome("nothing", layer, report.ok and index is None, time.perf_counter() - start, report.verdict)


def _around(module: str, node: NodeProto, nodes: Sequence[NodeProto]) -> bool:
    """Whether the node is part of the torch module: hooks see what modules return, and not what is inside."""
    own = _home(node, nodes)
    return own == module or own.startswith(f"{module}.")


def _home(node: NodeProto, nodes: Sequence[NodeProto]) -> str:
    """The module that the node is of; of one that does not say, as some that take weights apart, its readers'."""
    own = origin_of(node.name, {item.key: item.value for item in node.metadata_props}).module
    readers = (item for item in nodes if not own and set(item.input) & set(filter(None, node.output)))
    return own or next(filter(None, (_home(item, nodes) for item in readers)), "")


def plant_same(path: Path, weight: str, noise: float = NOISE) -> None:
    """The same noise in another model, where that has the weight."""
    if any(item.name == weight for item in onnx.load(str(path)).graph.initializer):
        plant(path, weight, noise=noise)


def main() -> None:
    import bridge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--in", dest="which", choices=("rewritten", "exported", "precision", "nothing"), default="rewritten"
    )
    parser.add_argument("--target", default="tensorrt-rtx")
    parser.add_argument("--most", type=int, help="faults of each model")
    arguments = parser.parse_args()
    models = load(arguments.models)
    unknown = [name for name in arguments.names if name not in models]
    if unknown:
        parser.error(f"{arguments.models} has no model {unknown[0]!r}")
    for name in arguments.names or models:
        constructor, inputs, *_ = models[name]
        module = constructor().eval()
        with tempfile.TemporaryDirectory() as folder:
            result = bridge.convert(module, inputs, workdir=folder, target=arguments.target, build=False)
            if not result.ok:
                print(f"{name}: {result.error}")
                continue
            if arguments.which == "nothing":
                found = outcome_of_nothing(Path(folder), inputs, module)
            elif arguments.which == "precision":
                found = outcomes_of_precision(Path(folder), inputs, module, arguments.target, arguments.most)
            else:
                found = outcomes(Path(folder), inputs, module, arguments.which, arguments.most)
            tried = []
            for outcome in found:
                tried.append(outcome)
                if not outcome.found:
                    print(f"  {name}: planted in {outcome.node}, named {outcome.named}\n    {outcome.verdict}")
            slowest = max((item.seconds for item in tried), default=0.0)
            print(
                f"{name}: {sum(item.found for item in tried)} of {len(tried)} found, {slowest:.2f} s at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
