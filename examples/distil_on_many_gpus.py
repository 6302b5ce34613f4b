"""Distil, prune and calibrate on many GPUs, or on the CPU with several processes.

    torchrun --nproc-per-node=2 examples/distil_on_many_gpus.py [FOLDER] [--fsdp]

One process per GPU (NCCL); without GPUs the processes share the CPU (gloo). With --fsdp the student's weights
are spread over the ranks, otherwise each has them all (DDP). Both write the same checkpoints, which one
process reads as well. With `--max-restarts=3` torchrun starts all ranks again when one dies, and at most 20
steps are lost; with torch 2.13 and gloo that needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment.
"""

import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import tautorch as tt

BATCH = 64  # over all ranks


def make_model(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
    )


def make_data(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :4] * x[:, 4:8]).argmax(1))


def wrap(student: nn.Module, fsdp: bool) -> nn.Module:
    if not fsdp:
        return DistributedDataParallel(student)
    for layer in student.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(student)
    return student


def main(folder: str = "runs/many_gpus", fsdp: bool = False, epochs: int = 6) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on every rank
    data, held_out = make_data(2048, seed=1), make_data(512, seed=2)
    teacher = make_model(128).to(device).eval()  # your trained model
    student = make_model(32).to(device)
    wrapped = wrap(student, fsdp)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)  # after wrapping: FSDP2 makes new parameters

    sampler = DistributedSampler(data, ranks, rank, shuffle=True)
    loader = DataLoader(data, batch_size=BATCH // ranks, sampler=sampler)
    # Statistics are summed over the ranks: each calibrates on its own share, and all get the same masks.
    share = [held_out.tensors[0][rank::ranks]]
    schedule = tt.prune.Schedule(
        student, sparsity=0.5, importance="activation", layers=["2"], calibration=share, end=60, every=10
    )
    distiller = tt.distill.Distiller(
        teacher,
        wrapped,
        tt.distill.SoftTarget(temperature=2.0, alpha=0),
        optimizer,
        clip_norm=1.0,
        callbacks=[schedule, tt.distill.JsonLog(f"{folder}/log.jsonl")],
    )

    def agreement(model: nn.Module) -> float:
        x = share[0].to(device)
        return float((model(x).argmax(1) == teacher(x).argmax(1)).float().mean())

    distiller.fit(
        loader,
        epochs,
        checkpoint=folder,
        resume=True,
        checkpoint_every=20,
        evaluate=agreement,
        keep_best=True,
    )
    scales = tt.quantize.calibrate(student, share, observer="mse")
    whole = {name: tt.distributed.full_tensor(value) for name, value in student.state_dict().items()}
    if rank == 0:
        torch.save(
            {"student": whole, "input_scales": {k: q.scale for k, q in scales.items()}}, f"{folder}/end.pt"
        )
        print(
            f"agrees with the teacher on {distiller.best['score']:.1%} of held-out rows"
            if distiller.best
            else ""
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--fsdp"]
    main(*arguments, fsdp="--fsdp" in sys.argv)
