"""Inverses, solutions, determinants and triangular factors of matrices of a known order, unrolled column by column."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Untranslatable, decomposes, static

LARGEST = 64
"""Matrices up to this order are unrolled: the graph grows with the order, by a dozen operators a column."""


def order(a: Tensor, what: str, largest: int = LARGEST) -> int:
    """The order of the square matrices, or the smaller size of others. Raises Untranslatable beyond ``largest``."""
    size = min(static(a.shape[-2], f"{what}: the number of rows"), static(a.shape[-1], f"{what}: that of columns"))
    if size > largest:
        raise Untranslatable(f"{what}: a matrix of order {size}; up to {largest} are unrolled into ONNX operators")
    return size


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def info(a: Tensor) -> Tensor:
    """The error code of LAPACK, which is nought: a singular matrix shows by what is not finite."""
    return torch.zeros(a.shape[:-2], dtype=torch.int32, device=a.device)


def gauss_jordan(a: Tensor, b: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """The solution of a x = b, the pivots [..., n] and the row of each, by elimination with partial pivoting.

    Rows stay where they are: the pivot's row is marked as used, and one product puts all in order at the end.
    """
    n = order(a, what)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    work = torch.cat([a.expand(*batch, n, n), b.expand(*batch, *b.shape[-2:])], -1)
    rows = torch.arange(n, device=a.device)
    free = torch.ones(n, dtype=torch.bool, device=a.device)
    pivots, chosen = [], []
    for k in range(n):
        column = work[..., k]
        size = torch.where(free, column.abs(), torch.full((), -1.0, dtype=a.dtype, device=a.device))
        hit = size.argmax(-1, keepdim=True) == rows
        pivot = (column * hit.to(a.dtype)).sum(-1, keepdim=True)
        row = torch.where(hit.unsqueeze(-1), work, torch.zeros_like(work)).sum(-2, keepdim=True) / pivot.unsqueeze(-1)
        work = torch.where(hit.unsqueeze(-1), row, work - column.unsqueeze(-1) * row)
        free = free & ~hit
        pivots.append(pivot)
        chosen.append(hit.to(a.dtype))
    permutation = torch.stack(chosen, -2)
    return torch.matmul(permutation, work[..., n:]), torch.cat(pivots, -1), permutation


def parity(permutation: Tensor) -> Tensor:
    """1 or -1 [...], of a permutation as a matrix: the sign of the product of all differences of places."""
    n = permutation.shape[-1]
    place = (permutation * torch.arange(n, dtype=permutation.dtype, device=permutation.device)).sum(-1)
    after = place.unsqueeze(-2) - place.unsqueeze(-1)
    above = torch.ones(n, n, dtype=torch.bool, device=permutation.device).triu(1)
    return torch.where(above, after.sign(), torch.ones_like(after)).flatten(-2).prod(-1)


def is_vector(a: Tensor, b: Tensor) -> bool:
    """Whether torch.linalg.solve takes ``b`` for a batch of vectors."""
    if b.dim() == 1:
        return True
    return a.dim() - 1 == b.dim() and all(x is y or x == y for x, y in zip(a.shape[:-1], b.shape, strict=True))


@decomposes("linalg_inv", "inverse")
def linalg_inv(A: Tensor) -> Tensor:
    return gauss_jordan(A, eye(order(A, "inv"), A), "inv")[0]


@decomposes("linalg_inv_ex")
def linalg_inv_ex(A: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    return linalg_inv(A), info(A)


@decomposes("linalg_solve")
def linalg_solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    return linalg_solve_ex(A, B, left=left)[0]


@decomposes("_linalg_solve_ex")
def linalg_solve_ex(
    A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With neither factors nor pivots: nothing but gradients needs these."""
    vector = is_vector(A, B)
    right = B.unsqueeze(-1) if vector else B
    found = gauss_jordan(A, right, "solve")[0] if left else gauss_jordan(A.mT, right.mT, "solve")[0].mT
    found = found.squeeze(-1) if vector else found
    return found, A, torch.zeros(A.shape[:-1], dtype=torch.int32, device=A.device), info(A)


