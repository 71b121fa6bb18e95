"""Running an engine through Polygraphy, for comparison; only where a GPU can run it."""

from __future__ import annotations

from collections.abc import Sequence
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
    # EngineFromPath reads as a stream, which TensorRT before 10 has not.
    return TrtRunner(EngineFromBytes(BytesFromPath(str(engine))), name="engine")
