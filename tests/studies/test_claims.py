"""The claims ledger: verdicts against hand-made summaries whose answers are known, and the page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from muonlab.cli import main
from muonlab.errors import InputError
from muonlab.report.claims import page, write_page
from muonlab.studies.claims import Judged, judge
from muonlab.studies.evidence import SUMMARY
from muonlab.studies.ledger import read_ledger
from muonlab.studies.verdicts import VERDICTS

DOCS = Path(__file__).parents[2] / "docs"
BASE = '[base]\nmodel = "micro"\n'
TOY = f"""title = "toy"
question = "?"
default = "corrected"
{BASE}
[[cases]]
name = "a"
[[cases]]
name = "b"
[[cases]]
name = "c"
[[cases]]
name = "d"
[versions.corrected]
note = "n"
[versions.as-published]
note = "n"
"""
SWEEP = f"""title = "sweep"
question = "?"
{BASE}
[[cases]]
name = "wide"
[[cases]]
name = "narrow"
[[axes]]
name = "lr"
field = "optimizer.lr"
values = [0.01, 0.02, 0.04, 0.08, 0.16]
"""
CELLS = {"toy": ["a", "b", "c", "d"], "sweep": [f"{side} lr={lr:g}" for side in ("wide", "narrow") for lr in (0.01, 0.02, 0.04, 0.08, 0.16)]}  # fmt: skip
RATES = (0.01, 0.02, 0.04, 0.08, 0.16)

Values = list[Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text(TOY)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return tmp_path


def ledger_file(folder: Path, *statistics: str, study: str = "toy") -> Path:
    rows = "".join(
        f'[[claims]]\nid = "S0-{i:02d}"\nclaim = "c"\nwhere = "w"\nstatistic = {statistic}\n'
        + ("" if '"none"' in statistic or '"arithmetic"' in statistic else f'study = "{study}"\nevidence = "micro"\n')
        for i, statistic in enumerate(statistics, 1)
    )
    path = folder / "claims.toml"
    path.write_text(f'schema = 1\nstudies = ["toy.toml", "sweep.toml"]\n[seeds]\n000 = "t"\n{rows}')
    return path


def summary_folder(
    folder: Path,
    losses: dict[str, Values],
    *,
    study: str = "toy",
    version: str | None = "corrected",
    scale: str = "micro",
    measure: str = "report_cross_entropy",
    setting: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A study folder with these losses by cell, one per seed from 1 on; None is a run that diverged."""
    cells = []
    for cell, values in losses.items():
        runs = [
            {"seed": seed, "status": "finished", "report_cross_entropy": 3.0, "tune_cross_entropy": value, "updates": 9, measure: value}
            if value is not None
            else {"seed": seed, "status": "diverged", "report_cross_entropy": None, "updates": 3}
            for seed, value in enumerate(values, 1)
        ]  # fmt: skip
        place = {"lr": float(cell.split("lr=")[1])} if "lr=" in cell else {}
        cells.append({"cell": cell, "group": "g", "case": "c", "values": place, "runs": runs})
    summary = {"schema": 1, "kind": "study", "name": study, "version": version, "scale": scale, "command": "muonlab study toy", "seeds": [1, 2, 3], "cells": cells, "setting": setting or {}}  # fmt: skip
    path = folder / f"runs-{study}-{version}-{scale}"
    path.mkdir(parents=True, exist_ok=True)
    (path / SUMMARY).write_text(json.dumps(summary | changes))
    return path


def verdict(folder: Path, statistic: str, losses: dict[str, Values], study: str = "toy", **changes: Any) -> Judged:
    version = "corrected" if study == "toy" else None
    filled = {cell: [3.0, 3.0, 3.0] for cell in CELLS[study]} | losses
    runs = summary_folder(folder, filled, study=study, version=version, **changes)
    return judge(read_ledger(ledger_file(folder, statistic, study=study)), [runs])[0]


LOWER = '{ kind = "difference", candidate = "a", reference = "b", direction = "lower" }'


