"""What the report of a study says, checked on numbers that are known."""

import json
import math
import statistics

import pytest
from scipy import stats

from muonlab.report import study_axes, study_content, study_interactive, study_tables, study_text
from muonlab.report.reading import Material, read_material
from muonlab.report.study_threats import study_threats


def runs(*losses, status="finished", first=1, **rest):
    """The runs of a cell with these final losses, seeds from `first` on."""
    return [
        {"seed": seed, "directory": f"runs/{id(losses)}-{seed}", "status": status if loss is not None else "diverged", "message": None,
         "report_cross_entropy": loss, "tune_cross_entropy": loss, "bits_per_byte": None if loss is None else loss / 2, "perplexity": None,
         "accuracy": 0.25, "seconds": 60.0, "updates": 100, "updates_per_second": 2.0, "peak_memory_bytes": 2_000_000_000, "spikes": 1, "plateaus": 0, **rest}
        for seed, loss in enumerate(losses, first)
    ]  # fmt: skip


def cell(name, *losses, group="muon", rank=None, values=None, published=None, applies=False, **rest):
    finite = [loss for loss in losses if loss is not None]
    half = stats.t.ppf(0.975, len(finite) - 1) * statistics.stdev(finite) / math.sqrt(len(finite)) if len(finite) > 1 else None  # fmt: skip
    mean = statistics.fmean(finite) if finite else None
    return {"cell": name, "group": group, "case": "", "values": values or {}, "options": {}, "runs": runs(*losses, **rest), "finished": len(finite), "mean": mean,
            "sd": None, "interval": [mean - half, mean + half] if half is not None else None, "rank": rank, "published": published, "published_applies": applies}  # fmt: skip


def study(*cells, axes=(), **rest):
    groups = list(dict.fromkeys(cell["group"] for cell in cells))
    return {"kind": "study", "name": "s", "title": "t", "scale": "full", "seeds": [1, 2, 3], "groups": groups, "cells": list(cells), "axes": list(axes),
            "reference": None, "gate": {"unigram_entropy": 6.0, "passed": {}}, **rest}  # fmt: skip


def titles(summary, unreadable=()):
    material = Material(summary=summary, unreadable=dict.fromkeys(unreadable, "damaged"))
    return {threat.title: threat for threat in study_threats(material)}


def test_a_row_holds_the_means_of_its_finished_runs():
    (row,) = study_content.cell_rows(study(cell("a", 4.0, 4.2, 3.8, rank=1)))
    assert row["loss"] == pytest.approx(4.0)
    assert row["half"] == pytest.approx(
        4.302653 * 0.2 / math.sqrt(3), rel=1e-5
    )  # t quantile with two degrees of freedom
    assert (row["seconds"], row["memory"], row["spikes"], row["finished"], row["seeds"]) == (60.0, 2e9, 3, 3, 3)
    assert row["gain"] == pytest.approx(2.0)
    assert row["per_minute"] == pytest.approx(2.0)
    assert row["per_gigabyte"] == pytest.approx(1.0)


def test_cells_stand_by_rank_and_those_without_a_loss_last():
    rows = study_content.cell_rows(study(cell("lost", None), cell("second", 4.0, rank=2), cell("first", 3.0, rank=1)))
    assert [row["cell"] for row in rows] == ["first", "second", "lost"]
    assert math.isnan(rows[2]["loss"])
    assert rows[2]["failed"] == ["seed 1: diverged"]


def test_nothing_is_gained_by_a_cell_above_the_unigram_entropy():
    (row,) = study_content.cell_rows(study(cell("a", 6.5, rank=1)))
    assert math.isnan(row["gain"])
    assert math.isnan(row["per_minute"])


def verdict(candidate, word, mean, holm=0.01, interval=None):
    return {"candidate": candidate, "reference": "r", "verdict": word, "mean": mean, "interval": interval or [mean - 0.01, mean + 0.01], "holm": holm, "p_value": holm,
            "confidence": 0.95, "differences": [mean, mean], "seeds": [1, 2], "failed": {"candidate": [], "reference": []}, "sentence": f"{candidate} is {word}"}  # fmt: skip


