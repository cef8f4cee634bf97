"""Threats to validity of a study, each written from its data: what it means and what would help."""

import math
from collections.abc import Iterator
from statistics import median

from muonlab.report import series, style
from muonlab.report.reading import Material
from muonlab.report.study_content import cell_rows, problems, run_rows
from muonlab.report.study_text import named
from muonlab.report.threats import Threat, run_threats, serious_first


def study_threats(material: Material) -> list[Threat]:
    """All threats that the data show, serious ones first."""
    checks = (_unfinished, _seeds, _gate, _edges, _divergence, _scale, _unequal_search, _choice, _families, _stale)
    return serious_first([*(threat for check in checks for threat in check(material)), *run_threats(material)])


def _unfinished(material: Material) -> Iterator[Threat]:
    budget = material.summary.get("budget") or {}
    missing = [name for name in problems(material) if name not in _diverged(material)]
    if missing:
        yield Threat(
            severity="serious",
            title="Runs that are missing, damaged or unfinished",
            text=f"{len(missing)} of {budget.get('runs', len(missing))} runs: {named(missing)}. Their cells rest on fewer seeds.",
            remedy="Give the study’s command again: finished runs are kept, the others are made.",
        )


def _seeds(material: Material) -> Iterator[Threat]:
    counts = [row["finished"] for row in cell_rows(material.summary) if row["finished"]]
    if counts and max(counts) == 1:
        yield Threat(
            severity="serious",
            title="One seed",
            text="A single run of each cell has no error bar: chance and effect cannot be told apart.",
            remedy="Run at least three seeds (--seeds 3).",
        )
    elif counts and min(counts) < 5:
        effects = [series.number(v.get("detectable_effect")) for v in material.summary.get("contrasts") or ()]
        found = [effect for effect in effects if math.isfinite(effect)]
        text = f"{min(counts)} seeds in the smallest cell leave the spread itself poorly known."
        if found:
            text += f" At the spreads seen here a true difference of {style.loss(median(found))} nats from the reference (median over cells) is found in 8 of 10 such studies, before the correction for many verdicts."
        yield Threat(
            severity="note", title="Few seeds", text=text, remedy="More seeds narrow the intervals (--seeds 5)."
        )


def _gate(material: Material) -> Iterator[Threat]:
    stuck = [row["cell"] for row in cell_rows(material.summary) if row["finished"] and not row["learned"]]
    if stuck:
        entropy = style.loss((material.summary.get("gate") or {}).get("unigram_entropy"))
        yield Threat(
            severity="serious",
            title="Not below the unigram entropy",
            text=f"{len(stuck)} of {len(material.summary['cells'])} cells did not get below the unigram entropy of the text ({entropy} nats per token), as a model would that only counts words: {named(stuck)}.",
            remedy="Verdicts between such cells compare how they fail; train for more updates.",
        )


def _edges(material: Material) -> Iterator[Threat]:
    lines: dict[tuple[str, str], list[str]] = {}
    for line in material.summary.get("sensitivity") or ():
        end = {"low": "lowest", "high": "highest"}.get(line.get("edge"))
        if end:
            rest = ", ".join(f"{key} {style.label(value)}" for key, value in line["rest"].items())
            lines.setdefault((line["axis"], end), []).append(f"{line['group']}{f' ({rest})' if rest else ''}")
    for (axis, end), names in lines.items():
        yield Threat(
            severity="serious",
            title=f"Best {axis} at the edge of its range",
            text=f"{named(names)}: the {end} {axis} that was tried is the best one, so a better one may lie outside.",
            remedy="Widen the axis in the study file; what has run is kept.",
        )


def _diverged(material: Material) -> dict[str, str]:
    rows = [row for row in run_rows(material.summary) if row["status"] == "diverged"]
    return {row["directory"]: f"{row['cell']} seed {row['seed']}" for row in rows}


def _divergence(material: Material) -> Iterator[Threat]:
    diverged = list(_diverged(material).values())
    if diverged:
        yield Threat(
            severity="note",
            title="Runs that diverged",
            text=f"{len(diverged)}: {named(diverged)}. A cell’s mean is over the seeds that finished, which flatters it; its rank comes after cells that always finished.",
        )


def _scale(material: Material) -> Iterator[Threat]:
    summary = material.summary
    published = [cell for cell in summary["cells"] if cell.get("published")]
    if summary.get("scale") not in (None, "full"):
        text = f"This is the scale {summary['scale']}: a smaller model, other data and fewer updates than the source’s."
        if published:
            text += " Its losses are not comparable with the published ones; orders and shapes may be."
        yield Threat(
            severity="serious", title="Not the size of the source", text=text, remedy="Run the study at scale full."
        )
    elif published and not all(cell.get("published_applies") for cell in published):
        yield Threat(
            severity="note",
            title="Published numbers of another program",
            text=f"The version {summary.get('version')} does not do what the source’s code did, so its losses are no repetition of the published ones.",
            remedy="The version as-published repeats what the source really ran (--version as-published).",
        )


def _unequal_search(material: Material) -> Iterator[Threat]:
    counts = {g: sum(cell["group"] == g for cell in material.summary["cells"]) for g in material.summary["groups"]}
    if len(counts) > 1 and len(set(counts.values())) > 1:
        yield Threat(
            severity="note" if max(counts.values()) < 3 * min(counts.values()) else "serious",
            title="Unequal search",
            text=f"Cells by group: {', '.join(f'{name} {count}' for name, count in counts.items())}. The best of many is better by luck alone than the best of few.",
            remedy="muonlab compare gives every optimizer the same budget.",
        )


def _choice(material: Material) -> Iterator[Threat]:
    cells = [row for row in cell_rows(material.summary) if row["finished"]]
    if len(cells) > 3:
        yield Threat(
            severity="note",
            title="The first of a ranking is flattered",
            text=f"Ranks order {len(cells)} cells by the very runs that they are judged by: the first one owes some of its place to luck. Only the verdicts of best against best keep choice and judgement apart.",
            remedy="Run the best cells again with new seeds.",
        )


def _families(material: Material) -> Iterator[Threat]:
    count = len(material.summary.get("contrasts") or ())
    if count > 1:
        yield Threat(
            severity="note",
            title=f"{count} verdicts at once",
            text=f"{count} cells are judged against one reference. Verdicts hold after Holm’s correction, which asks for more seeds the more cells there are; their intervals are not widened.",
        )


def _stale(material: Material) -> Iterator[Threat]:
    stale = material.summary.get("stale") or ()
    if stale:
        yield Threat(
            severity="note",
            title="Runs of an earlier plan",
            text=f"{len(stale)} directories belong to no cell of the study as it is now, and nothing here rests on them: {named(stale)}.",
        )
