"""What is claimed of the methods on `agent`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benches.methods import agent
from benches.methods import agent_jobs as jobs
from benches.methods.claims import Claim, Results
from benches.methods.jobs import Job


def claims(seeds: Sequence[int], quick: bool) -> list[Claim]:
    """All claims on this task; `quick` for a few steps each."""
    return [
        claim
        for environment in agent.ENVIRONMENTS
        for claim in _of(environment, _jobs(environment, seeds, quick))
    ]


def _jobs(environment: str, seeds: Sequence[int], quick: bool) -> dict[int, dict[str, Job]]:
    size: dict[str, Any] = {"sparsity": 0.5, "rounds": 10, "steps": 2000, "epochs": 3}
    training: dict[str, Any] = {}
    if quick:
        size |= {"rounds": 2, "steps": 50, "epochs": 1}
        training = {"updates": 1} if agent.DISCRETE[environment] else {"steps": 60, "warm": 40}
        training["width"] = 16
    found = {}
    for seed in seeds:
        common = {"seed": seed, "environment": environment}
        name = f"agent-{environment.partition('-')[0].lower()}"
        teacher = Job(f"{name}-teacher", jobs.teacher, common | training)
        student = Job(f"{name}-student", jobs.student, common | size, {"teacher": teacher})
        both = {"teacher": teacher, "student": student}
        seconds = 0.05 if quick else 1.0
        speed = Job(f"{name}-speed", jobs.speed, common | {"seconds": seconds}, both, exclusive=True)
        found[seed] = both | {"speed": speed}
    return found


def _of(environment: str, found: dict[int, dict[str, Job]]) -> list[Claim]:
    title = f"{environment}: distilled (DAgger), 4x1 pruned, int8"
    return [
        Claim(
            task="agent",
            title=title,
            measured="normalised return of 100 episodes, compiled layers",
            relation=">=",
            bound=0.99,
            unit="",
            jobs=found,
            value=normalised,
            parts=lambda results: {
                "teacher": 1.0,
                "student, float": normalised(results, "float_return"),
                "compiled": normalised(results),
            },
            parts_unit="normalised return",
        ),
        Claim(
            task="agent",
            title=title,
            measured="bytes of the teacher's file over the compiled one's",
            relation=">=",
            bound=5.0,
            unit="×",
            jobs=found,
            value=lambda results: results["teacher"]["bytes"] / results["student"]["bytes"],
            parts=lambda results: {
                "teacher": results["teacher"]["bytes"],
                "compiled": results["student"]["bytes"],
            },
            parts_unit="bytes",
        ),
        Claim(
            task="agent",
            title=title,
            measured="the teacher's time per action over the compiled one's",
            relation=">",
            bound=1.0,
            unit="×",
            jobs=found,
            value=lambda results: results["speed"]["ratio"],
            parts=lambda results: {
                "teacher": results["speed"]["teacher_us"],
                "compiled": results["speed"]["student_us"],
            },
            parts_unit="us per action",
        ),
    ]


def normalised(results: Results, key: str = "return") -> float:
    """0 for a random policy's mean return, 1 for the teacher's."""
    low, high = results["teacher"]["random"], results["teacher"]["return"]
    return float((results["student"][key] - low) / (high - low))
