"""LSTM, GRU and RNN as ONNX's operators of these names, one a layer, with a sequence of any length.

torch traces them step by step, which makes the length a constant. They are replaced while the module is traced already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import Untranslatable, replaces, translates
from .sizes import varies

_LIBRARY = torch.library.Library("bridge", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "lstm(Tensor x, Tensor w, Tensor r, Tensor b, Tensor h, Tensor c) -> (Tensor, Tensor, Tensor)",
    "gru(Tensor x, Tensor w, Tensor r, Tensor b, Tensor h) -> (Tensor, Tensor)",
    "rnn(Tensor x, Tensor w, Tensor r, Tensor b, Tensor h, bool relu) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def _lstm_shapes(x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0], x.shape[1], h.shape[-1]), torch.empty_like(h), torch.empty_like(c)


def _gru_shapes(x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0], x.shape[1], h.shape[-1]), torch.empty_like(h)


def _rnn_shapes(x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    return _gru_shapes(x, w, r, b, h)


for _name, _shapes in (("lstm", _lstm_shapes), ("gru", _gru_shapes), ("rnn", _rnn_shapes)):
    torch.library.register_fake(f"bridge::{_name}", _shapes, lib=_LIBRARY)


def _direction(w: Any) -> str:
    return "bidirectional" if int(w.shape[0]) == 2 else "forward"


@translates("bridge::lstm")
def onnx_lstm(x, w, r, b, h, c):  # type: ignore[no-untyped-def]
    from onnxscript import opset18 as op

    return op.LSTM(x, w, r, b, None, h, c, None, hidden_size=int(r.shape[-1]), direction=_direction(w))


@translates("bridge::gru")
def onnx_gru(x, w, r, b, h):  # type: ignore[no-untyped-def]
    from onnxscript import opset18 as op

    size, way = int(r.shape[-1]), _direction(w)
    return op.GRU(x, w, r, b, None, h, hidden_size=size, direction=way, linear_before_reset=1)


@translates("bridge::rnn")
def onnx_rnn(x, w, r, b, h, relu: bool):  # type: ignore[no-untyped-def]
    from onnxscript import opset18 as op

    functions = ["Relu" if relu else "Tanh"] * int(w.shape[0])
    size, way = int(r.shape[-1]), _direction(w)
    return op.RNN(x, w, r, b, None, h, hidden_size=size, direction=way, activations=functions)


# --- weights -----------------------------------------------------------------------------------------------------

ORDERS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,), "relu": (0,)}
"""ONNX's gates by their places in torch: i, o, f, c of i, f, c, o; z, r, h of r, z, n."""


def _gates(tensor: Tensor, kind: str) -> Tensor:
    """The gates of a matrix or a bias in ONNX's order."""
    chunks = tensor.chunk(len(ORDERS[kind]))
    return torch.cat([chunks[place] for place in ORDERS[kind]])


def _weights(params: Sequence[Tensor], kind: str, biases: bool, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [directions, gates, input], R [directions, gates, hidden] and B [directions, 2 gates] of a layer."""
    each = len(params) // directions
    sets = [params[i * each : (i + 1) * each] for i in range(directions)]
    w, r = (torch.stack([_gates(item[k], kind) for item in sets]) for k in (0, 1))
    if biases:
        b = torch.stack([torch.cat([_gates(item[2], kind), _gates(item[3], kind)]) for item in sets])
    else:
        b = w.new_zeros(directions, 2 * w.shape[1])
    return w, r, b


# --- layers ------------------------------------------------------------------------------------------------------


def _stack(
    kind: str,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    if train and dropout:
        raise Untranslatable("dropout between recurrent layers, in training mode")
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(params) // layers
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        own = params[layer * each : (layer + 1) * each]
        start = [state.narrow(0, layer * directions, directions) for state in states]
        if kind == "lstm" and states[0].shape[-1] != states[1].shape[-1]:
            x, *end = _projected(x, start, own, biases, directions)
        else:
            weights = _weights(own, kind, biases, directions)
            if kind in ("rnn", "relu"):
                y, *end = torch.ops.bridge.rnn(x, *weights, *start, kind == "relu")
            else:
                y, *end = getattr(torch.ops.bridge, kind)(x, *weights, *start)
            x = y.transpose(1, 2).flatten(2)
        for found, state in zip(last, end, strict=True):
            found.append(state)
    x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.cat(found) for found in last)


def _projected(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], biases: bool, directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of an LSTM with projections, which ONNX has none of: step by step."""
    each = len(params) // directions
    outputs, hs, cs = [], [], []
    for way in range(directions):
        w, r, *rest = params[way * each : (way + 1) * each]
        gates = torch.nn.functional.linear(x, w, rest[0] + rest[1] if biases else None)
        state = states[0][way], states[1][way]
        found, h, c = _steps(gates.flip(0) if way else gates, state, r.t(), rest[-1].t())
        outputs.append(found.flip(0) if way else found)
        hs.append(h)
        cs.append(c)
    return torch.cat(outputs, -1), torch.stack(hs), torch.stack(cs)


def _steps(gates: Tensor, state: tuple[Tensor, Tensor], r: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each step gives, and the last state: one after the other, or by Scan where their number is dynamic."""

    def step(state: tuple[Tensor, Tensor], gate: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        i, f, g, o = (gate + torch.matmul(state[0], r)).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.matmul(torch.sigmoid(o) * torch.tanh(c), projection)
        return (h, c), h.clone()

    if varies(gates.shape[0]):
        from torch._higher_order_ops.scan import scan

        (h, c), found = scan(step, state, gates)
        return found, h, c
    each = []
    for gate in gates:
        state, h = step(state, gate)
        each.append(h)
    return torch.stack(each), *state


@replaces("lstm.input")
def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    return _stack("lstm", input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


@replaces("gru.input")
def gru(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return _stack("gru", input, [hx], params, *options)


@replaces("rnn_tanh.input")
def rnn_tanh(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return _stack("rnn", input, [hx], params, *options)


@replaces("rnn_relu.input")
def rnn_relu(input: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    return _stack("relu", input, [hx], params, *options)
