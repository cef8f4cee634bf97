"""Which trials an optimizer's tuning budget is spent on: strategies that ask for trials and are told their losses.

Every strategy is deterministic, searches the same knobs for every optimizer, and spends what its rungs say: a function of
the budget alone, so that no optimizer gets more than another.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import scipy

from muonlab.errors import InputError, unknown
from muonlab.studies.space import KNOBS, STEP, Point, center_of, knobs_of


@dataclass(frozen=True)
class Rung:
    """So many trials of so many updates each."""

    updates: int
    trials: int


class Search:
    """Spends the tuning budget of one optimizer. A strategy is a subclass with `propose`.

    `ask` gives the points that can start now (none while it waits for results, none when the budget is spent), `tell`
    takes a result: the loss on the tune split, infinity for a run that diverged. What is asked for depends on the told
    losses alone, not on the order in which they came, so that a stopped search that is told its finished trials again
    goes on where it was.
    """

    summary: ClassVar[str]

    def __init__(
        self, optimizer: str, trials: int, *, updates: int = 1, center: float | None = None, seed: int = 0
    ) -> None:
        self.optimizer, self.trials, self.updates, self.seed = optimizer, trials, updates, seed
        self.center = center_of(optimizer) if center is None else center
        self.knobs = knobs_of(optimizer)
        self.rungs = self.spending(trials, updates)
        self.asked: list[Point] = []
        self.losses: dict[Point, float] = {}

    @classmethod
    def spending(cls, trials: int, updates: int) -> tuple[Rung, ...]:
        """What a budget of `trials` runs of `updates` updates is spent on, from the shortest trials to the longest."""
        if trials < 1:
            raise InputError(f"the tuning budget is {trials} trials; it must be at least 1")
        return (Rung(updates, trials),)

    def propose(self) -> list[Point]:
        """The next points, all results being in: a function of `asked` and `losses`."""
        raise NotImplementedError

    def ask(self) -> list[Point]:
        if len(self.losses) < len(self.asked):
            return []
        left = sum(rung.trials for rung in self.rungs) - len(self.asked)
        points = self.propose()[:left] if left else []
        self.asked += points
        return points

    def tell(self, point: Point, loss: float) -> None:
        self.losses[point] = loss if math.isfinite(loss) else math.inf

    @property
    def best(self) -> Point:
        """The point of full length with the lowest loss, the lowest learning rate at ties: where everything diverged,
        the gentlest."""
        full = [point for point in self.asked if point.updates is None and point in self.losses]
        return min(full, key=lambda point: (self.losses[point], point.lr, self.asked.index(point)))

    @property
    def diverged(self) -> bool:
        """Whether no trial finished."""
        return all(math.isinf(loss) for loss in self.losses.values())

    @property
    def varied(self) -> dict[str, list[float]]:
        """The values tried of every knob of which there is more than one, ascending."""
        tried = {name: sorted({p.values[name] for p in self.losses if name in p.values}) for name in KNOBS}
        return {name: values for name, values in tried.items() if len(values) > 1}

    @property
    def edges(self) -> list[str]:
        """Knobs whose best value is the lowest or highest tried: a wider range may hold a better one."""
        best = self.best.values
        return [name for name, tried in self.varied.items() if best.get(name) in (tried[0], tried[-1])]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the lowest or highest tried."""
        return "lr" in self.edges

    def point(self, stage: str, shares: dict[str, float], updates: int | None = None) -> Point:
        """The point that lies `shares` of the way through the ranges of the named knobs; those that it lacks are left out."""
        values: dict[str, Any] = {name: KNOBS[name].at(share) for name, share in shares.items() if name in self.knobs}
        return Point(stage, **{**values, "lr": self.center * values["lr"], "updates": updates})


