"""A comparison before it runs: who takes part, on what, with which budget."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from muonlab.errors import InputError, unknown
from muonlab.optim.registry import OPTIMIZERS
from muonlab.studies.search import Point
from muonlab.training.config import RunConfig, from_dict, merge


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
