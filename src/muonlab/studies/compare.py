"""The comparison protocol: equal tuning budgets on the tune split, then n paired seeds judged on the report split."""

import contextlib
import hashlib
import json
import math
import shutil
import statistics as plain_statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import filelock

from muonlab.data import Dataset
from muonlab.errors import InputError, unknown
from muonlab.optim.registry import OPTIMIZERS
from muonlab.studies.executor import Executor, Job, OnProgress
from muonlab.studies.search import Point, Search
from muonlab.studies.statistics import compare_paired, median_to_target, to_target
from muonlab.training.config import RunConfig, from_dict, merge
from muonlab.training.loop import resolve
from muonlab.training.tracking import read_run, versions, write_json

SUMMARY = "comparison_summary.json"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every optimizer gets, the same for all: counted, printed and kept."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    trials: int = 12
    """Tuning runs per optimizer, judged on the tune split."""
    seeds: int = 5
    """Final runs per optimizer with its chosen configuration, judged on the report split."""
    updates: int = 400
    """Updates of every run: tuning and judging happen at the same horizon."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.seeds < 1 or self.updates < 1:
            raise InputError(f"the budget needs at least one trial, seed and update, not {self}")


PROFILES = {
    "quick": (Budget(trials=5, seeds=3, updates=100), {"training": {"micro_batch_size": 8, "eval_tokens": 16_384}}),
    "standard": (Budget(), {}),
}
"""Budget and settings of a named profile: quick is what `make quick` runs, minutes on two cores."""

KNOBS = {
    "lr": "learning rate of hidden matrices",
    "auxiliary": "learning rate of embeddings and head",
    "weight_decay": "weight decay",
    "momentum": "momentum (Adam: beta 1)",
}


def labels(optimizers: Sequence[str]) -> list[str]:
    """A label per contestant; an optimizer named twice is compared with itself: muon, muon#2."""
    for name in optimizers:
        if name not in OPTIMIZERS:
            raise unknown("optimizer", name, OPTIMIZERS)
        if name == "class":
            raise InputError(
                "'class' needs a class_path of its own: register the optimizer to compare it (docs/extending.md)"
            )
    if len(optimizers) < 2:
        raise InputError("a comparison needs two optimizers or more, for example: muonlab compare muon adamw")
    seen: dict[str, int] = {}
    named = []
    for name in optimizers:
        seen[name] = seen.get(name, 0) + 1
        named.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return named


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs. The last optimizer is the reference that the others are judged against."""

    optimizers: tuple[str, ...]
    base: RunConfig[Any]
    """Model, data, schedule and sizes of every run; its optimizer is replaced."""
    budget: Budget
    profile: str = "standard"
    centers: Mapping[str, float] | None = None
    """Centre of the learning-rate search by optimizer, where it is not the registered one."""

    @property
    def identity(self) -> str:
        values = [self.optimizers, self.base.to_dict(), asdict(self.budget), dict(self.centers or {})]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def runs(self) -> int:
        return len(self.optimizers) * (self.budget.trials + self.budget.seeds)

    def config(self, label: str, point: Point, seed: int, split: str) -> RunConfig[Any]:
        optimizer = label.split("#")[0]
        changes: dict[str, Any] = {
            "name": f"{label.replace('#', '-')}-{'tune' if split == 'tune' else 'final'}",
            "seed": seed,
            "optimizer": {"name": optimizer, **point.options(optimizer)},
            "training": {"updates": self.budget.updates, "eval_splits": [split]},
        }
        if split == "tune":  # the curve of a trial decides nothing: evaluate where it ends
            changes["training"]["eval_every"] = self.budget.updates
        values = self.base.to_dict()
        values.pop("optimizer")
        return from_dict(merge(values, changes))

    def seeds(self, label: str) -> list[int]:
        """n seeds from the base's on, the same for all (pairs share initial weights and data); a twin has its own."""
        twin = int(label.split("#")[1]) - 1 if "#" in label else 0
        first = self.base.seed + twin * self.budget.seeds
        return list(range(first, first + self.budget.seeds))

    @property
    def tuning_seed(self) -> int:
        """The one seed of all trials, which no final run has: the choice cannot profit from the luck it is judged by."""
        return self.base.seed - 1


def make_budget(profile: str = "standard", **numbers: int | None) -> Budget:
    """The budget of a profile, with single numbers replaced where they are not None."""
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    return Budget(**{**asdict(PROFILES[profile][0]), **{key: n for key, n in numbers.items() if n is not None}})


