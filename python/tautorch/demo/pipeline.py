"""The stages of the demo, one function each, and `run`, which goes through all of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from tautorch.compress import Proportion, Report, Stage, compile_layers, describe_environment
from tautorch.compress.plan import compilable
from tautorch.demo import digits, measure, verdicts, verify
from tautorch.demo.digits import Digits, ShiftedBatches, Student, Teacher
from tautorch.distill import Distiller, SoftTarget
from tautorch.factorize import factorize
from tautorch.fuse import fuse
from tautorch.prune import Schedule
from tautorch.storage import save

PRUNED = ("features.3", "features.6")
"""The convolutions of 32 and of 64 input channels; the first one has nine weights per channel, all needed."""
WIDEST = "head.1"
TITLE = "Handwritten digits: from a teacher to a compiled student"
CALIBRATION_IMAGES = 256

Advance = Callable[..., object]
"""Called, with whatever arguments, once for each unit of work of a step."""


@dataclass(frozen=True)
class Settings:
    """What the demo can be asked to do otherwise; its promises are made for the defaults."""

    out: Path = Path("demo-out")
    seed: int = 0
    timing: bool = True
    """False: no verdicts on speed, for machines that are shared; the gate measures all the same."""
    teacher_blocks: int = 2
    teacher_epochs: int = 20
    student_epochs: int = 25
    tune_epochs: int = 20
    temperature: float = 4.0
    sparsity: float = 0.75
    rank: int = 32
    batches: tuple[int, ...] = (1, 64)
    seconds: float = 0.2
    """About how long one comparison of two layers takes; one of two models takes five times that."""


def run(settings: Settings, console: Console | None = None) -> Report:
    """Train, distil, prune, factorise, quantise, convert, save, load, judge; write and return the report.

    Writes ``compiled.safetensors``, ``expected.safetensors``, ``report.json`` and ``report.html`` to
    ``settings.out``, which is made where it does not exist.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    report = Report(TITLE, environment=describe_environment())
    with _progress(console or Console()) as progress:
        steps = _Steps(progress, report)
        data = digits.load(seed=settings.seed)
        loader = ShiftedBatches(data, seed=settings.seed)

        with steps("train the teacher", settings.teacher_epochs * len(loader)) as advance:
            teacher: nn.Module = digits.channels_last(Teacher(settings.teacher_blocks))
            digits.train_teacher(teacher, loader, epochs=settings.teacher_epochs, progress=advance)
        with steps("distil the student", settings.student_epochs * len(loader)) as advance:
            student: nn.Module = digits.channels_last(Student())
            distil(teacher, student, loader, settings, epochs=settings.student_epochs, callbacks=[advance])
        with steps("prune, factorise, fine-tune", settings.tune_epochs * len(loader)) as advance:
            compact = shrink(teacher, copy.deepcopy(student), loader, data, settings, advance)
        example = data.train_x[: max(settings.batches)]
        with steps("fold batch norms", 3) as advance:
            for model in (teacher, student, compact):
                fuse(model.eval(), example)
                advance()
        inputs = [
            data.train_x[:batch].contiguous(memory_format=torch.channels_last) for batch in settings.batches
        ]
        with steps("calibrate, convert with the gate", len(compilable(compact))) as advance:
            compiled = copy.deepcopy(compact)
            calibration = list(torch.split(data.train_x[:CALIBRATION_IMAGES], 64))
            compile_layers(
                compiled, calibration, inputs, original=student, seconds=settings.seconds, report=report,
                progress=advance,
            )  # fmt: skip
        with steps("save, load in a fresh process", 2) as advance:
            path = settings.out / "compiled.safetensors"
            reload = save_and_reload(compiled, path, settings.out / "expected.safetensors", data, advance)

        peers = {"teacher": teacher, "student": student, "compact": compact}
        report.stages = stages(peers, compiled, path, data, settings)
        if settings.timing:
            with steps("time the stages, in turns", len(peers) * len(settings.batches)) as advance:
                time_all(report, peers, compiled, data, settings, advance)
    report.checks = verdicts.judge(report, reload, timed=settings.timing)
    report.write_json(settings.out / "report.json")
    report.write_html(settings.out / "report.html")
    return report


