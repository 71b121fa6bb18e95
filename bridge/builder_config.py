"""How settings reach TensorRT's builder, in the child process: through Polygraphy where it has an option for them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .build import BuildJob
from .layer_precisions import Demands, constrain
from .network_layers import quantised_types
from .subgraphs import Selection
from .timing import TimingCache


class SettingRefused(Exception):
    """A setting that the installed TensorRT, or this machine, has not; the message is for the user."""


@dataclass(frozen=True)
class Applied:
    """How one setting is made: by an option of Polygraphy's CreateConfig, or on the finished configuration."""

    needs: str
    """What the module ``tensorrt`` must have for it."""
    option: Callable[[Any, Any], dict[str, Any]] | None = None
    """From the module and the value to options."""
    after: Callable[[Any, Any, Any], None] | None = None
    """Given the module, the configuration and the value."""


def _attribute(name: str) -> Applied:
    return Applied(f"IBuilderConfig.{name}", after=lambda trt, config, value: setattr(config, name, value))


def _flag(name: str) -> Applied:
    return Applied(
        f"BuilderFlag.{name}", after=lambda trt, config, value: config.set_flag(getattr(trt.BuilderFlag, name))
    )


def _dla(trt: Any, config: Any, value: int) -> None:
    config.DLA_core = value


def _default_device(trt: Any, config: Any, value: str) -> None:
    config.default_device_type = getattr(trt.DeviceType, value)


APPLIED: Mapping[str, Applied] = {
    "workspace": Applied(
        "MemoryPoolType.WORKSPACE", lambda trt, value: {"memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: value}}
    ),
    "optimization_level": Applied(
        "IBuilderConfig.builder_optimization_level", lambda trt, value: {"builder_optimization_level": value}
    ),
    "tf32": _flag("TF32"),
    "sparsity": Applied("BuilderFlag.SPARSE_WEIGHTS", lambda trt, value: {"sparse_weights": value}),
    "version_compatible": Applied("BuilderFlag.VERSION_COMPATIBLE", lambda trt, value: {"version_compatible": value}),
    "hardware_compatibility": Applied(
        "HardwareCompatibilityLevel.{}",
        lambda trt, value: {"hardware_compatibility_level": getattr(trt.HardwareCompatibilityLevel, value.upper())},
    ),
    "refittable": Applied("BuilderFlag.REFIT", lambda trt, value: {"refittable": value}),
    "strip_weights": Applied("BuilderFlag.STRIP_PLAN", lambda trt, value: {"strip_plan": value}),
    "weight_streaming": Applied("BuilderFlag.WEIGHT_STREAMING", lambda trt, value: {"weight_streaming": value}),
    "avg_timing_iterations": _attribute("avg_timing_iterations"),
    "max_aux_streams": Applied("IBuilderConfig.max_aux_streams", lambda trt, value: {"max_aux_streams": value}),
    # Polygraphy's own options for a DLA always take the first one, and change what else the builder may do.
    "default_device": Applied("IBuilderConfig.default_device_type", after=_default_device),
    "dla_core": Applied("IBuilderConfig.DLA_core", after=_dla),
    "gpu_fallback": _flag("GPU_FALLBACK"),
    "device_types": Applied("IBuilderConfig.set_device_type"),  # by layer, in _place_layers
    "strict_types": Applied(
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS", lambda trt, value: {"precision_constraints": "obey"}
    ),
}


def make_config(
    job: BuildJob,
    trt: Any,
    builder: Any,
    network: Any,
    demands: Demands,
    timings: TimingCache | None = None,
    selection: Selection | None = None,
) -> Any:
    """The loader of the builder's configuration. Raises SettingRefused where this TensorRT lacks what is asked for.

    ``selection`` learns what subgraphs TensorRT asks about.
    """
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig

    settings = dict(job.builder)
    if job.strongly_typed:
        settings.pop("strict_types", None)  # types are obeyed always
    if "DLA" in (settings.get("default_device"), *job.devices.values()):
        settings.setdefault("dla_core", 0)
        _check_dla(builder, settings["dla_core"])
    profiles = _profiles(job.profiles, network, job.values)
    options: dict[str, Any] = {"profiles": profiles or None, **(timings.options() if timings is not None else {})}
    for name, value in settings.items():
        applied = APPLIED[name]
        _check_there(trt, f"builder: {name}", applied.needs.format(str(value).upper()))
        if applied.option is not None:
            options |= applied.option(trt, value)
    if job.flavour == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(pair) for pair in job.compute_capabilities] or None
        config = CreateConfigRTX(compute_capabilities=capabilities, **options)
    else:
        config = CreateConfig(**options, **_precision(job, trt, network))

    def finish(builder: Any, network: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)  # Polygraphy leaves it on for TensorRT-RTX
        for name, value in settings.items():
            after = APPLIED[name].after
            if after is not None:
                after(trt, config, value)
        _place_layers(job.devices, trt, config, network)
        _layers(job, trt, config, network, demands, selection or Selection(job.of_tensorrt_8))
        if demands.untimed:
            config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)
        if job.calibration:
            # Polygraphy takes the last profile's, whose shapes the calibration inputs need not have.
            for profile in _profiles([job.calibration["profile"]], network, job.values):
                config.set_calibration_profile(profile.fill_defaults(network).to_trt(builder, network))

    made = PostprocessConfig(config, finish)
    return timings.watched(made) if timings is not None else made


