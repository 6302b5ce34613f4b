"""A model's structure as JSON, and the way back from an architecture's code.

Every module is described by its path. A class in the registry (tautorch's layers and plain layers of torch)
is described by the arguments that build it, so that a file can hold layers of other shapes and kinds than the
code makes; any other module must come from the code. Names are looked up in the registry and in `_modules`
alone: nothing of a file is imported, evaluated or used as an attribute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tautorch.factorize.layers import FactorizedConv2d, FactorizedLinear, TuckerConv2d
from tautorch.nn import MODULES
from tautorch.quantize.smoothquant import InputScale
from tautorch.storage_file import Entry

_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
# Plain layers: the constructor's arguments, each an attribute of the same name ("bias": whether there is
# one).
_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.BatchNorm3d: _NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Embedding: (
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
        *("scale_grad_by_freq", "sparse"),
    ),
    nn.Identity: (),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.Hardsigmoid: ("inplace",),
    nn.Mish: ("inplace",),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Softmax: ("dim",),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.ChannelShuffle: ("groups",),
    nn.Sequential: (),
    InputScale: ("features",),
}
# Layers made of others: how many. They are built around placeholders, which the described children replace.
_COMPOUND: dict[type[nn.Module], int] = {FactorizedLinear: 2, FactorizedConv2d: 2, TuckerConv2d: 3}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
REGISTRY: dict[str, type[nn.Module]] = {
    f"{'tautorch.quantize' if cls is InputScale else 'torch.nn'}.{cls.__name__}": cls for cls in _PLAIN
}
REGISTRY |= {f"tautorch.factorize.{cls.__name__}": cls for cls in _COMPOUND}
REGISTRY |= {f"tautorch.nn.{name}": cls for name, cls in MODULES.items()}
_PACKED = frozenset(MODULES.values())
_NAMES = {cls: name for name, cls in REGISTRY.items()}


class StructureError(ValueError):
    """A structure that cannot be written, or does not fit the architecture."""


def unwrapped(model: nn.Module, structure: dict[str, Any] | None = None) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DDP, or that wrapper which `structure` is of."""
    said = (structure or {}).get("")
    kind = said.get("type") if isinstance(said, dict) else None
    while kind != _type_name(model):
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        else:
            break
    return model


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def registered(module: nn.Module) -> str | None:
    """The registered name of a module's class, None for one that must come from the architecture's code."""
    odd_norm = getattr(module, "affine", False) and getattr(module, "bias", True) is None  # new in torch 2.13
    return None if odd_norm else _NAMES.get(type(module))


