"""Tables for the terminal. Names and messages are shown as they are: nothing in them is read as markup."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from muonlab.errors import InputError
from muonlab.report import content, series, style
from muonlab.report.differences import differing
from muonlab.training.tracking import read_run

VERDICT_STYLES = {"better": "bold green", "worse": "bold red", "not distinguishable": "bold yellow"}


def comparison_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What a comparison found: trials, final runs, time to the other's loss, flags, and the verdicts last, in words."""
    yield trials_table(summary)
    yield finals_table(summary)
    if summary.get("to_target"):
        yield targets_table(summary)
    notes = {
        "stopped early": content.stopped_text(summary),
        "looks": content.looks_text(summary),
        "noise floor": content.noise_text(summary.get("noise"), "optimizers"),
    }
    for term, text in notes.items():
        if text:
            yield Text(f"{term}: {text}")
    for flag in summary.get("flags", ()):
        yield Text(f"! {flag}", style="yellow")
    for verdict in summary.get("verdicts", ()):
        yield Text(_sentence(verdict), style=VERDICT_STYLES.get(verdict["verdict"], "bold"))


def trials_table(summary: Mapping[str, Any]) -> Table:
    """Best trial of each learning rate and the width of the good range, one row per optimizer."""
    table = new_table(
        "tuning (tune split)", ["optimizer", "trials", "chosen", "loss", f"good range (within {series.DELTA} nats)"]
    )
    for name in summary["optimizers"]:
        trials = series.trials_of(summary, name)
        total = sum(entry["optimizer"] == name for entry in summary.get("trials", ()))
        choice = next((trial for trial in trials if trial.chosen), None)
        width = series.sensitivity(trials)
        text = "–"
        if width:
            least = "≥ " if width.open_low or width.open_high else ""
            text = f"lr {width.low:.3g} to {width.high:.3g}, {least}{width.octaves:.1f} octaves"
        chosen = style.values_text(choice.values) if choice else "–"
        add_row(table, name, total, chosen, style.loss(choice.loss) if choice else "–", text)
    return table


def finals_table(summary: Mapping[str, Any]) -> Table:
    """Final losses by seed, one row per optimizer."""
    table = new_table("final runs (report split)", ["optimizer", "mean loss", "by seed", "bits per byte", "training"])
    for name in summary["optimizers"]:
        runs = [entry for entry in summary.get("finals", ()) if entry["optimizer"] == name]
        losses = [entry.get("report_cross_entropy") for entry in runs]
        each = "  ".join(style.loss(x) if x is not None else e["status"] for x, e in zip(losses, runs))
        bits = style.short(_mean([entry.get("bits_per_byte") for entry in runs]))
        add_row(
            table, name, style.loss(_mean(losses)), each, bits, style.duration(_mean([e.get("seconds") for e in runs]))
        )
    return table


def targets_table(summary: Mapping[str, Any]) -> Table:
    """What each optimizer needed to reach the reference's final loss, and the reference theirs: the median over seeds."""
    reference = summary["optimizers"][-1]
    table = new_table(
        "to the other's final loss (median)", ["optimizer", "target", "updates", "tokens", "seconds", "reached"]
    )
    for entry in summary["to_target"]:
        if reference not in (entry["optimizer"], entry["target"].removesuffix("'s final loss")):
            continue
        target = f"{entry['target']}, {style.loss(entry['target_loss'])}"
        cost = [style.count(entry["updates"]), style.count(entry["tokens"]), style.duration(entry["seconds"])]
        add_row(
            table, entry["optimizer"], target, *(text if text != "–" else "never" for text in cost), entry["reached"]
        )
    return table


def runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run (read_run's values)."""
    table = new_table("", ["run", "status", "seed", "updates", "loss", "training", "corpus"])
    for run in runs:
        final = run.get("final") or {}
        losses = "  ".join(f"{style.loss(row.get('cross_entropy'))} {split}" for split, row in final.items()) or "–"
        seconds = style.duration(run["seconds"].get("training"))
        cells = [run["status"], run["seed"], style.count(run["updates"]), losses, seconds]
        add_row(table, Path(run["directory"]).name, *cells, run["data"].get("corpus", "–"))
    return table


def print_runs(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print the runs in `paths` as a table, unreadable ones below it with their reason."""
    console = console or Console(width=None if sys.stdout.isatty() else 200)  # names in a pipe stay in one piece
    if not paths:
        console.print("no runs yet; muonlab train or muonlab compare makes some")
        return
    runs, unreadable = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except InputError as error:
            unreadable.append(str(error))
    if runs:
        console.print(runs_table(runs))
    for reason in unreadable:
        console.print(Text(f"! {reason}", style="red"))


def runs_difference(paths: Sequence[Path]) -> str:
    """The keys in which the configurations of two or more runs differ, as aligned lines."""
    if len(paths) < 2:
        raise InputError("name two runs or more to compare: muonlab runs diff runs/A runs/B")
    runs = [read_run(path) for path in paths]
    rows = differing([run["config"] for run in runs], ignore=())
    if not rows:
        return "the configurations are the same"
    lines = [["", *(path.name for path in paths)], *([key, *map(style.short, row)] for key, row in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def size(number: float) -> str:
    """Bytes in decimal units: 512 B, 53.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def new_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table with the look of all; long cells fold."""
    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
    )
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def add_row(table: Table, *cells: Any) -> None:
    """A row of plain text: names are never read as markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [series.number(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else None


def _sentence(verdict: Mapping[str, Any]) -> str:
    return verdict.get("sentence") or f"{verdict['candidate']} against {verdict['reference']}: {verdict['verdict']}"
