"""What a study found, from its plan and its run directories alone: the plain values of comparison_summary.json."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muonlab.errors import InputError
from muonlab.studies.curves import edge_of_range, lr_optimum, lr_tolerance, median_to_target, to_target
from muonlab.studies.records import Records, read_records
from muonlab.studies.speedup import data_speedups
from muonlab.studies.statistics import compare_family, noise_floor, t_interval
from muonlab.training.tracking import write_json

PLAN = "study.json"
SUMMARY = "comparison_summary.json"
CONFIDENCE = 0.95
NEAR = 3.5
"""Octaves around the best learning rate within which the loss is about a parabola in log lr."""
Losses = dict[int, float]
"""Seed -> final cross-entropy, infinity for a run that diverged."""


def judge(directory: str | Path, records: Records | None = None) -> dict[str, Any]:
    """Summarise the study in `directory` and write `comparison_summary.json`; returns it.

    Runs that are missing, damaged or unfinished are listed under `problems` and leave their cells with fewer seeds.
    `records` are those of its runs where they have just been read. InputError for a folder without a study.
    """
    directory = Path(directory)
    plan = read_plan(directory)
    summary = summarize_study(plan, records or read_records(directory))
    write_json(directory / SUMMARY, summary)
    return summary


def read_plan(directory: Path) -> dict[str, Any]:
    """The study.json of a folder; InputError where there is none, or a damaged one."""
    try:
        plan: dict[str, Any] = json.loads((directory / PLAN).read_text(encoding="utf-8"))
        if plan["kind"] != "study":
            raise KeyError
        return plan
    except FileNotFoundError:
        raise InputError(f"{directory} holds no study: there is no {PLAN} in it") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory / PLAN} is damaged; give the study's command again") from None


def summarize_study(plan: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """The summary of a study from its plan and the records of its runs; nothing is read or written."""
    cells = [_cell(cell, records) for cell in plan["cells"]]
    _rank(cells)
    losses = {cell["cell"]: _losses(cell) for cell in cells}
    tuned = {cell["cell"]: _losses(cell, "tune_cross_entropy") for cell in cells}
    contrasts = _contrasts(plan["reference"], losses)
    groups = list(dict.fromkeys(cell["group"] for cell in cells))
    done = [
        records.runs[run["directory"]] for cell in cells for run in cell["runs"] if run["directory"] in records.runs
    ]
    entropy = done[0]["data"].get("unigram_entropy") if done else None
    planned = {run["directory"] for cell in plan["cells"] for run in cell["runs"]}
    seen = {*records.runs, *records.problems}
    problems = [{"directory": name, "message": text} for name, text in records.problems.items() if name in planned]
    failures = plan.get("failures", {})
    problems += [{"directory": name, "message": failures.get(name, "not yet run")} for name in sorted(planned - seen)]
    problems += [
        {"directory": name, "message": failures.get(name) or _unfinished(records.runs[name])}
        for name in sorted(planned & set(records.runs))
        if records.runs[name]["status"] not in ("finished", "diverged")
    ]
    summary = {
        **{key: value for key, value in plan.items() if key not in ("cells", "base", "failures")},
        "groups": groups,
        "cells": cells,
        "contrasts": contrasts,
        "group_contrasts": _group_contrasts(plan, cells, losses, tuned),
        "sensitivity": _sensitivity(plan, cells),
        "to_target": _to_targets(plan, cells, records, losses),
        "data_speedup": data_speedups(plan["reference"], cells),
        "noise_floor": _noise(losses),
        "budget": {
            "runs": len(planned),
            "finished": sum(record["status"] == "finished" for record in done),
            "updates": sum(record["updates"] for record in done),
            "tokens": sum(record["tokens"] for record in done),
            "training_seconds": sum(record["seconds"]["training"] for record in done),
        },
        "setting": {
            "config": plan["base"],
            "data": done[0]["data"] if done else {},
            "device": _one([record["device"] for record in done]),
            "program": _one([record["program"] for record in done]),
            "threads": _one([record["threads"] for record in done]),
            "versions": done[0]["versions"] if done else {},
        },
        "gate": {
            "unigram_entropy": entropy,
            "passed": {c["cell"]: c["mean"] is not None and entropy is not None and c["mean"] < entropy for c in cells},
        },
        "problems": problems,
        "stale": sorted(seen - planned),
    }
    return {**summary, "flags": _flags(summary)}


def _unfinished(record: Mapping[str, Any]) -> str:
    return f"{record['status']} after {record['updates']} updates"


def _cell(planned: Mapping[str, Any], records: Records) -> dict[str, Any]:
    runs = [_run(run, records.runs.get(run["directory"])) for run in planned["runs"]]
    final = [run["report_cross_entropy"] for run in runs if run["status"] == "finished"]
    finite = [loss for loss in final if loss is not None]
    interval = t_interval(finite, CONFIDENCE) if len(finite) > 1 else None
    return {
        **planned,
        "runs": runs,
        "finished": len(finite),
        "mean": statistics.fmean(finite) if finite else None,
        "sd": statistics.stdev(finite) if len(finite) > 1 else None,
        "interval": list(interval) if interval else None,
    }


def _run(planned: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {**planned, "status": "missing", "message": None, "report_cross_entropy": None}
    final = record["final"] or {}
    report, tune = final.get("report") or {}, final.get("tune") or {}
    return {
        **planned,
        "status": record["status"],
        "message": record["message"],
        "report_cross_entropy": report.get("cross_entropy"),
        "tune_cross_entropy": tune.get("cross_entropy"),
        "best_report_cross_entropy": record["best_report_cross_entropy"],
        **{key: report.get(key) for key in ("bits_per_byte", "perplexity", "accuracy")},
        "seconds": record["seconds"]["training"],
        **{
            key: record[key]
            for key in ("updates", "tokens", "updates_per_second", "peak_memory_bytes", "spikes", "plateaus")
        },
    }


def _rank(cells: list[dict[str, Any]]) -> None:
    """Ranks by mean loss over finished seeds; a cell with a seed that diverged or is missing comes after those without."""
    ordered = sorted(
        (cell for cell in cells if cell["mean"] is not None),
        key=lambda cell: (len(cell["runs"]) - cell["finished"], cell["mean"]),
    )
    for cell in cells:
        cell["rank"] = ordered.index(cell) + 1 if cell in ordered else None


def _losses(cell: Mapping[str, Any], key: str = "report_cross_entropy") -> Losses:
    """Final losses by seed of the runs that came to an end."""
    return {
        run["seed"]: math.inf if run["status"] == "diverged" or run.get(key) is None else run[key]
        for run in cell["runs"]
        if run["status"] in ("finished", "diverged")
    }


def _contrasts(reference: str | None, losses: Mapping[str, Losses]) -> list[dict[str, Any]]:
    if reference is None:
        return []
    others = {cell: values for cell, values in losses.items() if cell != reference}
    return _family(others, reference, losses[reference])


def _family(candidates: Mapping[str, Losses], reference: str, theirs: Losses) -> list[dict[str, Any]]:
    """Paired comparisons judged together, of the candidates that share a seed with the reference."""
    common = {name: ours for name, ours in candidates.items() if set(ours) & set(theirs)}
    return [
        {"candidate": name, "reference": reference, **result.to_dict(), "sentence": result.sentence(name, reference)}
        for name, result in compare_family(common, theirs, confidence=CONFIDENCE).items()
    ]


def _group_contrasts(
    plan: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    losses: Mapping[str, Losses],
    tuned: Mapping[str, Losses],
) -> list[dict[str, Any]]:
    """Best against best: each group's cell is chosen by the first seed on the tune split and judged by the other seeds on
    the report split, so that the choice cannot profit from the luck that it is judged by."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        groups.setdefault(cell["group"], []).append(cell["cell"])
    seeds = plan["seeds"]
    if len(seeds) < 3 or len(groups) < 2:
        return []
    chosen = {
        group: min(names, key=lambda name: tuned[name].get(seeds[0], math.inf)) for group, names in groups.items()
    }
    named = next((cell["group"] for cell in cells if cell["cell"] == plan["reference"]), list(groups)[-1])
    rest = {
        group: {seed: loss for seed, loss in losses[name].items() if seed != seeds[0]} for group, name in chosen.items()
    }
    found = _family({group: rest[group] for group in groups if group != named}, named, rest[named])
    return [{**entry, "chosen": {g: chosen[g] for g in (entry["candidate"], named)}} for entry in found]