class Staged(Search):
    """One knob after the other, the learning rate first and widened where its best value lies at the edge.

    Three learning rates, two to a decade, around the usual one; while the best lies at the edge, one step beyond it; a
    third and three times the learning rate of embeddings and head; half a step to either side of the best learning rate;
    what is left as Sobol points around the best trial: both learning rates within a factor of 3, decay and momentum over
    their whole range.
    """

    summary = "learning rate first, widened at its edges, then the other knobs around the best"

    def propose(self) -> list[Point]:
        if not self.asked:
            ratios = [1.0 / STEP, 1.0, STEP] if self.trials >= 3 else [1.0, STEP]
            return [Point("lr", self.center * ratio) for ratio in ratios]
        if self.diverged:
            return [Point("edge", min(point.lr for point in self.losses) / STEP)]
        best, stages = self.best, {point.stage for point in self.asked}
        if self.at_edge:
            highest = best.lr == max(point.lr for point in self.losses)
            return [replace(best, stage="edge", lr=best.lr * STEP if highest else best.lr / STEP)]
        if "auxiliary" not in stages:
            return [replace(best, stage="auxiliary", auxiliary=best.auxiliary * ratio) for ratio in (1 / 3, 3.0)]
        if "refine" not in stages:
            return [replace(best, stage="refine", lr=best.lr * STEP**half) for half in (-0.5, 0.5)]
        around = {"lr": best.lr / 3.0, "auxiliary": best.auxiliary / 3.0}  # where a factor of 3 to either side begins
        return [
            replace(self.point("sobol", shares), **{name: low * 9.0 ** shares[name] for name, low in around.items()})
            for shares in quasi_random("sobol", self.trials - len(self.asked), self.seed)
        ]


