"""New weights for an engine that was built to take them (``BuildSettings.refittable``), with no build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError
from ..target import Target
from ..tensors import to_numpy
from .logger import trt_logger


def refit(engine: Any, target: Target, weights: Mapping[str, Any] | Path) -> None:
    """Puts ``weights``, arrays or tensors by name or an ONNX file's, into ``engine``. Raises RunError."""
    trt = target.module()
    if not engine.refittable:
        raise RunError("refit: the engine was not built for it; convert with builder={'refittable': True}.")
    logger = trt_logger(trt)
    errors = logger.errors
    refitter = trt.Refitter(engine, logger)
    if isinstance(weights, Path):
        arrays = _from_onnx(weights, refitter, trt, logger)
    else:
        arrays = {name: _array(value) for name, value in weights.items()}
        unknown = sorted(set(arrays) - set(refitter.get_all_weights()))
        if unknown:
            raise RunError(
                f"refit: the engine has no weights called {', '.join(map(repr, unknown[:5]))}; it has "
                f"{', '.join(map(repr, refitter.get_all_weights()[:20]))}."
            )
    for name, array in arrays.items():
        if not refitter.set_named_weights(name, array):
            raise RunError(
                f"refit: {name!r} of shape {list(array.shape)} does not fit. TensorRT: {logger.since(errors)}"
            )
    missing = refitter.get_missing_weights()
    if missing:
        raise RunError(f"refit: TensorRT needs these weights too: {', '.join(map(repr, missing[:20]))}.")
    if not refitter.refit_cuda_engine():
        raise RunError(f"refit: TensorRT refuses: {logger.since(errors) or 'it does not say why'}")


def _from_onnx(path: Path, refitter: Any, trt: Any, logger: Any) -> dict[str, Any]:
    """The weights of an ONNX file, or nothing where TensorRT's own refitter has taken them from it."""
    if hasattr(trt, "OnnxParserRefitter"):
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(path)):
            words = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise RunError(f"refit: {path} is not the engine's model with other weights: {words}")
        return {}
    import onnx

    wanted = set(refitter.get_all_weights())
    folder = str(path.parent)
    initializers = onnx.load(str(path), load_external_data=True).graph.initializer
    return {item.name: onnx.numpy_helper.to_array(item, folder) for item in initializers if item.name in wanted}


def _array(value: Any) -> Any:
    return np.ascontiguousarray(to_numpy(value) if hasattr(value, "detach") else value)
