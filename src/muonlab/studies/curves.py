"""What loss curves and sweeps say: time to a target, the good range of learning rates, its optimum, profiles, power laws.

Pure functions from numbers to numbers. A run that diverged has an infinite loss, one that never reached a target took
infinitely long; both are evidence and are never dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy
from scipy import special

from muonlab.errors import InputError
from muonlab.studies.statistics import loss_or_infinity

# --- how long to a target ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToTarget:
    """What it took to reach a target loss; infinite where it was never reached."""

    updates: float
    tokens: float
    seconds: float

    @property
    def reached(self) -> bool:
        return math.isfinite(self.updates)


def to_target(evaluations: Sequence[Mapping[str, Any]], target: float) -> ToTarget:
    """First crossing of `target` by the evaluations of one run (rows with update, tokens, seconds, cross_entropy).

    Linear between evaluations; seconds are training seconds, without evaluation and compilation. Rows must be of one
    split and are sorted here by update; a NaN loss reaches nothing.
    """
    rows = sorted(evaluations, key=lambda row: row["update"])
    before: Mapping[str, Any] | None = None
    for row in rows:
        loss = loss_or_infinity(row["cross_entropy"])
        if loss <= target:
            share = 1.0
            if before is not None and math.isfinite(above := loss_or_infinity(before["cross_entropy"])):
                share = (above - target) / (above - loss) if above > loss else 1.0
            start = before if before is not None and share < 1.0 else row
            updates, tokens, seconds = (
                start[key] + share * (row[key] - start[key]) for key in ("update", "tokens", "seconds")
            )
            return ToTarget(updates=float(updates), tokens=float(tokens), seconds=float(seconds))
        before = row
    return ToTarget(updates=math.inf, tokens=math.inf, seconds=math.inf)


def median_to_target(runs: Sequence[ToTarget]) -> ToTarget:
    """Median over seeds with runs that never arrived counted as infinite: infinite once half of them did not."""
    if not runs:
        raise InputError("no run to take a median of")

    def median(values: list[float]) -> float:
        values = sorted(values)
        low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
        return high if math.isinf(high) else (low + high) / 2

    return ToTarget(**{key: median([getattr(run, key) for run in runs]) for key in ("updates", "tokens", "seconds")})


# --- learning rates ------------------------------------------------------------------------------------------------

Edge = Literal["low", "high", "both"]


def edge_of_range(lrs: Sequence[float], losses: Sequence[float | None]) -> Edge | None:
    """On which edge of the learning rates tried the best one lies; "both" when only one was tried, None when inside.

    A diverged trial counts as tried: a best value next to one that diverged is not at the edge.
    """
    tried, best = _best_by_lr(lrs, losses)
    if len(tried) == 1:
        return "both"
    if best == tried[0][0]:
        return "low"
    return "high" if best == tried[-1][0] else None


@dataclass(frozen=True, kw_only=True)
class LRTolerance:
    """The range of learning rates whose loss lies within `delta` of the best."""

    best: float
    low: float
    high: float
    octaves: float
    """log2(high / low)"""
    open_low: bool
    """The range ends where the search ended: it may be wider."""
    open_high: bool


def lr_tolerance(lrs: Sequence[float], losses: Sequence[float | None], delta: float = 0.05) -> LRTolerance:
    """Width of the good range around the best learning rate, by linear interpolation of the loss in log2(lr).

    Of several trials at one learning rate the best counts. The range stops at a trial that diverged, without
    interpolating towards it.
    """
    tried, best_lr = _best_by_lr(lrs, losses)
    x = [math.log2(lr) for lr, _ in tried]
    y = [loss for _, loss in tried]
    best = [lr for lr, _ in tried].index(best_lr)
    limit = y[best] + delta

    def walk(step: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + step < len(y) and y[i + step] <= limit:
            i += step
        if not 0 <= i + step < len(y):
            return x[i], True
        if math.isinf(y[i + step]):
            return x[i], False
        return x[i] + (limit - y[i]) / (y[i + step] - y[i]) * (x[i + step] - x[i]), False

    (low, open_low), (high, open_high) = walk(-1), walk(+1)
    return LRTolerance(
        best=best_lr, low=2**low, high=2**high, octaves=high - low, open_low=open_low, open_high=open_high
    )


@dataclass(frozen=True, kw_only=True)
class LROptimum:
    """The vertex of a parabola through (log lr, loss)."""

    lr: float
    interval: tuple[float, float]
    """Fieller's exact interval; (0, inf) where the points do not show a minimum."""
    loss: float
    curvature: float
    """Loss in nats lost one octave away from the optimum."""


