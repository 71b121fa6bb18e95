from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .narrowing import Kernel

Ready = list[tuple[torch.Tensor, int]]
"""The outputs of coming calls, with their addresses."""
Surroundings = tuple[int, Callable[[int], int], Callable[[], int] | None, Callable[[], bool], Kernel | None]
"""The GPU's number, what gives its current stream, the current GPU (None: there is one), and whether the stream is
being captured, and the kernel that narrows inputs (None: torch does)."""

class Launch:
    def disarm(self) -> bool: ...
    def retire(self) -> None: ...

class ContextLaunch(Launch):
    def __init__(
        self,
        surroundings: Surroundings,
        execute: Callable[[int], bool],
        set_address: Callable[[str, int], bool],
        refill: Callable[[], Callable[[int], Ready | None] | None],
        restore: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None,
    ) -> None: ...
    def arm(
        self,
        inputs: Sequence[torch.Tensor],
        buffers: list[torch.Tensor | None],
        handle: int,
        stream: torch.cuda.Stream,
        names: list[str],
        outputs: Sequence[tuple[str, Ready]],
    ) -> None: ...

class GraphLaunch(Launch):
    def __init__(
        self,
        surroundings: Surroundings,
        replay: Callable[[], Any],
        copies: Sequence[Callable[[], torch.Tensor]],
    ) -> None: ...
    def arm(
        self, inputs: Sequence[torch.Tensor], buffers: list[torch.Tensor], handle: int, stream: torch.cuda.Stream
    ) -> None: ...

class Launches:
    def __init__(
        self,
        hooks: tuple[Mapping[Any, Any], ...],
        take: Callable[[Any], list[torch.Tensor] | None] | None,
        unflatten: Callable[[list[torch.Tensor]], Any] | None,
        by_name: bool,
        names: tuple[str, ...] | None,
        tracing: Callable[[], Any],
    ) -> None: ...
    def put(self, launch: Launch) -> None: ...

def launched(launches: Launches, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
