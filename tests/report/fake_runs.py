"""Run directories, a comparison and studies in the documented format, drawn from a closed-form loss curve.

`python fake_runs.py DIRECTORY` writes a comparison to look at, `python fake_runs.py DIRECTORY grid` a study.
"""

import json
import math
import random
import sys
from pathlib import Path

from muonlab.studies import statistics
from muonlab.studies.judge import judge

BEST = {"muon": 0.02, "adamw": 0.003, "lion": 0.0005, "sgd": 0.3}
OFFSET = {"muon": 0.0, "adamw": 0.09, "lion": 0.13, "sgd": 0.9}
WIDTH = {"muon": 0.02, "adamw": 0.06, "lion": 0.09, "sgd": 0.05}  # nats lost one octave squared from the best


def final_loss(optimizer, lr):
    octaves = math.log2(lr / BEST.get(optimizer, 0.01))
    return 3.6 + OFFSET.get(optimizer, 0.05) + WIDTH.get(optimizer, 0.03) * octaves**2


def fake_run(directory, optimizer="muon", *, lr=0.02, seed=1, updates=100, status="finished", name=None, points=None,
             config=None, notices=(), code="abc123", epochs=0.4, message=None, extra=0.0, pace=0.11, memory=412_000_000):  # fmt: skip
    """Write config.toml, metrics.jsonl and metrics.json of one run and return the metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(f"{seed}")  # shared by the optimizers, as hard and easy seeds are
    shift = chance.gauss(0, 0.02) + random.Random(f"{optimizer}{seed}{lr}").gauss(0, 0.004)
    floor = final_loss(optimizer, lr) + extra + shift
    diverged_at = updates // 3 if status == "diverged" else updates + 1

    def curve(update):
        return (
            floor
            + (7.6 - floor) * math.exp(-6 * update / updates)
            - 0.25 * (1 - update / updates) * (update > 0)
            + 0.25 * (1 - update / updates)
        )

    train, evals = [], []
    for update in range(updates + 1):
        if update > diverged_at:
            break
        clock = {"update": update, "tokens": 2048 * update, "seconds": pace * update}
        value = curve(update) if update < diverged_at else None
        if update:
            schedule = min(1, update / 5) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * update / updates)))
            rates = {
                "hidden": lr * schedule,
                "embedding": 0.003 * schedule,
                "vector": lr * schedule,
                "head": 0.003 * schedule,
            }
            loss = None if value is None else value + chance.gauss(0, 0.06)
            train.append(
                {**clock, "loss": loss, "objective": loss, "lr": rates, "grad_norm": 1 + 3 * math.exp(-update / 9)}
            )
        if update % max(1, updates // (points or 10)) == 0 and value is not None:
            for split, extra in (("tune", 0.0), ("report", 0.01)):
                ce = value + extra
                evals.append(
                    {
                        **clock,
                        "split": split,
                        "cross_entropy": ce,
                        "bits_per_byte": ce / 2.7 / math.log(2),
                        "perplexity": math.exp(ce),
                        "accuracy": 0.35 * (1 - math.exp(-3 * update / updates)),
                    }
                )
    rows = [{"kind": "train", **row} for row in train] + [{"kind": "eval", **row} for row in evals]
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["update"]))
    )
    (directory / "config.toml").write_text(f"# muonlab run fake-{seed}\n")
    final = {row["split"]: row for row in evals}
    metrics = {
        "schema": 1, "run_id": f"fake{seed:04d}", "name": name or f"micro-{optimizer}", "optimizer": optimizer, "status": status,
        "message": message or ("loss nan at update 33 (bound 20 nats)" if status == "diverged" else None), "seed": seed,
        "config": config or {"seed": seed, "model": {"d_model": 128, "n_layers": 4}, "optimizer": {"name": optimizer, "lr": lr, "weight_decay": 0.1}, "schedule": {"kind": "cosine", "warmup": 0.05, "final": 0.1}, "training": {"updates": updates, "clip_norm": 1.0}},
        "routing": [
            {"name": "blocks.0.attention.qkv.weight", "shape": [384, 128], "view": "3 x [128, 128]", "rule": "muon" if optimizer == "muon" else optimizer, "lr": lr, "weight_decay": 0.1, "scale": 1.0, "kind": "hidden"},
            {"name": "embedding.weight", "shape": [2048, 128], "view": "[2048, 128]", "rule": "adamw", "lr": 0.003, "weight_decay": 0.0, "scale": 1.0, "kind": "embedding"},
            {"name": "norm.weight", "shape": [128], "view": "[128]", "rule": "adamw", "lr": 0.003, "weight_decay": 0.0, "scale": 1.0, "kind": "vector"},
        ],
        "versions": {"muonlab": "0.1.0", "code": code, "commit": "e856410", "torch": "2.13.0", "python": "3.12.1", "numpy": "2.4.6", "platform": "Linux x86_64"},
        "data": {"corpus": "enwik8", "checksum": "1f" * 8, "vocab_size": 2048, "unigram_entropy": 6.31, "tokens": {"train": 500_000, "tune": 20_000, "report": 60_000}, "bytes_per_token": {"train": 2.71, "tune": 2.70, "report": 2.72}, "epochs": epochs, "notices": list(notices)},
        "program": "eager", "device": "cpu", "threads": 1, "parameters": {"total": 1_050_000, "hidden": 786_432, "embedding": 262_144, "vector": 1_152},
        "history": {"train": train, "eval": evals}, "updates": train[-1]["update"], "tokens": 2048 * train[-1]["update"],
        "seconds": {"training": pace * train[-1]["update"], "evaluation": 2.0, "other": 0.1, "wall": 2.1 + pace * updates}, "updates_per_second": 1 / pace, "tokens_per_second": 18_600.0, "peak_memory_bytes": memory,
        "final": final, "best": {"update": updates, "cross_entropy": final["tune"]["cross_entropy"]}, "updates_to_best": updates,
    }  # fmt: skip
    (directory / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def fake_comparison(root, optimizers=("muon", "adamw"), *, seeds=3, diverged=(), edge=False, updates=100, points=None,
                    question=None, sobol=0, gate=True, **run_options):  # fmt: skip
    """Write a comparison: `diverged` holds (optimizer, lr index) trials that diverge. The last optimizer is the base."""
    base = optimizers[-1]
    trials, finals, chosen = [], [], {}
    for optimizer in optimizers:
        center = BEST.get(optimizer, 0.01) * (4 if edge else 1)
        plan = [("lr", center * 10 ** (k / 2), 1.0) for k in (-1, 0, 1)] + [
            ("auxiliary", center, 1 / 3),
            ("auxiliary", center, 3.0),
        ]
        plan += [("sobol", center * 1.3**k, 1.0) for k in range(1, sobol + 1)]
        results = []
        for index, (stage, lr, auxiliary) in enumerate(plan):
            status = "diverged" if (optimizer, index) in diverged else "finished"
            directory = f"trials/{index:02d}-{abs(hash(optimizer)) if '/' in optimizer else optimizer}"
            metrics = fake_run(
                root / directory, optimizer, lr=lr, seed=0, status=status, updates=updates, points=points, **run_options
            )
            loss = metrics["final"]["tune"]["cross_entropy"] + 0.02 * (auxiliary != 1) if status == "finished" else None
            results.append((loss if loss is not None else math.inf, index, lr))
            values = {"lr": lr, "auxiliary": auxiliary}
            trials.append({"optimizer": optimizer, "index": index, "stage": stage, "values": values, "status": status, "tune_cross_entropy": loss, "seconds": 13.1, "directory": directory})  # fmt: skip
        _, trial, lr = min(results)
        chosen[optimizer] = {"values": {"lr": lr, "auxiliary": 1.0}, "trial": trial, "edge": edge}
        for seed in range(1, seeds + 1):
            directory = f"finals/{seed}-{abs(hash(optimizer)) if '/' in optimizer else optimizer}"
            metrics = fake_run(
                root / directory, optimizer, lr=lr, seed=seed, updates=updates, points=points, **run_options
            )
            report = metrics["final"]["report"]
            finals.append({"optimizer": optimizer, "seed": seed, "status": "finished", "report_cross_entropy": report["cross_entropy"], "bits_per_byte": report["bits_per_byte"], "seconds": 13.1, "directory": directory})  # fmt: skip
    losses = {
        name: {f["seed"]: f["report_cross_entropy"] for f in finals if f["optimizer"] == name} for name in optimizers
    }
    verdicts, to_target = [], []
    for candidate in optimizers[:-1]:
        judged = statistics.compare_paired(losses[candidate], losses[base])
        verdicts.append({"candidate": candidate, "reference": base, "metric": "report cross-entropy (nats/token)", **judged.to_dict(), "sentence": judged.sentence(candidate, base)})  # fmt: skip
        to_target.append({"optimizer": candidate, "target": f"{base}'s final loss", "target_loss": 3.7, "updates": 71.0, "tokens": 145_408.0, "seconds": 7.9, "reached": f"{seeds} of {seeds}"})  # fmt: skip
        to_target.append({"optimizer": base, "target": f"{candidate}'s final loss", "target_loss": 3.6, "updates": None, "tokens": None, "seconds": None, "reached": f"0 of {seeds}"})  # fmt: skip
    flags = [f"{name}: the best learning rate lies at the edge of its range" for name in optimizers if edge]
    summary = {
        "schema": 1, "kind": "comparison", "question": question or f"is {optimizers[0]} better than {base} here?", "base": base, "optimizers": list(optimizers), "profile": "quick",
        "budget": {"trials": 5 + sobol, "updates": updates, "seeds": seeds, "tokens_per_update": 2048, "knobs": {name: ["lr", "embedding_lr+head_lr"] for name in optimizers}},
        "setting": {"model": "micro", "parameters": {"total": 1_050_000, "hidden": 786_432, "embedding": 262_144, "vector": 1_152}, "corpus": "enwik8", "data": {"unigram_entropy": 6.31, "vocab_size": 2048, "tokens": {"train": 500_000, "tune": 20_000, "report": 60_000}, "epochs": 0.4, "notices": []}, "updates": updates, "device": "cpu", "threads": 1, "versions": {"muonlab": "0.1.0", "commit": "e856410", "torch": "2.13.0", "python": "3.12.1"}},
        "trials": trials, "chosen": chosen, "finals": finals, "verdicts": verdicts if gate else [], "to_target": to_target,
        "gate": {"unigram_entropy": 6.31, "passed": gate}, "flags": flags, "wall_seconds": 231.5, "command": f"muonlab compare {' '.join(optimizers)} --quick",
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "comparison_summary.json").write_text(json.dumps(summary))
    return summary


def cell(name, group, lr=0.02, values=None, **rest):
    """One cell of a study: `rest` may hold extra (nats), pace, memory, published, diverged (seeds), case, options."""
    options = {"optimizer.lr": lr, **rest.pop("options", {})}
    return {"cell": name, "group": group, "lr": lr, "values": values or {}, "options": options, **rest}


def axis(name, field, values, log=False):
    return {"name": name, "fields": [field], "values": list(values), "log": log}


def core_cells():
    """Muon and AdamW at two settings each, with numbers that the source published."""
    return [
        cell("muon_baseline", "muon", 0.02, published={"loss": 3.61, "best_loss": 3.59, "accuracy": 0.33, "minutes": 1.9}, case="muon_baseline"),
        cell("muon_low", "muon", 0.005, pace=0.10),
        cell("adam_baseline", "adamw", 0.003, pace=0.08, published={"loss": 3.70, "accuracy": 0.31}),
        cell("adam_high", "adamw", 0.012, pace=0.08, diverged=(2,)),
    ]  # fmt: skip


def grid_cells():
    """The 18 cells of seed 002: learning rate x momentum x Newton-Schulz steps. (cells, axes)"""
    lrs, momenta, steps = (0.03125, 0.0625, 0.125), (0.875, 0.9375), (4, 8, 16)
    cells = [
        cell(
            f"lr={lr:g} momentum={momentum:g} steps={n}",
            "muon",
            lr,
            {"lr": lr, "momentum": momentum, "steps": n},
            extra=0.03 * (momentum - 0.875) / 0.0625 + 0.01 * abs(math.log2(n / 8)),
            pace=0.09 + 0.004 * n,
            options={"optimizer.momentum": momentum, "optimizer.ns_steps": n},
        )
        for n in steps
        for momentum in momenta
        for lr in lrs
    ]
    return cells, [axis("lr", "optimizer.lr", lrs, True), axis("momentum", "optimizer.momentum", momenta), axis("steps", "optimizer.ns_steps", steps)]  # fmt: skip


def suite_cells(n=15):
    """Long names in one group and a reference of another, as in seed 001's Adam suite."""
    cells = [
        cell(f"muon_variant_{i:02d}_with_quite_a_long_name", "muon", 0.02, extra=0.02 * i, options={"schedule.warmup": i / 100})
        for i in range(1, n)
    ]  # fmt: skip
    return [*cells, cell("adam_baseline", "adamw", 0.003)]


