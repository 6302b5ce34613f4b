"""Teachers of the task `agent`: PPO for discrete actions, TD3 for continuous ones, each as short as it can
be."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import torch
from benches.methods.agent import SIZES, TORQUE, copies, mlp
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 256
"""Of both hidden layers of a teacher."""


def ppo(
    environment: str, seed: int, *, updates: int = 60, count: int = 16, length: int = 128, width: int = WIDTH
) -> nn.Module:
    """Proximal policy optimisation with a clipped ratio and generalised advantages; rewards divided by 10."""
    torch.manual_seed(seed)
    gamma, trace, clip = 0.99, 0.95, 0.2
    policy, critic = mlp(environment, width), _critic(SIZES[environment][0], width)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=updates)
    envs = copies(environment, count)
    # After an episode's end one step is spent on the reset: it is left out.
    seen = _tensor(envs.reset(seed=seed)[0])
    fresh = torch.zeros(count)
    for _ in range(updates):
        rows: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(length):
                spread = torch.distributions.Categorical(logits=policy(seen))
                action = spread.sample()
                after, reward, ended, cut, _ = envs.step(action.numpy())
                after = _tensor(after)
                row = (seen, action, spread.log_prob(action), critic(seen)[:, 0], critic(after)[:, 0])
                rows.append((*row, _tensor(reward) / 10, _tensor(ended), _tensor(ended | cut), 1 - fresh))
                seen, fresh = after, _tensor(ended | cut)
        states, actions, logs, values, nexts, rewards, ends, lasts, real = (
            torch.stack(column) for column in zip(*rows, strict=True)
        )
        advantages, running = torch.zeros_like(values), torch.zeros(count)
        for t in reversed(range(length)):
            surprise = rewards[t] + gamma * nexts[t] * (1 - ends[t]) - values[t]
            running = surprise + gamma * trace * (1 - lasts[t]) * running
            advantages[t] = running
            running = running * real[t]
        targets, kept = advantages + values, real.bool()
        batch = [part[kept] for part in (states, actions, logs, advantages, targets)]
        for _ in range(4):
            for index in torch.randperm(len(batch[0])).split(512):
                state, action, log, advantage, target = (part[index] for part in batch)
                spread = torch.distributions.Categorical(logits=policy(state))
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (spread.log_prob(action) - log).exp()
                gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
                loss = F.mse_loss(critic(state)[:, 0], target) - gain - 0.005 * spread.entropy().mean()
                _step(optimizer, loss, parameters, clip=0.5)
        decay.step()
    envs.close()
    return policy.eval()


def td3(
    environment: str, seed: int, *, steps: int = 12_000, warm: int = 1_000, width: int = WIDTH
) -> nn.Module:
    """Twin delayed deterministic policy gradients; rewards divided by 10."""
    torch.manual_seed(seed)
    gamma, soft, noise, batch = 0.99, 0.005, 0.1 * TORQUE, 128
    inputs, outputs = SIZES[environment]
    policy = mlp(environment, width)
    critics = nn.ModuleList(_critic(inputs + outputs, width) for _ in range(2))
    aim, aims = copy.deepcopy(policy), copy.deepcopy(critics)
    slow, fast = (torch.optim.Adam(p.parameters(), lr=1e-3) for p in (policy, critics))
    env = gymnasium.make(environment)
    store = torch.zeros(steps, 2 * inputs + outputs + 2)
    seen = _tensor(env.reset(seed=seed)[0])
    for step in range(steps):
        with torch.no_grad():
            if step < warm:
                action = TORQUE * (2 * torch.rand(outputs) - 1)
            else:
                action = (policy(seen) + noise * torch.randn(outputs)).clamp(-TORQUE, TORQUE)
        after, reward, ended, cut, _ = env.step(action.numpy())
        row = [seen, action, _tensor(after), torch.tensor([float(reward) / 10, float(ended)])]
        store[step] = torch.cat(row)
        seen = _tensor(env.reset()[0] if ended or cut else after)
        if step < warm:
            continue
        chosen = store[torch.randint(step + 1, (batch,))]
        state, act, later, gain, end = chosen.split([inputs, outputs, inputs, 1, 1], dim=1)
        with torch.no_grad():
            shake = (0.2 * TORQUE * torch.randn_like(act)).clamp(-0.5 * TORQUE, 0.5 * TORQUE)
            both = torch.cat([later, (aim(later) + shake).clamp(-TORQUE, TORQUE)], 1)
            target = gain + gamma * (1 - end) * torch.minimum(*(critic(both) for critic in aims))
        here = torch.cat([state, act], 1)
        _step(fast, sum(F.mse_loss(critic(here), target) for critic in critics))
        if step % 2 == 0:
            _step(slow, -critics[0](torch.cat([state, policy(state)], 1)).mean())
            with torch.no_grad():
                for old, new in ((aim, policy), (aims, critics)):
                    for a, b in zip(old.parameters(), new.parameters(), strict=True):
                        a.lerp_(b, soft)
    env.close()
    return policy.eval()


def _critic(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _step(optimizer: Any, loss: Any, parameters: Any = None, clip: float = 0.0) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
