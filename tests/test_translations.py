"""Each family of translations against torch: at the exported shape and, the batch being dynamic, at another one.

A family is exported as one module, whose outputs are named after what each of its functions shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import translations
from bridge.translations.registry import Untranslatable

from .support import run_onnx

Function = Callable[..., Any]
FAMILIES: dict[str, tuple[list[tuple[int, ...]], dict[str, Function]]] = {}
"""By family, the shapes of its inputs (the first axis is the batch) and its functions of these."""


def family(name: str, *shapes: tuple[int, ...], **functions: Function) -> None:
    FAMILIES[name] = list(shapes), functions


S = torch.special
L = torch.linalg


class All(nn.Module):
    def __init__(self, functions: dict[str, Function]) -> None:
        super().__init__()
        self.functions = functions
        self.inner = nn.ModuleList([item for item in functions.values() if isinstance(item, nn.Module)])

    def forward(self, *inputs: Any) -> Any:
        found = {}
        for name, function in self.functions.items():
            for index, leaf in enumerate(torch.utils._pytree.tree_leaves(function(*inputs))):
                found[f"{name}.{index}"] = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        return found


def exported(module: nn.Module, inputs: tuple[Any, ...], dynamic: bool = True) -> onnx.ModelProto:
    module.eval()
    with torch.no_grad():
        names = list(module(*inputs))
    shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs),) if dynamic else None
    options: dict[str, Any] = {"custom_translation_table": translations.table(), "dynamo": True, "verbose": False}
    with translations.installed():
        program = torch.onnx.export(
            module,
            inputs,
            dynamic_shapes=shapes,
            input_names=[f"in{index}" for index in range(len(inputs))],
            output_names=names,
            optimize=False,  # it takes most of the time, and hides what the translations write
            **options,
        )
    onnxscript.optimizer.fold_constants(program.model)  # torch leaves sums of a Range's int64 and float limits to it
    return program.model_proto


def check(model: onnx.ModelProto, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    taken = {info.name for info in model.graph.input}
    feeds = {f"in{index}": item.numpy() for index, item in enumerate(inputs) if f"in{index}" in taken}
    found = run_onnx(model, feeds)
    with torch.no_grad():
        expected = module(*inputs)
    for name, tensor in expected.items():
        array, wanted = found[name], tensor.resolve_neg().numpy()
        assert array.dtype == wanted.dtype, f"{name}: {array.dtype}, not {wanted.dtype}"
        assert array.shape == wanted.shape, f"{name}: {array.shape}, not {wanted.shape}"
        np.testing.assert_allclose(array, wanted, rtol=1e-3, atol=1e-4, equal_nan=True, err_msg=name)


def plane(x: torch.Tensor) -> torch.Tensor:
    """A complex tensor of the halves of the last axis."""
    return torch.complex(*x.chunk(2, -1))


def with_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0.8, math.nan, x)


def indices(x: torch.Tensor, bound: int) -> torch.Tensor:
    return (x.abs() * 7).to(torch.int64) % bound


def positive(x: torch.Tensor) -> torch.Tensor:
    """Symmetric matrices that are positive definite."""
    return torch.matmul(x, x.mT) + 2 * torch.eye(x.shape[-1])


class Trained(nn.Module):
    """What quantisation-aware training leaves, its observers off: an activation's range, and a weight's by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.of_weight = torch.ao.quantization.default_fused_per_channel_wt_fake_quant()
        self.of_input = torch.ao.quantization.default_fused_act_fake_quant()
        self(torch.randn(3, 4, 8))
        self.apply(torch.ao.quantization.disable_observer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of_input(x) * self.of_weight(self.weight)


def both_norms(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.linalg.matrix_norm(x, order, keepdim=order == 1) for order in (1, -1, math.inf, -math.inf)]


family(
    "quantisation",
    (3, 4, 8),
    narrow=lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -127, 127),
    seven_bits=lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 3, -64, 63),
    whole=lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, -5, -128, 127),
    unsigned=lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 100, 1, 255),
    channels=lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.tensor([0.01, 0.02, 0.03, 0.005]), torch.tensor([0, 1, -3, 0], dtype=torch.int32), 1, -127, 127
    ),
    channels_of_uint8=lambda x: torch.fake_quantize_per_channel_affine(
        x, torch.tensor([0.01, 0.02, 0.03, 0.005]), torch.tensor([100, 1, 7, 0], dtype=torch.int32), 1, 0, 255
    ),
    tensors=lambda x: torch.fake_quantize_per_tensor_affine(
        x, torch.tensor([0.01]), torch.tensor([2], dtype=torch.int32), -127, 127
    ),
    trained=Trained(),
)
family(
    "pooling",
    (3, 2, 7, 9),
    max2=lambda x: F.adaptive_max_pool2d(x, (3, 4), return_indices=True),
    max1=lambda x: F.adaptive_max_pool1d(x[:, 0], 4, return_indices=True),
    max3=lambda x: F.adaptive_max_pool3d(x.unsqueeze(1), (2, 3, 2), return_indices=True),
    average3=lambda x: F.adaptive_avg_pool3d(x.unsqueeze(1), (2, 3, 2)),
    dividing=lambda x: F.adaptive_max_pool2d(x, (7, 3)),
)
family(
    "running",
    (3, 8),
    product=lambda x: [x.cumprod(0), x.cumprod(-1), indices(x, 3).cumprod(1)],
    maximum=lambda x: [*x.cummax(0), *x.round().cummax(1), *indices(x, 5).cummax(-1)],
    minimum=lambda x: [*x.cummin(0), *x.round().cummin(1), *x.sum().cummin(0)],
)
family(
    "scattering",
    (3, 4),
    (3, 6),
    reduce=lambda x, y: [
        x.scatter_reduce(1, indices(y, 4), y, mode, include_self=self_too)
        for mode in ("sum", "prod", "mean", "amax", "amin")
        for self_too in (True, False)
    ],
    integers=lambda x, y: indices(x, 9).scatter_reduce(1, indices(y, 4), indices(y, 5), "mean"),
    smaller=lambda x, y: x.scatter_reduce(1, indices(y, 4)[:, :2], y, "mean"),
    index_reduce=lambda x, y: [
        x.index_reduce(1, torch.arange(6) % 4, y, mode, include_self=self_too)
        for mode in ("prod", "mean", "amax", "amin")
        for self_too in (True, False)
    ],
    by_name=lambda x, y: [x.scatter(1, indices(y, 4), y, reduce=how) for how in ("add", "multiply")],
    put=lambda x, y: [x.put(torch.arange(4), y[0, :4], accumulate=add) for add in (False, True)],
    masked=lambda x, y: [x.masked_scatter(x > 0, y), x.masked_scatter(x[:, :1] > 0, y)],
)
family(
    "indexing",
    (3, 4, 2),
    mask=lambda x: [x.masked_fill(x > 0, 0.5), x.index_put((x > 0,), torch.tensor(1.5), accumulate=True)],
    rows=lambda x: x.index_put((x[:, :, 0] > 0,), torch.tensor([1.0, 2.0])),
    columns=lambda x: torch.ops.aten.index_put(x, [None, x[0, :, 0] > 0], torch.tensor([[1.0, 2.0]])),
    places=lambda x: torch.nonzero_static(x > 0, size=9),
    repeated=lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 3]), 1, output_size=6),
    along=lambda x: [torch.take_along_dim(x, x.argsort(1), 1), torch.take_along_dim(x, x.argsort(1)[:1], 1)],
    diagonal=lambda x: [
        torch.diagonal_scatter(x, x[:, :1, 0], 1, 1, 2),
        torch.diagonal_scatter(x, x[:, :2, 0], -1, 1, 2),
    ],
    kron=lambda x: [torch.kron(x, torch.ones(2, 3)), torch.kron(x[:, 0], x[:, 1])],
    combinations=lambda x: [torch.combinations(x[0, :, 0], 3), torch.combinations(x[0, :, 0], 2, True)],
)
family(
    "ordering",
    (3, 9),
    stable=lambda x: [torch.sort(x.round(), stable=True, dim=1, descending=down) for down in (False, True)],
    argsort=lambda x: torch.argsort(x.round(), dim=1, stable=True),
    bools=lambda x: torch.sort(x > 0, dim=1)[0],
    kth=lambda x: [x.kthvalue(2, 1), x.kthvalue(8, -1, True), x.sum().kthvalue(1)],
    median=lambda x: [x.median(), x.median(1), x[:, 1:].median(1, True), with_nan(x).median(1)],
    nanmedian=lambda x: [with_nan(x).nanmedian(), with_nan(x).nanmedian(1, True), (x * math.nan).nanmedian(1)[0]],
    mode=lambda x: [indices(x, 3).mode(1), x.round().mode(1, True), x.round().mode(0)[0]],
    searched=lambda x: [
        torch.searchsorted(edges, x, right=right) for edges in (torch.linspace(-2, 2, 9),) for right in (False, True)
    ],
    searched_rows=lambda x: [
        torch.searchsorted(x.sort(1)[0], x, side="right"),
        torch.searchsorted(x, x, sorter=x.argsort(1)),
        torch.searchsorted(x[0].sort()[0], 0.5),
        torch.bucketize(x.round(), torch.arange(-2.0, 3), out_int32=True),
    ],
    histogram=lambda x: [torch.histc(x, 5, -1, 1), torch.histc(x, 5)],
    nanquantile=lambda x: [
        torch.nanquantile(with_nan(x), torch.tensor([0.2, 0.5]), 1, interpolation=how)
        for how in ("linear", "lower", "higher", "nearest", "midpoint")
    ],
    nanquantile_of_all=lambda x: [torch.nanquantile(with_nan(x), 0.3), torch.nanquantile(with_nan(x), 0.3, 1, True)],
    isin=lambda x: torch.isin(indices(x, 5), torch.tensor([1, 3])),
)
family(
    "special",
    (3, 40),
    inverse=lambda x: [torch.erfinv(torch.tanh(x)), torch.special.ndtri(torch.sigmoid(3 * x))],
    gamma=lambda x: [(3 * x).lgamma(), (3 * x.abs() + 0.1).digamma(), (-2 * x.abs() - 0.03).sigmoid().digamma()],
    polygamma=lambda x: [torch.polygamma(n, 2 * x.abs() + 0.2) for n in (0, 1, 2)],
    bessel=lambda x: [
        function(3 * x)
        for function in (
            torch.i0,
            torch.special.i0e,
            torch.special.i1,
            torch.special.i1e,
            torch.special.spherical_bessel_j0,
        )
    ],
    erfcx=lambda x: torch.special.erfcx(x),
    zeta=lambda x: torch.special.zeta(x.abs() + 1.5, x.abs() + 0.3),
)
family(
    "elementwise",
    (3, 9),
    hypot=lambda x: [
        torch.hypot(x, x.flip(1)),
        torch.hypot(x * 1e20, x.flip(1) * 1e20) / 1e20,
        torch.hypot(0 * x, 0 * x),
    ],
    copysign=lambda x: [torch.copysign(x, x.flip(1)), torch.copysign(x, -2.0), torch.copysign(x, -0.0 * x.abs())],
    signbit=lambda x: torch.signbit(x * 0),
    nan=lambda x: [torch.fmax(with_nan(x), x.flip(1)), torch.fmin(with_nan(x), with_nan(x.flip(1)))],
    frexp=lambda x: [torch.frexp(10 * x), torch.frexp(x.round())],
    extrema=lambda x: [torch.aminmax(x), torch.aminmax(x, dim=1, keepdim=True), x.amax(), torch.amin(x, keepdim=True)],
    bounds=lambda x: [x.clamp(1e-8, 1), x.clamp(-1, 0.5), indices(x, 9).clamp(1.5, 3), x.clamp(max=0), x.clip(-1, 1)],
    divisors=lambda x: [torch.gcd(indices(x, 50), indices(x.flip(1), 40)), torch.lcm(indices(x, 9), indices(x, 6))],
    shifts=lambda x: (indices(x, 99) << 2) + (indices(x, 99) >> 1),
    distance=lambda x: [torch.cdist(x[..., None], x[:2, :4, None][:1], p) for p in (0.0, 1.0, 2.0, 3.5, math.inf)],
    pairs=lambda x: F.pdist(x[:1].reshape(3, 3), 2.5),
)
family(
    "solving",
    (3, 4, 4),
    inverse=lambda x: [torch.linalg.inv(x), torch.inverse(x[:, :3, :3])],
    solution=lambda x: [
        torch.linalg.solve(x, x[..., :2]),
        torch.linalg.solve(x, x[..., 0]),
        torch.linalg.solve(x, x, left=False),
    ],
    determinant=lambda x: torch.linalg.slogdet(x),
    cholesky=lambda x: [torch.linalg.cholesky(positive(x)), torch.linalg.cholesky(positive(x), upper=True)],
    cholesky_solution=lambda x: torch.cholesky_solve(x[..., :1], torch.linalg.cholesky(positive(x))),
    triangular=lambda x: [
        torch.linalg.solve_triangular(
            positive(x), x[..., :2] if left else x[:, :2], upper=up, left=left, unitriangular=unit
        )
        for up in (False, True)
        for left in (False, True)
        for unit in (False, True)
    ],
    lu=lambda x: [torch.linalg.lu(x), torch.lu_solve(x, *torch.linalg.lu_factor(x))],
    power=lambda x: [torch.linalg.matrix_power(x, n) for n in (0, 3, -2)],
)
family(
    "factoring",
    (3, 5, 3),
    qr=lambda x: [torch.linalg.qr(x), torch.linalg.qr(x.mT), torch.linalg.qr(x, "complete")],
    singular=lambda x: [torch.linalg.svdvals(x), torch.linalg.pinv(x.mT), torch.linalg.matrix_norm(x, 2)],
    norms=both_norms,
)
family(
    "exponential",
    (3, 4, 4),
    exponential=lambda x: [torch.linalg.matrix_exp(x), torch.linalg.matrix_exp(3 * x), torch.matrix_exp(0 * x)],
    eigenvalues=lambda x: torch.linalg.eigvalsh(x[:, :3, :3]),
)
family(
    "complex",
    (3, 6),
    (3, 6),
    arithmetic=lambda x, y: [
        plane(x) * plane(y) / (plane(y) + 2j) - x[:, :3],
        (2.5 + 1j) * plane(x) - plane(y).conj(),
        torch.matmul(plane(x), plane(y).mT),
        torch.einsum("bi,bj->bij", plane(x), plane(y)),
        plane(x) ** 3,
        plane(x).sum(1) * plane(y)[:, 0],
    ],
    functions=lambda x, y: [
        function(plane(x))
        for function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.sgn, torch.square)
    ],
    roots=lambda x, y: torch.sqrt(torch.complex(1e4 * x, y)),
    parts=lambda x, y: [plane(x).abs(), plane(x).angle(), plane(x).real, plane(x).conj().imag, torch.polar(x, y)],
    shapes=lambda x, y: [
        torch.cat([plane(x), plane(y)], 1).reshape(-1, 2, 3).transpose(1, 2),
        torch.where(x[:, :3] > 0, plane(x), plane(y))[:, None].expand(-1, 2, -1),
        F.pad(plane(x), (1, 2)).roll(1, 1).flip(1),
        plane(x).cumprod(1),
        plane(x).masked_fill(y[:, :3] > 0, 0),
        *plane(x).unbind(1),
    ],
    tests=lambda x, y: [plane(x) == plane(x).conj(), plane(x).isnan(), plane(x).norm(dim=1)],
    rotary=lambda x, y: torch.view_as_real(
        torch.view_as_complex(x.reshape(-1, 3, 2)) * torch.polar(torch.ones(3), torch.arange(3.0))
    ),
)
family(
    "squeezes",
    (3, 1, 4),
    of_one=lambda x: x.squeeze(1) + 1,
    of_more=lambda x: x.squeeze(-1) + 1,
    of_both=lambda x: x.squeeze((1, 2)) + 1,
)
family(
    "transforms",
    (3, 32),
    mask=lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.exp(1j * torch.arange(17.0)), n=32),
    two=lambda x: torch.fft.irfft2(torch.fft.rfft2(x.reshape(-1, 4, 8), norm="ortho") * 2j, s=(4, 8), norm="ortho"),
    padded=lambda x: torch.fft.fft(plane(x), n=20, norm="forward"),
    back=lambda x: [
        torch.istft(torch.stft(x, 8, hop, window=w, return_complex=True, **kind), 8, hop, window=w, **kind, **more)
        for hop, w, kind, more in (
            (2, torch.hann_window(8), {}, {"length": 30}),
            (2, torch.hann_window(6).new_ones(8), {"normalized": True}, {}),
            (4, torch.hamming_window(8), {"onesided": False}, {}),
        )
    ],
    frequencies=lambda x: x + torch.fft.fftfreq(32) + torch.fft.rfftfreq(63, 0.5),
)
family(
    "recurrent",
    (3, 5, 6),
    lstm=nn.LSTM(6, 4, 2, bidirectional=True, batch_first=True),
    projected=nn.LSTM(6, 4, batch_first=True, proj_size=2, bidirectional=True),
    gru=nn.GRU(6, 4, bias=False, batch_first=True),
    rnn=nn.RNN(6, 4, bidirectional=True, batch_first=True, nonlinearity="relu"),
)
family(
    "stacked",
    (3, 5),
    columns=lambda x: torch.column_stack((x, x[:, 0], x)),
    depth=lambda x: torch.dstack((x, -x)),
    rows=lambda x: torch.vstack((x, x[0])),
    longer=lambda x: x[..., None, None].squeeze((1, -1)).squeeze((1,)).squeeze((1, -1)),
)
family(
    "losses",
    (3, 5),
    smoothed=lambda x: [
        F.cross_entropy(x, indices(x, 5)[:, 0], label_smoothing=0.1, reduction=how) for how in ("mean", "none")
    ],
    weighted=lambda x: F.cross_entropy(
        x, indices(x, 5)[:, 0], torch.arange(1.0, 6), ignore_index=2, label_smoothing=0.2
    ),
    probabilities=lambda x: F.cross_entropy(x, x.softmax(1), label_smoothing=0.1),
    margin=lambda x: F.multilabel_margin_loss(
        x, torch.tensor([1, 3, -1, 0, 2]).expand(x.shape[0], -1), reduction="none"
    ),
    covariance=lambda x: [torch.cov(x), torch.corrcoef(x)],
)


