"""What the documents show works: every Python example runs, every change of code applies, every command exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muonlab.cli import parser
from muonlab.flags import ALIASES, known_flags
from muonlab.training.config import from_dict

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "docs/method.md", "docs/extending.md", "benchmarks/README.md", "CONTRIBUTING.md"]


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """Commands in code blocks and in code spans, without comments."""
    lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text_of(document), flags=re.MULTILINE | re.DOTALL))
    known = ("muonlab ", "make ", "python ")
    return [text.split("  #")[0].strip() for text in [*lines, *spans] if text.startswith(known)]


# --- Python examples --------------------------------------------------------------------------------------------------


def test_the_python_examples_of_the_readme_run_in_order(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "readme"}
    examples = blocks("README.md", "python")
    assert len(examples) >= 3
    for example in examples:
        if "Trainer(" in example:  # whose model and data are the reader's
            config = transformers.GPT2Config(
                vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
            )
            ids = torch.arange(16).repeat(64, 1)
            namespace |= {
                "model": transformers.GPT2LMHeadModel(config),
                "dataset": [{"input_ids": row, "labels": row} for row in ids],
            }
        exec(compile(example, "README.md", "exec"), namespace)
    assert float(re.findall(r"([\d.]+) nats per byte", capsys.readouterr().out)[0]) < 4.0  # of uniform bytes: 5.5
    trainer = namespace["trainer"]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]  # type: ignore[attr-defined]
    assert losses[-1] < losses[0]


DRIVER = """
import json, sys
namespace = {"__name__": "extending"}
for number, block in enumerate(json.load(sys.stdin)):
    namespace.pop("metrics", None)
    exec(compile(block, f"block {number}", "exec"), namespace)
    if "metrics" in namespace:
        metrics = namespace["metrics"]
        rows = metrics["history"]["train"]
        kept = {"status": metrics["status"], "config": metrics["config"], "rows": rows}
        print("RESULT " + json.dumps(kept))
print("OUTCOMES " + json.dumps(namespace["outcomes"]))
import muonlab.studies.compare  # the changed one
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Results of docs/extending.md on a copy of the package with its changes: the runs in order, and what the executor gave."""
    folder = tmp_path_factory.mktemp("extending")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for change in blocks("docs/extending.md", "diff"):
        done = subprocess.run(
            ["git", "apply", "-"], input=change, cwd=folder, capture_output=True, text=True, env={**os.environ, "GIT_DIR": "none"}
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    examples = []
    for block in blocks("docs/extending.md", "python"):
        file = re.match(r"# (src/\S+)\n", block)
        if file:
            (folder / file[1]).write_text(block, encoding="utf-8")
        else:
            examples.append(block)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(examples),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    outcomes = next(json.loads(line[9:]) for line in done.stdout.splitlines() if line.startswith("OUTCOMES "))
    return runs, outcomes


def test_each_extension_trains(extended):
    runs, _ = extended
    assert [
        (run["config"]["optimizer"]["name"], run["config"]["data"]["corpus"]) for run in runs[:3]
    ] == [("signum", "pydoc"), ("class", "pydoc"), ("muon", "sums")]  # fmt: skip
    assert runs[3]["config"]["model"]["activation"] == "mish"
    for run in runs:
        assert run["status"] == "finished"
        assert run["rows"][-1]["loss"] < run["rows"][0]["loss"]


def test_the_loss_of_the_extension_adds_a_share_of_one_minus_the_probability(extended):
    with_term, without = extended[0][4], extended[0][3]
    assert with_term["config"]["loss"]["poly"] == 1.0
    assert all(0 < row["objective"] - row["loss"] < 1 for row in with_term["rows"])
    assert all(row["objective"] == row["loss"] for row in without["rows"])


def test_the_schedule_of_the_extension_reaches_the_optimizer(extended):
    run = extended[0][5]
    peak, updates = run["config"]["optimizer"]["lr"], len(run["rows"])
    warmup = round(run["config"]["schedule"]["warmup"] * updates)
    for row in run["rows"][warmup:]:
        progress = (row["update"] - 1 - warmup) / (updates - 1 - warmup)
        assert row["lr"]["hidden"] == pytest.approx(peak * (1 - progress) ** 2, abs=1e-12)


def test_the_executor_of_the_extension_runs_its_job(extended):
    (outcome,) = extended[1]
    assert (outcome["status"], outcome["optimizer"], outcome["updates"]) == ("finished", "adamw", 20)


# --- commands, names and links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_is_shown_exists(document):
    flags = known_flags(from_dict({})) | set(ALIASES)
    targets = re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE)
    for command in commands(document):
        program, *words = shlex.split(command)
        if program == "muonlab" and "--help" not in words:
            options, rest = parser().parse_known_args(words)
            unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - flags
            assert options.takes_overrides or not rest, command
            assert not unknown, command
        elif program == "make":
            assert words[0] in targets, command
        elif program == "python" and words[0] == "-c":
            exec(compile(words[1], command, "exec"), {})
        elif program == "python":
            assert (ROOT / words[0]).exists(), command
            source = text_of(words[0])
            assert all(f'"{word}"' in source for word in words if word.startswith("-")), command


def test_the_commands_shown_are_found_at_all():
    assert {"make quick", "make test", "muonlab doctor"} <= set(commands("README.md"))


def test_every_python_call_in_the_table_of_commands_can_be_imported():
    calls = re.findall(r"`(muonlab(?:\.\w+)+)`", text_of("README.md"))
    assert len(calls) >= 5
    for call in calls:
        module, _, name = call.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), call


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(document)):
        if not target.startswith("http"):
            path = (ROOT / document).parent / target
            # pictures are drawn by the project's own runs, and may not be there yet
            assert path.exists() or (path.suffix == ".png" and not path.parent.exists()), target
