"""The command line as a user meets it: what it prints, what it returns, and one line for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.no_compiler import no_compiler

from muonlab.cli import main

TINY = [
    "--model.d-model", "32", "--model.n-layers", "2", "--model.n-heads", "2", "--model.d-ff", "64", "--seq-len", "32",
    "--corpus", "pydoc", "--data.tokenizer", "bytes", "--batch-size", "4", "--training.eval-tokens", "512",
    "--training.threads", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*arguments: str, capsys) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_training_prints_the_run_directory_and_a_command_that_finds_it_again(capsys, tmp_path):
    code, out, _ = call("train", "--optimizer", "muon", "--lr", "0.02", "--updates", "4", *TINY, capsys=capsys)
    assert code == 0
    directory = Path(next(line for line in out.splitlines() if line.startswith("run: ")).removeprefix("run: "))
    assert {"config.toml", "metrics.json", "metrics.jsonl", "metrics_plot.png", "model.safetensors"} <= {
        p.name for p in directory.iterdir()
    }
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["config"]["optimizer"]["lr"] == 0.02
    assert metrics["updates"] == 4
    again = next(line for line in out.splitlines() if line.startswith("resume")).split("muonlab ", 1)[1].split()
    before = (directory / "metrics.jsonl").stat().st_mtime_ns
    assert call(*again, capsys=capsys)[0] == 0
    assert (directory / "metrics.jsonl").stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_a_comparison_ends_with_a_verdict_and_its_files(capsys):
    code, out, _ = call(
        "compare",
        "muon",
        "adamw",
        "--trials",
        "2",
        "--seeds",
        "2",
        "--updates",
        "30",
        "--workers",
        "0",
        *TINY,
        capsys=capsys,
    )
    assert code == 0
    (directory,) = Path("runs").glob("compare-muon-adamw-*")
    summary = json.loads((directory / "comparison_summary.json").read_text())
    assert {"comparison_summary.json", "comparison_plot.png", "report.html", "plan.json"} <= {
        p.name for p in directory.iterdir()
    }
    assert summary["verdicts"][0]["verdict"] in ("better", "worse", "not distinguishable")
    assert summary["verdicts"][0]["verdict"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "mikro"], "unknown model 'mikro'; did you mean 'micro'"),
        (["train", "--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'"),
        (["train", "--corpus", "enwik9"], "enwik8"),
        (["train", "--optimizer.momentun", "0.9"], "did you mean '--optimizer.momentum'"),
        (["train", "--lr", "-1"], "lr"),
        (["train", "--lr", "fast"], "fast"),
        (["train", "--updates", "many"], "--training.updates: invalid literal for int() with base 10: 'many'"),
        (["train", "--program", "grpah"], "invalid choice 'grpah' for argument '--training.program'. Expected one of ('auto',"),
        (["train", "--seed", "-1"], "seed Input should be greater than or equal to 0"),
        (["bench", "step", "--models", "micro"], "bench step has no --models; it has --sets, --peers, --repeats"),
        (["bench", "all", "--sets", "tiny"], "bench all has no --sets"),
        (["train", "--model.n-experts", "4", "--model.top-k", "5"], "top_k"),
        (["train", "--model.d-model", "100", "--model.n-heads", "3"], "n_heads"),
        (["train", "--corpus", "missing.txt"], "missing.txt"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["compare", "muon"], "two optimizers"),
        (["compare", "muon", "adamv"], "did you mean 'adamw'"),
        (["compare", "muon", "adamw", "--trials", "0"], "at least one trial"),
        (["compare", "muon", "adamw", "--lr-center", "muon"], "NAME=LR"),
        (["compare", "muon", "adamw", "--lr-center", "moun=0.1"], "did you mean 'muon'"),
        (["compare", "muon", "adamw", "--workers", "-1", *TINY], "workers"),
        (["compare", "muon", "class"], "import path"),
        (["compare", "muon", "adamw", "--training.eval-splits", "report"], "eval_splits"),
        (["train", "--training.device", "meta"], "known: auto, cpu"),
        (["train", "--training.threads", "-1"], "threads"),
        (["train", "--seed", "99999999999999999999999"], "seed"),
        (["train", "--training.clip-norm", "nan"], "clip_norm"),
        (["train", "--updates", "2", "run.toml"], "names come before flags"),
        (["compare", "muon", "adamw", "--optimizer.lr", "0.1"], "muonlab train"),
        (["list", "optimisers"], "did you mean 'optimizers'"),
        (["report", "nowhere"], "nowhere"),
        (["runs", "delete", "nowhere"], "nowhere"),
        (["runs", "delete"], "name the runs"),
        (["trian"], "invalid choice"),
        (["doctor", "--now"], "unknown argument '--now'"),
        (["data", "prepare", "nobody/nothing"], "nobody/nothing"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing_behind(arguments, message, capsys, tmp_path):
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_that_fell_back_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    code, out, _ = call("train", "--updates", "2", "--program", "compile", *TINY, capsys=capsys)
    assert code == 0
    assert out.splitlines().count("torch.compile failed (no compiler here); operations run one by one") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\xff\xfe\x00bad", "UTF-8"), (b"Too short.\n\nStill.\n\nReally.\n", "use more documents")],
)
def test_a_corpus_file_that_cannot_be_used_is_one_line(content, message, capsys, tmp_path):
    (tmp_path / "corpus.txt").write_bytes(content)
    arguments = [*TINY]
    arguments[arguments.index("pydoc")] = "corpus.txt"
    code, _, err = call("train", *arguments, capsys=capsys)
    assert code == 2
    (complaint,) = [line for line in err.splitlines() if line.startswith("muonlab:")]
    assert message.lower() in complaint.lower()
    assert err.rstrip().endswith(complaint)


def test_a_corpus_shorter_than_one_window_is_one_line(capsys, tmp_path):
    arguments = [*TINY]
    arguments[arguments.index("--seq-len") + 1] = "100000"
    code, _, err = call("train", *arguments, capsys=capsys)
    assert code == 2
    assert "shorter than one window" in err
    assert not list(tmp_path.glob("runs/*"))


def test_ctrl_c_stops_cleanly_with_130_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "muonlab.cli", "train", "--updates", "2000", "-o", "run", *TINY]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (rows.exists() and rows.read_text().count('"train"') >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "interrupted"
    made = metrics["updates"]
    assert 5 <= made < 2000
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while time.monotonic() < deadline and rows.read_text().count('"train"') < made + 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    updates = [json.loads(line)["update"] for line in rows.read_text().splitlines() if '"train"' in line]
    assert updates == list(range(1, len(updates) + 1)), "no update is repeated or lost"
    assert len(updates) > made


def test_ctrl_c_in_a_comparison_stops_its_workers_and_exits_with_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "muonlab.cli",
        "compare",
        "muon",
        "adamw",
        "--updates",
        "3000",
        "-o",
        "cmp",
        "--workers",
        "2",
        *TINY,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and len(list(tmp_path.glob("cmp/runs/*/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    statuses = [json.loads(p.read_text())["status"] for p in tmp_path.glob("cmp/runs/*/metrics.json")]
    assert statuses
    assert set(statuses) == {"interrupted"}


def test_a_dry_run_estimates_the_time_and_writes_nothing(capsys, tmp_path):
    code, out, _ = call("compare", "muon", "adamw", "--quick", "--dry-run", *TINY, capsys=capsys)
    assert code == 0
    assert "16 runs, 100 updates" in out
    assert "about" in out
    assert call("train", "--dry-run", *TINY, capsys=capsys)[0] == 0
    assert not list(tmp_path.iterdir())


def test_list_names_every_kind(capsys):
    code, out, _ = call("list", capsys=capsys)
    assert code == 0
    for word in ("muon", "adamw", "micro", "enwik8", "pydoc", "cosine", "focal", "halving", "wandb"):
        assert word in out


def test_inspect_prints_the_known_size_of_a_preset_its_routing_and_memory(capsys):
    code, out, _ = call("inspect", "--model", "moe-79m", capsys=capsys)
    assert code == 0
    assert "79,059,840" in out
    assert "36,592,512" in out
    for word in ("embedding", "router", "FLOPs per token", "gradients"):
        assert word in out


def test_doctor_says_what_is_here(capsys):
    code, out, _ = call("doctor", capsys=capsys)
    assert code == 0
    for word in ("torch", "device", "triton", "threads", "cache"):
        assert word in out


def test_runs_can_be_listed_compared_measured_and_deleted(capsys, tmp_path):
    for seed in ("1", "2"):
        call("train", "--seed", seed, "--updates", "2", *TINY, capsys=capsys)
    paths = [str(p) for p in sorted(Path("runs").iterdir())]
    _, out, _ = call("runs", "list", capsys=capsys)
    assert all(Path(p).name in out for p in paths)
    assert "seed" in call("runs", "diff", *paths, capsys=capsys)[1]
    assert "in all" in call("runs", "disk", capsys=capsys)[1]
    assert call("runs", "delete", paths[0], capsys=capsys)[0] == 0
    assert [str(p) for p in Path("runs").iterdir()] == paths[1:]


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "muonlab compare muon adamw --quick" in capsys.readouterr().out