def distil(
    teacher: nn.Module,
    student: nn.Module,
    loader: ShiftedBatches,
    settings: Settings,
    *,
    epochs: int,
    lr: float = 3e-3,
    callbacks: list[object],
) -> nn.Module:
    """Train the student on the teacher's soft targets, AdamW, one learning-rate cycle; ends in eval mode."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    loss = SoftTarget(temperature=settings.temperature, alpha=0.1)
    Distiller(
        teacher.eval(),
        student,
        loss,
        optimizer,
        scheduler=cycle,
        scheduler_interval="step",
        callbacks=callbacks,  # type: ignore[arg-type]
        progress=False,
    ).fit(loader, epochs)
    return student.eval()


def shrink(
    teacher: nn.Module,
    student: nn.Module,
    loader: ShiftedBatches,
    data: Digits,
    settings: Settings,
    advance: Advance,
) -> nn.Module:
    """Factorise the widest layer, then fine-tune under distillation, pruning through the first half of it."""
    calibration = list(torch.split(data.train_x, 64))
    factorize(student, method="whitened", rank=settings.rank, layers=[WIDEST], calibration=calibration)
    steps = settings.tune_epochs * len(loader)
    schedule = Schedule(
        student,
        settings.sparsity,
        pattern="4x1",
        kind="cubic",
        layers=PRUNED,
        end=max(1, steps // 2),
        every=max(1, steps // 40),
    )
    distil(
        teacher,
        student,
        loader,
        settings,
        epochs=settings.tune_epochs,
        lr=2e-3,
        callbacks=[schedule, advance],
    )
    schedule.remove()
    return student


def save_and_reload(
    compiled: nn.Module, path: Path, expected: Path, data: Digits, advance: Advance
) -> verify.Reload:
    """Save the model, keep what it says of the held-out images, and have a fresh process say it again."""
    save(compiled, path)
    advance()
    verify.write_expected(expected, data.heldout_x, verify.predict(compiled, data.heldout_x))
    reload = verify.in_fresh_process(path, expected)
    advance()
    return reload


def stages(
    peers: dict[str, nn.Module], compiled: nn.Module, path: Path, data: Digits, settings: Settings
) -> list[Stage]:
    """Accuracy and size of every stage, not timed yet."""
    details = {
        "teacher": "residual network of 64, 128 and 256 channels",
        "student": f"distilled with soft targets at temperature {settings.temperature:g}",
        "compact": (
            f"convolutions pruned to {settings.sparsity * 100:g} % in 4x1 blocks, {WIDEST} factorised to "
            f"rank {settings.rank}, fine-tuned under distillation"
        ),
    }
    found = [
        Stage(
            name,
            details[name],
            measure.stored_parameters(model),
            measure.float_bytes(model),
            _accuracy(model, data.heldout_x, data.heldout_y),
        )
        for name, model in peers.items()
    ]
    accuracy = _accuracy(compiled, data.heldout_x, data.heldout_y)
    detail = "int8 with static scales; each layer on a compiled kernel where that was measured to pay"
    return [*found, Stage("compiled", detail, found[-1].parameters, path.stat().st_size, accuracy)]


def time_all(
    report: Report,
    peers: dict[str, nn.Module],
    compiled: nn.Module,
    data: Digits,
    settings: Settings,
    advance: Advance,
) -> None:
    """Fill in the latencies of the report's stages and its comparisons."""
    product = (report.stages[-1].name, compiled)
    latency, report.speedups, formats = measure.time_stages(
        peers, product, data.heldout_x, settings.batches, 5 * settings.seconds, advance
    )
    report.stages = [Stage(**{**vars(stage), "latency_s": latency[stage.name]}) for stage in report.stages]
    if any(item.noisy for item in report.speedups):
        report.notes.append(
            "The machine was busy with something else: some intervals are wide, and their lower limits are "
            "taken. Run it again on a quiet one."
        )
    used = "; ".join(f"{name}: {form}" for name, form in formats.items())
    report.notes.append(
        "Every float model has its batch norms folded and runs in the memory format it is fastest in "
        f"({used}). Each is timed in turns with the compiled one, in inference mode."
    )


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> Proportion:
    images = images.contiguous(memory_format=torch.channels_last)
    return Proportion(digits.count_correct(model, images, labels), len(labels))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class _Steps:
    """Opens one bar after another, and notes in the report how long each took."""

    def __init__(self, progress: Progress, report: Report) -> None:
        self._progress, self._report = progress, report

    @contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Advance]:
        task = self._progress.add_task(name, total=total)
        start = time.perf_counter()
        yield lambda *_: self._progress.advance(task)
        took = self._report.steps_s[name] = time.perf_counter() - start
        self._progress.update(task, completed=total)
        if not self._progress.console.is_terminal:  # there are no bars in a log
            self._progress.console.print(f"{name:<34} {took:6.1f} s")
