"""Numbers of runs in the form that a figure draws. Shared by the PNG and the interactive figures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muonlab.errors import InputError
from muonlab.studies.curves import LRTolerance, lr_tolerance

DELTA = 0.05
"""Nats per token within which a learning rate counts as good."""


def number(value: Any) -> float:
    """A number of a JSON file; NaN for null (how NaN and infinity are stored) and for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def evaluations(run: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """Evaluations of one split with a finite loss, by update."""
    rows = [
        r for r in run["history"].get("eval", ()) if r["split"] == split and math.isfinite(number(r["cross_entropy"]))
    ]
    return sorted(rows, key=lambda row: row["update"])


def judged_split(runs: Sequence[Mapping[str, Any]]) -> str:
    """The split whose curve is drawn: the one with more evaluations, `report` where both have as many."""
    count = {split: sum(len(evaluations(run, split)) for run in runs) for split in ("report", "tune")}
    return "tune" if count["tune"] > count["report"] else "report"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Validation loss of several seeds at the updates that all of them evaluated."""

    seeds: list[Any]
    updates: list[int]
    tokens: list[int]
    seconds: list[float]
    """Mean training seconds over the seeds."""
    mean: list[float]
    low: list[float]
    """Lowest seed."""
    high: list[float]
    each: list[list[float]]
    """[seeds][updates]"""

    def thinned(self, points: int) -> "Curve":
        """The same curve at no more than about `points` updates."""
        if len(self.updates) <= points:
            return self
        lists = ("updates", "tokens", "seconds", "mean", "low", "high")
        kept = {name: thinned(getattr(self, name), points) for name in lists}
        return Curve(seeds=self.seeds, each=[thinned(row, points) for row in self.each], **kept)


def mean_curve(runs: Sequence[Mapping[str, Any]], split: str) -> Curve | None:
    """The finished runs as one curve with its band; None without an evaluation in common."""
    finished = [run for run in runs if run["status"] == "finished"]
    tables = [{row["update"]: row for row in evaluations(run, split)} for run in finished]
    updates = sorted(set.intersection(*map(set, tables))) if tables else []
    if not updates:
        return None
    each = [[float(table[update]["cross_entropy"]) for update in updates] for table in tables]
    columns = list(zip(*each))
    return Curve(
        seeds=[run["seed"] for run in finished],
        updates=updates,
        tokens=[int(tables[0][update]["tokens"]) for update in updates],
        seconds=[sum(number(table[update]["seconds"]) for table in tables) / len(tables) for update in updates],
        mean=[sum(column) / len(column) for column in columns],
        low=[min(column) for column in columns],
        high=[max(column) for column in columns],
        each=each,
    )


def zoom(curves: Sequence[Curve], skipped: float = 0.25) -> tuple[float, float] | None:
    """A range of loss that leaves out the steep first `skipped` share of training, where all optimizers look alike."""
    if not curves:
        return None
    tops = []
    for curve in curves:
        after = [high for u, high in zip(curve.updates, curve.high) if u >= skipped * curve.updates[-1]]
        tops.append(after[0])
    low, top = min(min(curve.low) for curve in curves), ceiling(tops)
    margin = 0.06 * (top - low) or 0.05
    return low - margin, top + margin


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One tuning trial as a point of loss against learning rate."""

    index: int
    stage: str
    lr: float
    loss: float
    """NaN for a trial without a final loss."""
    status: str
    values: dict[str, Any]
    chosen: bool


def trials_of(summary: Mapping[str, Any], optimizer: str) -> list[Trial]:
    """The trials of one optimizer that have a learning rate, by rising learning rate."""
    choice = (summary.get("chosen") or {}).get(optimizer) or {}
    found = []
    for entry in summary.get("trials", ()):
        lr = number((entry.get("values") or {}).get("lr"))
        if entry["optimizer"] != optimizer or not lr > 0:
            continue
        loss = number(entry.get("tune_cross_entropy"))
        found.append(
            Trial(
                index=entry["index"],
                stage=str(entry.get("stage", "")),
                lr=lr,
                loss=loss if entry["status"] == "finished" and math.isfinite(loss) else math.nan,
                status=entry["status"],
                values=entry["values"],
                chosen=choice.get("trial") == entry["index"],
            )
        )
    return sorted(found, key=lambda trial: (trial.lr, trial.index))


SCATTERED = ("sobol", "halton", "tpe", "rung")
"""Stages of a search whose points differ in every knob at once: no two of them make a slice."""


def sweep(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that differ in nothing but the learning rate: the slice in which a width of the good range has a meaning.

    Of several slices the one with the best loss counts among those with three learning rates or more, else the largest.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        others = {key: value for key, value in trial.values.items() if not key.endswith("lr")}
        if not trial.stage.startswith(SCATTERED) and (trial.stage not in ("aux", "auxiliary") or "auxiliary" in others):
            groups.setdefault(repr(sorted(others.items())), []).append(trial)

    def rank(group: list[Trial]) -> tuple[int, float]:
        best = min((trial.loss for trial in group if math.isfinite(trial.loss)), default=math.inf)
        return min(3, len({trial.lr for trial in group})), -best

    return max(groups.values(), key=rank, default=[])


def sensitivity(trials: Sequence[Trial], delta: float = DELTA) -> LRTolerance | None:
    """Width of the good range of learning rates within the sweep; None when nothing there finished."""
    swept = sweep(trials)
    try:
        return lr_tolerance([t.lr for t in swept], [t.loss for t in swept], delta)
    except InputError:  # nothing finite
        return None


def best_by_lr(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    """Learning rates of the sweep and the best finite loss at each."""
    table: dict[float, float] = {}
    for trial in sweep(trials):
        if math.isfinite(trial.loss):
            table[trial.lr] = min(table.get(trial.lr, math.inf), trial.loss)
    return sorted(table), [table[lr] for lr in sorted(table)]


def ceiling(losses: Sequence[float], room: float = 1.5) -> float:
    """Top of a loss axis that a few very bad trials do not stretch: at most `room` nats above the best."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return 1.0
    return min(max(finite), min(finite) + room)


def thinned(values: Sequence[Any], points: int = 250) -> list[Any]:
    """At most about `points` of the values, evenly spread, first and last kept."""
    if len(values) <= points:
        return list(values)
    step = (len(values) - 1) / (points - 1)
    return [values[round(i * step)] for i in range(points)]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Distinct values, numbers by size and before words, which stay in the order they came in."""
    distinct = list(dict.fromkeys(hashable(value) for value in values if value is not None))
    numbers = [value for value in distinct if isinstance(value, int | float)]
    return [*sorted(numbers), *(value for value in distinct if not isinstance(value, int | float))]


def hashable(value: Any) -> Any:
    """A value of an axis as a key: lists as tuples."""
    return tuple(map(hashable, value)) if isinstance(value, list) else value
