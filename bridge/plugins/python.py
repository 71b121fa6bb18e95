"""TensorRT plugins in Python: a class that says shapes and types, and does its work with torch on the GPU.

    class Scale(TorchPlugin):
        name = "Scale"
        attributes = {"factor": 2.0}

        def output_types(self, inputs):
            return [inputs[0]]

        def output_shapes(self, inputs, sizes):
            return [inputs[0]]

        def run(self, inputs, outputs):
            torch.mul(inputs[0], self.values["factor"], out=outputs[0])

The module is imported where TensorRT is, ``tensorrt`` (10 and above) or ``tensorrt_rtx``, and the class is registered
there. torch is needed when an engine runs, and not to build one: import it inside of ``run``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
"""torch's names of the types that a plugin's tensors can have, and TensorRT's."""


@dataclass(frozen=True)
class Size:
    """The size of an axis, as an expression that TensorRT evaluates when it knows the inputs' shapes."""

    expression: Any
    sizes: Sizes

    def __add__(self, other: AnySize) -> Size:
        return self.sizes.operation("SUM", self, other)

    def __sub__(self, other: AnySize) -> Size:
        return self.sizes.operation("SUB", self, other)

    def __mul__(self, other: AnySize) -> Size:
        return self.sizes.operation("PROD", self, other)

    def __floordiv__(self, other: AnySize) -> Size:
        return self.sizes.operation("FLOOR_DIV", self, other)


AnySize: TypeAlias = "Size | int"


class Sizes:
    """Makes sizes out of TensorRT's expressions, or out of numbers where the inputs' shapes are known."""

    def __init__(self, operate: Callable[[str, Any, Any], Any], constant: Callable[[int], Any], declare: Declare):
        self._operate, self._constant, self._declare = operate, constant, declare

    def size(self, value: AnySize) -> Size:
        return value if isinstance(value, Size) else Size(self._constant(value), self)

    def operation(self, name: str, a: AnySize, b: AnySize) -> Size:
        """SUM, SUB, PROD, MAX, MIN, FLOOR_DIV or CEIL_DIV of two sizes."""
        return Size(self._operate(name, self.size(a).expression, self.size(b).expression), self)

    def minimum(self, a: AnySize, b: AnySize) -> Size:
        return self.operation("MIN", a, b)

    def product(self, items: Sequence[AnySize]) -> Size:
        return functools.reduce(lambda a, b: a * b, items, self.size(1))

    def computed(self, output: int, largest: AnySize) -> Size:
        """A size of at most ``largest`` that the plugin finds out as it runs, and writes to that output, a scalar."""
        usual = self.operation("CEIL_DIV", largest, 2)  # what TensorRT tunes for
        return Size(self._declare(output, usual.expression, self.size(largest).expression), self)


Declare: TypeAlias = "Callable[[int, Any, Any], Any]"


def _expressions(trt: Any, builder: Any) -> Sizes:
    def operate(name: str, a: Any, b: Any) -> Any:
        return builder.operation(getattr(trt.DimensionOperation, name), a, b)

    return Sizes(operate, builder.constant, builder.declare_size_tensor)


