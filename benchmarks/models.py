"""The models whose latency is measured: ResNet-50, ViT-B/16, a BERT-base-size encoder and an LSTM, weights random.

Plain torch, and nothing of ``bridge``: every Python that has a torch makes the same modules and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Inputs = tuple[torch.Tensor, ...]


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions, the stride in the middle (torchvision's and timm's)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """25,557,032 parameters, for images of 224 x 224."""

    def __init__(self, depths: Sequence[int] = (3, 4, 6, 3), stem: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        channels = stem
        for stage, depth in enumerate(depths):
            width = stem << stage
            for index in range(depth):
                blocks.append(Bottleneck(channels, width, 2 if index == 0 and stage else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(self.stem(image)), 1), 1))


class Attention(nn.Module):
    """Multi-head self-attention; Q, K and V come from one Linear."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """A transformer's layer; normalised before each half as in ViT, or after it as in BERT."""

    def __init__(self, dim: int, heads: int, before: bool) -> None:
        super().__init__()
        self.before = before
        epsilon = 1e-6 if before else 1e-12
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=epsilon), nn.LayerNorm(dim, eps=epsilon)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.before:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class ViT(nn.Module):
    """ViT-B/16: 86,567,656 parameters, for images of 224 x 224."""

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12, size: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList([Block(dim, heads, before=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Bert(nn.Module):
    """An encoder of BERT-base's size: token ids and a mask of what is no padding, to the last hidden state."""

    def __init__(self, dim: int = 768, depth: int = 12, heads: int = 12, words: int = 30522, length: int = 512) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.blocks = nn.ModuleList([Block(dim, heads, before=False) for _ in range(depth)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.word(input_ids) + self.position(places))
        mask = (attention_mask != 0)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x


class Lstm(nn.Module):
    """Two LSTM layers of 512, and a Linear on each step."""

    def __init__(self, features: int = 128, hidden: int = 512, layers: int = 2, out: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Small(nn.Module):
    """A small convolutional net, for what is not a matter of size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.bn(self.conv1(x))))).mean((2, 3)))


def images(batch: int, draw: torch.Generator) -> Inputs:
    return (torch.randn(batch, 3, 224, 224, generator=draw),)


def tokens(batch: int, draw: torch.Generator) -> Inputs:
    """int64 ids of 128 tokens; each text's last tokens, up to a half of them, are padding."""
    lengths = torch.randint(64, 129, (batch, 1), generator=draw)
    mask = (torch.arange(128)[None] < lengths).long()
    return torch.randint(0, 30522, (batch, 128), generator=draw) * mask, mask


def frames(batch: int, draw: torch.Generator) -> Inputs:
    return (torch.randn(batch, 64, 128, generator=draw),)


@dataclass(frozen=True)
class Model:
    """How to make a module, and its example inputs."""

    make: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Inputs]
    convolutional: bool = False
    """Whether torch may be faster with channels last."""

    def module(self) -> nn.Module:
        """In eval mode; the weights are the same at each call."""
        torch.manual_seed(0)
        module = self.make().eval()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):  # statistics as after training, rather than of the identity
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
                nn.init.normal_(layer.running_mean, std=0.1)
        return module

    def inputs(self, batch: int, seed: int = 0) -> Inputs:
        return self.draw(batch, torch.Generator().manual_seed(seed))


MODELS = {
    "resnet50": Model(ResNet50, images, convolutional=True),
    "vit_b16": Model(ViT, images),
    "bert": Model(Bert, tokens),
    "lstm": Model(Lstm, frames),
}


@dataclass(frozen=True)
class Case:
    """A model at one batch size, in one precision."""

    model: str
    batch: int
    precision: str
    """``fp32``, ``fp16`` or ``int8+fp16``."""

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.batch}-{self.precision}"

    @property
    def half(self) -> bool:
        return "fp16" in self.precision

    @property
    def quantised(self) -> bool:
        return "int8" in self.precision


SIZES = (("resnet50", 8), ("resnet50", 32), ("resnet50", 1), ("vit_b16", 8), ("bert", 8), ("lstm", 8))

QUANTISED_SIZES = (("resnet50", 8), ("resnet50", 32), ("vit_b16", 8))

CASES = {
    case.name: case
    for precision, sizes in (("fp16", SIZES), ("fp32", SIZES), ("int8+fp16", QUANTISED_SIZES))
    for case in (Case(model, batch, precision) for model, batch in sizes)
}
"""By name; those that matter most come first."""
