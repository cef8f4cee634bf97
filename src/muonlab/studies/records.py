"""What judging needs of every run under a folder, read from the run directories and remembered beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonlab.diagnostics.stability import plateaus, spikes
from muonlab.errors import InputError
from muonlab.training.tracking import read_run, write_json

INDEX = "index.json"
FORMAT = 2
"""What a record is made of: raise it whenever `_record`, or what it calls, makes another one of the same run."""
KEPT = [
    "status",
    "message",
    "seed",
    "updates",
    "tokens",
    "seconds",
    "updates_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "final",
    "best",
    "program",
    "program_notice",
    "device",
    "threads",
    "parameters",
    "versions",
    "data",
    "optimizer",
]


@dataclass(frozen=True)
class Records:
    """The runs of a folder: by directory relative to it, and what is wrong with those that cannot be read."""

    runs: Mapping[str, dict[str, Any]]
    problems: Mapping[str, str]


def read_records(directory: str | Path) -> Records:
    """Every run in `directory/runs`: outcome, curve of evaluations, spikes and plateaus.

    What was read is remembered in `directory/index.json`, by size and time of each metrics.json, so that a study of a
    thousand finished runs is read in no time; the index may be deleted and is never trusted beyond that.
    """
    directory = Path(directory)
    remembered = _read_index(directory / INDEX)
    runs: dict[str, dict[str, Any]] = {}
    problems: dict[str, str] = {}
    index: dict[str, Any] = {}
    folders = sorted(path for path in (directory / "runs").glob("*") if path.is_dir())
    for path in folders:
        name = str(path.relative_to(directory))
        try:
            stat = (path / "metrics.json").stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            old = remembered.get(name)
            record = old["record"] if old is not None and old["stamp"] == stamp else _record(path)
        except (FileNotFoundError, NotADirectoryError):
            problems[name] = "no metrics.json: the run never reached a checkpoint"
            continue
        except InputError as error:
            problems[name] = str(error).replace(str(directory), ".")
            continue
        runs[name] = record
        if record["status"] in ("finished", "diverged"):
            index[name] = {"stamp": stamp, "record": record}
    if index != remembered:
        write_json(directory / INDEX, {"format": FORMAT, "runs": index}, indent=None)
    return Records(runs, problems)


def _record(path: Path) -> dict[str, Any]:
    run = read_run(path)
    evaluations = [
        {key: row[key] for key in ("update", "tokens", "seconds", "split", "cross_entropy")}
        for row in run["history"]["eval"]
    ]
    report = [row["cross_entropy"] for row in evaluations if row["split"] == "report"]
    finite = [loss for loss in report if loss is not None]
    losses = [float("nan") if row["loss"] is None else row["loss"] for row in run["history"]["train"]]
    return {
        **{key: run.get(key) for key in KEPT},
        "evaluations": evaluations,
        "best_report_cross_entropy": min(finite, default=None),
        "spikes": spikes(losses),
        "plateaus": plateaus(finite),
    }


def _read_index(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return dict(stored["runs"]) if stored["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
