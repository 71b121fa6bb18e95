"""TensorRT-RTX's parser in a process of its own: some models make it crash."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import onnx

SECONDS = 60


def answer_forever(pipe: Connection) -> None:
    """In the child: what the parser refuses of each model that comes."""
    import tensorrt_rtx as trt

    from tests.support import load_own_plugins

    load_own_plugins(trt)

    class Silent(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """What the parser refuses is asked of it below."""

    builder = trt.Builder(Silent())
    while True:
        parser = trt.OnnxParser(network := builder.create_network(0), Silent())
        taken = parser.parse(pipe.recv_bytes())
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{error.node_operator()}: {error.desc()} ({error.func()})" for error in errors]
        pipe.send([] if taken else said or ["refused without a word"])
        del parser, network


class Parser:
    """Starts the child with the first model, and again after a crash."""

    def __init__(self) -> None:
        self.child: multiprocessing.process.BaseProcess | None = None
        self.pipe: Connection | None = None

    def __enter__(self) -> Parser:
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            self.child = None

    def refuses(self, model: onnx.ModelProto) -> list[str]:
        """The parser's words; empty where it takes the model."""
        if self.child is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.child = context.Process(target=answer_forever, args=(theirs,), daemon=True)
            self.child.start()
            theirs.close()
        assert self.pipe is not None
        try:
            self.pipe.send_bytes(model.SerializeToString())
            if not self.pipe.poll(SECONDS):
                raise EOFError
            answer: list[str] = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.stop()
            return ["the parser crashed, or hung"]
        return answer
