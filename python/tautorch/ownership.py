"""Who else reads a layer's weight: the reasons why replacing a layer would change or break its neighbours.

A replaced layer no longer has the float weight it had. Whoever reads that weight past the layer's own
`forward` (a tied head, a parametrisation, a parent that calls `F.linear(x, self.fc.weight)`) would compute
something else or fail, so `convert` asks here first.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tautorch._layers import other_forward, parametrised_remedy

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Children that torch's own modules read past their forward; the source scan cannot see into C++ fast paths.
_READ_BY_TORCH: tuple[tuple[type[nn.Module], frozenset[str]], ...] = (
    (nn.MultiheadAttention, frozenset({"out_proj"})),
    (nn.TransformerEncoderLayer, frozenset({"linear1", "linear2", "norm1", "norm2", "self_attn"})),
)
# Reads of what a tensor is, not of what it holds.
_METADATA = frozenset(
    {
        "__get__",
        "is_floating_point",
        "is_complex",
        "size",
        "dim",
        "numel",
        "stride",
        "__len__",
        "element_size",
    }
)


def refusal(model: nn.Module, name: str) -> str | None:
    """Why the layer `name` of `model` must not be replaced by what is made of its weight, or None.

    Nothing is run; `name` must exist.
    """
    return other_forward(model.get_submodule(name)) or held_elsewhere(model, name)


def held_elsewhere(model: nn.Module, name: str) -> str | None:
    """The same for a replacement by whoever knows the layer's class."""
    layer = model.get_submodule(name)
    return (
        _own_state(layer)
        or _several_names(model, name, layer)
        or _read_by_parent(model, name)
        or _tied(model, layer)
    )


def _own_state(layer: nn.Module) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is a ScriptModule; convert the model before scripting it"
    for part_name, part in layer.named_modules():
        where = f"its child {part_name!r}" if part_name else "it"
        if parametrize.is_parametrized(part):
            names = sorted(part.parametrizations)
            return f"{where} is parametrised ({', '.join(names)}); {parametrised_remedy(part, names[0])}"
        if any(torch.nn.parameter.is_lazy(p) for p in part.parameters(recurse=False)):
            return f"{where} has uninitialised (lazy) parameters; run the model once first"
        for hooks in _HOOKS:
            found = getattr(part, hooks, None)
            if found:
                hook = next(iter(found.values()))
                label = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"{where} has a hook ({label}) that would be lost; remove the hook first"
        if "forward" in part.__dict__:
            return f"{where} has its forward overridden on the instance; undo that first"
    return None