def bags(mode: str, weighted: bool = False, **options: Any) -> Function:
    """Of rows, and of those that begin at offsets; an empty one and one of padding alone among them."""
    table = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))

    def function(x: torch.Tensor) -> Any:
        ids = indices(x, 20)
        ids = torch.cat([ids[:, :3], torch.full_like(ids[:, :1], 7), ids[:, 4:]], 1)
        offsets = torch.tensor([0, 4, 4, 9])
        rows, flat = (x, x.reshape(-1)) if weighted else (None, None)
        return [
            F.embedding_bag(ids, table, mode=mode, per_sample_weights=rows, **options),
            F.embedding_bag(ids.reshape(-1), table, offsets, mode=mode, per_sample_weights=flat, **options),
            F.embedding_bag(ids[:, 3:4], table, None, None, 2.0, False, mode, padding_idx=7),
        ]

    return function


family(
    "bags",
    (3, 6),
    sum=bags("sum"),
    mean=bags("mean", padding_idx=7),
    max=bags("max", padding_idx=-13),
    last=lambda x: F.embedding_bag(
        indices(x, 20).reshape(-1),
        torch.eye(20),
        torch.cat([torch.tensor([0, 2]), torch.full((1,), x.numel())]),
        mode="mean",
        include_last_offset=True,
    ),
    weighted=bags("sum", weighted=True),
)


