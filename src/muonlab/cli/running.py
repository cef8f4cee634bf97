"""Commands that train: one run, a comparison, a study."""

import contextlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from muonlab.errors import InputError


def cmd_train(options: Any) -> int:
    from rich.console import Console

    from muonlab.flags import MODEL_ALIASES, read_overrides
    from muonlab.report import write_run
    from muonlab.report.live import RunProgress, clock
    from muonlab.training.config import as_tables, from_dict, merge, read_toml
    from muonlab.training.estimate import seconds_per_update
    from muonlab.training.interrupt import interruptible
    from muonlab.training.loop import run

    file = options.names[0] if options.names else None
    values = read_toml(file) if file else {}
    named = {"model": MODEL_ALIASES.get(options.model, options.model), "optimizer": options.optimizer}
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
    with interruptible() as stop, _tracking(options, config) as track:

        def follow(row: dict[str, Any]) -> None:
            progress(row)
            track(row)

        metrics = run(
            config,
            directory=options.output,
            allow_version_change=options.allow_version_change,
            fallback=not file and not names_corpus(options.rest),
            progress=not options.quiet,
            on_event=follow,
            should_stop=stop.is_set,
        )
    directory = Path(metrics["directory"])
    again = ["muonlab", "train", str(directory / "config.toml")] + (
        ["--output", str(directory)] if options.output else []
    )
    write_run(directory)
    for notice in (*metrics["data"]["notices"], metrics["program_notice"]):
        if notice:
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


def _tracking(options: Any, config: Any) -> contextlib.AbstractContextManager[Callable[[dict[str, Any]], None]]:
    from muonlab.training.trackers import tracker

    name = options.tracker or ("wandb" if options.wandb_project else None)
    if name is None:
        if options.upload_checkpoints.lower() == "true":
            raise InputError("--upload-checkpoints needs a tracker to upload to: --wandb-project NAME")
        return contextlib.nullcontext(lambda row: None)
    project = options.wandb_project or options.project
    return tracker(name, project, config.to_dict(), options.upload_checkpoints.lower() == "true")


def cmd_compare(options: Any) -> int:
    from rich.console import Console

    from muonlab.flags import read_overrides
    from muonlab.report import print_comparison, write_comparison, write_run
    from muonlab.report.live import StudyProgress
    from muonlab.report.live import clock as clock_text
    from muonlab.studies.compare import compare, comparison_directory, delete_comparison, resolve_plan
    from muonlab.studies.plan import base_values, make_budget, make_plan, notices, tuning_text
    from muonlab.training.config import from_dict, merge
    from muonlab.training.estimate import seconds_per_update
    from muonlab.training.interrupt import interruptible
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
    centers = read_centers(options.lr_center)
    plan = make_plan(
        names,
        base,
        profile=profile,
        budget=numbers,
        centers=centers,
        search=options.search,
        minimum_effect=options.minimum_effect,
    )
    console = Console()
    if not options.quiet:
        b = plan.budget
        console.print(
            f"{plan.runs} runs, {b.updates} updates x {plan.base.tokens_per_update} tokens at full length: for each of "
            f"{', '.join(names)} {tuning_text(plan)}, then {b.seeds} seeds; {max(1, workers)} at a time",
            highlight=False,
        )
        for notice in notices(plan):
            print(notice)
    if options.dry_run:
        seconds = seconds_per_update(plan.base) * plan.updates / max(1, workers)
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
    for name, spent in summary["budget"]["spent"].items() if not options.quiet else ():
        used = (
            f"{spent['trials']} trials, {spent['updates']} updates, {clock_text(spent['training_seconds'])} of training"
        )
        print(f"tuning of {name}: {used}")
    for path in written:
        print(path)
    return 0 if all(final["status"] == "finished" for final in summary["finals"]) else 1


