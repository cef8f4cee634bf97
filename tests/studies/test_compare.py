"""The protocol end to end on small real runs: what differs is found, what does not is not, budgets are equal."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from runs import TINY

from muonlab.errors import InputError
from muonlab.optim.registry import OPTIMIZERS
from muonlab.studies.compare import claimed, compare, delete_comparison, resolve_plan
from muonlab.studies.plan import labels, make_plan, notices
from muonlab.training import loop
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


def test_differences_below_the_minimum_effect_are_of_no_interest(muon_against_adamw):
    directory, summary = muon_against_adamw
    low, high = summary["verdicts"][0]["interval"]
    for effect in (0.0, max(abs(low), abs(high)) + 0.01):
        again = compare(replace(plan("muon", "adamw"), minimum_effect=effect), directory)
        word = again["verdicts"][0]["verdict"]
        assert again["verdicts"][0]["minimum_effect"] == effect
        assert (word == "not distinguishable") == (low <= effect and high >= -effect)
    with pytest.raises(InputError, match="must be 0 or more"):
        make_plan(["muon", "adamw"], BASE, minimum_effect=-1.0)


def test_the_noise_between_seeds_is_pooled_over_the_optimizers(muon_against_adamw):
    _, summary = muon_against_adamw
    losses = [
        [f["report_cross_entropy"] for f in summary["finals"] if f["optimizer"] == name] for name in ("muon", "adamw")
    ]
    variances = [statistics.variance(values) for values in losses]
    assert summary["noise"]["spread"] == pytest.approx(math.sqrt(sum(variances) / 2))
    assert summary["noise"]["degrees"] == 4


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


# --- what may be extended ----------------------------------------------------------------------------------------------


def test_the_identity_knows_what_a_comparison_is_about_and_not_how_much_of_it_was_made():
    first = plan("muon", "adamw")
    for more in ({"seeds": 5}, {"trials": 9}):
        assert plan("muon", "adamw", budget={**BUDGET, **more}).identity == first.identity
    others = [
        plan("muon", "adamw", budget={**BUDGET, "updates": 41}),
        plan("muon", "adamw", seed=7),
        plan("adamw", "muon"),
        make_plan(["muon", "adamw"], BASE, budget=BUDGET, centers={"muon": 0.1}),
        make_plan(["muon", "adamw"], BASE, budget=BUDGET, search="sobol"),
    ]
    assert len({first.identity, *(other.identity for other in others)}) == 6


def test_a_twins_seeds_are_the_same_however_many_there_are():
    few, many = (plan("muon", "muon", budget={**BUDGET, "seeds": n}) for n in (3, 5))
    assert many.seeds("muon#2")[:3] == few.seeds("muon#2")
    assert not set(many.seeds("muon")) & set(many.seeds("muon#2"))


def made(directory: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in directory.rglob("metrics.json")}


def test_more_seeds_and_more_trials_extend_a_comparison_and_repeat_no_run(tmp_path):
    directory, budget = tmp_path / "study", {"trials": 2, "seeds": 2, "updates": 30}
    first = compare(plan("muon", "adamw", budget=budget), directory, command="first")
    before = made(directory)
    second = compare(plan("muon", "adamw", budget={**budget, "seeds": 3}), directory, command="second")
    assert {path: made(directory)[path] for path in before} == before
    assert len(made(directory)) == len(before) + 2
    assert second["verdicts"][0]["differences"][:2] == first["verdicts"][0]["differences"]
    assert second["trials"] == first["trials"]
    assert second["command"] == "second"
    assert second["wall_seconds"] > first["wall_seconds"]
    before = made(directory)
    third = compare(plan("muon", "adamw", budget={**budget, "seeds": 3, "trials": 3}), directory)
    assert {path: made(directory)[path] for path in before} == before
    assert third["budget"]["spent"]["muon"]["trials"] == 3
    for name, chosen in third["chosen"].items():  # the choice was made again, over all trials
        losses = [t["tune_cross_entropy"] for t in third["trials"] if t["optimizer"] == name]
        assert losses[chosen["trial"]] == min(losses)
    # and the looks that were had are told, also when nothing is left to do
    again = compare(plan("muon", "adamw", budget={**budget, "seeds": 3, "trials": 3}), directory, command="again")
    for summary in (third, again):
        assert [(look["trials"], look["seeds"]) for look in summary["looks"]] == [(2, 2), (2, 3), (3, 3)]
        assert sum("extended after a verdict was seen" in flag for flag in summary["flags"]) == 1
    assert again["command"] == third["command"]
    assert not any("extended" in flag for flag in first["flags"])


def test_fewer_seeds_than_a_verdict_was_made_of_are_refused(muon_against_adamw):
    directory, _ = muon_against_adamw
    with pytest.raises(InputError, match="judged with 3 seeds; a comparison can be extended, not cut"):
        compare(plan("muon", "adamw", budget={**BUDGET, "seeds": 2}), directory)


# --- other searches, other optimizers ---------------------------------------------------------------------------------


def test_halving_judges_on_the_first_updates_of_the_run_of_full_length_and_counts_them_all(tmp_path):
    budget = {"trials": 3, "seeds": 2, "updates": 27}
    summary = compare(make_plan(["muon", "adamw"], BASE, budget=budget, search="halving"), tmp_path / "halving")
    rungs = [(rung["updates"], rung["trials"]) for rung in summary["budget"]["rungs"]]
    assert [updates for updates, _ in rungs] == [3, 9, 27]
    spent = summary["budget"]["spent"]
    assert spent["muon"]["updates"] == spent["adamw"]["updates"] == sum(a * b for a, b in rungs) <= 81
    assert {t["updates"] for t in summary["trials"]} == {27}
    assert {t["updates"] for t in summary["stopped_early"]} == {3, 9}
    assert len(summary["stopped_early"]) + len(summary["trials"]) == 2 * sum(count for _, count in rungs)
    chosen = summary["trials"][0]
    short = next(t for t in summary["stopped_early"] if t["updates"] == 9 and t["values"] == chosen["values"])

    def curve(trial):
        rows = json.loads((tmp_path / "halving" / trial["directory"] / "metrics.json").read_text())["history"]["train"]
        return [(row["loss"], row["lr"]) for row in rows]

    assert curve(short) == curve(chosen)[:9], "not the same run, stopped early"


def test_a_class_is_compared_by_its_import_path(tmp_path):
    small = plan("torch.optim.NAdam", "adamw", budget={"trials": 2, "seeds": 2, "updates": 20})
    (notice,) = notices(small)
    assert "begins at AdamW's 0.0025 (--lr-center torch.optim.NAdam=LR" in notice
    assert not notices(make_plan(["torch.optim.NAdam", "adamw"], BASE, centers={"torch.optim.NAdam": 0.001}))
    summary = compare(small, tmp_path / "nadam")
    assert summary["optimizers"] == ["torch.optim.NAdam", "adamw"]
    first = summary["trials"][0]
    config = json.loads((tmp_path / "nadam" / first["directory"] / "metrics.json").read_text())["config"]
    assert config["optimizer"]["class_path"] == "torch.optim.NAdam"
    assert config["optimizer"]["weight_decay"] == 0.0
    assert first["values"]["lr"] == pytest.approx(0.0025)
    assert summary["gate"]["passed"]["adamw"]


def test_an_optimizer_with_fewer_knobs_is_flagged(tmp_path):
    small = plan("torch.optim.Adagrad", "adamw", budget={"trials": 1, "seeds": 1, "updates": 2})
    flags = compare(small, tmp_path / "adagrad")["flags"]
    assert any(flag.startswith("torch.optim.Adagrad: has no momentum") for flag in flags)


def test_every_strategy_makes_a_comparison_of_real_runs(tmp_path):
    for name in ("grid", "sobol", "halton"):
        tiny = make_plan(["muon", "adamw"], BASE, budget={"trials": 2, "seeds": 1, "updates": 3}, search=name)
        summary = compare(tiny, tmp_path / name)
        assert summary["budget"]["search"] == name
        assert {n: spent["trials"] for n, spent in summary["budget"]["spent"].items()} == {"muon": 2, "adamw": 2}
        assert len(summary["budget"]["knobs"]["muon"]) == (1 if name == "grid" else 4)


def test_a_misspelt_search_is_refused_before_anything_is_made():
    with pytest.raises(InputError, match="did you mean 'halving'"):
        make_plan(["muon", "adamw"], BASE, search="halvin")


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

    monkeypatch.setattr(loop, "run", broken)
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
