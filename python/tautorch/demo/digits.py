"""Real data for the demo, and the two networks it compresses.

The data are scikit-learn's 1,797 handwritten digits (8x8 pixels, 16 grey levels), which ship inside the
package: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998. 30 % are held out,
stratified by digit, and are used for reporting alone: nothing is chosen by them.

The teacher is a small residual network (He et al., "Deep Residual Learning for Image Recognition", CVPR
2016), the student three convolutions and a two-layer head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
SIDE = 8

Progress = Callable[[], object]
"""Called after every optimizer step."""


@dataclass(frozen=True)
class Digits:
    """The digits, split: images float32 [n, 1, 8, 8], standardised by the training part; labels int64 [n]."""

    train_x: Tensor
    train_y: Tensor
    heldout_x: Tensor
    heldout_y: Tensor
    background: float
    """Value of an empty pixel after standardising: what a shifted image is padded with."""


def load(*, heldout: float = 0.3, seed: int = 0) -> Digits:
    """Load and split the digits.

    Args:
        heldout: share of the images that is held out, in (0, 1).
        seed: decides the split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the demo needs scikit-learn; install it with: pip install 'tautorch[demo]'"
        ) from error

    bunch = load_digits()
    parts = train_test_split(
        bunch.images, bunch.target, test_size=heldout, stratify=bunch.target, random_state=seed
    )
    train_x, heldout_x = (
        torch.tensor(part, dtype=torch.float32).div_(16).unsqueeze_(1) for part in parts[:2]
    )
    train_y, heldout_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    mean, std = train_x.mean(), train_x.std()
    return Digits(
        (train_x - mean) / std, train_y, (heldout_x - mean) / std, heldout_y, background=float(-mean / std)
    )


class ShiftedBatches:
    """A loader of (images, labels): a new order, and a new shift of up to one pixel, in every epoch.

    Iterating it twice gives two different epochs; two loaders with the same seed give the same ones.

    Args:
        digits: the data, of which the training part is served.
        batch_size: images per batch; the last one may be shorter.
        seed: of the order and of the shifts.
    """

    def __init__(self, digits: Digits, batch_size: int = 64, seed: int = 0) -> None:
        self.digits = digits
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.digits.train_x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.digits.train_x), generator=self.generator)
        for index in torch.split(order, self.batch_size):
            images = shift(self.digits.train_x[index], self.digits.background, self.generator)
            yield images.contiguous(memory_format=torch.channels_last), self.digits.train_y[index]


def shift(images: Tensor, background: float, generator: torch.Generator) -> Tensor:
    """Move every image of [n, 1, 8, 8] by -1, 0 or 1 pixel in each direction, on its own."""
    count, device = len(images), images.device
    padded = F.pad(images, (1, 1, 1, 1), value=background)[:, 0]
    top, left = (torch.randint(0, 3, (count, 1), generator=generator) for _ in range(2))
    span = torch.arange(SIDE, device=device)
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, (top + span)[:, :, None], (left + span)[:, None, :]].unsqueeze(1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [n, inputs, h, w] -> [n, outputs, h/stride, w/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))  # type: ignore[no-any-return]


class Teacher(nn.Sequential):
    """Residual network with stages of 64, 128 and 256 channels: [n, 1, 8, 8] -> logits [n, 10].

    Args:
        blocks: residual blocks in each stage; two give 2.8 million parameters.
    """

    def __init__(self, blocks: int = 2) -> None:
        stem = [nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        stages: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2)):
            for block in range(blocks):
                stages.append(ResidualBlock(inputs, outputs, stride if block == 0 else 1))
                inputs = outputs
        super().__init__(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Student(nn.Module):
    """Convolutions of 32, 64 and 128 channels and a 1152-256-10 head: [n, 1, 8, 8] -> logits [n, 10].

    Args:
        batch_norm: True to train; False is the same network with each batch norm folded into the convolution
            before it, which then has a bias.
    """

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int, padding: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding, bias=not batch_norm)
            return [conv, nn.BatchNorm2d(outputs) if batch_norm else nn.Identity(), nn.ReLU()]

        # A stride in the last convolution, without padding, takes 8x8 to 3x3 and needs no pooling pass.
        self.features = nn.Sequential(*block(1, 32, 1, 1), *block(32, 64, 1, 1), *block(64, 128, 2, 0))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def train_teacher(
    model: nn.Module,
    loader: ShiftedBatches,
    *,
    epochs: int = 20,
    lr: float = 3e-3,
    progress: Progress | None = None,
) -> nn.Module:
    """Train with cross-entropy, label smoothing 0.05, AdamW and one learning-rate cycle; leaves eval mode on.

    The cycle is that of Smith & Topin, "Super-Convergence", 2018.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
            if progress is not None:
                progress()
    return model.eval()


def channels_last(model: nn.Module) -> nn.Module:
    """The model itself, its convolutions now in the layout that is the faster one on CPUs."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def count_correct(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> int:
    """How many of ``images`` the model, in the mode it is in, classifies as ``labels`` say."""
    with torch.inference_mode():
        return int((model(images).argmax(1) == labels).sum())
