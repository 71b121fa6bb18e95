"""Running an engine through Polygraphy, for comparison; only where a GPU can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..plugins.loading import NeededPlugin, PluginError, load_plugins
from ..target import Target


def engine_runner(engine: Path, target: Target, plugins: Sequence[NeededPlugin] = ()) -> Any:
    """A Polygraphy TrtRunner of the engine file, which needs ``plugins``.

    Raises RunError where Polygraphy already drives the other flavour, or a plugin does not load.
    """
    import sys

    from polygraphy import config

    rtx = target.flavour == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise RunError(f"this process has used the other TensorRT already; run {target} in a new process.")
    config.USE_TENSORRT_RTX = rtx
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    try:
        load_plugins(plugins, target.module())
    except PluginError as error:
        raise RunError(str(error)) from error

    class Runner(TrtRunner):  # type: ignore[misc]
        """Polygraphy's, in the optimization profile that holds the inputs' shapes: its own stays in the first."""

        def infer(self, feed_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            wanted = fitting_profile(self.engine, {name: tuple(array.shape) for name, array in feed_dict.items()})
            if wanted != self.context.active_optimization_profile:
                self.set_profile(wanted)
            return super().infer(feed_dict, *args, **kwargs)

    # EngineFromPath reads as a stream, which TensorRT before 10 has not.
    return Runner(EngineFromBytes(BytesFromPath(str(engine))), name="engine")


def fitting_profile(engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The first of a TensorRT engine's optimization profiles that ``shapes`` are within; 0 where none is, and TensorRT
    says why."""
    dynamic = {name: shape for name, shape in shapes.items() if -1 in tuple(engine.get_tensor_shape(name))}
    for index in range(engine.num_optimization_profiles):
        spans = {name: engine.get_tensor_profile_shape(name, index) for name in dynamic}
        if all(
            low <= size <= high
            for name, shape in dynamic.items()
            for low, size, high in zip(spans[name][0], shape, spans[name][2], strict=True)
        ):
            return index
    return 0
