"""PNG figures over many runs or cells, from plain values: heat maps, time against loss, performance profiles."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from muonlab.report import series, style
from muonlab.report.figures import RC, empty, plain, save
from muonlab.studies.curves import PerformanceProfile

PANELS = 3
"""Heat maps in a row."""
LABELLED = 8
"""Points or lines of a figure that are named; more names would cover each other."""
Point = tuple[str, str, float, float]
"""(group, label, training seconds, loss)"""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (smaller is better), by rising first coordinate."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def pareto_plot(points: Sequence[Point], split: str, path: Path) -> None:
    """Final loss against training seconds, with the front that nothing beats; points on it are labelled."""
    kept = [p for p in points if math.isfinite(p[2]) and math.isfinite(p[3])]
    names = list(dict.fromkeys(group for group, *_ in kept))
    slots = style.slots(names)
    top = series.ceiling([loss for *_, loss in kept])
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axes = figure.subplots()
        front = [kept[index] for index in pareto_front([(x, y) for _, _, x, y in kept])]
        axes.step(
            [p[2] for p in front], [p[3] for p in front], where="post", color=style.MUTED, linewidth=1, linestyle="--"
        )
        for name in names:
            mine = [(x, min(y, top)) for group, _, x, y in kept if group == name]
            look: dict[str, Any] = {"color": style.PALETTE[slots[name]], "marker": style.MARKERS[slots[name]]}
            axes.plot(*zip(*mine), linestyle="", markersize=6, alpha=0.85, label=plain(name), **look)
        label_front(axes, front)
        axes.margins(0.08, 0.1)
        axes.set_title("Time against loss")
        axes.set_xlabel("training seconds, without evaluation and compilation")
        axes.set_ylabel(f"{split} split, nats per token")
        if kept:
            title = "dashed: nothing is\nfaster and better"
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title=title, alignment="left")
        else:
            empty(axes, "no run finished")
        save(figure, path)


def label_front(axes: Any, front: Sequence[Point]) -> None:
    """Names beside the points of a front, on the side where there is room, none on top of its neighbour."""
    low, high = axes.get_xlim()
    drawn: list[float] = []
    bottom, top = axes.get_ylim()
    for _, label, x, y in reversed(front[-LABELLED:]):
        if not label or any(abs(y - other) < 0.04 * (top - bottom) for other in drawn):
            continue
        drawn.append(y)
        left = x < (low + high) / 2
        axes.annotate(plain(style.clipped(label, 40)), (x, y), (7 if left else -7, -3), textcoords="offset points",
                      ha="left" if left else "right", va="top", fontsize=7.5, color=style.MUTED,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip


def profile_plot(profile: PerformanceProfile, path: Path, *, workloads: str = "workloads") -> None:
    """The performance profile: share of workloads solved within τ times the fastest submission's time, best score first."""
    ranked = sorted(profile.ratios, key=lambda name: -profile.scores[name])
    colors = style.colors(ranked[:LABELLED])
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(8.6, 4.4), layout="constrained")
        axes = figure.subplots()
        for place, name in reversed(list(enumerate(ranked))):
            taus = sorted({1.0, *(r for r in profile.ratios[name] if r <= profile.tau_max), profile.tau_max})
            shares = [100 * profile.share(name, tau) for tau in taus]
            look: dict[str, Any] = {"color": "#d4d8de", "linewidth": 1}
            if place < LABELLED:
                label = plain(f"{style.clipped(name, 40)}, score {profile.scores[name]:.2f}")
                look = {"color": colors[name], "linewidth": 2, "label": label}
            axes.step(taus, shares, where="post", zorder=3 - place / len(ranked), **look)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1, profile.tau_max)
        axes.set_ylim(-2, 102)
        axes.set_title("Performance profile")
        axes.set_xlabel("time to target, relative to the fastest")
        axes.set_ylabel(f"{workloads} solved, per cent")
        handles, labels = axes.get_legend_handles_labels()
        rest = len(ranked) - LABELLED
        title = f"grey: {rest} others" if rest > 0 else None
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title=title, alignment="left")
        save(figure, path)


def heatmap_plot(
    tables: Mapping[str, Mapping[tuple[Any, Any], float]], x: str, y: str, path: Path, *, title: str
) -> None:
    """Loss over two axes, a panel for each table, all on one scale: `tables[panel][x value, y value]` in nats.

    Values along an axis stand in the order of their size where they are numbers. Infinite losses (no run finished) are
    crossed. Colours show nats above the best, up to one.
    """
    xs = series.ordered(cell[0] for table in tables.values() for cell in table)
    ys = series.ordered(cell[1] for table in tables.values() for cell in table)
    finite = [loss for table in tables.values() for loss in table.values() if math.isfinite(loss)]
    best = min(finite, default=0.0)
    top = min(1.0, max(finite, default=1.0) - best) or 1e-3
    count = max(1, len(tables))
    columns = min(count, PANELS)
    rows = math.ceil(count / columns)
    names = [plain(style.clipped(style.label(value), 18)) for value in ys]
    margin = 1.6 + 0.08 * max(map(len, names), default=0)
    size = (margin + columns * (0.3 + 0.72 * max(2, len(xs))), 0.7 + rows * (0.9 + 0.5 * max(1, len(ys))))
    with matplotlib.rc_context({**RC, "axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for spare in panels.flat[len(tables) :]:
            spare.set_axis_off()
        image = None
        for index, (axes, (name, table)) in enumerate(zip(panels.flat, tables.items())):
            values = [[table.get((column, row), math.nan) - best for column in xs] for row in ys]
            shown = [[value if math.isfinite(value) else math.nan for value in row] for row in values]
            image = axes.imshow(shown, cmap="cividis_r", vmin=0, vmax=top, aspect="auto", origin="lower")
            for j, row in enumerate(values):
                for i, excess in enumerate(row):
                    text = "" if math.isnan(excess) else "×" if math.isinf(excess) else f"{excess + best:.3f}"
                    dark = math.isfinite(excess) and excess > 0.55 * top
                    axes.text(i, j, text, ha="center", va="center", fontsize=8, color="white" if dark else style.INK)
            axes.set_xticks(range(len(xs)), [plain(style.clipped(style.label(value), 12)) for value in xs])
            axes.set_yticks(range(len(ys)), names if index % columns == 0 else [""] * len(ys))
            axes.set_title(plain(style.clipped(name, 14 * max(2, len(xs)))), fontsize=9)
            axes.set_xlabel(plain(x) if index + columns >= len(tables) else "")
            axes.set_ylabel(plain(y) if index % columns == 0 else "")
        figure.suptitle(plain(title), x=0.01, ha="left", fontsize=10, fontweight="bold")
        if image is not None:
            figure.colorbar(image, ax=panels, label="nats above the best")
        save(figure, path)
