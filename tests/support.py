"""Helpers of the tests: run a model in ONNX Runtime, give it to TensorRT-RTX's parser and builder."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

if TYPE_CHECKING:
    from bridge import ConversionResult
    from bridge.target import Target

RTX_INSTALLED = importlib.util.find_spec("tensorrt_rtx") is not None
RTX = "tensorrt-rtx" if RTX_INSTALLED else "tensorrt-rtx-1.7"
"""A target to rewrite for on every machine, and to build for where it is installed."""


def convert(source: Any, inputs: Any = None, *, workdir: Path, **options: Any) -> ConversionResult:
    """``bridge.convert`` for RTX, with every match of the passes proved: in tests, none may move its outputs unseen."""
    import bridge

    result = bridge.convert(source, inputs, workdir=workdir, **{"target": RTX, "prove": True, **options})
    moved = [str(proof) for proof in result.proofs if proof.status == "moved"]
    assert result.status == "failed" or not moved, moved
    return result


def run_onnx(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by name, with ONNX Runtime's graph optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def example_inputs(model: onnx.ModelProto, seed: int = 0, dynamic: int = 3) -> dict[str, np.ndarray]:
    """Seeded inputs that fit the model's declared types; dynamic axes get the size ``dynamic``."""
    random = np.random.default_rng(seed)
    feeds = {}
    for info in model.graph.input:
        kind = info.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else dynamic for dim in kind.shape.dim]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if dtype == np.bool_:
            feeds[info.name] = random.random(shape) > 0.5
        elif dtype.kind in "iu":
            feeds[info.name] = random.integers(0, 3, shape).astype(dtype)
        else:
            feeds[info.name] = random.standard_normal(shape).astype(dtype)
    return feeds


def fitted(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds in the dtypes that the model declares: a target without int64 has it narrowed at the boundary."""
    declared = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
    return {name: array.astype(onnx.helper.tensor_dtype_to_np_dtype(declared[name])) for name, array in feeds.items()}


def load_needed_plugins(path: Path, target: Target) -> None:
    """Loads what the model's nodes need beyond what TensorRT brings along."""
    from bridge.plugins.loading import load_plugins, needed_plugins
    from passes import read

    load_plugins(needed_plugins(read(path), target), target.module())


def load_own_plugins(trt: Any) -> None:
    """Loads every plugin of the bridge that this TensorRT takes."""
    from bridge.plugins.loading import NeededPlugin, load_plugins
    from bridge.target import resolve
    from passes.plugins import PLUGINS

    target = resolve(RTX)
    own = [plugin for plugin in PLUGINS.values() if plugin.loads_into(target)]
    load_plugins(
        [NeededPlugin(item.name, item.version, item.namespace, item.library, item.module) for item in own], trt
    )


def parse(path: Path, values: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """What TensorRT-RTX's parser and builder refuse of the model; empty where an engine comes out.

    ``values`` by name: of inputs that sizes depend on, which a profile gives the values of, and the shapes.
    """
    from bridge.target import resolve

    return build(path, resolve("tensorrt-rtx"), values)[1]


def build(path: Path, target: Target, values: Mapping[str, np.ndarray] | None = None) -> tuple[bytes | None, list[str]]:
    """A plan of the model, made in this process; where there is none, what parser and builder say of it. ``values`` as
    above."""
    from bridge.network_layers import quantised_types, tensors
    from bridge.target import network_flags

    trt = target.module()
    load_needed_plugins(path, target)
    builder, logger = _builder(trt)
    messages = logger.messages
    messages.clear()
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        named = hasattr(trt.ParserError, "node_operator")  # not in TensorRT 8.5
        words = [f"{error.node_operator() if named else error.node()}: {error.desc()}" for error in errors]
        return None, words or ["refused"]
    config = builder.create_builder_config()
    if target.flavour == "tensorrt":
        config.clear_flag(trt.BuilderFlag.TF32)
    if not target.strongly_typed:
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        half = any(tensor.dtype == trt.float16 for layer in layers for part in tensors(layer) for tensor in part)
        for name in quantised_types(network) | ({"fp16"} if half else set()):
            config.set_flag(getattr(trt.BuilderFlag, name.upper()))
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        given = None if values is None else values.get(tensor.name)
        if -1 in tuple(tensor.shape):
            dynamic = True
            shapes = [tuple(size if axis == -1 else axis for axis in tensor.shape) for size in (1, 3, 5)]
            if given is not None:
                shapes = [given.shape] * 3
            profile.set_shape(tensor.name, *shapes)
        elif tensor.is_shape_tensor and given is not None:
            dynamic = True
            profile.set_shape_input(tensor.name, *[np.asarray(given).reshape(-1).tolist()] * 3)
    if dynamic:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return (None, [*messages] or ["no engine"]) if plan is None else (bytes(memoryview(plan)), [])


@functools.cache
def _builder(trt: Any) -> tuple[Any, Any]:
    """A builder, which takes seconds to make in TensorRT 8.5, and its logger, which keeps the errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and "cudaError" not in message:
                self.messages.append(message)

    logger = Logger()
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    return trt.Builder(logger), logger


def run_engine(plan: bytes, target: Target, feeds: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The outputs by name, on the GPU; its plugins are those of ``build``. The plan is written into ``folder``."""
    from polygraphy.datatype import DataType

    from bridge.runtime.runner import engine_runner

    engine = folder / "model.engine"
    engine.write_bytes(plan)
    with engine_runner(engine, target) as runner:
        known = runner.get_input_metadata().items()
        kinds = {name: DataType.to_dtype(meta.dtype, "numpy") for name, meta in known}  # an int64 is an int32 to some
        return dict(runner.infer({name: feeds[name].astype(kind) for name, kind in kinds.items()}))


def has_ended(pid: int, seconds: float = 10) -> bool:
    """Whether the process is gone in time, or only waits for init to see its end, as one does whose parent is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
