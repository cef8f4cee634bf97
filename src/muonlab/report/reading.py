"""What a report is made of: a summary and the run directories that it lists."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muonlab.errors import InputError
from muonlab.studies.compare import SUMMARY
from muonlab.training.tracking import read_run


@dataclass(frozen=True, kw_only=True)
class Material:
    """A comparison as it lies on disk."""

    summary: dict[str, Any]
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Directory as the summary names it -> the run's metrics."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Directory -> why its run cannot be read."""


def read_comparison(directory: str | Path) -> Material:
    """Read the summary in `directory` and every run that it lists; unreadable runs are named, not fatal."""
    root = Path(directory)
    summary = read_summary(root / SUMMARY)
    runs, unreadable = {}, {}
    for entry in (*summary.get("trials", ()), *summary.get("finals", ())):
        name = entry.get("directory")
        if name is None or name in runs or name in unreadable:
            continue
        try:
            runs[name] = read_run(root / name)
        except InputError as error:
            unreadable[name] = str(error)
        except (KeyError, TypeError, AttributeError) as error:  # valid JSON of another shape
            unreadable[name] = f"{root / name / 'metrics.json'} is not the record of a run ({error!r})"
    return Material(summary=summary, runs=runs, unreadable=unreadable)


def read_summary(path: Path) -> dict[str, Any]:
    """A `comparison_summary.json`. InputError for a missing or damaged one."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; `muonlab compare` writes it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); run the comparison again, finished runs are kept") from None
    if not isinstance(summary, dict) or summary.get("kind") != "comparison":
        raise InputError(f"{path} is not the summary of a comparison")
    missing = [
        key for key in ("question", "optimizers", "budget", "trials", "finals", "verdicts") if key not in summary
    ]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; run the comparison again, finished runs are kept")
    for part, keys in {"trials": ("optimizer", "values", "status"), "finals": ("optimizer", "seed", "status")}.items():
        for entry in summary[part]:
            if not isinstance(entry, dict) or not set(keys) <= set(entry):
                raise InputError(f"{path}: an entry of {part} lacks {', '.join(keys)}; run the comparison again")
    return summary


def finals_of(summary: Mapping[str, Any], runs: Mapping[str, Any], optimizer: str) -> list[dict[str, Any]]:
    """The readable final runs of one optimizer, by seed."""
    entries = [e for e in summary.get("finals", ()) if e["optimizer"] == optimizer and e.get("directory") in runs]
    return [runs[e["directory"]] for e in sorted(entries, key=lambda e: e["seed"])]