class Grid(Search):
    """Learning rates evenly in their logarithm over the range, times three values of the next knobs as soon as three
    learning rates are left for each: from 9 trials the learning rate of embeddings and head, from 27 weight decay, from
    81 momentum. What does not divide evenly is left unspent, by every optimizer alike."""

    summary = "a regular grid over the learning rates; over decay and momentum too from 27 and 81 trials"

    @classmethod
    def _levels(cls, trials: int) -> list[int]:
        others = [3 if trials >= least else 1 for least in (9, 27, 81)]
        return [trials // math.prod(others), *others]

    @classmethod
    def spending(cls, trials: int, updates: int) -> tuple[Rung, ...]:
        (whole,) = super().spending(trials, updates)
        return (replace(whole, trials=math.prod(cls._levels(trials))),)

    def propose(self) -> list[Point]:
        if self.asked:
            return []
        combinations: list[dict[str, float]] = [{}]
        for (name, knob), levels in zip(KNOBS.items(), self._levels(self.trials), strict=True):
            if levels == 1 and name != "lr":
                continue
            if name not in self.knobs:  # its levels would be the same trial again
                raise InputError(
                    f"{self.optimizer} has no {knob.text}, which a grid of {self.trials} trials varies; use sobol"
                )
            shares = [0.5] if levels == 1 else [index / (levels - 1) for index in range(levels)]
            combinations = [{**one, knob.name: share} for one in combinations for share in shares]
        return [self.point("grid", shares) for shares in combinations]


class QuasiRandom(Search):
    """Points of one sequence over the whole space at once; a larger budget continues the same sequence."""

    sequence: ClassVar[str]

    def propose(self) -> list[Point]:
        if self.asked:
            return []
        return [self.point(self.sequence, shares) for shares in quasi_random(self.sequence, self.trials, self.seed)]


class Sobol(QuasiRandom):
    summary = "a scrambled Sobol sequence over all knobs"
    sequence = "sobol"


class Halton(QuasiRandom):
    summary = "a scrambled Halton sequence over all knobs"
    sequence = "halton"


class Halving(Search):
    """Successive halving (Jamieson and Talwalkar 1502.07943) by thirds: many short trials, the best third goes on.

    The rungs are a ninth, a third and all of the updates; each gets about a third of the budget. The first holds Sobol
    points over the whole space. A trial is judged in mid-run: on the first updates of the run of full length, with that
    run's schedule, stopped early. A complete short run would be the other choice, but its warm-up and decay are others,
    and the learning rate that is best after 40 updates of a schedule over 40 is not the one for 400. The price is that
    high learning rates, which gain most while the rate falls, look worse in mid-run than they end; the best third,
    not the best one, goes on for that reason.

    Each rung starts from the first update again (the same numbers, bit for bit on a CPU, as going on from where the
    shorter run stopped), and all updates are counted: a run stays a value that never changes after it has finished.
    """

    summary = "many short trials of the full-length schedule, the best third of them longer, then at full length"
    factor: ClassVar[int] = 3

    @classmethod
    def spending(cls, trials: int, updates: int) -> tuple[Rung, ...]:
        super().spending(trials, updates)
        count = min(3, trials)
        lengths = sorted({math.ceil(updates / cls.factor**rung) for rung in range(count)}, reverse=True)
        left, rungs = trials * updates, []
        for index, length in enumerate(lengths):
            share = left / (len(lengths) - index) / length  # what is left, evenly over the rungs that are left
            rungs.append(Rung(length, math.ceil(share) if index == 0 else math.floor(share)))
            left -= rungs[-1].updates * rungs[-1].trials
        return tuple(reversed(rungs))

    def propose(self) -> list[Point]:
        made, index = 0, 0
        while made < len(self.asked):
            made, index = made + self.rungs[index].trials, index + 1
        rung = self.rungs[index]
        stage, updates = f"rung {index + 1}", None if rung.updates == self.updates else rung.updates
        if index == 0:
            return [self.point(stage, s, updates=updates) for s in quasi_random("sobol", rung.trials, self.seed)]
        last = self.asked[-self.rungs[index - 1].trials :]
        ranked = sorted(last, key=lambda point: (self.losses[point], point.lr))
        return [replace(point, stage=stage, updates=updates) for point in ranked[: rung.trials]]


class Optuna(Search):
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011): a third of the trials, the centre first, at random,
    then two at a time where good trials are dense and bad ones rare.

    The study lives in memory and is told all trials again after a stop; the run directories are the only record, and
    Optuna asks for the same points as long as its version is the same.
    """

    summary = "Optuna's TPE sampler over all knobs (needs the extra optuna)"
    batch: ClassVar[int] = 2

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        try:
            import optuna
        except ModuleNotFoundError:
            raise InputError("the search 'optuna' needs Optuna; pip install 'muonlab[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.startup = max(2, self.trials // 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is marked experimental
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=self.startup, constant_liar=True)
        self.study = optuna.create_study(sampler=sampler)
        self.study.enqueue_trial(dict.fromkeys(self.knobs, 0.5))
        self.open: list[tuple[Any, Point]] = []

    def propose(self) -> list[Point]:
        for trial, point in self.open:  # in the order asked, whatever the order in which they ended
            self.study.tell(trial, self.losses[point])
        trials = [self.study.ask() for _ in range(self.batch if self.asked else self.startup)]
        left = self.trials - len(self.asked)
        self.open = [
            (trial, self.point("tpe", {name: trial.suggest_float(name, 0.0, 1.0) for name in self.knobs}))
            for trial in trials[:left]
        ]
        return [point for _, point in self.open]


STRATEGIES: dict[str, type[Search]] = {
    "staged": Staged,
    "grid": Grid,
    "sobol": Sobol,
    "halton": Halton,
    "halving": Halving,
    "optuna": Optuna,
}


def strategy(name: str) -> type[Search]:
    """A strategy by name; InputError with the nearest one for a name that is none."""
    if name not in STRATEGIES:
        raise unknown("search", name, STRATEGIES)
    return STRATEGIES[name]


def quasi_random(sequence: str, count: int, seed: int) -> list[dict[str, float]]:
    """The first `count` points of a scrambled sequence as shares (0 to 1) of the range of every knob."""
    if (
        sequence == "sobol"
    ):  # whole powers of two are balanced; the first points of a longer sequence are those of a shorter
        points = scipy.stats.qmc.Sobol(len(KNOBS), scramble=True, rng=seed).random_base2(
            max(1, math.ceil(math.log2(count)))
        )
    else:
        points = scipy.stats.qmc.Halton(len(KNOBS), scramble=True, rng=seed).random(count)
    return [dict(zip(KNOBS, point, strict=True)) for point in points[:count].tolist()]
