"""What a report is made of: a summary and the run directories that it lists."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muonlab.errors import InputError
from muonlab.studies.judge import SUMMARY
from muonlab.training.tracking import read_run

REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    "comparison": {
        "": ("question", "optimizers", "budget", "trials", "finals", "verdicts"),
        "trials": ("optimizer", "values", "status"),
        "finals": ("optimizer", "seed", "status"),
    },
    "study": {
        "": ("name", "cells", "groups", "seeds"),
        "cells": ("cell", "group", "values", "runs"),
        "runs": ("seed", "directory", "status"),
    },
}
"""Kind of summary -> part -> keys without which nothing can be drawn."""
MISSING = "missing"
"""Status of a planned run of a study without a readable record; the summary's `problems` say why."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A comparison or a study as it lies on disk."""

    summary: dict[str, Any]
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Directory as the summary names it -> the run's metrics."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Directory -> why its run cannot be read."""


def read_material(directory: str | Path, kind: str | None = None) -> Material:
    """Read the summary in `directory` and every run that it lists; unreadable runs are named, not fatal."""
    root = Path(directory)
    summary = read_summary(root / SUMMARY, kind)
    runs, unreadable = {}, {}
    for entry in run_entries(summary):
        name = entry.get("directory")
        if name is None or name in runs or name in unreadable or entry.get("status") == MISSING:
            continue
        try:
            runs[name] = read_run(root / name)
        except InputError as error:
            unreadable[name] = str(error)
        except (KeyError, TypeError, AttributeError) as error:  # valid JSON of another shape
            unreadable[name] = f"{root / name / 'metrics.json'} is not the record of a run ({error!r})"
    return Material(summary=summary, runs=runs, unreadable=unreadable)


def run_entries(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a summary says of each run: trials and final runs of a comparison, the seeds of each cell of a study."""
    if summary["kind"] == "comparison":
        yield from summary["trials"]
        yield from summary["finals"]
    else:
        for cell in summary["cells"]:
            yield from cell["runs"]


def read_summary(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A `comparison_summary.json`. InputError for a missing or damaged one, or one of another kind."""
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; `muonlab compare` and `muonlab study` write it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); run the same command again, finished runs are kept") from None
    found = str(summary.get("kind")) if isinstance(summary, dict) else ""
    if found not in ((kind,) if kind else REQUIRED):
        raise InputError(f"{path} is not the summary of a {kind or ' or a '.join(REQUIRED)}")
    for part, keys in REQUIRED[found].items():
        for entry in [summary] if not part else run_entries(summary) if part == "runs" else summary[part]:
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                where = f"an entry of {part} lacks" if part else "it lacks"
                raise InputError(
                    f"{path}: {where} {', '.join(missing)}; run the same command again, finished runs are kept"
                )
    return summary


def finals_of(summary: Mapping[str, Any], runs: Mapping[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """The readable final runs of one optimizer, by seed."""
    entries = [e for e in summary.get("finals", ()) if e["optimizer"] == optimizer and e.get("directory") in runs]
    return [runs[e["directory"]] for e in sorted(entries, key=lambda e: e["seed"])]


def runs_of(material: Material, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The readable runs of one cell of a study, in the order of its seeds."""
    return [material.runs[e["directory"]] for e in cell["runs"] if e.get("directory") in material.runs]
