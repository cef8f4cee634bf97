"""What a report says about a study, as plain values: page, card, tables and figures all take it from here."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from muonlab.report import content, series, style
from muonlab.report.differences import differing, routing_rules
from muonlab.report.reading import MISSING, Material, runs_of

CARDS = 3
"""Verdicts that get a card each; more become one sentence and a table."""
RUN_KEYS = ("message", "report_cross_entropy", "tune_cross_entropy", "updates", "seconds", "spikes", "plateaus")
"""What the record of a run that was never made lacks."""
WORD = {"better": "better", "worse": "worse", "not distinguishable": "cannot be told apart"}


def axes_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The axes by name: groups may have axes of one name with values of their own, which are one here."""
    merged: dict[str, dict[str, Any]] = {}
    for axis in summary.get("axes") or ():
        known = merged.setdefault(axis["name"], {**axis, "values": []})
        known["log"] = bool(known.get("log") or axis.get("log"))
        known["values"] += axis["values"]
    return [{**axis, "values": series.ordered(axis["values"])} for axis in merged.values()]


def cell_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every cell with the means over its finished runs and what it cost, best first, those without a loss last.

    Losses in nats per token; `gain` is what lies between the loss and the unigram entropy, which counting words reaches.
    """
    entropy = series.number((summary.get("gate") or {}).get("unigram_entropy"))
    passed = (summary.get("gate") or {}).get("passed") or {}
    rows = []
    for cell in summary["cells"]:
        done = [run for run in cell["runs"] if run["status"] == "finished"]
        loss, seconds = series.number(cell.get("mean")), mean(done, "seconds")
        memory = max((series.number(run.get("peak_memory_bytes")) for run in done), default=math.nan)
        gain = entropy - loss if entropy - loss > 0 else math.nan
        low, high = (series.number(bound) for bound in cell.get("interval") or (None, None))
        rows.append(
            {
                "cell": cell["cell"],
                "group": cell["group"],
                "case": cell.get("case") or "",
                "values": {name: series.hashable(value) for name, value in cell["values"].items()},
                "options": cell.get("options") or {},
                "rank": cell.get("rank"),
                "loss": loss,
                "sd": series.number(cell.get("sd")),
                "half": (high - low) / 2,
                "interval": (low, high),
                "best_loss": mean(done, "best_report_cross_entropy"),
                "losses": [series.number(run.get("report_cross_entropy")) for run in done],
                "finished": len(done),
                "seeds": len(cell["runs"]),
                **{key: mean(done, key) for key in ("bits_per_byte", "perplexity", "accuracy", "updates_per_second")},
                "seconds": seconds,
                "memory": memory,
                "spikes": total(done, "spikes"),
                "plateaus": total(done, "plateaus"),
                "gain": gain,
                "per_minute": 60 * gain / seconds if seconds > 0 else math.nan,
                "per_gigabyte": 1e9 * gain / memory if memory > 0 else math.nan,
                "failed": [
                    f"seed {run['seed']}: {run['status']}" for run in cell["runs"] if run["status"] != "finished"
                ],
                "learned": bool(passed.get(cell["cell"], True)),
                "reference": cell["cell"] == summary.get("reference"),
            }
        )
    return sorted(rows, key=lambda row: (row["rank"] is None, row["rank"] or 0))


def answers(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdicts as cards: best cell against best cell of the groups, and the cells against the reference."""
    found = []
    groups = summary.get("group_contrasts") or ()
    for verdict in groups:
        card = content.answer(verdict, family=len(groups))
        chosen = verdict.get("chosen") or {}
        picks = " against ".join(f"{chosen.get(name, '?')}" for name in (verdict["candidate"], verdict["reference"]))
        card["facts"].insert(0, f"Best cell against best cell: {picks}, chosen by the first seed on the tune split, judged by the others.")  # fmt: skip
        found.append({**card, "verdict": verdict})
    contrasts = summary.get("contrasts") or ()
    groups_of = {cell["cell"]: cell["group"] for cell in summary["cells"]}
    if 0 < len(contrasts) <= CARDS:
        for verdict in contrasts:
            card = content.answer(verdict, family=len(contrasts))
            found.append({**card, "group": groups_of.get(verdict["candidate"]), "verdict": verdict})
    elif contrasts:
        found.append(_tally(summary, contrasts))
    if not found:
        reference = summary.get("reference")
        reason = (
            f"No cell shares a finished seed with {reference}."
            if reference
            else "The study names no reference: its cells are ranked, not judged."
        )
        found.append({**content.no_answer(reason), "verdict": None})
    return found


