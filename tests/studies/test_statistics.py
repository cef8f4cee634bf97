"""Every statistic against a value worked out by hand, a published table, or a simulation with a known truth."""

import math

import numpy as np
import pytest

from muonlab.errors import InputError
from muonlab.studies import statistics as S
from muonlab.studies.search import Search

# --- paired verdicts


def test_t_interval_equals_the_hand_computed_one():
    # mean −0.05, sd 0.01, n 3, t(0.975; 2) = 4.302653: half width 4.302653 · 0.01 / √3
    low, high = S.t_interval([-0.06, -0.05, -0.04])
    assert low == pytest.approx(-0.05 - 0.0248414, abs=1e-6)
    assert high == pytest.approx(-0.05 + 0.0248414, abs=1e-6)


def test_a_negative_difference_means_that_the_candidate_is_better():
    result = S.compare_paired({1: 3.00, 2: 3.01, 3: 3.02}, {1: 3.06, 2: 3.06, 3: 3.06})
    assert list(result.differences.values()) == pytest.approx([-0.06, -0.05, -0.04])
    assert result.verdict == "better"
    assert S.compare_paired({1: 3.06, 2: 3.06, 3: 3.06}, {1: 3.00, 2: 3.01, 3: 3.02}).verdict == "worse"


def test_pairing_by_seed_removes_what_seeds_share():
    hard_and_easy = np.random.default_rng(0).normal(3.0, 0.5, 5)  # seeds differ by far more than the optimizers
    reference = {seed: float(loss) for seed, loss in enumerate(hard_and_easy)}
    candidate = {seed: loss - 0.05 - 0.001 * seed for seed, loss in reversed(reference.items())}
    assert S.compare_paired(candidate, reference).verdict == "better"


def test_the_same_optimizer_twice_is_not_distinguishable():
    result = S.compare_paired({1: 3.0, 2: 3.1, 3: 3.2}, {1: 3.0, 2: 3.1, 3: 3.2})
    assert result.verdict == "not distinguishable"
    assert result.interval == (0.0, 0.0)
    assert result.p_value == 1.0


def test_an_effect_below_the_minimum_effect_is_not_called_better():
    candidate, reference = {1: 2.999, 2: 2.998, 3: 2.997}, {1: 3.0, 2: 3.0, 3: 3.0}
    assert S.compare_paired(candidate, reference, minimum_effect=0.0).verdict == "not distinguishable"
    wide = {seed: loss - 0.05 for seed, loss in candidate.items()}
    assert S.compare_paired(wide, reference, minimum_effect=0.02).verdict == "better"
    assert S.compare_paired(wide, reference, minimum_effect=0.05).verdict == "not distinguishable"


def test_one_seed_never_gives_a_verdict():
    result = S.compare_paired({1: 2.0}, {1: 3.0})
    assert result.verdict == "not distinguishable"
    assert result.interval == (-math.inf, math.inf)
    assert result.to_dict()["interval"] == [None, None]
    assert "one seed has no error bar" in result.sentence("muon", "adamw")


@pytest.mark.parametrize("failure", [None, math.nan, math.inf])
def test_an_optimizer_that_diverged_on_a_seed_cannot_be_better(failure):
    reference = {1: 3.0, 2: 3.0, 3: 3.0, 4: 3.0}
    result = S.compare_paired({1: 2.5, 2: 2.51, 3: 2.49, 4: failure}, reference)
    assert result.verdict == "not distinguishable"
    assert result.failed["candidate"] == (4,)
    assert "muon failed on seed 4" in result.sentence("muon", "adamw")
    assert S.compare_paired(dict.fromkeys(reference, failure), reference).verdict == "worse"
    assert S.compare_paired(reference, dict.fromkeys(reference, failure)).verdict == "better"


def test_seeds_of_only_one_side_are_an_error_and_extra_seeds_are_not_paired():
    with pytest.raises(InputError, match="common seeds"):
        S.compare_paired({1: 3.0}, {2: 3.0})
    assert list(S.compare_paired({1: 3.0, 2: 3.0, 9: 0.0}, {1: 3.0, 2: 3.1}).differences) == [1, 2]


def test_the_p_value_is_below_the_level_exactly_when_the_t_interval_excludes_zero():
    rng = np.random.default_rng(3)
    for _ in range(200):
        differences = rng.normal(-0.02, 0.02, 4)
        result = S.compare_paired(dict(enumerate(3 + differences)), dict.fromkeys(range(4), 3.0))
        assert (result.p_value < 0.05) == (result.verdict != "not distinguishable")


