"""Students of fewer channels, features and heads, cut out of the teacher."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tautorch._batches import Batch
from tautorch.prune import prune_channels
from tautorch.students.checks import trainable


def shrink_width(teacher: nn.Module, example_input: Batch, keep: float = 0.5, **options: Any) -> nn.Module:
    """A student with the teacher's most important channels, features and heads; the teacher is left as it is.

    A copy of the teacher goes through `tautorch.prune.prune_channels`, which finds what hangs together
    (residuals, norms, what reads a layer) by Torch-Pruning's dependency graph (Fang et al. 2023,
    arXiv:2301.12900), ranks by importance and slices every weight alike.

    Args:
        teacher: any traceable model.
        example_input: one batch of what the model takes, to trace and to verify with.
        keep: share of the channels to keep, in (0, 1].
        options: as for `prune_channels`: `importance`, `ranking`, `layers`, `protect`, `round_to`, `heads`,
            `adjust`, `calibration`, `loss`, `report`. `verify` is "shape" unless given: a student is trained
            afterwards, so that residual widths under layer norms may shrink too.

    Raises as `prune_channels` does.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"shrink_width: keep must be a number in (0, 1], got {keep!r}")
    student = trainable(copy.deepcopy(teacher))
    return prune_channels(student, example_input, 1.0 - keep, **{"verify": "shape", **options})
