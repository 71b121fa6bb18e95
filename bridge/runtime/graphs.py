"""CUDA graphs of an engine's run: one launch in place of one for each kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RunError
from .context import Context, new_context
from .engine import Engine
from .launch import GraphLaunch, Launch
from .profiles import Key
from .profiling import Profile

WARM_UP = 3
"""Calls of the same shapes after which a graph is made of them by itself."""

_ONE_AT_A_TIME = threading.Lock()
"""A capture begins with a wait for the whole GPU, which must not fall into another thread's capture."""

MOST = 8
"""Graphs that a thread keeps; each holds a context, with memory of its own."""


class CannotCapture(RunError):
    """There can be no CUDA graph of this engine's run."""


class Graph:
    """A captured run for inputs of one shape. What it returns is copied out: the next call does not change it."""

    def __init__(self, context: Context, example: Sequence[torch.Tensor], asked: bool) -> None:
        """Runs the context on ``example`` and captures it. Raises CannotCapture, and RunError as ``Context.run``."""
        self.context, self.asked = context, asked
        engine = context.engine
        if engine.record.branches and not engine.target.captures_branches:
            raise CannotCapture(
                f"no CUDA graph can be made of this engine: there is an If in it, and {engine.target} ends the process "
                "when one is captured"
            )
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(context.device):
            self.inputs = [tensor.clone() for tensor in context.fit(example)]
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                context.follow(stream)
                context.enqueue(self.inputs)  # what TensorRT does only the first time cannot be captured
            self.epoch = context.epoch
            if not context.sizes_known:
                raise CannotCapture(
                    "no CUDA graph can be made of this engine: a size is found out by the run itself, or the host "
                    "takes part in it"
                )
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.outputs = context.enqueue(self.inputs)
            except RuntimeError as error:  # CUDA's, for work that cannot be captured
                context.key = None
                raise CannotCapture(
                    f"no CUDA graph can be made of this engine: {str(error).splitlines()[0]}"
                ) from error
            specs = context.engine.inputs, context.engine.outputs
            self._buffers = [
                (buffer, buffer.shape, buffer.dtype, spec.source_dtype)
                for buffer, spec in zip(self.inputs, specs[0], strict=True)
            ]
            self._copies = [
                output.clone if output.dtype is spec.source_dtype else functools.partial(output.to, spec.source_dtype)
                for output, spec in zip(self.outputs, specs[1], strict=True)
            ]
            self.launch: GraphLaunch | None = None
            """Makes calls like the last one, if they can be; None where they never can."""
            if GraphLaunch is not None and not context.shared:
                replay = super(torch.cuda.CUDAGraph, self.graph).replay  # which is all that its own does
                self.launch = GraphLaunch(context.surroundings, replay, self._copies)
                context.add(self.launch)

    @property
    def valid(self) -> bool:
        """Whether its context has not been used for other shapes since."""
        return self.epoch == self.context.epoch

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """As ``Context.run``; None where the inputs are not those of the capture in shape, type or place."""
        return self.context.guarded(self._run, inputs)

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        context = self.context
        if self.epoch != context.epoch:
            return None
        context.follow_current()
        index, stream = context.index, context.stream
        for (buffer, shape, dtype, source_dtype), tensor in zip(self._buffers, inputs):  # noqa: B905 - of one length
            if (
                tensor.shape != shape
                or (tensor.dtype is not dtype and tensor.dtype is not source_dtype)
                or tensor.get_device() != index
            ):
                return None
            buffer.copy_(tensor.detach() if tensor.requires_grad else tensor, non_blocking=True)
        self.graph.replay()
        if stream is not None:  # while the GPU is at work
            for tensor in inputs:
                tensor.record_stream(stream)
            if self.launch is not None and not context.shared:
                self.launch.arm(inputs, self.inputs, stream.cuda_stream, stream)
        return [copy() for copy in self._copies]


class Session:
    """One thread's use of an engine: a context, and the CUDA graphs that were made."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.context = new_context(engine)
        self.takes_all = len(engine.taken) == len(engine.record.inputs or engine.inputs)
        """Whether each of the module's inputs is one of the engine's."""
        self.graphs: dict[Key, Graph] = {}
        self.refused: dict[Key, str] = {}
        """Why there is no graph for these shapes."""
        self._latest: Graph | None = None
        """The graph that was used last."""
        self._last: Key | None = None
        self._repeats = 0
        self.launch: Launch | None = None
        """What makes calls like the last one, if they can be repeated as they are."""

    def pick(self, given: list[Any]) -> list[Any]:
        """Of the module's inputs those that the engine takes, in its order."""
        return given if self.takes_all else [given[place] for place in self.engine.taken]

    def profile(self, profile: Profile) -> None:
        """Reports the time of each layer to ``profile``."""
        self._profiler = profile.profiler(self.engine.target.module())
        self.context.trt_context.profiler = self._profiler

    def run(self, inputs: Sequence[torch.Tensor], automatic: bool) -> list[torch.Tensor]:
        """The outputs; by a CUDA graph where there is one for these shapes, or it is time for one."""
        if not (automatic or self.graphs) or torch.cuda.is_current_stream_capturing():
            self.launch = self.context.launch
            return self.context.run(inputs)
        graph, outputs = self._latest, None
        if graph is not None and (automatic or graph.asked):
            self.launch, outputs = graph.launch, graph.run(inputs)
        return self._run(inputs, automatic) if outputs is None else outputs

    def _run(self, inputs: Sequence[torch.Tensor], automatic: bool) -> list[torch.Tensor]:
        """``run``, where it is not the graph that was used last."""
        key = tuple([tensor.shape for tensor in inputs])
        graph = self.graphs.get(key)
        if graph is not None and not graph.valid:
            del self.graphs[key]
            graph = None
        if graph is None and automatic and self._is_time(key):
            try:
                graph = self.capture(inputs, asked=False)
            except CannotCapture as error:
                self.refused[key] = str(error)
        if graph is not None and (automatic or graph.asked):
            self._latest, self.launch = graph, graph.launch
            outputs = graph.run(inputs)
            if outputs is not None:
                return outputs
        self.launch = self.context.launch if not automatic or key in self.refused else None
        return self.context.run(inputs)

    def _is_time(self, key: Key) -> bool:
        """Whether inputs of these shapes came often enough in a row."""
        self._repeats = self._repeats + 1 if key == self._last else 1
        self._last = key
        return self._repeats > WARM_UP and key not in self.refused

    def capture(self, inputs: Sequence[torch.Tensor], asked: bool = True) -> Graph:
        """A graph for inputs of these shapes, kept from now on. Raises as ``Graph`` does."""
        context = new_context(self.engine)
        with context.lock:
            graph = Graph(context, inputs, asked)
        if context is self.context:  # its only one: graphs of other shapes were of it, too
            self.graphs.clear()
        while len(self.graphs) >= MOST:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[tuple([tensor.shape for tensor in inputs])] = graph
        return graph
