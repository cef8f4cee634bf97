"""Threats to validity, each written from the data of the comparison at hand: what it means and what would help."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muonlab.report import series, style
from muonlab.report.reading import Material, finals_of

MANY_TOKENS_PER_PARAMETER = 20.0
"""Hoffmann et al. 2203.15556: about where compute is best spent; far below it, a run is a short one."""


@dataclass(frozen=True, kw_only=True)
class Threat:
    """One reason to doubt, with the remedy."""

    severity: Literal["serious", "note"]
    title: str
    text: str
    remedy: str = ""


def threats(material: Material) -> list[Threat]:
    """All threats to a comparison that the data show, serious ones first."""
    checks = (_gate, _seeds, _edges, _looks, _failures, _budgets, _families)
    return serious_first([*(threat for check in checks for threat in check(material)), *run_threats(material)])


def run_threats(material: Material) -> list[Threat]:
    """What the run directories alone show: unreadable ones, mixed programs, machines and data, the narrowness of one setting."""
    checks = (_unreadable, _versions, _machines, _data, _scope)
    return [threat for check in checks for threat in check(material)]


def serious_first(found: list[Threat]) -> list[Threat]:
    return sorted(found, key=lambda threat: threat.severity != "serious")


def not_learned(summary: Mapping[str, Any]) -> list[str]:
    """Optimizers whose final runs did not get below the unigram entropy (one answer for all where only that is stored)."""
    passed = (summary.get("gate") or {}).get("passed", True)
    if isinstance(passed, Mapping):
        return [name for name, learned in passed.items() if not learned]
    return [] if passed else list(summary["optimizers"])


def _gate(material: Material) -> Iterator[Threat]:
    stuck = not_learned(material.summary)
    if stuck:
        entropy = style.loss(material.summary["gate"].get("unigram_entropy"))
        yield Threat(
            severity="serious",
            title="Not below the unigram entropy",
            text=f"{_names(stuck)} did not get below the unigram entropy of the training text ({entropy} nats per token): "
            "a model that only counts words would do as well.",
            remedy="Train for more updates, or search other learning rates.",
        )


def _seeds(material: Material) -> Iterator[Threat]:
    counts = {name: len(finals_of(material.summary, material.runs, name)) for name in material.summary["optimizers"]}
    fewest = min(counts.values(), default=0)
    if fewest == 1:
        yield Threat(
            severity="serious",
            title="One seed",
            text="A single final run per optimizer has no error bar: chance and effect cannot be told apart.",
            remedy="Run at least three seeds (--seeds 3).",
        )
    elif 1 < fewest < 5:
        effects = [series.number(v.get("detectable_effect")) for v in material.summary.get("verdicts", ())]
        size = max((effect for effect in effects if math.isfinite(effect)), default=math.nan)
        text = f"{fewest} seeds per optimizer leave the spread itself poorly known."
        if math.isfinite(size):
            text += f" At the spread seen here a true difference of {style.loss(size)} nats is found in 8 of 10 such studies."
        yield Threat(
            severity="note", title="Few seeds", text=text, remedy="More seeds narrow the interval (--seeds 5)."
        )


def _edges(material: Material) -> Iterator[Threat]:
    chosen = material.summary.get("chosen") or {}
    at_end: dict[str, list[str]] = {}
    for name, choice in chosen.items():
        for knob in [*(["learning rate"] if (choice or {}).get("edge") else []), *((choice or {}).get("edges") or ())]:
            at_end.setdefault(knob, []).append(name)
    for knob, names in at_end.items():
        yield Threat(
            severity="serious",
            title=f"Best {knob} at the edge of its range",
            text=f"{_names(names)}: the chosen {knob} is the lowest or highest that was tried, so a better one may lie outside.",
            remedy="Give every optimizer more trials (--trials): the search goes beyond, within the same budget for all.",
        )


def _looks(material: Material) -> Iterator[Threat]:
    looks = material.summary.get("looks") or ()
    if len(looks) > 1:
        yield Threat(
            severity="serious",
            title="Extended after a verdict was seen",
            text=f"This is the verdict of look {len(looks)}. Who goes on until a verdict is liked calls equal optimizers different up to {len(looks)} times as often as one look does.",
            remedy="Set the number of trials and seeds before the first verdict, or repeat the comparison with other seeds.",
        )


def _failures(material: Material) -> Iterator[Threat]:
    finals = [e for e in material.summary.get("finals", ()) if e["status"] != "finished"]
    if finals:
        yield Threat(
            severity="serious",
            title="Final runs that did not finish",
            text="; ".join(f"{e['optimizer']} seed {e['seed']}: {e['status']}" for e in finals) + ".",
            remedy="A diverged final run counts against its optimizer; an interrupted one resumes with the same command.",
        )
    trials = [e for e in material.summary.get("trials", ()) if e["status"] != "finished"]
    if trials:
        counts = {n: sum(e["optimizer"] == n for e in trials) for n in material.summary["optimizers"]}
        text = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        yield Threat(
            severity="note",
            title="Tuning trials that did not finish",
            text=f"Trials that diverged or failed, by optimizer: {text}. They count as spent budget and show where stability ends.",
        )


def _unreadable(material: Material) -> Iterator[Threat]:
    if material.unreadable:
        yield Threat(
            severity="serious",
            title="Run directories that cannot be read",
            text="; ".join(material.unreadable.values()) + ". What rests on them is missing from the figures.",
            remedy="Run the same command again: missing runs are made again, finished ones are kept.",
        )


def _versions(material: Material) -> Iterator[Threat]:
    versions = [run.get("versions", {}) for run in material.runs.values()]
    for key, title in (("code", "versions of the code"), ("torch", "versions of torch")):
        seen = _distinct(version.get(key) for version in versions)
        if len(seen) > 1:
            yield Threat(
                severity="serious",
                title=f"Mixed {title}",
                text=f"The runs were made by {len(seen)} {title}: {', '.join(seen)}. A difference between them may be a difference of programs.",
                remedy="Run everything again in a new folder.",
            )
    dirty = _distinct(v.get("commit") for v in versions if "dirty" in str(v.get("commit")))
    if dirty:
        yield Threat(
            severity="note",
            title="Uncommitted code",
            text=f"Made from a working copy with changes that no commit holds ({', '.join(dirty)}).",
        )


def _machines(material: Material) -> Iterator[Threat]:
    machines = _distinct(
        f"{run.get('device')}, {run.get('threads')} threads, {run.get('program')}" for run in material.runs.values()
    )
    if len(machines) > 1:
        yield Threat(
            severity="note",
            title="Mixed machines or programs",
            text=f"Runs were made in different ways: {'; '.join(machines)}. Losses may be compared, seconds may not.",
        )
    for notice in _distinct(run.get("program_notice") for run in material.runs.values()):
        yield Threat(
            severity="note",
            title="Another program than the one asked for",
            text=f"Runs fell back: {notice}. Losses may be compared, seconds are those of what ran.",
        )


def _budgets(material: Material) -> Iterator[Threat]:
    trials = material.summary.get("trials", ())
    counts = {name: sum(e["optimizer"] == name for e in trials) for name in material.summary["optimizers"]}
    if len(set(counts.values())) > 1:
        yield Threat(
            severity="serious",
            title="Unequal tuning budgets",
            text=f"Trials by optimizer: {', '.join(f'{name} {count}' for name, count in counts.items())}.",
            remedy="Finish the comparison with the same command.",
        )
    elif counts and max(counts.values()) < 8:
        yield Threat(
            severity="note",
            title="A small search",
            text=f"{max(counts.values())} trials per optimizer move few knobs and leave the others at their defaults, which may suit one more than the other.",
            remedy="Leave out --quick, or give --trials.",
        )


def _data(material: Material) -> Iterator[Threat]:
    data = [run.get("data", {}) for run in material.runs.values()]
    for notice in _distinct(notice for entry in data for notice in entry.get("notices", ())):
        yield Threat(severity="serious", title="Not the corpus that was asked for, or not all of it", text=notice)
    if len(_distinct(entry.get("checksum") for entry in data)) > 1:
        yield Threat(
            severity="serious", title="Mixed data", text="The runs were made on data with different checksums."
        )
    epochs = max(
        (series.number(entry.get("epochs")) for entry in data if entry.get("epochs") is not None), default=math.nan
    )
    if epochs > 1:
        yield Threat(
            severity="serious" if epochs > 4 else "note",
            title="Several epochs",
            text=f"Training passed over its text {epochs:.1f} times: part of what is measured is memorising.",
            remedy="Use a larger corpus or fewer updates.",
        )


def _families(material: Material) -> Iterator[Threat]:
    pairs = len(material.summary.get("verdicts", ()))
    if pairs > 1:
        yield Threat(
            severity="note",
            title=f"{pairs} verdicts at once",
            text=f"With {pairs} pairs judged at 95 % each, one in {round(1 / (1 - 0.95**pairs))} such comparisons of equal optimizers "
            "calls at least one of them better or worse. The second p-value beside each verdict (Holm) is corrected for that.",
        )


def _scope(material: Material) -> Iterator[Threat]:
    if not material.runs:
        return
    run = next(iter(material.runs.values()))
    parameters, tokens = series.number(run["parameters"].get("total")), series.number(run.get("tokens"))
    text = f"One model ({style.count(parameters)} parameters), one corpus ({run['data'].get('corpus')}), one horizon ({style.count(run['updates'])} updates)."
    if parameters > 0 and tokens / parameters < MANY_TOKENS_PER_PARAMETER / 4:
        text += f" {tokens / parameters:.2g} tokens per parameter is a short run: rankings change along training."
    yield Threat(
        severity="note",
        title="One setting",
        text=text,
        remedy="Repeat at another size, corpus and length before generalising.",
    )


def _distinct(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _names(names: list[str]) -> str:
    return ", ".join(names)
