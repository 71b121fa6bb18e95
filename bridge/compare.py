"""How far two neighbouring stages are apart, output by output: Polygraphy runs them, NumPy measures.

A stage is anything that Polygraphy has a runner for: the torch module, an ONNX model in ONNX Runtime, an engine.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RunError
from .norms import greatest, norm, share
from .precision import default_tolerance
from .result import Comparison, Histogram, SourceError, Tolerance

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Tolerances = Tolerance | Mapping[str, Tolerance] | None

DEFAULT_TOLERANCES = {
    "float64": Tolerance(1e-3, 1e-4),
    "float32": Tolerance(1e-3, 1e-4),
    "float16": Tolerance(1e-2, 1e-2),
    "bfloat16": Tolerance(5e-2, 5e-2),
}
"""By the coarser dtype of the two sides; integers and booleans must be equal, in a lower precision nearly all."""
EXACT = Tolerance(0.0, 0.0)
MOST_TIPPED = 0.05
"""Share of integers and booleans that may differ in a lower precision, whichever it is."""
_COARSENESS = ("bfloat16", "float16", "float32", "float64")

_EDGES = [10.0**exponent for exponent in range(-12, 7)]


def tolerance_for(output: str, reference: str, candidate: str, given: Tolerances, precision: str = "fp32") -> Tolerance:
    """The tolerance of an output whose dtypes on the two sides are these; ``given`` goes before the defaults.

    ``precision`` is what the candidate may have been computed in, whatever its dtype.
    """
    if isinstance(given, Tolerance):
        given = {"": given}
    if given and output in given:
        return given[output]
    lowered = default_tolerance(precision)
    if not any(name in _COARSENESS for name in (reference, candidate)):
        return EXACT if lowered is None else Tolerance(min(lowered.rtol, MOST_TIPPED), 0.0, whole=True)
    if given and "" in given:
        return given[""]
    if lowered is not None:
        return lowered
    return DEFAULT_TOLERANCES[next(name for name in _COARSENESS if name in (reference, candidate))]


def compare_arrays(
    reference: Array,
    candidate: Array,
    *,
    stages: tuple[str, str],
    inputs: str,
    output: str,
    tolerance: Tolerances,
    precision: str = "fp32",
) -> Comparison:
    """Measures one output. NaN agrees with NaN and infinity with the same infinity, at the same place."""
    used = tolerance_for(output, str(reference.dtype), str(candidate.dtype), tolerance, precision)
    frame: dict[str, Any] = {
        "reference": stages[0],
        "candidate": stages[1],
        "inputs": inputs,
        "output": output,
        "reference_shape": list(reference.shape),
        "candidate_shape": list(candidate.shape),
        "reference_dtype": str(reference.dtype),
        "candidate_dtype": str(candidate.dtype),
        "tolerance": used,
    }
    a, b = _wide(reference), _wide(candidate)
    for side, values in (("reference", a), ("candidate", b)):
        frame[f"{side}_nan"] = int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0
        frame[f"{side}_inf"] = int(np.isinf(values).sum()) if values.dtype.kind == "f" else 0
    if a.shape != b.shape:
        note = f"shapes differ: {list(a.shape)} in {stages[0]}, {list(b.shape)} in {stages[1]}"
        return Comparison(**frame, **_NO_FIGURES, agreed=False, note=note)
    if a.dtype.kind != b.dtype.kind:
        a, b = a.astype(np.float64), b.astype(np.float64)
    if a.dtype.kind != "f":
        error = np.where(a > b, a - b, b - a).view(np.uint64).astype(np.float64)  # int64's extremes are 2**64 apart
        figures = _figures(a.astype(np.float64), b.astype(np.float64), error, used)
        if used.whole:
            taken, note = _share_that_differs(a != b, used)
            figures = {**figures, "tolerance_used": taken}
            return Comparison(**frame, **figures, agreed=taken is not None and taken <= 1, note=note)
        agreed = bool((a == b).all()) if used == EXACT else _within(a.astype(np.float64), error, used)
        return Comparison(**frame, **figures, agreed=agreed)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(b - a)
    figures = _figures(a[finite], b[finite], error[finite], used)
    placed = bool((same | finite).all())
    if used.whole:
        taken, note = _as_a_whole(a[finite], error[finite], used, figures["cosine_similarity"])
        if not placed:
            note = f"infinite or NaN at {int((~(same | finite)).sum())} of {a.size} places where one side is not"
        figures = {**figures, "tolerance_used": taken}
        return Comparison(**frame, **figures, agreed=placed and taken is not None and taken <= 1, note=note)
    return Comparison(**frame, **figures, agreed=placed and _within(a[finite], error[finite], used))


def _wide(array: Array) -> Array:
    """The same values in a type that NumPy can measure with: float64, or the widest integer."""
    if array.dtype.kind in "fV" or "float" in array.dtype.name:
        return array.astype(np.float64)
    return array.astype(np.uint64 if array.dtype == np.uint64 else np.int64)


def _within(reference: Array, error: Array, tolerance: Tolerance) -> bool:
    return bool((error <= tolerance.atol + tolerance.rtol * np.abs(reference)).all())


@np.errstate(over="ignore")
def _as_a_whole(reference: Array, error: Array, used: Tolerance, cosine: float | None) -> tuple[float | None, str]:
    """How much of the tolerance the error's norm takes, and in words. A cosine alone would not see a wrong scale."""
    size, off = norm(reference), norm(error)
    allowed = used.atol * math.sqrt(reference.size) + used.rtol * size
    words = f"judged as a whole: the error's norm is {off:.3g}, that of the output {size:.3g} "
    words += f"(a share of {used.rtol:g} is allowed)"
    if cosine is not None:
        words += f", their cosine similarity {cosine:.4f}"
    return share(off, allowed), words


