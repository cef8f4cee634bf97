"""Every search spends its budget to the trial, finds the valley of a known loss, and goes on after a stop."""

import json
import math
import subprocess
import sys

import pytest

from muonlab.errors import InputError
from muonlab.studies.search import STRATEGIES, Grid, Halving, Optuna, Rung, Search, Sobol, Staged, strategy
from muonlab.studies.space import AUXILIARY, KNOBS, STEP, Point, check_optimizer, knobs_of

UPDATES = 90


def new(name: str, trials: int, center: float = 0.01, optimizer: str = "muon") -> Search:
    if name == "optuna":
        pytest.importorskip("optuna")
    return strategy(name)(optimizer, trials, updates=UPDATES, center=center)


def spend(search: Search, loss, order=list) -> list[Point]:
    """All points of a search whose trials end in the order that `order` makes of a batch."""
    points = []
    while asked := search.ask():
        for point in order(asked):
            search.tell(point, loss(point))
        points += asked
    return points


def valley(best_lr: float, best_auxiliary: float = 1.0):
    return lambda p: 3 + math.log(p.lr / best_lr) ** 2 + 0.1 * math.log(p.auxiliary / best_auxiliary) ** 2


# --- what is true of every strategy


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("trials", [1, 2, 3, 5, 8, 16, 30])
def test_exactly_what_the_budget_allows_is_spent_wherever_the_best_lies(name, trials):
    for best in (1e-4, 0.01, 0.3):
        search = new(name, trials)
        points = spend(search, valley(best))
        lengths = [point.updates or UPDATES for point in points]
        assert {rung.updates: rung.trials for rung in search.rungs} == {n: lengths.count(n) for n in lengths}
        assert sum(lengths) <= trials * UPDATES
        assert len(set(points)) == len(points), "a trial was asked for twice"
        assert search.ask() == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_spent_depends_on_the_budget_and_not_on_the_losses_or_the_optimizer(name):
    spent = {
        tuple(sorted(point.updates or UPDATES for point in spend(new(name, 12, optimizer=optimizer), loss)))
        for optimizer in ("muon", "adamw", "sgd")
        for loss in (valley(0.01), valley(10.0), lambda point: math.inf)
    }
    assert len(spent) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stopped_search_that_is_told_its_finished_trials_again_goes_on_where_it_was(name):
    loss = valley(0.03, 2.0)
    whole = new(name, 12)
    points = spend(whole, loss)
    known = {point: loss(point) for point in points[:5]}
    again, made = new(name, 12), []

    def recall_or_train(point):
        if point not in known:
            made.append(point)
        return loss(point)

    assert spend(again, recall_or_train) == points
    assert made == points[5:]
    assert again.best == whole.best


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_in_which_trials_end_changes_nothing(name):
    loss = valley(0.04, 2.0)
    forward, backward = new(name, 12), new(name, 12)
    assert spend(forward, loss) == spend(backward, loss, lambda batch: batch[::-1])
    assert forward.best == backward.best


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_waits_until_all_it_asked_for_is_told(name):
    search = new(name, 12)
    first = search.ask()
    assert search.ask() == []
    for point in first[:-1]:
        search.tell(point, 3.0)
    assert (search.ask() == []) == (len(first) > 1)


@pytest.mark.parametrize("name", ["grid", "sobol", "halton", "halving", "optuna"])
def test_the_ranges_are_those_of_the_knobs_whatever_the_optimizer(name):
    for optimizer, center in (("muon", 0.01), ("lion", 1e-4)):
        for point in spend(new(name, 30, center, optimizer), valley(center)):
            assert 0.1 * center <= point.lr * (1 + 1e-9)
            assert point.lr <= 10 * center * (1 + 1e-9)
            for knob in ("auxiliary", "weight_decay", "momentum"):
                value = getattr(point, knob)
                assert value is None or KNOBS[knob].low * 0.999 <= value <= KNOBS[knob].high * 1.001


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_in_which_everything_diverged_ends_at_a_gentle_trial_of_full_length_and_says_so(name):
    search = new(name, 9)
    points = spend(search, lambda p: math.nan)
    assert search.diverged
    assert search.best.lr == min(p.lr for p in points if p.updates is None)


