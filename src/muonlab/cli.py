"""The command line: parse, call, print. Everything it does is one documented Python call."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muonlab import __version__
from muonlab.errors import InputError, unknown

DESCRIPTION = f"""muonlab {__version__}: Muon as a drop-in optimizer, and a laboratory that compares optimizers of language models."""

EPILOG = """examples:
  muonlab compare muon adamw --quick             the main question, on this machine, in minutes
  muonlab train --model micro --optimizer muon --lr 0.02 --updates 300
  muonlab train my-run.toml --optimizer.weight-decay 0.05
  muonlab list                                   optimizers, models, corpora, schedules, losses
  muonlab inspect --model moe-79m                parameters, FLOPs, routing, memory
  muonlab runs list                              what lies under ./runs
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that diverged or failed, 2 for bad input, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options, rest = parser().parse_known_args(arguments)
        if not hasattr(options, "command"):
            parser().print_help()
            return 0
        # Names come before flags; argparse would take a flag's value for one, since it does not know the typed flags.
        flags = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
        options.arguments = arguments
        options.names, options.rest = rest[:flags], rest[flags:] + ["--fields"] * getattr(options, "fields", False)
        if rest and (not options.takes_overrides or flags > options.most_names):
            raise InputError(f"unknown argument {rest[0]!r}; see muonlab {arguments[0]} --help")
        return int(options.command(options) or 0)
    except InputError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("muonlab"):
            raise
        print(f"muonlab: this needs {error.name}; pip install 'muonlab[lab]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("muonlab: stopped; give the same command again to go on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are our one line."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = OneLineParser(
        "muonlab",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"muonlab {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=OneLineParser)

    def add(
        name: str,
        call: Callable[[Any], int | None],
        summary: str,
        example: str,
        overrides: bool = False,
        names: str = "",
        most_names: int = 0,
    ) -> Any:
        command = commands.add_parser(
            name,
            usage=f"muonlab {name} {names}[options]" if overrides else None,
            help=summary,
            description=summary
            + "."
            + (
                " Any field of the configuration is a flag: --optimizer.lr 0.01, --model.n-layers 6 (see --fields)."
                if overrides
                else ""
            ),
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        command.set_defaults(command=call, takes_overrides=overrides, most_names=most_names)
        return command

    train = add(
        "train",
        cmd_train,
        "train one run, or go on with it",
        "muonlab train --model micro --optimizer muon --lr 0.02",
        True,
        "[FILE.toml] ",
        1,
    )
    train.add_argument("--optimizer", metavar="NAME", help="a registered optimizer")
    add_run_flags(train)
    train.add_argument("--allow-version-change", action="store_true", help="resume a run that other code began")

    compare = add(
        "compare",
        cmd_compare,
        "is one optimizer better than another, with equal budgets and error bars",
        "muonlab compare muon adamw --quick",
        True,
        "CANDIDATE... REFERENCE ",
        99,
    )
    compare.add_argument("--quick", action="store_true", help="the profile of make quick: minutes on two cores")
    compare.add_argument("--trials", type=int, help="tuning runs per optimizer")
    compare.add_argument("--seeds", type=int, help="final runs per optimizer")
    compare.add_argument("--updates", type=int, help="updates of every run")
    compare.add_argument(
        "--lr-center", action="append", default=[], metavar="NAME=LR", help="centre of a learning-rate search"
    )
    compare.add_argument(
        "--workers", type=int, help="processes that run at a time (default: one per core, one on a GPU)"
    )
    compare.add_argument(
        "--fresh", action="store_true", help="delete what an earlier call of this comparison left and begin anew"
    )
    add_run_flags(compare)

    listing = add("list", cmd_list, "optimizers, models, corpora, schedules, losses", "muonlab list optimizers")
    listing.add_argument("what", nargs="?", help="only this kind")

    inspect = add(
        "inspect",
        cmd_inspect,
        "parameters, FLOPs, routing and memory of a model",
        "muonlab inspect --model moe-79m",
        True,
    )
    inspect.add_argument("--model", metavar="NAME", default="micro")
    inspect.add_argument("--optimizer", metavar="NAME", default="muon")

    data = add(
        "data",
        cmd_data,
        "fetch, split and tokenize a corpus for later use without a network",
        "muonlab data prepare enwik8",
        True,
        "{prepare,list} [CORPUS] ",
        1,
    )
    data.add_argument("action", choices=["prepare", "list"])

    runs = add(
        "runs", cmd_runs, "list, compare or delete runs, and the disk they use", "muonlab runs diff runs/a runs/b"
    )
    runs.add_argument("action", choices=["list", "diff", "delete", "disk"], nargs="?", default="list")
    runs.add_argument("paths", nargs="*")
    runs.add_argument("--root", default="runs")

    report = add(
        "report",
        cmd_report,
        "draw the figures and the page of finished runs or comparisons again",
        "muonlab report runs/compare-muon-adamw-1a2b3c4d",
    )
    report.add_argument("paths", nargs="+")

    add("doctor", cmd_doctor, "what muonlab finds on this machine", "muonlab doctor")
    return top


def add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME", help="a preset")
    command.add_argument(
        "-o", "--output", metavar="DIR", help="folder of this run or comparison (default: one under ./runs)"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    command.add_argument("--quiet", action="store_true", help="print the result alone")
    command.add_argument("--fields", action="store_true", help="list every field of the configuration with its flag")


# --- train and compare ----------------------------------------------------------------------------------------------


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


# --- looking ----------------------------------------------------------------------------------------------------------


def cmd_list(options: Any) -> None:
    from muonlab.data import CORPORA
    from muonlab.models import SUMMARIES
    from muonlab.optim.registry import OPTIMIZERS
    from muonlab.optim.schedules import SCHEDULES
    from muonlab.training.losses import LOSSES

    kinds: dict[str, dict[str, str]] = {
        "optimizers": {name: entry.summary for name, entry in OPTIMIZERS.items()},
        "models": dict(SUMMARIES),
        "corpora": {name: corpus.summary for name, corpus in CORPORA.items()},
        "schedules": dict(SCHEDULES),
        "losses": LOSSES,
    }
    if options.what and options.what not in kinds:
        raise unknown("kind", options.what, kinds)
    for kind, entries in kinds.items():
        if options.what in (None, kind):
            print(kind)
            for name, summary in entries.items():
                print(f"  {name:18s} {summary}")


def cmd_inspect(options: Any) -> None:
    from muonlab.flags import read_overrides
    from muonlab.report.inspection import inspection
    from muonlab.training.config import from_dict, merge

    config = from_dict({"model": options.model, "optimizer": options.optimizer})
    print(inspection(from_dict(merge(config.to_dict(), read_overrides(config, options.rest))), options.model))


def cmd_data(options: Any) -> None:
    from muonlab.data import cached_datasets, prepare
    from muonlab.flags import read_overrides
    from muonlab.report.tables import size
    from muonlab.training.config import from_dict

    if options.action == "list":
        for entry in cached_datasets():
            print(f"{size(entry['size']):>10}  {entry.get('corpus', '?'):12s}  {entry['path']}")
        return
    config = from_dict({"data": options.names[0]} if options.names else {})
    from muonlab.training.config import merge

    dataset = prepare(from_dict(merge(config.to_dict(), read_overrides(config, options.rest))).data, progress=True)
    for key, value in dataset.describe().items():
        print(f"{key}: {value}")


def cmd_runs(options: Any) -> None:
    from muonlab.report.tables import print_runs, runs_difference, size
    from muonlab.training.tracking import delete_run, disk_bytes, find_runs

    root = Path(options.root)
    if options.action == "list":
        print_runs(find_runs(root))
    elif options.action == "diff":
        print(runs_difference([Path(path) for path in options.paths]))
    elif options.action == "disk":
        for path in find_runs(root):
            print(f"{size(disk_bytes(path)):>10}  {path}")
        print(f"{size(disk_bytes(root)):>10}  {root} in all")
    else:
        if not options.paths:
            raise InputError("name the runs to delete: muonlab runs delete runs/NAME")
        for path in options.paths:
            delete_run(Path(path))
            print(f"deleted {path}")


def cmd_report(options: Any) -> None:
    from muonlab.report import write_comparison, write_exports, write_run
    from muonlab.studies.compare import SUMMARY
    from muonlab.training.tracking import find_runs

    for path in map(Path, options.paths):
        if (path / SUMMARY).exists():
            written = write_comparison(path) + write_exports(path)
        else:
            runs = find_runs(path)
            if not runs:
                raise InputError(f"{path} holds neither a comparison nor a run")
            written = [file for run in runs for file in [write_run(run)]]
        for file in written:
            print(file)


def cmd_doctor(options: Any) -> None:
    import importlib.util
    import platform

    import torch

    from muonlab.data import cache_home, cached_datasets
    from muonlab.report.tables import size

    print(f"muonlab   {__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch     {torch.__version__}")
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"device    {', '.join(gpu) or 'cpu'}")
    print(f"triton    {'found' if importlib.util.find_spec('triton') else 'not installed (plain torch is used)'}")
    print(f"threads   {torch.get_num_threads()} of {cores()} cores")
    cached = list(cached_datasets())
    print(f"cache     {cache_home()} ({len(cached)} data sets, {size(sum(entry['size'] for entry in cached))})")
    extras = {"lab": "tokenizers", "hub": "datasets"}
    missing = [name for name, module in extras.items() if importlib.util.find_spec(module) is None]
    print(f"extras    missing: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