def inputs_of(shapes: list[tuple[int, ...]], batch: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, *shape[1:], generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_torch_does_at_both_shapes(name: str) -> None:
    shapes, functions = FAMILIES[name]
    torch.manual_seed(0)
    module = All(functions)
    inputs = inputs_of(shapes, 3)
    model = exported(module, inputs)
    check(model, module, inputs)
    check(model, module, inputs_of(shapes, 5))


def test_bags_at_offsets_are_no_loop_with_a_sequence() -> None:
    module = All({"bags": lambda x: nn.functional.embedding_bag(indices(x, 20)[:, 0], table, offsets, mode="max")})
    table, offsets = torch.randn(20, 5), torch.tensor([0, 1, 1])
    model = exported(module, (torch.randn(3, 2),))
    assert not {node.op_type for node in model.graph.node} & {"Loop", "SequenceEmpty", "ConcatFromSequence"}
    check(model, module, (torch.randn(5, 2),))


def test_a_recurrent_layer_takes_sequences_of_any_length() -> None:
    torch.manual_seed(0)
    module = All({kind: getattr(nn, kind)(6, 4, bidirectional=True) for kind in ("LSTM", "GRU", "RNN")})
    model = exported(module, (torch.randn(3, 2, 6),))
    assert [node.op_type for node in model.graph.node if node.op_type in ("LSTM", "GRU", "RNN")] == [
        "LSTM",
        "GRU",
        "RNN",
    ]
    check(model, module, (torch.randn(7, 2, 6),))


def test_a_mask_that_one_value_is_written_to_needs_no_count() -> None:
    def assigned(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[x > 0] = 0.5
        x[x[:, 0] < -1] = 2.0
        return x

    model = exported(All({"assigned": assigned}), (torch.randn(3, 4),))
    assert "NonZero" not in {node.op_type for node in model.graph.node}


def test_an_exported_program_is_translated_too() -> None:
    class Middle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.median(1)[0] * torch.view_as_complex(x.reshape(-1, 2, 2)).prod(1).abs()

    x = torch.randn(3, 4)
    program = torch.export.export(Middle(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with translations.installed():
        model = torch.onnx.export(program, custom_translation_table=translations.table(), verbose=False).model_proto
    y = torch.randn(6, 4)
    found = run_onnx(model, {model.graph.input[0].name: y.numpy()})
    np.testing.assert_allclose(next(iter(found.values())), Middle()(y).numpy(), rtol=1e-4, atol=1e-5)


def test_new_nodes_name_the_module_that_they_come_from() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x) @ torch.view_as_real(torch.fft.fft(x) * 2j)[..., 0]

    model = exported(All({"inner": Inner()}), (torch.randn(3, 4, 4),))
    texts = [{entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node]
    named = [text for text in texts if "inner" in text.get("pkg.torch.onnx.name_scopes", "")]
    assert len(named) > 40, f"{len(named)} of {len(texts)} nodes"
    assert all("test_translations.py" in text["pkg.torch.onnx.stack_trace"] for text in named)


def test_a_matrix_beyond_the_bound_is_refused_with_the_bound() -> None:
    from bridge.translations.factoring import linalg_eigh
    from bridge.translations.solving import linalg_inv

    with pytest.raises(Untranslatable, match="inv: a matrix of order 65; up to 64"):
        linalg_inv(torch.eye(65))
    with pytest.raises(Untranslatable, match="eigh: a matrix of order 33; up to 32"):
        linalg_eigh(torch.eye(33))


@pytest.mark.parametrize("order", [1, 2, 5, 16, 31])
def test_jacobis_eigenvalues_and_singular_values_are_lapacks(order: int) -> None:
    from bridge.translations.factoring import linalg_eigh, linalg_svd

    torch.manual_seed(order)
    a = torch.randn(4, order + 2, order)
    symmetric = a[:, :order] + a[:, :order].mT
    values, vectors = linalg_eigh(symmetric)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(symmetric), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, symmetric, rtol=1e-4, atol=2e-4)
    u, s, vt = linalg_svd(a)
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((u * s[:, None]) @ vt, a, rtol=1e-4, atol=1e-4)
