"""Spikes, plateaus and recommendations on curves whose answer is plain to see."""

import math
import random

from muonlab.diagnostics.stability import plateaus, spikes
from muonlab.report.reading import read_material
from muonlab.report.stability import recommendations


def smooth(updates=200):
    chance = random.Random(0)
    return [3 + 4 * math.exp(-update / 30) + chance.gauss(0, 0.02) for update in range(updates)]


def test_a_smooth_curve_has_no_spike():
    assert spikes(smooth()) == 0
    assert spikes([]) == 0


def test_each_excursion_counts_once():
    losses = smooth()
    for start in (100, 150):
        losses[start : start + 4] = [5.0, 6.0, 5.5, 5.0]
    assert spikes(losses) == 2
    losses[-1] = math.nan
    assert spikes(losses) == 3


def test_a_pause_that_ends_is_a_plateau_and_the_end_of_the_curve_is_none():
    assert plateaus([5.0, 4.0, 4.0, 3.999, 4.0, 3.5, 3.0]) == 1
    assert plateaus([5.0, 4.0, 3.0, 3.0, 3.0, 3.0]) == 0
    assert plateaus([5.0, 4.0, 3.0, 2.0]) == 0


def test_the_best_is_recommended_and_what_failed_is_advised_against(comparison):
    found = recommendations(read_material(comparison).summary)
    assert [entry.kind for entry in found] == ["primary", "avoid"]
    assert found[0].text.startswith("muon with lr 0.02")
    assert found[1].text == "adamw at lr 0.00949"


def test_the_faster_of_two_good_ones_is_named(comparison):
    summary = read_material(comparison).summary
    for entry in summary["finals"]:
        entry["report_cross_entropy"] = 3.6 if entry["optimizer"] == "muon" else 3.61
        entry["seconds"] = 20.0 if entry["optimizer"] == "muon" else 10.0
    found = {entry.kind: entry for entry in recommendations(summary)}
    assert found["primary"].text.startswith("muon")
    assert found["fast"].text.startswith("adamw")
    assert "10.0 s" in found["fast"].reason


def test_nothing_is_recommended_when_nothing_finished(comparison):
    summary = read_material(comparison).summary
    for entry in summary["finals"]:
        entry["report_cross_entropy"] = None
    assert recommendations(summary) == []


def test_a_recommendation_says_when_the_verdict_is_open(comparison):
    summary = read_material(comparison).summary
    summary["verdicts"][0]["verdict"] = "not distinguishable"
    assert "not distinguishable from adamw" in recommendations(summary)[0].reason
    summary["gate"] = {"unigram_entropy": 1.0, "passed": False}
    assert recommendations(summary) == []
