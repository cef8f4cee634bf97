"""The protocol end to end on small real runs: what differs is found, what does not is not, budgets are equal."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from runs import TINY

from muonlab.errors import InputError
from muonlab.optim.registry import OPTIMIZERS
from muonlab.studies import executor
from muonlab.studies.compare import claimed, compare, delete_comparison, resolve_plan
from muonlab.studies.plan import labels, make_plan
from muonlab.training.config import merge
from muonlab.training.loop import run

BASE = {k: v for k, v in TINY.items() if k not in ("optimizer", "name")}
BASE["training"] = {k: v for k, v in TINY["training"].items() if k != "updates"}
BUDGET = {"trials": 3, "seeds": 3, "updates": 40}


def plan(*optimizers: str, budget: dict = BUDGET, **changes):
    return make_plan(optimizers, merge(BASE, changes), budget=budget)


@pytest.fixture(scope="module")
def muon_against_adamw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("comparison") / "muon-adamw"
    return directory, compare(plan("muon", "adamw"), directory)


def test_every_optimizer_gets_the_same_budget_and_it_is_counted(muon_against_adamw):
    _, summary = muon_against_adamw
    spent = summary["budget"]["spent"]
    assert spent["muon"]["trials"] == spent["adamw"]["trials"] == 3
    assert spent["muon"]["updates"] == spent["adamw"]["updates"] == 120
    assert [t["optimizer"] for t in summary["trials"]].count("muon") == 3
    assert [f["optimizer"] for f in summary["finals"]].count("adamw") == 3


def test_choices_are_made_on_the_tune_split_and_judged_on_the_report_split_with_fresh_seeds(muon_against_adamw):
    directory, summary = muon_against_adamw
    for trial in summary["trials"]:
        metrics = json.loads((directory / trial["directory"] / "metrics.json").read_text())
        assert set(metrics["final"]) == {"tune"}
        assert metrics["seed"] == 0
    for final in summary["finals"]:
        metrics = json.loads((directory / final["directory"] / "metrics.json").read_text())
        assert set(metrics["final"]) == {"report"}
        assert metrics["seed"] in (1, 2, 3)
        assert metrics["updates"] == 40
    for name, chosen in summary["chosen"].items():
        mine = [t for t in summary["trials"] if t["optimizer"] == name]
        assert mine[chosen["trial"]]["tune_cross_entropy"] == min(t["tune_cross_entropy"] for t in mine)


def test_the_verdict_is_that_of_the_paired_differences(muon_against_adamw):
    _, summary = muon_against_adamw
    (verdict,) = summary["verdicts"]
    loss = {(f["optimizer"], f["seed"]): f["report_cross_entropy"] for f in summary["finals"]}
    assert verdict["differences"] == pytest.approx([loss["muon", s] - loss["adamw", s] for s in (1, 2, 3)])
    low, high = verdict["interval"]
    expected = "better" if high < 0 else "worse" if low > 0 else "not distinguishable"
    assert verdict["verdict"] == expected
    assert verdict["sentence"].startswith(f"muon is {expected}")


def test_how_much_each_needed_to_reach_the_others_final_loss_is_said(muon_against_adamw):
    _, summary = muon_against_adamw
    rows = {(r["optimizer"], r["target"]): r for r in summary["to_target"]}
    assert set(rows) == {("muon", "adamw's final loss"), ("adamw", "muon's final loss")}
    reached = [row for row in rows.values() if row["updates"] not in (None, float("inf"))]
    assert reached, "at least the better one reaches the other's loss"
    assert all(0 < row["updates"] <= 40 for row in reached)


def test_a_finished_comparison_is_not_run_again(muon_against_adamw):
    directory, summary = muon_against_adamw
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("metrics.json")}
    again = compare(plan("muon", "adamw"), directory)
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("metrics.json")} == before
    assert again["verdicts"] == summary["verdicts"]
    assert again["trials"] == summary["trials"]


def test_the_same_comparison_elsewhere_gives_the_same_numbers_also_in_two_processes(muon_against_adamw, tmp_path):
    _, summary = muon_against_adamw
    again = compare(plan("muon", "adamw"), tmp_path / "again", workers=2)
    assert again["verdicts"] == summary["verdicts"]
    assert [t["tune_cross_entropy"] for t in again["trials"]] == [t["tune_cross_entropy"] for t in summary["trials"]]


def test_muon_against_itself_on_disjoint_seeds_is_not_distinguishable(tmp_path):
    summary = compare(plan("muon", "muon", budget={**BUDGET, "seeds": 8}), tmp_path / "twins")
    assert summary["optimizers"] == ["muon", "muon#2"]
    seeds = {name: {f["seed"] for f in summary["finals"] if f["optimizer"] == name} for name in summary["optimizers"]}
    assert not seeds["muon"] & seeds["muon#2"]
    (verdict,) = summary["verdicts"]
    assert verdict["verdict"] == "not distinguishable"
    assert verdict["detectable_effect"] > 0


@dataclass(frozen=True, kw_only=True)
class FrozenOptions(OPTIMIZERS["sgd"].options):
    """An optimizer that never moves: its learning rate is ignored."""


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> str:
    entry = OPTIMIZERS["sgd"]

    def build(model, options):
        optimizer = entry.build(model, entry.options(lr=options.lr, momentum=0.0))
        optimizer.step = lambda closure=None: None
        return optimizer

    monkeypatch.setitem(OPTIMIZERS, "frozen", replace(entry, name="frozen", options=FrozenOptions, build=build))
    return "frozen"


def test_an_optimizer_that_never_moves_is_worse(frozen, tmp_path):
    summary = compare(plan(frozen, "muon"), tmp_path / "frozen")
    assert summary["verdicts"][0]["verdict"] == "worse"
    assert summary["gate"]["passed"] == {"frozen": False, "muon": True}


def test_runs_that_did_not_get_below_the_unigram_entropy_get_no_verdict(tmp_path):
    summary = compare(plan("muon", "adamw", budget={"trials": 1, "seeds": 2, "updates": 1}), tmp_path / "short")
    (verdict,) = summary["verdicts"]
    assert verdict["verdict"] == "no verdict"
    assert "unigram entropy" in verdict["sentence"]


def test_a_range_whose_best_value_is_at_its_edge_is_flagged(tmp_path):
    short = make_plan(["muon", "adamw"], BASE, budget={"trials": 3, "seeds": 2, "updates": 20}, centers={"muon": 1e-5})
    summary = compare(short, tmp_path / "edge")
    assert summary["chosen"]["muon"]["edge"]
    assert any(
        flag.startswith("muon: the best learning rate of hidden matrices lies at the edge") for flag in summary["flags"]
    )


def test_one_run_that_diverges_never_stops_the_rest(tmp_path):
    wild = make_plan(
        ["sgd", "muon"],
        merge(BASE, {"training": {"clip_norm": 0.0}}),
        budget={"trials": 4, "seeds": 2, "updates": 40},
        centers={"sgd": 3e3},
    )
    summary = compare(wild, tmp_path / "wild")
    statuses = [t["status"] for t in summary["trials"] if t["optimizer"] == "sgd"]
    assert "diverged" in statuses
    assert len(statuses) == 4
    assert [f["status"] for f in summary["finals"] if f["optimizer"] == "muon"] == ["finished"] * 2
    assert summary["verdicts"][0]["verdict"] == "worse"
    assert any("every trial diverged" in flag for flag in summary["flags"])


def test_a_folder_with_another_comparison_is_refused(muon_against_adamw):
    directory, _ = muon_against_adamw
    with pytest.raises(InputError, match="another comparison"):
        compare(plan("muon", "lion"), directory)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no comparison"):
        compare(plan("muon", "adamw"), tmp_path)


def test_names_are_checked_and_twins_get_labels():
    assert labels(["muon", "adamw", "muon"]) == ["muon", "adamw", "muon#2"]
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        labels(["muon", "adamv"])
    with pytest.raises(InputError, match="two optimizers"):
        labels(["muon"])


@pytest.mark.slow
def test_a_comparison_killed_at_random_moments_loses_and_repeats_no_finished_run(tmp_path):
    import random
    import time

    script = tmp_path / "compare.py"
    script.write_text(
        "import json, sys\nfrom muonlab.studies.compare import compare\nfrom muonlab.studies.plan import make_plan\n"
        "compare(make_plan(['muon', 'adamw'], json.loads(sys.argv[1]), budget=json.loads(sys.argv[2])), sys.argv[3])\n"
    )
    budget = {"trials": 2, "seeds": 2, "updates": 60}
    whole = compare(plan("muon", "adamw", budget=budget), tmp_path / "whole")
    target, seen = tmp_path / "killed", {}
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, script, json.dumps(merge(BASE, {})), json.dumps(budget), target])
        time.sleep(4 + 3 * chance.random())
        process.kill()
        process.wait()
        done = {p: p.stat().st_mtime_ns for p in target.rglob("model.safetensors")}
        assert {p: done[p] for p in seen} == seen, "a finished run was made again"
        seen = done
    again = compare(plan("muon", "adamw", budget=budget), target)
    assert again["verdicts"] == whole["verdicts"]


# --- what is not the optimizer's doing --------------------------------------------------------------------------------


def test_a_second_process_on_the_same_comparison_is_refused(muon_against_adamw):
    directory, _ = muon_against_adamw
    with (
        claimed(directory, resolve_plan(plan("muon", "adamw"), progress=False)[0]),
        pytest.raises(InputError, match="another process"),
    ):
        compare(plan("muon", "adamw"), directory)


def test_a_run_that_could_not_be_carried_out_stops_the_study_without_a_verdict_and_can_go_on(tmp_path, monkeypatch):
    small = {"trials": 2, "seeds": 2, "updates": 4}
    made = []

    def broken(config, *, directory, **options):
        made.append(directory)
        if len(made) == 2:
            raise OSError("no space left")
        return run(config, directory=directory, **options)

    monkeypatch.setattr(executor, "run", broken)
    with pytest.raises(InputError, match=r"1 runs could not be carried out .*no space left"):
        compare(plan("muon", "adamw", budget=small), tmp_path / "study")
    assert len(made) == 4, "the other trials were made all the same"
    assert not (tmp_path / "study" / "comparison_summary.json").exists()
    monkeypatch.undo()
    assert len(compare(plan("muon", "adamw", budget=small), tmp_path / "study")["trials"]) == 4


def test_a_worker_that_is_killed_costs_one_more_try_and_nothing_else(tmp_path):
    import multiprocessing
    import os
    import signal
    import threading
    import time

    killed: list[int] = []

    def kill_a_worker():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((tmp_path / "study").glob("runs/*/metrics.jsonl")):
            time.sleep(0.02)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(worker.pid)

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    summary = compare(
        plan("muon", "adamw", budget={"trials": 1, "seeds": 2, "updates": 150}), tmp_path / "study", workers=1
    )
    thread.join()
    assert len(killed) == 1
    assert [f["status"] for f in summary["finals"]] == ["finished"] * 4


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_plan_is_one_line(content, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "plan.json").write_text(content)
    with pytest.raises(InputError, match="not the plan of a comparison"):
        compare(plan("muon", "adamw"), tmp_path / "study")


def test_deleting_a_comparison_leaves_what_it_did_not_write(tmp_path):
    small = {"trials": 1, "seeds": 1, "updates": 2}
    compare(plan("muon", "adamw", budget=small), tmp_path / "study")
    (tmp_path / "study" / "thesis.tex").write_text("precious")
    delete_comparison(tmp_path / "study")
    assert {p.name for p in (tmp_path / "study").iterdir()} <= {"thesis.tex", "compare.lock"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plan.json").write_text('{"my": "plan"}')
    with pytest.raises(InputError, match="not the plan of a comparison"):
        delete_comparison(tmp_path / "mine")


def test_another_first_seed_moves_trials_and_finals_alike():
    first, second = plan("muon", "adamw"), plan("muon", "adamw", seed=7)
    assert (first.tuning_seed, first.seeds("muon")) == (0, [1, 2, 3])
    assert (second.tuning_seed, second.seeds("muon")) == (6, [7, 8, 9])
    with pytest.raises(InputError, match="at least 1"):
        plan("muon", "adamw", seed=0)


def test_what_a_user_says_wins_over_the_profile():
    quick = make_plan(["muon", "adamw"], {"training": {"micro_batch_size": 16}}, profile="quick")
    assert quick.base.training.micro_batch_size == 16
    assert make_plan(["muon", "adamw"], {}, profile="quick").base.training.micro_batch_size == 8


def test_a_centre_for_an_optimizer_that_does_not_take_part_is_refused():
    with pytest.raises(InputError, match="did you mean 'muon'"):
        make_plan(["muon", "adamw"], BASE, centers={"moun": 0.1})
    with pytest.raises(InputError, match="above 0"):
        make_plan(["muon", "adamw"], BASE, centers={"muon": float("nan")})
