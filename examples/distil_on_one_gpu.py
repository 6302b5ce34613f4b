"""Distil and prune on one GPU, or on the CPU: mixed precision, checkpoints, early stopping.

    python examples/distil_on_one_gpu.py [FOLDER]

Kill it and start it again: it goes on where it was. The log of every step is FOLDER/log.jsonl.
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tautorch as tt


def make_model(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
    )


def make_data(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :4] * x[:, 4:8]).argmax(1))


def train_teacher(teacher: nn.Module, data: TensorDataset) -> nn.Module:
    """Plain training is a Distiller without a teacher."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)

    def loss(out: Tensor, _: None, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, target)

    tt.distill.Distiller(None, teacher, loss, optimizer).fit(loader, epochs=10)
    return teacher.eval().requires_grad_(False)


def main(folder: str = "runs/one_gpu", epochs: int = 12) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    data, held_out = make_data(2048, seed=1), make_data(512, seed=2)
    teacher = train_teacher(make_model(128).to(device), data)
    student = make_model(32).to(device)

    def accuracy(model: nn.Module) -> float:
        x, y = (tensor.to(device) for tensor in held_out.tensors)
        return float((model(x).argmax(1) == y).float().mean())

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    steps = epochs * len(loader)
    schedule = tt.prune.Schedule(student, sparsity=0.5, pattern="2:4", layers=["2"], end=steps // 2, every=8)
    distiller = tt.distill.Distiller(
        teacher,
        student,
        tt.distill.SoftTarget(temperature=2.0, alpha=0.1),
        optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        scheduler_interval="step",
        amp=torch.bfloat16,
        clip_norm=1.0,
        callbacks=[schedule, tt.distill.JsonLog(f"{folder}/log.jsonl")],
    )
    history = distiller.fit(
        loader,
        epochs,
        checkpoint=folder,
        resume=True,
        checkpoint_every=50,
        evaluate=accuracy,
        keep_best=True,
        best_from=epochs // 2,  # once the pruning schedule is through
        patience=4,
    )
    found = {
        "teacher": accuracy(teacher),
        "student": accuracy(student.eval()),
        "sparsity": tt.prune.sparsity_report(student, layers=["2"]).sparsity,
        "epochs": float(len(history)),
    }
    print(found)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
