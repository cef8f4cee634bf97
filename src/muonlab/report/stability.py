"""Which settings to take or to leave: read off the stored losses."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muonlab.report import series, style
from muonlab.report.threats import not_learned


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to take, or to leave, and why."""

    kind: str
    text: str
    reason: str


def recommendations(summary: Mapping[str, Any]) -> list[Recommendation]:
    """Primary (best loss of the final runs), fast (least training time within DELTA of it), avoid (what failed or lost
    half a nat in tuning), from what was run and nothing else."""
    stuck = not_learned(summary)
    finals: dict[str, tuple[float, float]] = {}
    for name in summary["optimizers"]:
        mine = [entry for entry in summary.get("finals", ()) if entry["optimizer"] == name]
        losses = [series.number(entry.get("report_cross_entropy")) for entry in mine]
        seconds = [series.number(entry.get("seconds")) for entry in mine]
        if mine and name not in stuck and all(map(math.isfinite, losses)):
            finals[name] = (statistics.fmean(losses), statistics.fmean(seconds))
    if not finals:
        return []
    values = {name: (summary.get("chosen") or {}).get(name, {}).get("values") or {} for name in finals}
    best = min(finals, key=lambda name: finals[name][0])
    good = [name for name in finals if finals[name][0] <= finals[best][0] + series.DELTA]
    fast = min(good, key=lambda name: finals[name][1] if math.isfinite(finals[name][1]) else math.inf)
    reason = f"lowest mean loss of the final runs, {style.loss(finals[best][0])}"
    open_ = [_other(v, best) for v in summary.get("verdicts", ()) if v.get("verdict") == "not distinguishable"]
    if any(open_):
        reason += f", though not distinguishable from {', '.join(filter(None, open_))}"
    result = [Recommendation(kind="primary", text=f"{best} with {style.values_text(values[best])}", reason=reason)]
    if fast != best:
        result.append(
            Recommendation(
                kind="fast",
                text=f"{fast} with {style.values_text(values[fast])}",
                reason=f"{style.duration(finals[fast][1])} of training instead of {style.duration(finals[best][1])}, loss {style.loss(finals[fast][0])}",
            )
        )
    for name in summary["optimizers"]:
        trials = series.trials_of(summary, name)
        finite = [trial.loss for trial in trials if math.isfinite(trial.loss)]
        bad = [t for t in trials if not math.isfinite(t.loss) or (finite and t.loss > min(finite) + 0.5)]
        if bad:
            rates = ", ".join(dict.fromkeys(style.short(trial.lr, 3) for trial in bad))
            result.append(
                Recommendation(
                    kind="avoid",
                    text=f"{name} at lr {rates}",
                    reason="did not finish, or half a nat worse than its best trial",
                )
            )
    return result


def _other(verdict: Mapping[str, Any], name: str) -> str | None:
    """The other one of a pair that `name` is part of."""
    pair = (verdict["candidate"], verdict["reference"])
    return pair[1 - pair.index(name)] if name in pair else None