# --- kinds and verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ([2.90, 2.91, 2.89], "holds"),
        ([3.10, 3.11, 3.09], "does not hold"),
        ([2.95, 3.06, 3.01], "not distinguishable"),
        ([2.5], "not yet decidable"),
        ([None, None, None], "does not hold"),
        ([None, 2.90, 2.91], "not distinguishable"),
    ],
)
def test_a_difference_holds_only_if_the_interval_excludes_zero_on_the_claimed_side(
    folder: Path, a: Values, expected: str
) -> None:
    assert verdict(folder, LOWER, {"a": a}).verdict == expected


def test_the_effect_is_paired_by_seed(folder: Path) -> None:
    row = verdict(folder, LOWER, {"a": [1.90, 3.91, 2.89], "b": [2.0, 4.0, 3.0]})
    low, high = stats.t.interval(0.95, 2, loc=-0.1, scale=stats.sem([-0.10, -0.09, -0.11]))
    assert row.verdict == "holds"
    assert row.finding.interval == pytest.approx((low, high))


def test_an_effect_below_the_claimed_minimum_does_not_hold(folder: Path) -> None:
    statistic = LOWER.replace(" }", ", minimum = 0.5 }")
    assert verdict(folder, statistic, {"a": [2.90, 2.91, 2.89]}).verdict == "does not hold"
    assert verdict(folder, statistic, {"a": [2.30, 2.31, 2.29]}).verdict == "holds"


def test_higher_accuracy_is_higher(folder: Path) -> None:
    statistic = '{ kind = "difference", candidate = "a", reference = "b", measure = "accuracy", direction = "higher" }'
    row = verdict(folder, statistic, {"a": [0.31, 0.32, 0.30], "b": [0.2, 0.2, 0.2], "c": [], "d": []}, measure="accuracy")  # fmt: skip
    assert row.verdict == "holds"


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ([3.001, 3.002, 2.999], "holds"),
        ([3.2, 3.21, 3.19], "does not hold"),
        ([3.1, 2.9, 3.0], "not distinguishable"),
    ],
)
def test_no_difference_means_an_interval_inside_the_band_and_not_a_lack_of_evidence(
    folder: Path, a: Values, expected: str
) -> None:
    statistic = '{ kind = "equal", candidate = "a", reference = "b", within = 0.02 }'
    assert verdict(folder, statistic, {"a": a}).verdict == expected


@pytest.mark.parametrize(
    ("between", "expected"),
    [("[0.7, 0.9]", "holds"), ("[0.0, 0.5]", "does not hold"), ("[0.7, 0.8]", "not distinguishable"), ("[0.0, inf]", "holds")],
)  # fmt: skip
def test_a_ratio_is_a_geometric_mean_inside_the_claimed_range(folder: Path, between: str, expected: str) -> None:
    statistic = f'{{ kind = "ratio", candidate = "a", reference = "b", measure = "seconds", between = {between} }}'
    seconds = {"a": [8.0, 8.1, 7.9], "b": [10.0, 10.0, 10.0]}
    row = verdict(folder, statistic, seconds, measure="seconds")
    assert row.verdict == expected
    assert row.finding.effect.startswith("×0.800")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"a": [2.0, 2.01, 1.99], "b": [2.5, 2.51, 2.49]}, "holds"),
        ({"a": [2.0, 2.01, 1.99], "b": [1.5, 1.51, 1.49]}, "does not hold"),
        ({"a": [2.0, 2.01, 1.99], "b": [2.01, 1.98, 2.02]}, "not distinguishable"),
        ({"a": [2.0], "b": [2.5]}, "not yet decidable"),
    ],
)
def test_the_best_cell_must_beat_every_other(folder: Path, losses: dict[str, Values], expected: str) -> None:
    assert verdict(folder, '{ kind = "order", tiers = ["a", "*"] }', losses).verdict == expected