def test_many_verdicts_are_counted_in_one_sentence_and_listed_largest_gain_first():
    names = ("a", "b", "c", "d")
    words = ("worse", "better", "better", "not distinguishable")
    contrasts = [verdict(n, w, m) for n, w, m in zip(names, words, (0.3, -0.1, -0.2, 0.0))]
    summary = study(cell("r", 4.0, rank=1), *(cell(n, 4.0, rank=i) for i, n in enumerate(names, 2)), reference="r", contrasts=contrasts)  # fmt: skip
    (answer,) = study_content.answers(summary)
    assert answer["headline"] == "Of 4 cells against r: 2 are better, 1 is worse, 1 cannot be told apart."
    assert "c is better" in answer["facts"][0]
    assert [row["cell"] for row in study_content.contrast_rows(summary)] == ["c", "b", "d", "a"]


def test_a_few_verdicts_are_cards_after_best_against_best():
    best = {**verdict("muon", "better", -0.1), "reference": "adamw", "chosen": {"muon": "a", "adamw": "r"}}
    summary = study(cell("a", 3.9, rank=1), cell("r", 4.0, group="adamw", rank=2), reference="r", contrasts=[verdict("a", "better", -0.1)], group_contrasts=[best])  # fmt: skip
    first, second = study_content.answers(summary)
    assert first["headline"] == "muon is better than adamw here."
    assert "a against r" in first["facts"][0]
    assert second["headline"] == "a is better than r here."
    assert second["group"] == "muon"


def test_a_verdict_that_only_the_number_of_comparisons_takes_away_says_so():
    open_ = verdict("a", "not distinguishable", -0.1, holm=0.2)
    summary = study(cell("a", 3.9, rank=1), cell("r", 4.0, rank=2), reference="r", contrasts=[open_])
    assert study_content.contrast_rows(summary)[0]["alone"] == "better"
    crossing = verdict("a", "not distinguishable", -0.1, holm=0.2, interval=[-0.3, 0.1])
    assert study_content.contrast_rows({**summary, "contrasts": [crossing]})[0]["alone"] is None


def test_without_a_reference_cells_are_ranked_not_judged():
    (answer,) = study_content.answers(study(cell("a", 4.0, rank=1)))
    assert "names no reference" in answer["facts"][0]


def test_published_numbers_stand_beside_ours_and_differ_only_where_they_apply():
    summary = study(
        cell(
            "a",
            4.1,
            4.3,
            rank=2,
            published={"loss": 4.0, "best_loss": 3.9, "minutes": 2.0},
            applies=True,
            best_report_cross_entropy=3.8,
        ),
        cell("b", 4.0, 4.0, rank=1, published={"loss": 5.0}, applies=False),
        cell("c", 4.0, 4.0, rank=3),
    )
    first, second = study_content.published_rows(summary)
    assert (first["cell"], first["published_rank"], first["our_rank"]) == ("a", 1, 2)
    assert first["difference"] == pytest.approx(0.2)
    assert first["minutes"] == pytest.approx(1.0)
    assert (first["published"]["best_loss"], first["best_loss"]) == (3.9, 3.8)
    assert math.isnan(second["difference"])
    assert "another version" in study_content.published_note(summary)
    assert "scale micro" in study_content.published_note({**summary, "scale": "micro"})
    assert study_content.published_note(study(summary["cells"][0])) == ""


def grid_study(fake, tmp_path, **rest):
    cells, axes = fake.grid_cells()
    return fake.fake_study(tmp_path, cells, axes, updates=20, points=2, **rest)


def test_a_grid_is_lines_of_learning_rates_and_heat_maps_with_the_means_in_their_places(fake, tmp_path):
    summary = grid_study(fake, tmp_path, seeds=(1,))
    lines = study_axes.sweeps(summary)
    assert len(lines) == 6
    assert all([point["x"] for point in line.points] == [0.03125, 0.0625, 0.125] for line in lines)
    assert lines[0].rest == {"momentum": 0.875, "steps": 8}  # the generator's best setting
    assert lines[0].found["open_low"]
    heat = study_axes.heat(summary)
    assert [panel["title"] for panel in heat["panels"]] == ["steps 4", "steps 8", "steps 16"]
    means = {cell["cell"]: cell["mean"] for cell in summary["cells"]}
    y, row = heat["panels"][1]["rows"][0]
    assert (y, row[1]["text"]) == (0.875, f"{means['lr=0.0625 momentum=0.875 steps=8']:.3f}")
    shades = {cell["text"]: cell["shade"] for panel in heat["panels"] for _, row in panel["rows"] for cell in row}
    assert shades[f"{min(means.values()):.3f}"] == 0.85
    assert shades[f"{max(means.values()):.3f}"] == 0.0


