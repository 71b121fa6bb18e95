"""P-Net, the first stage of MTCNN: fully convolutional, a face detector that is slid over pictures of any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import nn

from .common import Array, Run, picture, require, wheel_file

FACE = (183, 72, 270, 178)
"""The astronaut's face, from eyebrows to chin and from cheek to cheek, measured by eye: left, top, right, bottom."""
WINDOW, STRIDE = 12, 2
"""One output pixel looks at 12x12 input pixels, and the next one two further on."""
SMALLEST_FACE, PYRAMID_STEP, THRESHOLD = 40, 0.709, 0.7
"""In pixels; MTCNN's factor from one size of the picture to the next; MTCNN's lowest probability of a face."""


class PNet(nn.Module):
    """facenet-pytorch's P-Net, layer for layer: its own module imports torchvision, whose PyPI build needs CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, kernel_size=3)
        self.prelu1 = nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(10, 16, kernel_size=3)
        self.prelu2 = nn.PReLU(16)
        self.conv3 = nn.Conv2d(16, 32, kernel_size=3)
        self.prelu3 = nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, kernel_size=1)
        self.softmax4_1 = nn.Softmax(dim=1)
        self.conv4_2 = nn.Conv2d(32, 4, kernel_size=1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pool1(self.prelu1(self.conv1(image)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.softmax4_1(self.conv4_1(x))


def model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The module, and a picture beside its mirror image: float32 [n, 3, h, w], h and w at least 12.

    Its outputs, at (h', w') places: corrections of the box [n, 4, h', w'], in windows, and the probabilities of no face
    and of a face [n, 2, h', w'].
    """
    weights = wheel_file("facenet-pytorch", "facenet_pytorch/data/pnet.pt")
    module = PNet()
    module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return module.eval(), (torch.from_numpy(preprocess(pair(), WINDOW / SMALLEST_FACE)),)


def pair() -> list[Image.Image]:
    """The astronaut and her mirror image, cut to 400 columns: so the height and the width of what P-Net sees differ."""
    plain = picture("astronaut").crop((0, 0, 400, 512))
    return [plain, ImageOps.mirror(plain)]


def preprocess(images: list[Image.Image], scale: float) -> Array:
    """float32 [n, 3, h, w] in [-1, 1], as in MTCNN's training."""
    size = (int(images[0].width * scale) + 1, int(images[0].height * scale) + 1)
    pixels = np.stack([np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images])
    return ((pixels.astype(np.float32) - 127.5) / 128).transpose(0, 3, 1, 2)


def check(run: Run) -> str:
    """The astronaut's face is found over a pyramid of sizes, and on the other side in the mirror image."""
    images = pair()
    width, height = images[0].size
    candidates: list[list[Array]] = [[], []]
    scale = WINDOW / SMALLEST_FACE
    sizes = 0
    while min(width, height) * scale >= WINDOW:
        batch = preprocess(images, scale)
        outputs = run({"image": batch})
        for found, offsets, probabilities in zip(candidates, outputs["box"], outputs["face"], strict=True):
            found.append(boxes(offsets.astype(np.float64), probabilities[1].astype(np.float64), scale))
        scale *= PYRAMID_STEP
        sizes += 1

    left, top, right, bottom = FACE
    expected = (FACE, (width - right, top, width - left, bottom))
    sentences = []
    for name, found, face in zip(("the picture", "its mirror image"), candidates, expected, strict=True):
        box = most_voted(np.concatenate(found))
        require(box is not None, f"no face in {name}, over {sizes} sizes")
        overlap = float(iou(box[None], np.array(face, dtype=np.float64))[0])
        where = "({:.0f}, {:.0f})-({:.0f}, {:.0f})".format(*box[:4])
        sentences.append(f"{where} in {name} (IoU {overlap:.2f} with the face)")
        require(overlap > 0.6, f"the face was found at {sentences[-1]}, which should be over 0.6")
    return f"face found at {' and at '.join(sentences)}, over {sizes} sizes"


def boxes(offsets: Array, probability: Array, scale: float) -> npt.NDArray[np.float64]:
    """Rows of left, top, right, bottom and probability, in pixels of the picture before ``scale``."""
    rows, columns = np.nonzero(probability >= THRESHOLD)
    side = WINDOW / scale
    left, top = (STRIDE * columns + 1) / scale, (STRIDE * rows + 1) / scale
    move = offsets[:, rows, columns] * side
    corners = (left + move[0], top + move[1], left + side + move[2], top + side + move[3])
    return np.stack([*corners, probability[rows, columns]], axis=1)


def most_voted(candidates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The candidate that the most others overlap, weighted by probability; None where there is no candidate.

    P-Net alone is generous, and its later stages reject much; but only a face is seen at many places and sizes.
    """
    if not len(candidates):
        return None
    votes = [float(candidates[iou(candidates, box) > 0.5, 4].sum()) for box in candidates]
    return candidates[int(np.argmax(votes))]


def iou(candidates: npt.NDArray[np.float64], box: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Intersection over union of each candidate with one box."""
    width = np.minimum(candidates[:, 2], box[2]) - np.maximum(candidates[:, 0], box[0])
    height = np.minimum(candidates[:, 3], box[3]) - np.maximum(candidates[:, 1], box[1])
    shared = width.clip(0) * height.clip(0)
    area = (candidates[:, 2] - candidates[:, 0]) * (candidates[:, 3] - candidates[:, 1])
    return shared / (area + (box[2] - box[0]) * (box[3] - box[1]) - shared)
