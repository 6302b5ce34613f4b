"""Sparsity patterns and the masks that obey them.

A mask is bool, of the weight's shape, True where the weight is kept. Patterns live on the matrix view
[out, in / groups * kh * kw] of a weight: "4x1" is 4 adjacent outputs sharing one input, "BxB" a square, and
"n:m" keeps n of every m adjacent inputs. Blocks do not cross the groups of a convolution; a dimension that
the pattern does not divide ends in a short block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Ranking = Literal["local", "row", "global"]
#: How layers' scores are made comparable before a global ranking.
Normalize = Literal["none", "mean", "lamp"]

_BLOCKS = ("4x1", "16x16", "32x32", "64x64")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: blocks of `rows` x `cols`, or (`of` > 0) `keep` of every `of` adjacent inputs."""

    name: str
    rows: int = 1
    cols: int = 1
    keep: int = 0
    of: int = 0


def parse_pattern(op: str, pattern: str) -> Pattern:
    """Parse "unstructured", "n:m", "4x1", "16x16", "32x32" or "64x64"; ValueError for anything else."""
    if pattern == "unstructured":
        return Pattern(pattern)
    if pattern in _BLOCKS:
        rows, cols = (int(part) for part in pattern.split("x"))
        return Pattern(pattern, rows, cols)
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is not None:
        keep, of = int(match[1]), int(match[2])
        if 0 < keep < of:
            return Pattern(pattern, keep=keep, of=of)
    raise ValueError(
        f'{op}: pattern must be "unstructured", "n:m" with 0 < n < m (the kernels take "2:4"), '
        f"or one of {', '.join(_BLOCKS)}, got {pattern!r}"
    )


def check_sparsity(op: str, sparsity: float) -> float:
    """`sparsity` as a float in [0, 1); TypeError or ValueError otherwise."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{op}: sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{op}: sparsity must be in [0, 1) (0.75 removes three quarters), got {sparsity}")
    return float(sparsity)


def check_ranking(op: str, ranking: str, pattern: Pattern) -> None:
    """ValueError for an unknown ranking, and for n:m, which ranks inside its own groups, other than local."""
    if ranking not in get_args(Ranking):
        raise ValueError(f"{op}: ranking must be one of {', '.join(get_args(Ranking))}, got {ranking!r}")
    if pattern.of and ranking == "global":
        raise ValueError(
            f'{op}: ranking must be "local" for {pattern.name}, whose share is fixed, got global'
        )


def make_mask(
    score: Tensor,
    pattern: str,
    sparsity: float,
    groups: int = 1,
    ranking: Literal["local", "row"] = "local",
) -> Tensor:
    """The mask that keeps the highest scores under a pattern.

    Args:
        score: importance of each weight, [O, K] or [O, I / groups, kh, kw], any float dtype, finite.
        pattern: see the module's docstring.
        sparsity: share of blocks to remove, in [0, 1); floor(sparsity * blocks) go, so at least one stays
            and never more is removed than asked. n:m patterns take exactly 1 - n / m.
        groups: groups of the convolution; blocks do not cross them.
        ranking: "local" ranks all blocks of the layer together, "row" each row of blocks on its own.

    A block scores the mean of its elements' scores, so that short tail blocks compete fairly; among equal
    scores the first is removed first. Returns bool, of the score's shape and device, True = kept.
    """
    op = "make_mask"
    form = parse_pattern(op, pattern)
    share = check_sparsity(op, sparsity)
    check_ranking(op, ranking, form)
    if ranking not in ("local", "row"):
        raise ValueError(f'{op}: ranking must be "local" or "row" for a single layer, got {ranking!r}')
    blocks = Blocks.of(op, score, form, groups)
    if form.of:
        check_share(op, form, share)
        return keep_n_of_m(score, form)
    rowwise = ranking == "row"
    ranked = blocks.scores.shape[1] if rowwise else blocks.scores.numel()
    return blocks.expand(keep_highest(blocks.scores, math.floor(share * ranked + 1e-9), rowwise))


def make_global_masks(
    scores: Mapping[str, Tensor],
    pattern: str,
    sparsity: float,
    groups: Mapping[str, int],
    normalize: Normalize = "none",
) -> dict[str, Tensor]:
    """Masks of several layers whose blocks are ranked together.

    The lowest blocks go until `sparsity` of all the layers' weights is reached; the best block of each
    layer always stays, so that no layer disappears. Arguments as in `make_mask`, by layer name, and

    normalize: "none" ranks the scores as they are; "mean" divides each layer's by their mean; "lamp" turns
        each into s^2 / (the sum of s^2 over the layer's blocks that are not lower) (Lee et al. 2021, LAMP,
        arXiv:2010.07611). Both keep a layer of small weights from being emptied first.
    """
    op = "make_global_masks"
    form = parse_pattern(op, pattern)
    share = check_sparsity(op, sparsity)
    check_ranking(op, "global", form)
    check_normalize(op, normalize, "global")
    blocks = {name: Blocks.of(op, score, form, groups.get(name, 1)) for name, score in scores.items()}
    flat: list[Tensor] = []
    for item in blocks.values():
        values = _normalized(item.scores.flatten().cpu(), normalize)
        values[values.argmax()] = math.inf
        flat.append(values)
    sizes = torch.cat([item.sizes.flatten().cpu() for item in blocks.values()])
    order = torch.cat(flat).argsort(stable=True)
    removed = sizes[order].cumsum(0) <= math.floor(share * int(sizes.sum()) + 1e-9)
    keep = torch.ones_like(sizes, dtype=torch.bool)
    keep[order[removed]] = False
    masks: dict[str, Tensor] = {}
    start = 0
    for (name, item), values in zip(blocks.items(), flat, strict=True):
        chosen = keep[start : start + values.numel()] | values.isinf()
        masks[name] = item.expand(chosen.reshape(item.scores.shape).to(item.scores.device))
        start += values.numel()
    return masks


def check_normalize(op: str, normalize: str, ranking: str) -> None:
    """ValueError for an unknown normalisation, and for one where nothing is ranked across layers."""
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"{op}: normalize must be one of {', '.join(get_args(Normalize))}, got {normalize!r}"
        )
    if normalize != "none" and ranking != "global":
        raise ValueError(f'{op}: normalize must be "none" unless ranking="global", got {normalize!r}')


def _normalized(scores: Tensor, normalize: Normalize) -> Tensor:
    """A copy of one layer's block scores, made comparable with other layers'."""
    if normalize == "mean":
        return scores / scores.abs().mean().clamp_min(torch.finfo(scores.dtype).tiny)
    if normalize == "lamp":
        if bool((scores < 0).any()):
            raise ValueError(
                'make_global_masks: scores must not be negative for normalize="lamp"; use "mean"'
            )
        order = scores.argsort(stable=True)
        squares = scores[order].square()
        not_lower = squares.flip(0).cumsum(0).flip(0)
        return torch.empty_like(scores).scatter_(0, order, squares / not_lower.clamp_min(1e-300))
    return scores.clone()


@dataclass(frozen=True)
class Blocks:
    """A score matrix cut into blocks: mean `scores` and `sizes`, [groups * block rows, block cols]."""

    scores: Tensor
    sizes: Tensor
    pattern: Pattern
    groups: int
    shape: torch.Size

    @classmethod
    def of(cls, op: str, score: Tensor, pattern: Pattern, groups: int) -> Blocks:
        """Cut `score`; ValueError/TypeError when it is not a finite float weight that `groups` divide."""
        if not isinstance(score, Tensor) or not score.is_floating_point():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"{op}: score must be a floating point tensor, got {kind}")
        if score.dim() < 2 or score.numel() == 0:
            raise ValueError(f"{op}: score must be a full [O, K] or [O, I, kh, kw], got {list(score.shape)}")
        if groups < 1 or score.shape[0] % groups:
            raise ValueError(f"{op}: groups must divide the {score.shape[0]} outputs, got {groups}")
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{op}: score must be finite, got NaN or Inf; check the weights")
        matrix = score.detach().double().reshape(groups, score.shape[0] // groups, -1)
        sums = _cut(matrix, pattern).sum(dim=(2, 4))
        sizes = _cut(torch.ones_like(matrix), pattern).sum(dim=(2, 4))
        return cls((sums / sizes).flatten(0, 1), sizes.flatten(0, 1).long(), pattern, groups, score.shape)

    def expand(self, keep: Tensor) -> Tensor:
        """What each block has (a mask, a factor), given to its elements; of the score's shape."""
        rows = self.shape[0] // self.groups
        full = keep.reshape(self.groups, -1, keep.shape[1]).repeat_interleave(self.pattern.rows, dim=1)
        full = full[:, :rows].repeat_interleave(self.pattern.cols, dim=2)
        return full[:, :, : math.prod(self.shape[1:])].reshape(self.shape)