def test_axes_of_one_name_are_one_axis():
    axes = [
        {"name": "lr", "fields": ["optimizer.lr"], "values": values, "log": True}
        for values in ([0.02, 0.01], [0.001, 0.01])
    ]
    (axis,) = study_content.axes_of(study(axes=axes))
    assert axis["values"] == [0.001, 0.01, 0.02]


def test_two_cases_of_a_group_on_one_axis_are_two_lines():
    axes = [{"name": "lr", "fields": ["optimizer.lr"], "values": [0.01, 0.02], "log": True}]
    cells = [{**cell(f"{case} lr={lr}", 4.0, rank=1, values={"lr": lr}), "case": case} for case in ("plain", "decayed") for lr in (0.01, 0.02)]  # fmt: skip
    lines = study_axes.sweeps(study(*cells, axes=axes))
    assert sorted(line.label for line in lines) == ["decayed", "plain"]
    assert all(len(line.points) == 2 for line in lines)


def test_an_axis_that_is_no_learning_rate_shows_the_best_cell_at_each_value(fake, tmp_path):
    summary = grid_study(fake, tmp_path, seeds=(1,))
    momentum, steps = study_axes.effects(summary)
    assert (momentum.axis, momentum.values, steps.axis, steps.values) == (
        "momentum",
        [0.875, 0.9375],
        "steps",
        [4, 8, 16],
    )
    means = {cell["cell"]: cell["mean"] for cell in summary["cells"]}
    best = min(mean for name, mean in means.items() if "steps=16" in name)
    assert steps.groups["muon"][2]["loss"] == best
    assert steps.groups["muon"][2]["seconds"] == pytest.approx(20 * (0.09 + 0.004 * 16))


def test_values_that_are_words_or_lists_keep_their_order():
    axis = {"name": "size", "fields": ["x.y"], "values": [512, 64, "full", [1, 2]], "log": False}
    cells = [
        cell(f"{value}", 4.0 + i / 10, rank=i + 1, values={"size": value}) for i, value in enumerate(axis["values"])
    ]
    (effect,) = study_axes.effects(study(*cells, axes=[axis]))
    assert effect.values == [64, 512, "full", (1, 2)]
    assert [effect.groups["muon"][i]["cell"] for i in range(4)] == ["64", "512", "full", "[1, 2]"]


def test_the_profile_is_the_time_to_the_target_over_the_fastest(fake, tmp_path):
    cells = [fake.cell("slow", "muon", pace=0.2), fake.cell("quick", "muon", pace=0.1)]
    fake.fake_study(tmp_path, cells, targets=(4.5,), updates=20, points=20)
    found = study_axes.profile(read_material(tmp_path))
    assert found.ratios["quick"] == [1.0, 1.0, 1.0]
    assert found.ratios["slow"] == pytest.approx([2.0, 2.0, 2.0])
    assert found.scores == pytest.approx({"quick": 1.0, "slow": 2 / 3})


def test_the_best_the_fastest_good_one_and_what_to_avoid():
    summary = study(
        cell("best", 4.0, 4.0, rank=1),
        cell("fast", 4.02, 4.02, rank=2, seconds=20.0),
        cell("bad", 4.8, 4.8, rank=3),
        cell("broken", 3.9, None, rank=4),
        cell("stuck", 6.5, 6.5, rank=5),
        gate={"unigram_entropy": 6.0, "passed": {"stuck": False}},
    )
    found = [(entry.kind, entry.text) for entry in study_text.recommendations(summary)]
    assert found == [("primary", "best"), ("fast", "fast"), ("avoid", "broken"), ("avoid", "stuck"), ("avoid", "bad")]
    assert study_text.recommendations(study(cell("a", None))) == [
        study_text.Recommendation(kind="avoid", text="a", reason="did not finish on every seed")
    ]


def test_the_first_place_names_those_within_the_noise():
    cells = [
        cell("a", 4.0, 4.0, 4.0, 4.0, rank=1),
        cell("b", 4.04, 4.04, 4.04, 4.04, rank=2),
        cell("c", 4.2, 4.2, 4.2, 4.2, rank=3),
    ]
    summary = study(*cells, noise_floor={"spread": 0.04, "difference": 0.1})  # of means over four: 0.05
    reason = study_text.recommendations(summary)[0].reason
    assert "within the noise of b" in reason
    assert "c" not in reason.split("noise of")[1]


