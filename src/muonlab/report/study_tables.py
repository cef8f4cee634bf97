"""What a study found, for the terminal. Names and messages are shown as they are: nothing in them is read as markup."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from muonlab.report import content as general
from muonlab.report import series, study_axes, style
from muonlab.report import study_content as content
from muonlab.report.study_text import memory, recommendations
from muonlab.report.tables import VERDICT_STYLES, add_row, new_table

MOST = 40
"""Rows of a table in the terminal; all of them are in runs.csv and on the page."""


FAR = 16.0
"""Factor beyond the values tried from which an end of an interval is no number any more."""


def study_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Cells, published numbers, good ranges, targets, problems, advice, and the verdicts last, in words."""
    yield cells_table(summary)
    if published := content.published_rows(summary):
        yield published_table(published)
        if note := content.published_note(summary):
            yield Text(f"! {note}", style="yellow")
    if lines := [line for line in study_axes.sweeps(summary) if line.found]:
        yield sensitivity_table(lines)
    if targets := content.target_rows(summary):
        yield targets_table(targets)
    if speedups := content.speedup_rows(summary):
        yield speedups_table(speedups)
        yield Text(content.speedup_note(summary))
    problems = [f"{entry['directory']}: {entry['message']}" for entry in summary.get("problems") or ()]
    stale = [f"{name}: belongs to no cell of the study as it is now" for name in summary.get("stale") or ()]
    for text in _first([*problems, *stale]):
        yield Text(f"! {text}", style="red")
    for text in _first(list(summary.get("flags") or ())):
        yield Text(f"! {text}", style="yellow")
    if noise := general.noise_text(summary.get("noise_floor"), "cells"):
        yield Text(f"noise floor: {noise}")
    for entry in recommendations(summary):
        yield Text(f"{entry.kind}: {entry.text}: {entry.reason}")
    for answer in content.answers(summary):
        verdict = answer.get("verdict") or {}
        words = verdict.get("sentence") or " ".join([answer["headline"], *answer["facts"]])
        yield Text(words, style=VERDICT_STYLES.get(answer["word"], "bold"))


def cells_table(summary: Mapping[str, Any]) -> Table:
    """Every cell, best first: loss on the report split with its 95 % interval, and what it cost."""
    result = new_table(
        str(summary.get("title") or summary["name"]),
        ["", "cell", "loss", "95 % ±", "bits/byte", "accuracy", "training", "memory", "finished", "spikes"],
    )
    rows = content.cell_rows(summary)
    for entry in rows[:MOST]:
        name = entry["cell"] + (" (reference)" if entry["reference"] else "")
        state = f"{entry['finished']} of {entry['seeds']}" + ("" if entry["learned"] else ", learned nothing")
        add_row(
            result, entry["rank"] or "–", name, style.loss(entry["loss"]), style.loss(entry["half"]),
            style.loss(entry["bits_per_byte"]), percent(entry["accuracy"]), style.duration(entry["seconds"]),
            memory(entry["memory"]), state, style.short(entry["spikes"]),
        )  # fmt: skip
    if len(rows) > MOST:
        add_row(result, "", f"and {len(rows) - MOST} more", *[""] * 8)
    return result


def published_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The source's numbers beside ours."""
    has_best = any("best_loss" in entry["published"] for entry in rows)
    columns = ["cell", "published", "rank", "ours", "rank", "ours − published"]
    result = new_table("published beside ours", columns + ["best, published", "best, ours"] * has_best)
    for entry in rows[:MOST]:
        ours = style.loss(entry["loss"]) + (f" ± {style.loss(entry['half'])}" if math.isfinite(entry["half"]) else "")
        published = style.loss(entry["published"].get("loss"))
        ranks = [str(entry[key] or "–") for key in ("published_rank", "our_rank")]
        best = [style.loss(entry["published"].get("best_loss")), style.loss(entry["best_loss"])] * has_best
        add_row(result, entry["cell"], published, ranks[0], ours, ranks[1], style.signed(entry["difference"]), *best)
    return result