def _tally(summary: Mapping[str, Any], contrasts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Many verdicts in one sentence."""
    counts = {word: sum(v.get("verdict") == word for v in contrasts) for word in WORD}
    reference = summary["reference"]
    parts = []
    for word, count in counts.items():
        if count:
            verb = "" if word == "not distinguishable" else "is " if count == 1 else "are "
            parts.append(f"{count} {verb}{WORD[word]}")
    word = next((word for word in ("better", "worse") if counts[word] == len(contrasts)), "not distinguishable")
    best = min(contrasts, key=lambda v: series.number(v.get("mean")) if v.get("mean") is not None else math.inf)
    facts = [f"Largest gain: {best.get('sentence') or best['candidate']}."]
    return {
        **content.no_answer(""),
        "word": f"{len(contrasts)} verdicts",
        "color": style.VERDICT_COLORS[word] if counts[word] == len(contrasts) else style.MUTED,
        "headline": f"Of {len(contrasts)} cells against {reference}: {', '.join(parts)}.",
        "facts": [*facts, "Corrected for their number (Holm); each of them stands in the table below."],
        "verdict": None,
    }


def contrast_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every cell against the reference, largest gain first, with its place on one common scale (`strip`)."""
    contrasts = list(summary.get("contrasts") or ())
    groups = {cell["cell"]: cell["group"] for cell in summary["cells"]}
    rows = [
        {
            **verdict,
            "cell": verdict["candidate"],
            "group": groups.get(verdict["candidate"], ""),
            "color": style.VERDICT_COLORS.get(verdict.get("verdict") or "", style.MUTED),
            "alone": _alone(verdict),
            "strip": strip,
        }
        for verdict, strip in zip(contrasts, content.strips(contrasts))
    ]
    return sorted(rows, key=lambda row: series.number(row["mean"]) if row["mean"] is not None else math.inf)


def _alone(verdict: Mapping[str, Any]) -> str | None:
    """What the interval alone would say where the correction for many comparisons leaves the verdict open."""
    low, high = (series.number(bound) for bound in verdict.get("interval") or (None, None))
    if verdict.get("verdict") != "not distinguishable":
        return None
    return "better" if high < 0 else "worse" if low > 0 else None


def published_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cells with published numbers beside ours; `difference` (ours − published) only where the numbers belong to what ran."""
    ours = {row["cell"]: row for row in cell_rows(summary)}
    cells = [cell for cell in summary["cells"] if cell.get("published")]
    theirs = sorted(x for c in cells if math.isfinite(x := series.number(c["published"].get("loss"))))
    mine = sorted(x for c in cells if math.isfinite(x := ours[c["cell"]]["loss"]))
    rows = []
    for cell in cells:
        row, published = ours[cell["cell"]], {key: series.number(value) for key, value in cell["published"].items()}
        loss = published.get("loss", math.nan)
        rows.append(
            {
                **row,
                "published": published,
                "applies": bool(cell.get("published_applies")),
                "difference": row["loss"] - loss if cell.get("published_applies") else math.nan,
                "published_rank": theirs.index(loss) + 1 if loss in theirs else None,
                "our_rank": mine.index(row["loss"]) + 1 if row["loss"] in mine else None,
                "minutes": row["seconds"] / 60,
                "memory_gb": row["memory"] / 1e9,
            }
        )
    return sorted(rows, key=lambda row: (row["published_rank"] is None, row["published_rank"] or 0))


def published_note(summary: Mapping[str, Any]) -> str:
    """Why published numbers may or may not be held against ours."""
    cells = [cell for cell in summary["cells"] if cell.get("published")]
    if not cells or all(cell.get("published_applies") for cell in cells):
        return ""
    if summary.get("scale") not in (None, "full"):
        return f"This is the scale {summary['scale']}: another model and other data than the source’s, so only the order of cells can be compared, not the losses."
    return f"The published numbers belong to another version than {summary.get('version')}: the source’s code did something else."


def cell_curves(material: Material) -> tuple[str, dict[str, series.Curve]]:
    """The split whose curves are drawn, and for each cell with a finished run its curve over seeds."""
    split = series.judged_split(list(material.runs.values()))
    found = {cell["cell"]: series.mean_curve(runs_of(material, cell), split) for cell in material.summary["cells"]}
    return split, {name: curve for name, curve in found.items() if curve}


def target_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each cell needed to reach each target, the quickest first, with its group."""
    groups = {cell["cell"]: cell["group"] for cell in summary["cells"]}
    rows = [
        {**row, "group": groups.get(row["cell"], ""), "data_speedup": row.get("data_speedup")}
        for row in summary.get("to_target") or ()
    ]
    order = list(dict.fromkeys(row["target"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["target"]), series.number(row["updates"]) if row["updates"] is not None else math.inf))  # fmt: skip


def speedup_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """D_eff/D by the power law through the reference group's losses, as text; none with fewer than three lengths."""
    return [
        {**row, "text": style.short(row["speedup"], 3) if row["speedup"] is not None else "beyond its floor"}
        for row in (summary.get("data_speedup") or {}).get("rows", ())
    ]


def speedup_note(summary: Mapping[str, Any]) -> str:
    """What the fitted speed-ups rest on."""
    found = summary["data_speedup"]
    law = {key: series.number(value) for key, value in found["law"].items()}
    return (
        f"Data that {found['group']} would need for a loss over the data that was used (Wen et al. 2509.02046), by the law "
        f"{style.short(law['scale'], 3)} · D^−{style.short(law['exponent'], 3)} + {style.loss(law['floor'])} through its best losses "
        f"at {len(found['lengths'])} lengths of training (root mean square of what is left: {style.loss(law['residual'])} nats). "
        "Losses outside of those are extrapolated."
    )


def run_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every run as a row, with its cell and group; the loss of a run that is not finished is none."""
    rows = []
    for cell in summary["cells"]:
        for run in cell["runs"]:
            row = {**dict.fromkeys(RUN_KEYS), **run, "cell": cell["cell"], "group": cell["group"]}
            if run["status"] != "finished":
                row |= {"report_cross_entropy": None, "tune_cross_entropy": None}
            rows.append(row)
    return rows


def differences(material: Material) -> dict[str, Any]:
    """Which keys differ between cells, a row for each cell; and keys that differ between the seeds of one."""
    keys = list(dict.fromkeys(key for cell in material.summary["cells"] for key in cell.get("options") or {}))
    rows = [
        (cell["cell"], cell["group"], [(cell.get("options") or {}).get(key) for key in keys])
        for cell in material.summary["cells"]
    ]
    odd = {}
    for cell in material.summary["cells"]:
        found = differing([run["config"] for run in runs_of(material, cell)])
        odd.update({f"{cell['cell']}: {key}": row for key, row in found.items()})
    return {"keys": keys, "rows": rows, "odd": odd}


def routing(material: Material) -> list[dict[str, Any]]:
    """Which rule updates which parameters, from the first readable run of each group."""
    tables: dict[str, dict[str, Any]] = {}
    for cell in material.summary["cells"]:
        table = next((run["routing"] for run in runs_of(material, cell) if run.get("routing")), None)
        if table and cell["group"] not in tables:
            rows = routing_rules(table)
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "names"))
            tables[cell["group"]] = {"group": cell["group"], "columns": columns, "rows": rows}
    return list(tables.values())


def problems(material: Material) -> dict[str, str]:
    """Run directories that are missing, damaged, half-written or failed -> what is wrong with each."""
    found = {entry["directory"]: str(entry["message"]) for entry in material.summary.get("problems") or ()}
    for row in run_rows(material.summary):
        if row["status"] not in ("finished", MISSING) and row["directory"] not in found:
            found[row["directory"]] = f"{row['status']}{': ' + str(row['message']) if row.get('message') else ''}"
    return {**material.unreadable, **found}


def mean(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """Mean of a number over runs that have it, NaN without any."""
    numbers = [x for run in runs if math.isfinite(x := series.number(run.get(key)))]
    return statistics.fmean(numbers) if numbers else math.nan


def total(runs: Sequence[Mapping[str, Any]], key: str) -> int | None:
    numbers = [run[key] for run in runs if run.get(key) is not None]
    return sum(numbers) if numbers else None


def highlighted(summary: Mapping[str, Any], count: int = len(style.PALETTE)) -> dict[str, str]:
    """Cells that figures name, best first, the reference always among them -> colour."""
    rows = cell_rows(summary)
    names = [row["cell"] for row in rows]
    kept = names[:count]
    reference = summary.get("reference")
    if reference in names and reference not in kept:
        kept = [*kept[:-1], reference]
    key: dict[str, str] = {}  # the best cell of each group is drawn in the group's colour
    for row in rows:
        if row["cell"] in kept:
            key[row["cell"]] = row["group"] if row["group"] not in key.values() else row["cell"]
    colors = style.colors(list(key.values()))
    return {name: colors[key[name]] for name in kept}
