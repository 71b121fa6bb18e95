"""Arrays by name in an ``.npz`` file. ``np.savez`` takes some names, ``file`` among them, for arguments of its own."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def write_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes what ``np.load(path)`` reads. Raises OSError, and ValueError for arrays of Python objects."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
