"""The command line: parse, call, print. Everything it does is one documented Python call.

Here the arguments of every command; what a command does lies in `running` (runs and studies), `measuring` (speed) and
`looking` (all else).
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from muonlab import __version__
from muonlab.cli import looking, measuring, running
from muonlab.errors import InputError

DESCRIPTION = f"""muonlab {__version__}: Muon as a drop-in optimizer, and a laboratory that compares optimizers of language models."""

EPILOG = """examples:
  muonlab compare muon adamw --quick             the main question, on this machine, in minutes
  muonlab train --model micro --optimizer muon --lr 0.02 --updates 300
  muonlab train my-run.toml --optimizer.weight-decay 0.05
  muonlab study exp9 --scale micro               a published experiment again, small, with error bars
  muonlab list                                   optimizers, models, corpora, schedules, searches, ...
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
        running.cmd_train,
        "train one run, or go on with it",
        "muonlab train --model micro --optimizer muon --lr 0.02",
        True,
        "[FILE.toml] ",
        1,
    )
    train.add_argument("--optimizer", metavar="NAME", help="a registered optimizer")
    add_run_flags(train)
    train.add_argument("--tracker", metavar="NAME", help="also send the run to tensorboard, trackio or wandb")
    train.add_argument("--project", default="muonlab", help="the tracker's project")
    train.add_argument("--wandb-project", "--wandb_project", metavar="NAME", help="--tracker wandb --project NAME")
    train.add_argument(
        "--upload-checkpoints",
        "--upload_checkpoints",
        nargs="?",
        const="true",
        default="false",
        choices=["true", "false", "True", "False"],
        help="give wandb the finished model",
    )
    train.add_argument("--allow-version-change", action="store_true", help="resume a run that other code began")

    compare = add(
        "compare",
        running.cmd_compare,
        "is one optimizer better than another, with equal budgets and error bars",
        "muonlab compare muon adamw --quick",
        True,
        "CANDIDATE... REFERENCE ",
        99,
    )
    compare.add_argument("--quick", action="store_true", help="the profile of make quick: minutes on two cores")
    compare.add_argument("--trials", type=int, help="tuning runs per optimizer")
    compare.add_argument("--seeds", type=int, help="final runs per optimizer; more than before extend a comparison")
    compare.add_argument(
        "--search", default="staged", metavar="NAME", help="staged, grid, sobol, halton, halving or optuna"
    )
    compare.add_argument("--updates", type=int, help="updates of every run")
    compare.add_argument(
        "--minimum-effect", type=float, default=0.0, metavar="NATS", help="differences up to this are of no interest"
    )
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

    study = add(
        "study",
        running.cmd_study,
        "run an experiment of the library, or one of a file: every cell with every seed",
        "muonlab study exp9 --scale micro",
        True,
        "NAME|FILE.toml ",
        1,
    )
    study.add_argument("--list", "-l", action="store_true", dest="listing", help="studies, or the cells of this one")
    study.add_argument("--dry-run", action="store_true", help="the runs that would be made, and what they cost")
    study.add_argument("--version", metavar="NAME", help="a reading of the source: as-published, corrected, ...")
    study.add_argument(
        "--scale", metavar="NAME", default="full", help="another size of it: micro is minutes on two cores"
    )
    study.add_argument(
        "--only",
        "-e",
        "--experiments",
        nargs="+",
        default=[],
        metavar="CELL",
        help="names or patterns of cells or cases",
    )
    study.add_argument("--quick", action="store_true", help="only the cells that the study calls its quick comparison")
    study.add_argument("--all", action="store_true", help="every cell, as without it")
    study.add_argument("--seeds", type=int, metavar="N", help="so many seeds in place of the study's own")
    study.add_argument("-o", "--output", "--output-dir", metavar="DIR", help="its folder (default: one under ./runs)")
    study.add_argument("--workers", type=int, help="processes that run at a time (default: one per core, one on a GPU)")
    study.add_argument("--quiet", action="store_true", help="print the result alone")
    study.add_argument("--fields", action="store_true", help="list every field of the configuration with its flag")
    study.add_argument("--schema", action="store_true", help="print the JSON schema of study files, for editors")

    listing = add(
        "list",
        looking.cmd_list,
        "optimizers, models, corpora, schedules, losses, searches, trackers",
        "muonlab list optimizers",
    )
    listing.add_argument("what", nargs="?", help="only this kind")

    inspect = add(
        "inspect",
        looking.cmd_inspect,
        "parameters, FLOPs, routing and memory of a model",
        "muonlab inspect --model moe-79m",
        True,
    )
    inspect.add_argument("--model", metavar="NAME", default="micro")
    inspect.add_argument("--optimizer", metavar="NAME", default="muon")

    data = add(
        "data",
        looking.cmd_data,
        "fetch, split and tokenize a corpus for later use without a network",
        "muonlab data prepare enwik8",
        True,
        "{prepare,list} [CORPUS] ",
        1,
    )
    data.add_argument("action", choices=["prepare", "list"])

    runs = add(
        "runs",
        looking.cmd_runs,
        "list, compare or delete runs, and the disk they use",
        "muonlab runs diff runs/a runs/b",
    )
    runs.add_argument("action", choices=["list", "diff", "delete", "disk"], nargs="?", default="list")
    runs.add_argument("paths", nargs="*")
    runs.add_argument("--root", default="runs")

    report = add(
        "report",
        looking.cmd_report,
        "draw the figures and the page of finished runs or comparisons again",
        "muonlab report runs/compare-muon-adamw-1a2b3c4d",
    )
    report.add_argument("paths", nargs="+")

    claims = add(
        "claims",
        looking.cmd_claims,
        "what study folders say to every claim of the seeds, as a table and a page",
        "muonlab claims runs/study-exp9-corrected-micro",
    )
    claims.add_argument("paths", nargs="*", metavar="DIR", help="folders of studies, or folders that hold such")
    claims.add_argument("--ledger", metavar="FILE", default="docs/claims.toml", help="the claims (docs/claims.toml)")
    claims.add_argument("-o", "--output", metavar="FILE", help="the page (default: beside the ledger, as .md)")

    bench = add(
        "bench",
        measuring.cmd_bench,
        "how fast: an optimizer's step, a training update, its kernels, beside every installed peer",
        "muonlab bench step --sets moe-79m --peers muonlab torch-muon",
    )
    bench.add_argument("kind", metavar="{step,train,profile,all}")
    bench.add_argument("--sets", nargs="+", metavar="NAME", help="step: sets of matrices, such as moe-79m")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help="step: optimizers (default: all that are installed)")
    bench.add_argument("--models", nargs="+", metavar="NAME", help="train, profile: such as moe-79m")
    bench.add_argument("--programs", nargs="+", metavar="NAME", help="train, profile: eager, compile, graph")
    bench.add_argument("--optimizers", nargs="+", metavar="NAME", help="train, profile: muon, adamw")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    bench.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own number)")
    bench.add_argument("--repeats", type=int, help="step, train: measurements of each row")
    bench.add_argument("--updates", type=int, help="train, profile: updates in one measurement")
    bench.add_argument("--quick", action="store_true", help="something tiny in seconds, to try it out")
    bench.add_argument(
        "-o", "--output", metavar="FILE.json", help="where to write the result, with a figure beside it; all: a folder"
    )

    add("doctor", looking.cmd_doctor, "what muonlab finds on this machine", "muonlab doctor")
    return top


def add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME", help="a preset")
    command.add_argument(
        "-o", "--output", metavar="DIR", help="folder of this run or comparison (default: one under ./runs)"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    command.add_argument("--quiet", action="store_true", help="print the result alone")
    command.add_argument("--fields", action="store_true", help="list every field of the configuration with its flag")
