"""Is one optimizer better than another? Pure functions from numbers to verdicts.

Convention everywhere: difference = candidate − reference in nats per token, so negative means that the candidate is
better. A run that diverged has an infinite loss; a run that never reached a target took infinitely long. Both are
evidence and are never dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import scipy  # loads a part of itself when it is used: stats takes most of a second
from scipy import special

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
    holm: float | None = None
    """p-value corrected for all comparisons of its family; None outside of one, or without a p-value."""

    @property
    def lost_to_family(self) -> bool:
        """Whether it is not distinguishable for the number of comparisons alone."""
        outside = self.interval[1] < -self.minimum_effect or self.interval[0] > self.minimum_effect
        return self.verdict == "not distinguishable" and outside and (self.holm or 0.0) > 1 - self.confidence

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
            "holm": self.holm,
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
        if self.lost_to_family:
            text += f"; the interval alone would decide, the p-value corrected for all comparisons is {self.holm:.3f}"
        elif self.verdict == "not distinguishable":
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
        ours, theirs = loss_or_infinity(candidate[seed]), loss_or_infinity(reference[seed])
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


def compare_family(
    candidates: Mapping[str, Mapping[int, float | None]], reference: Mapping[int, float | None], **options: Any
) -> dict[str, PairedComparison]:
    """Every candidate against one reference as one family (arguments as `compare_paired`).

    "better" and "worse" must hold after Holm's correction too, so that equal optimizers, however many, give a wrong verdict
    in 1 − confidence of all families. Intervals are those of the single comparisons. A verdict that failed runs alone
    decide has no p-value and is no member of the family.
    """
    results = {name: compare_paired(losses, reference, **options) for name, losses in candidates.items()}
    tested = {name: result.p_value for name, result in results.items() if not math.isnan(result.p_value)}
    for name, adjusted in zip(tested, holm(list(tested.values())), strict=True):
        result = results[name]
        kept = adjusted <= 1 - result.confidence or len(tested) == 1  # the interval alone decides on a single one
        results[name] = replace(result, holm=adjusted, verdict=result.verdict if kept else "not distinguishable")
    return results


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean; infinite for a single value."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return (-math.inf, math.inf)
    half = float(special.stdtrit(len(x) - 1, 0.5 + confidence / 2) * x.std(ddof=1) / math.sqrt(len(x)))
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
    found = scipy.stats.bootstrap(
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
    threshold = special.stdtrit(n - 1, 0.5 + confidence / 2)
    shift = abs(effect) / spread * math.sqrt(n)
    wrong_side = special.nctdtr(n - 1, shift, -threshold)  # scipy gives NaN where this is far below 1e-16
    return float(min(1.0, 1 - special.nctdtr(n - 1, shift, threshold) + np.nan_to_num(wrong_side)))


def detectable_effect(spread: float, n: int, *, wanted_power: float = 0.8, confidence: float = 0.95) -> float:
    """Smallest true difference that n paired seeds find with `wanted_power`; infinite for a single seed."""
    if n < 2 or not math.isfinite(spread):
        return math.inf
    if spread == 0:
        return 0.0
    return _detectable_ratio(n, wanted_power, confidence) * spread


@cache
def _detectable_ratio(n: int, wanted_power: float, confidence: float) -> float:
    upper = 1.0
    while power(upper, 1.0, n, confidence=confidence) < wanted_power:
        upper *= 2
    return float(
        scipy.optimize.brentq(lambda d: power(d, 1.0, n, confidence=confidence) - wanted_power, 0.0, upper, xtol=1e-10)
    )


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
    width = float(special.stdtrit(degrees, 0.5 + confidence / 2)) * math.sqrt(2) * spread
    return NoiseFloor(spread=spread, degrees=degrees, difference=width)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given: reject where they are at most the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


# --- helpers -------------------------------------------------------------------------------------------------------


def loss_or_infinity(value: float | None) -> float:
    """`value`, with None, NaN and either infinity as plus infinity: a run without a final loss."""
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
    t = values.mean() / (values.std(ddof=1) / math.sqrt(len(values)))
    return float(2 * special.stdtr(len(values) - 1, -abs(t)))
