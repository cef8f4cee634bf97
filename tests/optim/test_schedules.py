import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.optim import SCHEDULES, Schedule, applied_lr, set_lr, set_momentum
from muonlab.optim.schedules import momentum_warmup

DECAYING = [kind for kind in SCHEDULES if kind not in ("constant", "rising")]


def factors(updates=100, **options):
    schedule = Schedule(**options)
    return [schedule.factor(update, updates) for update in range(updates)]


@pytest.mark.parametrize("kind", DECAYING)
def test_the_factor_rises_to_the_peak_and_ends_at_the_final_fraction(kind):
    drawn = factors(kind=kind, warmup=0.1, final=0.1)
    assert drawn[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert drawn[10] == 1.0
    assert drawn[-1] == pytest.approx(0.1)
    assert drawn[10:] == sorted(drawn[10:], reverse=True)


def test_shapes_are_those_that_their_names_say():
    t = [update / 100 for update in range(101)]
    options = {"warmup": 0.0, "final": 0.2, "updates": 101}
    assert factors(kind="linear", **options) == pytest.approx([1 - 0.8 * x for x in t])
    assert factors(kind="cosine", **options) == pytest.approx([0.6 + 0.4 * math.cos(math.pi * x) for x in t])
    assert factors(kind="exponential", **options) == pytest.approx([0.2**x for x in t])
    assert factors(kind="constant", **options) == [1.0] * 101
    stages = [list(group) for _, group in itertools.groupby(factors(kind="step", stages=3, **options))]
    assert [stage[0] for stage in stages] == pytest.approx([1.0, 0.2**0.5, 0.2])
    assert [len(stage) for stage in stages] == [34, 33, 34]
    wsd = factors(kind="wsd", decay=0.2, **options)
    assert wsd[:81] == [1.0] * 81
    assert wsd[80:] == pytest.approx([1 - 0.8 * x / 20 for x in range(21)])


@given(
    kind=st.sampled_from(list(SCHEDULES)),
    updates=st.integers(1, 300),
    warmup=st.floats(0, 1),
    final=st.floats(0.01, 1),
)
def test_the_factor_is_a_fraction_whatever_the_length(kind, updates, warmup, final):
    drawn = factors(updates, kind=kind, warmup=warmup, final=final)
    assert all(0 < factor <= 1 + 1e-12 for factor in drawn)


def test_momentum_warms_up_linearly_in_updates():
    assert [momentum_warmup(u, 4, 0.85, 0.95) for u in range(6)] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = Muon(model)
    schedule = Schedule(momentum_warmup=4)
    seen = []
    for update in range(6):
        set_momentum(optimizer, schedule, update)
        seen += [group["momentum"] for group in optimizer.param_groups if group["rule"] == "muon"]
    assert seen == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])


def test_the_second_learning_rate_of_block_periods_follows_the_schedule():
    optimizer = Muon(nn.Linear(8, 8, bias=False), lr=1.0, block_size=4, block_period=2, block_lr=0.5)
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.2)
    assert applied_lr(optimizer) == {"hidden": 0.2}
    assert optimizer.param_groups[0]["block_lr"] == 0.1


def test_live_tensors_are_filled_and_remembered_at_their_first_value():
    lr = torch.tensor(0.5)
    optimizer = Muon(nn.Linear(8, 8), lr=lr)
    for factor in (0.5, 1.0, 0.25):
        set_lr(optimizer, factor)
        assert lr.item() == 0.5 * factor
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({"warmup": 1.5}, "schedule.warmup must lie in"),
        ({"final": -0.1}, "schedule.final must lie in"),
        ({"kind": "exponential", "final": 0.0}, "above 0"),
        ({"stages": 0}, "stages >= 1"),
    ],
)
def test_impossible_schedules_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Schedule(**options)


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0.9051), ("linear", 0.8105)])
def test_a_stretched_shape_is_cut_off_where_the_run_ends(kind, last):
    """Seed 001's clock: 500 "steps" were 125 updates; the lowest rate its logs hold is 0.9051 of the peak."""
    schedule = Schedule(kind=kind, warmup=0.05, final=0.1, stretch=4.0)
    rates = [schedule.factor(update, 125) for update in range(125)]
    assert rates == [replace(schedule, stretch=1.0).factor(update, 500) for update in range(125)]
    assert rates.index(1.0) == 24  # a warm-up of 25 updates: a fifth of the run, where 5 % were meant
    assert rates[-1] == pytest.approx(last, abs=2.5e-3)  # the logs are one update further


def test_a_range_test_multiplies_the_rate_by_the_same_ratio_at_every_update():
    """The nanochat guide's: 1e-8, then 1.01 times as much at each of 1,000 steps."""
    peak = 1e-8 * 1.01**999
    rates = [peak * factor for factor in factors(1000, kind="rising", warmup=0.0, final=1.01**-999)]
    assert rates[0] == pytest.approx(1e-8)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([1.01] * 999)


def test_live_learning_rates_follow_exactly_also_where_groups_share_a_tensor():
    shared, own = torch.tensor(0.5), torch.tensor(0.25)
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(params, (shared, shared, own))])
    for group, peak in zip(optimizer.param_groups, (0.5, 0.5, 0.25)):
        group["initial_lr"] = peak
    for factor in (0.3, 0.7):
        set_lr(optimizer, factor)
        assert shared == torch.tensor(0.5 * factor)
        assert own == torch.tensor(0.25 * factor)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"] is shared
