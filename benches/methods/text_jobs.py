"""What the methods do to decoders on `text`: one job for each way of compressing.

`perplexity` is per character, on held-out files. Compressed are the linear layers of the blocks, not the
embedding and the head, as is usual for language models; int8 takes the head too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benches.methods import text
from benches.methods.jobs import Result
from torch import nn

import tautorch as tt

TEACHER = (128, 4)
STUDENT = (64, 2)
"""Width and depth; 813 and 112 thousand parameters."""
OUTLIERS, GAIN = 4, 64.0
"""Channels of each norm that are injected with outliers, and how much greater they get: a power of two is
exact."""


def teacher(seed: int, digest: str, steps: int, lr: float, shape: Sequence[int]) -> Result:
    """The decoder that everything else on this task begins with."""
    torch.manual_seed(seed)
    model = text.train(text.Decoder(*shape), steps=steps, lr=lr, seed=seed)
    return _kept(model, shape)


def alone(seed: int, digest: str, steps: int, lr: float, shape: Sequence[int]) -> Result:
    """A student trained as its teacher was."""
    return teacher(seed + 100, digest, steps, lr, shape)


def distilled(
    seed: int, steps: int, lr: float, shape: Sequence[int], temperature: float, alpha: float, teacher: Result
) -> Result:
    """The same student, from the same weights, on the same batches, with the teacher's soft targets."""
    torch.manual_seed(seed + 100)
    student = text.Decoder(*shape)
    loss = tt.distill.SoftTarget(temperature, alpha)
    _distil(loaded(teacher), student, loss, steps=steps, lr=lr, seed=seed + 100)
    return _kept(student, shape)


def oneshot(
    seed: int, importance: str, pattern: str, dampening: float, outliers: bool, teacher: Result,
    ranking: str | None = None, refit: int = 0,
) -> Result:  # fmt: skip
    """Half of the weights removed at once, without training."""
    model = loaded(teacher)
    if outliers:
        inject_outliers(model, seed)
    tt.prune.prune(
        model, importance, pattern, 0.5, layers=text.BLOCKS, calibration=text.calibration(64, seed + 1000),
        ranking=ranking, dampening=dampening, refit=refit,
    )  # fmt: skip
    return {"perplexity": text.perplexity(model)}


def sparse(seed: int, sparsity: float, steps: int, lr: float, teacher: Result) -> Result:
    """Pruned to 4x1 blocks while it learns from what it was; the perplexity is that of compiled sparse
    layers."""
    dense = loaded(teacher)
    model = copy.deepcopy(dense)
    schedule = tt.prune.Schedule(
        model, sparsity, pattern="4x1", kind="cubic", end=max(2, steps // 2), every=max(1, steps // 100),
        layers=text.BLOCKS,
    )  # fmt: skip
    _tune(dense, model, steps, lr, seed, callbacks=[schedule])
    schedule.remove()
    make = partial(tt.nn.SparseLinear.from_float, pattern="4x1", weight_dtype=torch.float32)
    tt.convert(model, dict.fromkeys(_names(model), make))
    return {"perplexity": text.perplexity(model)}


def longer(seed: int, steps: int, lr: float, teacher: Result) -> Result:
    """The teacher trained on as `sparse` and `qat` do, nothing compressed: what the steps alone do."""
    dense = loaded(teacher)
    model = copy.deepcopy(dense)
    _tune(dense, model, steps, lr, seed)
    return {"perplexity": text.perplexity(model)}


def int8(seed: int, outliers: bool, smooth: bool, teacher: Result) -> Result:
    """Every linear layer compiled to int8 weights and activations, ranges found as it runs."""
    model = loaded(teacher)
    if outliers:
        inject_outliers(model, seed)
    if smooth:
        tt.quantize.smooth(model, text.calibration(8, seed + 1000), alpha=(0.25, 0.5, 0.75, 0.9))
    return {"perplexity": text.perplexity(_compiled(model))}


def qat(seed: int, bits: int, steps: int, lr: float, teacher: Result) -> Result:
    """Weights of so few bits, inputs int8, compiled; 0 steps of training is rounding to the best scales."""
    dense = loaded(teacher)
    model = tt.quantize.prepare_qat(copy.deepcopy(dense), bits, layers=text.BLOCKS)
    if steps:
        _tune(dense, model, steps, lr, seed)
    return {"perplexity": text.perplexity(_compiled(tt.quantize.finalize(model)))}


def lowrank(seed: int, fewer: float, method: str, teacher: Result) -> Result:
    """Every linear layer of the blocks in two factors that have so much fewer weights."""
    model = loaded(teacher)
    tt.factorize.factorize(
        model, method, budget=1 - fewer, allocation="layer", layers=text.BLOCKS,
        calibration=text.calibration(64, seed + 1000),
    )  # fmt: skip
    return {"perplexity": text.perplexity(model)}


def inject_outliers(model: nn.Module, seed: int) -> nn.Module:
    """Make some channels of every norm GAIN times as large, and the weights that read them as much smaller.

    The function stays the same to the last bit but for sums' order; the activations get the outlier channels
    that large language models have (Dettmers et al. 2022, arXiv:2208.07339).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.qkv), (block.norm2, block.up)):
                channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIERS]
                norm.weight[channels] *= GAIN
                norm.bias[channels] *= GAIN
                reader.weight[:, channels] /= GAIN
    return model


def loaded(result: Result) -> nn.Module:
    """The decoder of a job's result, in eval mode."""
    model = text.Decoder(*result["shape"])
    model.load_state_dict(result["state"])
    return model.eval()


def _kept(model: nn.Module, shape: Sequence[int]) -> Result:
    return {"perplexity": text.perplexity(model), "shape": list(shape), "state": model.state_dict()}


def _tune(
    dense: nn.Module, model: nn.Module, steps: int, lr: float, seed: int, callbacks: Sequence[Any] = ()
) -> None:
    """Train on under the teacher, half on its soft targets."""
    loss = tt.distill.SoftTarget(1.0, alpha=0.5)
    _distil(dense, model, loss, steps=steps, lr=lr, seed=seed + 200, callbacks=callbacks)


def _compiled(model: nn.Module) -> nn.Module:
    """Its linear layers in int8."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return tt.convert(model, dict.fromkeys(names, tt.nn.Int8Linear.from_float))


def _names(model: nn.Module) -> list[str]:
    """The linear layers of the blocks."""
    return [
        name for name, layer in model.blocks.named_modules(prefix="blocks") if isinstance(layer, nn.Linear)
    ]


def _distil(
    teacher: nn.Module, student: nn.Module, loss: Any, *, steps: int, lr: float, seed: int,
    callbacks: Sequence[Any] = (),
) -> None:  # fmt: skip
    optimizer, cycle = text.optimizer_for(student.parameters(), lr, steps)
    tt.distill.Distiller(
        teacher, student, loss, optimizer, scheduler=cycle, scheduler_interval="step", callbacks=callbacks,
        clip_norm=1.0, progress=False,
    ).fit(text.Windows(steps, seed), 1)  # fmt: skip
    student.eval()