def base_values(profile: str, budget: Budget) -> dict[str, Any]:
    """The nested configuration values that a profile and a budget begin with; what a user says is laid on top."""
    clock = {"updates": budget.updates, "eval_every": max(1, budget.updates // 5), "checkpoint_every": budget.updates}
    return merge({"training": clock}, PROFILES[profile][1])


def make_plan(
    optimizers: Sequence[str],
    base: Mapping[str, Any],
    *,
    profile: str = "standard",
    budget: Mapping[str, int] | None = None,
    centers: Mapping[str, float] | None = None,
) -> Plan:
    """A plan from nested configuration values laid on those of the profile; `budget` replaces single numbers of it."""
    names = labels(optimizers)
    for name, center in (centers or {}).items():
        if name not in names:
            raise unknown("optimizer of this comparison", name, names)
        if not 0 < center < math.inf:
            raise InputError(f"the learning-rate centre of {name} is {center}; it must be above 0")
    chosen = make_budget(profile, **(budget or {}))
    values = merge(base_values(profile, chosen), {**base, "optimizer": optimizers[0]})
    config = from_dict(values)
    if config.training.updates != chosen.updates:
        raise InputError(
            f"training.updates is {config.training.updates}, the budget's {chosen.updates}; set the budget's"
        )
    if config.seed < 1:
        raise InputError("the first seed of a comparison must be at least 1: the one below it belongs to the trials")
    return Plan(tuple(optimizers), config, chosen, profile, centers)


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
            trials.append(_trial(directory, job, point, outcome, loss))
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
    summary = _summary(plan, directory, dataset, searches, trials, outcomes)
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


def final_loss(outcome: Mapping[str, Any], split: str) -> float:
    """Cross-entropy at the last evaluation on `split`; infinity for a run that did not finish."""
    if outcome["status"] != "finished":
        return float("inf")
    return float(outcome["final"][split]["cross_entropy"])


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


def _values(point: Point) -> dict[str, float]:
    return {key: value for key, value in asdict(point).items() if key != "stage" and value is not None}


def _trial(directory: Path, job: Job, point: Point, outcome: dict[str, Any], loss: float) -> dict[str, Any]:
    return {
        "optimizer": job.group,
        "stage": point.stage,
        "values": _values(point),
        "status": outcome["status"],
        "message": outcome.get("message"),
        "tune_cross_entropy": loss,
        "seconds": outcome.get("seconds", {}).get("training"),
        "directory": str(job.directory.relative_to(directory)),
    }


def _summary(
    plan: Plan,
    directory: Path,
    dataset: Dataset,
    searches: dict[str, Search],
    trials: list[dict[str, Any]],
    outcomes: dict[str, dict[int, dict[str, Any]]],
) -> dict[str, Any]:
    names, data = list(searches), dataset.describe()
    reference = names[-1]
    counters = dict.fromkeys(names, 0)
    for trial in trials:
        trial["index"] = counters[trial["optimizer"]]
        counters[trial["optimizer"]] += 1
    if set(counters.values()) != {plan.budget.trials}:
        raise RuntimeError(f"unequal tuning budgets: {counters}")
    finals = []
    for label in names:
        for seed, outcome in outcomes[label].items():
            last = outcome["final"].get("report", {})
            finals.append(
                {
                    "optimizer": label,
                    "seed": seed,
                    "status": outcome["status"],
                    "message": outcome.get("message"),
                    "report_cross_entropy": final_loss(outcome, "report"),
                    "bits_per_byte": last.get("bits_per_byte"),
                    "perplexity": last.get("perplexity"),
                    "accuracy": last.get("accuracy"),
                    "seconds": outcome.get("seconds", {}).get("training"),
                    "directory": str(Path(outcome["directory"]).relative_to(directory)),
                }
            )
    losses = {n: [final_loss(outcomes[n][seed], "report") for seed in plan.seeds(n)] for n in names}
    entropy = dataset.report.unigram_entropy  # no unigram model of this split does better
    learned = {n: plain_statistics.fmean(losses[n]) < entropy for n in names}
    flags = [
        f"{n}: the best {KNOBS[knob]} lies at the edge of the range tried; a wider search may find a better one"
        for n in names
        for knob in searches[n].edges
    ]
    flags += [f"{n}: did not get below the unigram entropy of {entropy:.3f} nats" for n in names if not learned[n]]
    flags += [
        f"{n}: every trial diverged; centre its search lower with --lr-center {n}=LR"
        for n in names
        if searches[n].diverged
    ]
    flags += [
        f"{t['optimizer']}: trial {t['index']} {t['status']} ({t['message']})"
        for t in trials
        if t["status"] != "finished"
    ]
    flags += [
        f"{f['optimizer']}: seed {f['seed']} {f['status']} ({f['message']})"
        for f in finals
        if f["status"] != "finished"
    ]
    flags += data["notices"]
    return {
        "schema": 1,
        "kind": "comparison",
        "identity": plan.identity,
        "question": f"Is {' or '.join(names[:-1])} better than {reference} here?",
        "optimizers": names,
        "reference": reference,
        "profile": plan.profile,
        "budget": {
            **asdict(plan.budget),
            "tokens_per_update": plan.base.tokens_per_update,
            "knobs": {n: [KNOBS[knob] for knob in searches[n].varied] for n in names},
            "spent": {
                n: {
                    "trials": counters[n],
                    "updates": counters[n] * plan.budget.updates,
                    "training_seconds": sum(t["seconds"] or 0.0 for t in trials if t["optimizer"] == n),
                }
                for n in names
            },
        },
        "setting": {
            "config": plan.base.to_dict(),
            "data": data,
            "updates": plan.budget.updates,
            "device": plan.base.training.device,
            "threads": plan.base.training.threads,
            "versions": versions(),
        },
        "trials": trials,
        "chosen": {
            n: {
                "values": _values(searches[n].best),
                "options": searches[n].best.options(n.split("#")[0]),
                "trial": next(
                    t["index"] for t in trials if t["optimizer"] == n and t["values"] == _values(searches[n].best)
                ),
                "edge": searches[n].at_edge,
            }
            for n in names
        },
        "finals": finals,
        "gate": {"unigram_entropy": entropy, "passed": learned},
        "verdicts": [_verdict(n, reference, losses, learned, entropy) for n in names[:-1]],
        "to_target": _to_target(directory, names, finals),
        "flags": flags,
    }


def _verdict(
    candidate: str, reference: str, losses: dict[str, list[float]], learned: dict[str, bool], entropy: float
) -> dict[str, Any]:
    head = {"candidate": candidate, "reference": reference, "metric": "report cross-entropy (nats/token)"}
    pairs = compare_paired(dict(enumerate(losses[candidate], 1)), dict(enumerate(losses[reference], 1)))
    stuck = [name for name in (candidate, reference) if not learned[name]]
    if len(stuck) == 2:
        sentence = (
            f"no verdict: neither {candidate} nor {reference} got below the unigram entropy of {entropy:.3f} nats; "
            "train for more updates"
        )
        return {**head, **pairs.to_dict(), "verdict": "no verdict", "sentence": sentence}
    return {**head, **pairs.to_dict(), "sentence": pairs.sentence(candidate, reference)}


def _to_target(directory: Path, names: Sequence[str], finals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much each optimizer needed to reach the final loss of each other one: per pair of seeds, then the median."""
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    for final in finals:
        if final["status"] != "finished":
            curves[final["optimizer"]].append([])  # no final loss to reach, and its pair is left out
            continue
        try:
            rows = read_run(directory / final["directory"])["history"]["eval"]
        except InputError:
            rows = []
        curves[final["optimizer"]].append([row for row in rows if row["split"] == "report"])
    table = []
    for name in names:
        for other in names:
            if name == other:
                continue
            pairs = [
                (ours, theirs[-1]["cross_entropy"])
                for ours, theirs in zip(curves[name], curves[other], strict=True)
                if ours and theirs and theirs[-1]["cross_entropy"] is not None
            ]
            if not pairs:
                continue
            needed = [to_target(ours, target) for ours, target in pairs]
            middle = median_to_target(needed)
            table.append(
                {
                    "optimizer": name,
                    "target": f"{other}'s final loss",
                    "target_loss": plain_statistics.fmean(target for _, target in pairs),
                    "updates": middle.updates,
                    "tokens": middle.tokens,
                    "seconds": middle.seconds,
                    "reached": f"{sum(n.updates != float('inf') for n in needed)} of {len(needed)}",
                }
            )
    return table