@pytest.mark.parametrize("name", STRATEGIES)
def test_diverged_trials_never_win(name):
    search = new(name, 12, center=1.0)
    spend(search, lambda p: math.inf if p.lr > 0.6 else p.lr)
    assert not search.diverged
    assert search.best.lr <= 0.6


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_loss_that_still_falls_at_the_end_of_the_range_is_flagged(name):
    search = new(name, 8)
    spend(search, valley(1e4))
    assert search.at_edge
    assert "lr" in search.edges


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_of_no_trials_is_refused(name):
    with pytest.raises(InputError, match="at least 1"):
        new(name, 0)


def test_a_misspelt_strategy_is_one_line_with_the_nearest():
    with pytest.raises(InputError, match="unknown search 'sobl'; did you mean 'sobol'"):
        strategy("sobl")
    assert all(entry.summary and "\n" not in entry.summary for entry in STRATEGIES.values())


# --- staged


def test_staged_widens_the_range_while_the_best_lies_at_its_edge():
    search = Staged("muon", 8, center=0.01)
    points = spend(search, valley(0.3))
    assert [p.stage for p in points].count("edge") >= 2
    assert not search.at_edge
    assert search.best.lr == pytest.approx(0.3, rel=STEP**0.5 - 1 + 0.1)


def test_embeddings_and_head_have_a_learning_rate_of_their_own_for_every_optimizer():
    for optimizer in ("muon", "adamw"):
        search = Staged(optimizer, 5, center=0.01)
        points = spend(search, valley(0.01, best_auxiliary=9.0))
        assert search.best.auxiliary == pytest.approx(9.0)
        options = search.best.options(optimizer)
        assert options["embedding_lr"] == options["head_lr"] == pytest.approx(9 * options["lr"])
        assert {p.auxiliary for p in points} == {AUXILIARY, AUXILIARY / 3, AUXILIARY * 3}


def test_the_last_stage_moves_all_knobs_around_the_best():
    search = Staged("adamw", 24, center=0.01)
    points = [p for p in spend(search, valley(0.01)) if p.stage == "sobol"]
    assert len(points) > 8
    assert all(0.003 <= p.weight_decay <= 0.3 and 0.8 <= p.momentum <= 0.98 for p in points)
    assert len({p.momentum for p in points}) == len(points)
    assert points[0].options("adamw")["betas"][0] == points[0].momentum
    assert points[0].options("muon")["momentum"] == points[0].momentum


def test_when_everything_diverges_staged_goes_down():
    points = spend(Staged("muon", 6, center=1.0), lambda p: math.nan if p.lr > 0.2 else p.lr)
    assert min(p.lr for p in points) < 0.2


@pytest.mark.parametrize("name", ["staged", "sobol", "halton"])
def test_more_trials_continue_the_same_search(name):
    few, many = (spend(new(name, trials), valley(0.02)) for trials in (5, 12))
    assert many[:5] == few


# --- grid


def test_a_grid_holds_every_combination_of_its_levels():
    points = spend(Grid("muon", 12, center=0.01), valley(0.01))
    assert len(points) == 12
    assert sorted({p.lr for p in points}) == pytest.approx(
        [1e-3, 10**-2.5 * 10 ** (1 / 6), 10**-1.5 / 10 ** (1 / 6), 0.1]
    )
    assert {round(p.auxiliary, 6) for p in points} == {1.0, 3.0, 9.0}
    assert {p.weight_decay for p in points} == {None}
    assert len({(p.lr, p.weight_decay) for p in spend(Grid("muon", 27, center=0.01), valley(0.01))}) == 9


def test_a_single_grid_point_is_the_centre_and_a_remainder_is_left_unspent():
    (point,) = spend(Grid("muon", 1, center=0.01), valley(0.01))
    assert point.lr == pytest.approx(0.01)
    assert Grid.spending(20, 400) == (Rung(400, 18),)


# --- successive halving


