"""The comparison protocol: equal tuning budgets on the tune split, then n paired seeds judged on the report split."""

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock

from muonlab.data import Dataset
from muonlab.errors import InputError
from muonlab.studies.executor import Executor, Job, OnProgress
from muonlab.studies.plan import Plan, labels
from muonlab.studies.search import Search
from muonlab.studies.space import Point
from muonlab.studies.summary import final_loss, summarize, trial_entry
from muonlab.training.resolve import resolve
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
    was, and one with more trials or seeds than before extends the old one: with more trials the choice is made again, and
    what was chosen is judged. Fewer than a verdict was made of are refused with an InputError. `workers` processes run at a
    time (0: this one), each with the threads that the base says. When `should_stop` says so, running jobs stop cleanly and
    KeyboardInterrupt is raised. Plan and dataset come from `resolve_plan`, which is called here when there is no dataset.
    Raises InputError when a run could not be carried out (a full disk, say), which is not the optimizer's doing: the same
    call goes on where it was.
    """
    if dataset is None:
        plan, dataset = resolve_plan(plan, progress=False)
    directory = comparison_directory(plan) if directory is None else Path(directory)
    with claimed(directory, plan):
        started, earlier = time.perf_counter(), _summary_in(directory)
        with Executor(workers, on_progress, should_stop) as executor:
            summary = carry_out(plan, directory, dataset, executor)
        made = {"command": command, "workers": workers, "wall_seconds": time.perf_counter() - started}
        summary = _after(earlier, {**summary, **made})
        write_json(directory / SUMMARY, summary)
    return summary


def carry_out(plan: Plan, directory: Path, dataset: Dataset, executor: Executor) -> dict[str, Any]:
    """The protocol: tune each optimizer, choose, repeat what was chosen with every seed, judge. Writes no file itself;
    `executor` takes jobs and gives their outcomes."""
    names = labels(plan.optimizers)
    searches = {name: plan.new_search(name) for name in names}
    trials = _tune(plan, directory, searches, executor)
    spent = {name: Counter(point.updates or plan.budget.updates for point in searches[name].losses) for name in names}
    planned = Counter({rung.updates: rung.trials for rung in plan.rungs})
    if any(counted != planned for counted in spent.values()):
        raise RuntimeError(f"unequal tuning budgets: {spent}, planned {planned}")
    failures: list[str] = []
    for name in names:
        for seed in plan.seeds(name):
            executor.submit(_job(plan, directory, name, searches[name].best, seed, "report", f"seed {seed}"))
    outcomes: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for job, outcome in executor.results():
        outcomes[job.group][job.config.seed] = outcome
        if outcome["status"] == "failed":
            failures.append(f"{job.group} {job.label}: {outcome['message']}")
    _refuse(failures)
    return summarize(plan, directory, dataset, searches, trials, outcomes)


def _tune(
    plan: Plan, directory: Path, searches: dict[str, Search], executor: Executor
) -> dict[str, list[dict[str, Any]]]:
    """Spend every search's budget; each optimizer's trials as entries of the summary, in the order asked."""
    points: dict[tuple[str, Path], Point] = {}
    entries: dict[tuple[str, Point], dict[str, Any]] = {}
    failures: list[str] = []

    def submit(name: str) -> None:
        for point in searches[name].ask():
            job = _job(plan, directory, name, point, plan.tuning_seed, "tune", f"{point.stage}: lr {point.lr:.2g}")
            points[name, job.directory] = point
            executor.submit(job)

    for name in searches:
        submit(name)
    for job, outcome in executor.results():
        if outcome["status"] == "failed":
            failures.append(f"{job.group} {job.label}: {outcome['message']}")
            continue
        point, loss = points[job.group, job.directory], final_loss(outcome, "tune")
        searches[job.group].tell(point, loss)
        entries[job.group, point] = trial_entry(directory, job, point, outcome, loss)
        submit(job.group)
    _refuse(failures)
    return {name: [entries[name, point] for point in search.asked] for name, search in searches.items()}


def _after(earlier: dict[str, Any] | None, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with the looks that were had at this comparison: a verdict that was extended because it was not liked is
    no longer one in twenty."""
    looks = list(earlier.get("looks", ())) if earlier else []
    budget = {key: summary["budget"][key] for key in ("trials", "seeds")}
    if earlier and looks and {key: looks[-1][key] for key in budget} == budget:  # nothing new: keep who made it
        made: dict[str, Any] = {key: earlier[key] for key in ("command", "workers", "wall_seconds") if key in earlier}
    else:
        made = {"wall_seconds": summary["wall_seconds"] + ((earlier or {}).get("wall_seconds") or 0.0)}
        looks.append({**budget, "verdicts": {v["candidate"]: v["verdict"] for v in summary["verdicts"]}})
    flags = list(summary["flags"])
    if len(looks) > 1:
        steps = " -> ".join(f"{look['trials']} trials and {look['seeds']} seeds" for look in looks)
        flags.append(
            f"extended after a verdict was seen ({steps}): who stops at the verdict that is liked calls equal optimizers "
            f"different up to {len(looks)} times as often as one look does"
        )
    return {**summary, **made, "looks": looks, "flags": flags}


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
            _refuse_less(directory, plan)
            values = {"identity": plan.identity, "optimizers": plan.optimizers, "budget": asdict(plan.budget)}
            base = {"base": plan.base.to_dict(), "centers": dict(plan.centers or {}), "search": plan.search}
            write_json(directory / "plan.json", {**values, **base})
            yield
    except filelock.Timeout:
        raise InputError(f"another process is working on the comparison {directory}; wait for it or stop it") from None
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None


def _refuse_less(directory: Path, plan: Plan) -> None:
    """InputError for fewer trials or seeds than a verdict was made of: evidence that was seen is not dropped."""
    seen = (_summary_in(directory) or {}).get("budget", {})
    for key in ("trials", "seeds"):
        before, now = seen.get(key, 0), getattr(plan.budget, key)
        if now < before:
            raise InputError(
                f"{directory} was judged with {before} {key}; a comparison can be extended, not cut: "
                f"give --{key} {before} or more, or --fresh to begin anew"
            )


def _summary_in(directory: Path) -> dict[str, Any] | None:
    """The summary of an earlier call, None where there is none that can be read."""
    try:
        summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("kind") == "comparison" else None


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
