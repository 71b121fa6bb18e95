"""One model to convert, and how: what a manifest's entry, the command line and a worker process all speak of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
)

from .errors import UsageError

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_SHAPES = "write one shape as 1x3x224x224, or three as MIN:OPT:MAX"


def read_profile(value: Any) -> Profile:
    """The min, opt and max shape of an input; one shape alone is all three.

    Accepts ``1x3x8:4x3x8:8x3x8`` or ``1x3x8``, and the same as lists of int. Raises ValueError.
    """
    if isinstance(value, str):
        value = value.split(":")
    elif not isinstance(value, (list, tuple)) or all(type(item) is int for item in value):
        value = [value]
    shapes = [_read_shape(item) for item in value]
    if len(shapes) not in (1, 3):
        raise ValueError(f"{len(shapes)} shapes; {_SHAPES}")
    low, best, high = shapes * 3 if len(shapes) == 1 else shapes
    if not len(low) == len(best) == len(high):
        raise ValueError(f"min, opt and max have {len(low)}, {len(best)} and {len(high)} dimensions")
    for axis, (a, b, c) in enumerate(zip(low, best, high, strict=True)):
        if not a <= b <= c:
            raise ValueError(f"min <= opt <= max does not hold on axis {axis}: {a}, {b}, {c}")
    return low, best, high


def _read_shape(value: Any) -> Shape:
    if isinstance(value, str) and re.fullmatch(r"(\d+(x\d+)*)?", value.strip(), re.ASCII):
        return tuple(int(size) for size in value.strip().split("x") if size)
    sizes = [value] if type(value) is int else value
    if isinstance(sizes, (list, tuple)) and all(type(size) is int and size >= 0 for size in sizes):
        return tuple(sizes)
    raise ValueError(f"{value!r} is no shape; {_SHAPES}")


def _read_function(value: str) -> str:
    if not FUNCTION.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form package.module:function")
    return value


def _read_file(value: str, info: ValidationInfo) -> str:
    path = Path((info.context or {}).get("folder", "."), value).absolute()
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return str(path)


def _read_source(value: str, info: ValidationInfo) -> str:
    if value.endswith(".onnx"):
        return _read_file(value, info)
    if FUNCTION.fullmatch(value):
        return value
    raise ValueError(f"{value!r} is neither an .onnx file nor of the form package.module:function")


def _read_cache(value: str, info: ValidationInfo) -> str:
    if not value or value.lower() in ("yes", "no", "on", "off"):  # the latter are read as booleans then
        raise ValueError(f"{value!r} is no folder; write true, false or the path of one")
    return str(Path((info.context or {}).get("folder", "."), value).absolute())


def _read_name(value: str) -> str:
    if not value or value.startswith(".") or re.search(r"[/\\\x00-\x1f]", value) or len(value.encode()) > 200:
        raise ValueError(f"{value!r} cannot be the name of a folder, which a model's name is")
    if value in ("summary.json", "index.html"):
        raise ValueError(f"{value!r} is a file of the whole run; choose another name")
    return value


def _read_builder(value: Any) -> dict[str, Any]:
    from .build_settings import BuildSettings

    try:
        return BuildSettings.of(value).given()
    except UsageError as error:
        raise ValueError(str(error).removeprefix("builder: ")) from error


def _read_precision(value: Any, info: ValidationInfo) -> Any:
    """As ``bridge.Precision.of`` takes it, the paths of precision files absolute; or a list of such."""
    from .precision import is_path, labels

    if value is None:
        return None
    folder = (info.context or {}).get("folder", ".")
    given = value if isinstance(value, list) else [value]
    found = [str(Path(folder, item).absolute()) if is_path(item) else item for item in given]
    try:
        labels(found)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("precision: ")) from error
    return found if isinstance(value, list) else found[0]


def _read_range(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the lower bound {value[0]} is above the upper bound {value[1]}")
    return value


def _read_capability(value: Any) -> Any:
    return str(value) if isinstance(value, float) else value  # 8.9 without quotes is a number in YAML


def _kind_of_tolerance(value: Any) -> str:
    one_each = isinstance(value, Mapping) and any(isinstance(item, (Mapping, ToleranceSpec)) for item in value.values())
    return "per output" if one_each else "for all"


class Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ToleranceSpec(Checked):
    """``|candidate - reference| <= atol + rtol * |reference|``."""

    rtol: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    atol: Annotated[float, Field(ge=0, allow_inf_nan=False)]


Function = Annotated[str, AfterValidator(_read_function)]
ExistingFile = Annotated[str, AfterValidator(_read_file)]
Ranges = dict[str, Annotated[Profile, BeforeValidator(read_profile)]]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Options(Checked):
    """How to convert; the keys of ``defaults``. What is not set is left to ``bridge.convert``."""

    target: str | None = None
    precision: Annotated[Any, BeforeValidator(_read_precision)] = None
    """A name, a precision file's path, or what is in such a file; a list of these makes a model of each."""
    inputs: (
        Annotated[
            Annotated[Function, Tag("function")] | Annotated[dict[str, ExistingFile], Tag("files")],
            Discriminator(lambda value: "files" if isinstance(value, Mapping) else "function"),
        ]
        | None
    ) = None
    """A ``package.module:function`` that returns the inputs, or an .npy file for each input."""
    profiles: (
        Annotated[
            Annotated[Ranges, Tag("one")] | Annotated[list[Ranges], Tag("several"), Field(min_length=1)],
            Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
        ]
        | None
    ) = None
    """The ranges of the inputs' shapes; a list for an engine with several optimization profiles."""
    input_names: list[str] | None = None
    output_names: list[str] | None = None
    constants: dict[str, Any] | None = None
    """Values of an ONNX file's inputs, which the engine then does not have."""
    tolerance: (
        Annotated[
            Annotated[ToleranceSpec, Tag("for all")] | Annotated[dict[str, ToleranceSpec], Tag("per output")],
            Discriminator(_kind_of_tolerance),
        ]
        | None
    ) = None
    task_check: Function | None = None
    build: bool | None = None
    timeout: Seconds | None = None
    """Seconds for the whole model, the start of its process included."""
    build_timeout: Seconds | None = None
    compute_capabilities: list[Annotated[str, BeforeValidator(_read_capability)]] | None = None
    seed: int | None = None
    int_range: Annotated[tuple[int, int], AfterValidator(_read_range)] | None = None
    prove: bool | None = None
    layers: bool | None = None
    """Whether the error of each layer of a lower precision is measured."""
    golden: bool | None = None
    """Whether inputs and outputs are kept as evidence, for ``bridge verify``."""
    latency: bool | None = None
    """Whether the engine is timed, where a GPU runs it."""
    builder: Annotated[dict[str, Any], BeforeValidator(_read_builder)] | None = None
    """The names of bridge.BuildSettings, and their values."""
    calibration: Function | None = None
    """A function that returns the inputs of an int8 calibration."""
    calibration_algorithm: str | None = None
    cache: bool | Annotated[str, AfterValidator(_read_cache)] | None = None
    """Whether an engine that was built before may be taken; the path of a folder is another cache than the default."""
    plugins: list[Function] | None = None
    """Functions that are called first, to make plugins known (``bridge.register_plugin``)."""


class ModelSpec(Options):
    """One model to convert."""

    name: Annotated[str, AfterValidator(_read_name)]
    source: Annotated[str, AfterValidator(_read_source)]
    """An .onnx file, or a ``package.module:function`` that returns ``(module or path of an .onnx file, inputs)``."""


def by_precision(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The model by itself for each precision, called after both; none where no list of precisions is given.

    What is calibrated for nothing is left out, and for lower precisions the tolerance: each has its own by default.
    """
    from .precision import labels

    if not isinstance(spec.precision, list):
        return {}
    given, found = spec.model_dump(exclude_unset=True), {}
    for item, (label, precision) in zip(spec.precision, labels(spec.precision).items(), strict=True):
        unused = {"calibration", "calibration_algorithm"} if precision.plain else {"tolerance"}
        own = {key: value for key, value in given.items() if key not in unused}
        own |= {"name": f"{spec.name}-{label}", "precision": item, "latency": True}
        found[label] = ModelSpec.model_validate(own)
    return found
