"""Your own model, the whole way: prune, factorise, fine-tune, compile where it pays, save, load.

Run it as it is, then put your model and your batches in the place of the two marked lines.
"""

import copy

import torch
from torch import nn

import tautorch as tt
from tautorch.compress import Report, compile_layers


def make_model() -> nn.Module:
    body = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))


def main(path: str = "my_model.safetensors") -> nn.Module:
    model = make_model().eval()  # your trained model
    batches = [torch.randn(32, 3, 16, 16) for _ in range(8)]  # what it sees: for calibration and fine-tuning

    teacher = copy.deepcopy(model)
    tt.fuse(model, batches[0])
    tt.prune.prune(model, pattern="4x1", sparsity=0.75, layers=["2"])
    tt.factorize.factorize(model, "whitened", rank=32, layers=["5"], calibration=batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    masks = tt.prune.hold_masks(model, optimizer=optimizer)
    tt.distill.Distiller(teacher, model, tt.distill.SoftTarget(alpha=0), optimizer).fit(batches, epochs=2)
    masks.remove()
    report = Report("My model")
    compile_layers(model.eval(), batches, [batches[0][:1], batches[0]], original=teacher, report=report)
    report.print()
    tt.save(model, path)
    return tt.load(path, make_model).eval()


if __name__ == "__main__":
    main()
