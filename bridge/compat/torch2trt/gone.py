"""Names of torch2trt with nothing to stand for here: they can be imported, and say at use what takes their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from bridge import UsageError

CONVERTERS = (
    "torch2trt.{}: there are no layer converters here, since modules are converted through ONNX. An operator that "
    "TensorRT does not take is replaced by a plugin (bridge.register_plugin) or rewritten by a rule (passes/README.md)."
)
PLUGINS = "torch2trt.{}: torch2trt's plugins are not here; plugins are made known by bridge.register_plugin."
CALIBRATOR = "torch2trt.{}: give the dataset itself, as torch2trt(..., int8_mode=True, int8_calib_dataset=dataset)."
TESTS = "torch2trt.{}: torch2trt's own tests are not here; bridge.convert compares every stage with the one before it."
QUANTISED = (
    "torch2trt.{}: torch2trt's layers for training with quantisation are not here; a module that quantises with "
    "torch's own fake_quantize operators is converted as it is."
)


def gone(name: str, why: str) -> Callable[..., NoReturn]:
    """A function that raises UsageError."""

    def raises(*args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(why.format(name))

    raises.__name__ = raises.__qualname__ = name
    raises.__doc__ = why.format(name)
    return raises


def module_of(why: str, module: str) -> Callable[[str], Callable[..., NoReturn]]:
    """A module's ``__getattr__``, under which every name is gone."""

    def getattribute(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return gone(f"{module}.{name}", why)

    return getattribute
