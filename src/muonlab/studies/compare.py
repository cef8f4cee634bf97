"""The comparison protocol: equal tuning budgets on the tune split, then n paired seeds judged on the report split."""

import hashlib
import json
import statistics as plain_statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

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

TUNING_SEED = 0
"""Trials share one seed, which no final run uses: the choice cannot profit from the luck it is judged by."""


def labels(optimizers: Sequence[str]) -> list[str]:
    """A label per contestant; an optimizer named twice is compared with itself: muon, muon#2."""
    for name in optimizers:
        if name not in OPTIMIZERS:
            raise unknown("optimizer", name, OPTIMIZERS)
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
        """Seeds 1 to n, the same for all (pairs share initial weights and data); those of a twin are its own."""
        twin = int(label.split("#")[1]) - 1 if "#" in label else 0
        return [twin * 1000 + index for index in range(1, self.budget.seeds + 1)]


def make_plan(
    optimizers: Sequence[str],
    base: Mapping[str, Any],
    *,
    profile: str = "standard",
    budget: Mapping[str, int] | None = None,
    centers: Mapping[str, float] | None = None,
) -> Plan:
    """A plan from nested configuration values; `budget` overrides single numbers of the profile."""
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    labels(optimizers)
    default, settings = PROFILES[profile]
    chosen = Budget(**{**asdict(default), **{k: v for k, v in (budget or {}).items() if v is not None}})
    values = merge(settings, {**base, "optimizer": optimizers[0]})
    training = values.setdefault("training", {})
    training["updates"] = chosen.updates
    training.setdefault("eval_every", max(1, chosen.updates // 5))
    training.setdefault("checkpoint_every", max(1, chosen.updates))
    return Plan(tuple(optimizers), from_dict(values), chosen, profile, centers)


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
    workers: int = 0,
    command: str = "",
    fallback: bool = False,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a comparison and return its summary, also written to `comparison_summary.json` in `directory`.

    Runs lie in `directory/runs`; what is finished there is not run again, so that a stopped comparison goes on where it
    was. `workers` processes run at a time (0: this one), each with the threads that the base says. When `should_stop`
    says so, running jobs stop cleanly and KeyboardInterrupt is raised.
    """
    started = time.perf_counter()
    plan, dataset = resolve_plan(plan, fallback=fallback, progress=False)
    directory = comparison_directory(plan) if directory is None else Path(directory)
    names = labels(plan.optimizers)
    _claim(directory, plan)
    trials: list[dict[str, Any]] = []
    searches = {n: Search(n.split("#")[0], plan.budget.trials, (plan.centers or {}).get(n)) for n in names}
    with Executor(workers, on_progress, should_stop) as executor:
        points: dict[tuple[str, Path], tuple[int, Point]] = {}

        def submit(label: str) -> None:
            for point in searches[label].ask():
                index = len(points)
                job = _job(plan, directory, label, point, TUNING_SEED, "tune", f"{point.stage}: lr {point.lr:.2g}")
                points[label, job.directory] = (index, point)
                executor.submit(job)

        for label in names:
            submit(label)
        for job, outcome in executor.results():
            _, point = points[job.group, job.directory]
            loss = final_loss(outcome, "tune")
            searches[job.group].tell(point, loss)
            trials.append(_trial(directory, job, point, outcome, loss))
            submit(job.group)
        for label in names:
            best = searches[label].best
            for seed in plan.seeds(label):
                executor.submit(_job(plan, directory, label, best, seed, "report", f"seed {seed}"))
        outcomes: dict[str, dict[int, dict[str, Any]]] = {label: {} for label in names}
        for job, outcome in executor.results():
            outcomes[job.group][job.config.seed] = outcome
    order = {path: index for (_, path), (index, _) in points.items()}
    trials.sort(key=lambda trial: order[directory / trial["directory"]])
    summary = _summary(plan, directory, dataset.describe(), searches, trials, outcomes)
    summary["command"] = command
    summary["workers"] = workers
    summary["wall_seconds"] = time.perf_counter() - started
    write_json(directory / SUMMARY, summary)
    return summary


def final_loss(outcome: Mapping[str, Any], split: str) -> float:
    """Cross-entropy at the last evaluation on `split`; infinity for a run that did not finish."""
    if outcome["status"] != "finished":
        return float("inf")
    return float(outcome["final"][split]["cross_entropy"])


def _claim(directory: Path, plan: Plan) -> None:
    """Make `directory` this plan's; InputError when it holds another one's."""
    file = directory / "plan.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8")).get("identity")
        if found != plan.identity:
            raise InputError(
                f"{directory} holds another comparison ({found}, this is {plan.identity}); choose another --output"
            )
        return
    try:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"{directory} is not empty and holds no comparison; choose another --output")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None
    values = {"identity": plan.identity, "optimizers": plan.optimizers, "budget": asdict(plan.budget)}
    write_json(file, {**values, "base": plan.base.to_dict(), "centers": dict(plan.centers or {})})


def _job(plan: Plan, directory: Path, label: str, point: Point, seed: int, split: str, text: str) -> Job:
    config = plan.config(label, point, seed, split)
    values = {**config.to_dict(), "label": label}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return Job(label, text, config, directory / "runs" / f"{config.name}-{digest}")


def _trial(directory: Path, job: Job, point: Point, outcome: dict[str, Any], loss: float) -> dict[str, Any]:
    return {
        "optimizer": job.group,
        "stage": point.stage,
        "values": {key: value for key, value in asdict(point).items() if key != "stage" and value is not None},
        "status": outcome["status"],
        "message": outcome.get("message"),
        "tune_cross_entropy": loss,
        "seconds": outcome.get("seconds", {}).get("training"),
        "directory": str(job.directory.relative_to(directory)),
    }


def _summary(
    plan: Plan,
    directory: Path,
    data: dict[str, Any],
    searches: dict[str, Search],
    trials: list[dict[str, Any]],
    outcomes: dict[str, dict[int, dict[str, Any]]],
) -> dict[str, Any]:
    names = list(searches)
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
    entropy = data["unigram_entropy"]
    learned = {n: plain_statistics.fmean(losses[n]) < entropy for n in names}
    flags = [
        f"{n}: best learning rate {searches[n].best.lr:.3g} lies at the edge of the range tried; a wider search may improve it"
        for n in names
        if searches[n].at_edge
    ]
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
            "knobs": {n: ["lr", "embedding_lr = head_lr", "weight_decay", "momentum (Adam: beta 1)"] for n in names},
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
                "values": {k: v for k, v in asdict(searches[n].best).items() if k != "stage" and v is not None},
                "options": searches[n].best.options(n.split("#")[0]),
                "trial": next(
                    t["index"]
                    for t in trials
                    if t["optimizer"] == n and t["tune_cross_entropy"] == searches[n].losses[searches[n].best]
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