def test_an_order_is_judged_tier_by_tier(folder: Path) -> None:
    falling = {cell: [3 - 0.2 * i, 3.01 - 0.2 * i, 2.99 - 0.2 * i] for i, cell in enumerate("abcd")}
    assert verdict(folder, '{ kind = "order", tiers = ["d", "c", ["a", "b"]] }', falling).verdict == "holds"
    assert verdict(folder, '{ kind = "order", tiers = ["d", "b", "c"] }', falling).verdict == "does not hold"


def bowl(best: float, steepness: float, noise: float = 0.0) -> dict[float, Values]:
    return {
        lr: [3.0 + steepness * math.log2(lr / best) ** 2 + noise * s * (1 + 0.1 * i) for s in (1, -1, 0.5, -0.2)]
        for i, lr in enumerate(RATES)
    }


def sweep(wide: dict[float, Values], narrow: dict[float, Values]) -> dict[str, Values]:
    return {f"wide lr={lr:g}": v for lr, v in wide.items()} | {f"narrow lr={lr:g}": v for lr, v in narrow.items()}


@pytest.mark.parametrize(
    ("best", "between", "noise", "expected"),
    [
        (0.04, "[0.03, 0.05]", 0.01, "holds"),
        (0.04, "[0.07, 0.1]", 0.01, "does not hold"),
        (0.057, "[0.03, 0.05]", 0.5, "not distinguishable"),
        (0.01, "[0.005, 0.015]", 0.01, "not distinguishable"),
    ],
)
def test_an_optimum_is_the_best_cell_inside_against_the_best_outside_and_never_at_the_end_of_the_range(
    folder: Path, best: float, between: str, noise: float, expected: str
) -> None:
    statistic = f'{{ kind = "optimum", cells = "wide *", axis = "lr", between = {between} }}'
    row = verdict(folder, statistic, sweep(bowl(best, 0.1, noise), bowl(0.04, 0.1)), study="sweep")
    assert row.verdict == expected
    assert ("at the end of what was tried" in row.finding.reason) == (best == 0.01)


def test_a_choice_takes_the_first_seed_and_the_others_judge(folder: Path) -> None:
    statistic = '{ kind = "difference", candidate = ["a", "c"], reference = "b", direction = "lower" }'
    row = verdict(folder, statistic, {"a": [2.0, 3.10, 3.11], "c": [2.5, 2.0, 2.0]})
    assert row.finding.seeds == 2
    assert row.finding.mean == pytest.approx(0.105)  # a was chosen by its luck on seed 1, which does not count
    few = verdict(folder, statistic, {"a": [2.0, 2.0], "c": [2.5, 2.5]})
    assert few.verdict == "not yet decidable"


def test_a_mean_over_cells_gives_an_interaction(folder: Path) -> None:
    statistic = (
        '{ kind = "difference", candidate = ["a", "d"], reference = ["b", "c"], pick = "mean", direction = "lower" }'
    )
    losses = {"a": [2.0, 2.1, 2.2], "b": [2.5, 2.6, 2.7], "c": [3.0, 3.1, 3.2], "d": [3.0, 3.11, 3.2]}
    assert verdict(folder, statistic, losses).finding.mean == pytest.approx((-0.5 + 0.01 / 3) / 2)


@pytest.mark.parametrize(
    ("wide", "narrow", "between", "expected"),
    [
        ((0.04, 0.02), (0.04, 0.08), "[2.5, 4.5]", "holds"),
        ((0.04, 0.02), (0.04, 0.08), "[20.0, inf]", "does not hold"),
        ((0.04, 0.001), (0.04, 0.08), "[2.0, inf]", "holds"),
        ((0.04, 0.001), (0.04, 0.08), "[30.0, inf]", "not distinguishable"),
    ],
)
def test_the_ratio_of_good_ranges_counts_a_range_cut_by_the_search_as_a_lower_bound(
    folder: Path, wide: tuple[float, float], narrow: tuple[float, float], between: str, expected: str
) -> None:
    statistic = f'{{ kind = "tolerance-ratio", candidate = "wide *", reference = "narrow *", axis = "lr", between = {between} }}'
    row = verdict(folder, statistic, sweep(bowl(*wide, 0.002), bowl(*narrow, 0.002)), study="sweep")
    assert row.verdict == expected


