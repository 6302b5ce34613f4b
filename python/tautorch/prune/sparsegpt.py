"""SparseGPT: which weights to remove, and what the others become so that the layer's outputs stay.

Frantar & Alistarh 2023, "Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv:2301.00774.
Columns of the weight matrix are fixed from the first to the last. Removing w_i leaves an error e = w_i / U_ii
that the columns not fixed yet take up, w_j -= e U_ij, where U^T U is the inverse of the damped X X^T; the
squared output error grows by e^2, which is what the masks are chosen by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tautorch.prune.patterns import Blocks, Pattern, keep_highest, keep_n_of_m

# Columns chosen and updated together before the rest of the matrix is: the paper's block.
_COLUMNS = 128

#: (squared output error of each weight of some columns [G * R, C], the first of them) -> True where kept.
_Choice = Callable[[Tensor, int], Tensor]


def sparsegpt(
    op: str,
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    pattern: Pattern,
    sparsity: float,
    rowwise: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned and compensated weight and its mask.

    Args:
        op: the caller, for messages.
        weight: [G, R, C], the matrices of the layer's groups, float64.
        factor, dead: of `inverse_factor`, [G, C, C] and [G, C]. Weights of dead inputs go first and, where
            they are kept, stay as they are.
        pattern, sparsity: as in `make_mask`; the counts are those of the whole layer, met block of columns by
            block of columns.
        rowwise: rank each row of blocks on its own.
        mask: [G, R, C], True = kept: only compensate, for the weights that others chose.

    Returns both [G, R, C].
    """
    groups, _, cols = weight.shape
    # Groups of m columns are not cut.
    width = max(_COLUMNS // pattern.of, 1) * pattern.of if pattern.of else _COLUMNS
    left = weight.clone()
    kept = torch.ones_like(weight, dtype=torch.bool)
    budget = _Budget(op, pattern, sparsity, rowwise, groups)
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        corner = factor[:, start:stop, start:stop]
        here, keep = left[:, :, start:stop], kept[:, :, start:stop]
        step = pattern.of or stop - start
        errors = torch.zeros_like(here)
        for i in range(stop - start):
            if i % step == 0:
                part = slice(i, i + step)
                if mask is not None:
                    keep[:, :, part] = mask[:, :, start:stop][:, :, part]
                else:
                    cost = _cost(here[:, :, part], corner[:, part, part], pattern)
                    cost.masked_fill_(dead[:, None, start:stop][:, :, part], 0.0)
                    keep[:, :, part] = budget.choose(cost)
            error = (here[:, :, i] / corner[:, i, i, None]).masked_fill(keep[:, :, i], 0.0)
            here[:, :, i:] -= error.unsqueeze(2) * corner[:, i, None, i:]
            errors[:, :, i] = error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return left.masked_fill_(~kept, 0.0), kept


def first_costs(weight: Tensor, factor: Tensor, dead: Tensor, pattern: Pattern) -> Tensor:
    """The squared output error of removing each weight (each block, spread over its weights) alone.

    For ranking layers together before any is changed; shapes as in `sparsegpt`.
    """
    cost = torch.empty_like(weight)
    for start in range(0, weight.shape[2], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        cost[:, :, part] = _cost(weight[:, :, part], factor[:, part, part], pattern)
    return cost.masked_fill_(dead.unsqueeze(1), 0.0)


def _cost(weight: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """e^2 of each weight; where a block has several columns they go one after the other, e = w U^-1."""
    cols = weight.shape[2]
    if pattern.cols == 1:
        return (weight / factor.diagonal(dim1=1, dim2=2).unsqueeze(1)).square()
    cost = torch.empty_like(weight)
    for start in range(0, cols, pattern.cols):
        part = slice(start, start + pattern.cols)
        corner = factor[:, part, part]
        cost[:, :, part] = torch.linalg.solve_triangular(corner, weight[:, :, part], upper=True, left=False)
    return cost.square_()


class _Budget:
    """Chooses what goes, so that floor(sparsity * blocks) have gone when all columns were seen."""

    def __init__(self, op: str, pattern: Pattern, sparsity: float, rowwise: bool, groups: int) -> None:
        self._op, self._pattern, self._groups = op, pattern, groups
        self._sparsity, self._rowwise = sparsity, rowwise
        self._seen = self._gone = 0

    def choose(self, cost: Tensor) -> Tensor:
        """True where kept, [G, R, C] like `cost`."""
        if self._pattern.of:
            return keep_n_of_m(cost.flatten(0, 1), self._pattern).reshape(cost.shape)
        blocks = Blocks.of(self._op, cost.flatten(0, 1), self._pattern, self._groups)
        self._seen += blocks.scores.shape[1] if self._rowwise else blocks.scores.numel()
        drop = int(self._sparsity * self._seen + 1e-9) - self._gone
        self._gone += drop
        return blocks.expand(keep_highest(blocks.scores, drop, self._rowwise)).reshape(cost.shape)
