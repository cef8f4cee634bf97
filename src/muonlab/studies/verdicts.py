"""From paired numbers to a verdict on a claim: does the effect lie where it is claimed to lie?

Every claim of runs is a region of an effect: "better" is below zero, "7 % lower" a ratio of at most 0.93, "no
difference" a band around zero. It holds if the 95 % interval over seeds lies inside the region, it does not hold if
the interval lies outside; otherwise the runs cannot tell. Two-sided regions are two one-sided tests.
"""

import ast
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from muonlab.errors import InputError
from muonlab.studies.curves import lr_tolerance
from muonlab.studies.evidence import CellResult
from muonlab.studies.statistics import t_interval

HOLDS = "holds"
FAILS = "does not hold"
NOT_DISTINGUISHABLE = "not distinguishable"
NOT_YET = "not yet decidable"
NOT_RUN = "not yet run"
UNDECIDABLE = "cannot be decided"
VERDICTS = (HOLDS, FAILS, NOT_DISTINGUISHABLE, NOT_YET, NOT_RUN, UNDECIDABLE)

LEVEL = 0.05
Region = tuple[float, float]
UNITS = {"loss": "nats", "best_loss": "nats", "seconds": "s", "memory": "bytes"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one statistic says."""

    p_holds: float | None = None
    """p-value of the one-sided test whose rejection says that the claim holds; None where nothing was tested."""
    p_fails: float | None = None
    decided: str | None = None
    """The verdict where it is not one of p-values."""
    effect: str = ""
    """The estimate with its interval, in words."""
    mean: float | None = None
    interval: tuple[float, float] | None = None
    seeds: int = 0
    reason: str = ""

    @property
    def p(self) -> float | None:
        """Two-sided p-value of the verdict: at most 0.05 exactly where the 95 % interval lies inside or outside."""
        if self.p_holds is None or self.p_fails is None:
            return None
        return min(1.0, 2 * min(self.p_holds, self.p_fails))

    @property
    def verdict(self) -> str:
        if self.decided or self.p is None:
            return self.decided or NOT_YET
        if self.p > LEVEL:
            return NOT_DISTINGUISHABLE
        return HOLDS if self.p == 2 * (self.p_holds or 0.0) else FAILS

    def but(self, *reasons: str, **changes: Any) -> "Finding":
        """The same with reasons put before its own."""
        return replace(self, reason="; ".join(part for part in (*reasons, self.reason) if part), **changes)


def decide(values: Sequence[float], region: Region) -> Finding:
    """Whether the mean of `values`, one per seed, lies in the closed `region` (bounds may be infinite).

    A value may be infinite: one side diverged. Such a seed is no number for the interval, but the claim cannot hold
    (or fail) where one speaks against it. "Inside" takes a t test at each finite bound (two one-sided tests), "outside"
    one of them.
    """
    if len(values) < 2:
        what = "one seed has no error bar" if values else "no seed was finished on both sides"
        return Finding(seeds=len(values), mean=next((v for v in values if math.isfinite(v)), None), reason=what)
    low, high = region
    x = [value for value in values if math.isfinite(value)]
    inside = [low <= value <= high for value in values if not math.isfinite(value)]
    p_holds = max(_p_above(x, low), _p_below(x, high)) if x else 0.0
    p_fails = min(_p_below(x, low), _p_above(x, high)) if x else 0.0
    return Finding(
        p_holds=1.0 if False in inside else p_holds,
        p_fails=1.0 if True in inside else p_fails,
        mean=float(np.mean(x)) if x else None,
        interval=t_interval(x) if x else None,
        seeds=len(values),
        reason=f"one side diverged on {len(inside)} of {len(values)} seeds" if inside else "",
    )


def difference(
    candidate: Sequence[CellResult], reference: Sequence[CellResult], measure: str, region: Region, pick: str
) -> Finding:
    """candidate − reference, paired by seed."""
    pairs, chosen = _paired(candidate, reference, measure, pick)
    finding = decide([a - b for a, b in pairs], region)
    return _told(finding, chosen, lambda v: _amount(v, measure))


def ratio(
    candidate: Sequence[CellResult], reference: Sequence[CellResult], measure: str, between: Region, pick: str
) -> Finding:
    """candidate / reference as a geometric mean over seeds; judged on logarithms."""
    pairs, chosen = _paired(candidate, reference, measure, pick)
    if any(min(pair) <= 0 for pair in pairs):
        return Finding(reason=f"{measure} is zero or missing in a run: no ratio")
    logs = [_log(a) - _log(b) for a, b in pairs]
    finding = decide(logs, (_log(between[0]), _log(between[1])))
    return _told(finding, chosen, lambda v: f"×{math.exp(v):.3f}")


def order(tiers: Sequence[Sequence[CellResult]], measure: str, direction: str) -> Finding:
    """Every cell of a tier beats every cell of the next.

    "holds" takes every single comparison (their largest p-value: an intersection-union test needs no correction);
    "does not hold" takes one that is reversed, at a level divided by the number of comparisons (Bonferroni).
    """
    sign = 1.0 if direction == "lower" else -1.0
    found: list[tuple[str, Finding]] = []
    for better, worse in itertools.pairwise(tiers):
        for a, b in itertools.product(better, worse):
            pairs, _ = _paired([a], [b], measure, "best")
            region = (-math.inf, 0.0) if direction == "lower" else (0.0, math.inf)
            found.append((f"{a.cell} against {b.cell}", decide([x - y for x, y in pairs], region)))
    if not found:
        return Finding(reason="a tier of the order is empty")
    for name, finding in found:
        if finding.p is None:
            return finding.but(name, mean=None)
    name, closest = max(found, key=lambda item: (item[1].p_holds or 0.0, sign * (item[1].mean or 0.0)))
    p_fails = min(1.0, len(found) * min(f.p_fails or 0.0 for _, f in found))
    told = _told(closest, f"closest of {len(found)} comparisons: {name}", lambda v: _amount(v, measure))
    return replace(told, p_fails=p_fails)


def optimum(cells: Sequence[CellResult], axis: str, between: Region) -> Finding:
    """The best cell with the axis in the range against the best one outside, each chosen on the first seed."""
    inside = [cell for cell in cells if between[0] <= cell.values[axis] <= between[1]]
    outside = [cell for cell in cells if not between[0] <= cell.values[axis] <= between[1]]
    finding = difference(inside, outside, "loss", (-math.inf, 0.0), "best")
    tried = sorted({cell.values[axis] for cell in cells})
    best = min(cells, key=_mean_loss).values[axis]
    finding = finding.but(f"best of {len(tried)} values: {axis} {best:g}")
    if finding.verdict == HOLDS and best in (tried[0], tried[-1]):
        beyond = "it lies at the end of what was tried, so the optimum may lie beyond"
        return finding.but(beyond, decided=NOT_DISTINGUISHABLE)
    return finding


def tolerance_ratio(
    candidate: Sequence[CellResult], reference: Sequence[CellResult], axis: str, delta: float, between: Region
) -> Finding:
    """Factor by which the good range of the candidate is wider, from the widths in octaves seed by seed.

    A range that ends where the search ended is only a lower bound of the width.
    """
    seeds = _common_seeds([*candidate, *reference], "loss")
    octaves, at_least, at_most = [], False, False
    for seed in seeds:
        widths = []
        for side in (candidate, reference):
            losses = [cell.by_seed("loss")[seed] for cell in side]
            if not any(math.isfinite(loss) for loss in losses):
                return Finding(reason=f"every run of one side diverged on seed {seed}")
            widths.append(lr_tolerance([cell.values[axis] for cell in side], losses, delta))
        octaves.append(widths[0].octaves - widths[1].octaves)
        at_least |= widths[0].open_low or widths[0].open_high
        at_most |= widths[1].open_low or widths[1].open_high
    low, high = _log(between[0]) / math.log(2), _log(between[1]) / math.log(2)
    finding = _told(decide(octaves, (low, high)), f"within {delta:g} nats of the best", lambda v: f"×{2**v:.2f}")
    if not (at_least or at_most) or finding.p is None:
        return finding
    # The true effect may lie above what was measured (at_least) or below it (at_most).
    if at_least and at_most:
        return finding.but("both ranges end where the search ended", decided=NOT_DISTINGUISHABLE)
    wide = "candidate" if at_least else "reference"
    below = finding.mean is not None and finding.mean < low
    open_end = math.isinf(high) if at_least else math.isinf(low)
    safe = open_end if finding.verdict == HOLDS else below != at_least
    finding = finding.but(f"the {wide}'s range ends where the search ended: it may be wider")
    return finding if safe else replace(finding, decided=NOT_DISTINGUISHABLE)


def finished(cells: Sequence[CellResult], *, learned: bool) -> Finding:
    """No run diverged. One that did refutes the claim; that none did is said with the number of runs."""
    runs = [run for cell in cells for run in cell.runs if run.over]
    diverged = sum(run.status == "diverged" for run in runs)
    seeds = len({run.seed for run in runs})
    effect = f"{len(runs) - diverged} of {len(runs)} runs finished"
    flat = [cell.cell for cell in cells if cell.learned is False] if learned else []
    if flat:
        effect += f"; {len(flat)} of {len(cells)} cells learned less than the frequencies of single tokens ({flat[0]})"
    if diverged or flat:
        return Finding(decided=FAILS, effect=effect, seeds=seeds)
    if seeds < 2:
        return Finding(effect=effect, seeds=seeds, reason="one seed says little about stability")
    return Finding(decided=HOLDS, effect=effect, seeds=seeds)


def arithmetic(expression: str, claimed: float, tolerance: float) -> Finding:
    """Whether an expression over the source's numbers gives the claimed number."""
    value = evaluate(expression)
    holds = abs(value - claimed) <= tolerance * abs(claimed)
    effect = f"{expression} = {value:.4g}, claimed {claimed:g}"
    return Finding(decided=HOLDS if holds else FAILS, effect=effect, mean=value)


OPERATORS: dict[type[Any], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
}


def evaluate(expression: str) -> float:
    """Numbers, + - * / **, brackets and exp, log, log2, sqrt, min, max; InputError for anything else."""

    def walk(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](walk(node.operand)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            return float(FUNCTIONS[node.func.id](*map(walk, node.args)))
        raise InputError(f"the expression {expression!r} may hold numbers, + - * / ** and {', '.join(FUNCTIONS)} only")

    try:
        value = walk(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the expression {expression!r} has no value: {error}") from None
    return value


# --- helpers -------------------------------------------------------------------------------------------------------


def _paired(
    candidate: Sequence[CellResult], reference: Sequence[CellResult], measure: str, pick: str
) -> tuple[list[tuple[float, float]], str]:
    """(candidate, reference) by seed, and in words which cells a choice took."""
    seeds = _common_seeds([*candidate, *reference], measure)
    if pick == "mean":
        averages = [
            [float(np.mean([c.by_seed(measure)[s] for c in side])) for s in seeds] for side in (candidate, reference)
        ]
        return list(zip(*averages)), ""
    told = ""
    if seeds and (len(candidate) > 1 or len(reference) > 1):
        first, *seeds = seeds  # it chose, so it must not judge
        candidate, reference = ([min(side, key=lambda c: c.tune_loss(first))] for side in (candidate, reference))
        told = f"{candidate[0].cell} against {reference[0].cell}, chosen on seed {first}"
    ours, theirs = candidate[0].by_seed(measure), reference[0].by_seed(measure)
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    return [pair for pair in pairs if any(map(math.isfinite, pair))], told


def _common_seeds(cells: Sequence[CellResult], measure: str) -> list[int]:
    return sorted(set.intersection(*(set(cell.by_seed(measure)) for cell in cells)))


def _log(value: float) -> float:
    return -math.inf if value <= 0 else math.log(value) if math.isfinite(value) else value


def _p_above(x: Sequence[float], bound: float) -> float:
    """One-sided p-value of "the mean is above `bound`"."""
    return _p_below([-value for value in x], -bound)


def _p_below(x: Sequence[float], bound: float) -> float:
    """One-sided p-value of "the mean is below `bound`" (t test); 1 for a single value."""
    if math.isinf(bound):
        return 0.0 if bound > 0 else 1.0
    if len(x) < 2:
        return 1.0
    mean, error = float(np.mean(x)), float(np.std(x, ddof=1)) / math.sqrt(len(x))
    if error == 0:
        return 0.0 if mean < bound else 1.0
    return float(special.stdtr(len(x) - 1, (mean - bound) / error))


def _mean_loss(cell: CellResult) -> float:
    values = list(cell.by_seed("loss").values())
    return float(np.mean(values)) if values else math.inf


def _amount(value: float, measure: str) -> str:
    unit = UNITS.get(measure, "")
    text = f"{value:+.4g}" if measure in ("memory", "seconds") else f"{value:+.4f}"
    return f"{text.replace('-', '−')} {unit}".strip()


def _told(finding: Finding, chosen: str, show: Callable[[float], str]) -> Finding:
    """The finding with its effect in words."""
    if finding.mean is None:
        return finding.but(chosen)
    effect = show(finding.mean)
    if finding.interval is not None and all(math.isfinite(bound) for bound in finding.interval):
        effect += f" (95 %: {show(finding.interval[0])} to {show(finding.interval[1])})"
    return finding.but(chosen, effect=effect)
