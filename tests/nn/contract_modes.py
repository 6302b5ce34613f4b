"""The contract, on what torch does with a module: autograd, compilers, modes and transforms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ops.agreement import Recorder, reference_of
from ..straight_through import gradients
from .subject import Subject


class ModesContract(Subject):
    # ---- autograd ----

    def test_gradients(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant).requires_grad_()
        plain = module(x.detach())
        wants = [x]
        if module.bias is not None:
            assert not module.bias.requires_grad
            wants.append(module.bias.requires_grad_())
        y = module(x)
        assert torch.equal(y.detach(), plain)
        grad = torch.randn(y.shape)
        actual = torch.autograd.grad(y, wants, grad)
        case = self.case(module, x.detach())
        with torch.no_grad():
            frozen = self.case(copy.deepcopy(module).requires_grad_(False), x.detach())
        expected = gradients(frozen, reference_of(case.op), grad)
        for got, truth in zip(actual, expected, strict=False):
            torch.testing.assert_close(
                got.double(), truth, rtol=1e-4, atol=2e-5 * (float(truth.abs().max()) + 1e-6)
            )

    def test_only_the_bias_learns(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        assert {n for n, _ in module.named_parameters()} <= {"bias"}
        if module.bias is None:
            return
        module.bias.requires_grad_()
        module(x).sum().backward()
        before = module(x).detach()
        torch.optim.SGD(module.parameters(), 0.5).step()
        module.bias.requires_grad_(False)
        self.agrees(module, x)
        assert not torch.equal(module(x), before)

    def test_modes(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        with torch.no_grad():
            assert torch.equal(module(x), y)
        fresh = self.module(variant)
        with torch.inference_mode():
            assert torch.equal(module(x), y)
            assert torch.equal(fresh(x), y)  # packs here
        assert torch.equal(fresh(x), y)

    def test_autocast(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        layer = self.float_layer(variant)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                y = module(x)
                assert y.dtype == layer(x).dtype == dtype
            self.agrees(module, x.to(dtype), y)

    # ---- compilers, modes and transforms ----

    @pytest.mark.parametrize("packed", [False, True])
    def test_compile(self, variant: str, packed: bool) -> None:
        module, x = self.module(variant), self.x(variant)
        if packed:
            module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        self.agrees(module, x, y.detach())
        other = self.x(variant, 5)
        assert torch.equal(compiled(other), module(other))
        grown = x.clone().requires_grad_()
        compiled(grown).sum().backward()
        mine = x.clone().requires_grad_()
        module(mine).sum().backward()
        assert grown.grad is not None and mine.grad is not None
        torch.testing.assert_close(grown.grad, mine.grad)

    @pytest.mark.slow
    def test_inductor(self) -> None:
        variant = next(iter(self.variants))
        module, x = self.module(variant), self.x(variant)
        y = torch.compile(nn.Sequential(module, nn.ReLU()), fullgraph=True)(x)
        assert torch.equal(y, torch.relu(module(x)))

    @pytest.mark.parametrize("packed", [False, True])
    def test_symbolic_trace(self, variant: str, packed: bool) -> None:
        module, x = self.module(variant), self.x(variant)
        if packed:
            module(x)
        model = nn.Sequential(module, nn.Identity())
        graph = torch.fx.symbolic_trace(model)
        assert set(graph.state_dict()) <= set(model.state_dict()), "a traced graph takes canonical weights"
        for given in (x, self.x(variant, 5)):
            assert torch.equal(graph(given), module(given))

    @pytest.mark.parametrize("packed", [False, True])
    def test_export(self, variant: str, packed: bool) -> None:
        module, x = self.module(variant), self.x(variant)
        if packed:
            module(x)
        y = module(x)
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        names = {*program.state_dict, *program.constants}
        assert names <= set(module.state_dict()), "an exported graph takes canonical weights"
        assert torch.equal(program.module()(x), y)
        other = self.x(variant, 7)
        assert torch.equal(program.module()(other), module(other))
        assert torch.equal(module(x), y)

    def test_what_looks_at_operators_sees_one(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        with Recorder() as recorder:
            assert torch.equal(module(x), y)
        assert [func.name() for func, _, _ in recorder.calls] == [f"tautorch::{self.op}"]

        class Watch(torch.overrides.TorchFunctionMode):
            seen = 0

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                Watch.seen += f"tautorch.{self.op}" in str(func)
                return func(*args, **(kwargs or {}))

        Watch.op = self.op  # type: ignore[attr-defined]
        with Watch():
            assert torch.equal(module(x), y)
        assert Watch.seen == 1

    def test_fake_and_meta_tensors(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = module(mode.from_tensor(x))
        assert fake.shape == y.shape and fake.dtype == y.dtype
        assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == y.shape

    def test_functional_transforms(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        assert torch.equal(torch.func.vmap(lambda row: module(row[None])[0])(x), y)
        refused = f"^{self.op}: torch.func's grad, vjp and jacrev are not there"
        for transform in (torch.func.grad, torch.func.jacrev):
            with pytest.raises(NotImplementedError, match=refused):
                transform(lambda t: module(t).sum())(x)
        mine = x.clone().requires_grad_()
        both = torch.stack([torch.ones_like(y), torch.ones_like(y)])
        (grads,) = torch.autograd.grad(module(mine), mine, both, is_grads_batched=True)
        (grad,) = torch.autograd.grad(module(mine), mine, torch.ones_like(y))
        assert torch.equal(grads, torch.stack([grad, grad]))
        (grads,) = torch.autograd.grad(torch.func.vmap(module)(mine[:, None])[:, 0], mine, torch.ones_like(y))
        torch.testing.assert_close(grads, grad)
        # What a transform has packed or unpacked is no tensor of the transform.
        for packed in (False, True):
            module.unpack_()
            if packed:
                module(x)
            scaled = lambda t: (t * torch.func.functional_call(module, {}, (x,)).detach()).sum()  # noqa: E731
            torch.testing.assert_close(torch.func.grad(scaled)(torch.ones(())), y.sum())
            assert torch.equal(module(x), y)
        state = {k: v * 2 if k == "bias" else v for k, v in module.state_dict().items()}
        doubled = copy.deepcopy(module)
        doubled.load_state_dict(state)
        assert torch.equal(torch.func.functional_call(module, state, (x,)), doubled(x))
        assert torch.equal(module(x), y)

    @pytest.mark.parametrize("packed", [False, True])
    def test_functional_call_with_the_buffers_of_another(self, variant: str, packed: bool) -> None:
        """Of a layer that ran ``named_buffers()`` holds the pack, which stands for the weight then."""
        module, x = self.module(variant), self.x(variant)
        torch.manual_seed(8)
        other = self.from_float(self.float_type(**self.variants[variant][0]), **self.variants[variant][1])
        y, want = module(x), other(x)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        assert not torch.equal(y, want)
        if not packed:
            module.unpack_()
        for _ in range(2):
            assert torch.equal(torch.func.functional_call(module, given, (x,)), want)
            found = module.state_dict()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
            assert torch.equal(module(x), y)

    def test_tensor_subclass(self, variant: str) -> None:
        class Mine(Tensor):
            pass

        module, x = self.module(variant), self.x(variant)
        y = module(x.as_subclass(Mine))
        assert type(y) is Mine
        assert torch.equal(y.as_subclass(Tensor), module(x))
