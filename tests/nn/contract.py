"""The contract that all replacement layers pass: drop-in for torch's layer in every way torch uses layers.

A suite names its ``module_type``, its ``variants`` (arguments of the float layer and of ``from_float``) and
how a module maps to a call of the operator (``case``), which the reference then answers.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tautorch import dispatch
from tautorch.nn import MODULES
from tautorch.nn.packed import PackedModule

from ..ops.agreement import layouts_of
from ..ops.suite import X_DTYPES
from .contract_modes import ModesContract
from .contract_state import StateContract
from .contract_threads import ThreadsContract


class ModuleContract(StateContract, ModesContract, ThreadsContract):
    """Construction, numbers and bad input; the rest of the contract is what it derives from."""

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
        for dtype in X_DTYPES:
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
