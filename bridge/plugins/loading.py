"""Which plugins a model calls, and how they come into the process that parses it or runs its engine."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BridgeError
from .alias import ensure_name

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from ..target import Target


class PluginError(BridgeError):
    """A plugin that cannot be loaded, or that is not what its registration says."""

    stage = "build"


@dataclass(frozen=True)
class NeededPlugin:
    """A plugin that an engine cannot be built or run without; with nothing to load, TensorRT brings it along."""

    name: str
    version: str
    namespace: str = ""
    library: str | None = None
    module: str | None = None

    def __str__(self) -> str:
        space = f" of the namespace {self.namespace!r}" if self.namespace else ""
        return f"plugin {self.name!r} version {self.version}{space}"

    @property
    def loaded(self) -> bool:
        """Whether something has to be loaded for it."""
        return self.library is not None or self.module is not None

    @property
    def source(self) -> str:
        if self.library is not None:
            return f"the library {self.library}"
        return f"the Python module {self.module}" if self.module is not None else "TensorRT's plugin library"

    def record(self) -> dict[str, Any]:
        """What an engine's sidecar says of it, the library's SHA-256 among it."""
        digest = hashlib.sha256(Path(self.library).read_bytes()).hexdigest() if self.library else None
        return {**asdict(self), "library_sha256": digest}


def needed_plugins(graph: gs.Graph, target: Target) -> list[NeededPlugin]:
    """What has to be loaded for the model, in the order of first use."""
    from passes.ir import is_plugin_call, scopes
    from passes.plugins import PLUGINS, plugin_of

    found: dict[NeededPlugin, None] = {}
    for scope in scopes(graph):
        for node in scope.nodes:
            called = is_plugin_call(node)
            if called or (not node.domain and target.only_by_plugin(node.op)):
                space, name, version = plugin_of(node)
                plugin = PLUGINS.get((space, name, version))
                if plugin is not None and plugin.loads_into(target):
                    found[NeededPlugin(name, version, space, plugin.library, plugin.module)] = None
                elif called:
                    found[NeededPlugin(name, version, space)] = None
    return list(found)


def check_files(plugins: Iterable[NeededPlugin]) -> None:
    """Raises PluginError where a plugin's library is not there."""
    for plugin in plugins:
        if plugin.library is not None and not Path(plugin.library).is_file():
            raise PluginError(
                f"{plugin} is to be loaded from {plugin.library}, and there is no such file. "
                "Build the library, or register the plugin with its path (library=...)."
            )


def load_plugins(plugins: Iterable[NeededPlugin], trt: Any) -> None:
    """Makes the plugins' creators known to the registry of TensorRT's module ``trt`` in this process.

    Raises PluginError where a library or module does not load, or does not bring its plugin along.
    """
    plugins = list(plugins)
    if any(plugin.module for plugin in plugins) and trt.__name__ == "tensorrt_rtx":
        ensure_name("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    check_files(plugins)
    for plugin in plugins:
        if _creator(plugin, trt) is None:
            try:
                _load(plugin, trt)
            except (ImportError, OSError) as error:
                raise PluginError(f"{plugin}: {plugin.source} does not load: {error}") from error
        if _creator(plugin, trt) is None:
            others = sorted({creator.name for creator in _creators(trt)})
            raise PluginError(
                f"{plugin}: {plugin.source} was loaded and registers no creator of that name, version and namespace. "
                f"Registered are: {', '.join(others) or 'none'}."
            )


def _creators(trt: Any) -> list[Any]:
    registry = trt.get_plugin_registry()
    return list(registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list)


def _creator(plugin: NeededPlugin, trt: Any) -> Any:
    wanted = (plugin.name, plugin.version, plugin.namespace)
    found = (c for c in _creators(trt) if (c.name, c.plugin_version, c.plugin_namespace) == wanted)
    return next(found, None)


def _load(plugin: NeededPlugin, trt: Any) -> None:
    if plugin.library is not None:
        _load_library(plugin, trt)
    elif plugin.module is not None:
        _load_module(plugin, trt)
    elif hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(None, "")


def _load_library(plugin: NeededPlugin, trt: Any) -> None:
    """Older libraries register their creators as they are loaded; those for ``load_library`` wait to be asked."""
    ctypes.CDLL(plugin.library, ctypes.RTLD_GLOBAL)
    registry = trt.get_plugin_registry()
    if _creator(plugin, trt) is None and hasattr(registry, "load_library"):
        registry.load_library(plugin.library)


def _load_module(plugin: NeededPlugin, trt: Any) -> None:
    """Imports the module, and calls its ``register(trt)``; without one, the classes that it defines are registered."""
    assert plugin.module is not None
    module = importlib.import_module(plugin.module)
    if hasattr(module, "register"):
        module.register(trt)
        return
    from .python import TorchPlugin, register_creator

    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, TorchPlugin) and item.__module__ == module.__name__:
            register_creator(trt, item)


def load_for_engine(engine: Path, trt: Any) -> None:
    """Makes ready what the engine file needs to be deserialised by TensorRT's module ``trt``, as its sidecar says.

    Raises PluginError where a plugin does not load, and OSError where ``<engine>.json`` is not there.
    """
    sidecar = json.loads(engine.with_name(f"{engine.name}.json").read_text(encoding="utf-8"))
    load_plugins(read_plugins(sidecar["plugins"]), trt)


def read_plugins(records: Iterable[Mapping[str, Any]]) -> list[NeededPlugin]:
    """The plugins of an engine's sidecar. Raises PluginError where a library has changed since the engine was built."""
    found = []
    for record in records:
        plugin = NeededPlugin(*(record[key] for key in ("name", "version", "namespace", "library", "module")))
        check_files([plugin])
        if plugin.library and plugin.record()["library_sha256"] != record.get("library_sha256"):
            raise PluginError(f"{plugin}: {plugin.library} is not the library that the engine was built with.")
        found.append(plugin)
    return found


def add_import_paths(paths: Iterable[str]) -> None:
    """Lets this process import what its parent could."""
    sys.path.extend(path for path in paths if path not in sys.path)
