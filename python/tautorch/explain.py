"""What runs a layer and why nothing else does; and packing everything ahead of the first call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tautorch import dispatch, tuning
from tautorch._batches import Batch, call_model, left_as_it_is
from tautorch.nn.eager import plain
from tautorch.nn.packed import PackedModule
from tautorch.ops.packing import PAIRS_I8, SPARSE_I8, pack_info
from tautorch.ops.sparse_entries import MAX_INPUTS, packs_dense


@dataclass
class _Seen:
    """One kind of call that a layer got, and what ran it."""

    inputs: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    direct: bool = True


def explain(module: nn.Module, x: Batch | None = None) -> str:
    """Print, and return, what runs each tautorch layer of a module and why the other kernels do not.

    Args:
        module: a layer or a whole model; left as it is, but for packing.
        x: an input to run it on once, in eval mode without gradients (a tensor, a tuple of positional or a
            dict of keyword arguments). Then the text says what each layer got and which kernel really ran.

    Returns:
        One paragraph a layer: its kernel, the bytes of its packed weight, every kernel of its operator with
        the reason why it does not run, and what is worth knowing.

    Raises:
        TypeError: not a module, or x is none of these.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: module must be an nn.Module, got {type(module).__name__}")
    layers = _layers(module)
    seen: dict[str, _Seen] = {}
    if x is not None:
        with _watched(layers, seen), left_as_it_is(module):
            call_model("explain", module, x)
    paragraphs = [_paragraph(name, layer, x is not None, seen.get(name)) for name, layer in layers.items()]
    plain_layers = _float_layers(module)
    if not layers:
        paragraphs.append(f"{type(module).__name__} has no tautorch layers; see tautorch.convert")
    if plain_layers and layers:
        paragraphs.append(f"torch runs {len(plain_layers)} more: {_shortened(plain_layers)}")
    if layers and not dispatch.threaded:
        paragraphs.append("one thread: this torch has no torch_parallel_for; 2.10 or newer shares its pool")
    text = "\n".join(paragraphs)
    print(text)
    return text


