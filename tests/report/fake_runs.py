"""Run directories and a comparison summary in the documented format, drawn from a closed-form loss curve.

`python fake_runs.py DIRECTORY` writes one to look at.
"""

import json
import math
import random
import sys
from pathlib import Path

from muonlab.studies import statistics

BEST = {"muon": 0.02, "adamw": 0.003, "lion": 0.0005, "sgd": 0.3}
OFFSET = {"muon": 0.0, "adamw": 0.09, "lion": 0.13, "sgd": 0.9}
WIDTH = {"muon": 0.02, "adamw": 0.06, "lion": 0.09, "sgd": 0.05}  # nats lost one octave squared from the best


def final_loss(optimizer, lr):
    octaves = math.log2(lr / BEST.get(optimizer, 0.01))
    return 3.6 + OFFSET.get(optimizer, 0.05) + WIDTH.get(optimizer, 0.03) * octaves**2


def fake_run(directory, optimizer="muon", *, lr=0.02, seed=1, updates=100, status="finished", name=None, points=None,
             config=None, notices=(), code="abc123", epochs=0.4, message=None):  # fmt: skip
    """Write config.toml, metrics.jsonl and metrics.json of one run and return the metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    chance = random.Random(f"{seed}")  # shared by the optimizers, as hard and easy seeds are
    shift = chance.gauss(0, 0.02) + random.Random(f"{optimizer}{seed}{lr}").gauss(0, 0.004)
    floor = final_loss(optimizer, lr) + shift
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
        clock = {"update": update, "tokens": 2048 * update, "seconds": 0.11 * update}
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
        "seconds": {"training": 11.0, "evaluation": 2.0, "other": 0.1, "wall": 13.1}, "updates_per_second": 9.1, "tokens_per_second": 18_600.0, "peak_memory_bytes": 412_000_000,
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


if __name__ == "__main__":
    fake_comparison(Path(sys.argv[1]), tuple(sys.argv[2:]) or ("muon", "adamw"), diverged={("adamw", 2)})
