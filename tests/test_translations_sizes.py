"""Translations of what depends on sizes, strides and values; and small numbers that the exporter drops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bridge import Tolerance, convert

from .support import RTX
from .test_translations import All, check, exported


def overwritten(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 1:].copy_(x[:, :1])
    x[:, 0].copy_(torch.tensor(3))
    return x


def test_what_is_done_to_an_axis_follows_its_size() -> None:
    module = All(
        {
            "rolled": lambda x: (torch.roll(x, x.shape[0] // 2, 0), torch.roll(x, (-x.shape[0], 1), (1, 0))),
            "rolled_flat": lambda x: torch.roll(x, x.shape[0]),
            "shifted": lambda x: torch.fft.fftshift(torch.fft.fft(x)).real,
            "overwritten": overwritten,
            "averaged": lambda x: F.adaptive_avg_pool1d(x.transpose(0, 2), 2),
            "averaged_planes": lambda x: F.adaptive_avg_pool2d(x.transpose(0, 1), (4, 2)),
        }
    )
    model = exported(module, (torch.randn(3, 4, 9),))
    for size in (3, 4, 7):
        check(model, module, (torch.randn(size, 4, 9),))


def test_what_is_computed_with_a_size_follows_it() -> None:
    def place(x: torch.Tensor) -> torch.Tensor:
        return x.flatten().argsort()

    module = All(
        {
            "modulo": lambda x: (place(x) % x.shape[0], place(x) // x.shape[0], x.fmod(x.shape[0])),
            "bits": lambda x: (place(x) & x.shape[0], place(x) | x.shape[0], place(x) ^ x.shape[0]),
            "bits_of_constants": lambda x: (place(x) & 3, place(x) | 1, place(x) ^ 2, place(x) << 1, place(x) >> 1),
            "shifted": lambda x: (place(x) << x.shape[0], place(x) >> (x.shape[0] - 1)),
            "power": lambda x: (x.abs().pow(x.shape[0]), x / math.sqrt(x.shape[0]), x * math.sqrt(x.shape[0] / 2)),
            "added": lambda x: (torch.addcmul(x, x, x, value=x.shape[0]), torch.addcdiv(x, x, x, value=1 / x.shape[0])),
            "grid": lambda x: torch.linspace(-1, 1, x.shape[0]) + torch.linspace(0, x.shape[0] - 1, 4).unsqueeze(1),
            "centres": lambda x: torch.linspace(0.5, x.shape[0] - 0.5, x.shape[0], dtype=torch.float64).float(),
            "logarithmic": lambda x: torch.logspace(0, 1, x.shape[0]),
            "numbers": lambda x: x.sum() * x.new_tensor([x.shape[0], 0.5]) + torch.tensor([[x.shape[0] / 2, 1]]),
            "sizes": lambda x: x.sum() * torch.as_tensor(x.shape[:2]) + torch.tensor(x.shape[0], dtype=torch.float64),
            "scaled": lambda x: F.scaled_dot_product_attention(x, x, x + 1, scale=1 / math.sqrt(x.shape[0])),
            "one_hot": lambda x: F.one_hot(place(x) % x.shape[0], x.shape[0]),
        }
    )
    model = exported(module, (torch.randn(3, 2, 4),))
    for size in (3, 7, 1):
        check(model, module, (torch.randn(size, 2, 4),))


def test_filters_may_be_made_for_each_item_of_a_batch_of_any_size() -> None:
    def planes(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1, 6, 5)

    def own(x: torch.Tensor, *shape: int) -> torch.Tensor:
        return x.flatten(1)[:, : math.prod(shape)].reshape(-1, *shape[1:])

    def transposed(x: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
        return F.conv_transpose2d(planes(x), own(x, *shape), groups=x.shape[0], **options)

    module = All(
        {
            "modulated": lambda x: F.conv2d(planes(x), own(x, 3, 2, 3, 2), padding=(1, 0), groups=x.shape[0]),
            "strided": lambda x: F.conv2d(planes(x), own(x, 4, 2, 2, 2), None, 2, 1, 2, groups=x.shape[0]),
            "correlated": lambda x: F.conv2d(planes(x), x[:, :, :3, :3].reshape(-1, 1, 3, 3), groups=2 * x.shape[0]),
            "in_a_line": lambda x: F.conv1d(x.reshape(1, -1, 30), own(x, 2, 2, 5), padding=2, groups=x.shape[0]),
            "transposed": lambda x: transposed(x, 2, 3, 3, 3, stride=2),
            "transposed_padded": lambda x: transposed(x, 2, 2, 3, 2, stride=(3, 2), padding=1, output_padding=1),
            "transposed_dilated": lambda x: transposed(x, 2, 1, 2, 2, padding=2, dilation=2),
        }
    )
    model = exported(module, (torch.randn(3, 2, 6, 5),))
    for size in (3, 5, 1):
        check(model, module, (torch.randn(size, 2, 6, 5),))


def test_halves_and_signals_follow_the_size() -> None:
    window = torch.hann_window(16)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        signal = x.flatten()
        found = torch.stft(signal, 16, 4, window=window, return_complex=True)
        return torch.istft(found, 16, 4, window=window, length=signal.shape[0])

    def spectrum_and_back(x: torch.Tensor) -> list[torch.Tensor]:
        back = torch.fft.irfft(torch.fft.rfft(x, dim=0, norm="ortho") * 2, n=x.shape[0], dim=0, norm="ortho")
        return [back, torch.fft.irfft(torch.fft.rfft(x, dim=0), dim=0, norm="forward")]

    module = All(
        {
            "halves": lambda x: torch.cat([x, x + 1]).chunk(2),
            "of_three_rows": lambda x: torch.cat([x, x, x]).chunk(2)[1],
            "complex": lambda x: torch.complex(x, x + 1).repeat(2, 1, 1).chunk(2)[1].abs(),
            "signal": there_and_back,
            "spectrum": spectrum_and_back,
            "pooled": lambda x: F.adaptive_avg_pool3d(x.transpose(0, 2).unsqueeze(0), (1, 2, 2)),
        }
    )
    model = exported(module, (torch.randn(3, 5, 6),))
    for size in (3, 4, 7):
        check(model, module, (torch.randn(size, 5, 6),))


def test_a_projected_layer_takes_sequences_of_any_length() -> None:
    torch.manual_seed(0)
    module = All({"both_ways": nn.LSTM(6, 4, 2, proj_size=3, bidirectional=True), "one": nn.LSTM(6, 4, proj_size=2)})
    model = exported(module, (torch.randn(3, 2, 6),))
    for steps in (7, 1):
        check(model, module, (torch.randn(steps, 2, 6),))


def test_attention_takes_tensors_of_any_rank() -> None:
    def attend(x: torch.Tensor, *mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x * 2, x + 1, *mask, **options)

    module = All(
        {
            "rank_3": lambda x: (attend(x[:, 0]), attend(x[:, 0], scale=0.3)),
            "rank_5": lambda x: attend(x.unsqueeze(1)),
            "rank_2": lambda x: attend(x[:, 0, 0]),
            "causal": lambda x: attend(x[:, 0], is_causal=True),
            "added": lambda x: attend(x[:, 0], x[:, 1] @ x[:, 1].mT),
            "masked": lambda x: attend(x[:, 0], torch.tril(x[:, 0] @ x[:, 0].mT, -1) != 0),  # the first sees nothing
            "added_nothing": lambda x: attend(x[:, 0], torch.full((5, 5), -math.inf).triu(0)),
            "grouped": lambda x: F.scaled_dot_product_attention(x.unsqueeze(0), x[:, :1], x[:, :1], enable_gqa=True),
        }
    )
    model = exported(module, (torch.randn(3, 2, 5, 4),))
    for size in (3, 6):
        check(model, module, (torch.randn(size, 2, 5, 4),))


def test_antialiasing_by_a_factor_is_not_that_by_the_ratio_of_the_sizes() -> None:
    def by(mode: str, factor: float | tuple[float, float], x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=factor, mode=mode, antialias=True)

    module = All(
        {
            "bilinear": lambda x: by("bilinear", (0.7, 1.3), x),
            "bicubic": lambda x: by("bicubic", 0.45, x),
            "bicubic_of_any_size": lambda x: by("bicubic", 0.7, x.transpose(0, 2)),
        }
    )
    model = exported(module, (torch.randn(3, 3, 9, 8),))
    for size in (3, 5):
        check(model, module, (torch.randn(size, 3, 9, 8),))


def test_the_masks_of_transformers_may_have_any_size() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 16}
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 1)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 1, enable_nested_tensor=False)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = decoder, encoder

        def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            (x,) = inputs
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0])
            memory = self.encoder(x, mask=mask)
            return {"causal": self.decoder(x, memory, tgt_mask=mask), "other": self.encoder(x, mask=mask.T * 0 + 1)}

    module = Both()
    model = exported(module, (torch.randn(3, 2, 8),))
    check(model, module, (torch.randn(6, 2, 8),))


def test_rotary_embeddings_by_complex_numbers_leave_the_heads_to_be_joined() -> None:
    def attention(x: torch.Tensor) -> torch.Tensor:
        time, batch, width = x.shape
        heads = x.reshape(time, batch, 2, 4).permute(1, 2, 0, 3)
        angle = torch.arange(time)[:, None] * torch.tensor([1.0, 0.1])
        turned = torch.view_as_complex(heads.reshape(batch, 2, time, 2, 2)) * torch.polar(torch.ones_like(angle), angle)
        turned = torch.view_as_real(turned).flatten(-2)
        found = F.scaled_dot_product_attention(turned, turned, heads)
        return found.transpose(1, 2).reshape(batch, time, width)

    module = All({"attention": attention})
    model = exported(module, (torch.randn(3, 2, 8),))
    check(model, module, (torch.randn(6, 2, 8),))


def test_hammings_window_is_torchs() -> None:
    module = All(
        {
            "periodic": lambda x: x[:, :16] * torch.hamming_window(16),
            "symmetric": lambda x: x[:, :16] * torch.hamming_window(16, periodic=False),
            "chosen": lambda x: x[:, :16].double() * torch.hamming_window(16, True, 0.6, 0.3, dtype=torch.float64),
            "of_one": lambda x: x * torch.hamming_window(1, periodic=False),
            "spectrum": lambda x: torch.stft(x, 16, 8, window=torch.hamming_window(16), return_complex=True),
        }
    )
    model = exported(module, (torch.randn(3, 40),))
    check(model, module, (torch.randn(5, 40),))


def test_a_mean_by_a_divisor_of_its_own_keeps_it() -> None:
    module = All(
        {
            "ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, divisor_override=5),
            "cut": lambda x: F.avg_pool2d(x, 2, 3, 1, ceil_mode=True, count_include_pad=False, divisor_override=1),
            "of_any_size": lambda x: F.avg_pool2d(x.transpose(0, 2), (2, 1), divisor_override=3),
            "volumes": lambda x: F.avg_pool3d(x, (1, 2, 3), (1, 2, 2), (0, 1, 1), divisor_override=2),
            "usual": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        }
    )
    model = exported(module, (torch.randn(3, 2, 9, 10),))
    check(model, module, (torch.randn(5, 2, 9, 10),))


def test_a_small_number_that_guards_a_logarithm_is_kept(tmp_path: Path) -> None:
    class Guarded(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x * (x + 1e-10).log(), (x - -1e-12).rsqrt(), (x * 1.000009 - x) * 1e5

    x = torch.tensor([[0.0, 0.5, 1.0]])
    tolerance = Tolerance(1e-2, 1e-2)
    result = convert(Guarded(), (x,), target=RTX, build=False, workdir=tmp_path, tolerance=tolerance)
    assert result.status == "rewritten" and result.exporter == "dynamo", result.error
    assert all(np.isfinite(item.max_abs_error) for item in result.comparisons)
