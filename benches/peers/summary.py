"""What the rows come to: geometric means, and every point that is behind."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benches.peers.results import Row

GEOMEAN_WANTED = 1.4
"""Dense int8 against the best peer at each point."""

BUSY = 1.25
"""Spread of our slices beyond which others had the cores: on an idle machine it stays below 1.1."""


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def behind(rows: list[Row]) -> list[Row]:
    """Rows whose best peer is faster, worst first."""
    return sorted((r for r in rows if r.get("ratio", 1.0) < 1.0), key=lambda r: (r["ratio"], r["case"]))


def verdicts(rows: list[Row]) -> dict[tuple[str, str], list[tuple[Row, dict[str, object]]]]:
    """Targets by (part, what was asked), with their rows."""
    found: dict[tuple[str, str], list[tuple[Row, dict[str, object]]]] = {}
    for row in rows:
        for target in row["targets"]:
            found.setdefault((row["part"], target["what"]), []).append((row, target))
    return found


def read_bandwidth(benches: dict[str, Any] | None) -> float | None:
    """The fastest read of packed weights that `make bench` found, GB/s."""
    rows = [r for r in (benches or {}).get("rows", []) if "GB_s" in r]
    return max((r["GB_s"] for r in rows), default=None)


def limit_us(row: Row, read_gb_s: float) -> float:
    """What a dense row would take with an empty call and the arithmetic or the bytes alone."""
    weights = row["k"] * row["n"]
    products, bytes_read = 2e-3 * row["m"] * weights / row["peak_gops"], 1e-3 * weights / read_gb_s
    return float(row["empty_us"] + max(products, bytes_read))


def lines(rows: list[Row]) -> list[str]:
    """The summary as text."""
    text = []
    dense = [row for row in rows if row["part"] == "dense" and "ratio" in row]
    if dense:
        mean = geomean(row["ratio"] for row in dense)
        text.append(
            f"dense: geometric mean {mean:.2f}x of the best peer at each of {len(dense)} points "
            f"(asked {GEOMEAN_WANTED}x: {'met' if mean >= GEOMEAN_WANTED else 'MISSED'})"
        )
        names = dict.fromkeys(name for row in dense for name in row["peers"])
        for name in names:
            ratios = [r["peers"][name]["ratio"] for r in dense if "ratio" in r["peers"].get(name, {})]
            if ratios:
                text.append(
                    f"  {name}: {geomean(ratios):.2f}x, least {min(ratios):.2f}x, {len(ratios)} points"
                )
    for (part, what), found in verdicts(rows).items():
        met = sum(bool(target["met"]) for _, target in found)
        text.append(f"{part}: {what}: {met} of {len(found)} met")
        for row, target in found:
            if not target["met"]:
                text.append(f"  missed  {row['case']}: {target['got']:.2f} of {target['want']:g}")
    shared = [row for row in rows if row.get("shared_slices")]
    if shared:
        text.append(f"patience ended in {len(shared)} of {len(rows)} cases: other guests worked on the cores")
    busy = sum(row["spread"] > BUSY for row in rows)
    if busy:
        text.append(
            f"{busy} of {len(rows)} cases met a busy machine (our median slice over {BUSY} times the fastest)"
        )
    return text
