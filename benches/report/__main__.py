"""`make bench-report`: docs/performance.md and its plots from the committed results. Times nothing."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benches.report import page
from benches.report.plots import PLOTS

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = "-peers.json"


def report(results: Path, docs: Path) -> list[Path]:
    """Write `docs`/performance.md and `docs`/performance/<machine>/<plot>.svg; returns what was written.

    Raises:
        FileNotFoundError: no results of `make bench-peers` in the folder.
    """
    files = sorted(results.glob(f"*{SUFFIX}"))
    if not files:
        raise FileNotFoundError(f"no *{SUFFIX} in {results}: `make bench-peers` writes one")
    shutil.rmtree(docs / "performance", ignore_errors=True)
    written, sections = [], [page.HEAD]
    for file in files:
        kept = json.loads(file.read_text())
        name = file.name.removesuffix(SUFFIX)
        plots = {}
        for plot, draw in PLOTS.items():
            svg = draw(kept["rows"])
            if svg is not None:
                path = docs / "performance" / name / f"{plot}.svg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(svg)
                plots[plot] = path.relative_to(docs).as_posix()
                written.append(path)
        bench = file.with_name(f"{name}.json")
        sections.append(page.machine(kept, json.loads(bench.read_text()) if bench.exists() else None, plots))
    path = docs / "performance.md"
    path.write_text("\n".join(sections).rstrip() + "\n")
    return [path, *written]


def main() -> int:
    parser = argparse.ArgumentParser(
        "make bench-report", description="The performance page from results files."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    try:
        for path in report(options.results, options.docs):
            print(path)
    except FileNotFoundError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
