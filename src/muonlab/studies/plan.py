"""A comparison before it runs: who takes part, on what, with which budget."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from muonlab.errors import InputError, unknown
from muonlab.studies.search import Rung, Search, strategy
from muonlab.studies.space import Point, center_of, check_optimizer, is_import_path, registered_name
from muonlab.training.config import RunConfig, from_dict, merge

TWIN = 1000
"""Distance between the first seeds of an optimizer and of its twin: the same however many seeds there are."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every optimizer gets, the same for all: counted, printed and kept."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    trials: int = 12
    """Tuning runs of full length per optimizer, judged on the tune split; a search may spend them as more, shorter ones."""
    seeds: int = 5
    """Final runs per optimizer with its chosen configuration, judged on the report split."""
    updates: int = 400
    """Updates of a run: tuning and judging happen at the same horizon."""

    def __post_init__(self) -> None:
        if self.trials < 1 or self.seeds < 1 or self.updates < 1:
            raise InputError(f"the budget needs at least one trial, seed and update, not {self}")
        if self.seeds > TWIN:
            raise InputError(f"the budget has {self.seeds} seeds; at most {TWIN} keep those of twins apart")


PROFILES = {
    "quick": (Budget(trials=5, seeds=3, updates=100), {"training": {"micro_batch_size": 8, "eval_tokens": 16_384}}),
    "standard": (Budget(), {}),
}
"""Budget and settings of a named profile: quick is what `make quick` runs, minutes on two cores."""


def labels(optimizers: Sequence[str]) -> list[str]:
    """A label per contestant: a registered name or the import path of a class (torch.optim.NAdam). One that is named twice
    is compared with itself: muon, muon#2."""
    for name in dict.fromkeys(optimizers):
        check_optimizer(name)
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
    search: str = "staged"
    """Strategy that spends the trials, the same for every optimizer."""
    minimum_effect: float = 0.0
    """Differences up to this many nats are of no interest: a verdict needs the whole interval beyond it."""

    @property
    def identity(self) -> str:
        """What the comparison is about. Trials and seeds are no part of it: more of them extend it."""
        values = [self.optimizers, self.base.to_dict(), self.budget.updates, dict(self.centers or {}), self.search]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """What each optimizer's tuning is spent on."""
        return strategy(self.search).spending(self.budget.trials, self.budget.updates)

    @property
    def tuning_updates(self) -> int:
        """Updates that each optimizer's tuning takes."""
        return sum(rung.updates * rung.trials for rung in self.rungs)

    @property
    def runs(self) -> int:
        return len(self.optimizers) * (sum(rung.trials for rung in self.rungs) + self.budget.seeds)

    @property
    def updates(self) -> int:
        """Updates of all runs together."""
        return len(self.optimizers) * (self.tuning_updates + self.budget.seeds * self.budget.updates)

    def new_search(self, label: str) -> Search:
        """The search of one contestant, nothing asked yet."""
        optimizer = optimizer_of(label)
        center = (self.centers or {}).get(label, (self.centers or {}).get(optimizer))
        return strategy(self.search)(optimizer, self.budget.trials, updates=self.budget.updates, center=center)

    def config(self, label: str, point: Point, seed: int, split: str) -> RunConfig[Any]:
        optimizer = optimizer_of(label)
        updates = point.updates or self.budget.updates
        changes: dict[str, Any] = {
            "name": f"{label.replace('#', '-')}-{'tune' if split == 'tune' else 'final'}",
            "seed": seed,
            "optimizer": {"name": registered_name(optimizer), **point.options(optimizer)},
            "training": {"updates": updates, "eval_splits": [split]},
        }
        if split == "tune":  # the curve of a trial decides nothing: evaluate where it ends
            changes["training"]["eval_every"] = updates
        if updates < self.budget.updates:  # the first updates of the run of full length, with that run's schedule
            changes["schedule"] = {"stretch": self.base.schedule.stretch * self.budget.updates / updates}
        values = self.base.to_dict()
        values.pop("optimizer")
        return from_dict(merge(values, changes))

    def seeds(self, label: str) -> list[int]:
        """n seeds from the base's on, the same for all (pairs share initial weights and data); a twin has its own."""
        twin = int(label.split("#")[1]) - 1 if "#" in label else 0
        first = self.base.seed + twin * TWIN
        return list(range(first, first + self.budget.seeds))

    @property
    def tuning_seed(self) -> int:
        """The one seed of all trials, which no final run has: the choice cannot profit from the luck it is judged by."""
        return self.base.seed - 1


def optimizer_of(label: str) -> str:
    """The optimizer that a label stands for."""
    return label.split("#")[0]


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
    search: str = "staged",
    minimum_effect: float = 0.0,
) -> Plan:
    """A plan from nested configuration values laid on those of the profile; `budget` replaces single numbers of it."""
    strategy(search)
    if not 0 <= minimum_effect < math.inf:
        raise InputError(f"the minimum effect is {minimum_effect} nats; it must be 0 or more")
    names = labels(optimizers)
    for name, center in (centers or {}).items():
        if name not in names:
            raise unknown("optimizer of this comparison", name, names)
        if not 0 < center < math.inf:
            raise InputError(f"the learning-rate centre of {name} is {center}; it must be above 0")
    chosen = make_budget(profile, **(budget or {}))
    # the optimizer of the base is replaced in every run, but is a part of the identity
    first = {"name": "class", "class_path": optimizers[0]} if is_import_path(optimizers[0]) else optimizers[0]
    values = merge(base_values(profile, chosen), {**base, "optimizer": first})
    config = from_dict(values)
    if config.training.updates != chosen.updates:
        raise InputError(
            f"training.updates is {config.training.updates}, the budget's {chosen.updates}; set the budget's"
        )
    if config.seed < 1:
        raise InputError("the first seed of a comparison must be at least 1: the one below it belongs to the trials")
    plan = Plan(tuple(optimizers), config, chosen, profile, centers, search, minimum_effect)
    for name in names:
        plan.new_search(name)  # what a strategy lacks is said before anything runs
    return plan


def tuning_text(plan: Plan) -> str:
    """What each optimizer's tuning is spent on, in words."""
    rungs = ", ".join(f"{rung.trials} trials x {rung.updates} updates" for rung in plan.rungs)
    return f"{rungs} of tuning by {plan.search} search ({plan.tuning_updates} updates)"


def notices(plan: Plan) -> list[str]:
    """What is to be known before a plan runs: where the search of a class begins, since nobody has registered a centre."""
    return [
        f"{name}: no learning rate is registered for a class; its search begins at AdamW's {center_of(name):g} "
        f"(--lr-center {name}=LR sets another)"
        for name in dict.fromkeys(plan.optimizers)
        if is_import_path(name) and name not in (plan.centers or {})
    ]