def _several_names(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """A layer registered in two places would be replaced in one of them only."""
    slots: dict[tuple[int, str], str] = {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if child is layer:
                slots[(id(parent), child_name)] = f"{parent_name}.{child_name}".lstrip(".")
    others = sorted(path for path in slots.values() if path != name)
    if len(slots) > 1:
        return f"the same module is also used as {', '.join(map(repr, others))}"
    for parent_name, parent in model.named_modules():
        for attribute, value in parent.__dict__.items():
            if attribute == "_modules" or (isinstance(value, nn.Module) and value is not layer):
                continue
            if any(held is layer for held in _held(value)):
                owner = parent_name or "the model"
                return f"{owner} also holds it outside its registered children, in attribute {attribute!r}"
    return None


def _held(value: object) -> Iterator[object]:
    """The value, or what a plain list, tuple or dict of them holds: one level is what people write."""
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    else:
        yield value


def _read_by_parent(model: nn.Module, name: str) -> str | None:
    parts = name.split(".")
    for depth in range(len(parts)):
        ancestor_name = ".".join(parts[:depth])
        ancestor = model.get_submodule(ancestor_name)
        label = f"its parent {ancestor_name or 'model'!r} ({type(ancestor).__name__})"
        for cls, children in _READ_BY_TORCH:
            if isinstance(ancestor, cls) and parts[depth] in children:
                return f"{label} reads {'.'.join(parts[depth:])}.weight directly in its fast path"
        layer = model.get_submodule(name)
        tensors = {n for n, _ in [*layer.named_parameters(), *layer.named_buffers()]}
        for method, chain in _attribute_chains(type(ancestor)):
            for tensor in tensors:
                if _matches(chain, (*parts[depth:], *tensor.split("."))):
                    return f"{label} reads {'.'.join(parts[depth:])}.{tensor} directly in {method}"
    return None


def _matches(chain: tuple[str | None, ...], path: tuple[str, ...]) -> bool:
    """Whether `self.<chain>` can mean `path`; None in a chain stands for any index, `self.layers[i]`."""
    return len(chain) >= len(path) and all(c is None or c == p for c, p in zip(chain, path, strict=False))


_CHAINS: dict[type, tuple[tuple[str, tuple[str | None, ...]], ...]] = {}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _attribute_chains(cls: type[nn.Module]) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Every `self.a.b[i].c` in the methods of `cls`, as (method, ("a", "b", None, "c"))."""
    if cls not in _CHAINS:
        _CHAINS[cls] = tuple((name, chain) for name, tree in class_functions(cls) for chain in _chains(tree))
    return _CHAINS[cls]


# A method's syntax, or the names it uses where its source cannot be read.
_Body = ast.AST | frozenset[str]


def class_functions(cls: type[nn.Module]) -> Iterator[tuple[str, ast.AST]]:
    """The syntax of a module class's `forward` and of the methods and properties it uses, by name.

    Overridden ones are there too: `super()` may call them. A method without source (written in a REPL, or in
    C) is left out.
    """
    for name, tree in _reached(_methods(cls), "forward"):  # type: ignore[arg-type]
        if isinstance(tree, ast.AST):
            yield name, tree


@cache
def _methods(cls: type[nn.Module]) -> dict[str, list[_Body]]:
    """The methods and properties of a class without those of every module; see `_Body`."""
    methods: dict[str, list[_Body]] = {}
    for base in cls.__mro__:
        if base in nn.Module.__mro__ or base in _CONTAINERS:
            continue
        for name, member in vars(base).items():
            function = member.fget if isinstance(member, property) else inspect.unwrap(member)
            if inspect.isfunction(function):
                tree = _tree(function, bound=not isinstance(member, staticmethod))
                methods.setdefault(name, []).append(tree)
    return methods


def _tree(function: FunctionType, bound: bool) -> _Body:
    """The syntax of a function, the first argument of a `bound` one called `self`; or the names it uses."""
    try:
        source = inspect.getsource(function)
        # Not dedent: strings may begin their lines at column 0.
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return frozenset(_names_in(function.__code__))
    code = function.__code__
    for node in ast.walk(tree) if bound and code.co_argcount else ():
        if isinstance(node, ast.Name) and node.id == code.co_varnames[0]:
            node.id = "self"
    return tree


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant  # of getattr
        elif isinstance(constant, CodeType):
            yield from _names_in(constant)


def _reached(methods: Mapping[str, list[_Body]], start: str, but: str = "") -> Iterator[tuple[str, _Body]]:
    """A method and those it uses, directly or not; `but` is not looked into."""
    wanted, done = [start], {start, but}
    while wanted:
        name = wanted.pop()
        for tree in methods.get(name, ()):
            yield name, tree
            if isinstance(tree, ast.AST):
                used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} & methods.keys()
            else:
                used = set(tree) & methods.keys()
            wanted += used - done
            done |= used


def run_alone(model: nn.Module, layer: str, follower: str) -> str | None:
    """Why `layer` may be run without `follower`, which `forward` runs after it; None if nothing says so.

    Read from the source of the other methods of the classes above them, such as `embed(x): self.fc1(x)`.
    Private ones count as part of those that use them.
    """
    path, other = layer.split("."), follower.split(".")
    common = _shared(path, other)
    for depth in range(len(path)):
        ancestor = model.get_submodule(".".join(path[:depth]))
        for method, runs, names in _entries(type(ancestor)):  # type: ignore[arg-type]
            label = f"{type(ancestor).__name__}.{method}"
            if names & {path[depth], *_WALKS}:
                return f"{label}, whose source cannot be read, may run {layer} without it"
            if _runs_alone(runs, path[depth:], other[depth:] if depth <= common else []):
                return f"{label} may run {layer} without it"
    return None


# (the attributes and indices behind `self`, whether it is called); None stands for any index or child.
_Run = tuple[tuple[str | None, ...], bool]


def _shared(path: list[str], other: list[str]) -> int:
    """How many names two paths begin with alike."""
    pairs = zip(path, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(other)))


def _runs_alone(runs: Iterable[_Run], path: list[str], other: list[str]) -> bool:
    shared = _shared(path, other)  # containers that hold both
    alone = False
    for chain, called in runs:
        if len(chain) > len(path) or not all(c in (None, p) for c, p in zip(chain, path, strict=False)):
            continue
        if None in chain[shared:] or (len(chain) == shared and not called):
            return True  # it takes the container apart
        alone = alone or len(chain) > shared
    return alone and not any(
        len(chain) > shared and None not in chain and list(chain) == other[: len(chain)] for chain, _ in runs
    )


@cache
def _entries(cls: type[nn.Module]) -> list[tuple[str, list[_Run], frozenset[str]]]:
    """Methods that may be called beside `forward`: what they run, and names in those without source.

    Not those of torch's own classes (a `GraphModule`'s `to_folder`).
    """
    methods = _methods(cls)  # type: ignore[arg-type]
    theirs = {n for base in cls.__mro__ if base.__module__.split(".")[0] != "torch" for n in vars(base)}
    public = [name for name in methods if not name.startswith("_") and name != "forward" and name in theirs]
    used = {n for start in ["forward", "__init__", *public] for n, _ in _reached(methods, start)}
    found = []
    hidden = [name for name in methods if name not in used and name != "__init__" and name in theirs]
    for start in [*public, *hidden]:
        trees = [tree for _, tree in _reached(methods, start, but="forward")]
        runs = [run for tree in trees if isinstance(tree, ast.AST) for run in _runs(tree)]
        # dataclass and others write some without source
        unread = [tree for tree in trees if isinstance(tree, frozenset) and not start.startswith("__")]
        found.append((start, runs, frozenset[str]().union(*unread)))
    return found


_WALKS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})

# What takes a layer and runs nothing.
_INERT = frozenset(
    {"save", "isinstance", "hasattr", "type", "id", "len", "print", "repr", "str", "copy", "deepcopy"}
)


def _runs(tree: ast.AST) -> Iterator[_Run]:
    """What a method calls or hands on of `self`: `self.a.b(x)`, `self.a[i](x)`, `run(self.a, x)`.

    Walks through the children (`self.children()`, `getattr(self, name)`) count where the method calls what
    it finds.
    """
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    called = {id(n.func) for n in calls}
    inert = {id(a) for n in calls if _last_name(n.func) in _INERT for a in n.args}
    listed = {id(e) for n in nodes if isinstance(n, (ast.List, ast.Tuple, ast.Set)) for e in n.elts}
    inner = {id(n.value) for n in nodes if isinstance(n, (ast.Attribute, ast.Subscript))}
    walks: list[tuple[str | None, ...]] = []
    for node in nodes:
        chain = _chain(node)
        if isinstance(node, ast.Name) and node.id == "self" and id(node) not in inner | called:
            walks.append((None,))  # getattr(self, name), enumerate(self)
        elif chain and id(node) in inert:
            continue
        elif chain and chain[-1] in _WALKS:
            walks.append((*chain[:-1], None))
        elif chain and id(node) in listed:
            walks.append(chain)
        elif chain and id(node) not in inner and not isinstance(getattr(node, "ctx", None), ast.Store):
            looked = chain[-1] in ("forward", "__call__")
            yield (chain[:-1] if looked else chain), looked or id(node) in called
    if walks and _calls_what_it_finds(nodes):
        yield from ((chain, True) for chain in walks)


def _chain(node: ast.AST) -> tuple[str | None, ...]:
    """("a", "0", "b") of `self.a[0].b`, None for an index that is no constant; () of anything else."""
    parts: list[str | None] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        else:
            value = node.slice.value if isinstance(node.slice, ast.Constant) else None
            parts.append(str(value) if isinstance(value, (int, str)) else None)
        node = node.value
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _calls_what_it_finds(nodes: list[ast.AST]) -> bool:
    """Whether a method calls a loop's name, a name bound to something of `self`, or what a call gives."""
    targets = [n.target for n in nodes if isinstance(n, (ast.For, ast.comprehension))]
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.NamedExpr, ast.AnnAssign)) and node.value is not None:
            own = any(isinstance(n, ast.Name) and n.id == "self" for n in ast.walk(node.value))
            targets += (node.targets if isinstance(node, ast.Assign) else [node.target]) if own else []
    bound = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    functions = [n.func for n in nodes if isinstance(n, ast.Call)]
    return any(
        isinstance(f, (ast.Call, ast.Subscript)) or (isinstance(f, ast.Name) and f.id in bound)
        for f in functions
    )


