"""The best approximation of a delta by one of lower rank: what `torch.linalg.svd` of the whole matrix would give.

A low-rank delta is never made dense. With Δ = B A, B (out, R), A (R, in):

    QR      B = Q_B R_B,  Aᵀ = Q_A R_A,  SVD of the core R_B R_Aᵀ = U Σ Vᵀ         Δ = (Q_B U) Σ (Q_A V)ᵀ
    Gram    A Aᵀ = L Lᵀ,  eigenvectors V of Lᵀ (Bᵀ B) L with eigenvalues Σ²          Δ = (B L V) (L⁻ᵀ V)ᵀ A

Both cost O((out + in) R²). The Gram form squares condition numbers: it runs in fp64 on rows of A scaled to length 1,
and only where they are independent enough; else the QR form does. A dense delta takes the randomized range finder of
Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061 (algorithm 4.4), with OVERSAMPLE further columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hubkit.errors import HubkitError

OVERSAMPLE = 16
POWER = 2
"""Power iterations of the randomized range finder."""
WHOLE = 1024
"""Longest short side of a dense sum that is decomposed exactly: an eigenproblem of that size takes a third of a second.
What an operator has pruned is an estimate already, and is not worth that."""
INDEPENDENT = 1e-4
"""Smallest pivot of the Cholesky factor of unit rows for which the Gram form runs: fp64 leaves eight digits there."""
NOISE = 1e-7
"""Singular values below this part of the largest are rounding of fp32 factors: their columns become zero."""


@dataclass(frozen=True)
class Truncated:
    """The best approximation of rank k of a delta; its first j columns and rows are the best of rank j < k.

    Args:
        left: (out, k), U √Σ.
        right: (k, in), √Σ Vᵀ.
        energies: (k,) fp64, squared singular values, descending.
        total: squared Frobenius norm of the delta.
    """

    left: Tensor
    right: Tensor
    energies: Tensor
    total: float

    def first(self, rank: int) -> Truncated:
        """The best approximation of a smaller rank."""
        return Truncated(self.left[:, :rank], self.right[:rank], self.energies[:rank], self.total)

    @property
    def kept(self) -> float:
        """Energy kept, ‖Δ_k‖² / ‖Δ‖²; 1 where there was none."""
        return min(1.0, float(self.energies.sum()) / self.total) if self.total > 0 else 1.0

    def rank_for(self, energy: float) -> int | None:
        """The smallest rank, at least 1, that keeps this part of the energy; None when k does not."""
        if self.total <= 0 or self.energies[0] >= energy * self.total:
            return 1
        enough = self.energies.cumsum(0) >= energy * self.total * (1 - 1e-12)
        return int(enough.to(torch.uint8).argmax()) + 1 if enough.any() else None


@dataclass(frozen=True)
class Spectrum:
    """Δ = left · diag(values) · right with orthonormal columns of left (out, k) and rows of right (k, in), in fp64."""

    left: Tensor
    values: Tensor
    right: Tensor


def spectrum(left: Tensor, right: Tensor) -> Spectrum:
    """The thin SVD of ``left @ right`` through QR of both, down to `NOISE`; left (out, R), right (R, in)."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, values, vt = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    count = int((values > NOISE * values[0]).sum()) if values.numel() else 0
    return Spectrum(q_left @ u[:, :count], values[:count], vt[:count] @ q_right.t())


def require_finite(site: str, *tensors: Tensor) -> None:
    """Refuses values that a weight has driven out of range, before LAPACK does: ``HK-NAN``."""
    for values in tensors:
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            fix = "smaller weights; hubkit verify shows whether a member holds NaN itself"
            raise HubkitError("HK-NAN", "the composed change is not finite", where=site, fix=fix)


