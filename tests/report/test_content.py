"""What the figures and the page say, checked on numbers that are known."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from muonlab.report import content, html, interactive, series, style
from muonlab.report.differences import differing, routing_rules
from muonlab.report.exports import experiment_card
from muonlab.report.html import comparison_page
from muonlab.report.reading import Material, read_material
from muonlab.report.tables import comparison_tables
from muonlab.report.threats import threats
from muonlab.training.config import flat


def run(seed, losses, status="finished", split="report"):
    rows = [
        {"update": 10 * i, "tokens": 100 * i, "seconds": 1.0 * i * seed, "split": split, "cross_entropy": loss}
        for i, loss in enumerate(losses)
    ]
    return {"seed": seed, "status": status, "history": {"train": [], "eval": rows}}


def test_the_mean_curve_joins_the_seeds_at_the_updates_that_all_have():
    curve = series.mean_curve(
        [run(1, [4.0, 3.0, 2.0]), run(2, [5.0, 3.5]), run(3, [9.0, 9.0], status="diverged")], "report"
    )
    assert curve.updates == [0, 10]
    assert curve.mean == [4.5, 3.25]
    assert (curve.low, curve.high) == ([4.0, 3.0], [5.0, 3.5])
    assert curve.seeds == [1, 2]
    assert curve.seconds == [0.0, 1.5]
    assert series.mean_curve([], "report") is None
    assert series.mean_curve([run(1, [None, math.nan])], "report") is None


def test_the_split_with_more_evaluations_is_drawn():
    assert series.judged_split([run(1, [3.0, 2.0], split="tune")]) == "tune"
    assert series.judged_split([run(1, [3.0, 2.0], split="report")]) == "report"
    assert series.judged_split([]) == "report"


def test_the_loss_axis_leaves_out_the_steep_start_but_nothing_below():
    curve = series.mean_curve([run(1, [8.0, 4.0, 3.5, 3.2, 3.0])], "report")
    low, high = series.zoom([curve])
    assert low < 3.0
    assert 4.0 < high < 8.0


def test_a_thinned_series_keeps_its_ends():
    values = list(range(2000))
    short = series.thinned(values, 250)
    assert len(short) == 250
    assert (short[0], short[-1]) == (0, 1999)
    assert series.thinned([1, 2]) == [1, 2]


def test_each_optimizer_keeps_its_colour_whoever_it_is_compared_with():
    assert style.colors(["muon", "adamw"])["adamw"] == style.colors(["lion", "adamw", "sgd"])["adamw"]
    assert style.colors(["adamw", "muon"])["muon"] == style.colors(["muon"])["muon"]
    many = [f"optimizer{i}" for i in range(6)] + ["muon", "adamw"]
    assert len(set(style.colors(many).values())) == 8
    assert len(style.colors([f"o{i}" for i in range(20)])) == 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (style.short(1e-3), "0.001"), (style.short(None), "–"), (style.short(math.nan), "–"), (style.short(True), "yes"),
        (style.short([1, 2]), "1, 2"), (style.signed(-0.05), "−0.0500"), (style.signed(None), "–"), (style.duration(61.2), "1 min 01 s"),
        (style.duration(3.25), "3.2 s"), (style.duration(7300), "2 h 01 min"), (style.count(999), "999"), (style.count(204_800), "205 k"),
        (style.count(1_050_000), "1.05 M"), (style.loss(3.60001), "3.6000"),
    ],
)  # fmt: skip
def test_values_are_written_as_readers_expect(text, expected):
    assert text == expected


def test_the_strip_places_zero_interval_and_seeds_on_one_scale():
    verdict = {"differences": [-0.06, -0.04], "interval": [-0.1, 0.0], "mean": -0.05, "seeds": [1, 2]}
    (strip,) = content.strips([verdict])
    left, width = strip["bar"]
    assert left + width == pytest.approx(strip["zero"], abs=0.01)
    assert strip["mean"] == pytest.approx((strip["dots"][0]["at"] + strip["dots"][1]["at"]) / 2, abs=0.01)
    assert 0 < left < strip["zero"] < 100
    assert "seed 1" in strip["dots"][0]["title"]
    assert content.strips([{"differences": [], "interval": [None, None], "mean": None}]) == [None]
    one_seed = content.strips([{"differences": [-0.05], "interval": [None, None], "mean": -0.05}])[0]
    assert one_seed["bar"] is None


def test_an_open_verdict_says_what_to_do_next():
    verdict = {
        "candidate": "muon", "reference": "adamw", "differences": [-0.01, 0.02, -0.02], "mean": -0.003, "interval": [-0.05, 0.04],
        "confidence": 0.95, "p_value": 0.8, "verdict": "not distinguishable", "detectable_effect": 0.07, "seeds_needed": 40,
    }  # fmt: skip
    summary = {"optimizers": ["muon", "adamw"], "verdicts": [verdict]}
    (answer,) = content.answers(summary)
    assert answer["headline"] == "muon and adamw cannot be told apart here."
    assert "about 40 seeds" in answer["next"]
    assert any("0.0700" in fact for fact in answer["facts"])
    assert (
        "too small to matter"
        in content.answers({**summary, "verdicts": [{**verdict, "seeds_needed": None}]})[0]["next"]
    )
    assert (
        "at least three seeds"
        in content.answers({**summary, "verdicts": [{**verdict, "differences": [0.1]}]})[0]["next"]
    )
    nothing = content.answers({**summary, "verdicts": [], "gate": {"passed": False}})
    assert nothing[0]["headline"] == "No verdict."


def trial(index, stage, lr, loss, **others):
    return series.Trial(
        index=index, stage=stage, lr=lr, loss=loss, status="finished", values={"lr": lr, **others}, chosen=False
    )


def test_the_good_range_is_read_from_trials_that_differ_in_the_learning_rate_alone():
    plain = [
        trial(i, "lr", lr, loss, auxiliary=1.0) for i, (lr, loss) in enumerate([(0.01, 3.1), (0.02, 3.0), (0.04, 3.1)])
    ]
    other = [trial(3, "auxiliary", 0.02, 2.8, auxiliary=3.0), trial(4, "sobol", 0.03, 2.9, auxiliary=1.0)]
    assert series.sweep([*plain, *other]) == plain
    assert series.sensitivity([*plain, *other], 0.05).octaves == pytest.approx(1.0)
    refined = [trial(5, "refine", 0.015, 2.85, auxiliary=3.0), trial(6, "refine", 0.03, 2.85, auxiliary=3.0)]
    assert series.sweep([*plain, *other, *refined]) == [other[0], *refined]
    assert series.sweep([]) == []
    assert series.sensitivity([trial(0, "lr", 0.01, math.nan)]) is None


def test_the_sweep_in_numbers_finds_the_known_optimum(fake, tmp_path):
    summary = fake.fake_comparison(tmp_path, sobol=2)
    found = content.learning_rates(
        summary, "adamw"
    )  # the generator's loss is a parabola in log lr around 0.003, plus noise
    assert found["tried"] == pytest.approx([0.003 / 10**0.5, 0.003, 0.003 * 10**0.5])
    assert found["optimum"].lr == pytest.approx(0.003, rel=0.1)
    assert found["optimum"].curvature == pytest.approx(0.06, rel=0.2)
    assert content.learning_rates({**summary, "trials": []}, "adamw") is None


def test_efficiency_is_the_gain_over_counting_words_per_cost(comparison):
    material = read_material(comparison)
    found = content.efficiency(material, "muon")
    mean = sum(f["report_cross_entropy"] for f in material.summary["finals"][:3]) / 3
    assert found["gain"] == pytest.approx(6.31 - mean)
    assert found["per_minute"] == pytest.approx(found["gain"] / 13.1 * 60)
    assert found["per_gigabyte"] == pytest.approx(found["gain"] / 0.412)
    assert content.efficiency(changed(comparison, gate={"unigram_entropy": 3.0, "passed": False}), "muon") is None


def test_the_answer_says_how_soon_the_other_was_caught_up_with(comparison):
    summary = read_material(comparison).summary
    (answer,) = content.answers(summary)
    assert (
        "muon reached adamw’s final loss after 71 of 100 updates and 7.9 s of training, where adamw took 13.1 s."
        in answer["facts"]
    )
    summary["to_target"][0] |= {"updates": None, "seconds": None, "reached": "1 of 3"}
    assert (
        "muon did not reach adamw’s final loss in 100 updates (1 of 3 seeds)." in content.answers(summary)[0]["facts"]
    )


def test_several_verdicts_carry_holm_values():
    base = {
        "differences": [0.1, 0.2],
        "mean": 0.15,
        "interval": [-1, 1],
        "confidence": 0.95,
        "verdict": "not distinguishable",
    }
    pairs = (("a", 0.01, 0.02), ("b", 0.04, 0.04))
    verdicts = [{**base, "candidate": c, "reference": "adamw", "p_value": p, "holm": h} for c, p, h in pairs]
    answers = content.answers({"optimizers": ["a", "b", "adamw"], "verdicts": verdicts})
    assert [answer["holm"] for answer in answers] == pytest.approx([0.02, 0.04])
    assert content.answers({"optimizers": ["a", "adamw"], "verdicts": verdicts[:1]})[0]["holm"] is None


def test_differing_keys_are_found_at_any_depth():
    configs = [{"a": {"b": 1, "c": [1, 2]}, "seed": 1}, {"a": {"b": 2, "c": [1, 2]}, "seed": 2, "new": {"x": 0}}]
    assert differing(configs) == {"a.b": [1, 2], "new.x": [None, 0]}
    assert flat({"a": {"b": {"c": 1}}}) == {"a.b.c": 1}


def test_routing_rows_of_one_treatment_are_joined():
    rows = [{"name": f"blocks.{i}.w", "shape": [4, 4], "rule": "muon"} for i in range(3)] + [
        {"name": "e", "shape": [9, 4], "rule": "adamw"}
    ]
    joined = routing_rules(rows)
    assert [len(group["names"]) for group in joined] == [3, 1]


def titles(material):
    return {threat.title: threat for threat in threats(material)}


def changed(comparison, **changes):
    material = read_material(comparison)
    return Material(summary={**material.summary, **changes}, runs=material.runs, unreadable=material.unreadable)


def test_a_clean_comparison_has_no_serious_threat(comparison):
    assert not [threat for threat in threats(read_material(comparison)) if threat.severity == "serious"]
    assert "Another program than the one asked for" not in titles(read_material(comparison))


def test_threats_come_from_the_data(comparison, fake, tmp_path):
    assert "Tuning trials that did not finish" in titles(read_material(comparison))
    edge = changed(comparison, chosen={"muon": {"values": {"lr": 0.02}, "trial": 1, "edge": True}})
    assert "muon" in titles(edge)["Best learning rate at the edge of its range"].text
    knob = "learning rate of embeddings and head"
    other = changed(comparison, chosen={"adamw": {"values": {"lr": 0.02}, "trial": 1, "edge": False, "edges": [knob]}})
    assert "adamw" in titles(other)[f"Best {knob} at the edge of its range"].text
    assert "Best learning rate at the edge of its range" not in titles(other)
    assert "Not below the unigram entropy" in titles(
        changed(comparison, gate={"unigram_entropy": 6.3, "passed": {"muon": True, "adamw": False}})
    )
    fake.fake_comparison(
        tmp_path, seeds=1, epochs=7.5, notices=["enwik8 could not be downloaded; pydoc is used instead"]
    )
    material = read_material(tmp_path)
    next(iter(material.runs.values()))["versions"]["code"] = "another"
    next(iter(material.runs.values()))["program_notice"] = "torch.compile failed (no compiler here)"
    found = titles(material)
    assert found["One seed"].severity == "serious"
    assert "7.5 times" in found["Several epochs"].text
    assert "Mixed versions of the code" in found
    assert "no compiler here" in found["Another program than the one asked for"].text
    assert "pydoc" in found["Not the corpus that was asked for, or not all of it"].text
    assert "Run directories that cannot be read" in titles(
        Material(summary=material.summary, runs=material.runs, unreadable={"x": "gone"})
    )


def test_unequal_budgets_are_a_serious_threat(comparison):
    trials = read_material(comparison).summary["trials"][:-1]
    assert titles(changed(comparison, trials=trials))["Unequal tuning budgets"].severity == "serious"


def test_interactive_figures_hold_every_optimizer_and_are_json(comparison):
    material = read_material(comparison)
    figures = html.figures(material)
    for figure in (figures["curves"], figures["sensitivity"]):
        assert {trace["meta"]["group"] for trace in figure["data"]} == {"muon", "adamw"}
        json.dumps(figure, allow_nan=False)
    curves = figures["curves"]
    mean = next(trace for trace in curves["data"] if trace.get("name") == "muon")
    assert mean["meta"]["x"]["tokens"][-1] == 2048 * 100
    assert mean["y"][-1] == pytest.approx(
        sum(f["report_cross_entropy"] for f in material.summary["finals"][:3]) / 3, abs=1e-4
    )


def test_the_diverged_trial_is_drawn_above_the_others(comparison):
    figure = interactive.lr_sensitivity(read_material(comparison))
    points = next(trace for trace in figure["data"] if trace.get("name") == "adamw")
    assert points["marker"]["symbol"].count("x-thin") == 1
    failed = points["marker"]["symbol"].index("x-thin")
    assert points["y"][failed] == max(points["y"])
    assert "diverged" in points["text"][failed]


def test_options_in_a_remedy_are_code_and_the_rest_is_escaped():
    assert html._options("<b> more (--seeds 5)") == "&lt;b&gt; more (<code>--seeds 5</code>)"


def test_the_templates_are_part_of_the_package():
    folder = Path(html.__file__).parent / "templates"
    assert {path.name for path in folder.iterdir()} >= {"comparison.html.j2", "style.css", "page.js"}


def test_stopped_trials_looks_and_the_noise_floor_stand_in_page_card_and_terminal(comparison):
    short = {"optimizer": "muon", "stage": "rung", "updates": 25, "status": "finished", "tune_cross_entropy": 4.321, "seconds": 3.0, "directory": "trials/short"}  # fmt: skip
    stopped = [{**short, "values": {"lr": 0.01}}, {**short, "updates": 50, "values": {"lr": 0.02, "momentum": 0.9}}]
    looks = [{"trials": 5, "seeds": 2, "verdicts": {}}, {"trials": 5, "seeds": 3, "verdicts": {}}]
    noise = {"spread": 0.0123, "degrees": 4, "difference": 0.0456}
    material = changed(comparison, stopped_early=stopped, looks=looks, noise=noise)
    console = Console(file=io.StringIO(), width=200)
    for part in comparison_tables(material.summary):
        console.print(part)
    terms = dict(content.protocol(material))
    for text in (comparison_page(material), experiment_card(material), console.file.getvalue()):
        for term in ("Stopped early", "Looks", "Noise floor"):
            assert " ".join(terms[term].split()) in " ".join(text.split())
    assert "1 after 25 updates, 1 after 50 updates" in terms["Stopped early"]
    assert "5 trials and 2 seeds, then 5 trials and 3 seeds" in terms["Looks"]
    assert "by 0.0123 nats" in terms["Noise floor"]
    assert "0.0456 apart" in terms["Noise floor"]
    assert [row["updates"] for row in content.stopped_rows(material.summary)] == [50, 25]
    assert "trials/short" in comparison_page(material)
    assert titles(material)["Extended after a verdict was seen"].severity == "serious"


def test_one_look_is_said_and_no_threat(comparison):
    material = changed(comparison, looks=[{"trials": 5, "seeds": 3, "verdicts": {}}])
    assert dict(content.protocol(material))["Looks"].startswith("one")
    assert "Extended after a verdict was seen" not in titles(material)
    for term in ("Stopped early", "Noise floor"):
        assert term not in dict(content.protocol(material))
