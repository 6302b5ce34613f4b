"""The contract that all replacement layers pass: drop-in for torch's layer in every way torch uses layers.

A suite names its ``module_type``, its ``variants`` (arguments of the float layer and of ``from_float``) and
how a module maps to a call of the operator (``case``), which the reference then answers.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tautorch import _C, dispatch
from tautorch.nn import MODULES
from tautorch.nn.packed import PackedModule
from tautorch.testing.cases import Case

from ..ops.suite import Recorder, compare, layouts_of, reference_of
from ..straight_through import gradients

Variant = tuple[dict[str, Any], dict[str, Any]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensors_of(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object's own attributes, lists, tuples and dicts hold."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_of(item, seen)


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the distinct storages a module holds on to."""
    storages = {t.untyped_storage() for t in tensors_of(module.__dict__, set())}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


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


class ModuleContract:
    """See the file's docstring."""

    module_type: ClassVar[type[PackedModule]]
    float_type: ClassVar[type[nn.Module]]
    variants: ClassVar[dict[str, Variant]]
    # a layer of 64 KiB or more of weights, for the memory bound
    roomy: ClassVar[dict[str, Any]]

    # ---- what a suite gives ----

    def case(self, module: Any, x: Tensor) -> Case:
        """The operator's call that ``module(x)`` stands for."""
        raise NotImplementedError

    def x(self, variant: str, batch: int = 3) -> Tensor:
        """An input of ``batch`` rows or samples."""
        raise NotImplementedError

    def float_output(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the float layer's own function gives."""
        return layer(x)  # type: ignore[no-any-return]

    # ---- helpers ----

    @property
    def op(self) -> str:
        return self.module_type.op

    def float_layer(self, variant: str) -> nn.Module:
        torch.manual_seed(7)
        return self.float_type(**self.variants[variant][0])

    def module(self, variant: str) -> Any:
        return self.from_float(self.float_layer(variant), **self.variants[variant][1])

    def from_float(self, layer: nn.Module, **kwargs: Any) -> Any:
        return self.module_type.from_float(layer, **kwargs)  # type: ignore[attr-defined]

    def agrees(self, module: Any, x: Tensor, y: Tensor | None = None) -> None:
        """``module(x)`` is what the reference computes from the module's canonical tensors."""
        y = module(x).detach() if y is None else y
        case = self.case(module, x.detach())
        compare(case, y, case(reference_of(self.op)))

    @pytest.fixture(autouse=True)
    def no_scalar_kernel(self) -> Iterator[None]:
        """On an AVX512-VNNI machine nothing here runs anything slower."""
        dispatch.note_used(self.op, "nothing yet")
        yield
        if _C.isas().get("avx512vnni"):
            assert dispatch.last_used(self.op) in ("nothing yet", "avx512vnni")

    # ---- construction ----

    def test_constructor_takes_the_arguments_of_the_layer(self) -> None:
        theirs = list(inspect.signature(self.float_type.__init__).parameters.values())[1:]
        ours = list(inspect.signature(self.module_type.__init__).parameters.values())[1:]
        for mine, other in zip(ours, theirs, strict=False):
            assert (mine.name, mine.default) == (other.name, other.default)
            assert mine.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert len(ours) >= len(theirs)
        assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])

    def test_input_is_named_as_the_layers(self, variant: str) -> None:
        theirs, ours = (inspect.signature(t.forward) for t in (self.float_type, self.module_type))
        assert list(ours.parameters) == list(theirs.parameters)
        module, x = self.module(variant), self.x(variant)
        assert torch.equal(module(input=x), module(x))
        assert torch.equal(module(input=x), module(x))

    def test_class_is_registered(self) -> None:
        assert MODULES[self.module_type.__name__] is self.module_type
        assert issubclass(self.module_type, PackedModule)

    def test_attributes_are_those_of_the_layer(self, variant: str) -> None:
        layer, module = self.float_layer(variant), self.module(variant)
        for name in layer.__constants__:
            assert getattr(module, name) == getattr(layer, name), name
        assert (module.bias is None) == (layer.bias is None)
        if layer.bias is not None:
            assert torch.equal(module.bias, layer.bias)

    def test_from_float_leaves_the_layer_alone(self, variant: str) -> None:
        layer = self.float_layer(variant).eval()
        before = copy.deepcopy(layer.state_dict())
        module = self.from_float(layer, **self.variants[variant][1])
        module(self.x(variant))
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())
        assert not module.training

    def test_an_empty_layer_gives_its_bias(self, variant: str) -> None:
        config = self.module(variant).get_config()
        y = self.module_type(**{**config, "activation": "none"})(self.x(variant))
        assert y.shape == self.float_layer(variant)(self.x(variant)).shape
        assert not bool(y.any())

    def test_repr(self, variant: str) -> None:
        text, layer = repr(self.module(variant)), self.float_layer(variant)
        assert text.startswith(f"{self.module_type.__name__}(")
        for name in ("in_features", "out_features"):
            if hasattr(layer, name):
                assert f"{name}={getattr(layer, name)}" in text
        assert "\n" not in text

    def test_bad_construction(self, variant: str) -> None:
        kwargs = self.variants[variant][1]
        with pytest.raises(TypeError, match=f"{self.op}: "):
            self.from_float(nn.ReLU(), **kwargs)
        with pytest.raises(ValueError, match=f"{self.op}: activation must be one of"):
            self.from_float(self.float_layer(variant), **{**kwargs, "activation": "tanh"})
        for name in ("weight", "bias"):
            layer = self.float_layer(variant)
            tensor = getattr(layer, name)
            if tensor is not None:
                with torch.no_grad():
                    tensor.view(-1)[-1] = float("nan")
                with pytest.raises(ValueError, match=rf"(?i){self.op}: .*{name}.*finite"):
                    self.from_float(layer, **kwargs)

    # ---- numbers ----

    def test_is_the_reference(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        self.agrees(module, x)
        assert dispatch.last_used(self.op) == module.kernel()
        for dtype in FLOATS:
            y = module(x.to(dtype))
            assert y.dtype == dtype
            self.agrees(module, x.to(dtype), y)

    def test_every_kernel_agrees(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        automatic = module(x)
        for kernel, reason in module.refusals().items():
            if reason is None:
                with dispatch.force(self.op, kernel):
                    assert module.kernel() == kernel
                    y = module(x)
                    assert dispatch.last_used(self.op) == kernel
                self.agrees(module, x, y)
        assert torch.equal(module(x), automatic)  # and the automatic choice is back

    def test_is_near_the_float_layer(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        plain = module.to_float()
        assert type(plain) is self.float_type or isinstance(plain, nn.Sequential)
        config = module.get_config()
        if config.get("activation", "none") == "none":
            y, expected = module(x).detach(), plain(x).detach()
            assert float((y - expected).norm()) <= 0.03 * float(expected.norm())

    def test_empty_batch(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        expected = self.float_layer(variant)(x[:0])
        for _ in range(2):
            y = module(x[:0])
            assert y.shape == expected.shape and y.dtype == x.dtype
        module(x)

    def test_memory_layouts(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        expected = module(x)
        for name, other in layouts_of(x):
            assert torch.equal(module(other), expected), name

    def test_rows_do_not_depend_on_each_other(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant, 5)
        y = module(x)
        for i in range(5):
            assert torch.equal(module(x[i : i + 1])[0], y[i])

    # ---- state ----

    def test_state_dict_round_trip(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        fresh = {k: v.clone() for k, v in module.state_dict().items()}
        y = module(x)
        packed = module.state_dict()
        assert fresh.keys() == packed.keys()
        for name, tensor in fresh.items():
            assert torch.equal(tensor, packed[name]) and tensor.dtype == packed[name].dtype, name
        twin = self.module_type(**json.loads(json.dumps(module.get_config())))
        assert twin.get_config() == module.get_config()
        twin(x)  # packs the empty weights, which loading must then replace
        assert not twin.load_state_dict(packed, strict=True).missing_keys
        assert torch.equal(twin(x), y)
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        buffer.seek(0)
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(twin(x), y)

    def test_state_dict_is_canonical(self, variant: str) -> None:
        module = self.module(variant)
        module(self.x(variant))
        names = set(module.state_dict())
        assert "packed" not in names and set(module.packed_names) <= names
        assert ("bias" in names) == (module.bias is not None)

    def test_meta_twin_takes_the_state(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        twin = self.module_type(**module.get_config(), device="meta")
        assert all(t.is_meta for t in twin.state_dict().values())
        assert twin(x.to("meta")).shape == module(x).shape
        twin.load_state_dict(module.state_dict(), assign=True)
        assert torch.equal(twin(x), module(x))

    def test_strict_loading_errors(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        state = module.state_dict()
        name = module.packed_names[0]
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
            module.load_state_dict({k: v for k, v in state.items() if k != name})
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "extra"'):
            module.load_state_dict({**state, "extra": torch.zeros(1)})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            module.load_state_dict({**state, name: torch.zeros(1, 1, 1, 1, 1, dtype=state[name].dtype)})
        assert torch.equal(module(x), y)

    def test_loaded_numbers_are_checked(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        module(x)
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                spoiled = tensor.clone()
                spoiled.view(-1)[0] = float("inf")
                state = module.state_dict()
                other = copy.deepcopy(module)
                inner, _, own = name.rpartition(".")  # a layer inside speaks for its own tensors
                op = r"\w+" if inner else self.op
                says = f"{op}: .*{own} must be finite"
                with pytest.raises((ValueError, RuntimeError), match=says):
                    other.load_state_dict({**state, name: spoiled})
                    other(x)

    def test_a_default_device_elsewhere_changes_nothing(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with torch.device("meta"):
            found, twin = module.state_dict(), copy.deepcopy(module)
            module.unpack_()
            twin.prepare()
        assert all(found[name].device.type == "cpu" for name in state)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert torch.equal(module(x), y) and torch.equal(twin(x), y)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_another_default_dtype_changes_nothing(self, variant: str, dtype: torch.dtype) -> None:
        module, x = self.module(variant), self.x(variant)
        y, layer = module(x), self.float_layer(variant)
        torch.set_default_dtype(dtype)
        try:
            other = type(module)(**module.get_config())
            other.load_state_dict(module.state_dict())
            assert torch.equal(other(x), y)
            again = self.from_float(layer, **self.variants[variant][1])
        finally:
            torch.set_default_dtype(torch.float32)
        dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        for made in (other, again):
            assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == dtypes
        assert torch.equal(other(x.clone().requires_grad_()), y)

    def test_a_tensor_without_memory_is_refused(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        if module._buffers["packed"] is None:
            pytest.skip("nothing is packed")
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(RuntimeError, match="FakeTensor without"),
        ):
            module.state_dict()
        assert torch.equal(module(x), y)

    def test_a_float_checkpoint_is_refused(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y, state = module(x), module.state_dict()
        names = [name for name in state if not state[name].is_floating_point() and "indices" not in name]
        names = [name for name in names if name in module.packed_names]
        if not names:
            pytest.skip("its weights are floats")
        for name in names:
            with pytest.raises(RuntimeError, match=r"torch\.int8, got torch\.float32"):
                module.load_state_dict({**state, name: torch.randn(state[name].shape)}, strict=False)
        assert torch.equal(module(x), y)

    def test_a_shallow_copy_runs(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        twin = copy.copy(module)
        y = module(x)
        assert torch.equal(twin(x), y) and torch.equal(module(x), y)

    def test_what_the_weights_were_made_by_is_fixed(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        for name in sorted(module._fixed & module.__dict__.keys()):
            with pytest.raises(AttributeError, match=f"{self.op}: {name} is fixed when the layer is made"):
                setattr(module, name, None)
            setattr(module, name, getattr(module, name))  # the same again is no matter
        assert torch.equal(module(x), y)

    def test_another_activation_shows_in_the_next_call(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y, before = module(x), module.activation
        other = "relu" if before != "relu" else "none"
        module.activation = other
        assert module.get_config()["activation"] == other and not torch.equal(module(x), y)
        assert torch.equal(module(x), copy.deepcopy(module)(x)) and torch.equal(
            module(x), module._through_op(x)
        )
        module.activation = before
        assert torch.equal(module(x), y)
        with pytest.raises(ValueError, match=f"{self.op}: activation must be"):
            module.activation = "tan"
        assert torch.equal(module(x), y)

    def test_deepcopy_is_independent(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), y)
        getattr(twin, module.packed_names[0]).zero_()
        assert not torch.equal(twin(x), y)
        assert torch.equal(module(x), y)

    def test_pickle(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
        assert torch.equal(module(x), y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_conversion_keeps_the_numbers(self, variant: str, dtype: torch.dtype) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        assert module.to(dtype) is module
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
        assert torch.equal(module(x), y)

    def test_half_model_runs(self, variant: str) -> None:
        model = nn.Sequential(self.module(variant)).bfloat16()
        x = self.x(variant).bfloat16()
        y = model(x)
        assert y.dtype == torch.bfloat16
        self.agrees(model[0], x, y)

    def test_weights_are_held_once(self) -> None:
        for kwargs in (v[1] for v in self.variants.values()):
            layer = self.float_type(**self.roomy)
            module = self.from_float(layer, **kwargs)
            canonical = weakref.ref(module._buffers[module.packed_names[0]])
            module(self.roomy_x())
            assert canonical() is None
            assert resident_bytes(module) <= 1.1 * module.packed_bytes()
            module.state_dict()
            assert resident_bytes(module) <= 1.1 * module.packed_bytes()

    def roomy_x(self) -> Tensor:
        """An input of the roomy layer."""
        raise NotImplementedError

    def test_edits_in_place_are_seen(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        name = module.packed_names[0]
        tensor = getattr(module, name)
        assert torch.equal(module(x), y)
        with torch.no_grad():
            tensor.neg_()
        self.agrees(module, x)
        changed = module(x)
        assert not torch.equal(changed, y)
        for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.mul_(1.5).add_(0.01)
                self.agrees(module, x)
                assert not torch.equal(module(x), changed), name
                changed = module(x)

    def test_tensors_put_in_place_are_seen(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        for name, tensor in {**dict(module.named_buffers()), **dict(module.named_parameters())}.items():
            inner, _, own = name.rpartition(".")
            if own == "packed" or not tensor.is_floating_point():
                continue
            new = tensor.detach() * 2 + 0.01
            owner = module.get_submodule(inner)
            setattr(owner, own, nn.Parameter(new, requires_grad=False) if own == "bias" else new)
            self.agrees(module, x)
            assert not torch.equal(module(x), y), name
            y = module(x)

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
        torch._dynamo.reset()
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
        torch._dynamo.reset()
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

    # ---- bad input ----

    def refuses(self, variant: str, x: Tensor, error: type[Exception], message: str) -> None:
        module, good = self.module(variant), self.x(variant)
        for _ in range(2):
            with pytest.raises(error, match=f"{self.op}: {message}"):
                module(x)
            self.agrees(module, good)  # and the layer still works

    def test_bad_dtype(self, variant: str) -> None:
        for dtype in (torch.float64, torch.int32, torch.bool):
            self.refuses(variant, self.x(variant).to(dtype), TypeError, ".*must be")

    def test_bad_shape(self, variant: str) -> None:
        x = self.x(variant)
        self.refuses(variant, torch.cat([x, x], 1), ValueError, ".*must")
        self.refuses(variant, torch.zeros(()), ValueError, ".*must")

    def test_bad_device(self, variant: str) -> None:
        self.refuses(variant, self.x(variant).to("meta"), ValueError, ".*must be on|.*device")

    def test_a_spoiled_row_is_nan_and_alone(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        x.view(3, -1)[1, 5] = float("nan")
        y = module(x)
        spoiled = torch.isnan(y[1])
        # float products follow IEEE: NaN wherever the spoiled input is multiplied
        assert bool(spoiled.all() if self.case(module, x).exact else spoiled.any())
        assert bool(torch.isfinite(y[[0, 2]]).all())


class LinearContract(ModuleContract):
    """Layers that replace ``nn.Linear``."""

    float_type = nn.Linear
    roomy: ClassVar[dict[str, Any]] = {"in_features": 512, "out_features": 256}

    def x(self, variant: str, batch: int = 3) -> Tensor:
        gen = torch.Generator().manual_seed(5)
        return torch.randn(batch, self.variants[variant][0]["in_features"], generator=gen)

    def roomy_x(self) -> Tensor:
        return torch.randn(64, 512)

    @pytest.mark.parametrize("lead", [(), (0,), (1,), (4,), (2, 3), (2, 0), (2, 3, 2)])
    def test_leading_shapes(self, variant: str, lead: tuple[int, ...]) -> None:
        module = self.module(variant)
        rows = torch.Size(lead).numel()
        x = self.x(variant, max(rows, 1))[:rows]
        y = module(x.reshape(*lead, x.shape[-1]))
        assert y.shape == (*lead, module.out_features)
        assert torch.equal(y.reshape(rows, -1) if rows else y.reshape(0, module.out_features), module(x))


class ConvContract(ModuleContract):
    """Layers that replace ``nn.Conv2d``."""

    float_type = nn.Conv2d
    roomy: ClassVar[dict[str, Any]] = {"in_channels": 64, "out_channels": 128, "kernel_size": 3, "padding": 1}

    def x(self, variant: str, batch: int = 3) -> Tensor:
        gen = torch.Generator().manual_seed(5)
        return torch.randn(batch, self.variants[variant][0]["in_channels"], 9, 8, generator=gen)

    def roomy_x(self) -> Tensor:
        return torch.randn(2, 64, 12, 12)

    def test_unbatched(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x[1])
        assert y.shape == self.float_layer(variant)(x[1]).shape
        assert torch.equal(y, module(x[1:2])[0])

    def test_channels_last_model(self, variant: str) -> None:
        module, x = self.module(variant), self.x(variant)
        y = module(x)
        last = module.to(memory_format=torch.channels_last)
        assert torch.equal(last(x.contiguous(memory_format=torch.channels_last)), y)

    def test_other_padding_modes_are_refused(self) -> None:
        layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        with pytest.raises(ValueError, match=f"{self.op}: padding_mode must be 'zeros', got 'circular'"):
            self.from_float(layer, **next(iter(self.variants.values()))[1])
