"""Low-rank factors of weight matrices, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Directions whose second moment is below this share of the largest are taken to have it: the whitening
# stays invertible, and inputs that calibration never showed keep a little of the weight.
_FLOOR = 1e-8


class Svd:
    """The singular value decomposition of one or more matrices [G, N, K], kept until the rank is chosen.

    With `gram` = X X^T [G, K, K] it is that of W S, S S^T = X X^T: cutting it at rank r gives the matrix of
    rank r with the least ||(W - W_r) X||_F (Wang et al. 2024, SVD-LLM, arXiv:2403.07378).
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None) -> None:
        matrix = weight.detach().double()
        self._unwhiten: Tensor | None = None
        if gram is not None:
            values, vectors = torch.linalg.eigh(gram.to(matrix))
            top = values.amax(-1, keepdim=True).clamp_min(1e-30)
            roots = values.clamp_min(0).maximum(top * _FLOOR).sqrt()
            matrix = matrix @ (vectors * roots.unsqueeze(-2))
            self._unwhiten = vectors.transpose(-1, -2) / roots.unsqueeze(-1)
        self._u, self.values, self._vh = torch.linalg.svd(matrix, full_matrices=False)

    def rank_of_energy(self, energy: float) -> int:
        """The least rank that keeps this share of the squared singular values in every matrix."""
        share = self.values.square().cumsum(-1)
        enough = share >= (energy - 1e-12) * share[:, -1:]
        return int(enough.to(torch.uint8).argmax(-1).max()) + 1

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down [G, r, K], up [G, N, r]), float64, each holding the square roots of the singular values."""
        roots = self.values[:, :rank].sqrt()
        up = self._u[:, :, :rank] * roots.unsqueeze(-2)
        down = roots.unsqueeze(-1) * self._vh[:, :rank]
        return (down if self._unwhiten is None else down @ self._unwhiten), up


def tucker2(weight: Tensor, rank_in: int, rank_out: int, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """(U_in [I, r_in], core [r_out, r_in, kh, kw], U_out [O, r_out]) of a weight [O, I, kh, kw], float64.

    Started from the truncated higher-order SVD and improved by orthogonal iteration (De Lathauwer et al.
    2000; for convolutions Kim et al. 2016, arXiv:1511.06530). Where r_in is above r_out kh kw, or r_out above
    r_in kh kw, what is over is orthonormal and the core zero there.
    """
    full = weight.detach().double()
    u_out, u_in = _left(full.flatten(1), rank_out), _left(full.transpose(0, 1).flatten(1), rank_in)
    for _ in range(sweeps):
        u_out = _left(torch.einsum("oihw,ia->oahw", full, u_in).flatten(1), rank_out)
        u_in = _left(torch.einsum("oihw,ob->ibhw", full, u_out).flatten(1), rank_in)
    return u_in, torch.einsum("oihw,ob,ia->bahw", full, u_out, u_in), u_out


def tucker_energy(weight: Tensor) -> Tensor:
    """[O, I]: the share of the energy of [O, I, kh, kw] in the first r_out x r_in of its higher-order SVD."""
    full = weight.detach().double()
    u_out, u_in = _left(full.flatten(1), full.shape[0]), _left(full.transpose(0, 1).flatten(1), full.shape[1])
    core = torch.einsum("oihw,ob,ia->bahw", full, u_out, u_in).square().sum((2, 3))
    total = core.sum()
    if float(total) == 0.0:
        return torch.ones(full.shape[:2], dtype=torch.float64, device=full.device)
    padded = torch.nn.functional.pad(
        core, (0, full.shape[1] - core.shape[1], 0, full.shape[0] - core.shape[0])
    )
    return padded.cumsum(0).cumsum(1) / total


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [1, limit] for which `fits` (true up to some point, then false) holds; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _left(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors, at most as many as there are rows."""
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=rank > matrix.shape[1])[0]
    return vectors[:, :rank]
