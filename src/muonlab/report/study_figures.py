"""PNG figures of a study: curves, sensitivity to logarithmic axes, all cells compared, effects of the other axes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from muonlab.report import series, style
from muonlab.report.figures import RC, empty, lr_ticks, plain, save
from muonlab.report.series import Curve
from muonlab.report.study_axes import Effect, Sweep

OTHERS = "#d4d8de"
ROWS = 40
"""Cells in the comparison of all: beyond that nobody reads a picture."""
FEW = 4
"""Lines up to which intervals are drawn: more would only cover each other."""
NAME = 46
"""Letters of a name before it is cut."""


def curves_plot(
    curves: Mapping[str, Curve], colors: Mapping[str, str], others: Sequence[Curve], split: str, path: Path
) -> None:
    """Validation loss against updates and against time: mean and range over seeds of the named cells, the rest in grey."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12.5, max(4.2, 1.2 + 0.24 * len(curves))), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2, sharey=True), ("updates", "seconds")):
            for curve in others:
                axes.plot(getattr(curve, key), curve.mean, color=OTHERS, linewidth=0.8, zorder=1)
            for name, curve in curves.items():
                xs = getattr(curve, key)
                axes.fill_between(xs, curve.low, curve.high, color=colors[name], alpha=0.18, linewidth=0, zorder=2)
                label = f"{style.clipped(name, NAME)}, {style.loss(curve.mean[-1])}"
                axes.plot(xs, curve.mean, color=colors[name], label=plain(label), zorder=3)
            axes.set_title(f"Loss against {'training time' if key == 'seconds' else 'updates'}")
            axes.set_xlabel("training seconds" if key == "seconds" else "updates")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            if not curves:
                empty(axes, "no run finished")
        limits = series.zoom([*curves.values(), *others])
        if limits:
            figure.axes[0].set_ylim(limits)
        figure.axes[0].set_ylabel(f"{split} split, nats per token")
        if curves:
            title = "mean of seeds, band: lowest to highest" + (f"\ngrey: {len(others)} other cells" if others else "")
            handles = figure.axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside right upper", title=title, alignment="left", fontsize=8)
        save(figure, path)


def sensitivity_plot(sweeps: Sequence[Sweep], path: Path) -> None:
    """Loss against each logarithmic axis, a panel each: the lines of groups and settings, their good range and optimum."""
    names = list(dict.fromkeys(line.axis for line in sweeps))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 4.8 * max(1, len(names))), layout="constrained")
        for axes, name in zip(figure.subplots(max(1, len(names)), 1, squeeze=False)[:, 0], names):
            _sweep_panel(axes, name, [line for line in sweeps if line.axis == name])
        save(figure, path)


def _sweep_panel(axes: Axes, name: str, lines: Sequence[Sweep]) -> None:
    shown = lines[: len(style.PALETTE)]
    colors = style.colors([line.label for line in shown])
    slots = style.slots([line.label for line in shown])
    losses = [point["loss"] for line in lines for point in line.points]
    axes.set_title(f"Sensitivity to {name}")
    if not any(map(math.isfinite, losses)):
        empty(axes, "no run finished")
        return
    top, bottom = series.ceiling(losses), min(loss for loss in losses if math.isfinite(loss))
    span = (top - bottom) or 0.1
    axes.set_xscale("log", base=2)
    failed = False
    for place, line in reversed(list(enumerate(lines))):
        named = place < len(shown)
        color = colors[line.label] if named else OTHERS
        good = [point for point in line.points if math.isfinite(point["loss"])]
        xs, ys = [point["x"] for point in good], [min(point["loss"], top) for point in good]
        marker = style.MARKERS[slots[line.label]] if named else ""
        label = plain(_sweep_label(line)) if named else None
        axes.plot(
            xs, ys, color=color, marker=marker, markersize=5, linewidth=1.3, label=label, zorder=3 if named else 1
        )
        if not named:
            continue
        for point in good:
            if len(lines) <= FEW and math.isfinite(point["half"]) and point["loss"] <= top:
                axes.plot([point["x"]] * 2, [max(bottom - span, point["loss"] - point["half"]), point["loss"] + point["half"]],
                          color=color, linewidth=3, alpha=0.25, solid_capstyle="butt")  # fmt: skip
        for point in (point for point in line.points if point["failed"]):
            failed = True
            axes.plot(point["x"], top + 0.1 * span, color=color, marker="x", markersize=7, mew=2, linestyle="")
        if line.found:
            height = bottom - (0.1 + 0.055 * place) * span
            axes.plot(
                [line.found["low"], line.found["high"]], [height] * 2, color=color, linewidth=4, solid_capstyle="butt"
            )
            optimum = line.found.get("optimum")
            if optimum and line.points[0]["x"] <= optimum["lr"] <= line.points[-1]["x"]:
                axes.plot(optimum["lr"], height, marker="d", markersize=7, color="white", mec=color, mew=1.6, zorder=4)
    bars = sum(line.found is not None for line in shown)
    axes.set_ylim(bottom - (0.16 + 0.055 * bars) * span, top + (0.18 if failed else 0.06) * span)
    lr_ticks(axes, sorted({point["x"] for line in lines for point in line.points}))
    note = f"bars below: within {series.DELTA} nats of the best; diamond: fitted optimum"
    note += "; shade: 95 % interval" if len(lines) <= FEW else ""
    axes.set_xlabel(plain(f"{name}\n{note}{'; ×: a seed failed' if failed else ''}"), fontsize=8.5)
    axes.set_ylabel("report split, nats per token")
    more = len(lines) - len(shown)
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    assert figure is not None
    axes.legend(handles[::-1], labels[::-1], title=f"grey: {more} other lines" if more > 0 else None, alignment="left",
                loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)  # fmt: skip


