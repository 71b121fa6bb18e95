"""torch tensors as NumPy arrays and back, bfloat16 included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy-free view where torch allows it; bfloat16 becomes that of ml_dtypes."""
    import torch

    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    import torch

    array = np.array(array, order="C", copy=True)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
