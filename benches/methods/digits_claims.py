"""What is claimed of the methods on `digits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benches.methods import digits
from benches.methods import digits_jobs as jobs
from benches.methods.claims import Claim, Results
from benches.methods.jobs import Job, Result

FEW = 10
"""Labelled images of each digit that a student has."""
FEW_NOTE = (
    "The teacher had all labels of its fold; the student alone has the labelled images. Mixed: means of two "
    "images (mixup), as in function matching (Beyer et al. 2021, arXiv:2106.05237)."
)
BySeed = dict[int, dict[str, Job]]


def claims(seeds: Sequence[int], quick: bool) -> list[Claim]:
    """All claims on this task; `quick` for a few steps each."""
    epochs, steps = (1, 4) if quick else (20, 400)
    dense = {
        seed: Job(
            "digits-teacher", jobs.teacher, {"seed": seed, "width": 8 if quick else 24, "epochs": epochs}
        )
        for seed in seeds
    }

    def each(*made: tuple[str, str, Callable[..., Result], dict[str, Any]]) -> BySeed:
        """By seed, the teacher and jobs that need it: (name in the claim, name of the job, run, settings)."""
        return {
            seed: {"teacher": teacher}
            | {
                key: Job(f"digits-{name}", run, {"seed": seed, **settings}, {"teacher": teacher})
                for key, name, run, settings in made
            }
            for seed, teacher in dense.items()
        }

    few = {"steps": steps, "per_class": FEW}
    alone = {seed: Job("digits-alone", jobs.alone, {"seed": seed, **few}) for seed in seeds}
    soft = {"steps": steps, "temperature": 4.0}
    learning = each(
        ("distilled", "distilled", jobs.distilled, {**soft, "per_class": 0}),
        ("distilled on the few images", "distilled", jobs.distilled, {**soft, "per_class": FEW}),
        (
            "distilled on mixed few images",
            "distilled",
            jobs.distilled,
            {**soft, "per_class": FEW, "mixed": True},
        ),
    )
    for seed, found in learning.items():
        found["alone"] = alone[seed]
        found["alone, mixed images"] = Job("digits-alone", jobs.alone, {"seed": seed, **few, "mixed": True})
    together = {
        seed: {
            "alone": alone[seed],
            "mutual": Job("digits-mutual", jobs.mutual, {"seed": seed, **few}),
        }
        for seed in seeds
    }
    tuned = {"sparsity": 0.75, "epochs": max(2, epochs // 2)}
    return [
        *(
            Claim(
                task="digits",
                title=f"distillation, {FEW} labels a class: {images}",
                measured="share of the gap between the student alone and its teacher that is closed",
                relation=">=",
                bound=0.5,
                unit="%",
                jobs=learning,
                value=_closed(way),
                parts=_accuracies,
                parts_unit="accuracy",
                note=FEW_NOTE,
            )
            for way, images in (
                ("distilled", "the teacher labels the other images of the fold"),
                ("distilled on the few images", "no images but the labelled ones"),
                (
                    "distilled on mixed few images",
                    "the labelled images, mixed, and the teacher labels the mixtures",
                ),
            )
        ),
        Claim(
            task="digits",
            title=f"mutual learning of two students, {FEW} labels a class",
            measured="accuracy gained by the mean of the two over the same student alone",
            relation=">",
            bound=0.0,
            unit="points",
            jobs=together,
            value=lambda results: _accuracy(results["mutual"]) - _accuracy(results["alone"]),
            parts=_accuracies,
            parts_unit="accuracy",
        ),
        Claim(
            task="digits",
            title="4x1 at 75 %, fine-tuned with distillation",
            measured="accuracy lost, compiled sparse layers",
            relation="<=",
            bound=0.005,
            unit="points",
            jobs=each(("sparse", "sparse", jobs.sparse, tuned)),
            value=_lost("sparse"),
            parts=_accuracies,
            parts_unit="accuracy",
        ),
        Claim(
            task="digits",
            title="int8 weights and activations, static, no training",
            measured="accuracy lost, compiled layers",
            relation="<=",
            bound=0.002,
            unit="points",
            jobs=each(("int8", "int8", jobs.int8, {})),
            value=_lost("int8"),
            parts=_accuracies,
            parts_unit="accuracy",
        ),
    ]


def _closed(way: str) -> Callable[[Results], float]:
    def share(results: Results) -> float:
        low, mine, high = (_accuracy(results[name]) for name in ("alone", way, "teacher"))
        return (mine - low) / (high - low)

    return share


def _lost(way: str) -> Callable[[Results], float]:
    return lambda results: _accuracy(results["teacher"]) - _accuracy(results[way])


def _accuracies(results: Results) -> dict[str, float]:
    return {name: _accuracy(result) for name, result in results.items()}


def _accuracy(result: Result) -> float:
    """Pooled over the folds."""
    return float(result["right"] / digits.IMAGES)