def _sweep_label(line: Sweep) -> str:
    text = style.clipped(line.label, NAME)
    if line.found:
        least = "≥ " if line.found["open_low"] or line.found["open_high"] else ""
        text += f"\n  best {line.found['best']:.3g}, good over {least}{line.found['octaves']:.1f} octaves"
    return text


def performance_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All cells, best first: loss with its seeds and interval, perplexity, accuracy, training time."""
    kept = [row for row in rows if math.isfinite(row["loss"])][:ROWS]
    colors = style.colors(list(dict.fromkeys(row["group"] for row in rows)))
    panels = (
        ("loss", "loss, nats per token\nsmall: seeds; band: 95 %"),
        ("perplexity", "perplexity"),
        ("accuracy", "accuracy, per cent"),
        ("seconds", "training seconds"),
    )
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12.5, 1.5 + 0.26 * max(4, len(kept))), layout="constrained")
        all_axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.7, 1, 1, 1))
        places = list(range(len(kept)))[::-1]
        for axes, (key, label) in zip(all_axes, panels):
            scale = 100 if key == "accuracy" else 1
            values = [scale * row[key] for row in kept]
            finite = [value for value in values if math.isfinite(value)]
            room = {"loss": 1.5, "perplexity": 4 * min(finite, default=1.0)}.get(key, math.inf)
            top = series.ceiling(finite, room)
            top = math.inf if top >= max(finite, default=0.0) else top  # a very bad cell is an arrow at the edge
            if key == "loss":
                _seeds(axes, places, kept, [colors[row["group"]] for row in kept], top)
            shown = [(v, y, colors[r["group"]]) for v, y, r in zip(values, places, kept) if v <= top]
            if shown:
                xs, ys, hues = map(list, zip(*shown))
                look = {"marker": "|", "s": 120, "color": style.INK} if key == "loss" else {"s": 26, "color": hues}
                axes.scatter(xs, ys, zorder=3, **look)
            for value, y, row in ((v, y, r) for v, y, r in zip(values, places, kept) if v > top):
                axes.plot(top, y, marker=">", color=colors[row["group"]], markersize=6, linestyle="")
                axes.annotate(style.short(value, 3), (top, y), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7, color=style.MUTED)  # fmt: skip
            axes.set_xlabel(label)
            axes.grid(True, axis="y", color="#f2f3f5")
            axes.xaxis.set_major_locator(MaxNLocator(4))
            if not finite:
                empty(axes, "not recorded" if kept else "no run finished")
        left = all_axes[0]
        if kept:
            left.set_yticks(places, [plain(style.clipped(row["cell"], NAME) + (" (reference)" if row["reference"] else "")) for row in kept])  # fmt: skip
            left.set_ylim(-0.7, len(kept) - 0.3)
            for tick, row in zip(left.get_yticklabels(), kept):
                tick.set_color(colors[row["group"]])
        more = len(rows) - len(kept)
        title = "All cells, best first" + (f" ({more} more are not shown: in runs.csv)" if more else "")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        save(figure, path)


def _seeds(
    axes: Axes, places: Sequence[int], rows: Sequence[Mapping[str, Any]], colors: Sequence[str], top: float
) -> None:
    """Intervals as bands and the single seeds as points, those above `top` left out."""
    bands = [
        (y, row["interval"][0], min(row["interval"][1], top), color)
        for y, row, color in zip(places, rows, colors)
        if math.isfinite(row["interval"][0]) and row["loss"] <= top
    ]
    if bands:
        ys, lows, highs, hues = map(list, zip(*bands))
        axes.hlines(ys, lows, highs, colors=hues, linewidth=6, alpha=0.25)
    points = [(x, y, color) for y, row, color in zip(places, rows, colors) for x in row["losses"] if x <= top]
    if points:
        xs, ys, hues = map(list, zip(*points))
        axes.scatter(xs, ys, s=16, color=hues, alpha=0.9, zorder=2)


def effect_plot(effect: Effect, path: Path) -> None:
    """What one axis does to quality, memory and time, a line for each group; over the other axes the best cell counts."""
    slots = style.slots(list(effect.groups))
    panels = (
        ("loss", "report split, nats per token", 1.0),
        ("memory", "peak memory, GB", 1e9),
        ("seconds", "training seconds", 1.0),
    )
    ticks = [style.clipped(style.label(value), 18) for value in effect.values]
    turned = len(" ".join(ticks)) > 45
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(12, 4.0 if not turned else 4.8), layout="constrained")
        for axes, (key, label, unit) in zip(figure.subplots(1, 3), panels):
            drawn = False
            for name, points in effect.groups.items():
                kept = [(i, points[i]) for i in sorted(points) if math.isfinite(points[i][key])]
                xs, ys = [i for i, _ in kept], [row[key] / unit for _, row in kept]
                color = style.PALETTE[slots[name]]
                axes.plot(xs, ys, color=color, marker=style.MARKERS[slots[name]], markersize=6, label=plain(name))
                if key == "loss":
                    for i, row in kept:
                        if math.isfinite(row["half"]):
                            axes.plot(
                                [i, i], row["interval"], color=color, linewidth=4, alpha=0.25, solid_capstyle="butt"
                            )
                drawn |= bool(kept)
            axes.set_xticks(range(len(ticks)), [plain(tick) for tick in ticks], rotation=35 if turned else 0, ha="right" if turned else "center")  # fmt: skip
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.08)
            axes.set_title(label)
            axes.set_xlabel(plain(effect.axis))
            if not drawn:
                empty(axes, "not recorded")
        if len(effect.groups) > 1:
            figure.axes[0].legend()
        save(figure, path)
