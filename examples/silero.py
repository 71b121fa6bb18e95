"""Silero VAD: where in a recording somebody speaks; an STFT as a convolution, an LSTM cell, and nested Ifs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from .common import SPEECH_RATE, Array, Run, require, speech, speech_turns, wheel_file

CHUNK, CONTEXT = 512, 64
"""Samples: each call sees 32 ms of sound, after the last 4 ms of the chunk before."""
STREAMS = 4
MARGIN = 0.25
"""Seconds to either side of a turn's start and end that are not judged: people place them no better."""


def model() -> tuple[Path, dict[str, Array]]:
    """The ONNX file, and a chunk of four recordings at once.

    input: float32 [batch, 576]; state: float32 [2, batch, 128], the LSTM's; sr: int64, a scalar, 16000.
    """
    path = wheel_file("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx")
    chunks = streams()
    start = 5 * SPEECH_RATE // CHUNK
    first = np.concatenate([chunks[:, start - 1, -CONTEXT:], chunks[:, start]], axis=1)
    return path, {"input": first, "state": silence(), "sr": np.array(SPEECH_RATE, dtype=np.int64)}


def silence() -> npt.NDArray[np.float32]:
    """The LSTM's state before anything was heard."""
    return np.zeros((2, STREAMS, 128), dtype=np.float32)


def streams() -> npt.NDArray[np.float32]:
    """The telephone call cut into four recordings that run side by side: [4, chunks, 512]."""
    samples = speech()
    count = len(samples) // (STREAMS * CHUNK)
    return samples[: STREAMS * count * CHUNK].reshape(STREAMS, count, CHUNK)


def check(run: Run) -> str:
    """Speech is found where people marked it, the LSTM's state being carried from chunk to chunk."""
    chunks = streams()
    state, context = silence(), np.zeros((STREAMS, CONTEXT), dtype=np.float32)
    heard = []
    for at in range(chunks.shape[1]):
        sound = np.concatenate([context, chunks[:, at]], axis=1)
        outputs = run({"input": sound, "state": state, "sr": np.array(SPEECH_RATE, dtype=np.int64)})
        heard.append(outputs["output"][:, 0])
        state, context = outputs["stateN"], sound[:, -CONTEXT:]
    probability = np.stack(heard, axis=1).ravel()

    middle = (np.arange(len(probability)) + 0.5) * CHUNK / SPEECH_RATE
    speaking, judged = reference(middle)
    in_speech = float(probability[judged & speaking].mean())
    in_silence = float(probability[judged & ~speaking].mean())
    agreement = float(np.mean((probability > 0.5)[judged] == speaking[judged]))
    figures = (
        f"{agreement:.1%} of {int(judged.sum())} chunks agree with the annotation; "
        f"mean probability {in_speech:.2f} in speech, {in_silence:.2f} elsewhere"
    )
    require(
        agreement > 0.9 and in_speech > 0.75 and in_silence < 0.25, f"{figures} (over 90 %, 0.75, under 0.25 is right)"
    )
    return figures


def reference(times: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Whether somebody speaks at each of ``times`` (seconds), and whether that is far enough from a change to judge."""
    speaking = np.zeros(times.shape, dtype=bool)
    judged = np.ones(times.shape, dtype=bool)
    for _, start, end in speech_turns():
        speaking |= (times > start) & (times < end)
        judged &= (np.abs(times - start) > MARGIN) & (np.abs(times - end) > MARGIN)
    return speaking, judged