@decomposes("_linalg_det")
def linalg_det(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, pivots, permutation = gauss_jordan(A, A[..., :0], "det")
    value = pivots.prod(-1) * parity(permutation)
    return value, A, torch.zeros(A.shape[:-1], dtype=torch.int32, device=A.device)


@decomposes("_linalg_slogdet")
def linalg_slogdet(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, pivots, permutation = gauss_jordan(A, A[..., :0], "slogdet")
    sign = pivots.sign().prod(-1) * parity(permutation)
    return sign, pivots.abs().log().sum(-1), A, torch.zeros(A.shape[:-1], dtype=torch.int32, device=A.device)


@decomposes("linalg_cholesky_ex")
def linalg_cholesky_ex(self: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    return cholesky(self, upper), info(self)


@decomposes("cholesky", "linalg_cholesky")
def cholesky(self: Tensor, upper: bool = False) -> Tensor:
    """Column by column from the left; of the matrix the lower triangle is read."""
    n = order(self, "cholesky")
    a = self.mT if upper else self
    columns: list[Tensor] = []
    rows = torch.arange(n, device=self.device)
    for k in range(n):
        column = a[..., k]
        if columns:
            done = torch.stack(columns, -1)
            column = column - torch.matmul(done, done[..., k, :].unsqueeze(-1)).squeeze(-1)
        column = column / column[..., k : k + 1].sqrt()
        columns.append(torch.where(rows >= k, column, torch.zeros_like(column)))
    lower = torch.stack(columns, -1)
    return lower.mT if upper else lower


@decomposes("cholesky_solve")
def cholesky_solve(self: Tensor, input2: Tensor, upper: bool = False) -> Tensor:
    lower = input2.mT if upper else input2
    return substitute(lower.mT, substitute(lower, self, upper=False), upper=True)


@decomposes("cholesky_inverse")
def cholesky_inverse(self: Tensor, upper: bool = False) -> Tensor:
    return cholesky_solve(eye(order(self, "cholesky_inverse"), self).expand(self.shape), self, upper)


def substitute(a: Tensor, b: Tensor, *, upper: bool, unit: bool = False) -> Tensor:
    """The solution of a x = b for a triangular a, row by row."""
    n = order(a, "solve_triangular")
    found: list[Tensor] = []
    for k in reversed(range(n)) if upper else range(n):
        row = b[..., k : k + 1, :]
        if found:
            known = torch.cat(found[::-1] if upper else found, -2)
            factors = a[..., k : k + 1, k + 1 :] if upper else a[..., k : k + 1, :k]
            row = row - torch.matmul(factors, known)
        found.append(row if unit else row / a[..., k : k + 1, k : k + 1])
    return torch.cat(found[::-1] if upper else found, -2)


@decomposes("linalg_solve_triangular")
def linalg_solve_triangular(
    self: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    batch = torch.broadcast_shapes(self.shape[:-2], B.shape[:-2])  # type: ignore[no-untyped-call]
    if left:
        return substitute(self, B, upper=upper, unit=unitriangular).expand(*batch, *B.shape[-2:])
    return substitute(self.mT, B.mT, upper=not upper, unit=unitriangular).mT.expand(*batch, *B.shape[-2:])


@decomposes("triangular_solve")
def triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    a = A.mT if transpose else A
    return substitute(a, self, upper=upper != transpose, unit=unitriangular), A


def _lu(a: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both triangles in one matrix, the swaps (LAPACK's, from 1) and the permutation's matrix P with P L U = a."""
    rows_count = static(a.shape[-2], what)
    rows = torch.arange(rows_count, device=a.device)
    work, permutation = a, eye(rows_count, a).expand(*a.shape[:-2], rows_count, rows_count)
    swaps: list[Tensor] = []
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    for k in range(order(a, what)):
        size = torch.where(rows >= k, work[..., k].abs(), torch.full((), -1.0, dtype=a.dtype, device=a.device))
        swap = size.argmax(-1, keepdim=True)
        swaps.append(swap + 1)
        hit, here = (swap == rows).unsqueeze(-1), (rows == k).unsqueeze(-1)
        both = torch.cat([work, permutation], -1)
        chosen = torch.where(hit, both, torch.zeros_like(both)).sum(-2, keepdim=True)
        both = torch.where(here, chosen, torch.where(hit, both[..., k : k + 1, :], both))
        work, permutation = both[..., : a.shape[-1]], both[..., a.shape[-1] :]
        below = (rows > k).unsqueeze(-1)
        factor = torch.where(below, work[..., k : k + 1] / work[..., k : k + 1, k : k + 1], zero)
        right = torch.arange(a.shape[-1], device=a.device) > k
        work = work - factor * torch.where(right, work[..., k : k + 1, :], zero)
        work = torch.where(below & (torch.arange(a.shape[-1], device=a.device) == k), factor, work)
    return work, torch.cat(swaps, -1).to(torch.int32), permutation.mT


def _triangles(both: Tensor) -> tuple[Tensor, Tensor]:
    n = min(both.shape[-2:])
    return both[..., :n].tril(-1) + torch.eye(both.shape[-2], n, dtype=both.dtype, device=both.device), both[
        ..., :n, :
    ].triu()


def _pivoted(pivot: bool, what: str) -> None:
    if not pivot:
        raise Untranslatable(f"{what}: without pivoting")


@decomposes("linalg_lu_factor_ex")
def linalg_lu_factor_ex(A: Tensor, *, pivot: bool = True, check_errors: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    _pivoted(pivot, "lu_factor")
    both, swaps, _ = _lu(A, "lu_factor")
    return both, swaps, info(A)


@decomposes("linalg_lu_factor")
def linalg_lu_factor(A: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor]:
    return linalg_lu_factor_ex(A, pivot=pivot)[:2]


@decomposes("linalg_lu")
def linalg_lu(A: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    _pivoted(pivot, "lu")
    both, _, permutation = _lu(A, "lu")
    return permutation, *_triangles(both)


@decomposes("linalg_lu_solve")
def linalg_lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor:
    """Of left, plain systems: the swaps are made one after the other, then two substitutions."""
    if adjoint or not left:
        raise Untranslatable("lu_solve: from the right, or of the adjoint")
    n = order(LU, "lu_solve")
    rows = torch.arange(n, device=LU.device)
    work = B
    for k in range(n):
        hit = (pivots[..., k : k + 1].to(torch.int64) - 1 == rows).unsqueeze(-1)
        chosen = torch.where(hit, work, torch.zeros_like(work)).sum(-2, keepdim=True)
        work = torch.where((rows == k).unsqueeze(-1), chosen, torch.where(hit, work[..., k : k + 1, :], work))
    return substitute(LU, substitute(LU, work, upper=False, unit=True), upper=True)
