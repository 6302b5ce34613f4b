"""The task `digits`: scikit-learn's 1,797 handwritten digits, five folds, every image predicted once per
seed.

A fold's four other parts train, and it is predicted by a model that never saw it; the correct predictions of
the five folds are pooled over all 1,797 images. The seed decides the folds, the initial weights and the
order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch.demo.digits import CLASSES, Digits, ResidualBlock, shift

FOLDS = 5
IMAGES = 1797


@functools.cache
def fold(seed: int, index: int) -> Digits:
    """Fold `index` of FOLDS, stratified, standardised by its training part."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    bunch = load_digits()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    train, heldout = list(folds.split(bunch.images, bunch.target))[index]
    images = torch.tensor(bunch.images, dtype=torch.float32).div_(16).unsqueeze_(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Digits(images[train], labels[train], images[heldout], labels[heldout], float(-mean / std))


def few(data: Digits, per_class: int, seed: int) -> Digits:
    """The same fold with so many training images of each digit."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    kept = torch.cat([order[data.train_y[order] == digit][:per_class] for digit in range(CLASSES)])
    return replace(data, train_x=data.train_x[kept], train_y=data.train_y[kept])


def upscale(images: Tensor) -> Tensor:
    """8x8 images at 28x28 (bilinear), flat: [n, 784], as LeNet-300-100 takes them."""
    large = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    return large.flatten(1)


class Batches:
    """A loader of `steps` batches, reshuffled in every pass over the images; iterating twice gives the same.

    Each image is moved by up to one pixel; `prepare` is what the network takes of them. With `mixed` each is
    the weighted mean of two, by a share drawn from 0 to 1 (mixup, Zhang et al. 2017, arXiv:1710.09412), and
    so are its targets, the probabilities of the classes.
    """

    def __init__(
        self, data: Digits, *, steps: int, seed: int, batch: int = 64, mixed: bool = False,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:  # fmt: skip
        self.data, self.steps, self.seed, self.batch, self.prepare = data, steps, seed, batch, prepare
        self.mixed = mixed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            while len(order) < self.batch:
                order = torch.cat([order, torch.randperm(len(self.data.train_x), generator=generator)])
            index, order = order[: self.batch], order[self.batch :]
            images = shift(self.data.train_x[index], self.data.background, generator)
            targets = self.data.train_y[index]
            if self.mixed:
                share = torch.rand(self.batch, generator=generator)
                other = torch.randperm(self.batch, generator=generator)
                images = _between(images, images[other], share)
                one_hot = F.one_hot(targets, CLASSES).float()
                targets = _between(one_hot, one_hot[other], share)
            yield self.prepare(images), targets


def _between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """one + share (other - one), a share for each row."""
    return one + share.reshape(-1, *[1] * (one.dim() - 1)) * (other - one)


class ResNet(nn.Sequential):
    """A residual network with three stages of one block: [n, 1, 8, 8] -> logits [n, 10].

    Args:
        width: channels of the first stage; the others have two and four times as many.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )


class LeNet(nn.Sequential):
    """LeNet-300-100: [n, 784] -> logits [n, 10], 266,610 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, CLASSES)
        )


def optimizer_for(
    parameters: Any, lr: float, steps: int, weight_decay: float = 1e-2
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with one learning-rate cycle (Smith & Topin 2018)."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)


def train(model: nn.Module, loader: Batches, *, lr: float = 3e-3, smoothing: float = 0.0) -> nn.Module:
    """Train on cross-entropy; ends in eval mode."""
    optimizer, cycle = optimizer_for(model.parameters(), lr, len(loader))
    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return model.eval()


def correct(
    model: nn.Module, data: Digits, prepare: Callable[[Tensor], Tensor] = lambda images: images
) -> int:
    """How many held-out images the model gets right."""
    model.eval()
    with torch.inference_mode():
        return int((model(prepare(data.heldout_x)).argmax(1) == data.heldout_y).sum())


def steps_of(epochs: int, images: int, batch: int = 64) -> int:
    """Batches in so many epochs."""
    return math.ceil(epochs * images / batch)
