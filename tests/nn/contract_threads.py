"""The contract, on memory, threads and processes."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tautorch import _C
from tautorch.nn.packed import PackedModule

from .subject import Subject


class Step:
    """Runs one thing after so many look-ups and changes that another makes."""

    def __init__(self) -> None:
        self.left, self.what = 0, lambda: None

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.what()

    def run(self, what: Callable[[], None], during: Callable[[], None], after: int) -> bool:
        """Whether `during` took as many."""
        self.left, self.what = after, what
        during()
        reached = self.left <= 0
        self.left = 0
        return reached


class Stepping(dict[str, Any]):
    """Buffers that tell of every look-up and change."""

    def __init__(self, buffers: dict[str, Any], step: Step) -> None:
        super().__init__(buffers)
        self.step = step

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self.step()
        return found

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.step()

    def copy(self) -> dict[str, Any]:
        found = super().copy()
        self.step()
        return found

    def items(self) -> Any:
        found = list(super().items())
        self.step()
        return found


class ThreadsContract(Subject):
    # ---- memory ----

    def test_a_call_allocates_its_output_alone(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant, 17)
        module(x)
        for few in (x, x[:1], x[:5], x):
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                y = module(few)
            taken = [e.cpu_memory_usage for e in profile.function_events if e.name == "aten::empty"]
            assert taken == [y.untyped_storage().nbytes()]

    def test_scratch_is_used_again(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant, 17)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            module(x)
            count = _C.scratch_allocations()
            for rows in (17, 1, 5, 17):
                module(x[:rows])
            assert _C.scratch_allocations() == count
        finally:
            torch.set_num_threads(threads)

    # ---- threads and processes ----

    @pytest.mark.parametrize("through_op", [False, True])
    def test_threads(self, variant: str, through_op: bool) -> None:
        x = self.x(variant, 64)  # enough for the kernels to release the interpreter
        expected = self.module(variant)(x)
        if through_op:
            x.requires_grad_()
        for _ in range(2 if through_op else 5):
            module = self.module(variant)
            barrier, wrong = threading.Barrier(8), []

            def work(barrier: threading.Barrier, module: Any, wrong: list[object]) -> None:
                try:
                    barrier.wait()
                    for i in range(10):
                        if not torch.equal(module(x), expected):
                            wrong.append("another result")
                        if i % 4 == 3:
                            module.state_dict()
                except Exception as error:
                    wrong.append(error)

            threads = [threading.Thread(target=work, args=(barrier, module, wrong)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            assert not wrong

    def test_readers_do_not_disturb_runners(self) -> None:
        """Reading ``module.<weight>`` unpacks, while another thread runs the packed form."""
        variant = next(iter(self.variants))
        module, x = self.module(variant), self.x(variant, 64)
        expected = module(x)
        stop, wrong = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                for name in module.packed_names:
                    getattr(module, name)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(40):
                if not torch.equal(module(x), expected):
                    wrong.append("another result")
        finally:
            stop.set()
            reader.join(60)
        assert not wrong

    def test_the_way_to_the_operator_at_any_moment(self, variant: str) -> None:
        """Another thread packs or unpacks between any two of its steps, or it comes between two of theirs."""
        module, x = self.module(variant), self.x(variant)
        expected, weight, step = module(x), module.dense_weight(), Step()
        parts = [part for part in module.modules() if isinstance(part, PackedModule)]
        for part in parts:
            part.unpack_()
            part._buffers = Stepping(part._buffers, step)
            part._reset()

        def packed() -> None:
            module.prepare()

        def unpacked() -> None:
            for part in parts:
                part.unpack_()

        def call() -> None:
            assert torch.equal(module._through_op(x), expected)
            assert torch.equal(module.dense_weight(), weight)
            assert module.weight_device() == x.device

        for first, then in ((packed, unpacked), (unpacked, packed)):
            for after in itertools.count(1):
                first()
                if not step.run(then, call, after):
                    break
            assert after > 1
            for after in itertools.count(1):
                first()
                if not step.run(call, then, after):
                    break
            assert after > 1

    def test_saved_and_copied_while_others_run(self) -> None:
        variant = next(iter(self.variants))
        module, x = self.module(variant), self.x(variant)
        state = module.__getstate__()
        module(x)
        assert all(state["_buffers"][name] is not None for name in module.packed_names)

        reader = threading.Thread(target=module.unpack_)

        def read() -> None:
            reader.start()
            reader.join(0.2)

        step = Step()
        module._buffers = Stepping(module._buffers, step)
        saved: dict[str, Tensor] = {}
        assert step.run(read, lambda: saved.update(module.state_dict()), after=1)
        reader.join(60)
        assert saved.keys() == self.module(variant).state_dict().keys()

    def test_forked_child_runs(self, variant: str) -> None:
        torch.set_num_threads(2)  # the pool that a child does not inherit
        module = self.from_float(self.float_type(**self.roomy), **self.variants[variant][1])
        x = self.roomy_x()
        expected = module(x).numpy().tobytes()
        assert module._through_op(x).numpy().tobytes() == expected  # a plan that the child inherits
        fresh = [copy.deepcopy(module) for _ in range(2)]  # packed in the child

        def child() -> None:
            given = [module(x), module._through_op(x), fresh[0](x), fresh[1]._through_op(x)]
            module.state_dict()
            os._exit(0 if {y.numpy().tobytes() for y in given} == {expected} else 3)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(30)
        alive = process.is_alive()
        if alive:
            process.kill()
        assert not alive and process.exitcode == 0