def config_of(module: nn.Module) -> dict[str, Any]:
    """The arguments, as JSON values, that rebuild a module of a registered class (exactly, no subclass)."""
    arguments = () if type(module) in _COMPOUND else _PLAIN.get(type(module))
    if arguments is None:
        found = module.get_config()  # type: ignore[operator]
    else:
        found = {a: getattr(module, a) for a in arguments}
        if "bias" in found:
            found["bias"] = found["bias"] is not None
    normalised = json.loads(json.dumps(found, allow_nan=False))
    return dict(normalised)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The structure of `model`: {path: description}, parents before children.

    A description holds `class` (a registered name, or "code") and `children`; with a registered class
    `config`, with "code" the Python `type` for messages. A module met before is {"same_as": its first path}.
    """
    found: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            if path.rpartition(".")[0] not in found or "same_as" in found[path.rpartition(".")[0]]:
                continue  # inside a repeated module, which is described where it came first
            found[path] = {"same_as": first[id(module)]}
            continue
        first[id(module)] = path
        name = registered(module)
        kind: dict[str, Any] = {"class": "code", "type": _type_name(module)}
        if name is not None:
            try:
                kind = {"class": name, "config": config_of(module)}
            except (TypeError, ValueError) as error:
                raise StructureError(f"the configuration of {path!r} ({name}) is no JSON: {error}") from error
        found[path] = {**kind, "children": [n for n, child in module._modules.items() if child is not None]}
    return found


@dataclass
class Rebuilt:
    """What turns a skeleton into the described model; nothing is changed before `apply`."""

    root: nn.Module
    made: dict[str, nn.Module] = field(default_factory=dict)  # path: a new module
    _edits: list[tuple[nn.Module, dict[str, nn.Module | None]]] = field(default_factory=list)
    _undo: list[tuple[nn.Module, dict[str, nn.Module | None]]] = field(default_factory=list)

    def apply(self) -> None:
        for module, children in self._edits:
            self._undo.append((module, dict(module._modules)))
            _set_children(module, children)

    def undo(self) -> None:
        for module, children in reversed(self._undo):
            _set_children(module, children)
        self._undo.clear()


def _set_children(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    module._modules.clear()
    module._modules.update(children)


def rebuild(skeleton: nn.Module, structure: dict[str, Any], entries: dict[str, Entry]) -> Rebuilt:
    """Plans the described model from `skeleton`; `entries` are the file's tensors, which bound what is built.

    Raises StructureError where the description is malformed or does not fit the skeleton.
    """
    return _Builder(structure, entries).build(skeleton)


class _Builder:
    def __init__(self, structure: dict[str, Any], entries: dict[str, Entry]) -> None:
        self._structure, self._entries = structure, entries
        self._done: dict[str, nn.Module] = {}
        self._used: dict[int, str] = {}
        self._device = torch.device("cpu")

    def build(self, skeleton: nn.Module) -> Rebuilt:
        self._device = next((t.device for t in skeleton.parameters()), self._device)
        self._result = Rebuilt(skeleton)
        root = self._module("", skeleton)
        self._result.root = root
        unused = [path for path in self._structure if path not in self._done]
        if unused:
            raise StructureError(f"describes {unused[0]!r}, which is no child of any described module")
        return self._result

    def _module(self, path: str, there: nn.Module | None) -> nn.Module:
        said = self._structure.get(path)
        if not isinstance(said, dict):
            raise StructureError(f"must describe the module {path!r}")
        if "same_as" in said:
            same = self._done.get(said["same_as"]) if isinstance(said["same_as"], str) else None
            if same is None:
                raise StructureError(
                    f"says that {path!r} is the same as {said['same_as']!r}, which is not there"
                )
            self._done[path] = same
            return same
        module = self._kind(path, said, there)
        if id(module) in self._used:
            raise StructureError(
                f"has {path!r} and {self._used[id(module)]!r} apart, which are one module in the skeleton"
            )
        self._used[id(module)] = path
        self._done[path] = module
        self._children(path, said.get("children"), module)
        return module

    def _kind(self, path: str, said: dict[str, Any], there: nn.Module | None) -> nn.Module:
        """The module at `path` without its children: the skeleton's where it fits, else a new one."""
        name, config = said.get("class"), said.get("config")
        if name == "code":
            if there is None or registered(there) is not None:
                has = "nothing" if there is None else type(there).__name__
                parametrised = str(said.get("type")).startswith("torch.nn.utils.parametrize.")
                also = ", parametrised alike, or finalize before saving" if parametrised else ""
                raise StructureError(
                    f"needs a {said.get('type')} at {path!r}, where the skeleton has {has}; "
                    f"pass the architecture that was saved{also}"
                )
            return there
        cls = REGISTRY.get(name) if isinstance(name, str) else None
        if cls is None:
            raise StructureError(
                f"names the unknown class {name!r} at {path!r}; this tautorch may be too old for it"
            )
        if not isinstance(config, dict):
            raise StructureError(f"must give {path!r} a configuration, got {type(config).__name__}")
        reusable = (
            cls not in _PACKED or path == ""
        )  # a packed layer in place could not be put back on failure
        if there is not None and registered(there) == name and reusable and config_of(there) == config:
            return there
        if path == "":
            has = "nothing" if there is None else type(there).__name__
            raise StructureError(
                f"is of a single {name} {config}, and the skeleton is {has}; wrap both in a module"
            )
        module = self._new(path, cls, config)
        module.train(there.training if there is not None else True)
        self._result.made[path] = module
        return module

    def _new(self, path: str, cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
        if cls in _COMPOUND and not config:
            return cls(*(nn.Identity() for _ in range(_COMPOUND[cls])))
        if cls not in _PACKED and set(config) != set(_PLAIN.get(cls, ())):
            raise StructureError(
                f"gives {path!r} ({cls.__name__}) other arguments than {list(_PLAIN.get(cls, ()))}"
            )
        if not _in_range(config):
            raise StructureError(f"gives {path!r} a number beyond 32 bits, in {config}")
        if cls not in _PACKED and not all(_plain_value(key, value) for key, value in config.items()):
            raise StructureError(f"cannot build {cls.__name__} at {path!r} from {config}: wrong kinds")
        arguments = {key: _tuples(value) for key, value in config.items()}
        try:
            # Shapes are compared before memory is asked for: a false size must not cost terabytes.
            with torch.device("meta"):
                self._fits(path, cls(**arguments))
            with torch.random.fork_rng(devices=[]), torch.device(self._device):
                return cls(**arguments)
        except (StructureError, RecursionError):
            raise
        except Exception as error:
            raise StructureError(
                f"cannot build {cls.__name__} at {path!r} from {config}: {type(error).__name__}: {error}"
            ) from error

    def _fits(self, path: str, module: nn.Module) -> None:
        for key, tensor in module.state_dict().items():
            check_entry(f"{path}.{key}", tensor, self._entries)

    def _children(self, path: str, names: object, module: nn.Module) -> None:
        if not isinstance(names, list) or not all(isinstance(n, str) and n and "." not in n for n in names):
            raise StructureError(f"must list the children of {path!r} by name")
        there = {n: child for n, child in module._modules.items() if child is not None}
        if set(names) != set(there) and type(module) not in _CONTAINERS:
            raise StructureError(
                f"gives {path!r} ({type(module).__name__}) the children {names}, "
                f"the skeleton's has {list(there)}; pass the architecture that was saved"
            )
        built: dict[str, nn.Module | None] = {
            n: self._module(f"{path}.{n}" if path else n, there.get(n)) for n in names
        }
        if type(module) in _CONTAINERS:
            children = built | {n: None for n, c in module._modules.items() if c is None and n not in built}
        else:
            children = {n: built.get(n) for n in module._modules}
        if list(children.items()) != list(module._modules.items()):
            self._result._edits.append((module, children))


def check_entry(name: str, tensor: torch.Tensor, entries: dict[str, Entry]) -> None:
    """Raises StructureError unless the file holds the tensor `name` in the shape and kind of `tensor`.

    Floating point of another width fits (a model saved in half precision); anything else must be equal.
    """
    entry = entries.get(name)
    if entry is None:
        raise StructureError(f"lacks the tensor {name!r}; pass the architecture that was saved")
    if entry.shape != tuple(tensor.shape):
        raise StructureError(
            f"has {name!r} in shape {list(entry.shape)}, the architecture needs {list(tensor.shape)}"
        )
    if entry.dtype != tensor.dtype and not (entry.dtype.is_floating_point and tensor.is_floating_point()):
        raise StructureError(f"has {name!r} as {entry.dtype}, the architecture needs {tensor.dtype}")


def _plain_value(key: str, value: object) -> bool:
    """Whether a plain layer takes an argument of this kind (it would store any other and fail when run)."""
    if isinstance(value, str):
        return key in ("padding", "padding_mode", "approximate")
    if isinstance(value, list):
        return all(type(n) is int or n is None for n in value)
    return value is None or isinstance(value, (bool, int, float))


def _in_range(value: object) -> bool:
    """Whether every number in a configuration fits what sizes, strides and paddings are made of."""
    if isinstance(value, (list, dict)):
        return all(_in_range(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (int, float)) or abs(value) < 2**31


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
