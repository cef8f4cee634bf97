"""Commands that train: one run, a comparison."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonlab.errors import InputError


def cmd_train(options: Any) -> int:
    from rich.console import Console

    from muonlab.flags import read_overrides
    from muonlab.report import write_run
    from muonlab.report.live import RunProgress, clock
    from muonlab.training.config import as_tables, from_dict, merge, read_toml
    from muonlab.training.estimate import seconds_per_update
    from muonlab.training.loop import interruptible, run

    file = options.names[0] if options.names else None
    values = read_toml(file) if file else {}
    named = {"model": options.model, "optimizer": options.optimizer}
    values = merge(as_tables(values), as_tables({key: value for key, value in named.items() if value is not None}))
    config = from_dict(values, file or "configuration")
    config = from_dict(merge(values, read_overrides(config, options.rest)))
    if options.dry_run:
        seconds = seconds_per_update(config)
        print(
            f"{config.training.updates} updates of {config.tokens_per_update} tokens at {seconds:.3f} s: {clock(seconds * config.training.updates)}"
        )
        return 0
    console = Console()
    progress = RunProgress(config.training.updates, console, options.quiet)
    with interruptible() as stop:
        metrics = run(
            config,
            directory=options.output,
            allow_version_change=options.allow_version_change,
            fallback=not file and not names_corpus(options.rest),
            progress=not options.quiet,
            on_event=progress,
            should_stop=stop.is_set,
        )
    directory = Path(metrics["directory"])
    again = ["muonlab", "train", str(directory / "config.toml")] + (
        ["--output", str(directory)] if options.output else []
    )
    write_run(directory)
    for notice in metrics["data"]["notices"]:
        print(notice)
    final = ", ".join(f"{split} loss {row['cross_entropy']:.4f}" for split, row in metrics["final"].items())
    print(
        f"{metrics['status']} after {metrics['updates']} updates in {clock(metrics['seconds']['training'])} of training: {final}"
    )
    if metrics["message"]:
        print(metrics["message"])
    print(f"run: {directory}\nresume or repeat: {shlex.join(again)}")
    if metrics["status"] == "interrupted":
        return 130
    return 0 if metrics["status"] == "finished" else 1


def cmd_compare(options: Any) -> int:
    from rich.console import Console

    from muonlab.flags import read_overrides
    from muonlab.report import print_comparison, write_comparison, write_run
    from muonlab.report.live import StudyProgress
    from muonlab.report.live import clock as clock_text
    from muonlab.studies.compare import compare, comparison_directory, delete_comparison, resolve_plan
    from muonlab.studies.plan import base_values, make_budget, make_plan
    from muonlab.training.config import from_dict, merge
    from muonlab.training.estimate import seconds_per_update
    from muonlab.training.loop import interruptible
    from muonlab.training.tracking import find_runs

    names = options.names or ["muon", "adamw"]
    profile = "quick" if options.quick else "standard"
    numbers = {"trials": options.trials, "seeds": options.seeds, "updates": options.updates}
    values = merge(
        base_values(profile, make_budget(profile, **numbers)), {"model": {"preset": options.model or "micro"}}
    )
    overrides = read_overrides(from_dict(values), options.rest)
    for key in ("optimizer", "name"):
        if key in overrides:
            raise InputError(f"a comparison sets {key} itself; --{key} flags belong to muonlab train")
    clock = overrides.get("training", {})
    if "eval_splits" in clock:
        raise InputError(
            "a comparison chooses on the tune split and judges on the report split; eval_splits cannot be set"
        )
    numbers["updates"] = clock.pop("updates", options.updates)
    base = merge(merge(base_values(profile, make_budget(profile, **numbers)), {"model": values["model"]}), overrides)
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers is {options.workers}; it must be 0 (this process) or more")
    on_gpu = uses_gpu(base)
    workers = options.workers if options.workers is not None else (0 if on_gpu else cores())
    if not on_gpu and workers > 0:
        base = merge({"training": {"threads": max(1, cores() // workers)}}, base)
    plan = make_plan(names, base, profile=profile, budget=numbers, centers=read_centers(options.lr_center))
    console = Console()
    if not options.quiet:
        b = plan.budget
        console.print(
            f"{plan.runs} runs of {b.updates} updates x {plan.base.tokens_per_update} tokens: {b.trials} trials and {b.seeds} seeds "
            f"for each of {', '.join(names)}, {max(1, workers)} at a time",
            highlight=False,
        )
    if options.dry_run:
        seconds = seconds_per_update(plan.base) * plan.budget.updates * plan.runs / max(1, workers)
        print(f"about {clock_text(seconds)} of training, evaluation and data not counted")
        return 0
    plan, dataset = resolve_plan(plan, fallback=not names_corpus(options.rest), progress=not options.quiet)
    for notice in dataset.notices:
        print(notice)
    directory = Path(options.output) if options.output else comparison_directory(plan)
    if options.fresh:
        delete_comparison(directory)
    progress = StudyProgress(plan.runs, plan.budget.updates, workers, console, options.quiet)
    command = shlex.join(["muonlab", *options.arguments])
    with interruptible() as stop, progress as show:
        summary = compare(
            plan,
            directory,
            dataset=dataset,
            workers=workers,
            command=command,
            on_progress=show,
            should_stop=stop.is_set,
        )
    written = write_comparison(directory)
    for path in find_runs(directory):
        write_run(path)
    print_comparison(directory, console)
    for path in written:
        print(path)
    return 0 if all(final["status"] == "finished" for final in summary["finals"]) else 1


def names_corpus(words: Sequence[str]) -> bool:
    """Whether a corpus was asked for: only one that was not may be replaced when nothing can be downloaded."""
    return any(word.partition("=")[0].replace("_", "-") in ("--corpus", "--dataset", "--data.corpus") for word in words)


def read_centers(texts: Sequence[str]) -> dict[str, float]:
    centers = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            centers[name] = float(value)
        except ValueError:
            raise InputError(f"--lr-center {text!r} is not NAME=LR, as in muon=0.02") from None
    return centers


def uses_gpu(values: dict[str, Any]) -> bool:
    import torch

    device = str(values.get("training", {}).get("device", "auto"))
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
