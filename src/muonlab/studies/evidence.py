"""What study folders say, cell by cell and seed by seed: read from comparison_summary.json and from nothing else."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from muonlab.errors import InputError
from muonlab.studies.study import Cell

SUMMARY = "comparison_summary.json"

MEASURES: dict[str, tuple[str, float | None]] = {
    "loss": ("report_cross_entropy", math.inf),
    "best_loss": ("best_report_cross_entropy", math.inf),
    "perplexity": ("perplexity", math.inf),
    "accuracy": ("accuracy", -math.inf),
    "seconds": ("seconds", None),
    "memory": ("peak_memory_bytes", None),
    "spikes": ("spikes", None),
    "plateaus": ("plateaus", None),
}
"""Measure -> (key of a run in the summary, what a diverged run counts as; None: it has no value)."""

ALIKE = {
    ("config", "model"): "models",
    ("config", "data"): "data options",
    ("data", "checksum"): "text",
    ("config", "training", "micro_batch_size"): "micro-batches",
    ("config", "training", "accumulation"): "accumulation",
}
"""What cells of two studies must have in common to be compared: path in the summary's setting -> in words."""


class RunResult(BaseModel):
    seed: int
    status: str
    report_cross_entropy: float | None = None
    tune_cross_entropy: float | None = None
    best_report_cross_entropy: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    seconds: float | None = None
    updates: int | None = None
    peak_memory_bytes: float | None = None
    spikes: float | None = None
    plateaus: float | None = None

    @property
    def over(self) -> bool:
        """Whether the run said all that it will: an interrupted or missing one is not evidence yet."""
        return self.status in ("finished", "diverged")


class CellResult(BaseModel):
    cell: str
    values: dict[str, Any] = {}
    runs: list[RunResult] = []
    learned: bool | None = None
    """Whether it ended below the entropy of single tokens; None where the summary does not say."""

    def by_seed(self, measure: str) -> dict[int, float]:
        """Seed -> value over runs that are over; a diverged run counts as the worst value, where there is one."""
        key, worst = MEASURES[measure]
        values = {}
        for run in self.runs:
            value = getattr(run, key) if run.status == "finished" else None
            if value is None or not math.isfinite(value):
                value = worst
            if run.over and value is not None:
                values[run.seed] = float(value)
        return values

    def tune_loss(self, seed: int) -> float:
        run = next((run for run in self.runs if run.seed == seed and run.status == "finished"), None)
        loss = run.tune_cross_entropy if run else None
        return math.inf if loss is None or not math.isfinite(loss) else loss


class StudySummary(BaseModel):
    """What a verdict needs of one comparison_summary.json."""

    folder: Path = Path()
    kind: str
    name: str
    version: str | None = None
    scale: str = "full"
    command: str | None = None
    seeds: list[int] = []
    cells: list[CellResult] = []
    gate: dict[str, Any] | None = None
    setting: dict[str, Any] = Field(default_factory=dict)


def read_summaries(folders: Sequence[Path]) -> list[StudySummary]:
    """The summaries of study folders; a folder without one stands for the study folders in it. InputError in one line."""
    found = [summary for folder in folders for summary in _read_folder(folder)]
    taken: dict[tuple[Any, ...], Path] = {}
    for summary in found:
        key = (summary.name, summary.version, summary.scale)
        if taken.setdefault(key, summary.folder) != summary.folder:
            raise InputError(
                f"{taken[key]} and {summary.folder} hold the same study, version and scale; give one of them"
            )
    return list({summary.folder: summary for summary in found}.values())


def _read_folder(folder: Path) -> list[StudySummary]:
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    if (folder / SUMMARY).exists():
        summary = _read(folder)
        if summary.kind != "study":
            raise InputError(f"{folder} holds a {summary.kind}; claims are judged from study folders (muonlab study)")
        return [summary]
    inside = [_read(path.parent) for path in sorted(folder.glob(f"*/{SUMMARY}"))]
    studies = [summary for summary in inside if summary.kind == "study"]
    if not studies:
        raise InputError(f"{folder} holds no {SUMMARY} of a study; make one with muonlab study or muonlab report")
    return studies


def _read(folder: Path) -> StudySummary:
    path = folder / SUMMARY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "kind" not in values:
            values["kind"] = "comparison"
        summary = StudySummary.model_validate(values)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); muonlab report {folder} writes it again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    passed = (summary.gate or {}).get("passed") or {}
    cells = [cell.model_copy(update={"learned": passed.get(cell.cell)}) for cell in summary.cells]
    return summary.model_copy(update={"folder": folder.resolve(), "cells": cells})


def collect(
    summaries: Sequence[StudySummary], wanted: Sequence[tuple[str, str | None]], scale: str
) -> list[StudySummary] | str:
    """The summaries of these (study, version) at one scale; where some are given and some not, what is missing."""
    at = {(s.name, s.version): s for s in summaries if s.scale == scale}
    found = [at[key] for key in wanted if key in at]
    if len(found) == len(wanted):
        return found
    name, version = next(key for key in wanted if key not in at)
    what = f"no folder of {name}" + (f", version {version}" if version else "") + f", at {scale} scale"
    return what if found else ""


@dataclass(frozen=True)
class Evidence:
    """The studies that decide one claim."""

    studies: dict[str, StudySummary]
    own: str
    """The study that a pattern without a study's name speaks of."""

    def match(self, patterns: Sequence[str], exclude: Sequence[Sequence[str]] = ()) -> list[CellResult]:
        """Cells that the patterns name, in the order of the study, without those that earlier patterns took."""
        before = {id(cell) for side in exclude for cell in self.match(side)}
        found: dict[int, CellResult] = {}
        for pattern in patterns:
            study, _, name = pattern.rpartition("/")
            for cell in self.studies[study or self.own].cells:
                if fnmatchcase(cell.cell, name) and id(cell) not in before:
                    found[id(cell)] = cell
        return list(found.values())

    def lacking(self, cells: Iterable[tuple[str, Cell]]) -> list[str]:
        """Cells that the claim names and that have no run to show."""
        missing: dict[str, None] = {}
        for study, wanted in cells:
            done = {cell.cell for cell in self.studies[study].cells if any(run.over for run in cell.runs)}
            if wanted.name not in done:
                missing[f"{study}/{wanted.name}"] = None
        return list(missing)

    def incomparable(self) -> str:
        """Why cells of these studies must not be set against each other; empty if they may."""
        first, *others = self.studies.values()
        for other in others:
            for path, what in ALIKE.items():
                if _get(first.setting, *path) != _get(other.setting, *path):
                    return f"{first.name} and {other.name} were run with different {what}"
            if _updates(first) != _updates(other):
                return f"{first.name} and {other.name} were run with different numbers of updates"
        return ""


def _get(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _updates(summary: StudySummary) -> set[int | None]:
    return {run.updates for cell in summary.cells for run in cell.runs if run.status == "finished"}
