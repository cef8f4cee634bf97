"""`muonlab study` as a user meets it, the seeds' own names and flags included."""

import json
import subprocess
import sys

import pytest
from tiny_study import written

from muonlab.cli import main
from muonlab.studies.format import library


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*arguments, capsys):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_study_runs_reports_and_has_nothing_to_do_the_second_time(capsys, tmp_path):
    file = written(tmp_path)
    code, out, _ = call("study", file, "--workers", 0, "-o", "results", "--quiet", capsys=capsys)
    assert code == 0
    assert {"study.json", "comparison_summary.json", "report.html", "comparison_plot.png"} <= {
        path.name for path in (tmp_path / "results").iterdir()
    }
    summary = json.loads((tmp_path / "results" / "comparison_summary.json").read_text())
    assert all(cell["cell"] in out for cell in summary["cells"])
    report = (tmp_path / "results" / "report.html").stat().st_mtime_ns
    code, out, _ = call("study", file, "--workers", 0, "-o", "results", "--quiet", capsys=capsys)
    assert code == 0
    assert "nothing had to be run" in out
    assert (tmp_path / "results" / "report.html").stat().st_mtime_ns == report
    assert call("report", "results", capsys=capsys)[0] == 0


def test_every_study_of_the_library_is_listed_with_its_cost(capsys):
    code, out, _ = call("study", "--list", capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == list(library())
    assert out.count("FLOPs") == len(library())


def test_the_experiments_of_seed_001_keep_their_names_and_flags(capsys):
    code, out, _ = call("study", "exp9", "--list", capsys=capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:7]] == [
        "muon_baseline", "adam_baseline", "adam_higher_lr", "adam_lower_lr", "muon_only", "muon_constant_lr",
        "adam_constant_lr",
    ]  # fmt: skip
    for flags, cells in (
        (["--quick"], ["muon_baseline", "adam_baseline"]),
        (["-e", "muon_baseline", "adam_higher_lr"], ["muon_baseline", "adam_higher_lr"]),
        (["--experiments", "adam_baseline"], ["adam_baseline"]),
    ):
        code, out, _ = call("study", "exp9", *flags, "--dry-run", "-o", "results", capsys=capsys)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()[:-1]] == cells
    assert call("study", "exp9", "--all", "--dry-run", "--output-dir", "x", capsys=capsys)[0] == 0


def test_a_dry_run_names_every_run_and_writes_nothing(capsys, tmp_path):
    file = written(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call("study", file, "--dry-run", "--seeds", 3, capsys=capsys)
    assert code == 0
    assert "12 runs" in out
    assert out.count("seeds 1, 2, 3") == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_typed_flags_change_every_run_of_a_study(capsys, tmp_path):
    file = written(tmp_path)
    assert (
        call("study", file, "--updates", 3, "--workers", 0, "-o", "out", "--quiet", "--seeds", 1, capsys=capsys)[0] == 0
    )
    metrics = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/*/metrics.json")]
    assert [run["updates"] for run in metrics] == [3] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study"], "name a study"),
        (["study", "exp99"], "did you mean 'exp9"),
        (["study", "exp9", "--scale", "micor"], "did you mean 'micro'"),
        (["study", "exp9", "--version", "as-publishd"], "did you mean 'as-published'"),
        (["study", "exp9", "-e", "muon_baselin"], "did you mean 'muon_baseline'"),
        (["study", "exp9", "--all", "--quick"], "--all runs every cell"),
        (["study", "exp9", "--training.update", "3"], "did you mean '--training.updates'"),
        (["study", "exp9", "--workers", "-1"], "--workers is -1"),
        (["study", "missing.toml"], "no configuration file at missing.toml"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    code, _, err = call(*arguments, capsys=capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_study_with_nothing_left_to_run_waits_for_neither_torch_nor_the_distributions_of_scipy(capsys, tmp_path):
    words = ["study", written(tmp_path), "-o", "out", "--seeds", "2", "--only", "adam", "*0.02", "--workers", "0"]
    assert call(*words, capsys=capsys)[0] == 0
    code = f"import sys; from muonlab.cli import main; main({words}); print([m for m in ('torch', 'scipy.stats') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "nothing had to be run" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_listing_and_dry_runs_do_not_wait_for_torch():
    code = "import sys; from muonlab.cli import main; main(['study', '--list']); main(['study', 'exp9', '--dry-run']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_three_lengths_of_training_give_a_data_speed_up_in_every_form_of_the_report(capsys, tmp_path):
    lengths = {"name": "updates", "field": "training.updates", "values": [4, 8, 16]}
    cases = [{"name": "muon"}, {"name": "adam", "optimizer": {"name": "adamw", "lr": 0.003}}]
    changed = {"axes": [lengths], "cases": cases, "seeds": 1, "reference": "adam updates=16", "published": None}
    file = written(tmp_path, **changed, versions=None, default=None, scales=None)
    code, out, _ = call("study", file, "--workers", 0, "-o", "results", "--quiet", capsys=capsys)
    assert code == 0
    folder = tmp_path / "results"
    summary = json.loads((folder / "comparison_summary.json").read_text())
    runs = {cell["cell"]: cell["runs"][0] for cell in summary["cells"]}
    assert [row["tokens"] for row in summary["data_speedup"]["rows"]] == [
        runs[f"muon updates={n}"]["tokens"] for n in (4, 8, 16)
    ]
    assert summary["data_speedup"]["group"] == "adamw"
    for row in summary["to_target"]:
        needed = row["tokens"]
        assert row["data_speedup"] == (needed and pytest.approx(runs["adam updates=16"]["tokens"] / needed))
    assert "data speed-up (D_eff/D, fitted)" in out
    assert "D<sub>eff</sub>/D" in (folder / "report.html").read_text()
    assert "tab:speedups" in (folder / "tables.tex").read_text()
    assert "DATA SPEED-UP" in (folder / "EXPERIMENT_CARD.txt").read_text()
