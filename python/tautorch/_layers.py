"""Finding and replacing the layers that the compression methods work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

#: The layers whose weight is a matrix [out, in] or [out, in / groups * kh * kw].
Layer = nn.Linear | nn.Conv2d


def layer_groups(layer: nn.Module) -> int:
    """The groups of a convolution, 1 for a linear layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def own_weight(layer: nn.Module) -> str | None:
    """None if `layer.weight` is a plain parameter of the layer, otherwise why it is not."""
    if parametrize.is_parametrized(layer, "weight"):
        return f"its weight is parametrised; {parametrised_remedy(layer, 'weight')}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (weight_norm, spectral_norm or torch prune?)"
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight is not initialised yet; run the model once first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.is_meta:
        return "its weight is on the meta device; load the model first"
    return None


def check_still_plain(op: str, layers: Mapping[str, Layer]) -> None:
    """ValueError for a layer parametrised since `op` began to watch it: it would see copies of the weight."""
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"{op}: layer {name!r} must keep the plain weight it had, got a parametrised one; call "
                f"remove() of the {op} first"
            )


def other_forward(layer: nn.Module) -> str | None:
    """Why a layer of a subclass of torch's may compute more than its weight says, None if it does not."""
    for base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        for name in ("forward", "_conv_forward"):
            if isinstance(layer, base) and getattr(type(layer), name, None) is not getattr(base, name, None):
                kind = type(layer).__name__
                return f"{kind} has a {name} of its own, which may do more than nn.{base.__name__}"
    return None


def parametrised_remedy(layer: nn.Module, name: str) -> str:
    """What to do about a parametrised tensor; a parametrisation may say so itself, in `remedy`."""
    said = [getattr(part, "remedy", None) for part in layer.parametrizations[name]]  # type: ignore[index]
    found = next((remedy for remedy in said if isinstance(remedy, str)), None)
    return found or "call torch.nn.utils.parametrize.remove_parametrizations(layer, name) first"


@contextmanager
def forward_replaced(module: nn.Module, by: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `by` inside; an instance may have had a forward of its own before."""
    own = module.__dict__.get("forward")
    module.forward = by
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def take_off_parametrisation(layer: nn.Module, keep: bool = True) -> None:
    """Make the layer's weight a plain parameter again: as it is computed, or (not `keep`) as it was before.

    torch would leave it behind the bias; it comes first again, since optimizers' states go by the order.
    """
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=keep)
    for key in [key for key in layer._parameters if key != "weight"]:
        layer._parameters[key] = layer._parameters.pop(key)


def pruned_share(weight: Tensor) -> float:
    """The share of a layer's weights that are zero, as pruning leaves them; 0 where it cannot be pruning.

    Below 5 % zeros come about otherwise, and a layer of nothing but zeros is how some are initialised.
    """
    share = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
    return share if 0.05 <= share < 1 else 0.0


def readers_of(model: nn.Module, weight: Tensor) -> list[str]:
    """The qualified names of every parameter slot of `model` that holds this very tensor."""
    return [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is weight
    ]


def select_layers(
    op: str,
    model: nn.Module,
    layers: Iterable[str] | None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> dict[str, Layer]:
    """The layers named by `layers` (names or shell patterns such as "encoder.*"), in the model's order.

    None takes every `nn.Linear` and `nn.Conv2d` that owns its weight alone. Raises ValueError for a name
    or pattern that matches nothing, a named layer of another kind, a weight that is parametrised or tied,
    and when nothing is left; TypeError when `layers` is a single string.
    """
    if isinstance(layers, str):
        raise TypeError(f"{op}: layers must be a list of names, got the string {layers!r}; use [{layers!r}]")
    modules = dict(model.named_modules())
    if layers is None:
        chosen = {
            name: cast(Layer, module)
            for name, module in modules.items()
            if _why_not(model, module, kinds) is None
        }
        if not chosen:
            reasons = ((n, _why_not(model, m, kinds)) for n, m in modules.items() if isinstance(m, kinds))
            first = next((f" that can be used ({name!r}: {reason})" for name, reason in reasons), "")
            raise ValueError(
                f"{op}: the model must have at least one nn.Linear or nn.Conv2d, got none{first}"
            )
        return chosen
    wanted: set[str] = set()
    for entry in layers:
        if entry in modules:
            reason = _why_not(model, modules[entry], kinds)
            if reason is not None:
                raise ValueError(f"{op}: layer {entry!r} cannot be used: {reason}")
            wanted.add(entry)
            continue
        found = [
            name
            for name, module in modules.items()
            if fnmatchcase(name, entry) and _why_not(model, module, kinds) is None
        ]
        if not found:
            known = _known(modules, kinds)
            raise ValueError(f"{op}: layers must name layers of the model, got {entry!r}; {known}")
        wanted.update(found)
    if not wanted:
        raise ValueError(f"{op}: layers must name at least one layer, got none; {_known(modules, kinds)}")
    return {name: cast(Layer, module) for name, module in modules.items() if name in wanted}


def _why_not(model: nn.Module, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    if not isinstance(module, kinds):
        names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        return f"it must be {names}, got {type(module).__name__}"
    reason = own_weight(module)
    if reason is not None:
        return reason
    readers = readers_of(model, module._parameters["weight"])  # type: ignore[arg-type]
    if len(readers) > 1:
        return f"its weight is shared: {', '.join(readers)}"
    return None


def _known(modules: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...]) -> str:
    names = [name for name, module in modules.items() if isinstance(module, kinds)]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"it has {shown}" if names else "it has no such layer"


def replace_layers(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each module of `new` in the place of the layer of that name, in its training mode."""
    for name, module in new.items():
        parent_name, _, key = name.rpartition(".")
        module.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent_name), key, module)
