"""What the methods do to policies on `agent`: one job for each way of compressing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benches.methods import agent, reinforce
from benches.methods.jobs import Result
from torch import Tensor, nn

import tautorch as tt
from tautorch.demo.measure import float_bytes
from tautorch.timing import compare

WIDTH = 64
"""Of both hidden layers of a student; a teacher's are of `reinforce.WIDTH`."""
HIDDEN = "2"
"""The layer between the hidden ones: the only large one, and the one that is pruned."""


def teacher(seed: int, environment: str, **settings: Any) -> Result:
    """A policy trained by reinforcement learning, and what it and a random one are worth."""
    learn = reinforce.ppo if agent.DISCRETE[environment] else reinforce.td3
    policy = learn(environment, seed, **settings)
    return {
        "return": agent.mean_return(environment, policy),
        "random": agent.mean_return(environment, agent.random_policy(environment)),
        "bytes": float_bytes(policy),
        "state": policy.state_dict(),
    }


def student(
    seed: int, environment: str, sparsity: float, rounds: int, steps: int, epochs: int, teacher: Result
) -> Result:
    """A small policy: distilled on its own rollouts, pruned while that goes on, compiled to int8, saved.

    `return` is that of the file, loaded again; `float_return` that of the policy before pruning and int8.
    """
    torch.manual_seed(seed + 100)
    expert, policy = _policy(environment, teacher), agent.mlp(environment, WIDTH)
    learn = partial(_dagger, environment, expert, policy, steps=steps, epochs=epochs)
    learn(rounds=rounds, seed=seed, lr=2e-3)
    float_return = agent.mean_return(environment, policy)
    tt.prune.prune(policy, pattern="4x1", sparsity=sparsity, layers=[HIDDEN])
    with tt.prune.hold_masks(policy) as masks:
        learn(rounds=max(1, rounds // 2), seed=seed + 50, lr=1e-3, callbacks=[masks])
    tt.convert(policy, {name: _compiled(name) for name in policy_layers(policy)})
    tt.fuse(policy.eval())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.safetensors"
        tt.save(policy, path)
        file = torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())
    return {
        "return": agent.mean_return(environment, reloaded(environment, file)),
        "float_return": float_return,
        "bytes": len(file),
        "file": file,
    }


def speed(seed: int, environment: str, seconds: float, teacher: Result, student: Result) -> Result:
    """Microseconds per action of both, timed in turns on one thread, one observation at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small, large = reloaded(environment, student["file"]), _policy(environment, teacher)
    x = torch.randn(1, agent.SIZES[environment][0])
    try:
        with torch.inference_mode():
            found = compare(lambda: large(x), lambda: small(x), seconds=seconds)
    finally:
        torch.set_num_threads(threads)
    return {
        "teacher_us": 1e6 * found.a_s,
        "student_us": 1e6 * found.b_s,
        "ratio": found.ratio,
        "low": found.ratio_low,
        "high": found.ratio_high,
    }


def reloaded(environment: str, file: Tensor) -> nn.Module:
    """The policy of a saved file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.safetensors"
        path.write_bytes(file.numpy().tobytes())
        return tt.load(path, lambda: agent.mlp(environment, WIDTH)).eval()


def policy_layers(policy: nn.Module) -> list[str]:
    """Its linear layers."""
    return [name for name, layer in policy.named_modules() if isinstance(layer, nn.Linear)]


def _compiled(name: str) -> Callable[[Any], nn.Module]:
    return (
        partial(tt.nn.SparseLinear.from_float, pattern="4x1")
        if name == HIDDEN
        else tt.nn.Int8Linear.from_float
    )


def _policy(environment: str, result: Result) -> nn.Module:
    policy = agent.mlp(environment, len(result["state"]["0.bias"]))
    policy.load_state_dict(result["state"])
    return policy.eval()


def _dagger(
    environment: str, expert: nn.Module, policy: nn.Module, *, rounds: int, steps: int, epochs: int, seed:
    int, lr: float, callbacks: Sequence[Any] = (),
) -> None:  # fmt: skip
    loss: Any = tt.distill.PolicyKL() if agent.DISCRETE[environment] else tt.distill.Regression()
    envs = agent.copies(environment, 10)
    tt.distill.dagger(
        expert, policy, envs, loss, torch.optim.Adam(policy.parameters(), lr), rounds=rounds, steps=steps,
        epochs=epochs, seed=seed, progress=False, callbacks=callbacks,
    )  # fmt: skip
    envs.close()
    policy.eval()
