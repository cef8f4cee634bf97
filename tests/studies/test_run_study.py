"""A study loses no finished run and repeats none, whatever happens to it; its summary is that of its directories."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
from scipy import stats
from tiny_study import conduct_in_child, written

from muonlab.errors import InputError
from muonlab.studies.judge import judge
from muonlab.studies.leases import Lease
from muonlab.studies.run import changes, plan_study, run_study
from muonlab.studies.study import read_study


def conduct(file: str, directory: Path, **options) -> dict:
    return run_study(plan_study(read_study(file, **options), directory, progress=False), directory)


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """Which file each finished run's metrics are in: another if the run was made again."""
    found = {}
    for path in (directory / "runs").glob("*/metrics.json"):
        with contextlib.suppress(FileNotFoundError):
            if json.loads(path.read_text())["status"] == "finished":
                stat = path.stat()
                found[path.parent.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    folder = tmp_path_factory.mktemp("study")
    file = written(folder)
    return file, folder / "out", conduct(file, folder / "out")


def test_every_cell_runs_with_every_seed(tiny):
    _, directory, summary = tiny
    assert [[run["seed"] for run in cell["runs"]] for cell in summary["cells"]] == [[1, 2]] * 4
    assert all(run["status"] == "finished" for cell in summary["cells"] for run in cell["runs"])
    assert len(stamps(directory)) == 8
    assert summary["problems"] == summary["stale"] == []


def test_the_summary_is_the_statistics_of_the_run_directories(tiny):
    _, directory, summary = tiny
    final = {}
    for cell in summary["cells"]:
        metrics = [json.loads((directory / run["directory"] / "metrics.json").read_text()) for run in cell["runs"]]
        losses = [m["final"]["report"]["cross_entropy"] for m in metrics]
        final[cell["cell"]] = losses
        assert cell["mean"] == pytest.approx(statistics.fmean(losses))
        assert cell["sd"] == pytest.approx(statistics.stdev(losses))
        half = stats.t.ppf(0.975, 1) * statistics.stdev(losses) / math.sqrt(2)
        assert cell["interval"] == pytest.approx([cell["mean"] - half, cell["mean"] + half])
        for run, m in zip(cell["runs"], metrics, strict=True):
            report = [row["cross_entropy"] for row in m["history"]["eval"] if row["split"] == "report"]
            assert run["best_report_cross_entropy"] == min(report)
            assert run["tune_cross_entropy"] == m["final"]["tune"]["cross_entropy"]
    ranked = sorted(summary["cells"], key=lambda cell: cell["rank"])
    assert [cell["mean"] for cell in ranked] == sorted(cell["mean"] for cell in ranked)
    for contrast in summary["contrasts"]:
        expected = [a - b for a, b in zip(final[contrast["candidate"]], final["adam"], strict=True)]
        assert contrast["differences"] == pytest.approx(expected)
        assert contrast["p_value"] == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)
    p = sorted(contrast["p_value"] for contrast in summary["contrasts"])
    assert min(contrast["holm"] for contrast in summary["contrasts"]) == pytest.approx(min(1, 3 * p[0]))


def test_a_finished_study_has_nothing_to_do_and_says_the_same_again(tiny):
    file, directory, summary = tiny
    before = stamps(directory)
    assert conduct(file, directory) == summary
    assert stamps(directory) == before


def test_judging_again_from_the_directories_alone_gives_the_same(tiny, tmp_path):
    _, directory, summary = tiny
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "index.json").unlink()
    (tmp_path / "copy" / "comparison_summary.json").unlink()
    assert judge(tmp_path / "copy") == summary


def test_an_edited_study_runs_only_what_changed_and_says_so(tiny, tmp_path):
    file, directory, _ = tiny
    shutil.copytree(directory, tmp_path / "copy")
    before = stamps(tmp_path / "copy")
    text = Path(file).read_text().replace("0.08", "0.04")
    edited = tmp_path / "tiny.toml"
    edited.write_text(text)
    planned = plan_study(read_study(edited), tmp_path / "copy", progress=False)
    assert "2 runs are new, 2 of its last call are not asked for now" in changes(planned, tmp_path / "copy")
    summary = run_study(planned, tmp_path / "copy")
    after = stamps(tmp_path / "copy")
    assert {name: after[name] for name in before} == before
    assert sorted(name[:12] for name in set(after) - set(before)) == ["muon-lr-0.04", "muon-lr-0.04"]
    assert [name[5:17] for name in summary["stale"]] == ["muon-lr-0.08", "muon-lr-0.08"]


def test_a_damaged_run_is_named_and_made_again_when_it_is_deleted(tiny, tmp_path):
    file, directory, summary = tiny
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    broken, empty = (copy / run["directory"] for run in summary["cells"][0]["runs"])
    (broken / "metrics.json").write_text("{")
    (empty / "metrics.json").unlink()
    judged = judge(copy)
    told = {problem["directory"]: problem["message"] for problem in judged["problems"]}
    assert "damaged" in told[f"runs/{broken.name}"]
    assert "never reached a checkpoint" in told[f"runs/{empty.name}"]
    assert judged["cells"][0]["mean"] is None
    assert judged["cells"][1]["mean"] == summary["cells"][1]["mean"]
    shutil.rmtree(broken)
    again = conduct(file, copy)
    assert again["cells"][0]["mean"] == summary["cells"][0]["mean"]
    assert again["problems"] == []


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tiny, tmp_path):
    file, directory, summary = tiny
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    first = copy / summary["cells"][0]["runs"][0]["directory"]
    second = copy / summary["cells"][3]["runs"][1]["directory"]
    shutil.rmtree(second)
    shutil.rmtree(first)
    first.mkdir()
    (first / "stranger").write_text("not a run")
    judged = conduct(file, copy)
    assert [problem["directory"] for problem in judged["problems"]] == [f"runs/{first.name}"]
    assert judged["cells"][3]["finished"] == 2
    shutil.rmtree(first)
    assert conduct(file, copy)["problems"] == []


