"""Plans kept between calls of the torch operators: used again where nothing changed, only there."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import _C, dispatch
from tautorch.ops import caches
from tautorch.ops import library as lib
from tautorch.ops.lowrank_linear import lowrank_linear
from tautorch.testing.cases import MODES, OPS, Case, conv_case, linear_case

from .agreement import compare, public_of, reference_of

CALLS = [(op, mode) for op in OPS for mode in MODES[op]]


def case_of(op: str, mode: str, seed: int = 0, **kwargs: Any) -> Case:
    """A small case; convolutions get square factors too, so that transposing changes no shape."""
    if op.endswith("linear"):
        return linear_case(op, 3, 20, 20, mode=mode, rank=20, seed=seed, **kwargs)
    return conv_case(op, (2, 20, 5, 4), (20, 20, 1, 1), mode=mode, rank=20, seed=seed, **kwargs)


@contextmanager
def planned(op: str) -> Iterator[list[int]]:
    """Counts the plans that are made."""
    module: Any = importlib.import_module(f"tautorch.ops.{op}")
    count, original = [0], module.plan

    def counted(*args: Any) -> bytes:
        count[0] += 1
        return original(*args)  # type: ignore[no-any-return]

    module.plan = counted
    try:
        yield count
    finally:
        module.plan = original


def right(case: Case) -> Tensor:
    """The operator's answer, which is the reference's, however often it is asked."""
    expected = case(reference_of(case.op))
    for _ in range(2):
        y = case(public_of(case.op))
        compare(case, y, expected)
    return y


def tensors(case: Case) -> dict[str, Tensor]:
    """Every tensor of a call but x, by position or keyword."""
    named = {**{str(i): a for i, a in enumerate(case.args) if i}, **case.kwargs}
    return {name: t for name, t in named.items() if isinstance(t, Tensor)}


@pytest.mark.parametrize(("op", "mode"), CALLS)
def test_the_same_call_makes_one_plan(op: str, mode: str) -> None:
    case = case_of(op, mode)
    with planned(op) as count:
        y = right(case)
        assert count == [1]
        assert torch.equal(right(case.with_x(case.x.clone())), y)
        assert count == [1]
        for other in (case.but(activation="relu"), case):
            right(other)
        assert count == [2]
        if mode != "int8":
            right(case.with_x(case.x.bfloat16()))
            right(case)
            assert count == [3]


EDITS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.neg_(),
    "other data": lambda t: setattr(t, "data", t.clone().neg_()),
    # The old memory is free again when the third tensor is made, and may well become its own.
    "other data twice": lambda t: [setattr(t, "data", t.clone().neg_()) for _ in range(3)],
    "set_": lambda t: t.set_(t.clone().neg_()),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("op", "mode"), CALLS)
def test_edits_are_seen(op: str, mode: str, edit: str) -> None:
    names = tensors(case_of(op, mode))
    for name in names:
        case = case_of(op, mode)
        tensor = tensors(case)[name]
        if tensor.numel() == 1:
            continue  # below
        if tensor.dtype in (torch.int16, torch.uint8) or (op.startswith("sparse") and name in ("2", "3")):
            continue  # indices
        before = right(case)
        EDITS[edit](tensor)
        assert not torch.equal(right(case), before), name


@pytest.mark.parametrize("op", OPS)
def test_single_values_are_compared_as_they_stand(op: str) -> None:
    case = case_of(op, "static").but(out_scale=torch.tensor([0.05]))
    case = case.but(out_zero_point=torch.tensor([2], dtype=torch.int32))
    for name in ("x_zero_point", "x_scale", "out_scale", "out_zero_point"):  # the first one makes values clip
        before = right(case)
        case.kwargs[name].numpy()[0] *= 30  # which no version shows
        assert not torch.equal(right(case), before), name


@pytest.mark.parametrize("op", OPS)
def test_scales_and_bias_are_read_at_every_call(op: str) -> None:
    case = case_of(op, "dynamic")
    for name, tensor in tensors(case).items():
        if tensor.dtype == torch.float32 and tensor.dim() == 1:
            before = right(case)
            tensor.numpy()[:] *= 2
            assert not torch.equal(right(case), before), name


@pytest.mark.parametrize("op", ["int8_linear", "lowrank_linear"])
def test_another_view_under_the_same_name_is_seen(op: str) -> None:
    """Same address, same shape, same version: only the strides differ."""
    for name in ("1", "2") if op.startswith("lowrank") else ("1",):
        case = case_of(op, "dynamic")
        before = right(case)
        weight = tensors(case)[name]
        weight.data = weight.data.t()
        assert not torch.equal(right(case), before)
    bias = case.bias
    assert bias is not None
    bias.data = bias.data[:5]
    with pytest.raises(ValueError, match=f"{op}: bias must be"):
        case(public_of(op))


@pytest.mark.parametrize(("op", "mode"), CALLS)
def test_freed_tensors_are_not_mistaken_for_new_ones(op: str, mode: str) -> None:
    """Objects and memory of one case are used again by the next."""
    addresses: set[int] = set()
    for seed in range(200):  # the allocator may take a while to come back to an address
        case = case_of(op, mode, seed)
        seen = case.args[1].data_ptr() in addresses
        addresses.add(case.args[1].data_ptr())
        right(case)
        del case
        if seen and seed >= 12:
            return
    pytest.fail("nothing was reused: this test shows nothing")


@pytest.mark.parametrize(("op", "mode"), CALLS)
def test_replaced_arguments_are_seen(op: str, mode: str) -> None:
    case, other = case_of(op, mode), case_of(op, mode, 7)
    for i, argument in enumerate(other.args):
        if isinstance(argument, Tensor) and i and not (op.startswith("sparse") and i < 4):
            before = right(case)
            case = replace(case, args=(*case.args[:i], argument, *case.args[i + 1 :]))
            assert not torch.equal(right(case), before)
    right(replace(case, args=(*case.args[:-1], None)))


@pytest.mark.parametrize("op", OPS)
def test_the_kernel_is_the_one_that_is_asked_for(op: str) -> None:
    case = case_of(op, "dynamic")
    for _ in range(2):
        for kernel in ["reference", *(name for name, here in _C.isas().items() if here)]:
            with dispatch.force(op, kernel):
                right(case)
                assert dispatch.last_used(op) == kernel
        dispatch.note_used(op, "another")
        case(public_of(op))
        assert dispatch.last_used(op) not in ("another", "reference")


def test_one_weight_may_serve_several_widths() -> None:
    values, crow = torch.ones(8, 4, 1, dtype=torch.int8), torch.tensor([0, 2, 4, 6, 8], dtype=torch.int16)
    col = torch.tensor([0, 5] * 4, dtype=torch.int16)
    for k in (6, 9, 6, 33):
        args = (torch.ones(2, k), values, crow, col, torch.ones(16), None)
        right(Case("sparse_linear", "dynamic", "", k, args, {"pattern": "4x1", "out_features": 16}))


def test_scales_of_rows_belong_to_their_call() -> None:
    for rows in (3, 5, 3):
        case = linear_case("int8_linear", rows, 8, 8, mode="int8")
        right(case.but(x_scale=torch.rand(rows) + 0.5))
    one = linear_case("int8_linear", 3, 8, 8, mode="int8").but(x_scale=torch.rand(3) + 0.5)
    right(one)
    with pytest.raises(ValueError, match="x_scale must be float32 with 1 or 2 values"):
        one.with_x(one.x[:2])(public_of("int8_linear"))


@pytest.mark.parametrize("op", OPS)
def test_plans_go_with_their_weight(op: str) -> None:
    gc.collect()
    entries = lib.plan_caches[op].entries
    before = len(entries)
    case = case_of(op, "dynamic")
    for activation in ("none", "relu", "gelu", "silu", "gelu_tanh"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            right(case.with_x(case.x.to(dtype)).but(activation=activation))
    assert len(entries) == before + 1
    assert all(len(plans) <= caches.PlanCache.PER_WEIGHT for plans in entries.values())
    held = [weakref.ref(t) for t in tensors(case).values()]
    del case
    gc.collect()
    assert len(entries) == before
    assert not any(ref() is not None for ref in held)


@pytest.mark.parametrize("op", OPS)
def test_memory_that_was_left_is_not_kept(op: str) -> None:
    """A weight that gets other memory again and again: the plans of what it was are dropped."""
    case = case_of(op, "dynamic")
    weight = case.args[1]
    for _ in range(4):
        right(case)
        weight.data = weight.data.clone().neg_()
    right(case)
    assert len(lib.plan_caches[op].entries[id(weight)]) == 1


def test_inference_tensors_are_never_remembered() -> None:
    """They count no versions: an edit could not be seen."""
    with torch.inference_mode():
        case = case_of("int8_linear", "dynamic")
        for _ in range(3):
            right(case)
            case.args[1].neg_()
    assert id(case.args[1]) not in lib.plan_caches["int8_linear"].entries


def test_recall_takes_nothing_else() -> None:
    weight = torch.zeros(3)
    good: tuple[Any, ...] = ({}, 0, torch.float32, 3, (weight,))
    assert _C.recall(*good) is None
    for i, bad in ((0, []), (4, []), (4, ())):
        with pytest.raises(TypeError, match="recall: "):
            _C.recall(*good[:i], bad, *good[i + 1 :])
    with pytest.raises(TypeError, match="recall: "):
        _C.recall({})  # type: ignore[call-arg]
    for broken in (1, [1], [(1,)], [(0, torch.float32, 3, weakref.ref(weight), (None,), ((5, ()),), 0, 0)]):
        with pytest.raises(TypeError):
            _C.recall({id(weight): broken}, 0, torch.float32, 3, (weight,))  # type: ignore[dict-item]
    for wrong in (([],), ([], 1), ([1], []), ([(1, 2, 3)], []), ([], [(weight, (1,))])):
        with pytest.raises(TypeError):
            _C.unchanged(*wrong)


def test_a_weight_given_twice_does_not_keep_itself_alive() -> None:
    factor = torch.randn(8, 8)
    x = torch.randn(3, 8)
    y = lowrank_linear(x, factor, factor)
    torch.testing.assert_close(y, x @ factor.T @ factor.T)
    alive = weakref.ref(factor)
    del factor
    gc.collect()
    assert alive() is None
