"""The contract, on state: `state_dict`, copies, conversions, edits; weights are held once."""

from __future__ import annotations

import copy
import io
import json
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .subject import Subject


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


class StateContract(Subject):
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
