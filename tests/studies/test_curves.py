"""Targets, learning rates, profiles and power laws against values worked out by hand or published."""

import math

import numpy as np
import pytest

from muonlab.errors import InputError
from muonlab.studies import curves as C

# --- targets


def rows(*losses, every=10):
    return [
        {"update": every * i, "tokens": 100 * every * i, "seconds": 0.5 * every * i, "cross_entropy": loss}
        for i, loss in enumerate(losses, start=1)
    ]


def test_the_target_is_crossed_between_two_evaluations():
    reached = C.to_target(rows(5.0, 4.0, 3.0), 3.25)  # three quarters of the way from update 20 to 30
    assert (reached.updates, reached.tokens, reached.seconds) == (27.5, 2750.0, 13.75)


def test_the_first_crossing_counts_even_if_the_loss_rises_again():
    assert C.to_target(rows(5.0, 3.0, 4.0, 3.0), 3.0).updates == 20
    assert C.to_target(rows(2.0, 1.0), 3.0).updates == 10
    assert C.to_target(list(reversed(rows(5.0, 3.0))), 4.0).updates == 15


def test_a_target_that_is_never_reached_takes_infinitely_long():
    assert not C.to_target(rows(5.0, math.nan, 3.5), 3.0).reached
    assert C.to_target([], 3.0).updates == math.inf
    assert C.to_target(rows(5.0, math.nan, 2.0), 3.0).updates == 30  # no interpolation across a NaN


def test_runs_that_never_arrived_count_as_infinite_in_the_median():
    def run(updates):
        return C.ToTarget(updates=updates, tokens=updates, seconds=updates)

    assert C.median_to_target([run(10), run(20), run(math.inf)]).updates == 20
    assert C.median_to_target([run(10), run(math.inf), run(math.inf)]).updates == math.inf
    assert C.median_to_target([run(10), run(math.inf)]).updates == math.inf
    assert C.median_to_target([run(10), run(20)]).updates == 15


# --- learning rates


def test_the_good_range_of_a_v_shaped_curve_is_known():
    # loss = |log2(lr) − log2(0.01)| · 0.1, tried every two octaves: within 0.05 is half an octave on each side
    lrs = [0.01 * 4.0**k for k in (-2, -1, 0, 1, 2)]
    losses = [0.4, 0.2, 0.0, 0.2, 0.4]
    found = C.lr_tolerance(lrs, losses, delta=0.05)
    assert found.octaves == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((0.01 / math.sqrt(2), 0.01 * math.sqrt(2)))
    assert not found.open_low
    assert not found.open_high
    wide = C.lr_tolerance(lrs, losses, delta=1.0)
    assert wide.octaves == pytest.approx(8.0)
    assert wide.open_low
    assert wide.open_high


def test_the_good_range_of_muon_in_the_published_sweep_of_wen_et_al():
    # 2509.02046, 130M parameters, 1 x Chinchilla: within 0.05 of 3.464 to the right up to 3.514, which lies
    # (3.514 - 3.484) / (3.535 - 3.484) of the way from 0.032 to 0.064; to the left all of what was tried
    lrs, losses = [0.008, 0.016, 0.032, 0.064, 0.128], [3.491, 3.464, 3.484, 3.535, 3.688]
    found = C.lr_tolerance(lrs, losses, delta=0.05)
    assert found.best == 0.016
    assert found.octaves == pytest.approx(2 + 0.030 / 0.051, abs=1e-6)
    assert found.open_low
    assert not found.open_high
    # a parabola through the three best: vertex at log2 = -6 - (3.484 - 3.491) / (2 * (3.484 + 3.491 - 2 * 3.464))
    optimum = C.lr_optimum(lrs[:3], losses[:3])
    assert math.log2(optimum.lr / 0.016) == pytest.approx(0.007 / (2 * 0.047), abs=1e-6)
    assert C.edge_of_range(lrs, losses) is None


def test_the_good_range_stops_at_a_trial_that_diverged():
    found = C.lr_tolerance([0.01, 0.02, 0.04], [3.0, 3.01, None], delta=0.05)
    assert (found.low, found.high) == pytest.approx((0.01, 0.02))
    assert found.open_low
    assert not found.open_high


def test_the_best_of_several_trials_at_one_learning_rate_counts():
    assert C.lr_tolerance([1, 2, 2, 4], [3.0, 2.0, 9.0, 3.0], delta=0.5).octaves == pytest.approx(1.0)


def test_a_second_valley_is_not_part_of_the_good_range():
    assert C.lr_tolerance([1, 2, 4, 8], [2.0, 5.0, 2.01, 5.0], delta=0.1).high < 2


