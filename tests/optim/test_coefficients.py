"""Every coefficient set keeps what it promises, in exact arithmetic."""

import pytest
import torch

from muonlab.errors import InputError
from muonlab.optim.coefficients import COEFFICIENTS, resolve, with_safety

SETS = list(COEFFICIENTS)


def composite(steps, s):
    for a, b, c in steps:
        s = s * (a + s * s * (b + s * s * c))
    return s


@pytest.mark.parametrize("name", SETS)
def test_band_is_true_and_tight_on_a_fine_grid(name):
    entry = COEFFICIENTS[name]
    start, low, high = entry.band
    grid = torch.cat([torch.linspace(start, 1, 50_001), torch.logspace(torch.tensor(start).log10().item(), 0, 50_001)])
    image = composite(resolve(name).steps, grid.double())
    assert low <= image.min() < low + 3e-4
    assert high - 3e-4 < image.max() <= high


@pytest.mark.parametrize("name", SETS)
def test_slope_at_zero_is_the_derivative_of_the_composite_map(name):
    s = torch.tensor(1e-9, dtype=torch.float64)
    assert composite(resolve(name).steps, s) / s == pytest.approx(COEFFICIENTS[name].slope, rel=1e-3)


@pytest.mark.parametrize("name", SETS)
def test_singular_values_are_safe_up_to_the_stated_margin_and_not_much_further(name):
    entry = COEFFICIENTS[name]
    grid = torch.linspace(1e-3, 3, 300_001, dtype=torch.float64)
    image = composite(resolve(name).steps, grid)
    bad = (image <= 0) | (image > 10)
    inside = grid <= entry.safe_up_to
    assert not bad[inside].any()
    assert bad[(grid > entry.safe_up_to) & (grid < entry.safe_up_to + 2e-3)].any()


@pytest.mark.parametrize("name", SETS)
def test_iterating_on_diverges_above_the_stated_point_and_not_below_it(name):
    entry = COEFFICIENTS[name]
    steps = resolve(name).steps

    def limit(s):
        value = composite(steps, torch.tensor(s, dtype=torch.float64))
        return composite(steps[-1:] * 60, value).abs().item()

    assert limit(entry.diverges_above - 1e-4) < 10
    assert not limit(entry.diverges_above + 2e-3) < 10


def test_a_safety_factor_is_the_same_polynomial_on_a_smaller_argument():
    s = torch.linspace(0.01, 1.02, 1000, dtype=torch.float64)
    (step,) = with_safety([(8.0, -23.0, 17.0)], 1.05)
    torch.testing.assert_close(composite([step], s), composite([(8.0, -23.0, 17.0)], s / 1.05))
    assert resolve("polar_express@1.05").steps[0][0] == pytest.approx(8.28721201814563 / 1.05)
    assert resolve("polar_express@1").steps[0][0] == 8.28721201814563


def test_more_steps_never_silently_become_fewer():
    for steps in (1, 5, 6, 10):
        assert len(resolve("keller", steps).steps) == steps
        assert len(resolve("polar_express", steps).steps) == steps
    grid = torch.logspace(-2.5, 0, 1000, dtype=torch.float64)
    assert (composite(resolve("polar_express", 10).steps, grid) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("coefficients", "ns_steps", "words"),
    [
        ("kellr", None, "did you mean 'keller'"),
        ("you", 7, "exactly 5 steps"),
        ("keller@1.02", None, "takes no safety factor"),
        ("cans@fast", None, "not a number"),
        ("cans@0.5", None, "must lie in"),
        ((), None, "at least one step"),
        (((1.0, 2.0, 3.0, 4.0),), None, "(a, b, c)"),
        (((3.0, -4.0, 2.0),), 3, "leave ns_steps out"),
        ("keller", 0, "at least 1"),
    ],
)
def test_impossible_coefficients_are_refused_with_the_reason(coefficients, ns_steps, words):
    with pytest.raises(InputError) as error:
        resolve(coefficients, ns_steps)
    assert words in str(error.value)


def test_steps_of_ones_own_are_used_as_they_are():
    assert resolve((3.0, -3.2, 1.2)).steps == ((3.0, -3.2, 1.2),) * 5
    assert resolve((1.5, -0.5), 3).steps == ((1.5, -0.5, 0.0),) * 3
    assert resolve(((4.0, -6.0, 2.0), (1.5, -0.5))).steps == ((4.0, -6.0, 2.0), (1.5, -0.5, 0.0))


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from muonlab.optim import orthogonalize

    for name in ("keller", "cubic5", "aol4"):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(64, 256), name, dtype="float32")
        assert counter.get_total_flops() == COEFFICIENTS[name].flops(64, 256)