def _cut(matrix: Tensor, pattern: Pattern) -> Tensor:
    """[g, rows, cols] -> [g, block rows, rows in block, block cols, cols in block], padded with zeros."""
    groups, rows, cols = matrix.shape
    height, width = -rows % pattern.rows, -cols % pattern.cols
    padded = torch.nn.functional.pad(matrix, (0, width, 0, height))
    return padded.reshape(
        groups, (rows + height) // pattern.rows, pattern.rows, (cols + width) // pattern.cols, pattern.cols
    )


def keep_highest(scores: Tensor, drop: int, rowwise: bool) -> Tensor:
    """Block mask without the `drop` lowest of the whole matrix or of each row."""
    lines = scores if rowwise else scores.reshape(1, -1)
    # topk does not promise which of equal scores it takes; a stable sort does.
    lowest = lines.argsort(dim=1, stable=True)[:, :drop]
    keep = torch.ones_like(lines, dtype=torch.bool).scatter_(1, lowest, False)
    return keep.reshape(scores.shape)


def check_share(op: str, form: Pattern, share: float) -> None:
    """ValueError unless `share` is what an n:m pattern fixes; nothing for the other patterns."""
    if form.of and abs(share - (1 - form.keep / form.of)) > 1e-6:
        fixed = 1 - form.keep / form.of
        raise ValueError(f"{op}: sparsity must be {fixed:g} for pattern {form.name}, got {share}")


def keep_n_of_m(score: Tensor, form: Pattern) -> Tensor:
    """The mask of the n highest of every m adjacent inputs, of the score's shape."""
    matrix = score.detach().double().reshape(score.shape[0], -1)
    rows, cols = matrix.shape
    # Padding loses to every real weight, so a short tail keeps min(n, length) of its own.
    padded = torch.nn.functional.pad(matrix, (0, -cols % form.of), value=-math.inf)
    lowest = padded.reshape(rows, -1, form.of).argsort(dim=2, stable=True)[:, :, : form.of - form.keep]
    keep = torch.ones(rows, padded.shape[1] // form.of, form.of, dtype=torch.bool, device=score.device)
    keep.scatter_(2, lowest, False)
    return keep.reshape(rows, -1)[:, :cols].reshape(score.shape)