def test_one_diverged_run_refutes_that_nothing_diverges(folder: Path) -> None:
    statistic = '{ kind = "finished", cells = ["a", "b"] }'
    assert verdict(folder, statistic, {}).verdict == "holds"
    assert verdict(folder, statistic, {"a": [3.0, None, 3.0]}).verdict == "does not hold"
    assert verdict(folder, statistic, {"a": [3.0], "b": [3.0]}).verdict == "not yet decidable"
    learned = statistic.replace(" }", ", learned = true }")
    assert verdict(folder, learned, {}, gate={"passed": {"a": True, "b": False}}).verdict == "does not hold"


@pytest.mark.parametrize(("claimed", "expected"), [(1.6, "holds"), (30, "does not hold")])
def test_arithmetic_is_computed_from_the_numbers_in_the_row(folder: Path, claimed: float, expected: str) -> None:
    statistic = f'{{ kind = "arithmetic", expression = "(0.09/0.02) / (0.002/0.0007)", claimed = {claimed} }}'
    row = judge(read_ledger(ledger_file(folder, statistic)))[0]
    assert row.verdict == expected
    assert row.finding.mean == pytest.approx(1.575)


def test_what_no_run_can_decide_says_why(folder: Path) -> None:
    row = judge(read_ledger(ledger_file(folder, '{ kind = "none", reason = "a matter of taste" }')))[0]
    assert (row.verdict, row.finding.reason) == ("cannot be decided", "a matter of taste")


def test_without_evidence_every_row_of_runs_is_not_yet_run(folder: Path) -> None:
    assert [row.verdict for row in judge(read_ledger(ledger_file(folder, LOWER)))] == ["not yet run"]


def test_a_cell_without_a_finished_run_leaves_the_claim_not_yet_run(folder: Path) -> None:
    row = verdict(folder, '{ kind = "order", tiers = ["a", "*"] }', {"c": []})
    assert row.verdict == "not yet run"
    assert "toy/c" in row.finding.reason


def test_runs_of_another_version_decide_nothing(folder: Path) -> None:
    runs = summary_folder(folder, {cell: [3.0, 3.1, 3.2] for cell in "abcd"}, version="as-published")
    assert judge(read_ledger(ledger_file(folder, LOWER)), [runs])[0].verdict == "not yet run"


def test_full_scale_evidence_goes_before_a_scaled_down_one(folder: Path) -> None:
    worse = {"a": [3.5, 3.51, 3.49]} | {cell: [3.0, 3.0, 3.0] for cell in "bcd"}
    better = {"a": [2.5, 2.51, 2.49]} | {cell: [3.0, 3.0, 3.0] for cell in "bcd"}
    folders = [summary_folder(folder, worse), summary_folder(folder, better, scale="full")]
    row = judge(read_ledger(ledger_file(folder, LOWER)), folders)[0]
    assert (row.verdict, row.scale) == ("holds", "full")
    assert judge(read_ledger(ledger_file(folder, LOWER)), folders[:1])[0].scale == "micro"


def test_holm_over_the_claims_of_one_study_can_take_a_verdict_back(folder: Path) -> None:
    losses = {"a": [2.946, 2.974, 2.96], "b": [3.0, 3.0, 3.0], "c": [2.0, 3.0, 4.0], "d": [4.1, 3.0, 2.0]}
    runs = summary_folder(folder, losses)
    alone = judge(read_ledger(ledger_file(folder, LOWER)), [runs])[0]
    other = '{ kind = "difference", candidate = "c", reference = "d", direction = "lower" }'
    family = judge(read_ledger(ledger_file(folder, LOWER, other)), [runs])
    assert alone.verdict == "holds"
    assert [row.verdict for row in family] == ["not distinguishable", "not distinguishable"]
    assert family[0].adjusted_p == pytest.approx(2 * (alone.finding.p or 0))
    assert "Holm" in family[0].finding.reason


