"""PNG figures over many runs: a heat map over a grid of settings, time against loss, a performance profile."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from muonlab.report import series, style
from muonlab.report.differences import flat
from muonlab.report.figures import RC, empty, plain, save
from muonlab.studies.curves import PerformanceProfile


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (smaller is better), by rising first coordinate."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def pareto_plot(runs: Sequence[Mapping[str, Any]], split: str, path: Path) -> None:
    """Final loss against training seconds of finished runs (read_run's values), with the front that nothing beats."""
    kept = [run for run in runs if run["status"] == "finished" and math.isfinite(_loss(run, split))]
    names = list(dict.fromkeys(run["optimizer"] for run in kept))
    slots = style.slots(names)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        points = [(series.number(run["seconds"]["training"]), _loss(run, split)) for run in kept]
        front = [points[index] for index in pareto_front(points)]
        axes.step(
            [x for x, _ in front], [y for _, y in front], where="post", color=style.MUTED, linewidth=1, linestyle="--"
        )
        for name in names:
            mine = [point for run, point in zip(kept, points) if run["optimizer"] == name]
            look: dict[str, Any] = {"color": style.PALETTE[slots[name]], "marker": style.MARKERS[slots[name]]}
            axes.plot(*zip(*mine), linestyle="", markersize=6, label=plain(name), **look)
        axes.set_title("Time against loss")
        axes.set_xlabel("training seconds, without evaluation and compilation")
        axes.set_ylabel(f"{split} split, nats per token")
        if kept:
            axes.legend(title="dashed: nothing is faster and better", alignment="left")
        else:
            empty(axes, "no run finished")
        save(figure, path)


def profile_plot(profile: PerformanceProfile, path: Path) -> None:
    """The performance profile: share of workloads solved within τ times the fastest submission's time."""
    names = list(profile.ratios)
    colors = style.colors(names)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for name in names:
            taus = sorted({1.0, *(r for r in profile.ratios[name] if r <= profile.tau_max), profile.tau_max})
            shares = [100 * profile.share(name, tau) for tau in taus]
            label = f"{name}, score {profile.scores[name]:.2f}"
            axes.step(taus, shares, where="post", color=colors[name], linewidth=2, label=plain(label))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1, profile.tau_max)
        axes.set_ylim(-2, 102)
        axes.set_title("Performance profile")
        axes.set_xlabel("time to target, relative to the fastest")
        axes.set_ylabel("workloads solved, per cent")
        axes.legend(loc="lower right")
        save(figure, path)


def heatmap_plot(
    runs: Sequence[Mapping[str, Any]], x: str, y: str, split: str, path: Path, *, panel: str | None = None
) -> None:
    """Final loss over two configuration keys, a panel for each value of a third, all on one scale.

    Keys are dotted (`optimizer.lr`). The best of several runs in a cell counts (mean over seeds is the caller's to take);
    diverged cells are crossed. Colours show nats above the best, up to one.
    """
    tables: dict[Any, dict[tuple[Any, Any], float]] = {}
    for run in runs:
        config = flat(run["config"])
        table = tables.setdefault(config.get(panel) if panel else None, {})
        cell = (config.get(x), config.get(y))
        loss = _loss(run, split) if run["status"] == "finished" else math.inf
        table[cell] = min(table.get(cell, math.inf), loss if math.isfinite(loss) else math.inf)
    xs = sorted({cell[0] for table in tables.values() for cell in table if cell[0] is not None})
    ys = sorted({cell[1] for table in tables.values() for cell in table if cell[1] is not None})
    finite = [loss for table in tables.values() for loss in table.values() if math.isfinite(loss)]
    best = min(finite, default=0.0)
    top = min(1.0, max(finite, default=1.0) - best) or 1e-3
    with matplotlib.rc_context({**RC, "axes.grid": False}):
        count = max(1, len(tables))
        figure = Figure(figsize=(1.6 + count * (0.9 + 0.8 * len(xs)), 1.7 + 0.55 * len(ys)), layout="constrained")
        image = None
        for axes, (value, table) in zip(figure.subplots(1, count, squeeze=False)[0], sorted(tables.items(), key=str)):
            grid = [[table.get((column, row), math.nan) - best for column in xs] for row in ys]
            image = axes.imshow(grid, cmap="cividis_r", vmin=0, vmax=top, aspect="auto", origin="lower")
            for j, row in enumerate(grid):
                for i, excess in enumerate(row):
                    text = "" if math.isnan(excess) else "×" if math.isinf(excess) else f"{excess + best:.3f}"
                    dark = math.isfinite(excess) and excess > 0.55 * top
                    axes.text(i, j, text, ha="center", va="center", fontsize=8, color="white" if dark else style.INK)
            axes.set_xticks(range(len(xs)), [style.short(v, 3) for v in xs])
            axes.set_yticks(range(len(ys)), [style.short(v, 3) for v in ys])
            axes.set_xlabel(plain(x))
            axes.set_title(plain(f"{panel} {style.short(value)}") if panel else f"{split} loss")
        figure.axes[0].set_ylabel(plain(y))
        if image is not None:
            figure.colorbar(image, ax=figure.axes, label="nats above the best")
        save(figure, path)


def _loss(run: Mapping[str, Any], split: str) -> float:
    return series.number(((run.get("final") or {}).get(split) or {}).get("cross_entropy"))
