"""Models larger than memory, one block at a time: calibration, pruning, GPTQ, or any work of your own."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from tautorch import distributed
from tautorch._batches import (
    Batch,
    Batches,
    call_model,
    check_batches,
    own_copy,
    to_device,
    training_modes_kept,
)
from tautorch._layers import forward_replaced
from tautorch._shards import Shards, ShardWriter

_R = TypeVar("_R")
_OP = "layerwise"
# Of the tensors outside the blocks, copied to `output` at a time.
_COPIED = 256 << 20


def layerwise(
    model: nn.Module,
    blocks: str,
    batches: Batches,
    work: Callable[[str, nn.Module, Sequence[Batch]], _R],
    *,
    weights: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    cache: str | PathLike[str] | None = None,
    inputs: Literal["changed", "original"] = "changed",
    device: torch.device | str | None = None,
) -> dict[str, _R]:
    """Call `work(name, block, inputs)` for each block of a stack, in order, with one block in memory.

        with torch.device("meta"):
            model = Transformer(config)
        layerwise(model, "layers", batches, weights="model/", output="pruned/",
                  work=lambda name, block, inputs: prune(block, "sparsegpt", "2:4", calibration=inputs))

    The model runs once up to its first block; from then on each block's outputs are the next one's inputs, as
    in GPTQ (arXiv:2210.17323) and SparseGPT (arXiv:2301.00774). `inputs` is what `prune`, `calibrate`, `gptq`
    and their like take as batches; it can be read again and again.

    Args:
        model: parts on the meta device are loaded when they run and let go afterwards; others stay.
        blocks: the qualified name of the nn.ModuleList or nn.Sequential. Each block is given the same other
            arguments as the first (masks, positions), and as its first argument the last one's output, or the
            first element of that if it is a tuple.
        batches: of what the model takes. With several ranks each gives its own.
        work: may change the block in place; what it returns is collected.
        weights: a .safetensors file or a folder of shards, with the names of the model's state_dict.
        output: a folder for the changed model: one shard for each block, the rest copied, and an index;
            rank 0 writes. Without it, changes to blocks from `weights` are dropped: for calibration.
        cache: a folder for the blocks' inputs, of all batches; None keeps them in memory. It is left empty.
        inputs: a block sees what the changed blocks before it make, or what the original ones did.
        device: where blocks run; None is where they are, CPU for loaded ones.

    Returns {block's name: what `work` returned}. What is not in a block's state_dict, such as the
    `weight_scale` of `gptq`, is not in `output` either: let `work` return or `convert` it.

    Raises ValueError/TypeError, before anything runs, for a name that is no stack of blocks, tensors that
    `weights` lacks or has in other shapes, and an empty calibration. If `work` fails, its error says so: the
    blocks before it are done, `output` has no index, `weights` is never written.
    """
    if inputs not in ("changed", "original"):
        raise ValueError(f'{_OP}: inputs must be "changed" or "original", got {inputs!r}')
    check_batches(_OP, batches)
    stack = _stack(model, blocks)
    source = Shards(_OP, weights) if weights is not None else None
    _check_weights(model, source)
    writer = ShardWriter(output) if output is not None and distributed.is_main() else None
    results: dict[str, _R] = {}
    with ExitStack() as leaving, training_modes_kept(model), torch.no_grad():
        model.eval()
        held = leaving.enter_context(_Held(cache))
        _capture(model, stack, batches, held, source, device)
        for index, block in enumerate(stack):
            name = f"{blocks}.{index}"
            following = held
            with _present(block, name, source, device):
                if inputs == "original":
                    following = leaving.enter_context(_Held(cache))
                    _advance(block, held, following, device)
                try:
                    with torch.enable_grad():
                        results[name] = work(name, block, held)
                except Exception as error:
                    error.add_note(f"{_OP}: in the work on {name!r}; {index} blocks before it are done")
                    raise
                if writer is not None:
                    writer.write(name, {f"{name}.{key}": value for key, value in block.state_dict().items()})
                if inputs == "changed" and index + 1 < len(stack):
                    _advance(block, held, held, device)
            if following is not held:
                held.clear()
                held = following
        if writer is not None:
            _write_rest(writer, model, blocks, source)
    distributed.barrier()
    return results


class _Held(Sequence[Batch]):
    """The inputs of one block, in memory or in a folder of its own under `cache`."""

    def __init__(self, cache: str | PathLike[str] | None) -> None:
        self._folder: Path | None = None
        if cache is not None:
            Path(cache).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="inputs-", dir=cache))
        self._batches: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        held = self._batches[index]
        # A copy, as from a file: a block may add to its input in place.
        return torch.load(held, weights_only=True) if self._folder is not None else own_copy(held)

    def put(self, index: int, batch: Batch) -> None:
        """Keep `batch` on the CPU in the place of number `index`, or as the next."""
        kept = to_device(batch, "cpu")
        if self._folder is not None:
            path = self._folder / f"{index}.pt"
            torch.save(kept, path)
            kept = path
        if index == len(self._batches):
            self._batches.append(kept)
        else:
            self._batches[index] = kept

    def clear(self) -> None:
        """Let go of everything."""
        self._batches = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


class _Stop(Exception):
    """The first block has its inputs."""


def _stack(model: nn.Module, blocks: str) -> list[nn.Module]:
    found = dict(model.named_modules()).get(blocks)
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or len(found) == 0:
        stacks = [n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and n]
        got = "no such module" if found is None else f"{type(found).__name__}"
        raise ValueError(
            f"{_OP}: blocks must name an nn.ModuleList or nn.Sequential with blocks in it, got {blocks!r} "
            f"({got}); the model has {', '.join(stacks[:8]) or 'none'}"
        )
    return list(found)


def _check_weights(model: nn.Module, source: Shards | None) -> None:
    """Everything on the meta device is in `source`, in its shape."""
    state = model.state_dict(keep_vars=True)
    known = {} if source is None else source.shapes
    present = {id(value) for name, value in state.items() if name in known}
    for name, value in state.items():
        if not value.is_meta or (name not in known and id(value) in present):
            continue
        if name not in known:
            where = "weights must be given" if source is None else f"weights must hold it, got {source.path}"
            raise ValueError(f"{_OP}: {name} is on the meta device: {where}")
        if known[name] != tuple(value.shape):
            raise ValueError(
                f"{_OP}: {name} must be {list(value.shape)} as in the model, "
                f"got {list(known[name])} in weights"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            raise ValueError(
                f"{_OP}: {name} is on the meta device and in no state_dict; make this buffer on the CPU"
            )


def _load(module: nn.Module, names: Mapping[str, str], source: Shards, device: Any) -> None:
    """Read {key in the module: name in the file} into the module's own slots."""
    read = source.read(names.values(), device if device is not None else "cpu")
    module.load_state_dict({key: read[name] for key, name in names.items()}, strict=False, assign=True)


def _release(module: nn.Module) -> None:
    """Put every tensor of the module back on the meta device."""
    for part in module.modules():
        _release_own(part)


def _release_own(module: nn.Module) -> None:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            empty = torch.empty_like(parameter, device="meta")
            module._parameters[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = torch.empty_like(buffer, device="meta")


@contextmanager
def _present(block: nn.Module, name: str, source: Shards | None, device: Any) -> Iterator[None]:
    """The block with its weights, on `device`; afterwards back on the meta device, or where it was."""
    missing = {key: f"{name}.{key}" for key, value in block.state_dict().items() if value.is_meta}
    before = next((value.device for value in block.state_dict().values() if not value.is_meta), None)
    if source is not None and missing:
        _load(block, missing, source, device)
    if device is not None:
        block.to(device)
    try:
        yield
    finally:
        if missing:
            _release(block)
        elif device is not None and before is not None:
            block.to(before)


def _capture(
    model: nn.Module,
    stack: list[nn.Module],
    batches: Batches,
    held: _Held,
    source: Shards | None,
    device: Any,
) -> None:
    """Run the model up to its first block on each batch, and hold what that is given."""
    first = stack[0]
    inside = {id(module) for block in stack for module in block.modules()}
    outside = {module: name for name, module in model.named_modules() if id(module) not in inside}
    loaded: list[nn.Module] = []

    def load(module: nn.Module, *_: Any) -> None:
        prefix = f"{outside[module]}." if outside[module] else ""
        own = {**module._parameters, **module._buffers}
        missing = {key: f"{prefix}{key}" for key, value in own.items() if value is not None and value.is_meta}
        if source is not None and missing:
            _load(
                module, {key: name for key, name in missing.items() if name in source.shapes}, source, device
            )
            loaded.append(module)

    def stop(*args: Any, **kwargs: Any) -> None:
        held.put(len(held), _as_batch(first, args, kwargs))
        raise _Stop

    real = next((value.device for value in model.state_dict().values() if not value.is_meta), "cpu")
    handles = [module.register_forward_pre_hook(load) for module in outside]
    failure: Exception | None = None
    try:
        with forward_replaced(first, stop):
            for count, batch in enumerate(batches, 1):
                with suppress(_Stop):
                    call_model(_OP, model, to_device(batch, device if device is not None else real))
                if len(held) != count:
                    raise ValueError(f"{_OP}: the model must call its first block, got a run without")
        if len(held) == 0:
            raise ValueError(
                f"{_OP}: calibration must hold at least one batch, got none (a spent generator?)"
            )
    except Exception as error:
        failure = error
    finally:
        for handle in handles:
            handle.remove()
        for module in loaded:
            _release_own(module)
    distributed.raise_together(failure)


def _as_batch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """A call's arguments in one of the forms of a batch: positional, or all by name."""
    if not kwargs:
        return args
    # The class's own: the instance's is replaced while inputs are captured.
    bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
    named = dict(bound.arguments)
    for kind in inspect.signature(type(block).forward).parameters.values():
        if kind.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(kind.name, {})
        elif kind.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY) and args:
            raise TypeError(
                f"{_OP}: {type(block).__name__} must take its arguments by name, got *{kind.name}"
            )
    named.pop(next(iter(bound.arguments)))
    return named


def _advance(block: nn.Module, read: _Held, write: _Held, device: Any) -> None:
    """Put each batch's output in the place of the first argument, for the next block."""
    where = (
        device if device is not None else next((value.device for value in block.state_dict().values()), "cpu")
    )
    with training_modes_kept(block):
        block.eval()
        for index in range(len(read)):
            batch = read[index]
            out = call_model(_OP, block, to_device(batch, where), own=False)
            first = out[0] if isinstance(out, (tuple, list)) else out
            if not isinstance(first, Tensor):
                raise TypeError(
                    f"{_OP}: a block must return a tensor or a tuple of it, got {type(first).__name__}"
                )
            if isinstance(batch, Mapping):
                write.put(index, {**batch, next(iter(batch)): first})
            else:
                write.put(index, (first, *batch[1:]))


def _write_rest(writer: ShardWriter, model: nn.Module, blocks: str, source: Shards | None) -> None:
    """What is outside the blocks: from the model where it is there, else copied from the file."""
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{blocks}.")}
    here = {name: value for name, value in rest.items() if not value.is_meta}
    if here:
        writer.write("model", here)
    if source is not None:
        writer.copy(source, [name for name in rest if name not in here and name in source.shapes], _COPIED)
    writer.finish()
