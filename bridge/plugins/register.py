"""A user's own plugin, made known in one call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UsageError

if TYPE_CHECKING:
    from passes.plugins import Plugin

    from .python import TorchPlugin

Replaced: TypeAlias = "str | tuple[str, str] | Callable[..., Any]"
"""``namespace::name`` of a torch operator, ``(domain, op type)`` of an ONNX one, or a rule's function."""


def register_plugin(
    plugin: str | type[TorchPlugin],
    *,
    reference: Callable[..., Any],
    replaces: Replaced | Iterable[Replaced] = (),
    library: str | Path | None = None,
    module: str | None = None,
    version: str = "1",
    namespace: str = "",
    attributes: Mapping[str, Any] | None = None,
    outputs: int = 1,
) -> Plugin:
    """Makes a TensorRT plugin known: what it is called, what it computes, what it replaces, and how it is loaded.

        bridge.register_plugin(
            "RowNorms",
            attributes={"order": 2},
            reference=lambda g, x, order: g.op.ReduceL2(x, [-1]) if order == 2 else g.op.ReduceL1(x, [-1]),
            replaces="mylib::row_norms",
            library="/opt/plugins/librownorms.so",
        )

    Args:
        plugin: the name of its creator in TensorRT's registry; or a class derived from
            ``bridge.plugins.python.TorchPlugin``, which tells name, version, namespace, attributes, outputs and module.
        reference: ``reference(g, *inputs, **attributes)`` writes what the plugin computes with operators of ONNX
            (``g.op.Mul(x, y)``) and returns the tensor, or one for each output. ONNX Runtime runs it in the plugin's
            place, so that the comparisons cover the plugin; without one, nothing could tell what it is to compute.
            ``inputs`` know their ``dtype`` and ``shape``; those that are left out are None.
        replaces: what becomes the plugin. A torch operator (of ``torch.library.custom_op``, say) by its name
            ``"mylib::row_norms"``, or an ONNX one by domain and op type; its tensors are the plugin's inputs, and its
            other arguments the plugin's attributes, by name. Or a function as ``@passes.framework.rule`` takes, for a
            pattern of nodes; it returns ``g.plugin(plugin, inputs, attributes)``, and has its operators as
            ``function.ops`` (and ``function.domain``). Several may be given.
        library: path of the shared library that registers the creator.
        module: name of a Python module that registers one (IPluginV3; TensorRT from 10 on, TensorRT-RTX): its function
            ``register(trt)`` is called with TensorRT's module. With neither, TensorRT brings the plugin along.
        version, namespace: the creator's.
        attributes: by name the default, or the type of those that must be given; None for those that may be left out.
        outputs: how many there are.

    Where the target can load no such plugin (a Python module before TensorRT 10), its reference body is built instead.

    Raises:
        UsageError: something does not fit together, or a plugin of that name, version and namespace is known already.
    """
    from passes.plugins import PLUGINS, Plugin, register

    if not isinstance(plugin, str):
        if module or library or attributes is not None or (version, namespace, outputs) != ("1", "", 1):
            raise UsageError(f"plugin: the class {plugin.__name__} tells all but reference and replaces; give no more.")
        name, version, namespace = plugin.name, plugin.version, plugin.namespace
        attributes, outputs, module = plugin.attributes, plugin.outputs, plugin.__module__
    else:
        name = plugin
    if not callable(reference):
        raise UsageError(
            f"reference: plugin {name!r} needs a function that writes what it computes with operators of ONNX; without "
            "it neither the export nor the rewritten model could be run and compared."
        )
    if library is not None and module is not None:
        raise UsageError(f"library, module: plugin {name!r} is loaded from the one or the other.")
    if module is not None:
        _check_module(module, name)
    made = Plugin(
        name,
        version,
        namespace,
        dict(attributes or {}),
        outputs,
        reference,
        str(Path(library).absolute()) if library is not None else None,
        module,
    )
    if made.key in PLUGINS:
        raise UsageError(f"plugin {name!r}, version {version}, namespace {namespace!r}: is registered already.")
    items = _items(replaces)
    register(made)
    for item in items:
        _replace(made, item)
    return made


def _items(replaces: Any) -> list[Any]:
    """What is replaced, checked: (domain, op type) or a rule's function each."""
    pair = isinstance(replaces, tuple) and len(replaces) == 2 and not any("::" in str(part) for part in replaces)
    found: list[Any] = []
    for item in [replaces] if isinstance(replaces, str) or callable(replaces) or pair else replaces:
        names = tuple(item.split("::")) if isinstance(item, str) else item
        if callable(item) and not getattr(item, "ops", ()):
            raise UsageError(f"replaces: the rule {item.__name__} does not say which operators it is for (.ops).")
        if not callable(item) and not (len(names) == 2 and all(isinstance(name, str) for name in names) and names[1]):
            raise UsageError(f"replaces: {item!r} is neither 'namespace::name' nor (domain, op type) nor a rule.")
        found.append(names)
    return found


def _check_module(module: str, plugin: str) -> None:
    if module == "__main__":
        raise UsageError(
            f"module: plugin {plugin!r} is defined in the script that is run. Put it into a module of its own: the "
            "process that builds the engine imports it."
        )
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UsageError(f"module: there is no module {module!r} to load plugin {plugin!r} from.")


def _replace(plugin: Plugin, item: Any) -> None:
    from passes.framework import RULES, Rule, has_plugin
    from passes.plugins import REPLACED, replacing_rule

    if callable(item):
        function, ops, domain = item, tuple(item.ops), getattr(item, "domain", "")
    else:
        domain, op = item
        function, ops = replacing_rule(plugin, domain, op), (op,)
        REPLACED[domain, op] = plugin
    made = Rule(function, ops, has_plugin(plugin.name, plugin.version), domain)
    others = dict(RULES)
    others.pop(made.name, None)
    RULES.clear()
    RULES.update({made.name: made, **others})  # the user's come first
