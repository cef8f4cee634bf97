"""The search spends its budget to the trial, finds the valley of a known loss, and goes on after a stop."""

import math

import pytest

from muonlab.errors import InputError
from muonlab.studies.search import AUXILIARY, STEP, Point, Search


def spend(search: Search, loss) -> list[Point]:
    """All points of a search whose trials end in the order they were asked."""
    points = []
    while asked := search.ask():
        for point in asked:
            search.tell(point, loss(point))
            points.append(point)
    return points


def valley(best_lr: float, best_auxiliary: float = 1.0):
    return lambda p: 3 + math.log(p.lr / best_lr) ** 2 + 0.1 * math.log(p.auxiliary / best_auxiliary) ** 2


@pytest.mark.parametrize("trials", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("best", [1e-4, 0.01, 0.3])
def test_exactly_the_budget_is_spent_wherever_the_best_lies(trials, best):
    assert len(spend(Search("muon", trials, center=0.01), valley(best))) == trials


def test_a_best_value_at_the_edge_widens_the_range_until_it_is_inside():
    search = Search("muon", 8, center=0.01)
    points = spend(search, valley(0.3))
    assert [p.stage for p in points].count("edge") >= 2
    assert not search.at_edge
    assert search.best.lr == pytest.approx(0.3, rel=STEP**0.5 - 1 + 0.1)


def test_a_best_value_still_at_the_edge_when_the_budget_is_spent_is_flagged():
    search = Search("muon", 4, center=0.01)
    spend(search, valley(100.0))
    assert search.at_edge


def test_embeddings_and_head_have_a_learning_rate_of_their_own_for_every_optimizer():
    for optimizer in ("muon", "adamw"):
        search = Search(optimizer, 5, center=0.01)
        points = spend(search, valley(0.01, best_auxiliary=9.0))
        assert search.best.auxiliary == pytest.approx(9.0)
        options = search.best.options(optimizer)
        assert options["embedding_lr"] == options["head_lr"] == pytest.approx(9 * options["lr"])
        assert {p.auxiliary for p in points} == {AUXILIARY, AUXILIARY / 3, AUXILIARY * 3}


def test_the_later_stages_move_weight_decay_and_momentum_within_their_ranges():
    points = [p for p in spend(Search("adamw", 24, center=0.01), valley(0.01)) if p.stage == "sobol"]
    assert len(points) > 8
    assert all(0.003 <= p.weight_decay <= 0.3 and 0.8 <= p.momentum <= 0.98 for p in points)
    assert len({p.momentum for p in points}) == len(points)
    assert points[0].options("adamw")["betas"][0] == points[0].momentum
    assert points[0].options("muon")["momentum"] == points[0].momentum


def test_diverged_trials_send_the_search_downwards_and_never_win():
    search = Search("muon", 6, center=1.0)
    points = spend(search, lambda p: math.nan if p.lr > 0.2 else p.lr)
    assert min(p.lr for p in points) < 0.2
    assert search.best.lr < 0.2


def test_a_search_in_which_everything_diverged_ends_at_the_gentlest_learning_rate_and_says_so():
    search = Search("muon", 5, center=1.0)
    points = spend(search, lambda p: math.inf)
    assert search.diverged
    assert search.best.lr == min(p.lr for p in points)


def test_the_order_in_which_trials_end_changes_nothing():
    forward, backward = Search("muon", 9, center=0.01), Search("muon", 9, center=0.01)
    loss = valley(0.04, 2.0)
    spend(forward, loss)
    while asked := backward.ask():
        for point in reversed(asked):
            backward.tell(point, loss(point))
    assert forward.asked == backward.asked
    assert forward.best == backward.best


def test_a_budget_of_no_trials_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        Search("muon", 0)
