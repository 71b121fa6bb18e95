"""Magika: what type a file has, from its first and its last kilobyte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .common import Array, Run, require, wheel_file

FOLDER = "magika/models/standard_v3_3"
ENDS, BLOCK, PADDING = 1024, 4096, 256
"""Of config.min.json: bytes from either end, out of a block without its outer whitespace; the number for no byte."""


def model() -> tuple[Path, dict[str, Array]]:
    """The ONNX file, and the bytes of real files: int32 [batch, 2048]."""
    return wheel_file("magika", f"{FOLDER}/model.onnx"), {"bytes": features(list(files().values())[:4])}


def files() -> dict[str, Path]:
    """A file of each type, by Magika's name for the type, from this folder and from the examples' wheels."""
    pictures = "skimage/data"
    return {
        "python": Path(__file__),
        "yaml": Path(__file__).with_name("models.yaml"),
        "markdown": wheel_file("magika", f"{FOLDER}/README.md"),
        "json": wheel_file("rxnmapper", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/config.json"),
        "xml": wheel_file("scikit-image", f"{pictures}/lbpcascade_frontalface_opencv.xml"),
        "png": wheel_file("scikit-image", f"{pictures}/astronaut.png"),
        "jpeg": wheel_file("scikit-image", f"{pictures}/rocket.jpg"),
        "gif": wheel_file("scikit-image", f"{pictures}/no_time_for_that_tiny.gif"),
        "npy": wheel_file("scikit-image", f"{pictures}/lfw_subset.npy"),
        "wav": wheel_file("pyannote.audio", "pyannote/audio/sample/sample.wav"),
        "onnx": wheel_file("swift-f0", "swift_f0/model.onnx"),
        "pytorch": wheel_file("facenet-pytorch", "facenet_pytorch/data/pnet.pt"),
    }


def features(paths: list[Path]) -> npt.NDArray[np.int32]:
    """The first and the last kilobyte of each file, int32 [len(paths), 2048], as ``magika.Magika`` takes them."""
    rows = []
    for path in paths:
        content = path.read_bytes()
        first = content[:BLOCK].lstrip()[:ENDS]
        last = content[-BLOCK:].rstrip()[-ENDS:]
        missing = [PADDING] * (2 * ENDS - len(first) - len(last))
        rows.append([*first, *missing, *last])
    return np.array(rows, dtype=np.int32)


def check(run: Run) -> str:
    """Each file's type is the most probable one."""
    config = json.loads(wheel_file("magika", f"{FOLDER}/config.min.json").read_text(encoding="utf-8"))
    names = np.array(config["target_labels_space"])
    known = files()
    probability = run({"bytes": features(list(known.values()))})["target_label"]
    top = names[probability.argmax(axis=1)]
    certain = probability.max(axis=1)
    wrong = [
        f"{path.name} is {is_}, called {called} ({sure:.2f})"
        for (is_, path), called, sure in zip(known.items(), top, certain, strict=True)
        if is_ != called
    ]
    require(not wrong, f"{len(wrong)} of {len(known)} files have another type: {'; '.join(wrong)}")
    return (
        f"{len(known)} file types named ({', '.join(known)}), each with a probability of at least {certain.min():.2f}"
    )
