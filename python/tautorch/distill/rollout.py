"""Running policies in environments of the gymnasium API, single or vectorised; gymnasium is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tautorch._batches import model_device, training_modes_kept
from tautorch.distill.arguments import whole

#: What a policy's outputs for a batch of observations become: a batch of actions.
Act = Callable[[Any], Any]


class World:
    """An environment seen as `size` copies that run side by side (1 for a plain one).

    `env` has gymnasium's `reset(seed=...)` and `step(action)`; one with `num_envs` is vectorised, in any of
    gymnasium's three autoreset modes. TypeError for anything else.
    """

    def __init__(self, op: str, env: Any, act: Act | None) -> None:
        if not all(callable(getattr(env, name, None)) for name in ("reset", "step")):
            raise TypeError(f"{op}: env must have gymnasium's reset and step, got {type(env).__name__}")
        self._op, self._env = op, env
        self._vector = hasattr(env, "num_envs")
        self.size = int(env.num_envs) if self._vector else 1
        self._space = getattr(env, "single_action_space" if self._vector else "action_space", None)
        self._act = act if act is not None else self._greedy
        if act is None and not (hasattr(self._space, "n") or hasattr(self._space, "low")):
            raise TypeError(
                f"{op}: env must have a Discrete or Box action space, got {self._space}; give act=lambda "
                "outputs: actions"
            )
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode", "SameStep")
        self._mode = str(getattr(mode, "value", mode)) if self._vector else "Disabled"

    def reset(self, seeds: list[int]) -> Any:
        """The first observations [size, ...], each copy seeded with its own of `seeds`."""
        observation, _ = self._env.reset(seed=seeds if self._vector else seeds[0])
        self._ended = np.zeros(self.size, dtype=bool)
        return self._batch(observation)

    @property
    def live(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which copies will heed the next action; one that has just ended spends a step on its reset."""
        return ~self._ended if self._mode == "NextStep" else np.ones(self.size, dtype=bool)

    def step(self, actions: Any) -> tuple[Any, Any, Any]:
        """(observations, rewards, whether an episode ended) of all copies; those that ended start anew."""
        observation, reward, ended, cut, _ = self._env.step(actions if self._vector else actions[0])
        rewards = np.asarray(reward, dtype=np.float64).reshape(self.size)
        over = np.logical_or(ended, cut).reshape(self.size)
        if not np.isfinite(rewards).all():
            raise ValueError(f"{self._op}: env must give finite rewards, got {rewards.tolist()}")
        self._ended = over
        if self._mode == "Disabled" and over.any():
            options = {"options": {"reset_mask": over}} if self._vector else {}
            observation, _ = self._env.reset(**options)
        return self._batch(observation), rewards, over

    def actions(self, outputs: Any) -> Any:
        """The actions [size, ...], numpy, that a policy's outputs stand for."""
        chosen = self._act(outputs)
        return chosen.detach().cpu().numpy() if isinstance(chosen, Tensor) else np.asarray(chosen)

    def _greedy(self, outputs: Any) -> Any:
        best = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if not isinstance(best, Tensor) or best.dim() < 2 or best.shape[0] != self.size:
            got = list(best.shape) if isinstance(best, Tensor) else type(best).__name__
            raise TypeError(
                f"{self._op}: a policy must give a tensor [{self.size}, ...] or a tuple starting with one, "
                f"got {got}; give output= or act="
            )
        values = best.detach().cpu().float().numpy().reshape(self.size, -1)
        space: Any = self._space
        if not (values < np.inf).all():  # minus infinity rules an action out
            raise FloatingPointError(f"{self._op}: a policy must give finite outputs, got NaN or Inf")
        if hasattr(space, "n"):
            if values.shape[1] != int(space.n):
                raise ValueError(f"{self._op}: a policy must give {space.n} values, got {list(best.shape)}")
            return values.argmax(-1) + int(getattr(space, "start", 0))
        if values.shape[1] != int(np.prod(space.shape)):
            raise ValueError(f"{self._op}: a policy must give {space.shape} actions, got {list(best.shape)}")
        wanted = values.reshape(self.size, *space.shape)
        return np.clip(wanted, space.low, space.high).astype(space.dtype)

    def _batch(self, observation: Any) -> Any:
        return observation if self._vector else np.asarray(observation)[None]


def reader(op: str, policy: Any) -> Callable[[Any], Tensor]:
    """What makes observations [n, ...] a tensor on the policy's device, floating ones in its dtype.

    Made once per rollout, not at every step.
    """
    device = model_device(policy) if isinstance(policy, nn.Module) else None
    weights = policy.parameters() if isinstance(policy, nn.Module) else ()
    dtype = next((p.dtype for p in weights if p.is_floating_point()), torch.float32)

    def read(observations: Any) -> Tensor:
        array = np.asarray(observations)
        if array.dtype == object or array.dtype.kind not in "fiub":
            raise TypeError(
                f"{op}: observations must be arrays of numbers, got {type(observations).__name__}; wrap the "
                "environment (gymnasium.wrappers.FlattenObservation)"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FloatingPointError(f"{op}: env must give finite observations, got NaN or Inf")
        x = torch.from_numpy(np.array(array))
        return x.to(device, dtype if array.dtype.kind == "f" else None)

    return read


@contextmanager
def acting(*policies: Any) -> Iterator[None]:
    """Eval mode and no gradients, with the training flags put back on leaving."""
    modules = [policy for policy in policies if isinstance(policy, nn.Module)]
    with training_modes_kept(nn.ModuleList(modules)), torch.no_grad():
        for module in modules:
            module.eval()
        yield


def evaluate_policy(
    policy: Callable[[Any], Any],
    env: Any,
    episodes: int = 100,
    *,
    seed: int = 0,
    act: Act | None = None,
    output: Callable[[Any], Any] | None = None,
) -> list[float]:
    """The undiscounted return of each of `episodes` episodes; episode i is reset with seed + i.

    The same seeds give the same episodes to every policy, however many copies a vectorised env runs.

    Args:
        policy: an nn.Module (put in eval mode meanwhile) or callable; [n, ...] observations to outputs.
        env: of gymnasium's API, single or vectorised; its episodes must end (gymnasium.wrappers.TimeLimit).
            Left where the last one ended, not closed.
        act: outputs to actions. By default the argmax for a Discrete action space, and for a Box the output
            (or the first of a tuple: a Gaussian's mean), clipped to its bounds.
        output: what to take of the policy's output, e.g. `lambda out: out.logits`.

    Raises TypeError or ValueError for an env, outputs or observations of another kind, and
    FloatingPointError for outputs that are not finite.
    """
    whole("evaluate_policy", "episodes", episodes)
    whole("evaluate_policy", "seed", seed, 0)
    world = World("evaluate_policy", env, act)
    returns: list[float] = []
    read = reader("evaluate_policy", policy)
    with acting(policy):
        for start in range(0, episodes, world.size):
            observations = world.reset([seed + start + i for i in range(world.size)])
            total, running = np.zeros(world.size), np.ones(world.size, dtype=bool)
            running[episodes - start :] = False
            while running.any():
                outputs = policy(read(observations))
                outputs = outputs if output is None else output(outputs)
                observations, rewards, over = world.step(world.actions(outputs))
                total[running] += rewards[running]
                running &= ~over
            returns.extend(total[: episodes - start].tolist())
    return returns