def _sensitivity(plan: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the loss depends on every logarithmic axis, for each case and each setting of the other axes."""
    found = []
    for name in dict.fromkeys(axis["name"] for axis in plan["axes"] if axis["log"]):  # groups may have axes of one name
        lines: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for cell in cells:
            if name in cell["values"]:
                rest = {key: value for key, value in cell["values"].items() if key != name}
                lines.setdefault((cell["group"], cell["case"], json.dumps(rest, sort_keys=True)), []).append(cell)
        for (group, case, rest_text), line in lines.items():
            rates = [float(cell["values"][name]) for cell in line]
            means = [
                math.inf if any(run["status"] == "diverged" for run in cell["runs"]) else cell["mean"] for cell in line
            ]
            measured = [(lr, loss) for lr, loss in zip(rates, means, strict=True) if loss is not None]
            if len(measured) < 2 or not any(math.isfinite(loss) for _, loss in measured):
                continue
            tried = ([lr for lr, _ in measured], [loss for _, loss in measured])
            width = lr_tolerance(*tried)
            near = [pair for pair in measured if abs(math.log2(pair[0] / width.best)) <= NEAR]
            fit = lr_optimum([lr for lr, _ in near], [loss for _, loss in near])
            found.append(
                {
                    "group": group,
                    "case": case,
                    "axis": name,
                    "rest": json.loads(rest_text),
                    **asdict(width),
                    "edge": edge_of_range(*tried),
                    "optimum": asdict(fit) if fit else None,
                }
            )
    return found


def _to_targets(
    plan: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], records: Records, losses: Mapping[str, Losses]
) -> list[dict[str, Any]]:
    """Updates, tokens and seconds until each target: those of the file, and seed by seed the reference's final loss.

    `data_speedup`, of the latter alone: the reference's tokens over those that were needed; None where never reached.
    """
    targets: list[tuple[str, Mapping[int, float] | float]] = [
        (f"{target:g} nats", target) for target in plan["targets"]
    ]
    if plan["reference"] is not None:
        targets.append((f"{plan['reference']}'s final loss", losses[plan["reference"]]))
    by_name = {cell["cell"]: cell for cell in cells}
    used = {run["seed"]: run.get("tokens") for run in by_name.get(plan["reference"], {"runs": ()})["runs"]}
    found = []
    for text, target in targets:
        for cell in cells:
            needed, ratios = [], []
            for run in cell["runs"]:
                goal = target if isinstance(target, float | int) else target.get(run["seed"], math.inf)
                if run["status"] in ("finished", "diverged") and math.isfinite(goal):
                    rows = records.runs[run["directory"]]["evaluations"]
                    needed.append(to_target([row for row in rows if row["split"] == "report"], goal))
                    if not isinstance(target, float | int) and needed[-1].tokens > 0:
                        ratios.append(used[run["seed"]] / needed[-1].tokens)
            if needed:
                middle = median_to_target(needed)
                reached = f"{sum(math.isfinite(n.updates) for n in needed)} of {len(needed)}"
                speedup = statistics.median(ratios) if ratios else None
                found.append(
                    {
                        "cell": cell["cell"],
                        "target": text,
                        **asdict(middle),
                        "reached": reached,
                        "data_speedup": speedup or None,
                    }
                )
    return found


def _noise(losses: Mapping[str, Losses]) -> dict[str, Any] | None:
    """Spread of a final loss between seeds of one cell, pooled over all cells with two seeds or more."""
    repeated = [[loss for loss in cell.values() if math.isfinite(loss)] for cell in losses.values()]
    repeated = [cell for cell in repeated if len(cell) > 1]
    return asdict(noise_floor(repeated)) if repeated else None


def _flags(summary: Mapping[str, Any]) -> list[str]:
    flags = [
        f"{c['cell']}: seed {run['seed']} diverged ({run['message']})"
        for c in summary["cells"]
        for run in c["runs"]
        if run["status"] == "diverged"
    ]
    for line in summary["sensitivity"]:
        where = line["group"] + "".join(f", {key} {value}" for key, value in line["rest"].items())
        end = "lowest" if line["edge"] == "low" or (not line["edge"] and line["open_low"]) else "highest"
        if line["edge"]:
            flags.append(f"{where}: the best {line['axis']} is the {end} tried; a better one may lie beyond")
        elif line["open_low"] or line["open_high"]:
            flags.append(f"{where}: the good range of {line['axis']} reaches the {end} value tried; it may go on")
    if len(summary["seeds"]) == 1:
        flags.append("one seed: nothing here has an error bar")
    stuck = [cell for cell, passed in summary["gate"]["passed"].items() if not passed]
    if stuck and summary["gate"]["unigram_entropy"] is not None:
        flags.append(
            f"{len(stuck)} of {len(summary['cells'])} cells did not get below the unigram entropy of "
            f"{summary['gate']['unigram_entropy']:.3f} nats: {', '.join(stuck[:5])}{' ...' if len(stuck) > 5 else ''}"
        )
    return flags


def _one(values: Sequence[Any]) -> Any:
    """The value that all share; a list of the different ones where they differ."""
    different = sorted(set(values), key=str)
    return different[0] if len(different) == 1 else different