_NUMBERS: dict[str, Callable[[int, int], int]] = {
    "SUM": operator.add,
    "SUB": operator.sub,
    "PROD": operator.mul,
    "MAX": max,
    "MIN": min,
    "FLOOR_DIV": operator.floordiv,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


def _numbers(known: Mapping[int, int]) -> Sizes:
    """Sizes that are numbers: a computed one is what is ``known`` of that output, or else the largest."""
    return Sizes(
        lambda name, a, b: _NUMBERS[name](a, b), lambda value: value, lambda output, _, most: known.get(output, most)
    )


Shape: TypeAlias = "Sequence[AnySize]"


class TorchPlugin:
    """What a plugin computes: derive, and write the methods. Objects are made anew for each node."""

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    namespace: ClassVar[str] = ""
    attributes: ClassVar[Mapping[str, Any]] = {}
    """By name the default: an int, a float, a str, or a list of int or float."""
    outputs: ClassVar[int] = 1

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = {**self.attributes, **(values or {})}

    def output_types(self, inputs: Sequence[str]) -> list[str]:
        """Names of types (see TYPES) of the outputs; a size that the plugin computes is int32."""
        raise NotImplementedError

    def output_shapes(self, inputs: Sequence[Shape], sizes: Sizes) -> list[Shape]:
        """The outputs' shapes. ``sizes`` makes those that are computed when the plugin runs."""
        raise NotImplementedError

    def takes(self, inputs: Sequence[str]) -> bool:
        """Whether the plugin computes on inputs of these types; asked of the first, the first two, …"""
        return all(kind in ("float32", "float16", "bfloat16") for kind in inputs)

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Computes on the current CUDA stream and writes into ``outputs``.

        An output with a size that ``computed`` declared has room for the largest; what is written to its memory from
        the front (``view(-1)``), without gaps, is the output.
        """
        raise NotImplementedError


def register_creator(trt: Any, plugin: type[TorchPlugin]) -> None:
    """Makes ``plugin`` known to the registry of TensorRT's module ``trt``."""
    creator = _creator_class(trt)(plugin)
    _KEPT.append(creator)  # the registry holds no reference of Python's
    trt.get_plugin_registry().register_creator(creator, plugin.namespace)


_KEPT: list[Any] = []


def concrete_shapes(
    plugin: TorchPlugin, inputs: Sequence[Sequence[int]], known: Mapping[int, int] | None = None
) -> list[tuple[int, ...]]:
    """The outputs' shapes for inputs of these shapes; sizes that are computed are the largest, or as ``known``."""
    sizes = _numbers(known or {})
    made = plugin.output_shapes([[sizes.size(axis) for axis in shape] for shape in inputs], sizes)
    return [tuple(sizes.size(axis).expression for axis in shape) for shape in made]


def evaluate(plugin: TorchPlugin, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the plugin computes, without TensorRT and on any device; sizes that it computes are among the outputs."""
    import torch

    shapes = [tuple(tensor.shape) for tensor in inputs]
    types = plugin.output_types([str(tensor.dtype).removeprefix("torch.") for tensor in inputs])
    rooms = [
        torch.empty(shape, dtype=getattr(torch, kind), device=inputs[0].device)
        for shape, kind in zip(concrete_shapes(plugin, shapes), types, strict=True)
    ]
    plugin.run(inputs, rooms)
    known = {index: int(room) for index, room in enumerate(rooms) if room.dim() == 0 and room.dtype == torch.int32}
    final = concrete_shapes(plugin, shapes, known)
    return [room.view(-1)[: math.prod(shape)].view(shape) for room, shape in zip(rooms, final, strict=True)]


# --- TensorRT's side ---------------------------------------------------------------------------------------------


@functools.cache
def _creator_class(trt: Any) -> Any:
    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, plugin: type[TorchPlugin]) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.plugin = plugin
            self.name, self.plugin_version, self.plugin_namespace = plugin.name, plugin.version, plugin.namespace
            fields = [trt.PluginField(key, np.array([]), _kind(trt, value)) for key, value in plugin.attributes.items()]
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values = {item.name: _read(item.data, self.plugin.attributes[item.name]) for item in fields}
            return _plugin_class(trt)(self.plugin(values))

    return Creator


@functools.cache
def _plugin_class(trt: Any) -> Any:
    names = {getattr(trt.DataType, other): own for own, other in TYPES.items() if hasattr(trt.DataType, other)}
    types = {own: kind for kind, own in names.items()}

    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*interfaces):  # type: ignore[misc]
        """TensorRT's interfaces over a TorchPlugin."""

        def __init__(self, inner: TorchPlugin) -> None:
            for base in interfaces:
                base.__init__(self)
            self.inner = inner
            self.plugin_name, self.plugin_version = inner.name, inner.version
            self.plugin_namespace, self.num_outputs = inner.namespace, inner.outputs

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(type(self.inner)(self.inner.values))

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            self.kept = [(key, _field(value)) for key, value in self.inner.values.items()]  # TensorRT copies none
            return trt.PluginFieldCollection(
                [trt.PluginField(key, data, _kind(trt, self.inner.attributes[key])) for key, data in self.kept]
            )

        def get_output_data_types(self, inputs: Any) -> Any:
            return [types[kind] for kind in self.inner.output_types([names[item] for item in inputs])]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            sizes = _expressions(trt, builder)
            given = [[Size(dims[axis], sizes) for axis in range(len(dims))] for dims in inputs]
            made = []
            for shape in self.inner.output_shapes(given, sizes):
                dims = trt.DimsExprs(len(shape))
                for axis, size in enumerate(shape):
                    dims[axis] = sizes.size(size).expression
                made.append(dims)
            return made

        def supports_format_combination(self, pos: int, tensors: Any, inputs: int) -> bool:
            if tensors[pos].desc.format != trt.TensorFormat.LINEAR:
                return False
            kinds = [names.get(item.desc.type, "") for item in tensors[: pos + 1]]
            if pos < inputs:
                return "" not in kinds and self.inner.takes(kinds)
            return kinds[pos] == self.inner.output_types(kinds[:inputs])[pos - inputs]

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            """Nothing depends on the bounds of the shapes."""

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """Shapes are read when the plugin runs."""

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0  # torch has its own

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            import torch

            shapes = [tuple(desc.dims) for desc in input_desc]
            given = [
                device_tensor(pointer, names[desc.type], shape)
                for pointer, desc, shape in zip(inputs, input_desc, shapes, strict=True)
            ]
            made = [
                device_tensor(pointer, names[desc.type], room)
                for pointer, desc, room in zip(outputs, output_desc, concrete_shapes(self.inner, shapes), strict=True)
            ]
            with torch.no_grad(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):  # type: ignore[no-untyped-call]
                self.inner.run(given, made)

    return Plugin


def _kind(trt: Any, default: Any) -> Any:
    sample = default[0] if isinstance(default, (list, tuple)) and default else default
    kinds = trt.PluginFieldType
    return kinds.CHAR if isinstance(sample, str) else kinds.FLOAT32 if isinstance(sample, float) else kinds.INT32


def _field(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8)
    floats = any(isinstance(item, float) for item in (value if isinstance(value, (list, tuple)) else [value]))
    return np.atleast_1d(np.asarray(value, np.float32 if floats else np.int32))


def _read(data: Any, default: Any) -> Any:
    """A field's data in the type of the attribute's default."""
    array = np.asarray(data)
    if isinstance(default, str):
        return array.astype(np.uint8).tobytes().rstrip(b"\0").decode()
    if isinstance(default, (list, tuple)):
        return array.reshape(-1).tolist()
    return type(default)(array.reshape(-1)[0])


# --- tensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Memory of the GPU for torch to look at, by the protocol that CUDA libraries share."""

    pointer: int
    code: str
    shape: tuple[int, ...]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.code, "data": (self.pointer, False), "version": 3}


def device_tensor(pointer: int, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor at ``pointer`` on the GPU, not copied."""
    import torch

    dtype = getattr(torch, kind)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device="cuda")
    if kind == "bfloat16":  # which the protocol has no code for
        return torch.as_tensor(_Memory(pointer, "<i2", shape), device="cuda").view(dtype)
    code = "|b1" if kind == "bool" else np.dtype(kind).str
    return torch.as_tensor(_Memory(pointer, code, shape), device="cuda")
