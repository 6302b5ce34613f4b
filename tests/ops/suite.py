"""The suite that every operator's functional form passes, each kernel forced in turn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tautorch import _C, dispatch
from tautorch.reference.quantizer import MAX_K
from tautorch.testing.cases import MODES, Case, conv_case, linear_case
from tautorch.testing.values import CONV_SIZES, FLOAT_PATTERNS, INT8_PATTERNS, LINEAR_SIZES, TILES

from .agreement import Recorder, agree, compare, gradients_agree, layouts_of, public_of, reference_of

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("unstructured", "2:4", "4x1", "16x16", "32x32", "64x64")
HYPOTHESIS = settings(
    max_examples=60,
    deadline=None,
    derandomize=not os.environ.get("TAUTORCH_TEST_SEED"),  # the same cases on every run, unless asked
    # each example makes its own tensors, and the kernel is forced for the whole test
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


class OperatorSuite:
    """What linear operators and convolutions share; subclasses give ``op`` and build cases."""

    op: ClassVar[str]

    def small(self, **kwargs: Any) -> Case:
        """A case of a few tiles and odd edges."""
        raise NotImplementedError

    def sized(self, **kwargs: Any) -> Iterator[Case]:
        """Cases over the nasty sizes."""
        raise NotImplementedError

    def drawn(self, data: st.DataObject, **kwargs: Any) -> Case:
        """A case of drawn sizes."""
        raise NotImplementedError

    def variants(self) -> list[dict[str, Any]]:
        """Weight formats: sparse operators have patterns."""
        return [{"pattern": p} for p in PATTERNS] if self.op.startswith("sparse") else [{}]

    def test_sizes(self, kernel: str, mode: str) -> None:
        variants = self.variants()
        with dispatch.force(self.op, kernel):
            # each size meets each pattern on one of the kernels' turns; (i + seed) spreads them
            for i, case in enumerate(itertools.chain(*(self.sized(mode=mode, **v) for v in variants))):
                agree(case.but(activation="relu" if i % 3 == 0 else "none"), kernel)

    @pytest.mark.parametrize("values", FLOAT_PATTERNS)
    def test_float_values(self, kernel: str, values: str) -> None:
        with dispatch.force(self.op, kernel):
            for mode, variant in itertools.product(MODES[self.op], self.variants()):
                if mode == "int8" or (mode in ("weight_only", "float") and values in ("nan_row", "inf_row")):
                    continue  # IEEE's own rules there: test_float_products_follow_ieee
                agree(self.small(mode=mode, x=values, **variant), kernel)

    @pytest.mark.parametrize("values", INT8_PATTERNS)
    def test_int8_values(self, kernel: str, values: str) -> None:
        with dispatch.force(self.op, kernel):
            for w, variant in itertools.product(("random", "lowest", "extremes"), self.variants()):
                case = self.small(mode="int8", x=values, w=w, **variant)
                agree(case, kernel)
                agree(case.but(x_zero_point=None), kernel)
                for point in (-128, 127):
                    agree(case.but(x_zero_point=torch.tensor([point], dtype=torch.int32)), kernel)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_outputs(self, kernel: str, activation: str, mode: str) -> None:
        scale, point = torch.tensor([0.05]), torch.tensor([-9], dtype=torch.int32)
        with dispatch.force(self.op, kernel):
            for x_dtype in X_DTYPES:
                if mode == "int8" and x_dtype != torch.float32:
                    continue
                case = self.small(mode=mode, x_dtype=x_dtype, activation=activation)
                agree(case, kernel)
                for out_dtype in X_DTYPES:
                    agree(case.but(out_dtype=out_dtype), kernel)
                agree(case.but(out_scale=scale), kernel)
                agree(case.but(out_scale=scale, out_zero_point=point, out_dtype=torch.int8), kernel)

    def test_no_bias(self, kernel: str, mode: str) -> None:
        with dispatch.force(self.op, kernel):
            for variant in self.variants():
                agree(self.small(mode=mode, bias=False, **variant), kernel)

    @pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16])
    def test_bias_of_another_dtype(self, kernel: str, bias_dtype: torch.dtype) -> None:
        case = self.small()
        assert case.bias is not None
        with dispatch.force(self.op, kernel):
            agree(replace(case, args=(*case.args[:-1], case.bias.to(bias_dtype))), kernel)

    def test_memory_layouts(self, kernel: str, mode: str) -> None:
        case = self.small(mode=mode)
        with dispatch.force(self.op, kernel):
            expected = case(public_of(self.op))
            for name, x in layouts_of(case.x):
                y = case.with_x(x)(public_of(self.op))
                assert torch.equal(y, expected), name
                agree(case.with_x(x), kernel)

    def test_edited_weights_are_packed_anew(self, kernel: str, mode: str) -> None:
        """Packs of canonical weights are cached; the cache must notice every edit."""
        with dispatch.force(self.op, kernel):
            for variant in self.variants():
                case = self.small(mode=mode, **variant)
                agree(case, kernel)
                for tensor in case.args[1:-1]:
                    if isinstance(tensor, Tensor) and tensor.dtype in (torch.int8, torch.float32):
                        tensor.neg_()
                        agree(case, kernel)
                with torch.inference_mode():
                    made_here = replace(
                        case, args=tuple(a.clone() if isinstance(a, Tensor) else a for a in case.args)
                    )
                    agree(made_here, kernel)
                    made_here.args[1].zero_()
                    agree(made_here, kernel)

    def test_inputs_are_left_alone(self, kernel: str, mode: str) -> None:
        case = self.small(mode=mode)
        tensors = [a for a in (*case.args, *case.kwargs.values()) if isinstance(a, Tensor)]
        before = [t.clone() for t in tensors]
        with dispatch.force(self.op, kernel):
            case(public_of(self.op))
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    def test_a_spoiled_row_is_nan_and_alone(self, kernel: str) -> None:
        with dispatch.force(self.op, kernel):
            for mode, values in itertools.product(("dynamic", "static"), ("nan_row", "inf_row")):
                for dtype in X_DTYPES:
                    y = self.small(mode=mode, x=values, x_dtype=dtype, activation="relu")(public_of(self.op))
                    assert bool(torch.isnan(y[0]).all())
                    assert bool(torch.isfinite(y[1:]).all())

    def test_a_spoiled_row_requantises_to_the_zero_point(self, kernel: str) -> None:
        point = torch.tensor([-9], dtype=torch.int32)
        with dispatch.force(self.op, kernel):
            for mode in ("dynamic", "static"):
                case = self.small(mode=mode, x="nan_row")
                case = case.but(out_scale=torch.tensor([0.05]), out_zero_point=point)
                agree(case, kernel)
                q = case(public_of(self.op))
                assert bool((q[0] == -9).all()) and not bool((q[1] == -9).all())

    @pytest.mark.parametrize("largest", [3e9, 1e30, 3.4e38])
    def test_huge_values(self, kernel: str, largest: float) -> None:
        """Beyond int32, and beyond fp32 once scaled: clamped or infinite as the reference's."""
        with dispatch.force(self.op, kernel):
            for mode in ("dynamic", "static"):
                case = self.small(mode=mode)
                case = case.with_x(case.x.clamp(-1, 1) * largest)
                for kwargs in ({}, {"out_scale": torch.tensor([1e-3])}, {"out_dtype": torch.float16}):
                    actual, expected = (
                        case.but(**kwargs)(public_of(self.op)),
                        case.but(**kwargs)(reference_of(self.op)),
                    )
                    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0, equal_nan=True)
                raw = case.raw()
                assert torch.equal(raw(public_of(self.op)), raw(reference_of(self.op)))
            for scale in (1e-30, 1e30):
                raw = self.small(mode="static").raw().but(x_scale=torch.tensor([scale]))
                assert torch.equal(raw(public_of(self.op)), raw(reference_of(self.op)))

    def test_float_products_follow_ieee(self, kernel: str) -> None:
        modes = [m for m in MODES[self.op] if m in ("weight_only", "float")]
        for mode, variant in itertools.product(modes, self.variants()):
            with dispatch.force(self.op, kernel):
                for values in ("nan_row", "inf_row"):
                    case = self.small(mode=mode, x=values, **variant)
                    y, expected = case(public_of(self.op)), case(reference_of(self.op))
                    # a spoiled input reaches at least the outputs it must, and no other row
                    assert bool((~torch.isfinite(y[0]) | torch.isfinite(expected[0])).all())
                    assert not bool(torch.isfinite(y[0]).all()) or bool(torch.isfinite(expected[0]).all())
                    compare(case.with_x(case.x[1:]), y[1:], expected[1:])

    def test_threads_do_not_change_a_bit(self, kernel: str, mode: str) -> None:
        case = self.large(mode=mode)
        threads = torch.get_num_threads()
        try:
            with dispatch.force(self.op, kernel):
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(case(public_of(self.op)))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        if kernel != "reference":
            compare(case, results[0], case(reference_of(self.op)))

    def large(self, **kwargs: Any) -> Case:
        """A case that is worth cutting among threads."""
        raise NotImplementedError

    def test_any_case(self, kernel: str) -> None:
        @HYPOTHESIS
        @given(st.data())
        def run(data: st.DataObject) -> None:
            draw = data.draw
            mode = draw(st.sampled_from(MODES[self.op]))
            values = draw(st.sampled_from([p for p in FLOAT_PATTERNS if not p.endswith("_row")]))
            case = self.drawn(
                data,
                mode=mode,
                x=values,
                w=draw(st.sampled_from(INT8_PATTERNS)),
                x_dtype=draw(st.sampled_from(X_DTYPES)),
                bias=draw(st.booleans()),
                activation=draw(st.sampled_from(ACTIVATIONS)),
                keep=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
                seed=draw(st.integers(0, 99)),
                **draw(st.sampled_from(self.variants())),
            )
            if values == "mixed" and case.x.dtype == torch.float16:
                case = case.but(
                    out_dtype=torch.float32
                )  # fp16 overflows there, and where is a matter of rounding
            agree(case, kernel)

        with dispatch.force(self.op, kernel):
            run()

    def test_opcheck(self, mode: str) -> None:
        # one layout of each shape of indices: with and without crow_indices
        for variant in self.variants()[:2]:
            case = self.small(mode=mode, activation="gelu", **variant)
            with Recorder() as recorder:
                case(public_of(self.op))
            ((func, args, kwargs),) = recorder.calls
            assert func is getattr(torch.ops.tautorch, self.op).default
            leaves = [
                a.clone().requires_grad_()
                if isinstance(a, Tensor) and (a is case.bias or a is case.x) and a.is_floating_point()
                else a
                for a in args
            ]
            torch.library.opcheck(func, tuple(leaves), kwargs)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gradients(self, mode: str, activation: str) -> None:
        for variant in self.variants():
            case = self.small(mode=mode, activation=activation, **variant)
            gradients_agree(case, self.op)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gradients_keep_the_dtype(self, dtype: torch.dtype) -> None:
        case = self.small(x_dtype=dtype)
        x = case.x.requires_grad_()
        y = case.with_x(x)(public_of(self.op))
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype and bool(torch.isfinite(x.grad).all())

    def test_empty_batch_has_gradients(self) -> None:
        case = self.small()
        x = case.x[:0].clone().requires_grad_()
        y = case.with_x(x)(public_of(self.op))
        assert y.shape[0] == 0 and y.requires_grad
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape

    def test_an_unknown_kernel_is_refused(self) -> None:
        with pytest.raises(ValueError, match=rf"force: {self.op} has kernels .*; got 'warp9'"):
            dispatch.force(self.op, "warp9")

    def test_fast_kernels_are_chosen(self) -> None:
        """No automatic choice is scalar where the machine has more."""
        for mode, variant in itertools.product(MODES[self.op], self.variants()):
            self.small(mode=mode, **variant)(public_of(self.op))
            used = dispatch.last_used(self.op)
            assert used not in (None, "reference")
            if _C.isas().get("avx512vnni"):
                assert used in dispatch.AVX512, (mode, variant)

    def refused(self, message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        """The small case with ``changes`` (``x``, ``bias`` or a keyword) is refused before it runs."""
        case = self.small(mode=changes.pop("mode", "dynamic"))
        if "x" in changes:
            case = case.with_x(changes.pop("x"))
        args = (*case.args[:-1], changes.pop("bias", case.bias))
        with pytest.raises(error, match=f"^{self.op}: .*{message}"):
            public_of(self.op)(*args, **{**case.kwargs, **changes})

    def test_bad_arguments(self) -> None:
        x = self.small().x
        self.refused("x must be", TypeError, x=x.double())
        self.refused("x must be", TypeError, x=x.int())
        self.refused("x_scale must be given", x=x.to(torch.int8))
        self.refused("x_scale must be", x_scale=torch.ones(7))
        self.refused("x_zero_point", x_zero_point=torch.ones(1, dtype=torch.int32))
        self.refused("x_zero_point must be", x_scale=torch.ones(1), x_zero_point=torch.ones(1))
        self.refused("activation must be one of", activation="tanh")
        self.refused("bias must be", bias=torch.ones(3))
        self.refused(
            "bias must be", TypeError, bias=torch.ones_like(self.small().args[-1], dtype=torch.int32)
        )
        self.refused("out_scale must be given", out_dtype=torch.int8)
        self.refused("out_scale must be given", out_zero_point=torch.ones(1, dtype=torch.int32))
        self.refused("out_dtype must be", out_scale=torch.ones(1), out_dtype=torch.float32)
        self.refused("out_dtype must be", TypeError, out_dtype=torch.float64)
        self.refused("must be on", x=x.to("meta"))
        for mode in ("weight_only", "float"):
            if mode in MODES[self.op]:
                self.refused("out_dtype must be", out_dtype=torch.int32, mode=mode)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
    def test_scales_without_an_inverse(self, kernel: str, value: float) -> None:
        message, scale = "_scale must be positive and finite, with a finite inverse", torch.tensor([value])
        with dispatch.force(self.op, kernel):
            self.refused(f"x{message}, got {value:g}", x_scale=scale, mode="static")
            for mode in MODES[self.op]:
                self.refused(f"out{message}, got {value:g}", out_scale=scale, mode=mode)
            agree(self.small(mode="int8").but(x_scale=scale), kernel)  # nothing is divided by it

    @pytest.mark.parametrize("value", [-129, 128, 2**31 - 1, -(2**31)])
    def test_zero_points_out_of_range(self, kernel: str, value: int) -> None:
        message, point = f"_zero_point must be in .-128, 127., got {value}", torch.tensor([value]).int()
        with dispatch.force(self.op, kernel):
            for mode in ("static", "int8"):
                self.refused(f"x{message}", x_zero_point=point, mode=mode)
            for mode in MODES[self.op]:
                self.refused(f"out{message}", out_scale=torch.ones(1), out_zero_point=point, mode=mode)


class LinearSuite(OperatorSuite):
    """Linear operators."""

    def small(self, **kwargs: Any) -> Case:
        return linear_case(self.op, 5, 37, 70, **kwargs)

    def large(self, **kwargs: Any) -> Case:
        return linear_case(self.op, 131, 200, 300, **kwargs)

    def sized(self, **kwargs: Any) -> Iterator[Case]:
        for i, (m, n, k) in enumerate(LINEAR_SIZES):
            yield linear_case(self.op, m, n, k, seed=i, **kwargs)

    def drawn(self, data: st.DataObject, **kwargs: Any) -> Case:
        near = sorted({max(0, t * f + d) for t in TILES for f in (1, 2) for d in (-1, 0, 1)})
        m, n, k = (
            data.draw(st.one_of(st.sampled_from([v for v in near if v >= low]), st.integers(low, high)))
            for low, high in ((0, 20), (1, 140), (1, 200))
        )
        return linear_case(self.op, m, n, k, **kwargs)

    @pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
    def test_leading_shapes(self, kernel: str, lead: tuple[int, ...]) -> None:
        with dispatch.force(self.op, kernel):
            for mode in MODES[self.op]:
                case = self.small(mode=mode)
                rows = torch.Size(lead).numel()
                x = case.x[torch.arange(rows) % 5].reshape(*lead, case.x.shape[-1])
                y = case.with_x(x)(public_of(self.op))
                assert y.shape == (*lead, 37)
                flat = case.with_x(x.reshape(rows, -1) if rows else case.x[:0])(public_of(self.op))
                assert torch.equal(y.reshape(rows, 37), flat)

    def test_a_scale_for_each_row(self, kernel: str) -> None:
        case = self.small(mode="int8").but(x_scale=torch.tensor([0.5, 0.25, 1.0, 0.0, 3.0]))
        with dispatch.force(self.op, kernel):
            agree(case, kernel)
            lead = case.with_x(case.x.reshape(5, 1, 70)).but(x_scale=case.kwargs["x_scale"].reshape(5, 1))
            assert torch.equal(lead(public_of(self.op))[:, 0], case(public_of(self.op)))

    def test_scales_of_no_rows(self, kernel: str) -> None:
        case = self.small(mode="int8").but(x_scale=torch.empty(0))
        empty = case.with_x(case.x[:0])
        with dispatch.force(self.op, kernel):
            agree(empty, kernel)
            # The same scales with rows, after that call: refused by what it asks of them.
            with pytest.raises(ValueError, match=f"{self.op}: x_scale must be float32 with 1 or 5 values"):
                case(public_of(self.op))

    def test_longest_inner_product(self, kernel: str) -> None:
        point = torch.tensor([-128], dtype=torch.int32)
        with dispatch.force(self.op, kernel):
            case = linear_case(self.op, 2, 5, MAX_K, mode="int8", x="highest", w="lowest", keep=1.0, rank=3)
            if self.op == "lowrank_linear":
                case.args[1].fill_(-127)
            agree(case.but(x_zero_point=point), kernel)

    def test_bad_shapes(self) -> None:
        self.refused("must be|x must", x=torch.zeros(()))
        if self.op != "sparse_linear":  # there K comes from x
            self.refused("must be", x=torch.zeros(5, 71))
        if self.op == "int8_linear":
            case = linear_case(self.op, 1, 1, MAX_K + 1)
            with pytest.raises(ValueError, match=f"{self.op}: K must be at most {MAX_K}"):
                case(public_of(self.op))


class ConvSuite(OperatorSuite):
    """Convolutions."""

    def small(self, **kwargs: Any) -> Case:
        kwargs = {"padding": 1, "groups": 2, **kwargs}
        return conv_case(self.op, (3, 10, 7, 6), (18, 10 // kwargs["groups"], 3, 3), **kwargs)

    def large(self, **kwargs: Any) -> Case:
        return conv_case(self.op, (4, 32, 15, 15), (48, 32, 3, 3), padding=1, rank=16, **kwargs)

    def sized(self, **kwargs: Any) -> Iterator[Case]:
        for i, size in enumerate(CONV_SIZES):
            size = dict(size)
            yield conv_case(self.op, size.pop("x"), size.pop("w"), seed=i, **size, **kwargs)  # type: ignore[arg-type]

    def drawn(self, data: st.DataObject, **kwargs: Any) -> Case:
        draw = data.draw
        groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
        i, o = draw(st.integers(1, 20)), draw(st.integers(1, 34 if groups == 1 else 9))
        if draw(st.booleans()) and groups > 1:
            i = o = 1  # depthwise
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        pairs = {
            "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
            "padding": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
            "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        }
        least = [
            max(1, d * (k - 1) + 1 - 2 * p)
            for k, d, p in zip(kernel, pairs["dilation"], pairs["padding"], strict=True)
        ]
        h, w = (least[j] + draw(st.integers(0, 9)) for j in range(2))
        shape = (draw(st.integers(0, 3)), groups * i, h, w)
        return conv_case(self.op, shape, (groups * o, i, *kernel), groups=groups, **pairs, **kwargs)

    def test_outputs_lie_as_graphs_are_told(self, kernel: str, mode: str) -> None:
        case = self.small(mode=mode)
        fn = public_of(self.op)
        with dispatch.force(self.op, kernel), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            for x in (case.x, case.x.contiguous(memory_format=torch.channels_last), case.x.mT, case.x[0]):
                with unset_fake_temporarily():
                    y = case.with_x(x)(fn)
                told = case.with_x(fake.from_tensor(x))(fn)
                assert (y.shape, y.stride(), y.dtype) == (told.shape, told.stride(), told.dtype)

    def test_unbatched(self, kernel: str, mode: str) -> None:
        case = self.small(mode=mode)
        with dispatch.force(self.op, kernel):
            y = case.with_x(case.x[1])(public_of(self.op))
            assert torch.equal(y, case.with_x(case.x[1:2])(public_of(self.op))[0])

    def test_a_scale_for_each_sample(self, kernel: str) -> None:
        case = self.small(mode="int8").but(x_scale=torch.tensor([0.5, 0.0, 3.0]))
        with dispatch.force(self.op, kernel):
            agree(case, kernel)
            none = case.with_x(case.x[:0]).but(x_scale=torch.empty(0))
            agree(none, kernel)

    @pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F80FFFF])
    def test_a_sample_of_any_nan(self, kernel: str, bits: int) -> None:
        """Of a scale that is NaN, whatever its other bits, which no carry may turn into a number."""
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        scale, point = torch.cat([torch.tensor([0.5]), nan, nan]), torch.tensor([3], dtype=torch.int32)
        with dispatch.force(self.op, kernel):
            for variant, size in itertools.product(self.variants(), (1, 3)):
                case = conv_case(self.op, (3, 32, 6, 6), (64, 32, size, size), mode="int8", **variant)
                for memory in (torch.contiguous_format, torch.channels_last):
                    laid = case.with_x(case.x.contiguous(memory_format=memory)).but(x_scale=scale)
                    for dtype in X_DTYPES:
                        agree(laid.but(out_dtype=dtype), kernel)
                    agree(laid.but(out_scale=torch.tensor([0.5]), out_zero_point=point), kernel)

    def test_pairs_and_ints_agree(self, kernel: str) -> None:
        case = self.small(stride=2, padding=2, dilation=2)
        with dispatch.force(self.op, kernel):
            y = case(public_of(self.op))
            assert torch.equal(
                y, case.but(stride=(2, 2), padding=(2, 2), dilation=(2, 2))(public_of(self.op))
            )

    def test_channels_last_stays(self, kernel: str) -> None:
        """Like torch's own convolution, a channels-last input gives the same values."""
        case = self.small()
        with dispatch.force(self.op, kernel):
            last = case.with_x(case.x.contiguous(memory_format=torch.channels_last))
            assert torch.equal(last(public_of(self.op)), case(public_of(self.op)))

    def test_bad_shapes(self) -> None:
        case = conv_case(self.op, (1, MAX_K + 1, 1, 1), (1, MAX_K + 1, 1, 1), keep=0.01)
        with pytest.raises(ValueError, match=f"{self.op}: K must be at most {MAX_K}"):
            case(public_of(self.op))
        self.refused("must be", x=torch.zeros(5, 5))
        self.refused("channels", x=torch.zeros(1, 11, 7, 6))
        self.refused("kernel|size|least", x=torch.zeros(1, 10, 0, 6), padding=0)
        self.refused("groups", groups=7)
        self.refused("stride", stride=0)
        self.refused("padding", padding=-1)
        self.refused("dilation", dilation=0)
