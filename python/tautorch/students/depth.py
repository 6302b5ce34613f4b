"""Students of fewer blocks, each a copy of one of the teacher's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tautorch._batches import Batch, Batches, run_calibration
from tautorch.students.checks import check_same_outputs, run, trainable

Select = Literal["even", "importance"]
_Stack = nn.Sequential | nn.ModuleList


def shrink_depth(
    teacher: nn.Module,
    keep: Mapping[str, int | Sequence[int]],
    example_input: Batch,
    *,
    select: Select = "even",
    calibration: Batches | None = None,
) -> nn.Module:
    """A student with some of the teacher's blocks, weights and all; the teacher is left as it is.

    Args:
        teacher: blocks in an `nn.Sequential` or `nn.ModuleList`, that its code goes through one by one.
        keep: {name of the stack: how many blocks, or which (indices, in their order)}.
        example_input: one batch of what the model takes. A block whose output has another shape than its
            input (the first of a ResNet's stage) always stays; the student must return the teacher's shapes.
        select: of a number of blocks, "even" takes them evenly spaced with the first and last (DistilBERT,
            Sanh et al. 2019, arXiv:1910.01108, takes every other one); "importance" those that change their
            input most over `calibration`: 1 - cosine of input and output (ShortGPT, Men et al. 2024,
            arXiv:2403.03853).
        calibration: batches of what the model takes, for "importance".

    The blocks are renumbered from 0. Train the student before use: "even" for training long, "importance"
    for little. Raises ValueError for a stack that is not there or does not run block by block, numbers out of
    range, and a student that does not run.
    """
    op = "shrink_depth"
    if select not in get_args(Select):
        raise ValueError(f'{op}: select must be "even" or "importance", got {select!r}')
    if select == "importance" and calibration is None:
        raise ValueError(f'{op}: calibration must hold batches for select "importance", got None')
    if not isinstance(keep, Mapping) or not keep:
        raise ValueError(f"{op}: keep must be a dict of stacks and how many blocks to keep, got {keep!r}")
    stacks = {name: _stack(op, teacher, name) for name in keep}
    for name, wanted in keep.items():
        _check_wanted(op, name, wanted, len(stacks[name]))
    watch = _Watch(stacks)
    with watch:
        run(op, teacher, example_input)
    fixed = watch.reshaping()
    for name in stacks:
        watch.check_ran(op, name)
    if select == "importance" and calibration is not None:
        watch = _Watch(stacks)
        with watch:
            run_calibration(op, teacher, calibration)
    kept: dict[str, list[int]] = {}
    for name, wanted in keep.items():
        if isinstance(wanted, int):
            kept[name] = _choose(
                op,
                name,
                wanted,
                fixed[name],
                watch.changes[name] if select != "even" else None,
                len(stacks[name]),
            )
        else:
            kept[name] = list(wanted)
            if missing := sorted(fixed[name] - set(wanted)):
                raise ValueError(
                    f"{op}: keep of {name!r} must hold {missing}, which change the shape, got {list(wanted)}"
                )
    student = _copied(teacher, stacks, kept)
    check_same_outputs(op, teacher, student, example_input)
    return student


def _stack(op: str, teacher: nn.Module, name: str) -> _Stack:
    found = dict(teacher.named_modules()).get(name)
    if not isinstance(found, (nn.Sequential, nn.ModuleList)):
        known = [n for n, m in teacher.named_modules() if n and isinstance(m, (nn.Sequential, nn.ModuleList))]
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(
            f"{op}: {name!r} must be an nn.Sequential or nn.ModuleList, got {what}; "
            f"the model has {', '.join(known) or 'none'}"
        )
    return found


def _check_wanted(op: str, name: str, wanted: int | Sequence[int], size: int) -> None:
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= size:
            raise ValueError(f"{op}: keep of {name!r} must be in [1, {size}], got {wanted}")
        return
    indices = list(wanted) if isinstance(wanted, (list, tuple, range)) else []
    whole = bool(indices) and all(type(i) is int for i in indices)
    if not whole or sorted(set(indices)) != indices or not 0 <= indices[0] <= indices[-1] < size:
        raise ValueError(
            f"{op}: keep of {name!r} must be a number of blocks or growing indices in [0, {size - 1}], "
            f"got {wanted!r}"
        )


class _Watch:
    """What each block of some stacks does to its first input: shapes, and 1 - cosine, summed over rows."""

    def __init__(self, stacks: Mapping[str, _Stack]) -> None:
        self._stacks = stacks
        self._shapes: dict[str, dict[int, bool]] = {name: {} for name in stacks}
        self._sums = {name: [[0.0, 0] for _ in stack] for name, stack in stacks.items()}

    def __enter__(self) -> _Watch:
        self._handles = []
        for name, stack in self._stacks.items():
            for index, block in enumerate(stack):
                before, after = self._hooks(name, index)
                self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(block.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hooks(self, name: str, index: int) -> tuple[Any, Any]:
        given: Tensor | None = None

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal given
            # A copy: blocks may add to their input in place.
            given = next(
                (v.clone() for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)), None
            )

        def after(_: nn.Module, args: Any, out: Any) -> None:
            made = next((v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)), None)
            same = given is not None and made is not None and given.shape == made.shape
            self._shapes[name][index] = same
            if same and given is not None and made is not None and given.is_floating_point():
                dim = 1 if given.dim() == 4 else -1  # the channels of images, the features of all else
                change = 1 - F.cosine_similarity(given.detach().double(), made.detach().double(), dim=dim)
                self._sums[name][index][0] += float(change.sum())
                self._sums[name][index][1] += change.numel()

        return before, after

    @property
    def changes(self) -> dict[str, list[float]]:
        """The mean change of each block."""
        return {name: [total / max(count, 1) for total, count in sums] for name, sums in self._sums.items()}

    def reshaping(self) -> dict[str, set[int]]:
        """The blocks whose output is of another shape than their input."""
        return {name: {i for i, same in shapes.items() if not same} for name, shapes in self._shapes.items()}

    def check_ran(self, op: str, name: str) -> None:
        silent = [i for i in range(len(self._stacks[name])) if i not in self._shapes[name]]
        if silent:
            raise ValueError(f"{op}: the blocks of {name!r} must all run on example_input, {silent} did not")


def _choose(
    op: str, name: str, count: int, fixed: set[int], changes: Sequence[float] | None, size: int
) -> list[int]:
    if count < len(fixed):
        raise ValueError(
            f"{op}: keep of {name!r} must be at least {len(fixed)}, the blocks that change the shape, "
            f"got {count}"
        )
    free = [i for i in range(size) if i not in fixed]
    left = count - len(fixed)
    if changes is not None:
        picked = sorted(free, key=lambda i: -changes[i])[:left]
    elif left == 1:
        picked = [free[len(free) // 2]] if fixed else [free[0]]
    else:
        picked = [free[round(i * (len(free) - 1) / (left - 1))] for i in range(left)] if left else []
    return sorted({*fixed, *picked})


def _copied(teacher: nn.Module, stacks: Mapping[str, _Stack], kept: Mapping[str, list[int]]) -> nn.Module:
    """A deep copy that leaves out what is not kept."""
    memo: dict[int, Any] = {}
    placeholder = nn.Identity()
    for name, stack in stacks.items():
        for index, block in enumerate(stack):
            if index not in kept[name]:
                memo[id(block)] = placeholder
    student = copy.deepcopy(teacher, memo)
    for name, indices in kept.items():
        shrunk = student.get_submodule(name)
        blocks = [list(shrunk._modules.values())[i] for i in indices]
        shrunk._modules.clear()
        shrunk._modules.update({str(position): block for position, block in enumerate(blocks)})
    return trainable(student)
