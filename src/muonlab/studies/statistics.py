"""Is one optimizer better than another? Pure functions from numbers to verdicts.

Convention everywhere: difference = candidate − reference in nats per token, so negative means that the candidate is
better. A run that diverged has an infinite loss; a run that never reached a target took infinitely long. Both are
evidence and are never dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

from muonlab.errors import InputError

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """What n seeds say about `candidate − reference`. Losses in nats per token."""

    differences: dict[int, float]
    """Seed -> difference, over the seeds that both finished."""
    failed: dict[str, tuple[int, ...]]
    """{"candidate": seeds, "reference": seeds} without a finite loss."""
    mean: float
    interval: tuple[float, float]
    confidence: float
    method: str
    p_value: float
    """Two-sided paired t test of "no difference"."""
    minimum_effect: float
    verdict: Verdict
    detectable_effect: float
    """Smallest true difference that this many seeds find with 80 % power at the spread they showed."""
    seeds_needed: float
    """Seeds that would find a true difference as large as the mean seen here with 80 % power (infinite for none)."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of a verdict in comparison_summary.json: infinities become null."""
        return {
            "differences": list(self.differences.values()),
            "seeds": list(self.differences),
            "failed": {side: list(seeds) for side, seeds in self.failed.items()},
            "mean": _finite(self.mean),
            "interval": [_finite(bound) for bound in self.interval],
            "confidence": self.confidence,
            "method": self.method,
            "p_value": _finite(self.p_value),
            "minimum_effect": self.minimum_effect,
            "verdict": self.verdict,
            "detectable_effect": _finite(self.detectable_effect),
            "seeds_needed": _finite(self.seeds_needed),
        }

    def sentence(self, candidate: str, reference: str, unit: str = "nats/token") -> str:
        """The verdict in plain words, with the interval and, where it is open, what would settle it."""
        n = len(self.differences)
        relation = "than" if self.verdict != "not distinguishable" else "from"
        start = f"{candidate} is {self.verdict} {relation} {reference}"
        names = {"candidate": candidate, "reference": reference}
        unpaired = [f"{names[side]} failed on seed {', '.join(map(str, s))}" for side, s in self.failed.items() if s]
        if not self.differences:
            return f"{start}: no seed finished under both ({'; '.join(unpaired)})"
        if n == 1:
            return f"{start}: one seed shows {self.mean:+.4f} {unit}, and one seed has no error bar"
        low, high = self.interval
        name = {"t": "t interval", "bootstrap": "bootstrap interval"}[self.method]
        text = f"{start}: {self.mean:+.4f} {unit} ({self.confidence:.0%} {name} {low:+.4f} to {high:+.4f}, {n} paired seeds)"
        if unpaired:
            text += f"; {'; '.join(unpaired)}"
        if self.verdict == "not distinguishable":
            text += f"; these seeds would have found a difference of {self.detectable_effect:.4f} in 8 of 10 studies"
            if math.isfinite(self.seeds_needed):
                text += f", and a true difference as large as this one needs about {self.seeds_needed:.0f} seeds"
        return text


