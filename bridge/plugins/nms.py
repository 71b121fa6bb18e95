"""NonMaxSuppression as ONNX defines it: any number of batches and classes, a result of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from passes.plugins import NON_MAX_SUPPRESSION

from .python import Shape, Sizes, TorchPlugin

if TYPE_CHECKING:
    import torch

BLOCK = 1024
"""Candidates that are held against those before them at a time; memory goes with its square."""


def corners(boxes: torch.Tensor, center_point_box: bool) -> torch.Tensor:
    """Boxes [..., 4] as low and high corner; given by any two opposite corners, or by centre, width and height."""
    import torch

    if center_point_box:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat((torch.minimum(low, high), torch.maximum(low, high)), -1)


def overlapping(a: torch.Tensor, b: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Whether the boxes ``a`` [n, 4] and ``b`` [m, 4] overlap by more than ``threshold``, as [n, m]."""
    import torch

    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(-1) for box in (a, b))
    union = area_a[:, None] + area_b[None, :] - common
    real = (common > 0) & (area_a > 0)[:, None] & (area_b > 0)[None, :]
    return real & (common / union > threshold)


def non_max_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    most: torch.Tensor,
    iou_threshold: torch.Tensor,
    score_threshold: torch.Tensor,
    center_point_box: bool = False,
) -> torch.Tensor:
    """ONNX's NonMaxSuppression: [n, 3] int64 of batch, class and box, by batch, class and falling score.

    ``boxes`` is [batches, count, 4], ``scores`` [batches, classes, count]; the others hold one element each. A box is
    kept unless one of its class that is kept and scores higher (of equal ones, the earlier) overlaps it.
    """
    import torch

    batches, classes, count = scores.shape
    room = corners(boxes.float(), center_point_box)
    flat = scores.float().reshape(batches * classes, count)
    group, box = torch.nonzero(flat > score_threshold.reshape(()), as_tuple=True)
    order = torch.argsort(flat[group, box], descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    group, box = group[order], box[order]
    kept = _greedy(room[group // classes, box], group, iou_threshold.reshape(()))
    group, box = group[kept], box[kept]
    places = torch.arange(len(group), device=group.device)
    first = torch.searchsorted(group, group)
    allowed = places - first < most.reshape(())
    group, box = group[allowed], box[allowed]
    return torch.stack((group // classes, group % classes, box), 1)


def _greedy(boxes: torch.Tensor, group: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Which of the boxes, sorted by group and then from the best, are kept."""
    import torch

    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(boxes), BLOCK):
        mine = slice(start, start + BLOCK)
        alive = torch.ones_like(group[mine], dtype=torch.bool)
        same = int(torch.searchsorted(group, group[start]))  # where the first group of the block begins
        for other in range(same, start, BLOCK):
            before = slice(other, min(other + BLOCK, start))
            hit = overlapping(boxes[before], boxes[mine], threshold) & (group[before][:, None] == group[mine][None, :])
            alive &= ~(hit & kept[before][:, None]).any(0)
        hit = overlapping(boxes[mine], boxes[mine], threshold) & (group[mine][:, None] == group[mine][None, :])
        hit = hit.triu(1)
        found, last = alive, None
        while last is None or not torch.equal(found, last):  # each round settles one more link of each chain at least
            last, found = found, alive & ~(hit & found[:, None]).any(0)
        kept[mine] = found
    return kept


class NonMaxSuppression(TorchPlugin):
    name, namespace = NON_MAX_SUPPRESSION.name, NON_MAX_SUPPRESSION.namespace
    attributes = NON_MAX_SUPPRESSION.attributes
    outputs = 2

    def output_types(self, inputs: Sequence[str]) -> list[str]:
        return ["int64", "int32"]

    def output_shapes(self, inputs: Sequence[Shape], sizes: Sizes) -> list[Shape]:
        batches, classes, count = inputs[1]
        each = sizes.minimum(count, self.values["most"]) if self.values["most"] >= 0 else count
        return [[sizes.computed(1, sizes.product([batches, classes, each])), 3], []]

    def takes(self, inputs: Sequence[str]) -> bool:
        allowed = [("float32", "float16")] * 2 + [("int64", "int32"), ("float32",), ("float32",)]
        return all(kind in kinds for kind, kinds in zip(inputs, allowed))  # noqa: B905 - of the first inputs

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        boxes, scores, most, iou, score = inputs
        chosen = non_max_suppression(boxes, scores, most, iou, score, bool(self.values["center_point_box"]))
        outputs[0].view(-1)[: chosen.numel()] = chosen.reshape(-1)
        outputs[1].fill_(len(chosen))