def _share_that_differs(wrong: Array, used: Tolerance) -> tuple[float | None, str]:
    """Of integers and booleans, how much of the tolerance is taken, and in words: rounding tips those near a border."""
    count = int(wrong.sum())
    words = f"judged as a whole: {count} of {wrong.size} elements differ (a share of {used.rtol:g} is allowed)"
    allowed = used.rtol * wrong.size
    return (count / allowed if allowed else None) if count else 0.0, words


_NO_FIGURES: dict[str, Any] = dict.fromkeys(
    (
        "max_abs_error",
        "mean_abs_error",
        "max_rel_error",
        "mean_rel_error",
        "cosine_similarity",
        "psnr",
        "tolerance_used",
        "histogram",
    )
)


@np.errstate(over="ignore")  # what overflows is a figure that does not exist
def _figures(a: Array, b: Array, error: Array, tolerance: Tolerance) -> dict[str, Any]:
    """The statistics of finite float64 values ``a`` and ``b``. Relative errors are over the elements that are not 0."""
    if a.size == 0:
        return _NO_FIGURES
    scale = np.abs(a)
    relative = error[scale > 0] / scale[scale > 0]
    counts, _ = np.histogram(np.clip(error[error > 0], _EDGES[0], _EDGES[-1]), bins=_EDGES)
    return {
        "max_abs_error": _finite(error.max()),
        "mean_abs_error": _finite(error.mean()),
        "max_rel_error": _finite(relative.max()) if relative.size else None,
        "mean_rel_error": _finite(relative.mean()) if relative.size else None,
        "cosine_similarity": _cosine(a.ravel(), b.ravel()),
        "psnr": _psnr(a, error),
        "tolerance_used": _tolerance_used(scale, error, tolerance),
        "histogram": Histogram(_EDGES, [int(count) for count in counts], int((error == 0).sum())),
    }


def _cosine(a: Array, b: Array) -> float:
    """1 for two vectors of zeros, 0 where only one is. Scaled, so that no square overflows."""
    largest = float(np.abs(a).max()), float(np.abs(b).max())
    if not all(largest):
        return 1.0 if largest == (0.0, 0.0) else 0.0
    a, b = a / largest[0], b / largest[1]
    return min(1.0, max(-1.0, float(np.dot(a, b)) / math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))))


def _psnr(reference: Array, error: Array) -> float | None:
    """In dB, the peak being the reference's range or, where it is constant, its size."""
    peak = float(reference.max() - reference.min()) or float(np.abs(reference).max())
    largest = float(error.max())
    if not (peak and largest and math.isfinite(peak) and math.isfinite(largest)):
        return None
    mean_square = float(np.mean(np.square(error / largest)))
    return 20 * (math.log10(peak) - math.log10(largest)) - 10 * math.log10(mean_square)