def lr_optimum(lrs: Sequence[float], losses: Sequence[float | None], *, confidence: float = 0.95) -> LROptimum | None:
    """Best learning rate by a least-squares parabola in log2(lr); None with fewer than three points or no minimum.

    The interval is the set of learning rates at which the slope of the parabola cannot be told from zero (Fieller
    1954); with exactly three learning rates there is no residual and the interval is (0, inf). A parabola holds only
    near the optimum: pass the trials near the best.
    """
    points = [(math.log2(lr), loss_or_infinity(loss)) for lr, loss in zip(lrs, losses)]
    x, y = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2).T
    if len(set(x)) < 3:
        return None
    center = x.mean()
    design = np.stack([np.ones_like(x), x - center, (x - center) ** 2], axis=1)  # [points, 3]
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    a, b, c = (float(value) for value in coefficients)
    if c <= 0:
        return None
    vertex = -b / (2 * c)
    degrees = len(x) - 3
    low, high = -math.inf, math.inf
    if degrees > 0:
        variance = float(((y - design @ coefficients) ** 2).sum()) / degrees
        covariance = variance * np.linalg.inv(design.T @ design)
        t2 = float(special.stdtrit(degrees, 0.5 + confidence / 2)) ** 2
        # slope(x) = b + 2cx; its t statistic is within ±t where q2 x² + q1 x + q0 <= 0
        q2 = 4 * (c**2 - t2 * covariance[2, 2])
        q1 = 4 * (b * c - t2 * covariance[1, 2])
        q0 = b**2 - t2 * covariance[1, 1]
        if q2 > 0:
            half = math.sqrt(max(0.0, q1**2 - 4 * q2 * q0))
            low, high = (-q1 - half) / (2 * q2), (-q1 + half) / (2 * q2)
    return LROptimum(
        lr=2 ** (vertex + center),
        interval=(2 ** (low + center) if math.isfinite(low) else 0.0, 2 ** (high + center)),
        loss=a - b**2 / (4 * c),
        curvature=c,
    )


# --- across workloads and budgets ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PerformanceProfile:
    """For each submission the share of workloads on which it took at most τ times the fastest submission's time."""

    ratios: dict[str, list[float]]
    """Submission -> time / fastest time, by workload."""
    scores: dict[str, float]
    """Area under the profile from τ = 1 to `tau_max`, divided by its width: 1 is the fastest everywhere."""
    tau_max: float

    def share(self, submission: str, tau: float) -> float:
        return sum(ratio <= tau for ratio in self.ratios[submission]) / len(self.ratios[submission])


def performance_profile(times: Mapping[str, Sequence[float]], *, tau_max: float = 4.0) -> PerformanceProfile:
    """Dolan and Moré's profile as AlgoPerf scores it (Dahl et al. 2306.07179): a missed target is infinite time.

    `times[submission]` is the time to target per workload, in one order for all submissions.
    """
    lengths = {len(row) for row in times.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise InputError("a performance profile needs the same workloads, at least one, for every submission")
    fastest = [min(column) for column in zip(*times.values())]
    ratios = {
        name: [t / best if math.isfinite(t) else math.inf for t, best in zip(row, fastest)]
        for name, row in times.items()
    }
    # the profile is a staircase that gains 1/workloads at each ratio, so its area is the mean of what lies right of them
    scores = {
        name: sum(max(0.0, tau_max - ratio) for ratio in row) / len(row) / (tau_max - 1) for name, row in ratios.items()
    }
    return PerformanceProfile(ratios=ratios, scores=scores, tau_max=tau_max)


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """L(D) = scale · D^(−exponent) + floor (D: tokens or any measure of data; L: nats)."""

    scale: float
    exponent: float
    floor: float
    residual: float
    """Root mean square of the residuals in nats."""

    def loss(self, data: float) -> float:
        return float(self.scale * data**-self.exponent + self.floor)

    def data_for(self, loss: float) -> float:
        """D at which the law reaches `loss`; infinite at or below the floor."""
        return float(((loss - self.floor) / self.scale) ** (-1 / self.exponent)) if loss > self.floor else math.inf


def fit_power_law(data: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Least squares of L = a·D^−b + c with a, c ≥ 0: linear in a and c for each b, so only b is searched."""
    d, y = np.asarray(data, dtype=float), np.asarray(losses, dtype=float)
    if len(set(data)) < 3 or not np.isfinite(y).all():
        raise InputError("a power law with a floor needs finite losses at three or more sizes of data")
    unit = math.exp(float(np.log(d).mean()))

    def solve(b: float) -> tuple[float, np.ndarray]:
        weights, residual = scipy.optimize.nnls(np.stack([(d / unit) ** -b, np.ones_like(d)], axis=1), y)
        return float(residual), weights

    grid = np.geomspace(0.005, 3.0, 120)
    best = int(np.argmin([solve(float(b))[0] for b in grid]))
    bracket = (float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)]))
    b = float(
        scipy.optimize.minimize_scalar(
            lambda b: solve(b)[0], bounds=bracket, method="bounded", options={"xatol": 1e-9}
        ).x
    )
    residual, (a, c) = solve(b)
    return PowerLaw(scale=float(a) * unit**b, exponent=b, floor=float(c), residual=residual / math.sqrt(len(d)))


def data_speedup(reference: PowerLaw, data: float, loss: float) -> float:
    """D_eff / D (Wen et al. 2509.02046): data the reference would need for `loss`, over the data that was used."""
    return reference.data_for(loss) / data


def _best_by_lr(lrs: Sequence[float], losses: Sequence[float | None]) -> tuple[list[tuple[float, float]], float]:
    """([(lr, best loss at it)] by rising lr, the best lr)."""
    table: dict[float, float] = {}
    for lr, loss in zip(lrs, losses):
        if not lr > 0:
            raise InputError(f"learning rate {lr} is not positive")
        table[lr] = min(table.get(lr, math.inf), loss_or_infinity(loss))
    if not any(math.isfinite(loss) for loss in table.values()):
        raise InputError("no trial has a finite loss: nothing to choose a learning rate from")
    return sorted(table.items()), min(table, key=lambda lr: (table[lr], lr))
