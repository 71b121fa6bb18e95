"""``torch2trt``: the call that torch2trt's users know, done by ``bridge.convert``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .build_settings import BuildSettings
from .calibration import CALIBRATORS
from .errors import BridgeError, RunError, UsageError
from .pipeline import convert
from .result import ConversionResult
from .runtime.calling import Calling
from .runtime.dataset import Dataset
from .runtime.module import TRTModule
from .target import Target, resolve
from .workspace import BUILD_LOG, write_text

Shapes = list[tuple[int, ...]]

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
DEVICE_TYPES = ("GPU", "DLA")
"""TensorRT's enums, in the order of their numbers."""

_DYNAMIC = "axes along which min_shapes and max_shapes differ are dynamic; opt_shapes lies between them"
_INSTEAD = {
    "dynamic_axes": _DYNAMIC,
    "dynamic_shapes": _DYNAMIC,
    "ignore_inputs": "inputs that the module does not use may stay in the call",
    "int8_calib_batch_size": "each item of int8_calib_dataset is calibrated with as it is",
    "min_batch_size": "with max_batch_size, batches begin at 1",
    "opset_version": "give onnx_opset",
    "opt_shape_param": _DYNAMIC,
    "qat_mode": "a module that quantises by itself is converted with the scales that it has",
    "verbose": "give log_level",
}
"""What other versions of torch2trt have, or take without a word, and why it can be left out."""

_OWN = ("source", "inputs", "input_names", "output_names", "opset", "check")
"""Parameters of ``convert`` that have another name here, or none."""

_warned_of_converters = False


def torch2trt(
    module: Any,
    inputs: Any,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    log_level: Any = "ERROR",
    fp16_mode: bool = False,
    max_workspace_size: int | None = None,
    strict_type_constraints: bool = False,
    keep_network: bool = True,
    int8_mode: bool = False,
    int8_calib_dataset: Any = None,
    int8_calib_algorithm: Any = None,
    use_onnx: bool = True,
    default_device_type: Any = "GPU",
    dla_core: int = 0,
    gpu_fallback: bool = True,
    device_types: Mapping[Any, Any] | None = None,
    min_shapes: Any = None,
    max_shapes: Any = None,
    opt_shapes: Any = None,
    onnx_opset: int | None = None,
    max_batch_size: int | None = None,
    avg_timing_iterations: int | None = None,
    **options: Any,
) -> TRTModule:
    """Converts a module, and returns the engine as one. The parameters are those of torch2trt 0.5.0, in its order.

    Args:
        module: what to convert; a ``torch.export.ExportedProgram`` too.
        inputs: a list or tuple of positional arguments, a dict of keyword arguments, a single tensor, or a Dataset:
            its first item is the example then, and the shapes are those that occur in it.
        input_names, output_names: of the engine's; by default ``input_0``, ``output_0`` and so on, nested ones counted
            through.
        log_level: TensorRT's messages of at least this severity are printed to stderr after the build, those above it
            are in ``build.log``. Enums may be given as TensorRT's own, by name, or as numbers.
        fp16_mode: float16 wherever the builder finds it faster.
        max_workspace_size: bytes of GPU memory that a layer may use. torch2trt's default, 32 MiB, keeps TensorRT from
            its fastest kernels: where nothing is given, TensorRT's own default stays.
        strict_type_constraints: keep to the asked types even where others are faster.
        keep_network: whether the returned module has a ``network``; it is parsed when it is first asked for.
        int8_mode, int8_calib_dataset, int8_calib_algorithm: 8-bit integers, what their ranges are found from (by
            default ``inputs``), and which of TensorRT's calibrators is to find them, where TensorRT has any; by default
            the model is quantised before the build.
        use_onnx: there is no other way here; False warns once that ONNX is used.
        default_device_type, dla_core, gpu_fallback, device_types: where layers run; ``device_types`` by the path of a
            submodule, or the submodule itself.
        min_shapes, max_shapes, opt_shapes: nested like ``inputs``; by default the smallest, largest and median that
            occur.
        onnx_opset: asked of the exporter.
        max_batch_size: makes the first axis of all inputs dynamic, from 1 to this.
        avg_timing_iterations: how often the builder times a kernel.
        options: ``bf16_mode``, and whatever else ``bridge.convert`` takes: target, workdir, profiles, tolerance, ….
            Without ``workdir`` the files are removed with the module's ``conversion``; with it, they stay, with
            ``report.html`` among them.

    Returns:
        A TRTModule; ``module.conversion`` is the ConversionResult.

    Raises:
        TypeError: for a keyword that there is not.
        UsageError: the call is wrong, or the target cannot do what it asks for.
        BridgeError: the conversion failed.
    """
    _check_options(options)
    if not use_onnx:
        _warn_of_converters()
    dataset = inputs if isinstance(inputs, Dataset) else None
    example = dataset[0] if dataset is not None and len(dataset) else inputs
    if dataset is not None and not len(dataset):
        raise UsageError(f"inputs: the {type(dataset).__name__} is empty; insert or record at least one example.")
    options["precision"] = _precision(options, fp16_mode, int8_mode)
    options.update(_calibration(options, int8_mode, int8_calib_dataset, int8_calib_algorithm, dataset))
    level = SEVERITIES.index(_read_enum("log_level", log_level, SEVERITIES))
    builder = _builder(
        options.pop("builder", None),
        workspace=max_workspace_size,
        strict_types=strict_type_constraints,
        avg_timing_iterations=avg_timing_iterations,
        **_devices(module, default_device_type, dla_core, gpu_fallback, device_types or {}),
    )
    if builder is not None:
        options["builder"] = builder
    options["opset"] = onnx_opset
    given = {"min_shapes": min_shapes, "opt_shapes": opt_shapes, "max_shapes": max_shapes}
    names = _Names(module, inputs if dataset is None else example, input_names, output_names)
    profiles = _profiles(names, dataset, given, max_batch_size)
    if options.get("profiles") is None:
        options["profiles"] = profiles
    elif max_batch_size is not None or any(shapes is not None for shapes in given.values()):
        raise UsageError("profiles: say the shapes too; leave out min_shapes, opt_shapes, max_shapes, max_batch_size.")
    result = _convert(module, names, level, options)
    if result.calling is not None:
        result.calling = result.calling.loosened()
    made = TRTModule.from_result(result)
    made.keep_network = keep_network
    return made