def _tolerance_used(scale: Array, error: Array, tolerance: Tolerance) -> float | None:
    wrong = error > 0
    limit = tolerance.atol + tolerance.rtol * scale[wrong]
    if not (limit > 0).all():
        return None
    return _finite((error[wrong] / limit).max(initial=0.0))


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- running -----------------------------------------------------------------------------------------------------

Runs = list[tuple[str, list[Any]]]


def run_stage(name: str, make_runner: Callable[[], Any], feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """The outputs of one stage, by name, for each of ``feeds``. Raises RunError where the stage does not run."""
    from polygraphy.comparator import Comparator
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    from .evaluator import refusals

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    try:
        results = Comparator.run([make_runner()], data_loader=[_for_polygraphy(feed) for feed in feeds])
    except (PolygraphyException, *refusals()) as error:
        raise RunError(f"the {name} model does not run: {first_lines(error)}") from error
    return [{key: _numbers(name, key, value) for key, value in item.items()} for item in results[0][1]]


def _numbers(stage: str, output: str, value: Any) -> Array:
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, np.ndarray) and value.dtype.kind in "OUS"):
        kind = "text" if isinstance(value, np.ndarray) else f"a {type(value).__name__} of tensors"
        raise RunError(
            f"output {output!r} of the {stage} model is {kind}: TensorRT has tensors of numbers alone. Take it out "
            "of the model's outputs; of a classifier, labels are numbers where it was trained with such."
        )
    return _as_numpy(value)


_PLACE_IN_ONNXRUNTIME = re.compile(r"/onnxruntime_src/\S+ [^()]*\([^()]*\)(?: const)? ")


def first_lines(error: BaseException) -> str:
    """What an exception says, in one line of bearable length."""
    return _PLACE_IN_ONNXRUNTIME.sub("", " ".join(str(error).split()))[:600]


def _for_polygraphy(feed: Feeds) -> OrderedDict[str, Any]:
    """Polygraphy knows bfloat16 as torch's alone; everything else stays NumPy's."""
    if any(array.dtype.name == "bfloat16" for array in feed.values()):
        from .tensors import to_torch

        return OrderedDict((name, to_torch(array)) for name, array in feed.items())
    return OrderedDict(feed)


