"""What the losses take: logits of one shape, targets that fit them, settings in range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Rows with this label are left out.
IGNORED = -100


def unit_interval(op: str, name: str, value: Any) -> float:
    """`value` as a float in [0, 1]; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a number in [0, 1], got {value!r}")
    return float(value)


def positive(op: str, name: str, value: Any) -> float:
    """`value` as a finite float > 0; ValueError otherwise."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be a finite number > 0, got {value!r}")
    return float(value)


def whole(op: str, name: str, value: Any, least: int = 1) -> int:
    """`value` as an int >= `least`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: {name} must be an int >= {least}, got {value!r}")
    return value


def at_least_single(x: Tensor) -> Tensor:
    """In float32, or float64 where it is: half precision has too few digits for exp and log."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_logits(op: str, who: str, value: Any) -> Tensor:
    """[..., C] logits as [rows, C] in at least float32; TypeError or ValueError for anything else."""
    if value is None:
        raise TypeError(f"{op}: the {who} must give logits, got None; give Distiller a {who}")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: the {who}'s output must be a tensor of logits, got {type(value).__name__}; "
            "give Distiller(output=lambda out: out.logits) or the like"
        )
    if not value.is_floating_point() or value.dim() < 2:
        got = f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{op}: the {who}'s logits must be floating point [..., C], got {got}")
    if value.numel() == 0:
        raise ValueError(f"{op}: logits must hold at least one row, got {list(value.shape)}")
    return at_least_single(value.reshape(-1, value.shape[-1]))


def logit_rows(op: str, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Both logits as [rows, C], the teacher's detached; TypeError or ValueError if they do not match."""
    mine, theirs = one_logits(op, "student", student), one_logits(op, "teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{op}: student and teacher must give logits of one shape, got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    return mine, theirs.detach().to(mine.dtype)


def label_rows(op: str, target: Any, rows: int, classes: int) -> tuple[Tensor, Tensor | None]:
    """(labels or probabilities of the rows that count, which rows these are; None for all of them)."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    if target.is_floating_point():
        if target.shape[-1:] != (classes,) or target.numel() != rows * classes:
            raise ValueError(
                f"{op}: target probabilities must be like the logits [{rows} rows, {classes}], "
                f"got {list(target.shape)}"
            )
        return target.reshape(rows, classes), None
    if target.dtype != torch.int64 or target.numel() != rows:
        raise ValueError(
            f"{op}: target must be int64 with one class for each of {rows} rows, "
            f"got {target.dtype} {list(target.shape)}"
        )
    labels = target.reshape(rows)
    kept = labels != IGNORED
    valid = labels[kept]
    if valid.numel() == 0:
        raise ValueError(f"{op}: target must name a class in at least one row, got {IGNORED} in all {rows}")
    if int(valid.min()) < 0 or int(valid.max()) >= classes:
        raise ValueError(
            f"{op}: target classes must be in [0, {classes}), got {int(valid.min())} to {int(valid.max())}"
        )
    return valid, None if valid.numel() == rows else kept


def hard_loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of [rows, C] logits with labels or probabilities."""
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction=reduction)
