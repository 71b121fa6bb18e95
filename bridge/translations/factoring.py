"""QR by Householder's reflections, eigenvalues and singular values by Jacobi's rotations, the exponential; unrolled."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import Untranslatable, decomposes, static
from .solving import eye, order, substitute

LARGEST_JACOBI = 32
"""Eigenvalues and singular values are unrolled up to this order: sweeps of n - 1 rounds of n / 2 rotations each."""


def householder(a: Tensor) -> tuple[Tensor, Tensor]:
    """The full orthogonal Q [..., m, m] and R [..., m, n], with LAPACK's signs."""
    m = static(a.shape[-2], "qr: the number of rows")
    n = static(a.shape[-1], "qr: the number of columns")
    order(a, "qr")
    rows = torch.arange(m, device=a.device)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    work = torch.cat([a, eye(m, a).expand(*a.shape[:-2], m, m)], -1)
    for k in range(min(m - 1, n)):
        x = torch.where(rows >= k, work[..., k], zero)
        head = x[..., k : k + 1]
        rest = torch.where(rows > k, x, zero)
        square = (rest * rest).sum(-1, keepdim=True)
        norm = (head * head + square).sqrt()
        done = square == 0  # nothing to do below the diagonal: LAPACK keeps the sign then
        shifted = head + torch.where(head < 0, -norm, norm)
        v = torch.where(rows == k, shifted, rest)
        scale = 2.0 / torch.where(done, torch.ones_like(square), shifted * shifted + square)
        scale = torch.where(done, zero, scale)
        product = torch.matmul(v.unsqueeze(-2), work)
        work = work - (scale * v).unsqueeze(-1) * product
    return work[..., n:].mT, work[..., :n].triu()


