"""SwiftF0: the pitch of a voice or an instrument, every 16 ms; an STFT inside the graph, and a float64 output."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .common import SPEECH_RATE, Array, Run, note, require, speech, wheel_file

LOWEST, HIGHEST = np.float32(46.875), np.float32(2093.75)
"""Hz: the pitches that the model knows."""


def model() -> tuple[Path, dict[str, Array]]:
    """The ONNX file, and a second of speech.

    audio: float32 [1, samples] at 16 kHz; fmin and fmax: float32, scalars, Hz. Outputs, for each 256 samples: pitch,
    float64 [1, frames], Hz, and confidence, float32 [1, frames].
    """
    start = 15 * SPEECH_RATE
    return wheel_file("swift-f0", "swift_f0/model.onnx"), feed(speech()[start : start + SPEECH_RATE])


def feed(audio: Array) -> dict[str, Array]:
    return {"audio": audio[None], "fmin": np.array(LOWEST), "fmax": np.array(HIGHEST)}


def check(run: Run) -> str:
    """Notes of known pitch are heard within a few cents (hundredths of a semitone), and a voice where women speak."""
    errors = {}
    for frequency, seconds in ((110.0, 0.5), (440.0, 1.0), (987.77, 1.5)):
        outputs = run(feed(note(frequency, seconds, SPEECH_RATE)))
        steady = slice(8, -8)
        confidence = float(outputs["confidence"][0, steady].min())
        require(
            confidence > 0.5, f"the note of {frequency} Hz is heard with a confidence of {confidence:.2f} (over 0.5)"
        )
        cents = 1200 * np.log2(outputs["pitch"][0, steady] / frequency)
        errors[frequency] = float(np.nan_to_num(np.abs(cents), nan=np.inf).max())
    figures = ", ".join(f"{frequency:g} Hz within {error:.1f} cents" for frequency, error in errors.items())
    require(max(errors.values()) < 15, f"{figures} (under 15 is right)")

    outputs = run(feed(speech()[15 * SPEECH_RATE : 19 * SPEECH_RATE]))
    voiced = outputs["confidence"][0] > 0.5
    voice = float(np.median(outputs["pitch"][0][voiced])) if voiced.any() else float("nan")
    require(150 < voice < 300, f"{figures}; a woman's voice at {voice:.0f} Hz (between 150 and 300 is right)")
    return f"{figures}; a woman's voice at {voice:.0f} Hz, voiced in {voiced.mean():.0%} of 4 s"