def test_the_t_interval_covers_the_truth_in_95_percent_of_studies():
    rng = np.random.default_rng(0)
    hits = [low <= -0.03 <= high for low, high in (S.t_interval(rng.normal(-0.03, 0.02, 3)) for _ in range(4000))]
    assert 0.94 <= np.mean(hits) <= 0.96


def test_the_bootstrap_interval_covers_the_truth_with_many_seeds():
    rng = np.random.default_rng(1)
    samples = [rng.normal(0.0, 1.0, 30) for _ in range(150)]
    intervals = [S.bootstrap_interval(sample, resamples=499) for sample in samples]
    assert 0.88 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 1.0
    # and agrees with Student's for a large well-behaved sample
    large = rng.normal(0.0, 1.0, 400)
    assert S.bootstrap_interval(large) == pytest.approx(S.t_interval(large), abs=0.01)


# --- power


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_equal_the_table_of_g_power(effect, n):
    # G*Power 3.1, t tests, matched pairs, two tails, α 0.05, power 0.80: dz 0.2, 0.5, 0.8 (small, medium, large)
    assert S.seeds_needed(effect, 1.0) == n
    assert S.seeds_needed(-effect * 0.01, 0.01) == n


def test_power_equals_the_share_of_simulated_studies_that_find_the_effect():
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(4000):
        low, high = S.t_interval(rng.normal(1.5, 1.0, 4))
        found += low > 0 or high < 0
    assert found / 4000 == pytest.approx(S.power(1.5, 1.0, 4), abs=0.025)


def test_the_detectable_effect_has_80_percent_power():
    for n in (2, 3, 5, 10, 50):
        assert S.power(S.detectable_effect(0.013, n), 0.013, n) == pytest.approx(0.8, abs=1e-6)
    assert S.detectable_effect(0.013, 1) == math.inf


def test_power_of_no_effect_is_the_level_and_of_a_huge_effect_is_one():
    assert S.power(0.0, 1.0, 5) == pytest.approx(0.05)
    for n in (2, 5, 30):
        for effect in (50, 500):
            assert S.power(effect, 1.0, n) == pytest.approx(1.0, abs=0.02)


def test_no_effect_needs_infinitely_many_seeds_and_no_noise_needs_two():
    assert S.seeds_needed(0.0, 1.0) == math.inf
    assert S.seeds_needed(0.1, 0.0) == 2


def test_holm_equals_the_hand_computed_family():
    # sorted .005·4, .01·3, .03·2, .04·1 -> running maximum .02 .03 .06 .06
    assert S.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert S.holm([0.6, 0.9]) == [1.0, 1.0]
    assert S.holm([]) == []


def test_noise_floor_pools_the_repeats():
    # groups {1, 3} and {10, 10, 13}: squares 2 + 6 over 1 + 2 degrees
    floor = S.noise_floor([[1.0, 3.0], [10.0, 10.0, 13.0], [99.0]])
    assert floor.degrees == 3
    assert floor.spread == pytest.approx(math.sqrt(8 / 3))
    assert floor.difference == pytest.approx(3.182446 * math.sqrt(2) * math.sqrt(8 / 3), rel=1e-6)
    with pytest.raises(InputError, match="twice"):
        S.noise_floor([[1.0]])


# --- the whole path: tune, choose, repeat with seeds, judge


def simulated_study(rng, curves, seeds=3, trials=5):
    """One comparison of two optimizers whose true loss is `curve(octaves from the usual learning rate, auxiliary)`.

    Returns the verdict and the true difference of the two configurations that tuning chose.
    """
    hard = {seed: rng.normal(0, 0.05) for seed in range(seeds + 1)}  # what a seed does to every optimizer alike
    finals, truths = [], []
    for curve in curves:
        search = Search("muon", trials)
        truth = {}
        while points := search.ask():
            for point in points:
                truth[point] = curve(math.log2(point.lr / search.center), point.auxiliary)
                search.tell(point, truth[point] + hard[0] + rng.normal(0, 0.01))  # seed 0 tunes and is not judged
        truths.append(truth[search.best])
        finals.append({seed: truth[search.best] + hard[seed] + rng.normal(0, 0.01) for seed in range(1, seeds + 1)})
    return S.compare_paired(*finals), truths[0] - truths[1]


def test_equal_optimizers_are_called_different_in_at_most_6_percent_of_studies():
    rng = np.random.default_rng(10)
    flat = [lambda octaves, auxiliary: 3.5] * 2  # every choice is equally good, so choosing follows noise alone
    verdicts = [simulated_study(rng, flat)[0].verdict for _ in range(2000)]
    assert np.mean([verdict != "not distinguishable" for verdict in verdicts]) <= 0.06


