"""How a module that holds an engine is copied, pickled, saved and loaded."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import RunError, UsageError
from ..result import ConversionResult
from ..target import likely_flavour
from .calling import Calling
from .engine import Engine, PlanBytes
from .flattener import Flattener
from .launch import Launches
from .profiling import Profile
from .record import Record

_OF_THIS_PROCESS = ("_local", "_launches", "_profile", "_compiled_call_impl", "network")
"""Attributes that are neither copied nor pickled."""
_KEYS = ("engine", "record", "input_names", "output_names", "calling", "input_flattener", "output_flattener")
"""Of a state dict; the last two are torch2trt's."""


class Saved(torch.nn.Module):
    """An engine, and what has to be known to call it: the part of a TRTModule that outlives a process."""

    conversion: ConversionResult | None
    _engine: Engine | None
    _calling: Calling | None
    _input_names: list[str] | None
    _output_names: list[str] | None
    _launches: Launches | None = None
    """Make the calls that are like those before them."""

    def _begin(self) -> None:
        self._local = threading.local()
        self._profile: Profile | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Saved:
        """A copy with contexts of its own. The engine is shared, unless its weights can be changed."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for key, value in self.__dict__.items():
            if key not in (*_OF_THIS_PROCESS, "_engine", "conversion"):
                made.__dict__[key] = copy.deepcopy(value, memo)
        made._begin()
        made.conversion = self.conversion
        made._engine = self._engine.shared() if self._engine is not None else None
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in (*_OF_THIS_PROCESS, "_engine")}
        state["plan"] = None
        if self._engine is not None:
            plan = self._engine.serialize()
            state["plan"] = (plan, self._engine.record.of(plan))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        plan = state.pop("plan")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()
        self._engine = Engine(*plan) if plan is not None else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._engine is None:
            return
        plan = self._engine.serialize()
        destination[prefix + "engine"] = PlanBytes(plan)
        destination[prefix + "record"] = self._engine.record.of(plan).pack()
        destination[prefix + "input_names"] = self._input_names
        destination[prefix + "output_names"] = self._output_names
        destination[prefix + "calling"] = self._calling.pack() if self._calling is not None else None

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes what ``state_dict`` gave, or torch2trt's. What is wrong with it goes into torch's list of errors."""
        known = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*known)
        unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(prefix) not in _KEYS]
        if prefix + "engine" not in state_dict:
            missing_keys.append(prefix + "engine")
            return
        engine = state_dict[prefix + "engine"]
        plan = engine.cpu().numpy().tobytes() if isinstance(engine, torch.Tensor) else bytes(engine)
        names = [listed(state_dict.get(prefix + key)) for key in ("input_names", "output_names")]
        try:
            if prefix + "record" in state_dict:
                record = Record.unpack(state_dict[prefix + "record"])
                packed = state_dict.get(prefix + "calling")
                calling = Calling.unpack(packed) if packed is not None else None
            else:
                record = Record(likely_flavour(), inputs=tuple(names[0] or ()), outputs=tuple(names[1] or ()))
                found = [state_dict.get(prefix + key) for key in ("input_flattener", "output_flattener")]
                inputs, outputs = (Flattener.from_dict(item) if item is not None else None for item in found)
                calling = Calling((), inputs, outputs, tuple(names[0] or ()))
            record.check(plan, f"{prefix}engine")
        except RunError as error:
            error_msgs.append(str(error))
            return
        self._engine, self._calling = Engine(plan, record), calling
        self._input_names, self._output_names = names
        self._local = threading.local()
        self._refuse_if_it_cannot_run(prefix, error_msgs)

    def _refuse_if_it_cannot_run(self, prefix: str, error_msgs: list[str]) -> None:
        """Where there is a GPU, says at once why the engine cannot run on it, rather than at the first call."""
        assert self._engine is not None
        if torch.cuda.is_available():
            try:
                self._engine.check_here(torch.device("cuda", torch.cuda.current_device()))
            except RunError as error:
                error_msgs.append(f"{prefix}engine: {error}")


def listed(names: Sequence[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise UsageError(f"input_names, output_names: the word {names!r}; give lists of names.")
    return list(names) if names is not None else None
