"""From paired numbers to a verdict: the test of a region, and arithmetic."""

import math

import pytest
from scipy import stats

from muonlab.errors import InputError
from muonlab.studies.verdicts import decide, evaluate


@pytest.mark.parametrize("region", [(-math.inf, 0.0), (0.0, math.inf), (-0.05, 0.05), (-math.inf, -0.1)])
@pytest.mark.parametrize("shift", [-0.3, -0.12, -0.05, 0.0, 0.02, 0.3])
@pytest.mark.parametrize("spread", [0.001, 0.02, 0.2])
def test_a_claim_is_decided_exactly_when_the_95_percent_interval_lies_inside_or_outside(
    region: tuple[float, float], shift: float, spread: float
) -> None:
    values = [shift - spread, shift + 0.3 * spread, shift + 0.9 * spread, shift]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    expected = "not distinguishable"
    if region[0] <= low and high <= region[1]:
        expected = "holds"
    elif high < region[0] or low > region[1]:
        expected = "does not hold"
    assert decide(values, region).verdict == expected


def test_the_p_value_of_a_direction_is_the_two_sided_paired_t_test() -> None:
    values = [-0.1, -0.02, 0.03, -0.05]
    assert decide(values, (-math.inf, 0.0)).p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue)


@pytest.mark.parametrize("expression", ["x", "1/0", "'a'", "1 +", "(1).real", "exp(1e9)", "max"])
def test_an_expression_holds_numbers_only(expression: str) -> None:
    with pytest.raises(InputError):
        evaluate(expression)