def truncate(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """The best approximation of rank `rank`, or less where the delta has less, of ``left @ right``.

    Args:
        left: (out, R).
        right: (R, in).
    """
    made = _by_gram(left, right, rank)
    return _by_qr(left, right, rank) if made is None else made


def _by_qr(left: Tensor, right: Tensor, rank: int) -> Truncated:
    found = spectrum(left, right)
    total = float(found.values.square().sum())
    root = found.values[:rank].sqrt()
    return Truncated(
        (found.left[:, :rank] * root).to(left.dtype),
        (root[:, None] * found.right[:rank]).to(right.dtype),
        found.values[:rank].square(),
        total,
    )


def truncate_stack(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> list[Truncated]:
    """`truncate` of several deltas of one shape: a few large steps instead of many small ones.

    Args:
        left: (n, out, R), fp64.
        right: (n, R, in), fp64.
        dtype: of the results.
    """
    made = _by_grams(left, right, rank) if right.shape[1] <= right.shape[2] else [None] * len(left)
    found = [_by_qr(b, a, rank) if one is None else one for one, b, a in zip(made, left, right, strict=True)]
    return [Truncated(one.left.to(dtype), one.right.to(dtype), one.energies, one.total) for one in found]


def _by_gram(left: Tensor, right: Tensor, rank: int) -> Truncated | None:
    """None where the rows of `right` are too nearly dependent."""
    if right.shape[0] > right.shape[1]:
        return None
    (one,) = _by_grams(left[None].double(), right[None].double(), rank)
    return one and Truncated(one.left.to(left.dtype), one.right.to(right.dtype), one.energies, one.total)


def _by_grams(b: Tensor, a: Tensor, rank: int) -> list[Truncated | None]:
    """As `_by_gram`, of a stack, in fp64."""
    if not a.shape[1]:
        return [None] * len(b)
    down, sound = _cholesky(a @ a.mT)
    if not all(sound):  # one that is not must not spoil the others' eigenvectors with values that are not finite
        alone = [_by_grams(b[i : i + 1], a[i : i + 1], rank)[0] if good else None for i, good in enumerate(sound)]
        return alone if len(b) > 1 else [None]
    squares, vectors = torch.linalg.eigh(down.mT @ (b.mT @ b) @ down)
    squares, vectors = squares.flip(1).clamp_min_(0), vectors.flip(2)
    energies, vectors = squares[:, :rank], vectors[:, :, :rank]
    root, inverse = _roots(energies)
    solved = torch.linalg.solve_triangular(down.mT, vectors * root[:, None], upper=True)
    ups, downs = b @ (down @ (vectors * inverse[:, None])), solved.mT @ a
    totals = squares.sum(1).tolist()
    return [Truncated(*one) for one in zip(ups, downs, energies, totals, strict=True)]


def _cholesky(gram: Tensor) -> tuple[Tensor, list[bool]]:
    """L with gram = L Lᵀ, (n, R, R), and for which of the n the vectors are independent enough to use it."""
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    unit = gram / (lengths[:, :, None] * lengths[:, None]).clamp_min_(torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(unit)
    pivots = factor.diagonal(dim1=1, dim2=2).amin(1)
    sound = [not bad and pivot > INDEPENDENT for bad, pivot in zip(failed.tolist(), pivots.tolist(), strict=True)]
    return lengths[:, :, None] * factor, sound


def truncate_dense(matrix: Tensor, rank: int, generator: torch.Generator, *, whole: int = 0) -> Truncated:
    """An approximation of rank `rank` that is nearly the best: of white noise, the hardest case, its error is half a
    percent larger than the best one's; of trimmed low-rank deltas a ten-thousandth. Large ranks are exact.

    Args:
        matrix: (out, in), on the CPU.
        generator: draws the random columns; same seed, same bits.
        whole: matrices whose shorter side is at most this long are exact, too.
    """
    short = min(matrix.shape)
    if short <= whole or rank + OVERSAMPLE >= short // 2:
        if matrix.shape[0] == short:
            return _by_rows(matrix, rank)
        turned = _by_rows(matrix.t(), rank)
        return Truncated(turned.right.t().contiguous(), turned.left.t().contiguous(), turned.energies, turned.total)
    start = torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator, dtype=matrix.dtype)
    basis = _orthonormal(matrix @ start)
    for _ in range(POWER):
        basis = _orthonormal(matrix @ _orthonormal(matrix.t() @ basis))
    core = basis.t() @ matrix
    total = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    found = _by_rows(core, rank)
    return Truncated(basis @ found.left, found.right, found.energies, total)


def _by_rows(matrix: Tensor, rank: int) -> Truncated:
    """The best approximation through the Gram matrix of the rows, in fp64."""
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    squares, vectors = squares.flip(0).clamp_min_(0), vectors.flip(1)[:, :rank]
    root, inverse = _roots(squares[:rank])
    right = (vectors * inverse).t().to(matrix.dtype) @ matrix
    left = (vectors * root).to(matrix.dtype)
    return Truncated(left, right, squares[:rank], float(squares.sum()))


def _roots(energies: Tensor) -> tuple[Tensor, Tensor]:
    """√σ and 1/√σ of squared singular values, (..., k), descending; both 0 below `NOISE`."""
    root = energies.sqrt().sqrt()
    root = torch.where(root > root[..., :1] * NOISE**0.5, root, 0.0)
    return root, torch.where(root > 0, 1 / root, 0.0)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns: through their Gram matrix in fp64, cheaper than QR, where that is safe."""
    wide = columns.double()
    (down,), (sound,) = _cholesky((wide.t() @ wide)[None])
    if sound:
        solved: Tensor = torch.linalg.solve_triangular(down.t(), wide, upper=True, left=False)
        return solved.to(columns.dtype)
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
