"""Every statistic against a value worked out by hand, a published table, or a simulation with a known truth."""

import math

import numpy as np
import pytest

from muonlab.errors import InputError
from muonlab.studies import statistics as S

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
    samples = [rng.normal(0.0, 1.0, 30) for _ in range(600)]
    intervals = [S.bootstrap_interval(sample, resamples=499) for sample in samples]
    assert 0.92 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.97
    # and agrees with Student's for a large well-behaved sample
    large = rng.normal(0.0, 1.0, 400)
    assert S.bootstrap_interval(large) == pytest.approx(S.t_interval(large), abs=0.01)


def test_the_bootstrap_interval_of_the_published_mice_is_as_wide_as_its_standard_error_says():
    # Efron and Tibshirani 1993, table 2.1 and 2.2: treated mice, mean 86.86, bootstrap standard error 25.24·sqrt(6/7) = 23.37
    mice = [94, 197, 16, 38, 99, 141, 23]
    low, high = S.bootstrap_interval(mice, confidence=0.6827)
    assert (high - low) / 2 == pytest.approx(23.36, rel=0.05)
    assert low < 86.86 < high


def test_few_seeds_make_the_bootstrap_interval_too_narrow_which_is_why_verdicts_use_students():
    rng = np.random.default_rng(4)
    samples = [rng.normal(0.0, 1.0, 5) for _ in range(300)]
    hits = [low <= 0 <= high for low, high in (S.bootstrap_interval(sample, resamples=499) for sample in samples)]
    assert np.mean(hits) < 0.9


def test_a_verdict_by_bootstrap_takes_its_interval_from_the_differences():
    rng = np.random.default_rng(6)
    candidate = dict(enumerate(rng.normal(2.9, 0.02, 12)))
    result = S.compare_paired(candidate, dict.fromkeys(candidate, 3.0), method="bootstrap")
    assert result.interval == S.bootstrap_interval([loss - 3.0 for loss in candidate.values()])
    assert result.verdict == "better"
    assert "bootstrap interval" in result.sentence("muon", "adamw")
    with pytest.raises(InputError, match="known: bootstrap, t"):
        S.compare_paired(candidate, candidate, method="guess")


# --- families


def shifted(mean, spread):
    """Four losses with this mean and this standard deviation around 3."""
    return dict(enumerate(3 + mean + spread * np.array([-1.0, -1.0, 1.0, 1.0]) / math.sqrt(4 / 3)))


def test_a_verdict_of_a_family_must_hold_after_holms_correction_too():
    reference = dict.fromkeys(range(4), 3.0)
    # t = mean / (sd / 2): -4 and -3.5 with 3 degrees of freedom give p = 0.028 and 0.039, neither below 0.05 / 2
    family = {"first": shifted(-0.04, 0.02), "second": shifted(-0.035, 0.02), "third": shifted(0.0, 0.02)}
    alone = {name: S.compare_paired(losses, reference) for name, losses in family.items()}
    assert [r.verdict for r in alone.values()] == ["better", "better", "not distinguishable"]
    assert alone["first"].p_value == pytest.approx(0.02801, abs=1e-5)
    together = S.compare_family(family, reference)
    assert [r.verdict for r in together.values()] == ["not distinguishable"] * 3
    assert together["first"].holm == pytest.approx(3 * 0.02801, abs=1e-4)
    assert together["first"].interval == alone["first"].interval
    assert "corrected for all comparisons is 0.084" in together["first"].sentence("first", "adamw")
    strong = S.compare_family({**family, "first": shifted(-0.4, 0.02)}, reference)
    assert strong["first"].verdict == "better"


def test_a_family_of_one_is_decided_by_its_interval_and_failures_are_no_members():
    reference = dict.fromkeys(range(4), 3.0)
    one = S.compare_family({"muon": shifted(-0.035, 0.02)}, reference)["muon"]
    assert one.verdict == "better"
    assert one.holm == one.p_value
    both = S.compare_family({"muon": shifted(-0.035, 0.02), "wild": dict.fromkeys(range(4))}, reference)
    assert both["wild"].verdict == "worse"
    assert both["wild"].holm is None
    assert both["muon"].verdict == "better"


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
