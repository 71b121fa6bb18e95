"""Operators that torch.library made, on their way into ONNX: those that a registered plugin replaces.

The exporter writes each as a node of its own domain; ``call_plugins`` then makes it a call of the plugin, which carries
what it computes along, so that the exported model is run and compared as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ExportError


def translations() -> dict[Any, Callable[..., Any]]:
    """For torch.onnx.export's ``custom_translation_table``: the operators that a plugin replaces and torch has."""
    from passes.plugins import REPLACED

    found: dict[Any, Callable[..., Any]] = {}
    for domain, op in REPLACED:
        overload = _overload(domain, op)
        if overload is not None:
            found[overload] = _translation(overload, domain, op)
    return found


def write_calls(path: Path) -> None:
    """Makes the nodes of an exported file that plugins replace calls of these; other files are left as they are."""
    from passes import read, write
    from passes.plugins import REPLACED, call_plugins

    if REPLACED:
        graph = read(path)
        if call_plugins(graph):
            write(graph, path)


_UNKNOWN = (
    r"(?P<domain>\S+?):(?P<op>\w+)\(-?\d+\) is not a registered function/op",
    r"No Op registered for (?P<op>\w+) with domain_version",
    r"Could not find an implementation for (?P<op>\w+_TRT)\(",
)
"""What ONNX Runtime says of an operator that it does not know, such as TensorRT's plugins in ONNX's own domain."""


def advice(words: str) -> str:
    """What to do where an exporter or ONNX Runtime says that it does not know an operator; empty for other words."""
    found = re.search(r"No ONNX function found for <OpOverload\(op='(?!aten|prims)(\w+)\.(\w+)'", words)
    if found is not None:
        name = f"{found[1]}::{found[2]}"
        return f"{name} has no translation to ONNX. bridge.register_plugin(..., replaces={name!r}) gives it one."
    found = next(filter(None, (re.search(form, words) for form in _UNKNOWN)), None)
    if found is not None:
        domain = found.groupdict().get("domain", "")
        pair = ("" if domain == "ai.onnx" else domain, found["op"])
        return f"bridge.register_plugin(..., replaces={pair!r}) says what it computes, and which plugin does it."
    return ""


def _overload(namespace: str, name: str) -> Any:
    import torch

    packet = getattr(getattr(torch.ops, namespace, None), name, None) if namespace.isidentifier() else None
    return getattr(packet, "default", None)


def _translation(overload: Any, domain: str, op: str) -> Callable[..., Any]:
    """A function that writes a call of ``overload`` as one node: tensors are its inputs, the rest its attributes."""
    import onnxscript

    arguments = overload._schema.arguments
    names = [argument.name for argument in arguments]
    tensors = [argument.name for argument in arguments if "Tensor" in str(argument.type)]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    schema = _schema(overload, domain, op, tensors)
    operator = onnxscript.values.Op(onnxscript.values.Opset(domain, 1), op, schema)

    def translate(*args: Any, **kwargs: Any) -> Any:
        values = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        inputs: list[Any] = []
        for name in tensors:
            value = values.pop(name)
            inputs.extend(value if isinstance(value, (list, tuple)) else [value])
        while inputs and inputs[-1] is None:
            inputs.pop()
        attributes = {name: _attribute(f"{domain}::{op}", name, value) for name, value in values.items()}
        return operator(*inputs, **{name: value for name, value in attributes.items() if value is not None})

    return translate


def _attribute(op: str, name: str, value: Any) -> Any:
    """The argument as an attribute. Raises ExportError where it is known only at run time."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(item is None or isinstance(item, (bool, int, float, str)) for item in items):
        raise ExportError(
            f"{op}: its argument {name!r} is known only at run time; a plugin's attributes are constants."
        )
    plain = [int(item) if isinstance(item, bool) else item for item in items]
    return plain if isinstance(value, (list, tuple)) else plain[0]


def _schema(overload: Any, domain: str, op: str, tensors: Sequence[str]) -> Any:
    """What onnxscript has to know of the operator: any tensors in, any tensors out, and the kinds of its attributes."""
    import onnx

    schema = onnx.defs.OpSchema
    anything = sorted(onnx.defs.get_schema("Identity", 13).type_constraints[0].allowed_type_strs)
    outputs = range(len(overload._schema.returns))
    return schema(
        op,
        domain,
        1,
        inputs=[
            schema.FormalParameter(
                "inputs", "T", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False, min_arity=0
            )
        ],
        outputs=[schema.FormalParameter(f"output_{index}", f"U{index}") for index in outputs],
        type_constraints=[("T", anything, ""), *((f"U{index}", anything, "") for index in outputs)],
        attributes=[
            schema.Attribute(argument.name, _kind(str(argument.type)), required=False)
            for argument in overload._schema.arguments
            if argument.name not in tensors
        ],
    )


def _kind(kind: str) -> Any:
    """The attribute type of an argument of this type, as torch writes it: ``int``, ``Optional[List[float]]``, …"""
    import onnx

    kinds = onnx.defs.OpSchema.AttrType
    many = "List[" in kind or kind.endswith("[]")
    if "float" in kind or "number" in kind:
        return kinds.FLOATS if many else kinds.FLOAT
    if "str" in kind:
        return kinds.STRINGS if many else kinds.STRING
    return kinds.INTS if many else kinds.INT
