"""How long the report of a large study takes and how big its page is: synthetic runs, everything that `muonlab report` writes.

    python benchmarks/report.py --json benchmarks/results/report.json

Runs differ by learning rate, momentum and seed; each has `--points` rows of training and `--evaluations` of each held-out split,
as a run directory on disk. Timed is the command `muonlab report FOLDER` in a process of its own, imports included: first without
the index that a study leaves beside its runs, then with it. Processor seconds leave out what other programs took. Takes a minute,
most of it to write the runs.
"""

import argparse
import json
import math
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_run(
    directory: Path, optimizer: str, values: dict[str, float], seed: int, points: int, evaluations: int
) -> None:
    """A finished run with a closed-form loss curve: config.toml, metrics.jsonl, metrics.json."""
    chance = random.Random(f"{optimizer}{values}{seed}")
    floor = (
        3.5 + 0.04 * math.log2(values["lr"] / 0.02) ** 2 + (0.1 if optimizer == "adamw" else 0) + chance.gauss(0, 0.01)
    )

    def loss(update: int) -> float:
        return floor + 4 * math.exp(-6 * update / points)

    train = [
        {
            "update": u,
            "tokens": 2048 * u,
            "seconds": 0.0512345 * u,
            "loss": loss(u) + chance.gauss(0, 0.05),
            "objective": loss(u) + chance.gauss(0, 0.05),
            "lr": dict.fromkeys(("hidden", "embedding", "head", "vector"), values["lr"] * (1 - u / (points + 1))),
            "grad_norm": 1 + chance.random(),
        }
        for u in range(1, points + 1)
    ]
    evals = [
        {
            "update": u,
            "tokens": 2048 * u,
            "seconds": 0.0512345 * u,
            "split": split,
            "cross_entropy": loss(u),
            "bits_per_byte": loss(u) / 1.9,
            "perplexity": math.exp(loss(u)),
            "accuracy": 0.3 * u / points,
        }
        for u in range(0, points + 1, max(1, points // evaluations))
        for split in ("tune", "report")
    ]
    routing = [
        {"name": f"blocks.{i}.w", "shape": [512, 512], "view": "[512, 512]", "rule": optimizer, "lr": values["lr"], "kind": "hidden"}
        for i in range(24)
    ]  # fmt: skip
    metrics = {
        "schema": 1, "run_id": directory.name, "name": directory.name, "status": "finished", "message": None, "seed": seed,
        "config": {"seed": seed, "optimizer": {"name": optimizer, **values}, "training": {"updates": points}, "model": {"d_model": 512}},
        "optimizer": optimizer, "routing": routing, "versions": {"muonlab": "0", "code": "0", "torch": "0"},
        "data": {"corpus": "synthetic", "checksum": "0", "vocab_size": 2048, "unigram_entropy": 6.3, "tokens": {}, "epochs": 0.5, "notices": []},
        "program": "eager", "program_notice": None, "device": "cpu", "threads": 1, "parameters": {"total": 1_000_000},
        "history": {"train": train, "eval": evals}, "updates": points, "tokens": 2048 * points,
        "seconds": {"training": 0.0512345 * points, "evaluation": 1.0, "other": 0.0, "wall": 0.06 * points},
        "updates_per_second": 19.5, "tokens_per_second": 40_000.0, "peak_memory_bytes": 400_000_000,
        "final": {row["split"]: row for row in evals}, "best": {"update": points, "cross_entropy": floor}, "updates_to_best": points,
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(f"# muonlab run {directory.name}\n")
    (directory / "metrics.json").write_text(json.dumps(metrics))


def write_plan(root: Path, runs: int, seeds: int, points: int, evaluations: int) -> None:
    """study.json and its runs: two optimizers x learning rates x five momenta x seeds, at least `runs` of them."""
    momenta = (0.8, 0.85, 0.9, 0.95, 0.98)
    rates = [round(0.0025 * 2 ** (i / 2), 6) for i in range(math.ceil(runs / (2 * len(momenta) * seeds)))]
    cells = []
    for optimizer in ("muon", "adamw"):
        for lr in rates:
            for momentum in momenta:
                name = f"{optimizer} lr={lr:g} momentum={momentum:g}"
                values = {"lr": lr, "momentum": momentum}
                planned = []
                for seed in range(1, seeds + 1):
                    directory = f"runs/{optimizer}-{lr:g}-{momentum:g}-s{seed}"
                    write_run(root / directory, optimizer, values, seed, points, evaluations)
                    planned.append({"seed": seed, "directory": directory})
                options = {f"optimizer.{key}": value for key, value in values.items()}
                cells.append({"cell": name, "group": optimizer, "case": optimizer, "values": values, "options": options, "published": None, "published_applies": False, "runs": planned})  # fmt: skip
    axes = [
        {"name": "lr", "fields": ["optimizer.lr"], "values": rates, "log": True},
        {"name": "momentum", "fields": ["optimizer.momentum"], "values": list(momenta), "log": False},
    ]
    plan = {
        "schema": 1, "kind": "study", "name": "large", "title": "A large study", "question": "How long does its report take?", "source": "synthetic",
        "notes": [], "version": None, "note": None, "scale": "full", "seeds": list(range(1, seeds + 1)), "reference": cells[-1]["cell"],
        "targets": [4.0], "identity": "0", "axes": axes, "cells": cells, "base": {"model": {"d_model": 512}}, "notices": [], "command": "synthetic",
    }  # fmt: skip
    (root / "study.json").write_text(json.dumps(plan))


def report(root: Path) -> tuple[float, float]:
    """Wall and processor seconds of `muonlab report`."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "muonlab.cli", "report", str(root)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--points", type=int, default=2000, help="rows of training in each run")
    parser.add_argument("--evaluations", type=int, default=100, help="evaluations of each split in each run")
    parser.add_argument("--keep", type=Path, default=None, help="folder to write the study to, and to leave it in")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    write_plan(root, arguments.runs, arguments.seeds, arguments.points, arguments.evaluations)
    first, again = report(root), report(root)
    found = {
        "runs": len(list((root / "runs").iterdir())),
        "points": arguments.points,
        "evaluations": arguments.evaluations,
        "run_bytes": sum(file.stat().st_size for file in root.rglob("metrics.json")),
        "first_seconds": first[0],
        "first_processor_seconds": first[1],
        "again_seconds": again[0],
        "again_processor_seconds": again[1],
        "html_bytes": (root / "report.html").stat().st_size,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for key, value in found.items():
        print(f"{key:24s} {value:.2f}" if isinstance(value, float) else f"{key:24s} {value}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.keep is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
