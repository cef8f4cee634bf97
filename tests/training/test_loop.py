"""One run: what it records is what happened, and a stop at any point costs nothing but time."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TINY, tiny, without_times

from muonlab.errors import InputError
from muonlab.training.config import run_id
from muonlab.training.loop import resolve, run
from muonlab.training.tracking import RunDirectory, read_run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tiny(), directory=tmp_path_factory.mktemp("whole") / "run")


def stop_after(update: int):
    made = {"updates": 0}

    def follow(row: dict) -> None:
        made["updates"] = row["update"]

    return {"on_event": follow, "should_stop": lambda: made["updates"] >= update}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["cosine", "constant", "linear", "exponential", "step", "wsd"])
def test_the_applied_learning_rate_is_the_schedule_drawn_before_also_across_a_resume(kind, accumulation, tmp_path):
    config = tiny(
        schedule={"kind": kind, "warmup": 0.25, "final": 0.2},
        training={"accumulation": accumulation, "micro_batch_size": 2, "eval_every": 8},
    )
    drawn = [config.optimizer.lr * config.schedule.factor(update, 8) for update in range(8)]
    assert run(config, directory=tmp_path / "run", **stop_after(3))["status"] == "interrupted"
    metrics = run(config, directory=tmp_path / "run")
    applied = [row["lr"]["hidden"] for row in metrics["history"]["train"]]
    assert applied == pytest.approx(drawn, rel=1e-12)
    assert metrics["tokens"] == 8 * accumulation * 2 * 32


def test_a_run_stopped_and_resumed_equals_one_that_was_not(uninterrupted, tmp_path):
    assert run(tiny(), directory=tmp_path / "run", **stop_after(3))["status"] == "interrupted"
    resumed = run(tiny(), directory=tmp_path / "run")
    assert resumed["status"] == "finished"
    assert without_times(resumed) == without_times(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"dropout": 0.1}, {"n_experts": 4, "top_k": 2, "router_noise": 0.1, "dropout": 0.1}])
def test_a_run_killed_in_mid_run_and_started_again_gives_bit_identical_metrics(model, tmp_path):
    config = tiny(model=model, training={"updates": 30, "eval_every": 10, "checkpoint_every": 4})
    whole = run(config, directory=tmp_path / "whole")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code = (
        "import json,sys\nfrom muonlab.training.config import from_dict\nfrom muonlab.training.loop import run\n"
        f"run(from_dict(json.load(open({str(tmp_path / 'config.json')!r}))), directory={str(tmp_path / 'killed')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    rows = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (rows.exists() and rows.read_text().count('"train"') >= 10):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = run(config, directory=tmp_path / "killed")
    assert without_times(again) == without_times(whole)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_the_same_run_twice_gives_the_same_numbers_and_another_seed_others(uninterrupted, tmp_path):
    assert without_times(run(tiny(), directory=tmp_path / "a")) == without_times(uninterrupted)
    other = run(tiny(seed=2), directory=tmp_path / "b")
    assert other["final"]["tune"]["cross_entropy"] != uninterrupted["final"]["tune"]["cross_entropy"]


def test_a_finished_run_is_found_finished_and_not_trained_again(tmp_path):
    rows = []
    first = run(tiny(), tmp_path)
    again = run(tiny(), tmp_path, on_event=rows.append)
    assert rows == []
    assert again["history"] == first["history"]
    assert again["directory"] == first["directory"]


def test_the_loss_falls_below_the_unigram_entropy(tmp_path):
    config = tiny(training={"updates": 60, "micro_batch_size": 16, "eval_every": 60})
    metrics = run(config, directory=tmp_path / "run")
    assert metrics["final"]["tune"]["cross_entropy"] < metrics["data"]["unigram_entropy"]


def test_the_initial_loss_is_that_of_logits_that_know_nothing(uninterrupted):
    first = uninterrupted["history"]["eval"][0]
    assert first["update"] == 0
    # an untied head of spread 1/sqrt(3 d) on states of norm sqrt(d): logits of variance 1/3, which cost half of it
    assert first["cross_entropy"] == pytest.approx(math.log(uninterrupted["data"]["vocab_size"]) + 1 / 6, abs=0.1)


def test_bits_per_byte_of_raw_bytes_is_cross_entropy_over_ln_2_by_the_bytes_of_a_token(uninterrupted):
    row = uninterrupted["final"]["tune"]
    per_token = uninterrupted["data"]["bytes_per_token"]["tune"]
    assert row["bits_per_byte"] == pytest.approx(row["cross_entropy"] / math.log(2) / per_token)
    assert row["perplexity"] == pytest.approx(math.exp(row["cross_entropy"]))


def test_accumulating_four_micro_batches_makes_the_same_update_as_one_batch(tmp_path):
    # SGD: an update linear in the gradient does not amplify the rounding of another order of summation
    linear = {"optimizer": {"name": "sgd", "lr": 0.1}}
    one = run(tiny(**linear, training={"micro_batch_size": 8}), directory=tmp_path / "one")
    four = run(tiny(**linear, training={"micro_batch_size": 2, "accumulation": 4}), directory=tmp_path / "four")
    losses = [[row["loss"] for row in metrics["history"]["train"]] for metrics in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 8
    assert losses[0][0] - losses[0][-1] > 0.01, "the updates did something"


def test_a_run_whose_loss_is_not_finite_ends_as_diverged_with_the_reason(tmp_path):
    metrics = run(tiny(optimizer={"name": "sgd", "lr": 1e20}, training={"clip_norm": 0.0}), directory=tmp_path / "run")
    assert metrics["status"] == "diverged"
    assert "update" in metrics["message"]
    assert metrics["updates"] < 8
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "diverged"
    assert read_run(tmp_path / "run")["status"] == "diverged"


def test_a_loss_above_the_bound_ends_the_run_as_diverged(tmp_path):
    metrics = run(tiny(training={"divergence_bound": 1.0}), directory=tmp_path / "run")
    assert metrics["status"] == "diverged"
    assert metrics["updates"] == 1


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(tmp_path):
    options = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    config = tiny(
        optimizer=options,
        schedule={"kind": "constant", "warmup": 0.0},
        training={"updates": 1, "clip_norm": 1e-3, "eval_every": 1},
    )
    metrics = run(config, directory=tmp_path / "run")
    row = metrics["history"]["train"][0]
    assert row["grad_norm"] > 1e-2
    before, after = (e["cross_entropy"] for e in metrics["history"]["eval"])
    assert abs(before - after) < 1e-3 * row["grad_norm"] * 2  # a step of length 1e-3 along the gradient


@pytest.mark.parametrize(
    ("loss", "at_uniform"),
    [
        ({"label_smoothing": 0.1}, lambda ce: ce),
        ({"focal_gamma": 2.0}, lambda ce: (1 - math.exp(-ce)) ** 2 * ce),
        ({"z_loss": 0.1}, lambda ce: ce + 0.1 * ce**2),
    ],
)
def test_the_objective_differs_from_the_reported_loss_as_its_formula_says(loss, at_uniform, tmp_path):
    metrics = run(tiny(loss=loss, training={"updates": 1, "eval_every": 1}), directory=tmp_path / "run")
    row = metrics["history"]["train"][0]
    assert row["objective"] == pytest.approx(at_uniform(row["loss"]), rel=0.03)


def test_sophia_gets_its_curvature_from_the_loop_at_its_own_pace_and_learns(tmp_path):
    from muonlab.optim.rivals import SophiaG

    estimated = []
    original = SophiaG.update_curvature

    def counted(self, closure, tokens):
        original(self, closure, tokens)
        estimated.append((tokens, max(s["hessian"].max().item() for s in self.state.values())))

    SophiaG.update_curvature = counted
    try:
        options = {"name": "sophia", "lr": 3e-3, "curvature_every": 3}
        training = {"updates": 8, "micro_batch_size": 2, "accumulation": 2}
        metrics = run(tiny(optimizer=options, training=training), directory=tmp_path / "run")
    finally:
        SophiaG.update_curvature = original
    assert [tokens for tokens, _ in estimated] == [4 * 32] * 3  # updates 0, 3 and 6, all micro-batches
    assert all(largest > 0 for _, largest in estimated)
    first, last = metrics["history"]["eval"][0], metrics["final"]["tune"]
    assert last["cross_entropy"] < first["cross_entropy"] - 0.2


def test_metrics_hold_everything_that_determined_the_run(uninterrupted):
    assert {"config", "routing", "versions", "seed", "data", "history", "program", "device", "threads"} <= set(
        uninterrupted
    )
    assert {"code", "torch", "python", "commit"} <= set(uninterrupted["versions"])
    assert uninterrupted["data"]["checksum"]
    assert sum(math.prod(row["shape"]) for row in uninterrupted["routing"]) == uninterrupted["parameters"]["total"]
    assert uninterrupted["updates_to_best"] in (0, 4, 8)
    assert uninterrupted["peak_memory_bytes"] > 0


def test_the_run_id_depends_on_everything_but_the_name():
    config, dataset = resolve(tiny())
    identity = run_id(config, dataset.checksum)
    renamed, _ = resolve(tiny(name="other"))
    reseeded, _ = resolve(tiny(seed=7))
    assert run_id(renamed, dataset.checksum) == identity
    assert run_id(reseeded, dataset.checksum) != identity
    assert run_id(config, "other data") != identity


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_folder_with_another_run_is_refused_and_left_alone(uninterrupted):
    before = sorted(
        (p.name, p.stat().st_mtime_ns) for p in Path(uninterrupted["directory"]).iterdir() if p.name != "run.lock"
    )
    with pytest.raises(InputError, match="another run"):
        run(tiny(seed=3), directory=uninterrupted["directory"])
    after = sorted(
        (p.name, p.stat().st_mtime_ns) for p in Path(uninterrupted["directory"]).iterdir() if p.name != "run.lock"
    )
    assert before == after


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        run(tiny(), directory=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    config, dataset = resolve(tiny())
    code = (
        "import sys\nfrom pathlib import Path\nfrom muonlab.training.tracking import RunDirectory\n"
        f"files = RunDirectory(Path({str(tmp_path / 'run')!r}), {run_id(config, dataset.checksum)!r})\nprint('held', flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process"):
            run(tiny(), directory=tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    assert run(tiny(), directory=tmp_path / "run")["status"] == "finished"  # the lock died with its holder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"writable|make the run"):
        run(tiny(), directory=tmp_path / "run")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that takes no new folders")
def test_a_place_where_no_folder_can_be_made_is_one_line():
    with pytest.raises(InputError, match="cannot make the run directory /proc/run"):
        run(tiny(), directory="/proc/run")


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot make the run directory"):
        run(tiny(), directory=tmp_path / "run")


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(damage, tmp_path):
    run(tiny(), directory=tmp_path / "run", **stop_after(5))
    file = tmp_path / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000] if damage is None else damage)
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"checkpoint\.pt is damaged"):
        run(tiny(), directory=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows


def test_a_checkpoint_of_other_code_is_refused_unless_allowed(tmp_path, uninterrupted):
    import torch

    run(tiny(), directory=tmp_path / "run", **stop_after(3))
    file = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    torch.save({**state, "code": "0" * 12}, file)
    with pytest.raises(InputError, match="another version of the code"):
        run(tiny(), directory=tmp_path / "run")
    metrics = run(tiny(), directory=tmp_path / "run", allow_version_change=True)
    assert without_times(metrics) == without_times(uninterrupted)


def test_half_a_last_line_of_metrics_is_cut_off_on_resume(tmp_path, uninterrupted):
    run(tiny(), directory=tmp_path / "run", **stop_after(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "upd')
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    assert without_times(run(tiny(), directory=tmp_path / "run")) == without_times(uninterrupted)


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_afterwards(tmp_path, uninterrupted):
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, signal, sys, json\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from muonlab.training.config import from_dict\nfrom muonlab.training.loop import run\nfrom muonlab.errors import InputError\n"
        "config = from_dict(json.loads(sys.argv[1]))\n"
        "def limit(row):\n    if row['update'] == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "try: run(config, directory=sys.argv[2], on_event=limit)\n"
        "except InputError as error: print('one line:', error)\n"
    )
    result = subprocess.run(
        [sys.executable, script, json.dumps(TINY), tmp_path / "run"], capture_output=True, text=True
    )
    assert result.stdout.startswith("one line: cannot write"), result.stderr
    assert result.stdout.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.tmp")), "nothing half-written is left"
    assert without_times(run(tiny(), directory=tmp_path / "run")) == without_times(uninterrupted)


def test_opening_a_run_directory_locks_it_and_closing_frees_it(tmp_path):
    files = RunDirectory(tmp_path / "run", "a" * 12)
    files.close()
    RunDirectory(tmp_path / "run", "a" * 12).close()


@pytest.mark.slow
def test_the_compiled_program_gives_the_losses_of_the_eager_one(tmp_path):
    linear = {"optimizer": {"name": "sgd", "lr": 0.1}}
    eager = run(tiny(**linear), directory=tmp_path / "eager")
    compiled = run(tiny(**linear, training={"program": "compile"}), directory=tmp_path / "compiled")
    assert compiled["program"] == "compile"
    assert compiled["seconds"]["compilation"] > 0
    losses = [[row["loss"] for row in metrics["history"]["train"]] for metrics in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_captured_program_without_a_device_for_it_is_one_line(tmp_path):
    with pytest.raises(InputError, match="needs CUDA"):
        run(tiny(training={"program": "graph"}), directory=tmp_path / "run")