def _chains(tree: ast.AST) -> Iterator[tuple[str | None, ...]]:
    for node in ast.walk(tree):
        parts: list[str | None] = []
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            parts.append(node.attr if isinstance(node, ast.Attribute) else None)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "self" and len(parts) > 1:
            yield tuple(reversed(parts))


def _extent(tensor: torch.Tensor) -> tuple[torch.device, int, int] | None:
    """The bytes a tensor reads, as (device, first address, one past the last); None without memory."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def _tied(model: nn.Module, layer: nn.Module) -> str | None:
    """Another module of the model that reads memory of one of the layer's tensors."""
    inside = set(map(id, layer.modules()))
    mine = [(n, t, _extent(t)) for n, t in [*layer.named_parameters(), *layer.named_buffers()]]
    for other_name, other in model.named_modules():
        if id(other) in inside:
            continue
        for kind, tensor_name, tensor in _direct_tensors(other):
            theirs = _extent(tensor)
            for n, t, extent in mine:
                if t is tensor or (extent and theirs and _overlap(extent, theirs)):
                    whose = f"{other_name}.{tensor_name}".lstrip(".")
                    return f"its {n} is shared with {kind} {whose!r}"
    return None


def _overlap(a: tuple[torch.device, int, int], b: tuple[torch.device, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None and not torch.nn.parameter.is_lazy(parameter):
            yield "parameter", name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer):
            yield "buffer", name, buffer
    for name, value in module.__dict__.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            for held in _held(value):
                if isinstance(held, torch.Tensor) and not torch.nn.parameter.is_lazy(held):
                    yield "attribute", name, held


class ReadWatch(TorchFunctionMode):
    """While active, records which layers' tensors are passed to a torch function outside the layer's forward.

    `layers` maps a name to its module, `readers` a name to the function seen reading it. Use it around a
    forward pass: `with ReadWatch(layers) as watch: model(x)`. Reads of dtype, device or shape do not count.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.readers: dict[str, str] = {}
        self._layers = layers
        self._owner = {id(t): name for name, layer in layers.items() for t in layer.parameters()}
        self._inside: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> ReadWatch:
        for name, layer in self._layers.items():
            enter = lambda *_, name=name: self._inside.append(name)  # noqa: E731
            leave = lambda *_: self._inside.pop() and None  # noqa: E731
            self._handles.append(layer.register_forward_pre_hook(enter))
            self._handles.append(layer.register_forward_hook(leave, always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        label = getattr(func, "__name__", str(func))
        if label not in _METADATA:
            for value in [*args, *(kwargs or {}).values()]:
                for held in _held(value):
                    name = self._owner.get(id(held))
                    if name is not None and name not in self._inside:
                        self.readers.setdefault(name, label)
        return func(*args, **(kwargs or {}))
