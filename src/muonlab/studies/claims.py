"""What study folders say to the claims of the ledger: verdicts are computed, nobody writes one by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from muonlab.studies.evidence import Evidence, StudySummary, collect, read_summaries
from muonlab.studies.ledger import Claim, Ledger, Studies, cells_of, studies_of, version_of
from muonlab.studies.statistics import holm
from muonlab.studies.study import FULL
from muonlab.studies.verdicts import (
    FAILS,
    HOLDS,
    LEVEL,
    NOT_DISTINGUISHABLE,
    NOT_RUN,
    UNDECIDABLE,
    Finding,
    arithmetic,
    difference,
    finished,
    optimum,
    order,
    ratio,
    tolerance_ratio,
)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with its verdict and what it rests on."""

    claim: Claim
    verdict: str
    finding: Finding
    adjusted_p: float | None = None
    family: int = 0
    """How many claims were tested with the same study folder: the number that Holm's correction is over."""
    scale: str | None = None
    summaries: tuple[StudySummary, ...] = ()


def judge(ledger: Ledger, folders: Sequence[str | Path] = ()) -> list[Judged]:
    """Every claim with its verdict, from the comparison_summary.json of the study folders and nothing else.

    Where one folder decides several claims, their p-values are adjusted by Holm's method over that family.
    """
    summaries = read_summaries([Path(folder) for folder in folders])
    judged = [_judge(claim, ledger.studies, summaries) for claim in ledger.claims]
    families: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(judged):
        if row.finding.p is not None:
            families.setdefault((row.claim.study, row.claim.version, row.scale), []).append(i)
    for members in families.values():
        adjusted = holm([judged[i].finding.p or 0.0 for i in members])
        for i, p in zip(members, adjusted):
            judged[i] = _after_holm(judged[i], p, len(members))
    return judged


def _after_holm(row: Judged, p: float, family: int) -> Judged:
    row = replace(row, adjusted_p=p, family=family)
    if row.verdict in (HOLDS, FAILS) and p > LEVEL:
        reason = f"alone it would say {row.verdict!r}; not after Holm's correction over {family} claims"
        return replace(row, verdict=NOT_DISTINGUISHABLE, finding=row.finding.but(reason))
    return row


def _judge(claim: Claim, studies: Studies, summaries: Sequence[StudySummary]) -> Judged:
    statistic = claim.statistic
    if statistic.kind == "none":
        return Judged(claim=claim, verdict=UNDECIDABLE, finding=Finding(decided=UNDECIDABLE, reason=statistic.reason))
    if statistic.kind == "arithmetic":
        finding = arithmetic(statistic.expression, statistic.claimed, statistic.tolerance)
        return Judged(claim=claim, verdict=finding.verdict, finding=finding)
    wanted = [(name, version_of(claim, name, studies)) for name in studies_of(claim)]
    missing = ""
    for scale in sorted({summary.scale for summary in summaries}, key=lambda scale: scale != FULL):
        found = collect(summaries, wanted, scale)
        if isinstance(found, str):
            missing = missing or found
            continue
        evidence = Evidence({summary.name: summary for summary in found}, str(claim.study))
        lacking = evidence.lacking(cells_of(claim, studies))
        if lacking:
            more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
            missing = f"no finished run of {lacking[0]}{more}"
            continue
        finding = _find(claim, evidence)
        return Judged(claim=claim, verdict=finding.verdict, finding=finding, scale=scale, summaries=tuple(found))
    return Judged(claim=claim, verdict=NOT_RUN, finding=Finding(decided=NOT_RUN, reason=missing))


def _find(claim: Claim, evidence: Evidence) -> Finding:
    s = claim.statistic
    if problem := evidence.incomparable():
        return Finding(reason=problem)
    sides = [evidence.match(side, exclude=s.sides[:i]) if s.kind == "order" else evidence.match(side)
             for i, side in enumerate(s.sides)]  # fmt: skip
    if s.kind == "finished":
        return finished(sides[0], learned=s.learned)
    if s.kind == "optimum":
        return optimum(sides[0], s.axis, s.between)
    if s.kind == "order":
        return order(sides, s.measure, s.direction)
    if s.kind == "tolerance-ratio":
        return tolerance_ratio(sides[0], sides[1], s.axis, s.delta, s.between)
    if s.kind == "ratio":
        return ratio(sides[0], sides[1], s.measure, s.between, s.pick)
    if s.kind == "equal":
        return difference(sides[0], sides[1], s.measure, (-s.within, s.within), s.pick)
    region = (-float("inf"), -s.minimum) if s.direction == "lower" else (s.minimum, float("inf"))
    return difference(sides[0], sides[1], s.measure, region, s.pick)
