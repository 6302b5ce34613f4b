"""Distil and prune in a training loop of your own: losses and schedules are plain callables.

A small transformer learns from a larger one, by its outputs and by where it looks, while its linear layers
become sparse in blocks. Run it as it is, then put your models, data and loop in the place of these.
"""

import torch
from torch import Tensor, nn

import tautorch as tt


class Classifier(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.read = nn.Linear(16, width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.read(x)).mean(1))


def main(steps: int = 60) -> tuple[float, float]:
    """The share of the inputs on which student and teacher agree, before and after."""
    torch.manual_seed(0)
    teacher, student = Classifier(64, 4).eval(), Classifier(32, 2)  # yours, the teacher trained
    inputs = torch.randn(512, 8, 16)
    with torch.no_grad():
        best = teacher(inputs).argmax(-1)

    def agreement() -> float:
        student.eval()
        with torch.no_grad():
            return float((student(inputs).argmax(-1) == best).float().mean())

    soft = tt.distill.SoftTarget(alpha=0.0)
    loss = tt.distill.AttentionTransfer({"encoder.self_attn": "encoder.self_attn"}, base=soft)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)
    temperature = tt.distill.TemperatureSchedule(soft, 4.0, 1.0, steps=steps)
    layers = ["encoder.linear1", "encoder.linear2"]
    pruning = tt.prune.Schedule(student, 0.5, pattern="4x1", end=steps // 2, every=5, layers=layers)

    before = agreement()
    student.train()
    with loss.attached(teacher, student):  # SoftTarget and the like need no attaching
        for step in range(steps):
            x = inputs[torch.arange(64 * step, 64 * step + 64) % 512]
            with torch.no_grad():
                told = teacher(x)
            value = loss(student(x), told, None)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            pruning.step()
            temperature.step()
            if step % 20 == 0:
                terms = ", ".join(f"{name} {float(term):.4f}" for name, term in loss.components.items())
                print(f"step {step}: loss {value.item():.4f} ({terms}), sparsity {pruning.sparsity:.2f}")
    return before, agreement()


if __name__ == "__main__":
    print("agreement with the teacher: {:.1%} before, {:.1%} after".format(*main()))