def test_cells_of_two_studies_are_compared_only_if_the_studies_agree(folder: Path) -> None:
    statistic = '{ kind = "difference", candidate = "a", reference = "sweep/wide lr=0.01", direction = "lower" }'
    other = sweep(bowl(0.04, 0.1), bowl(0.04, 0.1))
    same = {"config": {"model": {"d_model": 64}}}
    runs = [summary_folder(folder, {c: [3.0, 3.01, 3.02] for c in "abcd"}, setting=same)]
    ledger = read_ledger(ledger_file(folder, statistic))
    sweep_folder = summary_folder(folder, other, study="sweep", version=None, setting=same)
    assert judge(ledger, [*runs, sweep_folder])[0].verdict == "holds"
    summary_folder(folder, other, study="sweep", version=None, setting={"config": {"model": {"d_model": 65}}})
    row = judge(ledger, [*runs, sweep_folder])[0]
    assert row.verdict == "not yet decidable"
    assert "models" in row.finding.reason


def test_bad_evidence_is_one_line(folder: Path) -> None:
    ledger = read_ledger(ledger_file(folder, LOWER))
    runs = summary_folder(folder, {"a": [3.0]})
    (runs / SUMMARY).write_text('{"kind": "study"')
    with pytest.raises(InputError, match="damaged"):
        judge(ledger, [runs])
    (runs / SUMMARY).write_text('{"optimizers": []}')
    with pytest.raises(InputError):
        judge(ledger, [runs])
    (runs / SUMMARY).write_text('{"kind": "study", "name": "toy", "cells": [{"cell": 1}]}')
    with pytest.raises(InputError, match=r"cells\.0"):
        judge(ledger, [runs])
    with pytest.raises(InputError, match="no folder"):
        judge(ledger, [folder / "nothing"])
    copy = summary_folder(folder / "again", {"a": [3.0]})
    summary_folder(folder, {"a": [3.0]})
    with pytest.raises(InputError, match="same study"):
        judge(ledger, [runs, copy])


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_text_as_text_and_labels_the_scale(folder: Path) -> None:
    path = ledger_file(folder, LOWER)
    path.write_text(path.read_text().replace('claim = "c"', 'claim = "a|b <script> *x* [y](z)"'))
    runs = summary_folder(folder, {"a": [2.90, 2.91, 2.89]} | {cell: [3.0, 3.0, 3.0] for cell in "bcd"})
    ledger = read_ledger(path)
    text = page(ledger, judge(ledger, [runs]))
    row = next(line for line in text.splitlines() if line.startswith("| S0-01"))
    assert r"a\|b &lt;script&gt; \*x\* \[y\](z)" in row
    assert "**holds** (micro scale)" in row
    assert "−0.1000 nats" in row
    assert "muonlab study toy" in text


def test_the_page_is_replaced_whole_or_not_at_all(folder: Path) -> None:
    ledger = read_ledger(ledger_file(folder, LOWER))
    with pytest.raises(InputError, match="no folder"):
        write_page(ledger, judge(ledger), folder / "missing" / "claims.md")
    assert write_page(ledger, judge(ledger), folder / "claims.md").read_text().startswith("# Claims")
    assert [path.name for path in folder.glob(".*")] == []


def test_the_command_prints_the_table_and_writes_the_page_beside_the_ledger(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", "--ledger", str(ledger_file(folder, LOWER))]) == 0
    assert "not yet run" in capsys.readouterr().out
    assert (folder / "claims.md").exists()
    assert main(["claims", "--ledger", str(folder / "none.toml")]) == 2


# --- the real ledger -----------------------------------------------------------------------------------------------


def test_without_runs_the_real_ledger_has_only_verdicts_that_need_none() -> None:
    for row in judge(read_ledger(DOCS / "claims.toml")):
        assert row.verdict in VERDICTS
        assert (row.verdict == "not yet run") == row.claim.needs_runs
