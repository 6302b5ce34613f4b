"""The results as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from benches.methods import plots
from benches.methods.claims import Row, shown
from benches.methods.results import Results, got, target

CHIPS = {"met": "good", "missed": "warn", "failed": "bad", "not judged": "soft"}
TASKS = {
    "digits": "scikit-learn's 1,797 handwritten digits, accuracy pooled over five folds: every image is "
    "predicted once, by a model that never saw it.",
    "text": "A character-level decoder on the sources of Python's standard library; perplexity per character "
    "on files held out by a hash of their names.",
    "agent": "Policies trained by reinforcement learning in gymnasium; mean return over 100 seeded episodes, "
    "normalised so that a random policy has 0 and the teacher 1.",
}


def render(results: Results) -> str:
    """The whole page. Every text is escaped."""
    css = files("tautorch.compress").joinpath("page.css").read_text(encoding="utf-8")
    title = "Compression methods on real data"
    body = [f"<h1>{title}</h1>", f'<p class="lead">{escape(_summary(results))}</p>', _tiles(results)]
    body += [f"<section><h2>Claims</h2>{_table(results.rows)}</section>"]
    for task, text in TASKS.items():
        rows = [row for row in results.rows if row.task == task]
        if rows:
            figures = "".join(_figure(group) for group in _alike(rows))
            lead = f'<p class="lead">{escape(text)}</p>'
            body.append(f'<section><h2>{task}</h2>{lead}<div class="grid">{figures}</div></section>')
    body.append(_footer(results))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{css}\nh2 + .lead {{ margin-bottom: 14px; }}\n</style>\n</head>\n"
        f"<body>\n<main>{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _summary(results: Results) -> str:
    if results.quick:
        return "A few steps of each training, to see that everything runs. Nothing here is judged."
    missed = [row for row in results.rows if row.verdict == "missed"]
    judged = [row for row in results.rows if row.met is not None]
    text = (
        f"{len(judged) - len(missed)} of {len(judged)} targets met, each judged by its mean over "
        f"{len(results.seeds)} seeds."
    )
    return text + (f" Missed: {'; '.join(f'{row.task}: {row.title}' for row in missed)}." if missed else "")


def _tiles(results: Results) -> str:
    counts = {"met": 0, "missed": 0, "failed": 0}
    for row in results.rows:
        if row.verdict in counts:
            counts[row.verdict] += 1
    cells = [(str(counts["met"]), "targets met", ""), (str(counts["missed"]), "targets missed", "")]
    if counts["failed"]:
        cells.append((str(counts["failed"]), "failed to run", ""))
    cells.append(
        (f"{results.seconds / 60:.0f} min", "of processor time", "one thread each, as many workers as cores")
    )
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(more)}</small></div>"
        for value, name, more in cells
    )
    return f'<div class="tiles">{inner}</div>'


def _table(rows: list[Row]) -> str:
    head = "".join(
        f"<th>{name}</th>" for name in ("", "task", "claim", "measured", "target", "mean ± sd", "by seed")
    )
    lines = []
    for row in rows:
        seeds = ", ".join(shown(value, row.unit) for value in row.values.values())
        cells = (row.task, row.title, row.measured, target(row), got(row), row.failed or seeds)
        chip = f'<span class="chip {CHIPS[row.verdict]}">{row.verdict}</span>'
        lines.append(f"<tr><td>{chip}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _alike(rows: list[Row]) -> list[list[Row]]:
    """Rows that are made of the same figures share a plot."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and groups[-1][0].parts == row.parts and row.parts:
            groups[-1].append(row)
        elif row.parts:
            groups.append([row])
    return groups


def _figure(rows: list[Row]) -> str:
    """What the figures of these rows are made of."""
    first = rows[0]
    title = " / ".join(dict.fromkeys(row.title for row in rows))
    notes = " ".join(dict.fromkeys(row.note for row in rows if row.note))
    caption = (
        f"{first.parts_unit[0].upper()}{first.parts_unit[1:]}; each dot a seed, the bar their mean. {notes}"
    )
    head = f"<h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>"
    return f"<figure>{head}{plots.strip(first, title)}</figure>"


def _footer(results: Results) -> str:
    known = "; ".join(f"{name}: {value}" for name, value in results.environment.items())
    settings = "".join(
        f"<tr><td>{escape(f'{row.task}: {row.title}')}</td><td>{escape(_settings(row))}</td></tr>"
        for row in results.rows
    )
    return (
        f'<section><h2>Conditions</h2><p class="lead">{escape(known)}. Seeds: '
        f"{', '.join(map(str, results.seeds))}.</p><details><summary>Settings of every row</summary>"
        f'<div class="scroll"><table><tbody>{settings}</tbody></table></div></details></section>'
    )


def _settings(row: Row) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{key}={value}" for key, value in settings.items() if key != "digest")
        for name, settings in row.settings.items()
    )
