"""What is claimed of the methods on `text`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benches.methods import text
from benches.methods import text_jobs as jobs
from benches.methods.claims import Claim, Results
from benches.methods.jobs import Job, Result

FEWER = (0.2, 0.3, 0.4)
"""Shares of the blocks' weights that a factorisation saves."""
PRUNERS = {"activation": "Wanda", "activation, refit": "Wanda, refit=20", "sparsegpt": "SparseGPT"}
WAYS = ("magnitude", *PRUNERS, "magnitude, refit")
REFIT = (
    " The fit of the kept weights is what does it: magnitude's mask with the same fit, which sees the "
    "activations too, is the bar beside."
)
OUTLIERS = (
    f"{jobs.OUTLIERS} channels of each norm are {jobs.GAIN:g} times as large, and the weights that read them "
    "so much smaller: the same function, with the outliers that large language models have."
)
EVEN = (
    "The largest norm of a channel is 2 to 6 times the median one (seed 0), far less than in large language "
    "models: little to weigh by. SparseGPT corrects the weights that stay."
)
BySeed = dict[int, dict[str, Job]]


def claims(seeds: Sequence[int], quick: bool) -> list[Claim]:
    """All claims on this task; `quick` for a few steps of smaller decoders."""
    big, small = ((32, 1), (32, 1)) if quick else (jobs.TEACHER, jobs.STUDENT)
    steps = 3 if quick else 1500
    trained: dict[str, Any] = {"digest": text.digest(), "steps": steps}
    teachers = {
        seed: Job("text-teacher", jobs.teacher, {"seed": seed, **trained, "lr": 5e-3, "shape": list(big)})
        for seed in seeds
    }

    def each(*made: tuple[str, str, Callable[..., Result], dict[str, Any]]) -> BySeed:
        """By seed, the teacher and jobs that need it: (name in the claim, name of the job, run, settings)."""
        return {
            seed: {"teacher": dense}
            | {
                key: Job(f"text-{name}", run, {"seed": seed, **settings}, {"teacher": dense})
                for key, name, run, settings in made
            }
            for seed, dense in teachers.items()
        }

    student = {"lr": 1e-2, "shape": list(small)}
    soft = {"steps": steps, **student, "temperature": 1.0, "alpha": 0.5}
    learning = each(("distilled", "distilled", jobs.distilled, soft))
    for seed, found in learning.items():
        found["alone"] = Job("text-alone", jobs.alone, {"seed": seed, **trained, **student})
    tuned = {"steps": max(3, 2 * steps // 3), "lr": 6e-3}
    return [
        Claim(
            task="text",
            title="distillation",
            measured="share of the student's gap to its teacher in perplexity that is closed",
            relation=">=",
            bound=0.25,
            unit="%",
            jobs=learning,
            value=_closed,
            parts=_perplexities,
            parts_unit="perplexity",
        ),
        *_oneshot(each),
        Claim(
            task="text",
            title="4x1 at 75 %, fine-tuned with distillation",
            measured="rise in perplexity, compiled sparse layers",
            relation="<=",
            bound=0.03,
            unit="%",
            jobs=each(
                ("trained on, float", "longer", jobs.longer, tuned),
                ("sparse", "sparse", jobs.sparse, {"sparsity": 0.75, **tuned}),
            ),
            value=_over("sparse"),
            parts=_perplexities,
            parts_unit="perplexity",
            note="Training on as long in float gains too, as the bar beside says.",
        ),
        *_quantised(each, steps),
        *_lowrank(each),
    ]


def _pruning(way: str, pattern: str, outliers: bool) -> dict[str, Any]:
    """Settings, chosen on the validation files."""
    importance, _, refitted = way.partition(", ")
    settings: dict[str, Any] = {"importance": importance, "pattern": pattern, "outliers": outliers}
    # A share of the Gram matrix's mean diagonal: great next to the other channels where some are outliers.
    settings["dampening"] = 0.001 if outliers and (refitted or way == "sparsegpt") else 0.1
    if importance == "activation" and pattern == "unstructured":
        settings["ranking"] = "local"  # the paper's, by row, did worse here
    if refitted:
        settings["refit"] = 20
    return settings


def _oneshot(each: Callable[..., BySeed]) -> list[Claim]:
    made = []
    for outliers in (False, True):
        for pattern in ("unstructured", "2:4"):
            found = each(*((way, "oneshot", jobs.oneshot, _pruning(way, pattern, outliers)) for way in WAYS))
            made += [
                Claim(
                    task="text",
                    title=f"one-shot {pattern} 50 %{', with outlier channels' if outliers else ''}: {name}",
                    measured="rise in perplexity over that of magnitude pruning",
                    relation="<=",
                    bound=0.5,
                    unit="",
                    jobs=found,
                    value=_rise(way, "magnitude"),
                    parts=_perplexities,
                    parts_unit="perplexity",
                    note=(OUTLIERS if outliers else EVEN) + (REFIT if "refit" in way else ""),
                )
                for way, name in PRUNERS.items()
            ]
    return made


def _quantised(each: Callable[..., BySeed], steps: int) -> list[Claim]:
    plain = {"outliers": False, "smooth": False}
    naive, smooth = plain | {"outliers": True}, {"outliers": True, "smooth": True}
    tuned = {"steps": max(2, steps // 10), "lr": 1e-3}
    four_bits = each(
        ("trained on, float", "longer", jobs.longer, tuned),
        ("post-training", "qat", jobs.qat, {"bits": 4, "steps": 0, "lr": 0.0}),
        ("QAT", "qat", jobs.qat, {"bits": 4, **tuned}),
    )
    return [
        Claim(
            task="text",
            title="int8 weights and activations, no training",
            measured="rise in perplexity, compiled layers",
            relation="<=",
            bound=0.005,
            unit="%",
            jobs=each(("int8", "int8", jobs.int8, plain)),
            value=_over("int8"),
            parts=_perplexities,
            parts_unit="perplexity",
        ),
        Claim(
            task="text",
            title="int8 with outlier channels: SmoothQuant",
            measured="share of the naive rise in perplexity that is recovered, compiled layers",
            relation=">=",
            bound=0.9,
            unit="%",
            jobs=each(("naive", "int8", jobs.int8, naive), ("SmoothQuant", "int8", jobs.int8, smooth)),
            value=lambda results: 1 - _rise("SmoothQuant", "naive")(results),
            parts=_perplexities,
            parts_unit="perplexity",
            note=OUTLIERS,
        ),
        *(
            Claim(
                task="text",
                title=f"4-bit weights, int8 activations: QAT{against}",
                measured=f"share of the post-training rise in perplexity that is recovered{counted}",
                relation=">=",
                bound=2 / 3,
                unit="%",
                jobs=four_bits,
                value=lambda results, base=base: 1 - _rise("QAT", "post-training", base)(results),
                parts=_perplexities,
                parts_unit="perplexity",
                note="Compiled layers. Training on alone, without quantising, is worth more than the rise.",
            )
            for base, against, counted in (
                ("teacher", "", ", what training on gains counted in"),
                ("trained on, float", " against as much training in float", ", all from that model"),
            )
        ),
    ]


def _lowrank(each: Callable[..., BySeed]) -> list[Claim]:
    return [
        Claim(
            task="text",
            title=f"whitened against plain SVD, {100 * fewer:.0f} % fewer weights",
            measured="perplexity over that of plain SVD at equal rank",
            relation="<",
            bound=1.0,
            unit="",
            jobs=each(
                *(
                    (way, "lowrank", jobs.lowrank, {"fewer": fewer, "method": way})
                    for way in ("svd", "whitened")
                )
            ),
            value=lambda results: results["whitened"]["perplexity"] / results["svd"]["perplexity"],
            parts=_perplexities,
            parts_unit="perplexity",
        )
        for fewer in FEWER
    ]


def _closed(results: Results) -> float:
    low, mine, high = (results[name]["perplexity"] for name in ("teacher", "distilled", "alone"))
    return float((high - mine) / (high - low))


def _rise(way: str, than: str, over: str = "teacher") -> Callable[[Results], float]:
    def share(results: Results) -> float:
        base = results[over]["perplexity"]
        return float((results[way]["perplexity"] - base) / (results[than]["perplexity"] - base))

    return share


def _over(way: str) -> Callable[[Results], float]:
    return lambda results: results[way]["perplexity"] / results["teacher"]["perplexity"] - 1


def _perplexities(results: Results) -> dict[str, float]:
    return {name: result["perplexity"] for name, result in results.items()}
