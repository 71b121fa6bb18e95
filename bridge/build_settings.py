"""What the builder may be told beside the model: memory, effort, compatibility, devices. Checked at the door.

What each TensorRT has of it is asked of ``Target``; how it reaches the builder is in builder_config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError
from .target import Target

Device = Literal["GPU", "DLA"]
DEVICES = ("GPU", "DLA")
HARDWARE = ("ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class BuildSettings:
    """What the builder is told. None, or False, leaves it to TensorRT; TF32 alone is off where TensorRT has it on.

    Raises UsageError for values that cannot be.
    """

    workspace: int | None = None
    """Bytes of GPU memory that a layer may use while it runs."""
    optimization_level: int | None = None
    """0 to 5: how long the builder searches for fast kernels."""
    tf32: bool = False
    """Whether products of float32 may round their factors to 10 bits of mantissa."""
    sparsity: bool = False
    """Whether kernels for weights of 2:4 structured sparsity may be used."""
    version_compatible: bool = False
    """Whether newer versions of the same major number can load the engine."""
    hardware_compatibility: str | None = None
    """``ampere_plus`` (this GPU's generation and all newer ones) or ``same_compute_capability``."""
    refittable: bool = False
    """Whether the engine's weights can be replaced."""
    strip_weights: bool = False
    """Whether the engine leaves its weights out: it has to be refitted before it runs."""
    weight_streaming: bool = False
    """Whether weights may stay in host memory and be fetched as they are needed."""
    avg_timing_iterations: int | None = None
    """How often the builder times a kernel, for the average."""
    max_aux_streams: int | None = None
    """How many more streams the engine may use; 0 for none."""
    default_device: Device = "GPU"
    dla_core: int | None = None
    """Which DLA; the first where it is not said."""
    gpu_fallback: bool = False
    """Whether the GPU does what the DLA cannot; without, such a layer fails the build."""
    device_types: Mapping[str, Device] = field(default_factory=dict)
    """Of torch modules, by path (``encoder.layers.3``): where their layers run. The innermost path counts."""
    strict_types: bool = False
    """Whether layers must have the types that they were given, even where others are faster."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            wrong = check(value)
            if wrong:
                raise UsageError(f"builder: {name}: {value!r} {wrong}.")

    @classmethod
    def of(cls, given: BuildSettings | Mapping[str, Any] | None) -> BuildSettings:
        """Of a mapping with these names; None is the default. Raises UsageError for other names."""
        if given is None or isinstance(given, BuildSettings):
            return given or cls()
        if not isinstance(given, Mapping):
            raise UsageError(f"builder: a {type(given).__name__}; give a bridge.BuildSettings, or a mapping.")
        names = [item.name for item in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(names)}."
                raise UsageError(f"builder: unknown setting {name!r}; {hint}")
        return cls(**given)

    def given(self) -> dict[str, Any]:
        """What is not left as it is: plain JSON values by name."""
        plain = dataclasses.asdict(self)
        return {item.name: plain[item.name] for item in dataclasses.fields(self) if plain[item.name] != _default(item)}

    @property
    def uses_dla(self) -> bool:
        return "DLA" in (self.default_device, *self.device_types.values())

    def check(self, target: Target, precision: str, profiles: Any) -> None:
        """Raises UsageError where ``target`` has not what is asked for."""
        for name in self.given():
            reason = target.lacks_setting(name)
            if reason:
                raise UsageError(f"builder: {name}: {target} {reason}")
        if not self.uses_dla:
            for name in ("dla_core", "gpu_fallback"):
                if name in self.given():
                    raise UsageError(
                        f"builder: {name}: nothing is given to a DLA; set default_device or device_types to 'DLA', or "
                        "leave it out."
                    )
            return
        if _dynamic(profiles):
            raise UsageError(
                "builder: a DLA takes no dynamic shapes; give profiles whose min, opt and max are the same, or none."
            )
        if precision == "fp32" and not target.strongly_typed:
            raise UsageError("builder: a DLA computes in fp16 and int8 alone; ask for precision='fp16' or 'int8'.")

    def notes(self, target: Target) -> list[str]:
        """What is fulfilled without anything being done."""
        if self.strict_types and target.strongly_typed:
            return [f"strict_types: {target} obeys the types of the model always"]
        return []

    def check_modules(self, paths: Sequence[str]) -> None:
        """Raises UsageError where ``device_types`` names what is none of a module's ``paths``."""
        for path in self.device_types:
            if path not in paths:
                near = difflib.get_close_matches(path, paths, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"builder: device_types: there is no module {path!r}.{hint}")

    def device_of(self, module: str) -> Device | None:
        """Where the layers of the module at this path are to run; None where nothing says so."""
        while True:
            if module in self.device_types:
                return self.device_types[module]
            if not module:
                return None
            module = module.rpartition(".")[0]


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default is not dataclasses.MISSING else {}


def _dynamic(profiles: Any) -> bool:
    """Whether shapes may change under these profiles; where they are none, their reader says so."""
    listed = profiles if isinstance(profiles, (list, tuple)) else [profiles or {}]
    try:
        return len(listed) > 1 or any(list(shapes[0]) != list(shapes[-1]) for shapes in listed[0].values())
    except (AttributeError, TypeError, LookupError):
        return False


# --- values ------------------------------------------------------------------------------------------------------

_Check = Callable[[Any], str]
"""Of a value, what it should be instead; empty where it is right."""


def _whole(least: int, most: int | None = None, bits: int = 31) -> _Check:
    """``bits``: how many TensorRT has for it, its sign aside."""
    span = f"from {least} to {most}" if most is not None else f"of at least {least}"
    largest = (1 << bits) - 1 if most is None else most

    def check(value: Any) -> str:
        if value is None or (type(value) is int and least <= value <= largest):
            return ""
        too_large = type(value) is int and value > largest and most is None
        return f"is more than TensorRT takes, {largest}" if too_large else f"is no whole number {span}"

    return check


def _one_of(choices: Sequence[Any]) -> _Check:
    return lambda value: "" if value in choices else f"is none of {', '.join(map(repr, choices))}"


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "is neither True nor False"


def _devices(value: Any) -> str:
    right = isinstance(value, Mapping) and all(
        isinstance(path, str) and device in DEVICES for path, device in value.items()
    )
    return "" if right else "is no mapping from the paths of modules to 'GPU' or 'DLA'"


_CHECKS: Mapping[str, _Check] = {
    "workspace": _whole(1, bits=63),
    "optimization_level": _whole(0, 5),
    "tf32": _flag,
    "sparsity": _flag,
    "version_compatible": _flag,
    "hardware_compatibility": _one_of((None, *HARDWARE)),
    "refittable": _flag,
    "strip_weights": _flag,
    "weight_streaming": _flag,
    "avg_timing_iterations": _whole(1),
    "max_aux_streams": _whole(0),
    "default_device": _one_of(DEVICES),
    "dla_core": _whole(0),
    "gpu_fallback": _flag,
    "device_types": _devices,
    "strict_types": _flag,
}