def _as_numpy(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    from .tensors import to_numpy

    return to_numpy(value)


def compare_stages(
    stages: tuple[str, str],
    cases: Sequence[str],
    reference: Sequence[Mapping[str, Array]],
    candidate: Sequence[Mapping[str, Array]],
    tolerance: Tolerances,
    precision: str = "fp32",
) -> list[Comparison]:
    """Through Polygraphy's Comparator: one Comparison for each case and output of ``reference``.

    ``precision``: what the candidate may have been computed in.
    """
    from polygraphy.comparator import Comparator, IterationResult, RunResults
    from polygraphy.comparator.compare import BaseCompareFunc
    from polygraphy.logger import G_LOGGER

    found: list[Comparison] = []
    case = iter(cases)

    class Measure(BaseCompareFunc):  # type: ignore[misc]
        def __call__(self, first: Any, second: Any) -> OrderedDict[str, bool]:
            inputs = next(case)
            for output, array in first.items():
                a, b = _as_numpy(array), _as_numpy(second[output])
                options: dict[str, Any] = {"tolerance": tolerance, "precision": precision}
                found.append(compare_arrays(a, b, stages=stages, inputs=inputs, output=output, **options))
            return OrderedDict()  # of each verdict, Polygraphy would log statistics that take longer than ours

    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    results = RunResults()
    for name, outputs in zip(stages, (reference, candidate), strict=True):
        iterations = [IterationResult(outputs=OrderedDict(item), runtime=0.0, runner_name=name) for item in outputs]
        results.append((name, iterations))
    Comparator.compare_accuracy(results, compare_func=Measure())
    return found


def source_error(
    candidate: str, reference: Sequence[Mapping[str, Array]], found: Sequence[Mapping[str, Array]]
) -> SourceError | None:
    """The worst output of ``found``, over all cases; None where the shapes are others."""
    errors: list[SourceError] = []
    for output in reference[0]:
        pairs = [
            (_wide(a[output]).reshape(-1), _wide(b[output]).reshape(-1)) for a, b in zip(reference, found, strict=True)
        ]
        if any(a.shape != b.shape for a, b in pairs):
            return None
        a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
        errors.append(_from_source(candidate, output, a, b))
    return max(errors, key=_badness, default=None)


@np.errstate(over="ignore")
def _from_source(candidate: str, output: str, a: Array, b: Array) -> SourceError:
    if a.dtype.kind != "f":
        differing = float((a != b).mean()) if a.size else 0.0
        return SourceError(candidate, output, differing, greatest(a.astype(np.float64) - b.astype(np.float64)), 0)
    finite = np.isfinite(a) & np.isfinite(b)
    lost = int((np.isfinite(a) & ~np.isfinite(b)).sum())
    a, error = a[finite], b[finite] - a[finite]
    if not a.size:
        return SourceError(candidate, output, None, None, lost)
    return SourceError(candidate, output, share(norm(error), norm(a)), greatest(error), lost)


def _badness(error: SourceError) -> tuple[int, float]:
    return error.non_finite, math.inf if error.relative is None else error.relative


def nothing_finite(found: Sequence[Comparison]) -> bool:
    """Whether there are elements, and none that is finite on both sides: that they agree says nothing then."""
    return all(item.max_abs_error is None and 0 not in item.reference_shape for item in found)


def disagreement(comparisons: Sequence[Comparison]) -> str:
    """The worst output that does not agree, in a line."""
    bad = [item for item in comparisons if not item.agreed]
    worst = max(bad, key=lambda item: item.max_abs_error if item.max_abs_error is not None else float("inf"))
    figure = worst.note or (
        f"off by {worst.max_abs_error:.3g} at most"
        if worst.max_abs_error is not None
        else "not finite in the same places"
    )
    used = worst.tolerance
    limit = "equal" if used == Tolerance(0, 0) else f"within rtol {used.rtol:g}, atol {used.atol:g}"
    return (
        f"{worst.candidate} and {worst.reference} differ: output {worst.output!r} at the {worst.inputs} shapes is "
        f"{figure} ({limit} was asked; {len(bad)} of {len(comparisons)} comparisons disagree)"
    )


def onnx_runner(path: Path, name: str) -> Any:
    """A Polygraphy runner of an ONNX file: in ONNX Runtime or, for what it lacks of bfloat16 (most CPU kernels, and
    tensors to and from Python), and recurrent layers of the batch first, in onnx's reference evaluator."""
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Lacking
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def session() -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # What is compared is the model as it is, not as ONNX Runtime would fuse it.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    try:
        ready = session()
    except (Lacking, Fail) as error:
        if isinstance(error, Fail) and not _has_batch_first(path):
            raise
        return _reference_runner(path, name, error)
    if any("bfloat16" in item.type for item in (*ready.get_inputs(), *ready.get_outputs())):
        return _reference_runner(path, name)
    return OnnxrtRunner(lambda: ready, name=name)


def _has_batch_first(path: Path) -> bool:
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    layers = [node for node in nodes if node.op_type in ("GRU", "LSTM", "RNN")]
    return any(attribute.name == "layout" and attribute.i == 1 for node in layers for attribute in node.attribute)


def _reference_runner(path: Path, name: str, refusal: Exception | None = None) -> Any:
    """A Polygraphy runner of onnx's evaluator; of what that cannot run either, ONNX Runtime's ``refusal`` tells too."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.datatype import DataType

    class ReferenceRunner(BaseRunner):  # type: ignore[misc]
        """onnx's reference evaluator: slow, and has every type."""

        def activate_impl(self) -> None:
            self.model = onnx.load(str(path))
            with self.telling():
                self.evaluator = ReferenceEvaluator(self.model)

        def deactivate_impl(self) -> None:
            del self.evaluator, self.model

        @contextlib.contextmanager
        def telling(self) -> Iterator[None]:
            try:
                yield
            except Exception as error:  # its kernels are Python, and raise whatever NumPy does
                words = [] if refusal is None else [first_lines(refusal)]
                words.append(f"onnx's evaluator: {type(error).__name__}: {first_lines(error)}")
                raise RunError(f"the {name} model does not run: {'; '.join(words)}") from error

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for info in self.model.graph.input:
                kind = info.type.tensor_type
                shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim]
                metadata.add(info.name, dtype=DataType.from_dtype(kind.elem_type, "onnx"), shape=shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
            with self.telling():
                values = self.evaluator.run(None, {key: _as_numpy(value) for key, value in feed_dict.items()})
            self.inference_time = 0.0
            return OrderedDict(zip((output.name for output in self.model.graph.output), values, strict=True))

    return ReferenceRunner(name=name, prefix="reference")
