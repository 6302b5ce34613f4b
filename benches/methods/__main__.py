"""`make methods`: every compression method on real data; one table, JSON, and a page with plots."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benches.methods import agent_claims, digits_claims, lenet_claims, page, text, text_claims
from benches.methods.claims import Claim, judge
from benches.methods.jobs import run_all
from benches.methods.results import Results, table
from rich.console import Console

from tautorch.compress.report import describe_environment

ROOT = Path(__file__).parents[2]
TASKS: dict[str, Callable[[Sequence[int], bool], list[Claim]]] = {
    "text": text_claims.claims,
    "digits": lambda seeds, quick: [*digits_claims.claims(seeds, quick), *lenet_claims.claims(seeds, quick)],
    "agent": agent_claims.claims,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a job failed; a missed target is a result, not a failure."""
    options = _options(arguments)
    console = Console()
    made = [claim for task in options.only for claim in TASKS[task](options.seeds, options.quick)]
    claims = [claim for claim in made if options.claim in f"{claim.task} {claim.title}"]
    jobs = [job for claim in claims for by_name in claim.jobs.values() for job in by_name.values()]
    outcome = run_all(
        jobs, options.cache, workers=options.workers, fresh=options.fresh, cached=options.cached,
        say=lambda line: console.print(line, style="dim", markup=False, highlight=False),
    )  # fmt: skip
    rows = [judge(claim, outcome, judged=not options.quick) for claim in claims]
    environment = {**describe_environment(), "text": text.digest(), "date": _today(), "commit": _commit()}
    del environment["threads"]  # of this process, which does nothing but wait
    results = Results(rows, list(options.seeds), outcome.seconds, environment, options.quick)
    console.print(table(results, console.width))
    whole = len(claims) == sum(len(claims_of(options.seeds, False)) for claims_of in TASKS.values())
    out = options.out or (RESULTS if whole and not options.quick else options.cache / "methods.json")
    results.write(out)
    html = options.cache / "methods.html"
    html.write_text(page.render(results), encoding="utf-8")
    console.print(f"{out} and {html}; {outcome.seconds / 60:.1f} minutes of processor time in all")
    return 1 if outcome.failed else 0


RESULTS = ROOT / "benches" / "results" / "methods.json"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.methods", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="these tasks")
    add("--claim", default="", help='claims with these words in "task title"')
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--quick", action="store_true", help="a few steps of everything, one seed, nothing judged")
    add("--fresh", action="store_true", help="compute everything anew")
    add(
        "--cached",
        action="store_true",
        help="compute nothing: report what is there; rows that lack a seed stay open",
    )
    add("--workers", type=int, default=2, help="processes of one thread each")
    add("--cache", type=Path, default=ROOT / "build" / "methods")
    add("--out", type=Path, help=f"the JSON; by default {RESULTS.relative_to(ROOT)} for a whole run")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds = options.seeds[:1]
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return options


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