def compare_paired(
    candidate: Mapping[int, float | None],
    reference: Mapping[int, float | None],
    *,
    confidence: float = 0.95,
    minimum_effect: float = 0.0,
    method: Literal["t", "bootstrap"] = "t",
) -> PairedComparison:
    """Judge `candidate − reference` from final losses by seed; None, NaN and infinity all mean that a run failed.

    "better" needs the whole interval below −minimum_effect, "worse" the whole interval above +minimum_effect.
    A side that failed on a seed where the other did not cannot win; if no pair is left, it loses.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is not between 0 and 1")
    seeds = [seed for seed in candidate if seed in reference]
    if not seeds:
        raise InputError("no seed was run with both optimizers: a paired comparison needs common seeds")
    differences, failed = {}, {"candidate": [], "reference": []}  # type: ignore[var-annotated]
    for seed in seeds:
        ours, theirs = _loss(candidate[seed]), _loss(reference[seed])
        if math.isinf(ours):
            failed["candidate"].append(seed)
        if math.isinf(theirs):
            failed["reference"].append(seed)
        if math.isfinite(ours) and math.isfinite(theirs):
            differences[seed] = ours - theirs
    values = np.array(list(differences.values()), dtype=float)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    spread = float(values.std(ddof=1)) if n > 1 else math.nan
    interval = _interval(values, confidence, method)
    ours_alone = set(failed["candidate"]) - set(failed["reference"])
    theirs_alone = set(failed["reference"]) - set(failed["candidate"])
    verdict: Verdict = "not distinguishable"
    if n == 0:
        if ours_alone != theirs_alone:
            verdict = "worse" if len(ours_alone) > len(theirs_alone) else "better"
    elif interval[1] < -minimum_effect and not ours_alone:
        verdict = "better"
    elif interval[0] > minimum_effect and not theirs_alone:
        verdict = "worse"
    return PairedComparison(
        differences=differences,
        failed={side: tuple(seeds) for side, seeds in failed.items()},
        mean=mean,
        interval=interval,
        confidence=confidence,
        method=method,
        p_value=_p_value(values),
        minimum_effect=minimum_effect,
        verdict=verdict,
        detectable_effect=detectable_effect(spread, n, confidence=confidence) if n > 1 else math.inf,
        seeds_needed=seeds_needed(mean, spread, confidence=confidence) if n > 1 else math.inf,
    )


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean; infinite for a single value."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (-math.inf, math.inf)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return (float(x.mean()) - half, float(x.mean()) + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, *, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """BCa bootstrap interval of a mean (Efron 1987, through scipy). Too narrow below about ten values: see t_interval."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (-math.inf, math.inf)
    if np.ptp(x) == 0:
        return (float(x[0]), float(x[0]))
    found = stats.bootstrap(
        (x,), np.mean, n_resamples=resamples, confidence_level=confidence, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return (float(found.low), float(found.high))


# --- power ---------------------------------------------------------------------------------------------------------


def power(effect: float, spread: float, n: int, *, confidence: float = 0.95) -> float:
    """Chance that a two-sided paired t test on n seeds finds a true mean difference `effect` (exact, noncentral t).

    `spread` is the standard deviation of the paired differences, in the unit of `effect`.
    """
    if n < 2:
        return 0.0
    if spread == 0:
        return 1.0 if effect else 1 - confidence
    threshold = stats.t.ppf(0.5 + confidence / 2, n - 1)
    shift = abs(effect) / spread * math.sqrt(n)
    wrong_side = stats.nct.cdf(-threshold, n - 1, shift)  # scipy gives NaN where this is far below 1e-16
    return float(min(1.0, stats.nct.sf(threshold, n - 1, shift) + np.nan_to_num(wrong_side)))


def detectable_effect(spread: float, n: int, *, wanted_power: float = 0.8, confidence: float = 0.95) -> float:
    """Smallest true difference that n paired seeds find with `wanted_power`; infinite for a single seed."""
    if n < 2 or not math.isfinite(spread):
        return math.inf
    if spread == 0:
        return 0.0
    upper = 1.0
    while power(upper, 1.0, n, confidence=confidence) < wanted_power:
        upper *= 2
    root = optimize.brentq(lambda d: power(d, 1.0, n, confidence=confidence) - wanted_power, 0.0, upper, xtol=1e-10)
    return float(root) * spread


def seeds_needed(effect: float, spread: float, *, wanted_power: float = 0.8, confidence: float = 0.95) -> float:
    """Smallest number of paired seeds that finds a true difference `effect`; infinite for no effect."""
    if not effect or not math.isfinite(effect) or not math.isfinite(spread):
        return math.inf
    ratio = abs(effect) / spread if spread else math.inf
    enough, too_few = 2, 1
    while power(ratio, 1.0, enough, confidence=confidence) < wanted_power if math.isfinite(ratio) else False:
        too_few, enough = enough, enough * 2
        if enough > 1 << 24:
            return math.inf
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if power(ratio, 1.0, middle, confidence=confidence) < wanted_power:
            too_few = middle
        else:
            enough = middle
    return enough


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How far two runs that differ in nothing but chance lie apart."""

    spread: float
    """Standard deviation of one run, pooled over the groups."""
    degrees: int
    difference: float
    """Two single runs of one configuration differ by more than this in only 5 % of cases."""


def noise_floor(groups: Sequence[Sequence[float]], *, confidence: float = 0.95) -> NoiseFloor:
    """Pooled run-to-run noise from repeats of one or more configurations (each group: losses of one configuration)."""
    kept = [np.asarray(group, dtype=float) for group in groups if len(group) > 1]
    if not kept:
        raise InputError("noise needs at least one configuration that was run twice or more")
    degrees = sum(len(group) - 1 for group in kept)
    spread = math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in kept) / degrees)
    width = float(stats.t.ppf(0.5 + confidence / 2, degrees)) * math.sqrt(2) * spread
    return NoiseFloor(spread=spread, degrees=degrees, difference=width)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given: reject where they are at most the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


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
        loss = _loss(row["cross_entropy"])
        if loss <= target:
            share = 1.0
            if before is not None and math.isfinite(above := _loss(before["cross_entropy"])):
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
    points = [(math.log2(lr), _loss(loss)) for lr, loss in zip(lrs, losses)]
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
        t2 = float(stats.t.ppf(0.5 + confidence / 2, degrees)) ** 2
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
        weights, residual = optimize.nnls(np.stack([(d / unit) ** -b, np.ones_like(d)], axis=1), y)
        return float(residual), weights

    grid = np.geomspace(0.005, 3.0, 120)
    best = int(np.argmin([solve(float(b))[0] for b in grid]))
    bracket = (float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)]))
    b = float(
        optimize.minimize_scalar(lambda b: solve(b)[0], bounds=bracket, method="bounded", options={"xatol": 1e-9}).x
    )
    residual, (a, c) = solve(b)
    return PowerLaw(scale=float(a) * unit**b, exponent=b, floor=float(c), residual=residual / math.sqrt(len(d)))


def data_speedup(reference: PowerLaw, data: float, loss: float) -> float:
    """D_eff / D (Wen et al. 2509.02046): data the reference would need for `loss`, over the data that was used."""
    return reference.data_for(loss) / data


# --- helpers -------------------------------------------------------------------------------------------------------


def _loss(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else float(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(values: np.ndarray, confidence: float, method: str) -> tuple[float, float]:
    if method == "t":
        return t_interval(values, confidence)
    if method == "bootstrap":
        return bootstrap_interval(values, confidence)
    raise InputError(f"unknown interval {method!r}; known: bootstrap, t")


def _p_value(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.nan
    if np.ptp(values) == 0:
        return 0.0 if values[0] else 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def _best_by_lr(lrs: Sequence[float], losses: Sequence[float | None]) -> tuple[list[tuple[float, float]], float]:
    """([(lr, best loss at it)] by rising lr, the best lr)."""
    table: dict[float, float] = {}
    for lr, loss in zip(lrs, losses):
        if not lr > 0:
            raise InputError(f"learning rate {lr} is not positive")
        table[lr] = min(table.get(lr, math.inf), _loss(loss))
    if not any(math.isfinite(loss) for loss in table.values()):
        raise InputError("no trial has a finite loss: nothing to choose a learning rate from")
    return sorted(table.items()), min(table, key=lambda lr: (table[lr], lr))