@pytest.mark.parametrize(
    ("losses", "edge"),
    [([1, 2, 3], "low"), ([3, 2, 1], "high"), ([2, 1, 2], None), ([2, 1, math.nan], None), ([None, 1, 2], None)],
)
def test_the_edge_of_the_range_is_flagged(losses, edge):
    assert C.edge_of_range([0.01, 0.02, 0.04], losses) == edge


def test_a_single_learning_rate_is_at_both_edges_and_all_diverged_is_an_error():
    assert C.edge_of_range([0.01, 0.01], [3.0, 2.9]) == "both"
    with pytest.raises(InputError, match="finite"):
        C.edge_of_range([0.01, 0.02], [None, math.nan])
    with pytest.raises(InputError, match="not positive"):
        C.lr_tolerance([0.0], [1.0])


def test_the_vertex_of_an_exact_parabola_is_found():
    lrs = [0.005, 0.01, 0.02, 0.04, 0.08]
    losses = [3.0 + 0.1 * (math.log2(lr / 0.017)) ** 2 for lr in lrs]
    found = C.lr_optimum(lrs, [*losses[:-1], losses[-1]])
    assert found.lr == pytest.approx(0.017)
    assert found.interval == pytest.approx((0.017, 0.017), rel=1e-5)
    assert found.loss == pytest.approx(3.0)
    assert found.curvature == pytest.approx(0.1)
    three = C.lr_optimum(lrs[:3], losses[:3])
    assert three.lr == pytest.approx(0.017)
    assert three.interval == (0.0, math.inf)


def test_no_minimum_and_too_few_points_give_no_optimum():
    assert C.lr_optimum([1, 2, 4], [1.0, 2.0, 1.0]) is None
    assert C.lr_optimum([1, 2, 4], [1.0, 2.0, None]) is None


def test_the_interval_of_the_optimum_covers_the_truth_in_95_percent_of_sweeps():
    rng = np.random.default_rng(5)
    lrs = [2.0**k for k in range(-10, -2)]
    truth = [3.0 + 0.05 * (math.log2(lr) + 6.3) ** 2 for lr in lrs]
    hits = 0
    for _ in range(1000):
        low, high = C.lr_optimum(lrs, list(truth + rng.normal(0, 0.05, len(lrs)))).interval
        hits += low <= 2**-6.3 <= high
    assert 0.93 <= hits / 1000 <= 0.97


# --- profiles and laws


def test_the_performance_profile_of_three_workloads_is_known():
    profile = C.performance_profile({"a": [10, 40, math.inf], "b": [20, 10, 30]})
    assert profile.ratios == {"a": [1.0, 4.0, math.inf], "b": [2.0, 1.0, 1.0]}
    # areas over [1, 4]: a gains 3 + 0 + 0, b gains 2 + 3 + 3, each over 3 workloads and a width of 3
    assert profile.scores == pytest.approx({"a": 3 / 9, "b": 8 / 9})
    assert profile.share("a", 3.9) == pytest.approx(1 / 3)
    assert profile.share("a", 4.0) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="same workloads"):
        C.performance_profile({"a": [1.0], "b": [1.0, 2.0]})


def test_a_workload_that_nobody_finished_counts_for_nobody():
    assert C.performance_profile({"a": [math.inf, 1.0], "b": [math.inf, 1.0]}).scores == pytest.approx(
        {"a": 0.5, "b": 0.5}
    )


def test_an_exact_power_law_is_recovered():
    data = [1e9, 2e9, 4e9, 8e9, 16e9]
    law = C.fit_power_law(data, [400 * d**-0.3 + 2.5 for d in data])
    assert (law.scale, law.exponent, law.floor) == pytest.approx((400, 0.3, 2.5), rel=1e-3)
    assert law.data_for(law.loss(3e9)) == pytest.approx(3e9)
    assert law.data_for(2.4) == math.inf


def test_the_speedup_of_muon_in_wen_et_al_is_about_1_4_at_130m():
    # Wen et al. 2509.02046: C4 loss of tuned AdamW and Muon at 1, 2, 4, 8 x Chinchilla, 130M parameters
    chinchilla = [1.0, 2.0, 4.0, 8.0]
    adamw, muon = [3.529, 3.409, 3.322, 3.262], [3.464, 3.369, 3.296, 3.240]
    law = C.fit_power_law(chinchilla, adamw)
    assert law.residual < 0.002
    speedups = [C.data_speedup(law, d, loss) for d, loss in zip(chinchilla, muon)]
    # the paper's figure: 1.4 times at 0.1B parameters
    assert speedups == pytest.approx([1.4] * 4, abs=0.1)


def test_a_power_law_of_two_sizes_is_refused():
    with pytest.raises(InputError, match="three or more"):
        C.fit_power_law([1.0, 2.0], [3.0, 2.9])