def sensitivity_table(lines: Sequence[study_axes.Sweep]) -> Table:
    """The good range of every logarithmic axis, a row for each group and setting of the other axes."""
    result = new_table(f"good ranges (within {series.DELTA} nats)", ["axis", "line", "best", "from", "to", "octaves", "fitted optimum"])  # fmt: skip
    for line in lines[:MOST]:
        found, (low, high, least) = line.found or {}, bounds(line)
        add_row(result, line.axis, line.label, style.label(found["best"]), low, high, f"{least}{found['octaves']:.1f}", optimum(line))  # fmt: skip
    return result


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each cell needed to reach each target: the median over seeds."""
    result = new_table(
        "to a target (median over seeds)",
        ["cell", "target", "updates", "tokens", "training", "reached", "data speed-up"],
    )
    for entry in rows[:MOST]:
        cost = [style.count(entry["updates"]), style.count(entry["tokens"]), style.duration(entry["seconds"])]
        add_row(
            result,
            entry["cell"],
            entry["target"],
            *(x if x != "–" else "never" for x in cost),
            entry["reached"],
            style.short(entry["data_speedup"], 3),
        )
    if len(rows) > MOST:
        add_row(result, f"and {len(rows) - MOST} more", *[""] * 6)
    return result


def speedups_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """D_eff/D by a fitted power law, a row for each group and length of training."""
    result = new_table("data speed-up (D_eff/D, fitted)", ["group", "tokens", "best cell", "loss", "speed-up"])
    for entry in rows[:MOST]:
        add_row(result, entry["group"], style.count(entry["tokens"]), entry["cell"], style.loss(entry["loss"]), entry["text"])  # fmt: skip
    return result


def versions_table(summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Several studies side by side, as the versions of one: a row for each cell, a column for each (label, summary)."""
    result = new_table("side by side: loss, mean ± half of its 95 % interval", ["cell", "published", *(label for label, _ in summaries)])  # fmt: skip
    columns = [{entry["cell"]: entry for entry in content.cell_rows(summary)} for _, summary in summaries]
    published = {c["cell"]: c["published"] for _, s in summaries for c in s["cells"] if c.get("published")}
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = []
        for column in columns:
            entry = column.get(name)
            half = f" ± {style.loss(entry['half'])}" if entry and math.isfinite(entry["half"]) else ""
            cells.append(style.loss(entry["loss"]) + half if entry else "not in it")
        add_row(result, name, style.loss((published.get(name) or {}).get("loss")), *cells)
    return result


def bounds(line: study_axes.Sweep) -> tuple[str, str, str]:
    """The ends of a good range and, where it is open, the sign before its width."""
    found = line.found or {}
    low = ("≤ " if found["open_low"] else "") + style.short(found["low"], 3)
    high = ("≥ " if found["open_high"] else "") + style.short(found["high"], 3)
    return low, high, "≥ " if found["open_low"] or found["open_high"] else ""


def optimum(line: study_axes.Sweep) -> str:
    """The vertex of the parabola with its interval, and whether it lies outside of what was tried.

    An end of the interval that lies further than FAR from everything tried says only that there is no end on that side.
    """
    fit = (line.found or {}).get("optimum")
    if not fit:
        return "–"
    first, last = line.points[0]["x"], line.points[-1]["x"]
    low, high = (series.number(bound) for bound in fit.get("interval") or (None, None))
    below, above = low >= first / FAR, high <= last * FAR
    ends = (style.short(low, 2), style.short(high, 2))
    within = f" ({ends[0]} to {ends[1]})" if below and above else f" (above {ends[0]})" if below else f" (below {ends[1]})" if above else ""  # fmt: skip
    text = style.short(float(fit["lr"]), 3) + within
    return text if first <= fit["lr"] <= last else f"{text}, beyond what was tried"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def _first(texts: list[str], count: int = 12) -> list[str]:
    more = len(texts) - count
    return texts[:count] + ([f"and {more} more: see report.html"] if more > 0 else [])
