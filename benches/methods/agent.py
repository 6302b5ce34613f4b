"""The task `agent`: policies for gymnasium's environments, trained by reinforcement learning.

Acrobot-v1 has discrete actions, Pendulum-v1 a continuous one. A policy is a plain MLP: observations [n, O] ->
logits [n, A], or torques [n, 1]. What it is worth is its mean return over 100 episodes whose seeds are fixed,
normalised so that a random policy has 0 and the teacher 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

import tautorch as tt

EPISODES = 100
FIRST_SEED = 10_000
"""Of the episodes that are reported; no training begins with these."""
ENVIRONMENTS = ("Acrobot-v1", "Pendulum-v1")
DISCRETE = {"Acrobot-v1": True, "Pendulum-v1": False}
SIZES = {"Acrobot-v1": (6, 3), "Pendulum-v1": (3, 1)}
"""Observations and actions of each environment."""
TORQUE = 2.0
"""The greatest action of Pendulum-v1."""


class Torque(nn.Module):
    """Anything to [-TORQUE, TORQUE]."""

    def forward(self, x: Tensor) -> Tensor:
        return TORQUE * torch.tanh(x)


def mlp(environment: str, width: int, depth: int = 2) -> nn.Sequential:
    """A policy with `depth` hidden layers and ReLU."""
    inputs, outputs = SIZES[environment]
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers, *([] if DISCRETE[environment] else [Torque()]))


def random_policy(environment: str) -> Callable[[Tensor], Tensor]:
    """Any action, uniformly; the same for every task and seed."""
    generator, actions = torch.Generator().manual_seed(0), SIZES[environment][1]
    if DISCRETE[environment]:
        return lambda observations: torch.rand(len(observations), actions, generator=generator)
    return lambda observations: TORQUE * (2 * torch.rand(len(observations), actions, generator=generator) - 1)


def copies(environment: str, count: int) -> Any:
    """A vectorised environment, its copies stepped in turn."""
    return gymnasium.make_vec(environment, num_envs=count, vectorization_mode="sync")


def mean_return(environment: str, policy: Callable[[Tensor], Tensor], episodes: int = EPISODES) -> float:
    """Over the episodes that are reported."""
    envs = copies(environment, min(50, episodes))
    found = tt.distill.evaluate_policy(policy, envs, episodes, seed=FIRST_SEED)
    envs.close()
    return sum(found) / episodes