def test_a_diverged_run_is_the_outcome_of_its_cell_and_not_run_again(tmp_path):
    cases = [{"name": "hot", "optimizer": {"name": "sgd", "lr": 1e9}}, {"name": "adam", "optimizer": "adamw"}]
    file = written(tmp_path, cases=cases, axes=None, published=None, versions=None, default=None)
    summary = conduct(file, tmp_path / "out")
    hot = summary["cells"][0]
    assert [run["status"] for run in hot["runs"]] == ["diverged", "diverged"]
    assert hot["mean"] is None
    assert hot["rank"] is None
    assert summary["contrasts"][0]["verdict"] == "worse"
    assert any("hot: seed 1 diverged" in flag for flag in summary["flags"])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/metrics.json")}
    conduct(file, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_best_cells_are_chosen_by_the_first_seed_and_judged_by_the_others(tiny, tmp_path):
    file, directory, _ = tiny
    shutil.copytree(directory, tmp_path / "copy")
    summary = conduct(file, tmp_path / "copy", seeds=4)
    muon = [cell for cell in summary["cells"] if cell["group"] == "muon"]
    best = min(muon, key=lambda cell: cell["runs"][0]["tune_cross_entropy"])
    (contrast,) = summary["group_contrasts"]
    assert contrast["chosen"] == {"muon": best["cell"], "adamw": "adam"}
    ours, theirs = ([run["report_cross_entropy"] for run in cell["runs"][1:]] for cell in (best, summary["cells"][3]))
    assert contrast["differences"] == pytest.approx([a - b for a, b in zip(ours, theirs, strict=True)])
    assert contrast["seeds"] == [2, 3, 4]


@pytest.mark.parametrize("content", ["study", "other"])
def test_a_folder_of_something_else_is_left_alone(tiny, tmp_path, content):
    file, directory, _ = tiny
    if content == "study":
        target, options = directory, {"version": "as-published"}
    else:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "letter.txt").write_text("dear")
        target, options = tmp_path / "x", {}
    before = sorted(target.rglob("*"))
    with pytest.raises(InputError, match="choose another --output"):
        conduct(file, target, **options)
    assert sorted(target.rglob("*")) == before


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.BaseContext:
    """Processes that start in no time because their parent has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["muonlab.training.loop", "tiny_study"])
    return context


@pytest.mark.slow
def test_twenty_kills_lose_and_repeat_no_finished_run(tiny, tmp_path, forks):
    """Killed at random moments twenty times, then run to its end: a run that was finished once is the same file for
    ever, and the losses are those of a study that nothing happened to, bit for bit."""
    file, untouched, _ = tiny
    shutil.copytree(untouched, tmp_path / "whole")
    summary = conduct(file, tmp_path / "whole", seeds=10)
    directory = tmp_path / "killed"
    draw = random.Random(0)
    seen: dict[str, tuple[int, int]] = {}
    progress = []
    while len(progress) < 20:
        started = forks.Event()
        process = forks.Process(target=conduct_in_child, args=(file, str(directory), started, 10))
        process.start()
        assert started.wait(60)  # for the first update of a run
        more = len(seen) + draw.randint(0, 1)  # every other time one more run is let to its end
        while process.is_alive() and len(stamps(directory)) < more:
            time.sleep(0.005)
        process.join(draw.uniform(0.0, 0.05))
        assert process.is_alive(), "killed too late: the study has come to its end"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = stamps(directory)
        assert {name: now.get(name) for name in seen} == seen
        seen = now
        progress.append(len(seen))
    assert progress[0] < 5 <= progress[-1]  # the kills fell into the middle of the study
    final = conduct(file, directory, seeds=10)
    assert {name: stamps(directory)[name] for name in seen} == seen
    for ours, theirs in zip(final["cells"], summary["cells"], strict=True):
        assert [run["report_cross_entropy"] for run in ours["runs"]] == [
            run["report_cross_entropy"] for run in theirs["runs"]
        ]


def test_two_processes_share_a_study_and_make_each_run_once(tiny, tmp_path, forks):
    file, _, summary = tiny
    directory = tmp_path / "shared"
    both = [forks.Process(target=conduct_in_child, args=(file, str(directory))) for _ in range(2)]
    for process in both:
        process.start()
    seen: dict[str, tuple[int, int]] = {}
    while any(process.is_alive() for process in both):
        now = stamps(directory)
        assert {name: now[name] for name in seen} == seen
        seen = now
        time.sleep(0.05)
    assert [process.exitcode for process in both] == [0, 0]
    assert stamps(directory).keys() >= seen.keys()
    judged = judge(directory)
    assert [cell["mean"] for cell in judged["cells"]] == [cell["mean"] for cell in summary["cells"]]
    assert not list((directory / "runs").glob("*.lease*"))


def test_a_run_that_another_holds_is_waited_for(tiny, tmp_path, forks):
    file, directory, summary = tiny
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    missing = copy / summary["cells"][0]["runs"][0]["directory"]
    shutil.rmtree(missing)
    lease = Lease(missing.with_name(missing.name + ".lease"))
    assert lease.acquire()
    process = forks.Process(target=conduct_in_child, args=(file, str(copy)))
    process.start()
    process.join(3)
    assert process.is_alive()
    assert not missing.exists()
    lease.release()
    process.join(30)
    assert process.exitcode == 0
    assert missing.exists()
