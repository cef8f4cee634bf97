"""Which trials an optimizer's tuning budget is spent on: ask and tell, deterministic, the same rule for every optimizer."""

import math
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import qmc

from muonlab.errors import InputError
from muonlab.optim.registry import OPTIMIZERS

STEP = math.sqrt(10.0)
"""Ratio of neighbouring learning rates in the first stage: two to a decade."""

AUXILIARY = 3.0
"""Where the learning rate of embeddings and head starts, as a multiple of the matrices': on the micro model both AdamW and
Muon were better at 3 than at 1 (by 0.6 and 0.1 nats after 100 updates). The same for every optimizer."""

STAGES = {
    "lr": "three learning rates, two to a decade, around the optimizer's usual one",
    "edge": "one step beyond the best learning rate while that one lies at the edge of its range",
    "auxiliary": "a third and three times the learning rate of embeddings and head, at the best learning rate",
    "refine": "half a step to either side of the best learning rate",
    "sobol": "quasi-random points over all knobs around the best trial",
}


@dataclass(frozen=True)
class Point:
    """One trial: what to set, and the stage of the search that asked for it."""

    stage: str
    lr: float
    """Learning rate of hidden matrices and of everything without one of its own."""
    auxiliary: float = AUXILIARY
    """Learning rate of embeddings and head as a multiple of `lr`."""
    weight_decay: float | None = None
    """None keeps the optimizer's default, as does the next."""
    momentum: float | None = None

    def options(self, optimizer: str) -> dict[str, Any]:
        """The optimizer's options that this point sets."""
        values: dict[str, Any] = {"lr": self.lr}
        values["embedding_lr"] = values["head_lr"] = self.lr * self.auxiliary
        if self.weight_decay is not None:
            values["weight_decay"] = self.weight_decay
        if self.momentum is not None:
            fields = OPTIMIZERS[optimizer].options.__dataclass_fields__
            if "momentum" in fields:
                values["momentum"] = self.momentum
            elif "betas" in fields:
                values["betas"] = [self.momentum, getattr(OPTIMIZERS[optimizer].options(), "betas")[1]]  # noqa: B009 - typed as the base
        return values


class Search:
    """Spends exactly `trials` trials of one optimizer.

    `ask` gives the points that can start now (none while it waits for results), `tell` takes a result: the loss on the
    tune split, infinity for a run that diverged. The sequence depends on the told losses alone, so that a stopped search
    that is told its finished trials again asks for the next one.
    """

    def __init__(self, optimizer: str, trials: int, center: float | None = None, seed: int = 0) -> None:
        if trials < 1:
            raise InputError(f"the tuning budget is {trials} trials; it must be at least 1")
        self.optimizer, self.trials, self.seed = optimizer, trials, seed
        self.center = OPTIMIZERS[optimizer].lr_center if center is None else center
        first = [1.0 / STEP, 1.0, STEP] if trials >= 3 else [1.0, STEP][:trials]
        self.asked: list[Point] = []
        self.losses: dict[Point, float] = {}
        self._queue = [Point("lr", self.center * ratio) for ratio in first]
        self._stages_done: set[str] = set()

    @property
    def best(self) -> Point:
        """The point with the lowest loss, the lowest learning rate at ties: where everything diverged, the gentlest."""
        return min(self.losses, key=lambda point: (self.losses[point], point.lr, self.asked.index(point)))

    @property
    def diverged(self) -> bool:
        """Whether no trial finished."""
        return all(math.isinf(loss) for loss in self.losses.values())

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the lowest or highest tried: a wider range may hold a better one."""
        tried = [point.lr for point in self.losses]
        return len(set(tried)) > 1 and self.best.lr in (min(tried), max(tried))

    @property
    def varied(self) -> dict[str, list[float]]:
        """The values tried of every knob of which there is more than one, ascending."""
        tried: dict[str, list[float]] = {}
        for knob in ("lr", "auxiliary", "weight_decay", "momentum"):
            values = sorted({value for point in self.losses if (value := getattr(point, knob)) is not None})
            if len(values) > 1:
                tried[knob] = values
        return tried

    @property
    def edges(self) -> list[str]:
        """Knobs whose best value is the lowest or highest tried."""
        best = self.best
        return [knob for knob, values in self.varied.items() if getattr(best, knob) in (values[0], values[-1])]

    def tell(self, point: Point, loss: float) -> None:
        self.losses[point] = loss if math.isfinite(loss) else math.inf

    def ask(self) -> list[Point]:
        if not self._queue and len(self.losses) == len(self.asked):
            self._plan()
        points = self._queue[: self.trials - len(self.asked)]
        self._queue = []
        self.asked += points
        return points

    def _plan(self) -> None:
        """Fill the queue with the next stage, all results being in."""
        if self.diverged:
            self._queue = [Point("edge", min(point.lr for point in self.losses) / STEP)]
            return
        best = self.best
        if self.at_edge:
            direction = 1.0 if best.lr == max(point.lr for point in self.losses) else -1.0
            self._queue = [replace(best, stage="edge", lr=best.lr * STEP**direction)]
        elif "auxiliary" not in self._stages_done:
            self._stages_done.add("auxiliary")
            self._queue = [replace(best, stage="auxiliary", auxiliary=best.auxiliary * ratio) for ratio in (1 / 3, 3.0)]
        elif "refine" not in self._stages_done:
            self._stages_done.add("refine")
            self._queue = [replace(best, stage="refine", lr=best.lr * STEP**half) for half in (-0.5, 0.5)]
        else:
            self._queue = self._sobol(best)

    def _sobol(self, best: Point) -> list[Point]:
        """All remaining trials at once, around the best: lr and auxiliary within a factor of 3, weight decay 0.003-0.3,
        momentum 0.8-0.98 (uniform in log(1 - momentum))."""
        count = self.trials - len(self.asked)
        if count <= 0:
            return []
        unit = qmc.Sobol(4, scramble=True, rng=self.seed).random_base2(max(1, math.ceil(math.log2(count))))[:count]
        return [
            Point(
                "sobol",
                best.lr * 3.0 ** (2 * u - 1),
                best.auxiliary * 3.0 ** (2 * v - 1),
                0.003 * 100.0**w,
                1.0 - 0.02 * 10.0**m,
            )
            for u, v, w, m in unit.tolist()
        ]
