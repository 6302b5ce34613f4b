"""What is claimed of Deep Compression on LeNet-300-100."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benches.methods import digits
from benches.methods import lenet_jobs as jobs
from benches.methods.claims import Claim, Results
from benches.methods.jobs import Job


def claims(seeds: Sequence[int], quick: bool) -> list[Claim]:
    """Size and error of the same files; `quick` for a few steps each."""
    training = {"epochs": 1 if quick else 60}
    settings: dict[str, Any] = {"sparsity": 0.9, "bits": 5, "prune_epochs": 60, "cluster_epochs": 20}
    if quick:
        settings |= {"prune_epochs": 1, "cluster_epochs": 1}
    found: dict[int, dict[str, Job]] = {}
    for seed in seeds:
        dense = Job("lenet-dense", jobs.dense, {"seed": seed, **training})
        deep = Job("lenet-deep", jobs.deep, {"seed": seed, **settings}, {"dense": dense})
        found[seed] = {"dense": dense, "deep": deep}
    title = "Deep Compression of LeNet-300-100"
    return [
        Claim(
            task="digits",
            title=title,
            measured="bytes of the dense float32 file over the compressed one's, all headers counted",
            relation=">=",
            bound=35.0,
            unit="×",
            jobs=found,
            value=lambda results: results["dense"]["bytes"] / results["deep"]["bytes"],
            parts=lambda results: {name: float(result["bytes"]) for name, result in results.items()},
            parts_unit="bytes",
        ),
        Claim(
            task="digits",
            title=title,
            measured="accuracy lost by the same files, loaded again",
            relation="<=",
            bound=0.001,
            unit="points",
            jobs=found,
            value=lambda results: (results["dense"]["right"] - results["deep"]["right"]) / digits.IMAGES,
            parts=_accuracies,
            parts_unit="accuracy",
        ),
    ]


def _accuracies(results: Results) -> dict[str, float]:
    return {name: result["right"] / digits.IMAGES for name, result in results.items()}