def test_halving_spends_a_third_of_the_budget_on_each_rung():
    rungs = Halving.spending(12, 400)
    assert [rung.updates for rung in rungs] == [45, 134, 400]
    costs = [rung.updates * rung.trials for rung in rungs]
    assert sum(costs) <= 4800
    assert all(cost == pytest.approx(1600, rel=0.1) for cost in costs)
    for trials in range(1, 40):
        rungs = Halving.spending(trials, 100)
        counts = [rung.trials for rung in rungs]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1
        assert sum(rung.updates * rung.trials for rung in rungs) <= trials * 100


def test_halving_sends_the_best_of_each_rung_on_and_chooses_among_those_of_full_length():
    search = Halving("muon", 12, updates=90, center=0.01)
    # longer runs are better, and a rung's order is kept
    points = spend(search, lambda p: valley(0.02)(p) - (p.updates or 90) / 1000)
    by_length = {n: [p for p in points if (p.updates or 90) == n] for n in (10, 30, 90)}
    for short, long in ((10, 30), (30, 90)):
        ranked = sorted(by_length[short], key=lambda p: search.losses[p])
        assert [p.lr for p in by_length[long]] == [p.lr for p in ranked[: len(by_length[long])]]
    assert search.best in by_length[90]


def test_a_short_run_that_looks_better_than_any_of_full_length_is_not_chosen():
    search = Halving("muon", 9, updates=90, center=0.01)
    spend(search, lambda p: 1.0 if p.updates else 3.0)
    assert search.best.updates is None


# --- Optuna


def test_optuna_begins_at_the_centre_and_finds_the_valley():
    pytest.importorskip("optuna")
    search = Optuna("muon", 30, center=0.01)
    points = spend(search, valley(0.03, 3.0))
    assert points[0].lr == pytest.approx(0.01)
    assert search.losses[search.best] < min(valley(0.03, 3.0)(p) for p in points[:10])


def test_optuna_asks_for_the_same_points_in_another_process():
    pytest.importorskip("optuna")
    script = (
        "import json\nfrom muonlab.studies.search import Optuna\ns = Optuna('muon', 9, center=0.01)\npoints = []\n"
        "while asked := s.ask():\n    points += [p.values for p in asked]\n    [s.tell(p, p.lr) for p in asked]\n"
        "print(json.dumps(points))"
    )
    there = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    )
    assert there == [point.values for point in spend(Optuna("muon", 9, center=0.01), lambda p: p.lr)]


def test_a_missing_optuna_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"needs Optuna; pip install 'muonlab\[optuna\]'"):
        Optuna("muon", 5)


# --- optimizers by import path


def test_a_class_has_the_knobs_of_its_constructor_and_its_own_defaults():
    assert knobs_of("torch.optim.NAdam") == list(KNOBS)
    assert knobs_of("torch.optim.Adagrad") == ["lr", "auxiliary", "weight_decay"]
    assert knobs_of("torch.optim.Rprop") == ["lr", "auxiliary"]
    nadam = Point("x", 0.1, momentum=0.8).options("torch.optim.NAdam")
    assert nadam["arguments"] == {"betas": [0.8, 0.999]}
    assert nadam["weight_decay"] == 0.0, "NAdam adds the decay to the gradient: the lab's 0.1 would be far too much"
    tuned = Point("x", 0.1, weight_decay=0.1).options("torch.optim.NAdam")
    assert tuned["arguments"] == {"decoupled_weight_decay": True}, "where decay is a knob, it is the same knob"
    assert Point("x", 0.1).options("torch.optim.AdamW")["weight_decay"] == 0.01
    assert Point("x", 0.1, momentum=0.8).options("torch.optim.SGD")["arguments"] == {"momentum": 0.8}
    assert all(p.momentum is None for p in spend(Sobol("torch.optim.Adagrad", 8), valley(0.01)))
    with pytest.raises(InputError, match="has no momentum"):
        spend(Grid("torch.optim.Adagrad", 81), valley(0.01))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("torch.optim.Nadam", "no attribute 'Nadam'"),
        ("no.such.thing", "No module named 'no'"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("torch..Adam", "no import path"),
        (".Adam", "no import path"),
        ("torch.optim.LBFGS", "refused its arguments"),
        ("nadam", "did you mean 'adamw'"),
        ("class", "import path in place of 'class'"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_line(name, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        check_optimizer(name)
    assert "\n" not in str(error.value)
