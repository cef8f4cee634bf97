"""What the machinery of studies costs beside training: python benchmarks/studies.py [--seconds 30] [-o FILE.json]

Five figures: overhead of the executor beside runs of that many seconds; time of `muonlab study --list` and `--dry-run`;
time to resume a study of 1,000 finished runs, with its index and without, and of the command that does so from the start of
Python to its end (where the device is to be found out, torch is loaded for that).
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tomli_w

from muonlab.studies.judge import PLAN
from muonlab.studies.run import plan_study, run_study
from muonlab.studies.study import read_study
from muonlab.training.tracking import RUN_HEADER, versions, without_none, write_json

MODEL = {"preset": "micro", "d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "seq_len": 64}
DATA = {"corpus": "pydoc", "tokenizer": "bytes"}


def study_file(folder: Path, name: str, training: dict[str, Any], cells: int, seeds: int) -> Path:
    """A study of `cells` learning rates x `seeds` on text that needs no network."""
    values = {
        "title": name,
        "question": "What does the machinery cost?",
        "seeds": seeds,
        "base": {"model": MODEL, "data": DATA, "training": {"threads": 1, "device": "cpu", **training}},
        "axes": [{"name": "lr", "field": "optimizer.lr", "log_range": [1e-4, 1e-1, cells]}],
    }
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(values))
    return path


def overhead(folder: Path, seconds: float) -> dict[str, float]:
    """Share of the wall time of two runs, each of about `seconds`, that is neither training nor evaluation of theirs."""
    probe = study_file(folder, "probe", {"updates": 200, "eval_every": 200, "eval_tokens": 4096}, 2, 1)
    directory = folder / "probe"
    run_study(plan_study(read_study(probe), directory, progress=False), directory)
    speed = statistics.median(
        json.loads(path.read_text())["updates_per_second"] for path in directory.glob("runs/*/metrics.json")
    )
    updates = max(200, round(seconds * speed))
    file = study_file(folder, "long", {"updates": updates, "eval_every": updates // 5, "eval_tokens": 4096}, 2, 1)
    start = time.perf_counter()
    planned = plan_study(read_study(file), folder / "long", progress=False)
    run_study(planned, folder / "long", on_progress=lambda states: None)
    wall = time.perf_counter() - start
    inside = [json.loads(p.read_text())["seconds"] for p in (folder / "long").glob("runs/*/metrics.json")]
    training = sum(run["training"] for run in inside)
    runs = sum(run["wall"] for run in inside)
    return {
        "runs": len(inside),
        "seconds_per_run": training / len(inside),
        "wall_seconds": wall,
        "share_beside_the_runs": (wall - runs) / wall,
        "share_beside_training": (wall - training - sum(run["evaluation"] for run in inside)) / wall,
    }


def resume(folder: Path, runs: int = 1000, points: int = 100) -> dict[str, float]:
    """Seconds to find that nothing is left to do in a study of `runs` finished runs, each with `points` updates."""
    one = study_file(folder, "one", {"updates": points, "eval_every": points // 5, "eval_tokens": 1024}, 2, 1)
    run_study(plan_study(read_study(one), folder / "one", progress=False), folder / "one")
    metrics = json.loads(next((folder / "one").glob("runs/*/metrics.json")).read_text())
    training = {"updates": points, "eval_every": points // 5, "eval_tokens": 1024}
    file = study_file(folder, "many", training, runs // 10, 10)
    directory = folder / "many"
    planned = plan_study(read_study(file), directory, progress=False)
    directory.mkdir()
    write_json(directory / PLAN, {**planned.values, "command": "", "failures": {}})
    for job in planned.jobs:
        job.directory.mkdir(parents=True)
        config = job.config.to_dict()
        values = {**metrics, "seed": job.config.seed, "name": job.config.name, "config": config}
        (job.directory / "metrics.json").write_text(json.dumps(values))
        (job.directory / "config.toml").write_text(f"{RUN_HEADER}0\n{tomli_w.dumps(without_none(config))}")
    times = {}
    for name in ("without_index", "with_index"):
        start = time.perf_counter()
        run_study(plan_study(read_study(file), directory, progress=False), directory)
        times[f"seconds_{name}"] = time.perf_counter() - start
    auto = folder / "auto" / file.name
    auto.parent.mkdir()
    auto.write_text(file.read_text().replace('device = "cpu"\n', ""))
    for name, source in {"the_command": file, "the_command_that_asks_for_the_device": auto}.items():
        words = ("study", str(source), "-o", str(directory), "--quiet", "--workers", "0")
        command(*words, repeats=1)  # draws the report where it is the first
        times[f"seconds_of_{name}"] = command(*words, repeats=3)
    return {"runs": runs, **times}


def command(*words: str, repeats: int = 5) -> float:
    """Median seconds of a muonlab command, the start of Python included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "muonlab.cli", *words], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the runs that overhead is measured on")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = {
                "versions": versions(),
                "overhead": overhead(folder, options.seconds),
                "resume": resume(folder),
                "seconds_of_list": command("study", "--list"),
                "seconds_of_dry_run": command("study", "exp9", "--dry-run"),
            }
    finally:
        shutil.rmtree(folder)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