def test_threats_are_written_from_the_data():
    one_seed = titles(study(cell("a", 4.0, rank=1), seeds=[1]))
    assert one_seed["One seed"].severity == "serious"
    edge = {"group": "muon", "axis": "lr", "rest": {"momentum": 0.9}, "best": 0.1, "low": 0.05, "high": 0.1, "octaves": 1.0, "open_low": False, "open_high": True, "edge": "high", "optimum": None}  # fmt: skip
    found = titles(study(cell("a", 4.0, 4.1, rank=1), sensitivity=[edge]))
    assert "muon (momentum 0.9): the highest lr" in found["Best lr at the edge of its range"].text
    inside = {**edge, "best": 0.07, "edge": None}
    assert "Best lr at the edge of its range" not in titles(study(cell("a", 4.0, 4.1, rank=1), sensitivity=[inside]))
    micro = titles(study(cell("a", 4.0, 4.1, rank=1, published={"loss": 3.0}), scale="micro"))
    assert "not comparable with the published ones" in micro["Not the size of the source"].text
    assert "seed 2" in titles(study(cell("a", 4.0, None, rank=1)))["Runs that diverged"].text
    damaged = titles(study(cell("a", 4.0, 4.1, rank=1), budget={"runs": 3}), unreadable=["runs/x"])
    assert "runs/x" in damaged["Runs that are missing, damaged or unfinished"].text
    assert "Runs of an earlier plan" in titles(study(cell("a", 4.0, rank=1), stale=["runs/old"]))
    unequal = titles(study(*(cell(f"m{i}", 4.0, rank=i + 1) for i in range(3)), cell("x", 4.0, rank=4, group="adamw")))
    assert unequal["Unequal search"].severity == "serious"
    assert "The first of a ranking is flattered" in unequal


def test_all_cells_have_a_look_and_the_reference_is_among_the_named_ones():
    cells = [cell(f"c{i}", 4.0 + i / 100, rank=i + 1) for i in range(20)]
    summary = study(*cells, reference="c15")
    named = study_content.highlighted(summary)
    assert list(named) == ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c15"]
    assert len(set(named.values())) == 8
    lines = study_interactive.lines_of(summary)
    assert len(lines) == 20
    assert [line.name for line in lines.values() if line.strong] == list(named)


def test_figures_of_a_large_study_stay_within_a_budget_of_points(fake, tmp_path):
    cells, axes = fake.grid_cells()
    fake.fake_study(tmp_path, cells, axes, updates=600, points=300, seeds=(1, 2, 3, 4))
    material = read_material(tmp_path)
    figures, _ = study_interactive.figures(
        material, study_content.cell_rows(material.summary), study_axes.sweeps(material.summary)
    )
    for place, figure in figures.items():
        assert sum(len(trace["y"]) for trace in figure["data"]) <= 22_000, place
        json.dumps(figure, allow_nan=False)
    assert len({trace["meta"]["cell"] for trace in figures["training"]["data"]}) == 18
    assert len(figures["training"]["data"]) == 18, "72 runs are more than a figure holds: the first seed of each cell"


def test_an_optimum_beyond_what_was_tried_is_called_so():
    points = [{"x": 0.01}, {"x": 0.04}]
    found = {"best": 0.01, "low": 0.01, "high": 0.02, "octaves": 1.0, "open_low": True, "open_high": False}

    def line(lr, interval):
        fit = {"lr": lr, "interval": interval}
        return study_axes.Sweep(group="m", case="", axis="lr", rest={}, points=points, found={**found, "optimum": fit})

    assert study_tables.optimum(line(0.005, [0.0, None])) == "0.005, beyond what was tried"
    assert study_tables.optimum(line(0.02, [0.015, 0.03])) == "0.02 (0.015 to 0.03)"
    assert study_tables.bounds(line(0.02, [0.0, None])) == ("≤ 0.01", "0.02", "≥ ")


def test_a_fitted_speed_up_says_what_it_rests_on():
    law = {"scale": 400.0, "exponent": 0.3, "floor": 2.5, "residual": 0.001}
    rows = [
        {"group": "muon", "cell": "m", "tokens": 10_000, "loss": 4.0, "speedup": 1.4},
        {"group": "muon", "cell": "m", "tokens": 20_000, "loss": 2.4, "speedup": None},
    ]
    summary = study(cell("m", 4.0), data_speedup={"group": "adamw", "lengths": [1, 2, 3], "law": law, "rows": rows})
    assert [row["text"] for row in study_content.speedup_rows(summary)] == ["1.4", "beyond its floor"]
    assert "adamw would need" in study_content.speedup_note(summary)
    assert "3 lengths" in study_content.speedup_note(summary)
    assert study_content.speedup_rows(study(cell("m", 4.0))) == []