def _check_there(trt: Any, name: str, needs: str) -> None:
    holder, _, attribute = needs.partition(".")
    if not hasattr(getattr(trt, holder, None), attribute):
        raise SettingRefused(f"{name}: it has no {needs}; leave it out")


def _check_dla(builder: Any, core: int) -> None:
    count = builder.num_DLA_cores
    if core >= count:
        there = "there is no DLA on this machine" if count == 0 else f"this machine has {count} of them"
        raise SettingRefused(
            f"builder: DLA core {core} is asked for, and {there}; leave default_device, device_types and dla_core out, "
            "or build where there is one"
        )


def _profiles(
    given: Sequence[Mapping[str, Mapping[str, Sequence[int]]]], network: Any, values: Mapping[str, list[int]]
) -> list[Any]:
    """Polygraphy's profiles of the inputs with dynamic axes, and of those whose ``values`` are sizes; none where there
    are none."""
    from polygraphy.backend.trt import Profile

    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    sizes = {tensor.name: values[tensor.name] for tensor in inputs if tensor.is_shape_tensor and tensor.name in values}
    profiles = [Profile() for _ in given] if dynamic or sizes else []
    for profile, shapes in zip(profiles, given, strict=False):
        for name in dynamic:
            profile.add(name, **shapes[name])
        for name, items in sizes.items():
            profile.add(name, items, items, items)
    return profiles


# --- devices -----------------------------------------------------------------------------------------------------


def _place_layers(devices: Mapping[str, str], trt: Any, config: Any, network: Any) -> None:
    for layer in network if devices else ():
        node = node_of(layer.name, getattr(layer, "metadata", ""), devices)
        if node is not None:
            config.set_device_type(layer, getattr(trt.DeviceType, devices[node]))


def node_of(layer: str, metadata: str, nodes: Mapping[str, Any]) -> str | None:
    """Which of ``nodes`` the parser made a layer of: it says so in the metadata or, in TensorRT 8, by the layer's name,
    to which it adds a number where there are several."""
    names: tuple[str, ...] = (*re.findall(r"\[ONNX Layer: (.*?)\]", metadata), layer, re.sub(r"_\d+$", "", layer))
    return next((name for name in names if name in nodes), None)


# --- precision ---------------------------------------------------------------------------------------------------

_CALIBRATORS: Mapping[str, str] = {
    "entropy": "IInt8EntropyCalibrator2",
    "entropy_legacy": "IInt8EntropyCalibrator",
    "minmax": "IInt8MinMaxCalibrator",
    "legacy": "IInt8LegacyCalibrator",
}
"""TensorRT's classes, by the bridge's names of algorithms."""


_OPTIONS = frozenset(("fp16", "bf16", "int8", "fp8"))
"""What Polygraphy has an option for; the other types have a flag of their name."""


def _precision(job: BuildJob, trt: Any, network: Any) -> dict[str, Any]:
    """What a weakly typed builder is allowed to compute in; the model's own types it must be allowed."""
    if job.strongly_typed:
        return {}
    quantised = quantised_types(network)
    names = _allowed(job, quantised)
    for name in names - _OPTIONS:
        _check_there(trt, f"precision {name}", f"BuilderFlag.{name.upper()}")
    allowed: dict[str, Any] = dict.fromkeys(sorted(names & _OPTIONS), True)
    if job.calibration and not quantised:
        from polygraphy.backend.trt import Calibrator

        base = getattr(trt, _CALIBRATORS[job.calibration["algorithm"]])
        files = CalibrationFiles(job.calibration["files"], trt, network)
        allowed["calibrator"] = Calibrator(files, cache=job.calibration["cache"], BaseClass=base)
    return allowed


def _allowed(job: BuildJob, quantised: Set[str]) -> set[str]:
    return ({*job.precision.split("+"), *job.low_types} | quantised) - {"fp32"}


def _layers(job: BuildJob, trt: Any, config: Any, network: Any, demands: Demands, selection: Selection) -> None:
    """Types without an option of Polygraphy's, and the precisions of single layers."""
    names = set() if job.strongly_typed else _allowed(job, quantised_types(network))
    if not names:
        return
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the engine cannot say what became of them
    for name in names - _OPTIONS:
        config.set_flag(getattr(trt.BuilderFlag, name.upper()))
    if not constrain(job, trt, network, demands) or demands.constraints == "ignore":
        return
    config.set_flag(getattr(trt.BuilderFlag, f"{demands.constraints.upper()}_PRECISION_CONSTRAINTS"))
    selector = selection.selector(trt, network)
    if selector is not None:
        config.algorithm_selector = selector  # Polygraphy's option for it gives up the timing cache in any case


class CalibrationFiles:
    """Reads the calibration inputs one after the other, in the types that TensorRT calibrates with."""

    def __init__(self, files: Sequence[str], trt: Any, network: Any) -> None:
        self.files = [Path(file) for file in files]
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        exact = {trt.DataType.INT32: "int32", trt.DataType.BOOL: "bool"}
        if hasattr(trt.DataType, "INT64"):
            exact[trt.DataType.INT64] = "int64"
        self.types = {tensor.name: exact.get(tensor.dtype, "float32") for tensor in inputs}

    def __iter__(self) -> Iterator[OrderedDict[str, Any]]:
        import numpy as np

        for file in self.files:
            with np.load(file) as arrays:
                yield OrderedDict(
                    (name, np.ascontiguousarray(arrays[name].astype(kind))) for name, kind in self.types.items()
                )