@decomposes("linalg_qr")
def linalg_qr(A: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    q, r = householder(A)
    k = min(A.shape[-2:])
    if mode == "complete":
        return q, r
    return (q[..., :k] if mode == "reduced" else torch.zeros(0, dtype=A.dtype, device=A.device)), r[..., :k, :]


@decomposes("linalg_lstsq")
def linalg_lstsq(
    self: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By QR, for matrices of full rank: least squares of tall ones, the smallest solution of wide ones."""
    m, n = self.shape[-2:]
    vector = b.dim() == self.dim() - 1
    right = b.unsqueeze(-1) if vector else b
    if m >= n:
        q, r = linalg_qr(self)
        found = substitute(r, torch.matmul(q.mT, right), upper=True)
    else:
        q, r = linalg_qr(self.mT)
        found = torch.matmul(q, substitute(r.mT, right, upper=False))
    found = found.squeeze(-1) if vector else found
    nothing = torch.zeros(0, dtype=self.dtype, device=self.device)
    rank = torch.full(self.shape[:-2], min(m, n), dtype=torch.int64, device=self.device)
    return found, nothing, rank, nothing


def _seats(x: Tensor, axis: int) -> Tensor:
    """The next round's order along ``axis``: all but the first move on by one, round the table.

    The first half sits opposite to the second; n - 1 rounds let each meet each and bring all back to their seats.
    """
    n = x.shape[axis]
    half = n // 2
    places = [0, half, *range(1, half - 1), *range(half + 1, n), half - 1] if half > 1 else [0, 1]
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return torch.cat([x.narrow(axis, first, last - first) for first, last in runs], axis)


def sweeps(n: int) -> int:
    """Jacobi converges quadratically; so many sweeps leave float32's last digits alone."""
    return 4 + max(1, math.ceil(math.log2(n)))


def rotation(p: Tensor, q: Tensor, pq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine that make ``pq`` of the symmetric [[p, pq], [pq, q]] vanish, by the smaller angle."""
    zero = pq == 0
    tau = (q - p) / (2 * torch.where(zero, torch.ones_like(pq), pq))
    size = tau.abs()
    root = torch.where(size > 1e8, size, (1 + size.clamp(max=1e8).square()).sqrt())
    t = torch.where(tau < 0, -1.0, 1.0).to(p.dtype) / (size + root)
    t = torch.where(zero, torch.zeros_like(t), t)
    cosine = torch.rsqrt(1 + t * t)
    return cosine, cosine * t


def _turn(x: Tensor, axis: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """The rotations of the first half of ``axis`` with the second."""
    half = x.shape[axis] // 2
    p, q = x.narrow(axis, 0, half), x.narrow(axis, half, half)
    return torch.cat([cosine * p - sine * q, sine * p + cosine * q], axis)


def jacobi(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n] and vectors [..., n, n] of symmetric matrices, in no order."""
    n = order(a, "eigh", LARGEST_JACOBI)
    even = n + n % 2
    a = torch.nn.functional.pad(a, (0, even - n, 0, even - n))
    half = even // 2
    vectors = eye(even, a).expand(a.shape)
    diagonal = eye(half, a)
    for _ in range(sweeps(n) * (even - 1) if n > 1 else 0):
        p, q, pq = (
            (a[..., first : first + half, second : second + half] * diagonal).sum(-1)
            for first, second in ((0, 0), (half, half), (0, half))
        )
        cosine, sine = rotation(p, q, pq)
        a = _turn(a, -1, cosine.unsqueeze(-2), sine.unsqueeze(-2))
        a = _turn(a, -2, cosine.unsqueeze(-1), sine.unsqueeze(-1))
        a = _seats(_seats(a, -1), -2)
        vectors = _seats(_turn(vectors, -1, cosine.unsqueeze(-2), sine.unsqueeze(-2)), -1)
    values = (a * eye(even, a)).sum(-1)
    return values[..., :n], vectors[..., :n, :n]


@decomposes("_linalg_eigh")
def linalg_eigh(A: Tensor, UPLO: str = "L", compute_v: bool = True) -> tuple[Tensor, Tensor]:
    """In ascending order; a vector's sign is arbitrary, as LAPACK's is."""
    half = A.tril() if UPLO.upper() == "L" else A.triu()
    off = A.tril(-1) if UPLO.upper() == "L" else A.triu(1)
    values, vectors = jacobi(half + off.mT)
    values, where = torch.topk(values, values.shape[-1], -1, False)
    if not compute_v:
        return values, torch.zeros(0, dtype=A.dtype, device=A.device)
    return values, torch.gather(vectors, -1, where.unsqueeze(-2).expand(vectors.shape))


def one_sided(a: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix a V with orthogonal columns, and V: [..., m, n] and [..., n, n] of [..., m, n] with m >= n."""
    m, n = static(a.shape[-2], "svd: the number of rows"), order(a, "svd", LARGEST_JACOBI)
    even = n + n % 2
    work = torch.cat([a, eye(n, a).expand(*a.shape[:-2], n, n)], -2)
    work = torch.nn.functional.pad(work, (0, even - n))
    for _ in range(sweeps(n) * (even - 1) if n > 1 else 0):
        p, q = work[..., :m, : even // 2], work[..., :m, even // 2 :]
        cosine, sine = rotation((p * p).sum(-2), (q * q).sum(-2), (p * q).sum(-2))
        work = _seats(_turn(work, -1, cosine.unsqueeze(-2), sine.unsqueeze(-2)), -1)
    return work[..., :m, :n], work[..., m:, :n]


@decomposes("_linalg_svd")
def linalg_svd(
    A: Tensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """In descending order; the signs of pairs of vectors are arbitrary, as LAPACK's are."""
    m, n = static(A.shape[-2], "svd: the number of rows"), static(A.shape[-1], "svd: that of columns")
    if full_matrices and compute_uv and m != n:
        raise Untranslatable("svd: full_matrices of a matrix that is not square; full_matrices=False is written")
    if m < n:
        v, s, ut = linalg_svd(A.mT, full_matrices, compute_uv)
        return (ut.mT, s, v.mT) if compute_uv else (ut, s, v)
    work, v = one_sided(A)
    values, where = torch.topk((work * work).sum(-2).sqrt(), n, -1, True)
    if not compute_uv:
        nothing = torch.zeros(0, dtype=A.dtype, device=A.device)
        return nothing, values, nothing
    index = where.unsqueeze(-2)
    work = torch.gather(work, -1, index.expand(work.shape))
    v = torch.gather(v, -1, index.expand(v.shape))
    scale = torch.where(values > 0, values, torch.ones_like(values)).unsqueeze(-2)
    return work / scale, values, v.mT


@decomposes("linalg_pinv.atol_rtol_tensor")
def linalg_pinv(
    self: Tensor, *, atol: Tensor | None = None, rtol: Tensor | None = None, hermitian: bool = False
) -> Tensor:
    u, s, vt = linalg_svd(self)
    if rtol is None:
        relative = max(self.shape[-2:]) * torch.finfo(self.dtype).eps if atol is None else 0.0
        bound = s.amax(-1, keepdim=True) * relative
    else:
        bound = s.amax(-1, keepdim=True) * rtol.unsqueeze(-1)
    if atol is not None:
        bound = torch.maximum(bound, atol.unsqueeze(-1))
    kept = s > bound
    inverse = torch.where(kept, 1 / torch.where(kept, s, torch.ones_like(s)), torch.zeros_like(s))
    return torch.matmul(vt.mT * inverse.unsqueeze(-2), u.mT)


SQUARINGS = 24
"""exp(a) is found for matrices of a 1-norm up to 2 ** 23; float32 holds none that is larger."""


@decomposes("linalg_matrix_exp")
def linalg_matrix_exp(self: Tensor) -> Tensor:
    """Scaled until its norm is below a half, by Taylor's polynomial (to 0.5 ** 11 / 11!), and squared again."""
    n = order(self, "matrix_exp")
    norm = self.abs().sum(-2).amax(-1)[..., None, None]
    steps = torch.ceil(torch.log2(norm.clamp(min=0.25)) + 1).clamp(0, SQUARINGS)
    a = self * torch.exp2(-steps)
    one = eye(n, self)
    found = one + a / 10
    for k in range(9, 0, -1):
        found = one + torch.matmul(a, found) / k
    for k in range(SQUARINGS):
        found = torch.where(steps > k, torch.matmul(found, found), found)
    return found
