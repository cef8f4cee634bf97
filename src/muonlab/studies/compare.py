"""The comparison protocol: equal tuning budgets on the tune split, then n paired seeds judged on the report split."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock

from muonlab.data import Dataset
from muonlab.errors import InputError
from muonlab.studies.executor import Executor, Job, OnProgress
from muonlab.studies.plan import Plan, labels
from muonlab.studies.search import Point, Search
from muonlab.studies.summary import final_loss, summarize, trial_entry
from muonlab.training.loop import resolve
from muonlab.training.tracking import write_json

SUMMARY = "comparison_summary.json"


def resolve_plan(plan: Plan, *, fallback: bool = False, progress: bool = True) -> tuple[Plan, Dataset]:
    """The plan with its data prepared and every `auto` decided, which is what its identity stands for."""
    base, dataset = resolve(plan.base, fallback=fallback, progress=progress)
    return replace(plan, base=base), dataset


def comparison_directory(plan: Plan, root: str | Path = "runs") -> Path:
    """Where a resolved plan's comparison lies unless told otherwise."""
    return Path(root) / f"compare-{'-'.join(plan.optimizers)}-{plan.identity}"


def compare(
    plan: Plan,
    directory: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    workers: int = 0,
    command: str = "",
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a comparison and return its summary, also written to `comparison_summary.json` in `directory`.

    Runs lie in `directory/runs`; what is finished there is not run again, so that a stopped comparison goes on where it
    was. `workers` processes run at a time (0: this one), each with the threads that the base says. When `should_stop`
    says so, running jobs stop cleanly and KeyboardInterrupt is raised. Plan and dataset come from `resolve_plan`, which is
    called here when there is no dataset. Raises InputError when a run could not be carried out (a full disk, say), which
    is not the optimizer's doing: the same call goes on where it was.
    """
    if dataset is None:
        plan, dataset = resolve_plan(plan, progress=False)
    directory = comparison_directory(plan) if directory is None else Path(directory)
    with claimed(directory, plan):
        return _compare(plan, directory, dataset, Executor(workers, on_progress, should_stop), command)


def _compare(plan: Plan, directory: Path, dataset: Dataset, executor: Executor, command: str) -> dict[str, Any]:
    started = time.perf_counter()
    names = labels(plan.optimizers)
    trials: list[dict[str, Any]] = []
    searches = {n: Search(n.split("#")[0], plan.budget.trials, (plan.centers or {}).get(n)) for n in names}
    failures: list[str] = []
    with executor:
        points: dict[tuple[str, Path], tuple[int, Point]] = {}

        def submit(label: str) -> None:
            for point in searches[label].ask():
                index = len(points)
                job = _job(plan, directory, label, point, plan.tuning_seed, "tune", f"{point.stage}: lr {point.lr:.2g}")
                points[label, job.directory] = (index, point)
                executor.submit(job)

        for label in names:
            submit(label)
        for job, outcome in executor.results():
            _, point = points[job.group, job.directory]
            if outcome["status"] == "failed":
                failures.append(f"{job.group} {job.label}: {outcome['message']}")
                continue
            loss = final_loss(outcome, "tune")
            searches[job.group].tell(point, loss)
            trials.append(trial_entry(directory, job, point, outcome, loss))
            submit(job.group)
        _refuse(failures)
        for label in names:
            best = searches[label].best
            for seed in plan.seeds(label):
                executor.submit(_job(plan, directory, label, best, seed, "report", f"seed {seed}"))
        outcomes: dict[str, dict[int, dict[str, Any]]] = {label: {} for label in names}
        for job, outcome in executor.results():
            outcomes[job.group][job.config.seed] = outcome
            if outcome["status"] == "failed":
                failures.append(f"{job.group} {job.label}: {outcome['message']}")
        _refuse(failures)
    order = {path: index for (_, path), (index, _) in points.items()}
    trials.sort(key=lambda trial: order[directory / trial["directory"]])
    summary = summarize(plan, directory, dataset, searches, trials, outcomes)
    made = {"command": command, "workers": executor.workers, "wall_seconds": time.perf_counter() - started}
    if (directory / SUMMARY).exists():  # nothing was run again: keep who made it, and how long that took
        before = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        made = {key: before.get(key, value) for key, value in made.items()}
    write_json(directory / SUMMARY, {**summary, **made})
    return {**summary, **made}


def _refuse(failures: list[str]) -> None:
    if failures:
        raise InputError(
            f"{len(failures)} runs could not be carried out ({failures[0]}); mend that and give the same command again"
        )


@contextlib.contextmanager
def claimed(directory: Path, plan: Plan) -> Iterator[None]:
    """Hold `directory` for this plan; InputError when it is another's, something else, or held by another process."""
    _identity_in(directory)  # before anything is written into a folder of something else
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / "compare.lock", timeout=0):
            found = _identity_in(directory)
            if found not in (None, plan.identity):
                raise InputError(
                    f"{directory} holds another comparison ({found}, this is {plan.identity}); choose another --output"
                )
            if found is None:
                values = {"identity": plan.identity, "optimizers": plan.optimizers, "budget": asdict(plan.budget)}
                base = {"base": plan.base.to_dict(), "centers": dict(plan.centers or {})}
                write_json(directory / "plan.json", {**values, **base})
            yield
    except filelock.Timeout:
        raise InputError(f"another process is working on the comparison {directory}; wait for it or stop it") from None
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None


def _identity_in(directory: Path) -> str | None:
    """The identity of the comparison in `directory`, None where it is empty or not there; InputError for anything else."""
    try:
        return str(json.loads((directory / "plan.json").read_text(encoding="utf-8"))["identity"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{directory / 'plan.json'} is not the plan of a comparison; choose another --output"
        ) from None
    if directory.is_dir() and any(entry.name != "compare.lock" for entry in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no comparison; choose another --output")
    return None


def delete_comparison(directory: Path) -> None:
    """Delete what a comparison wrote into `directory`, and nothing else; InputError if it holds none or one in progress."""
    if _identity_in(directory) is None:
        return
    try:
        with filelock.FileLock(directory / "compare.lock", timeout=0):
            shutil.rmtree(directory / "runs", ignore_errors=True)
            for name in ("plan.json", SUMMARY, "comparison_plot.png", "report.html"):
                (directory / name).unlink(missing_ok=True)
    except filelock.Timeout:
        raise InputError(f"another process is working on the comparison {directory}; wait for it or stop it") from None


def _job(plan: Plan, directory: Path, label: str, point: Point, seed: int, split: str, text: str) -> Job:
    config = plan.config(label, point, seed, split)
    values = {**config.to_dict(), "label": label}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return Job(label, text, config, directory / "runs" / f"{config.name}-{digest}")
