"""How a study was made, in words, and which of its settings to take or to leave."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.report import content, series, style
from muonlab.report.reading import Material
from muonlab.report.stability import Recommendation
from muonlab.report.study_content import cell_rows
from muonlab.report.tables import size

MUCH_WORSE = 0.5
"""Nats above the best from which a cell is advised against."""
NAMED = 6
"""Cells that a sentence names before it counts the rest."""


def origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was asked and from where, as (term, text)."""
    rows = [
        ("Asked", summary.get("question")),
        ("Source", summary.get("source")),
        ("Version", ": ".join(filter(None, (summary.get("version"), summary.get("note"))))),
        ("Scale", summary.get("scale")),
        *(("Note", note) for note in summary.get("notes") or ()),
    ]
    return [(term, str(text)) for term, text in rows if text]


def protocol(material: Material) -> list[tuple[str, str]]:
    """What was done and what it cost, as (term, explanation)."""
    summary, budget = material.summary, material.summary.get("budget") or {}
    cells, seeds = summary["cells"], summary["seeds"]
    groups = {group: sum(cell["group"] == group for cell in cells) for group in summary["groups"]}
    lengths = sorted({run["updates"] for cell in cells for run in cell["runs"] if run["status"] == "finished"})
    per_update = sorted({run["tokens"] // run["updates"] for run in material.runs.values() if run.get("tokens") and run["updates"]})  # fmt: skip
    axes = "; ".join(
        f"{axis['name']}: {', '.join(map(style.label, axis['values']))}" for axis in summary.get("axes") or ()
    )
    rows = [
        ("Cells", f"{len(cells)} configurations; by group: {', '.join(f'{name} {n}' for name, n in groups.items())}."),
        ("Axes", axes),
        ("Seeds", f"{style.short(list(seeds))} for each cell; a seed fixes initial weights and order of batches for all, so differences are taken by seed."),
        ("Length of a run", f"{' or '.join(style.count(n) for n in lengths)} updates of {' or '.join(style.count(n) for n in per_update)} tokens." if lengths and per_update else ""),
        ("Judged on", "the report split: next-token cross-entropy at the end of training, mean over seeds, whatever was optimised. Intervals are Student’s, 95 %."),
        ("Against the reference", f"each cell against {summary['reference']}, paired by seed, p-values corrected for their number (Holm)." if summary.get("reference") else "no cell was named: cells are ranked, not judged."),
        ("Best against best", "a group’s cell is chosen by the first seed on the tune split and judged by the other seeds on the report split." if summary.get("group_contrasts") else ""),
        ("Noise floor", content.noise_text(summary.get("noise_floor"), "cells")),
        ("Budget", f"{budget.get('finished', 0)} of {budget.get('runs', 0)} runs finished: {style.count(budget.get('updates'))} updates, {style.count(budget.get('tokens'))} tokens, {style.duration(budget.get('training_seconds'))} of training in all."),
        ("Time", "training seconds without evaluation, compilation and logging."),
    ]  # fmt: skip
    return [(term, text) for term, text in rows if text]


def setting(material: Material) -> list[tuple[str, str]]:
    """Model, data, machine and versions, as (term, value)."""
    config = (material.summary.get("setting") or {}).get("config") or {}
    model = config.get("model") or {}
    shape = [
        f"{key} {model[key]}" for key in ("d_model", "n_layers", "n_heads", "n_experts", "seq_len") if model.get(key)
    ]
    return [*([("Model", ", ".join(shape))] if shape else []), *content.setting(material)]


def recommendations(summary: Mapping[str, Any]) -> list[Recommendation]:
    """Primary (best mean loss, every seed finished), fast (least training time within DELTA nats of it), avoid (what did
    not finish, learned no more than word counts, or lost half a nat)."""
    rows = cell_rows(summary)
    sound = [row for row in rows if row["finished"] and row["finished"] == row["seeds"] and row["learned"]]
    found = []
    if sound:
        best = sound[0]
        fast = min(
            (row for row in sound if row["loss"] <= best["loss"] + series.DELTA),
            key=lambda row: row["seconds"] if math.isfinite(row["seconds"]) else math.inf,
        )
        reason = f"lowest mean loss, {style.loss(best['loss'])} nats per token over {_seeds(best)}"
        found.append(Recommendation(kind="primary", text=_described(best), reason=reason + _doubt(summary, sound)))
        if fast["cell"] != best["cell"] and fast["seconds"] < best["seconds"]:
            reason = f"{style.duration(fast['seconds'])} of training instead of {style.duration(best['seconds'])}, loss {style.loss(fast['loss'])}"
            found.append(Recommendation(kind="fast", text=_described(fast), reason=reason))
    top = sound[0]["loss"] if sound else math.nan
    avoid = {
        "did not finish on every seed": [row for row in rows if any("diverged" in text for text in row["failed"])],
        "did not get below the unigram entropy": [row for row in rows if row["finished"] and not row["learned"]],
        f"{MUCH_WORSE:g} nats or more above the best": [row for row in sound if row["loss"] >= top + MUCH_WORSE],
    }
    for reason, bad in avoid.items():
        if bad:
            found.append(Recommendation(kind="avoid", text=named([row["cell"] for row in bad]), reason=reason))
    return found


def named(names: Sequence[str]) -> str:
    """Names in a sentence: the first few, then how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def memory(value: float) -> str:
    return size(value) if math.isfinite(value) else "–"


def _described(row: Mapping[str, Any]) -> str:
    values = {key: value for key, value in row["options"].items() if not isinstance(value, dict)}
    shown = dict(list(values.items())[:NAMED])
    more = f" and {len(values) - len(shown)} more" if len(values) > len(shown) else ""
    return f"{row['cell']}{f' ({style.values_text(shown)}{more})' if shown else ''}"


def _doubt(summary: Mapping[str, Any], sound: Sequence[Mapping[str, Any]]) -> str:
    """How sure the first place is: the others within the noise floor."""
    apart = series.number((summary.get("noise_floor") or {}).get("difference"))
    if len(sound) < 2:
        return ""
    if not math.isfinite(apart):
        return "; without repeated seeds the order of close cells is open"
    # means over n seeds lie closer together than single runs do
    apart /= math.sqrt(min(row["finished"] for row in sound))
    close = [row["cell"] for row in sound[1:] if row["loss"] - sound[0]["loss"] < apart]
    return f"; within the noise of {named(close)}" if close else ""


def _seeds(row: Mapping[str, Any]) -> str:
    return f"{row['finished']} seed{'s' if row['finished'] != 1 else ''}"