def warmup(model: nn.Module, x: Batch) -> nn.Module:
    """Pack and plan every tautorch layer by one inference call, so that no later call pays for it.

    On CUDA it compiles the Triton kernels that x meets too, and measures which of their tiles is fastest for
    each shape, once a device: ``tautorch.tuning`` keeps the choices in a file.

    Args:
        model: any module; its training flags are as before afterwards.
        x: a tensor, a tuple of positional or a dict of keyword arguments, of the shapes to come.

    Returns:
        The model.

    Raises:
        TypeError: not a module, or x is none of these.
        ValueError: a layer that no kernel can run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: model must be an nn.Module, got {type(model).__name__}")
    dispatch.ask_again()  # layers on CUDA would repeat what they ran before anything was measured
    with left_as_it_is(model), tuning.measuring():
        call_model("warmup", model, x)
    for layer in _layers(model).values():  # those that x does not reach, or reaches under autocast
        if _on_cpu(layer) and not layer.ready():
            layer.prepare()
    return model


def _on_cpu(layer: PackedModule) -> bool:
    """Whether the layer packs for the CPU."""
    return layer._problem().device == "cpu"


def _layers(module: nn.Module) -> dict[str, PackedModule]:
    return {name: m for name, m in module.named_modules() if isinstance(m, PackedModule)}


def _float_layers(module: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [f"{name} ({type(m).__name__})" for name, m in module.named_modules() if isinstance(m, kinds)]


def _shortened(names: list[str], most: int = 6) -> str:
    more = [f"... {len(names) - most} others"] if len(names) > most else []
    return ", ".join(names[:most] + more)


@contextmanager
def _watched(layers: dict[str, PackedModule], seen: dict[str, _Seen]) -> Iterator[None]:
    """Note what each layer gets and which kernel runs it."""

    def before(name: str, layer: PackedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input")
        tensor = given if isinstance(given, Tensor) else None
        note = seen.setdefault(name, _Seen())
        if tensor is not None:
            what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            if what not in note.inputs:
                note.inputs.append(what)
            note.direct = note.direct and plain(tensor, layer._parameters)

    def after(name: str, layer: PackedModule) -> None:
        used = dispatch.last_used(layer.op)
        if used is not None and used not in seen[name].kernels:
            seen[name].kernels.append(used)

    handles = []
    for name, layer in layers.items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, name=name, layer=layer: before(name, layer, args, kwargs),
                with_kwargs=True,
            )
        )
        handles.append(
            layer.register_forward_hook(lambda m, args, y, name=name, layer=layer: after(name, layer))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _paragraph(name: str, layer: PackedModule, called: bool, seen: _Seen | None) -> str:
    lines = [f"{name + ': ' if name else ''}{layer!r}"]
    forced = dispatch.forced(layer.op)
    try:
        kernel = layer.kernel()
    except ValueError as error:
        lines.append(f"  kernel    none: {error}")
        return "\n".join(lines)
    lines.append(f"  kernel    {kernel}{' (forced)' if forced else ''}")
    if called and seen is None:
        lines.append("  ran       nothing: x does not reach this layer")
    if seen is not None:
        how = (
            "called directly"
            if seen.direct and kernel != "reference"
            else "called through the torch operator"
        )
        ran = ", ".join(seen.kernels) or "nothing"
        lines.append(f"  ran       {ran} on {', '.join(seen.inputs) or 'no tensor'}, {how}")
    if kernel != "reference" and _on_cpu(layer):
        lines.append(f"  weight    {_bytes(layer.packed_bytes())} packed")
    for other, reason in layer.refusals().items():
        if other != kernel:
            lines.append(f"  not       {other}: {reason or _why_not_chosen(other, kernel, forced)}")
    lines += [f"  note      {note}" for note in _notes(layer, kernel)]
    return "\n".join(lines)


def _why_not_chosen(other: str, kernel: str, forced: str | None) -> str:
    if forced is not None:
        return f"it can run, but {forced} is forced"
    if other == "reference":
        return "plain torch, the truth to compare with; it runs only when forced"
    return f"it can run, but {kernel} comes first"


def _bytes(count: int) -> str:
    return f"{count} bytes" if count < 10_240 else f"{count / 1024:.1f} KiB"


def _notes(layer: PackedModule, kernel: str) -> Iterator[str]:
    """What a user would not guess from the kernel's name."""
    pattern = getattr(layer, "pattern", None)
    if pattern is not None:
        yield from _sparse_notes(pattern, layer)
        if kernel == "amx" and _pack_info(layer).get("kind") in (SPARSE_I8, PAIRS_I8):
            yield (
                "AMX multiplies dense int8 layers alone: with many rows Int8Linear and Int8Conv2d may be "
                "faster than this pattern below 80 to 95 % zeros"
            )
    if getattr(layer, "quant", None) == "weight_only":
        rows = " beyond 4 rows" if kernel in dispatch.AVX512 and layer.op == "int8_linear" else ""
        yield f"weight-only: fp32 multiply-adds{rows}; int8 saves memory, not arithmetic"
    elif getattr(layer, "weight_dtype", torch.int8) == torch.float32:
        yield "float32 values: fp32 multiply-adds, no quantisation"
    if layer.op == "sparse_linear" and kernel != "reference" and _only_lists(layer):
        yield "not yet fast below 16 rows: a panel of 16 costs the same with one row used"
    if layer.op == "lowrank_conv2d" and layer.weight_dtype == torch.float32:
        yield "not yet faster than two float convolutions everywhere; int8 factors are, in the bench"
    if layer.op.endswith("conv2d"):
        per_group = _shape(layer)[1]
        if per_group < 4 and not (layer.op == "int8_conv2d" and layer.quant != "weight_only"):
            yield f"not yet fast with {per_group} input channels a group: products take 4 at a time"
    rank = getattr(layer, "rank", None)
    if rank is not None:
        n, k = _matrix(layer)
        if rank * (n + k) >= n * k:
            yield f"rank {rank} takes {rank * (n + k) / (n * k):.2f} times the dense weight's multiply-adds"
    if kernel == "scalar":
        yield "scalar: portable C++ for CPUs without a vector kernel; far slower than those"
    if kernel == "reference":
        yield "reference: plain torch in float64, for comparison alone"


def _pack_info(layer: PackedModule) -> dict[str, int | str]:
    """What the packed weight says of itself, or nothing."""
    packed = layer._buffers["packed"]
    return pack_info(packed) if packed is not None and _on_cpu(layer) else {}


def _only_lists(layer: PackedModule) -> bool:
    """Whether the packed weight is sparse int8 and has no form that runs a few rows by themselves."""
    info = _pack_info(layer)
    return info.get("kind") == SPARSE_I8 and info["entries"] != 0 and info["slots"] == 0


def _shape(layer: Any) -> tuple[int, ...]:
    """The weight's shape, ``[N, K]`` or ``[O, I/groups, kh, kw]``."""
    if layer.op.endswith("conv2d"):
        return tuple(layer.geometry.weight_shape)
    return layer.out_features, layer.in_features


def _matrix(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of one group's weight matrix."""
    shape = _shape(layer)
    return shape[0] // getattr(layer, "groups", 1), math.prod(shape[1:])


def _sparse_notes(pattern: str, layer: Any) -> Iterator[str]:
    info = _pack_info(layer)
    if info.get("kind") == PAIRS_I8:
        yield "2:4 runs by a kernel of its own, on 5/8 of the dense bytes"
    elif pattern == "2:4":
        yield "2:4 runs the dense kernel: this one has no 2:4 form, or none that pays at this shape"
    elif packs_dense(pattern, _shape(layer)):
        yield f"runs the dense kernel: more than {MAX_INPUTS} inputs, which 16-bit indices cannot name"
    elif pattern not in ("unstructured", "4x1") and not info.get("cells"):
        yield f"{pattern} blocks run as 4x1 ones"