def test_intervals_cover_the_true_difference_of_what_was_chosen_in_95_percent_of_studies():
    rng = np.random.default_rng(11)

    def muon(octaves, auxiliary):
        return 3.50 + 0.02 * (octaves - 0.3) ** 2 + 0.01 * math.log(auxiliary) ** 2

    def adamw(octaves, auxiliary):
        return 3.52 + 0.05 * (octaves + 0.4) ** 2 + 0.01 * math.log(auxiliary) ** 2

    covered = []
    for _ in range(2000):
        result, truth = simulated_study(rng, [muon, adamw], seeds=4)
        covered.append(result.interval[0] <= truth <= result.interval[1])
    assert 0.93 <= np.mean(covered) <= 0.97


# --- targets


def rows(*losses, every=10):
    return [
        {"update": every * i, "tokens": 100 * every * i, "seconds": 0.5 * every * i, "cross_entropy": loss}
        for i, loss in enumerate(losses, start=1)
    ]


def test_the_target_is_crossed_between_two_evaluations():
    reached = S.to_target(rows(5.0, 4.0, 3.0), 3.25)  # three quarters of the way from update 20 to 30
    assert (reached.updates, reached.tokens, reached.seconds) == (27.5, 2750.0, 13.75)


def test_the_first_crossing_counts_even_if_the_loss_rises_again():
    assert S.to_target(rows(5.0, 3.0, 4.0, 3.0), 3.0).updates == 20
    assert S.to_target(rows(2.0, 1.0), 3.0).updates == 10
    assert S.to_target(list(reversed(rows(5.0, 3.0))), 4.0).updates == 15


def test_a_target_that_is_never_reached_takes_infinitely_long():
    assert not S.to_target(rows(5.0, math.nan, 3.5), 3.0).reached
    assert S.to_target([], 3.0).updates == math.inf
    assert S.to_target(rows(5.0, math.nan, 2.0), 3.0).updates == 30  # no interpolation across a NaN


def test_runs_that_never_arrived_count_as_infinite_in_the_median():
    def run(updates):
        return S.ToTarget(updates=updates, tokens=updates, seconds=updates)

    assert S.median_to_target([run(10), run(20), run(math.inf)]).updates == 20
    assert S.median_to_target([run(10), run(math.inf), run(math.inf)]).updates == math.inf
    assert S.median_to_target([run(10), run(math.inf)]).updates == math.inf
    assert S.median_to_target([run(10), run(20)]).updates == 15


# --- learning rates


def test_the_good_range_of_a_v_shaped_curve_is_known():
    # loss = |log2(lr) − log2(0.01)| · 0.1, tried every two octaves: within 0.05 is half an octave on each side
    lrs = [0.01 * 4.0**k for k in (-2, -1, 0, 1, 2)]
    losses = [0.4, 0.2, 0.0, 0.2, 0.4]
    found = S.lr_tolerance(lrs, losses, delta=0.05)
    assert found.octaves == pytest.approx(1.0)
    assert (found.low, found.high) == pytest.approx((0.01 / math.sqrt(2), 0.01 * math.sqrt(2)))
    assert not found.open_low
    assert not found.open_high
    wide = S.lr_tolerance(lrs, losses, delta=1.0)
    assert wide.octaves == pytest.approx(8.0)
    assert wide.open_low
    assert wide.open_high


def test_the_good_range_stops_at_a_trial_that_diverged():
    found = S.lr_tolerance([0.01, 0.02, 0.04], [3.0, 3.01, None], delta=0.05)
    assert (found.low, found.high) == pytest.approx((0.01, 0.02))
    assert found.open_low
    assert not found.open_high


def test_the_best_of_several_trials_at_one_learning_rate_counts():
    assert S.lr_tolerance([1, 2, 2, 4], [3.0, 2.0, 9.0, 3.0], delta=0.5).octaves == pytest.approx(1.0)


def test_a_second_valley_is_not_part_of_the_good_range():
    assert S.lr_tolerance([1, 2, 4, 8], [2.0, 5.0, 2.01, 5.0], delta=0.1).high < 2


@pytest.mark.parametrize(
    ("losses", "edge"),
    [([1, 2, 3], "low"), ([3, 2, 1], "high"), ([2, 1, 2], None), ([2, 1, math.nan], None), ([None, 1, 2], None)],
)
def test_the_edge_of_the_range_is_flagged(losses, edge):
    assert S.edge_of_range([0.01, 0.02, 0.04], losses) == edge


