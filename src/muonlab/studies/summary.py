"""What a comparison found, as the plain values of comparison_summary.json."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muonlab.data import Dataset
from muonlab.errors import InputError
from muonlab.studies.curves import median_to_target, to_target
from muonlab.studies.executor import Job
from muonlab.studies.plan import Plan, optimizer_of
from muonlab.studies.search import Search
from muonlab.studies.space import KNOBS, Point
from muonlab.studies.statistics import compare_family, noise_floor
from muonlab.training.tracking import read_run, versions


def final_loss(outcome: Mapping[str, Any], split: str) -> float:
    """Cross-entropy at the last evaluation on `split`; infinity for a run that did not finish."""
    if outcome["status"] != "finished":
        return float("inf")
    return float(outcome["final"][split]["cross_entropy"])


def trial_entry(directory: Path, job: Job, point: Point, outcome: dict[str, Any], loss: float) -> dict[str, Any]:
    return {
        "optimizer": job.group,
        "stage": point.stage,
        "values": point.values,
        "updates": job.config.training.updates,
        "status": outcome["status"],
        "message": outcome.get("message"),
        "tune_cross_entropy": loss,
        "seconds": outcome.get("seconds", {}).get("training"),
        "directory": str(job.directory.relative_to(directory)),
    }


def summarize(
    plan: Plan,
    directory: Path,
    dataset: Dataset,
    searches: dict[str, Search],
    trials: dict[str, list[dict[str, Any]]],
    outcomes: dict[str, dict[int, dict[str, Any]]],
) -> dict[str, Any]:
    """The summary's plain values. `trials` holds each optimizer's entries in the order asked; those that a search stopped
    early are listed apart from those of full length, because only losses at one length may stand in one list."""
    names, data = list(searches), dataset.describe()
    reference = names[-1]
    full: list[dict[str, Any]] = []
    stopped: list[dict[str, Any]] = []
    for name in names:
        mine = [entry for entry in trials[name] if entry["updates"] == plan.budget.updates]
        full += [{**entry, "index": index} for index, entry in enumerate(mine)]
        stopped += [entry for entry in trials[name] if entry["updates"] < plan.budget.updates]
    finals = []
    for label in names:
        for seed, outcome in outcomes[label].items():
            last = outcome["final"].get("report", {})
            finals.append(
                {
                    "optimizer": label,
                    "seed": seed,
                    "status": outcome["status"],
                    "message": outcome.get("message"),
                    "report_cross_entropy": final_loss(outcome, "report"),
                    "bits_per_byte": last.get("bits_per_byte"),
                    "perplexity": last.get("perplexity"),
                    "accuracy": last.get("accuracy"),
                    "seconds": outcome.get("seconds", {}).get("training"),
                    "directory": str(Path(outcome["directory"]).relative_to(directory)),
                }
            )
    losses = {n: [final_loss(outcomes[n][seed], "report") for seed in plan.seeds(n)] for n in names}
    entropy = dataset.report.unigram_entropy  # no unigram model of this split does better
    ended = {n: [loss for loss in losses[n] if math.isfinite(loss)] for n in names}
    learned = {n: bool(ended[n]) and statistics.fmean(ended[n]) < entropy for n in names}
    flags = [
        f"{n}: the best {KNOBS[knob].text} lies at the edge of the range tried; a wider search may find a better one"
        for n in names
        for knob in searches[n].edges
    ]
    flags += [f"{n}: did not get below the unigram entropy of {entropy:.3f} nats" for n in names if not learned[n]]
    flags += [
        f"{n}: every trial diverged; centre its search lower with --lr-center {n}=LR"
        for n in names
        if searches[n].diverged
    ]
    flags += [
        f"{n}: has no {KNOBS[knob].text}: its search had a knob fewer than the others'"
        for n in names
        for knob in KNOBS
        if knob not in searches[n].knobs
    ]
    flags += [
        f"{t['optimizer']}: trial {t['index']} {t['status']} ({t['message']})"
        for t in full
        if t["status"] != "finished"
    ]
    flags += [
        f"{f['optimizer']}: seed {f['seed']} {f['status']} ({f['message']})"
        for f in finals
        if f["status"] != "finished"
    ]
    flags += data["notices"]
    return {
        "schema": 1,
        "kind": "comparison",
        "identity": plan.identity,
        "question": f"Is {' or '.join(names[:-1])} better than {reference} here?",
        "optimizers": names,
        "reference": reference,
        "profile": plan.profile,
        "budget": {
            **asdict(plan.budget),
            "search": plan.search,
            "rungs": [asdict(rung) for rung in plan.rungs],
            "tokens_per_update": plan.base.tokens_per_update,
            "knobs": {n: [KNOBS[knob].text for knob in searches[n].varied] for n in names},
            "spent": {
                n: {
                    "trials": len(trials[n]),
                    "updates": sum(entry["updates"] for entry in trials[n]),
                    "training_seconds": sum(entry["seconds"] or 0.0 for entry in trials[n]),
                }
                for n in names
            },
        },
        "setting": {
            "config": plan.base.to_dict(),
            "data": data,
            "updates": plan.budget.updates,
            "device": plan.base.training.device,
            "threads": plan.base.training.threads,
            "versions": versions(),
        },
        "trials": full,
        "stopped_early": stopped,
        "chosen": {
            n: {
                "values": searches[n].best.values,
                "options": searches[n].best.options(optimizer_of(n)),
                "trial": [point for point in searches[n].asked if point.updates is None].index(searches[n].best),
                "edge": searches[n].at_edge,
                "edges": [KNOBS[knob].text for knob in searches[n].edges if knob != "lr"],
            }
            for n in names
        },
        "finals": finals,
        "gate": {"unigram_entropy": entropy, "passed": learned},
        "noise": _noise(list(ended.values())),
        "verdicts": _verdicts(plan, reference, losses, learned, entropy),
        "to_target": _to_target(directory, names, finals),
        "flags": flags,
    }


def _noise(losses: list[list[float]]) -> dict[str, float] | None:
    """How far two runs that differ in their seed alone lie apart, pooled over the optimizers."""
    repeated = [values for values in losses if len(values) > 1]
    return asdict(noise_floor(repeated)) if repeated else None


def _verdicts(
    plan: Plan, reference: str, losses: dict[str, list[float]], learned: dict[str, bool], entropy: float
) -> list[dict[str, Any]]:
    """Every candidate against the reference, pairs in the order of the seeds, as one family of tests."""
    pairs = {name: dict(enumerate(values, 1)) for name, values in losses.items()}
    candidates = {name: values for name, values in pairs.items() if name != reference}
    found = compare_family(candidates, pairs[reference], minimum_effect=plan.minimum_effect)
    table = []
    for name, result in found.items():
        entry = {"candidate": name, "reference": reference, "metric": "report cross-entropy (nats/token)"}
        entry |= {**result.to_dict(), "sentence": result.sentence(name, reference)}
        if not learned[name] and not learned[reference]:
            entry["verdict"] = "no verdict"
            entry["sentence"] = (
                f"no verdict: neither {name} nor {reference} got below the unigram entropy of {entropy:.3f} nats; "
                "train for more updates"
            )
        table.append(entry)
    return table


def _to_target(directory: Path, names: Sequence[str], finals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much each optimizer needed to reach the final loss of each other one: per pair of seeds, then the median."""
    curves: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    for final in finals:
        if final["status"] != "finished":
            curves[final["optimizer"]].append([])  # no final loss to reach, and its pair is left out
            continue
        try:
            rows = read_run(directory / final["directory"])["history"]["eval"]
        except InputError:
            rows = []
        curves[final["optimizer"]].append([row for row in rows if row["split"] == "report"])
    table = []
    for name in names:
        for other in names:
            if name == other:
                continue
            pairs = [
                (ours, theirs[-1]["cross_entropy"])
                for ours, theirs in zip(curves[name], curves[other], strict=True)
                if ours and theirs and theirs[-1]["cross_entropy"] is not None
            ]
            if not pairs:
                continue
            needed = [to_target(ours, target) for ours, target in pairs]
            middle = median_to_target(needed)
            table.append(
                {
                    "optimizer": name,
                    "target": f"{other}'s final loss",
                    "target_loss": statistics.fmean(target for _, target in pairs),
                    "updates": middle.updates,
                    "tokens": middle.tokens,
                    "seconds": middle.seconds,
                    "reached": f"{sum(n.updates != float('inf') for n in needed)} of {len(needed)}",
                }
            )
    return table
