"""Basic Pitch: which piano keys sound when; a constant-Q transform inside a graph that TensorFlow made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from .common import SPEECH_RATE, Array, Run, note, require, speech, wheel_file

RATE, SAMPLES = 22_050, 43_844
"""Samples a second, and of a window: two seconds, 172 frames."""
INPUT = "serving_default_input_2:0"
NOTES = "StatefulPartitionedCall:1"
"""float32 [batch, 172, 88]: how surely each piano key sounds; the other outputs are onsets and pitch contours."""
LOWEST_KEY = 21
"""MIDI's number of the piano's lowest key."""
CHORDS = {"C major": (60, 64, 67), "A minor": (57, 60, 64), "D minor seventh": (50, 53, 57, 60)}


def model() -> tuple[Path, dict[str, Array]]:
    """The ONNX file, and a chord and two seconds of speech: float32 [batch, 43844, 1]."""
    times = 15 + np.arange(SAMPLES) / RATE
    voice = np.interp(times * SPEECH_RATE, np.arange(30 * SPEECH_RATE), speech()[: 30 * SPEECH_RATE])
    windows = np.stack([chord(CHORDS["C major"]), voice.astype(np.float32)])
    return wheel_file("basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx"), {INPUT: windows[:, :, None]}


def chord(keys: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Plucked notes that begin together, by MIDI key; key 69 is 440 Hz."""
    notes = [note(440 * 2 ** ((key - 69) / 12), SAMPLES / RATE, RATE) for key in keys]
    return np.sum(notes, axis=0, dtype=np.float32) / len(notes)


def check(run: Run) -> str:
    """The keys of three chords are heard, and no others as loudly."""
    windows = np.stack([chord(keys) for keys in CHORDS.values()])[:, :, None]
    heard = run({INPUT: windows})[NOTES][:, 10:100].mean(axis=1)
    sentences = []
    for (name, keys), sure in zip(CHORDS.items(), heard, strict=True):
        loudest = tuple(sorted(int(key) + LOWEST_KEY for key in np.argsort(-sure)[: len(keys)]))
        ranked = np.sort(sure)[::-1]
        sentences.append(
            f"{name} as keys {loudest}, at least {ranked[len(keys) - 1]:.2f} sure, of others {ranked[len(keys)]:.2f}"
        )
        require(loudest == keys and ranked[len(keys) - 1] > 0.3, f"heard {sentences[-1]}, and not as keys {keys}")
    return f"heard {'; '.join(sentences)}"
