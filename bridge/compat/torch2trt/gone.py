"""Names of torch2trt with nothing to stand for here: they can be imported, and say at use what takes their place."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from bridge import UsageError

CONVERTERS = (
    "torch2trt.{}: there are no layer converters here, since modules are converted through ONNX. An operator that "
    "TensorRT does not take is replaced by a plugin (bridge.register_plugin) or rewritten by a rule (passes/README.md)."
)
PLUGINS = "torch2trt.{}: torch2trt's plugins are not here; plugins are made known by bridge.register_plugin."
CALIBRATOR = (
    "torch2trt.{}: give the dataset itself, as torch2trt(..., int8_mode=True, int8_calib_dataset=dataset); for an ONNX "
    "file, as bridge.convert(path, precision='int8', calibration=dataset)."
)
TESTS = "torch2trt.{}: torch2trt's own tests are not here; bridge.convert compares every stage with the one before it."
QUANTISED = (
    "torch2trt.{}: torch2trt's layers for training with quantisation are not here; a module that quantises with "
    "torch's own fake_quantize operators is converted as it is."
)

_MODULES = {
    "contrib": QUANTISED,
    "converters": CONVERTERS,
    "plugins": PLUGINS,
    "torch_plugins": PLUGINS,
}
"""What is gone as a whole, with the modules in it."""


def gone(name: str, why: str) -> type[Any]:
    """A class, since some derive theirs from it, that raises UsageError where it is called."""

    def raises(*args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(why.format(name))

    return type(name.rpartition(".")[2], (), {"__new__": raises, "__doc__": why.format(name)})


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of ``_MODULES`` and whatever is imported from them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix(f"{__package__}.")
        if name == fullname or name.partition(".")[0] not in _MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        own = module.__name__.removeprefix(f"{__package__}.")

        def getattribute(name: str) -> type[Any]:
            if name.startswith("__"):
                raise AttributeError(name)
            return gone(f"{own}.{name}", _MODULES[own.partition(".")[0]])

        module.__dict__["__getattr__"] = getattribute


sys.meta_path.append(_Modules())