def _check_options(options: Mapping[str, Any]) -> None:
    others = [name for name in inspect.signature(convert).parameters if name not in _OWN]
    for name in options:
        if name not in (*others, "bf16_mode"):
            known = [*list(inspect.signature(torch2trt).parameters)[:-1], *others, "bf16_mode"]
            near = difflib.get_close_matches(name, known, 1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            if name in _INSTEAD:
                hint = f". Leave it out: {_INSTEAD[name]}"
            raise TypeError(f"torch2trt() got an unexpected keyword argument {name!r}{hint}")


def _check_engine(options: Mapping[str, Any]) -> None:
    """Raises UsageError where there would be no engine for a module, before anything is started."""
    given = options.get("target", "auto")
    target = given if isinstance(given, Target) else resolve(given)
    if not target.installed:
        raise UsageError(
            f"target: {target} is not installed here, and makes no engine; bridge.convert rewrites for it."
        )
    if not options.get("build", True):
        raise UsageError("build: without a build there is no engine; bridge.convert stops after the rewrite.")


def _warn_of_converters() -> None:
    global _warned_of_converters
    if not _warned_of_converters:
        _warned_of_converters = True
        warnings.warn(
            "use_onnx=False: there are no layer converters here; the module is converted through ONNX all the same.",
            stacklevel=3,
        )


def _precision(options: dict[str, Any], fp16_mode: bool, int8_mode: bool) -> Any:
    """What ``convert`` calls the modes; where several are on, all of them."""
    modes = {"int8": int8_mode, "fp16": fp16_mode, "bf16": options.pop("bf16_mode", False)}
    for name, on in modes.items():
        if isinstance(on, str):  # of which any but the empty one would mean yes
            raise UsageError(f"{name}_mode: is the word {on!r}; give True or False.")
    asked = "+".join(name for name, on in modes.items() if on)
    precision = options.pop("precision", None)
    if isinstance(precision, (list, tuple)):
        raise UsageError("precision: torch2trt makes one module; compare precisions by bridge.convert.")
    if precision is not None and asked and precision != asked:
        raise UsageError(f"precision {precision!r}: the modes ask for {asked}; give one of the two.")
    return precision or asked or "fp32"


def _calibration(
    options: Mapping[str, Any], int8_mode: bool, given: Any, algorithm: Any, dataset: Dataset | None
) -> dict[str, Any]:
    """What ranges are found from, and how, in the words of ``convert``."""
    found = {}
    if algorithm is not None and "calibration_algorithm" in options:
        raise UsageError("calibration_algorithm, int8_calib_algorithm: are the same; give one of them.")
    if algorithm is not None:
        found["calibration_algorithm"] = _read_enum("int8_calib_algorithm", algorithm, tuple(CALIBRATORS))
    if not int8_mode:
        if given is not None:
            warnings.warn("int8_calib_dataset: is not used, since int8_mode is off.", stacklevel=3)
        return {}
    if "calibration" in options:
        if given is not None:
            raise UsageError("calibration, int8_calib_dataset: are the same; give one of them.")
        return found
    if given is None and dataset is not None:
        first = dataset.shapes_for_index(0, flat=True)  # TensorRT's calibrators take one shape
        given = [dataset[index] for index in range(len(dataset)) if dataset.shapes_for_index(index, flat=True) == first]
    return found if given is None else {**found, "calibration": given}


def _read_enum(what: str, value: Any, names: Sequence[str]) -> str:
    """A member of TensorRT's enum, by itself, by name or by number. Raises UsageError."""
    if isinstance(value, str):
        name = value.rsplit(".", 1)[-1].upper()
    elif hasattr(value, "name"):
        name = str(value.name)
    else:
        name = names[value] if isinstance(value, int) and 0 <= value < len(names) else ""
    if name not in names:
        raise UsageError(f"{what}: {value!r} is none of {', '.join(names)}.")
    return name


def _devices(
    module: Any, default: Any, dla_core: int, gpu_fallback: bool, device_types: Mapping[Any, Any]
) -> dict[str, Any]:
    """The settings for devices; those of a DLA only where one is used, since torch2trt has defaults for them."""
    if not isinstance(device_types, Mapping):
        raise UsageError(f"device_types: a {type(device_types).__name__}; give a dict from submodules to GPU or DLA.")
    paths = {item: path for path, item in module.named_modules()} if isinstance(module, torch.nn.Module) else {}
    found: dict[str, Any] = {}
    for key, device in device_types.items():
        if not isinstance(key, str) and key not in paths:
            raise UsageError(f"device_types: {key!r} is neither a submodule nor the path of one.")
        path = key if isinstance(key, str) else paths[key]
        found[path] = _read_enum(f"device_types: {path!r}", device, DEVICE_TYPES)
    default = _read_enum("default_device_type", default, DEVICE_TYPES)
    dla = "DLA" in (default, *found.values())
    devices: dict[str, Any] = {"dla_core": dla_core} if dla or dla_core else {}
    if dla:
        devices.update(default_device=default, gpu_fallback=gpu_fallback, device_types=found)
    return devices


def _builder(given: Any, **asked: Any) -> BuildSettings | None:
    """``builder`` with what torch2trt's parameters ask for; None where nothing is."""
    asked = {name: value for name, value in asked.items() if value is not None and value is not False and value != {}}
    settings = BuildSettings.of(given)
    for name in asked:
        if name in settings.given():
            raise UsageError(f"builder: {name}: torch2trt's parameters say it too; give it once.")
    return dataclasses.replace(settings, **asked) if asked or given is not None else None


class _Names:
    """The module's call, with the names of the engine's inputs and outputs."""

    def __init__(
        self, module: Any, inputs: Any, input_names: Sequence[str] | None, output_names: Sequence[str] | None
    ) -> None:
        from .tensors import to_numpy
        from .torch_source import evaluating, make_source

        if not isinstance(module, (torch.nn.Module, torch.export.ExportedProgram)):
            raise UsageError(
                f"module: a {type(module).__name__}; give an nn.Module or a torch.export.ExportedProgram "
                "(bridge.convert takes ONNX files)."
            )
        self.bare = isinstance(inputs, torch.Tensor)
        self.inputs = inputs
        count = len(make_source(module, inputs, None, output_names).call.tensors)
        self.input_names = input_names or [f"input_{index}" for index in range(count)]
        made = make_source(module, inputs, self.input_names, None)
        self.calling = Calling.of(made.module.forward, made.call.structure, None, self.input_names)
        self.shapes = [tuple(tensor.shape) for tensor in made.call.tensors.values()]
        self.output_names = list(output_names or ())
        if not self.output_names:
            with evaluating(made.module):
                found = made.run({name: to_numpy(tensor) for name, tensor in made.call.tensors.items()})
            self.output_names = [f"output_{index}" for index in range(len(found))]


def _profiles(
    names: _Names, dataset: Dataset | None, given: Mapping[str, Any], max_batch_size: int | None
) -> dict[str, list[tuple[int, ...]]]:
    """The min, opt and max shape of each input."""
    low, opt, high = names.shapes, names.shapes, names.shapes
    if dataset is not None:
        low, opt = dataset.min_shapes(flat=True), dataset.median_numel_shapes(flat=True)
        high = dataset.max_shapes(flat=True)
    low = _flat_shapes("min_shapes", given["min_shapes"], names) or low
    opt = _flat_shapes("opt_shapes", given["opt_shapes"], names) or opt
    high = _flat_shapes("max_shapes", given["max_shapes"], names) or high
    if max_batch_size is not None:
        _check_batch(max_batch_size, opt)
        low = [(1, *shape[1:]) if shape else shape for shape in low]
        high = [(max_batch_size, *shape[1:]) if shape else shape for shape in high]
    return {
        name: [tuple(one) for one in shapes] for name, *shapes in zip(names.input_names, low, opt, high, strict=True)
    }


def _check_batch(most: Any, shapes: Shapes) -> None:
    if type(most) is not int or most < 1:
        raise UsageError(f"max_batch_size: {most!r} is no whole number of at least 1.")
    for shape in shapes:
        if shape and shape[0] > most:
            raise UsageError(f"max_batch_size: is {most}, and the inputs have {shape[0]} along their first axis.")


def _flat_shapes(what: str, given: Any, names: _Names) -> Shapes | None:
    if given is None:
        return None
    if not isinstance(given, (tuple, list, Mapping)):
        raise UsageError(f"{what}: a {type(given).__name__}; give shapes, nested like the inputs.")
    if names.bare and given and all(isinstance(size, int) for size in given):
        given = (given,)
    args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
    try:
        flat = names.calling.flatten(tuple(args), kwargs, shapes=True)
    except RunError as error:
        own = ", ".join(map(str, names.shapes))
        raise UsageError(f"{what}: {error} The shapes are nested like the inputs, which have {own}.") from error
    if any(isinstance(item, torch.Tensor) for item in flat):
        raise UsageError(f"{what}: holds a tensor; give shapes, nested like the inputs.")
    return [tuple(shape) for shape in flat]


def _convert(module: Any, names: _Names, level: int, options: dict[str, Any]) -> ConversionResult:
    """Converts, prints what ``log_level`` asks for, and sees to the files. Raises what the conversion failed with."""
    _check_engine(options)
    kept = options.get("workdir") is not None
    folder = Path(options.pop("workdir")) if kept else Path(tempfile.mkdtemp(prefix="torch2trt-"))
    options.pop("workdir", None)
    try:
        result: ConversionResult = convert(
            module,
            names.inputs,
            input_names=names.input_names,
            output_names=names.output_names,
            workdir=folder,
            **options,
        )
        _print_log(folder / BUILD_LOG, level)
        if kept:
            _write_report(folder / "report.html", result)
        if result.exception is not None:
            raise result.exception
    except BaseException:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if not kept:
        weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _write_report(path: Path, result: ConversionResult) -> None:
    """Raises what the conversion failed with where that is why the report cannot be written either."""
    from .report import render_report

    try:
        write_text(path, render_report(result))
    except OSError as error:
        raise result.exception or BridgeError(f"{path}: {error.strerror}") from error


def _print_log(path: Path, level: int) -> None:
    """TensorRT's messages up to a severity, as its logger would have printed them here."""
    if level == SEVERITIES.index("VERBOSE"):
        warnings.warn("log_level=VERBOSE: TensorRT's verbose messages are not kept; INFO and above are.", stacklevel=4)
    letters = tuple(f"[{letter}]" for letter in ("E", "E", "W", "I", "I")[: level + 1])
    if not path.is_file():  # it failed before the build
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(letters):
            print(f"[TensorRT] {line}", file=sys.stderr)
