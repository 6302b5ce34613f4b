"""The task `text`: a character-level decoder on the sources of Python's own standard library.

The text is every `*.py` of the running Python's library (docstrings, comments and code), without its tests
and its generated tables. Which file is held out is said by its name alone: the first byte of the SHA-256 of
its path below `Lib`, with `/` between the parts, modulo 10 is 0. Those of 1 are for choosing settings by, all
others for training. The text differs from one Python version to the next, so `digest()` goes into every
result.
"""

from __future__ import annotations

import functools
import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Part = Literal["training", "validation", "heldout"]

CONTEXT = 128
BATCH = 8
HEAD = 32
# Tests are as long as all the rest and repeat themselves; the others are tables written by programs.
LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages"}
LEFT_OUT |= {"ensurepip", "__pycache__"}
ALPHABET = "\t\n" + "".join(map(chr, range(32, 127))) + "\x00"
"""Tab, newline, printable ASCII; the last one stands for every other character."""
SYMBOLS = len(ALPHABET)


@functools.cache
def corpus() -> dict[Part, Tensor]:
    """The text of each part as indices into `ALPHABET`, uint8, files in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[Part, list[str]] = {"training": [], "validation": [], "heldout": []}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not LEFT_OUT & set(relative.parts):
            texts[part_of(relative.as_posix())].append(path.read_text(encoding="utf-8", errors="replace"))
    table = bytes(ALPHABET.find(chr(code)) if chr(code) in ALPHABET else SYMBOLS - 1 for code in range(256))
    parts: dict[Part, Tensor] = {}
    for part, files in texts.items():
        plain = "\n".join(files).encode("latin-1", errors="replace").translate(table)
        parts[part] = torch.frombuffer(bytearray(plain), dtype=torch.uint8)
    return parts


def part_of(path: str) -> Part:
    """Which part the file of this path below Lib belongs to."""
    first = hashlib.sha256(path.encode()).digest()[0] % 10
    return "heldout" if first == 0 else "validation" if first == 1 else "training"


@functools.cache
def digest() -> str:
    """What the text is: the Python version, its characters, and a hash of them."""
    parts = corpus()
    sha = hashlib.sha256(b"".join(parts[part].numpy().tobytes() for part in sorted(parts)))
    sizes = ", ".join(f"{len(parts[part]):,} {part}" for part in parts)
    return f"Python {platform.python_version()}: {sizes} characters, sha256 {sha.hexdigest()[:12]}"


class Windows:
    """A loader of `steps` batches of (input, next characters), int64 [BATCH, CONTEXT], at random places.

    Iterating it twice gives the same batches twice: one epoch is one training.
    """

    def __init__(self, steps: int, seed: int, part: Part = "training") -> None:
        self.text, self.steps, self.seed = corpus()[part], steps, seed

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            starts = torch.randint(len(self.text) - CONTEXT, (BATCH, 1), generator=generator)
            window = self.text[starts + torch.arange(CONTEXT + 1)].long()
            yield window[:, :-1], window[:, 1:]


def calibration(batches: int = 8, seed: int = 1000) -> list[Tensor]:
    """Inputs from the training files that no training begins with."""
    return [x for x, _ in Windows(batches, seed)]


def perplexity(model: nn.Module, windows: int = 256, part: Part = "heldout") -> float:
    """exp of the mean negative log-likelihood per character, over evenly spaced windows."""
    text = corpus()[part]
    starts = torch.linspace(0, len(text) - CONTEXT - 1, windows).long()[:, None]
    window = text[starts + torch.arange(CONTEXT + 1)].long()
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for part_of_it in torch.split(window, 32):
            logits = model(part_of_it[:, :-1]).double()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), part_of_it[:, 1:].flatten(), reduction="sum")
            )
    return math.exp(total / (windows * CONTEXT))


class Block(nn.Module):
    """Pre-norm attention and MLP: [B, T, width] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * width, width)
        angle = torch.arange(CONTEXT)[:, None] * 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        turn = self.turn[:, :length]
        seen = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.act(self.up(self.norm2(x))))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of [B, heads, T, HEAD]."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = turn
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Decoder(nn.Module):
    """A decoder of `depth` blocks: int64 [B, T <= CONTEXT] -> logits [B, T, SYMBOLS]."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, SYMBOLS)
        for name, parameter in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() == 2:
                # The sum over the blocks starts at the scale of one.
                share = 1 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=share / math.sqrt(parameter.shape[1]))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


BLOCKS = ["blocks.*"]
"""The layers that are compressed: all of the blocks', as is usual for language models; not the head."""


def optimizer_for(
    parameters: Any, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and a tenth of linear warm-up before a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(model: nn.Module, *, steps: int, lr: float, seed: int) -> nn.Module:
    """Train on cross-entropy; ends in eval mode."""
    optimizer, cycle = optimizer_for(model.parameters(), lr, steps)
    model.train()
    for x, y in Windows(steps, seed):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cycle.step()
    return model.eval()