def cmd_study(options: Any) -> int:
    from muonlab.studies.format import json_schema, library
    from muonlab.studies.study import read_study

    if options.schema:
        print(json_schema(), end="")
        return 0
    if not options.names:
        if not options.listing:
            raise InputError("name a study, as in muonlab study exp9; --list shows all")
        print_library(library(), options.scale)
        return 0
    if options.all and (options.quick or options.only):
        raise InputError("--all runs every cell; leave out --quick and --only")
    chosen = {
        "version": options.version,
        "scale": options.scale,
        "seeds": options.seeds,
        "only": options.only,
        "quick": options.quick,
    }
    study = read_study(options.names[0], **chosen)
    if options.rest:
        from muonlab.flags import read_overrides

        study = read_study(options.names[0], **chosen, overrides=read_overrides(study.base, options.rest))
    if options.listing or options.dry_run:
        print_study_plan(study, options.dry_run)
        return 0
    return _run_study(study, options)


def _run_study(study: Any, options: Any) -> int:
    from rich.console import Console

    from muonlab.report import print_study, write_study
    from muonlab.report.live import StudyProgress
    from muonlab.studies.judge import SUMMARY
    from muonlab.studies.run import changes, plan_study, run_study
    from muonlab.training.interrupt import interruptible

    on_gpu = uses_gpu(study.base.to_dict())
    workers = options.workers if options.workers is not None else (0 if on_gpu else min(cores(), study.runs))
    if workers < 0:
        raise InputError(f"--workers is {workers}; it must be 0 (this process) or more")
    if not on_gpu and workers > 0 and study.base.training.threads == 0:
        study = study.with_threads(max(1, cores() // workers))
    directory = Path(options.output) if options.output else Path("runs") / study.folder
    planned = plan_study(study, directory, progress=not options.quiet)
    for notice in (*planned.notices, changes(planned, directory)):
        if notice:
            print(notice)
    console = Console()
    updates = max(cell.config.training.updates for cell in study.cells)
    before = read_bytes(directory / SUMMARY)
    with interruptible() as stop, StudyProgress(study.runs, updates, workers, console, options.quiet) as show:
        summary = run_study(
            planned,
            directory,
            workers=workers,
            command=shlex.join(["muonlab", *options.arguments]),
            on_progress=show,
            should_stop=stop.is_set,
        )
    print_study(directory, console)
    if read_bytes(directory / SUMMARY) == before and (directory / "report.html").exists():
        print(f"nothing had to be run; {directory / 'report.html'} is as it was")
    else:
        for path in write_study(directory):
            print(path)
    return 0 if all(run["status"] == "finished" for cell in summary["cells"] for run in cell["runs"]) else 1


def read_bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def print_library(studies: Mapping[str, Path], scale: str) -> None:
    """Every packaged study: what it asks, and what it costs at the scale."""
    from muonlab.studies.format import read_file
    from muonlab.studies.study import FULL, read_study

    for name in studies:
        file = read_file(name)[1]
        study = read_study(name, scale=scale if scale in file.scales else FULL)
        print(f"{name:18s} {file.title}")
        readings = f"versions {', '.join(file.versions)}; " if file.versions else ""
        print(f"{'':18s} {len(study.cells)} cells, {cost(study)} at scale {study.scale}")
        print(f"{'':18s} {readings}scales {', '.join([FULL, *file.scales])}")


def print_study_plan(study: Any, runs: bool) -> None:
    """The cells of a study, or each run that it would make, and what it costs."""
    for cell in study.cells:
        published = "".join(f"  published {key} {value:g}" for key, value in (cell.published or {}).items())
        seeds = f"  seeds {', '.join(map(str, study.seeds))}" if runs else ""
        print(f"{cell.name:40s} {cell.group:12s} {cell.config.training.updates} updates{seeds}{published}")
    print(f"{study.title}: {cost(study)}")


def cost(study: Any) -> str:
    from muonlab.report.live import clock
    from muonlab.studies.cost import study_flops, study_seconds

    return f"{study.runs} runs, {study_flops(study):.1e} FLOPs, about {clock(study_seconds(study))} here"


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
    device = str(values.get("training", {}).get("device", "auto"))
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device.startswith("cuda")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
