"""A stand-in for the Python module ``tensorrt`` of version 8.5, as far as a builder's configuration goes.

Run as a program it takes a BuildJob as JSON, and prints what ``bridge.builder_config`` made of it.
"""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import Any

from .fake_network import DataType, ILayer, LayerType, Tensor, bool, float16, float32, int8, int32
from .fake_network import Network as ParsedNetwork

__all__ = ["LayerType", "bool", "float16", "float32", "int8", "int32"]

__version__ = "8.5.3.1"

BuilderFlag = enum.Enum(
    "BuilderFlag",
    "FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO",
)
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM")
DeviceType = enum.Enum("DeviceType", "GPU DLA")
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED NONE")


class Logger:
    VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

    def __init__(self, *_: Any) -> None: ...


class IInt8EntropyCalibrator2: ...


class IInt8MinMaxCalibrator: ...


class IInt8EntropyCalibrator: ...


class IInt8LegacyCalibrator: ...


class IInt8Calibrator: ...


class IAlgorithmSelector: ...


class ITimingCache:
    """Timings behind a header, which is of the GPU."""

    def __init__(self, data: bytes, here: bytes) -> None:
        self.header, *entries = data.split() or [here]
        self.entries = set(entries)

    def combine(self, other: ITimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.header != other.header:
            return False
        self.entries |= other.entries
        return True

    def serialize(self) -> bytearray:
        return bytearray(b" ".join([self.header, *sorted(self.entries)]))


class IBuilderConfig:
    """Keeps what it is told."""

    avg_timing_iterations = 1
    default_device_type = DeviceType.GPU
    DLA_core = -1
    profiling_verbosity = None
    int8_calibrator = None
    algorithm_selector = None

    def __init__(self, gpu: bytes = b"H100") -> None:
        self.gpu = gpu
        self.timings: ITimingCache | None = None
        self.flags = {"TF32"}
        self.pools: dict[str, int] = {}
        self.profiles: list[Any] = []
        self.calibration_profile: Any = None
        self.layers: dict[str, str] = {}

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.pools[pool.name] = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def set_calibration_profile(self, profile: Any) -> None:
        self.calibration_profile = profile

    def get_calibration_profile(self) -> Any:
        return self.calibration_profile

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        return ITimingCache(data, self.gpu)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        """Once: TensorRT 8.5 takes no other in place of the one that there is."""
        taken = self.timings is None and cache.header == self.gpu
        self.timings = cache if taken else self.timings
        return taken

    def get_timing_cache(self) -> ITimingCache | None:
        return self.timings

    def set_device_type(self, layer: Any, device: DeviceType) -> None:
        self.layers[layer.name] = device.name


class OptimizationProfile(dict[str, Any]):
    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self[name] = [list(low), list(best), list(high)]

    def get_shape(self, name: str) -> Any:
        return self[name]

    def __bool__(self) -> bool:  # TensorRT's: whether it is usable
        return True


def network(kinds: list[str], names: list[str]) -> ParsedNetwork:
    """One input of two axes, the first of them dynamic, and the layers, each of which reads the one before."""
    last = Tensor("x", shape=(-1, 3))
    made = ParsedNetwork([last])
    for kind, name in zip(kinds, names, strict=True):
        dtype = DataType.INT8 if kind == "QUANTIZE" else DataType.INT32 if kind == "SHAPE" else DataType.FLOAT
        output = Tensor(f"{name}_out", dtype)
        made.layers.append(ILayer(kind, name, [last], [output]))
        last = output
    return made


class Builder:
    def __init__(self, cores: int) -> None:
        self.num_DLA_cores = cores

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()


def main() -> None:
    given = json.loads(sys.stdin.read())
    sys.modules["tensorrt"] = sys.modules[__name__]
    from bridge.build import BuildJob
    from bridge.builder_config import SettingRefused, make_config
    from bridge.layer_precisions import Demands
    from bridge.timing import TimingCache

    names = given.pop("layers", ["conv"])
    parsed = network(given.pop("kinds", ["CONVOLUTION"]), names)
    builder, demands = Builder(given.pop("cores", 0)), Demands(given.pop("constraints", "obey"))
    timings = TimingCache(Path(given["timing_cache"])) if "timing_cache" in given else None
    try:
        loader = make_config(BuildJob(**given), sys.modules[__name__], builder, parsed, demands, timings)
        config = loader(builder, parsed)
    except SettingRefused as error:
        print(json.dumps({"refused": str(error)}))
        return
    calibrator = config.int8_calibrator
    known = sorted(entry.decode() for entry in config.timings.entries) if config.timings is not None else None
    if timings is not None:
        config.timings.entries.add(b"measured")
        timings.save()
    found = {
        "flags": sorted(config.flags),
        "pools": config.pools,
        "profiles": config.profiles,
        "timings": [known, timings.notes if timings is not None else []],
        "timing": config.avg_timing_iterations,
        "device": config.default_device_type.name,
        "core": config.DLA_core,
        "layers": config.layers,
        "selects": config.algorithm_selector is not None,
        "verbosity": config.profiling_verbosity.name,
        "precisions": {layer.name: layer.precision.name for layer in parsed.layers if layer.precision_is_set},
        "outputs": {
            layer.name: [dtype.name for dtype in layer.output_types.values()]
            for layer in parsed.layers
            if layer.output_types
        },
        "calibration_profile": config.calibration_profile,
        "calibrator": type(calibrator).__bases__[0].__name__ if calibrator is not None else None,
        "batches": [
            {name: [str(array.dtype), list(array.shape)] for name, array in batch.items()}
            for batch in (calibrator.data_loader if calibrator is not None else ())
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
