"""The masks of nn.Transformer: whether one is causal is asked of its values, of which torch.export has none."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor, nn


def of_any_values() -> Any:
    """Within it, a mask that is not said to be causal is added like any other, which computes the same."""
    return mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _said_to_be_causal)


def _said_to_be_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
