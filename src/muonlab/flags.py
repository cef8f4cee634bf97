"""Typed flags: any field of a run's configuration from the command line, and short names for the common ones."""

import contextlib
import io
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from typing import Any

import tyro

from muonlab.errors import InputError, unknown
from muonlab.training.config import RunConfig

ALIASES = {
    "--lr": "--optimizer.lr",
    "--wd": "--optimizer.weight-decay",
    "--weight-decay": "--optimizer.weight-decay",
    "--block-size": "--optimizer.block-size",
    "--dataset": "--data.corpus",
    "--corpus": "--data.corpus",
    "--split": "--data.split",
    "--updates": "--training.updates",
    "--max-steps": "--training.updates",
    "--batch-size": "--training.micro-batch-size",
    "--accumulation": "--training.accumulation",
    "--max-len": "--model.seq-len",
    "--seq-len": "--model.seq-len",
    "--hidden-size": "--model.d-model",
    "--save-checkpoint-interval": "--training.checkpoint-every",
    "--device": "--training.device",
    "--program": "--training.program",
}
"""Short flags, and those of seed 004, for typed ones of the configuration."""

MODEL_ALIASES = {"qwen": "qwen-385m"}
"""Models by the names that seed 004 gives them."""


def read_overrides(config: RunConfig[Any], words: Sequence[str]) -> dict[str, Any]:
    """The nested values that typed flags change (`--optimizer.lr 0.1`), read by tyro against the run's own types.

    `--fields` among the words prints every flag and exits. Raises InputError with one line for what tyro refuses.
    """
    if "--fields" in words:
        tyro.cli(type(config), default=config, args=["--help"], prog="muonlab")
    arguments = []
    for argument in words:
        flag, equals, value = argument.partition("=")
        flag = ALIASES.get(flag.replace("_", "-"), flag)
        arguments.append(flag + equals + value)
    if not arguments:
        return {}
    known = known_flags(config)
    stray = next((word for word in arguments if word.endswith(".toml")), None)
    if stray is not None:
        raise InputError(f"names come before flags: put {stray} first")
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.replace("_", "-") not in known:
            raise unknown("flag", flag, known | set(ALIASES))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stdout(complaint), contextlib.redirect_stderr(complaint):
            changed = tyro.cli(type(config), default=config, args=arguments, prog="muonlab")
    except SystemExit:
        # a title, what is wrong in a line or more, rules or empty lines around it
        lines = [line.strip("│╭╰─╮╯ ") for line in complaint.getvalue().splitlines()]
        wrong = dropwhile(lambda line: not line.strip("-"), lines[1:])
        told = " ".join(takewhile(lambda line: line.strip("-"), wrong)) or "cannot read the flags"
        if "validation error" in told:  # pydantic's, which names the field and the reason behind it
            told = (
                told.partition("validation error")[2].partition(f"{type(config).__name__} ")[2].partition(" [type=")[0]
            )
        raise InputError(told.removeprefix("Error parsing ")) from None
    return difference(config.to_dict(), changed.to_dict())


def known_flags(config: Any) -> set[str]:
    """Every flag of a configuration: --seed, --optimizer.weight-decay, and --no- forms of switches."""

    def walk(values: dict[str, Any], prefix: str) -> set[str]:
        found: set[str] = set()
        for key, value in values.items():
            path = f"{prefix}{key.replace('_', '-')}"
            found |= walk(value, path + ".") if isinstance(value, dict) else {f"--{path}"}
            if isinstance(value, bool):
                head, _, tail = path.rpartition(".")
                found.add(f"--{head}.no-{tail}" if head else f"--no-{tail}")
        return found

    return walk(config.to_dict(), "")


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The nested values of `new` that differ from `old`."""
    changed = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            if inner := difference(old[key], value):
                changed[key] = inner
        elif old.get(key) != value:
            changed[key] = value
    return changed