def block_cells():
    """Block sizes of seed 004: quality, memory and time along an axis that is no learning rate; one value is a word."""
    sizes = (192, 256, 512, 1024, "full")
    cells = [
        cell(f"muon block_size={size}", "muon", 0.02, {"block_size": size}, extra=0.02 * (5 - i), pace=0.08 + 0.01 * i, memory=400_000_000 + 20_000_000 * i)
        for i, size in enumerate(sizes)
    ]  # fmt: skip
    return [*cells, cell("adamw", "adamw", 0.003)], [axis("block_size", "optimizer.block_size", sizes)]


def fake_study(root, cells, axes=(), *, seeds=(1, 2, 3), reference=None, scale="full", version="corrected", targets=(),
               title="Muon against AdamW", question="Is Muon better than AdamW here?", applies=True, updates=100, points=None,
               note=None, **run_options):  # fmt: skip
    """Write study.json, the runs of every cell and seed, and the summary that the studies room makes of them."""
    planned = []
    for number, one in enumerate(cells):
        runs = []
        for seed in seeds:
            directory = f"runs/c{number:02d}-s{seed}"
            status = "diverged" if seed in one.get("diverged", ()) else "finished"
            config = {"seed": seed, "name": one["cell"], "optimizer": {"name": one["group"], "lr": one["lr"]}, "training": {"updates": updates}}  # fmt: skip
            for path, value in one["options"].items():
                table, key = path.split(".")
                config.setdefault(table, {})[key] = value
            known = {key: one[key] for key in ("extra", "pace", "memory") if key in one}
            fake_run(root / directory, one["group"], lr=one["lr"], seed=seed, status=status, updates=updates, points=points, config=config, name=one["cell"], **{**known, **run_options})  # fmt: skip
            runs.append({"seed": seed, "directory": directory})
        published = one.get("published")
        planned.append({"cell": one["cell"], "group": one["group"], "case": one.get("case", ""), "values": one["values"], "options": one["options"], "published": published, "published_applies": bool(applies and published), "runs": runs})  # fmt: skip
    plan = {
        "schema": 1, "kind": "study", "name": "core", "title": title, "question": question, "source": "seed 001, Experiments 1-7", "notes": ["Evaluated on both held-out splits."],
        "version": version, "note": note, "scale": scale, "seeds": list(seeds), "reference": reference, "targets": list(targets), "identity": "0123abcd",
        "axes": list(axes), "cells": planned, "base": {"model": {"d_model": 128, "n_layers": 4}, "optimizer": {"name": "muon"}, "training": {"updates": updates, "micro_batch_size": 16, "accumulation": 1}}, "notices": [],
        "command": f"muonlab study core --version {version} --scale {scale}",
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "study.json").write_text(json.dumps(plan))
    return judge(root)


STUDIES = {
    "core": lambda: (core_cells(), (), {"reference": "adam_baseline", "targets": (4.0,)}),
    "grid": lambda: (*grid_cells(), {"reference": "lr=0.0625 momentum=0.9375 steps=8"}),
    "suite": lambda: (suite_cells(), (), {"reference": "adam_baseline"}),
    "blocks": lambda: (*block_cells(), {"reference": "adamw", "scale": "micro"}),
}

if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2:3]
    if what and what[0] in STUDIES:
        chosen, grid, options = STUDIES[what[0]]()
        fake_study(folder, chosen, grid, **options)
    else:
        fake_comparison(folder, tuple(sys.argv[2:]) or ("muon", "adamw"), diverged={("adamw", 2)})
