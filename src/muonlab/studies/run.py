"""Carries out a study: every cell with every seed, in one folder, resumable, shared by any number of processes."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from muonlab.data import DataOptions, Dataset
from muonlab.errors import InputError
from muonlab.studies.cost import remember_rate
from muonlab.studies.executor import Executor, Job, OnProgress
from muonlab.studies.judge import PLAN, judge, read_plan
from muonlab.studies.records import read_records
from muonlab.studies.study import Study, slug
from muonlab.training.config import RunConfig, flat, replace, run_id
from muonlab.training.resolve import resolve
from muonlab.training.tracking import without_none, write_json

SPLITS = {"training": {"eval_splits": ["tune", "report"]}}
"""Every run of a study is evaluated on both: choices are made on tune, judgements on report."""


@dataclass(frozen=True)
class Planned:
    """A study with every run it asks for, resolved for this machine and this data."""

    study: Study
    jobs: tuple[Job, ...]
    """In the order of seeds: all cells have run once before any has run twice."""
    notices: tuple[str, ...]
    values: Mapping[str, Any]
    """The content of study.json."""


def plan_study(study: Study, directory: str | Path, *, fallback: bool = False, progress: bool = True) -> Planned:
    """Prepare the data, decide every `auto` and lay out the runs in `directory`; nothing is written there yet."""
    directory = Path(directory)
    notices: list[str] = []
    base = flat(study.base.to_dict())
    cells: list[dict[str, Any]] = []
    jobs: list[Job] = []
    datasets: dict[DataOptions, Dataset] = {}
    for cell in study.cells:
        data = cell.config.data
        config, dataset = resolve(
            replace(cell.config, **SPLITS), fallback=fallback, progress=progress, dataset=datasets.get(data)
        )
        datasets[data] = dataset
        notices += [notice for notice in dataset.notices if notice not in notices]
        own = {k: v for k, v in flat(cell.config.to_dict()).items() if k not in ("name", "seed") and base.get(k) != v}
        own = {key: without_none(value) for key, value in own.items()}
        runs = []
        for seed in study.seeds:
            seeded = config.model_copy(update={"seed": seed})
            name = f"{slug(cell.name)}-s{seed}-{run_id(seeded, dataset.checksum)[:8]}"
            runs.append({"seed": seed, "directory": f"runs/{name}"})
            jobs.append(Job(cell.group, f"{cell.name}, seed {seed}", seeded, directory / "runs" / name))
        cells.append(
            {
                "cell": cell.name,
                "group": cell.group,
                "case": cell.case,
                "values": dict(cell.values),
                "options": own,
                "published": dict(cell.published) if cell.published else None,
                "published_applies": study.published_applies and cell.published is not None,
                "runs": runs,
            }
        )
    jobs.sort(key=lambda job: study.seeds.index(job.config.seed))
    keys = ("name", "title", "question", "source", "notes", "version", "note", "scale", "seeds", "reference", "targets")
    values = {
        "schema": 1,
        "kind": "study",
        **{key: getattr(study, key) for key in keys},
        "identity": hashlib.sha256(json.dumps([cell["runs"] for cell in cells]).encode()).hexdigest()[:8],
        "axes": [asdict(axis) for axis in study.axes],
        "cells": cells,
        "base": study.base.to_dict(),
        "notices": notices,
    }
    return Planned(study, tuple(jobs), tuple(notices), json.loads(json.dumps(values)))


def changes(planned: Planned, directory: str | Path) -> str | None:
    """What differs between this plan and the one that the folder already holds, in one line; None for a new folder or no
    difference. InputError for a folder of another study, or of something else."""
    directory = Path(directory)
    if not (directory / PLAN).exists():
        if directory.is_dir() and any(directory.iterdir()):
            raise InputError(f"{directory} is not empty and holds no study; choose another --output")
        return None
    before = read_plan(directory)
    for key in ("name", "version", "scale"):
        if before.get(key) != planned.values[key]:
            raise InputError(
                f"{directory} holds the study {before.get('name')} ({before.get('version')}, {before.get('scale')}); "
                "choose another --output"
            )
    old = {run["directory"] for cell in before["cells"] for run in cell["runs"]}
    new = {run["directory"] for cell in planned.values["cells"] for run in cell["runs"]}
    parts = [f"{len(new - old)} runs are new"] if new - old else []
    parts += [f"{len(old - new)} of its last call are not asked for now; they are kept"] if old - new else []
    return f"{directory} was last called for other runs: {', '.join(parts)}" if parts else None


def run_study(
    planned: Planned,
    directory: str | Path,
    *,
    workers: int = 0,
    command: str = "",
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make every run that is not finished yet, then judge: the summary, also written to `comparison_summary.json`.

    `workers` processes run at a time (0: this one). One run's failure never stops the rest; several processes, on one
    machine or on several that share the folder, may work on the same study: each run is made once. When `should_stop`
    says so, running runs stop at their next update and KeyboardInterrupt is raised; the same call goes on there.
    """
    directory = Path(directory)
    changes(planned, directory)  # refuses a folder of something else before anything is written
    values = {**planned.values, "command": command, "failures": {}}
    try:
        (directory / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None
    write_json(directory / PLAN, values)
    records = read_records(directory)
    done = {name for name, record in records.runs.items() if record["status"] in ("finished", "diverged")}
    failures: dict[str, str] = {}
    made: list[tuple[dict[str, Any], RunConfig[Any]]] = []
    with Executor(workers, on_progress, should_stop) as executor:
        for job in planned.jobs:
            if str(job.directory.relative_to(directory)) not in done:
                executor.submit(job)
        for job, outcome in executor.results():
            made.append((outcome, job.config))
            if outcome["status"] == "failed":
                failures[str(job.directory.relative_to(directory))] = outcome["message"]
    remember_rate(made, workers)
    if failures:
        write_json(directory / PLAN, {**values, "failures": failures})
    return judge(directory, None if made else records)