def test_a_single_learning_rate_is_at_both_edges_and_all_diverged_is_an_error():
    assert S.edge_of_range([0.01, 0.01], [3.0, 2.9]) == "both"
    with pytest.raises(InputError, match="finite"):
        S.edge_of_range([0.01, 0.02], [None, math.nan])
    with pytest.raises(InputError, match="not positive"):
        S.lr_tolerance([0.0], [1.0])


def test_the_vertex_of_an_exact_parabola_is_found():
    lrs = [0.005, 0.01, 0.02, 0.04, 0.08]
    losses = [3.0 + 0.1 * (math.log2(lr / 0.017)) ** 2 for lr in lrs]
    found = S.lr_optimum(lrs, [*losses[:-1], losses[-1]])
    assert found.lr == pytest.approx(0.017)
    assert found.interval == pytest.approx((0.017, 0.017), rel=1e-5)
    assert found.loss == pytest.approx(3.0)
    assert found.curvature == pytest.approx(0.1)
    three = S.lr_optimum(lrs[:3], losses[:3])
    assert three.lr == pytest.approx(0.017)
    assert three.interval == (0.0, math.inf)


def test_no_minimum_and_too_few_points_give_no_optimum():
    assert S.lr_optimum([1, 2, 4], [1.0, 2.0, 1.0]) is None
    assert S.lr_optimum([1, 2, 4], [1.0, 2.0, None]) is None


def test_the_interval_of_the_optimum_covers_the_truth_in_95_percent_of_sweeps():
    rng = np.random.default_rng(5)
    lrs = [2.0**k for k in range(-10, -2)]
    truth = [3.0 + 0.05 * (math.log2(lr) + 6.3) ** 2 for lr in lrs]
    hits = 0
    for _ in range(1000):
        low, high = S.lr_optimum(lrs, list(truth + rng.normal(0, 0.05, len(lrs)))).interval
        hits += low <= 2**-6.3 <= high
    assert 0.93 <= hits / 1000 <= 0.97


# --- profiles and laws


def test_the_performance_profile_of_three_workloads_is_known():
    profile = S.performance_profile({"a": [10, 40, math.inf], "b": [20, 10, 30]})
    assert profile.ratios == {"a": [1.0, 4.0, math.inf], "b": [2.0, 1.0, 1.0]}
    # areas over [1, 4]: a gains 3 + 0 + 0, b gains 2 + 3 + 3, each over 3 workloads and a width of 3
    assert profile.scores == pytest.approx({"a": 3 / 9, "b": 8 / 9})
    assert profile.share("a", 3.9) == pytest.approx(1 / 3)
    assert profile.share("a", 4.0) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="same workloads"):
        S.performance_profile({"a": [1.0], "b": [1.0, 2.0]})


def test_a_workload_that_nobody_finished_counts_for_nobody():
    assert S.performance_profile({"a": [math.inf, 1.0], "b": [math.inf, 1.0]}).scores == pytest.approx(
        {"a": 0.5, "b": 0.5}
    )


def test_an_exact_power_law_is_recovered():
    data = [1e9, 2e9, 4e9, 8e9, 16e9]
    law = S.fit_power_law(data, [400 * d**-0.3 + 2.5 for d in data])
    assert (law.scale, law.exponent, law.floor) == pytest.approx((400, 0.3, 2.5), rel=1e-3)
    assert law.data_for(law.loss(3e9)) == pytest.approx(3e9)
    assert law.data_for(2.4) == math.inf


def test_the_speedup_of_muon_in_wen_et_al_is_about_1_4_at_130m():
    # Wen et al. 2509.02046: C4 loss of tuned AdamW and Muon at 1, 2, 4, 8 x Chinchilla, 130M parameters
    chinchilla = [1.0, 2.0, 4.0, 8.0]
    adamw, muon = [3.529, 3.409, 3.322, 3.262], [3.464, 3.369, 3.296, 3.240]
    law = S.fit_power_law(chinchilla, adamw)
    assert law.residual < 0.002
    speedups = [S.data_speedup(law, d, loss) for d, loss in zip(chinchilla, muon)]
    # the paper's figure: 1.4 times at 0.1B parameters
    assert speedups == pytest.approx([1.4] * 4, abs=0.1)


def test_a_power_law_of_two_sizes_is_refused():
    with pytest.raises(InputError, match="three or more"):
        S.fit_power_law([1.0, 2.0], [3.0, 2.9])
