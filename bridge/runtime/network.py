"""torch2trt's ``keep_network``: the network that an engine was built from, parsed anew when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import RunError
from ..plugins.loading import PluginError, load_plugins, read_plugins
from ..result import ConversionResult
from ..target import network_flags, runtime
from .logger import trt_logger
from .record import sidecar_of

_PARSED: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()
"""Of each module the network, with the builder and parser that it lives by."""


def parsed_network(module: Any, result: ConversionResult) -> Any:
    """An ``INetworkDefinition`` of ``result.onnx``, the same object at each call for one module.

    Raises RunError where the file is gone, the plugins do not load, or the parser refuses it.
    """
    if module not in _PARSED:
        assert result.target is not None and result.onnx is not None
        _PARSED[module] = _parse(result.onnx, result.target.flavour, result.engine)
    return _PARSED[module][0]


def _parse(path: Path, flavour: Any, engine: Path | None) -> tuple[Any, ...]:
    if not path.is_file():
        raise RunError(f"network: {path} is gone; convert with a workdir to keep it.")
    target = runtime(flavour)
    trt = target.module()
    logger = trt_logger(trt)
    sidecar = sidecar_of(engine) if engine is not None else None
    try:
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(logger, "")
        load_plugins(read_plugins(sidecar["plugins"] if sidecar is not None else ()), trt)
    except PluginError as error:
        raise RunError(f"network: {error}") from error
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    errors = logger.errors
    if not parser.parse_from_file(str(path)):
        raise RunError(f"network: the parser refuses {path}: {logger.since(errors) or 'it does not say why'}.")
    return network, builder, parser
