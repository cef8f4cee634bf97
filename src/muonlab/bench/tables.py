"""Results of benchmarks as tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]


def heading(result: Row) -> str:
    """The machine in two lines."""
    rates, versions = result["rates"], result["versions"]
    return escape(
        f"{result['device']}, {result['threads']} threads, torch {versions['torch']}, commit {versions['commit']}\n"
        f"measured: copy {rates['copy_bytes_per_second'] / 1e12:.3f} TB/s, "
        f"product {rates['matmul_flops_per_second'] / 1e12:.3f} TFLOP/s"
    )


def step_table(name: str, found: Sequence[Row]) -> Table:
    """Times of one set, what could not be measured below."""
    floors = {row["rule"]: row["floor_ms"] for row in found if "rule" in row}
    text = ", ".join(f"{rule} {value:.3g}" for rule, value in floors.items() if rule != "iteration")
    table = _table(f"{name}: optimizer.step(), ms, median (quartiles); floor {text} ms")
    columns = (
        "optimizer",
        "gradients stay",
        "fresh",
        "host",
        "in a row",
        "graph alone",
        "x floor",
        "extra",
        "first step",
    )
    for column in (*columns, "program"):
        table.add_column(column, justify="left" if column in ("optimizer", "program") else "right", overflow="fold")
    for row in found:
        if _excuse(table, row, row["peer"]):
            continue
        stay, fresh, graph = row["gradients_stay"], row["gradients_fresh"], row["graph_alone"]
        table.add_row(
            row["peer"],
            interval(stay["alone_ms"]),
            interval(fresh["alone_ms"]) if fresh else "",
            f"{stay['host_ms']['median']:.3g}" if stay["host_ms"] else "",
            f"{stay['in_a_row_ms']:.3g}",
            f"{graph['alone_ms']['median']:.3g}" if graph else "",
            f"{row['gradients_stay_over_floor']:.2f}",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e9:.2f} GB",
            f"{row['first_step_seconds']:.1f} s",
            escape(row["program"]),
        )
    return table


def train_table(name: str, found: Sequence[Row]) -> Table:
    """Updates of one model, ours and plain."""
    good = next((row for row in found if "tokens_per_update" in row), None)
    sizes = f"{good['tokens_per_update']:,} tokens an update, vocabulary {good['vocab_size']:,}" if good else ""
    table = _table(f"{name}: {sizes}, ms, median (quartiles)")
    columns = ("side", "program", "optimizer", "update", "tokens/s", "MFU*", "forward", "backward", "step", "of plain")
    for column in (*columns, "ready", "again"):
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for row in found:
        label = row["program"] if row.get("asked", row["program"]) == row["program"] else f"{row['program']}!"
        if _excuse(table, row, row["side"], label, row["optimizer"]):
            continue
        split = row["split_ms"] or {}
        mfu = f"{row['mfu_of_measured']:.1%}"
        table.add_row(
            row["side"],
            label,
            row["optimizer"],
            interval(row["seconds_per_update"], 1e3),
            f"{row['tokens_per_second']:,.0f}",
            mfu if row["mfu_of_stated"] is None else f"{mfu}, {row['mfu_of_stated']:.1%}",
            *(f"{split[phase]:.3g}" if phase in split else "" for phase in ("forward", "backward", "optimizer")),
            f"{row['ratio_to_plain']['median']:.2f}" if row["ratio_to_plain"] else "",
            f"{row['first_update_ready_seconds']:.1f} s",
            "" if row["second_run_ready_seconds"] is None else f"{row['second_run_ready_seconds']:.1f} s",
        )
    notices = [f"! {row['notice']}" for row in found if row.get("notice")]
    legend = escape("\n".join(["* of the measured rate of products, and of the chip's stated peak", *notices]))
    table.caption = legend if table.caption is None else f"{legend}\n{table.caption}"
    return table


def profile_table(row: Row, most: int = 20) -> Table:
    """The most expensive kernels of one update, and the longest waits."""
    name = f"{row['model']} {row['program']} {row['optimizer']}"
    if "failed" in row:
        table = _table(name)
        table.add_column("failed")
        table.add_row(escape(row["failed"]))
        return table
    device = f", device busy {row['busy_ms']:.3g}, idle {row['idle_ms']:.3g}" if row["busy_ms"] is not None else ""
    table = _table(f"{name}: {row['wall_ms']:.3g} ms an update under the profiler{device}")
    for column in ("kernel", "ms", "share", "launches"):
        table.add_column(column, justify="left" if column == "kernel" else "right", overflow="ellipsis", no_wrap=True)
    for kernel in row["kernels"][:most]:
        table.add_row(
            escape(kernel["name"]), f"{kernel['ms']:.4f}", f"{kernel['share']:.1%}", f"{kernel['launches']:g}"
        )
    rest = row["kernels"][most:]
    if rest:
        took = [sum(kernel[key] for kernel in rest) for key in ("ms", "share", "launches")]
        table.add_row(f"{len(rest)} others", f"{took[0]:.4f}", f"{took[1]:.1%}", f"{took[2]:g}")
    waits = [f"waits {wait['ms']:.3f} ms after {wait['after'][:50]} for {wait['before'][:50]}" for wait in row["gaps"]]
    table.caption = escape("\n".join([*([row["notice"]] if row["notice"] else []), *waits])) or None
    return table


def interval(values: dict[str, float], unit: float = 1.0) -> str:
    """median (quartile-quartile)."""
    middle, low, high = (f"{unit * values[key]:.3g}" for key in ("median", "quartile_low", "quartile_high"))
    return f"{middle} ({low}-{high})"


def _excuse(table: Table, row: Row, name: str, *more: str) -> bool:
    reason = row.get("failed") or row.get("skipped")
    if reason is None:
        return False
    if "failed" in row:
        table.add_row(name, *more, *[""] * (len(table.columns) - 1 - len(more)), style="dim")
    # the reason goes below the table, so that it does not stretch a column of numbers
    told = escape(f"{name}: {'failed: ' if 'failed' in row else ''}{reason}")
    table.caption = told if table.caption is None else f"{table.caption}\n{told}"
    return True


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", caption_justify="left")
