"""PNG figures of one run and of a comparison (matplotlib's object interface; no state shared with a user's pyplot)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from muonlab.report import series, style
from muonlab.report.reading import finals_of
from muonlab.training.tracking import replace_file

RC: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign in a name starts no formula
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": style.MUTED,
    "axes.labelcolor": style.INK,
    "text.color": style.INK,
    "xtick.color": style.MUTED,
    "ytick.color": style.MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9ebee",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
SPLITS: dict[str, dict[str, Any]] = {
    "tune": {"color": "#0072B2", "marker": "o", "markersize": 4},
    "report": {"color": "#D55E00", "marker": "s", "markersize": 6, "markerfacecolor": "none", "linestyle": "--"},
}
LR_KIND_COLORS = {
    "hidden": "#0072B2",
    "embedding": "#D55E00",
    "head": "#009E73",
    "vector": "#CC79A7",
    "router": "#E69F00",
}


def plain(text: Any) -> str:
    """Text for a legend, which would hide what begins with an underscore."""
    return f" {text}" if str(text).startswith("_") else str(text)


def run_plot(run: Mapping[str, Any], path: Path) -> None:
    """`metrics_plot.png`: loss against time, loss against updates, accuracy, learning rate. `run` is read_run's value."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        (by_time, by_update), (accuracy, rate) = figure.subplots(2, 2)
        _losses(by_time, run, "seconds", "training time in seconds, without evaluation and compilation")
        _losses(by_update, run, "update", "updates")
        _accuracy(accuracy, run)
        _learning_rate(rate, run)
        head = f"{run['name']}  ·  {run['optimizer']}, seed {run['seed']}"
        if run["status"] != "finished":
            head += f"  ·  {run['status'].upper()}"
            if run.get("message"):
                head += f": {_clip(run['message'], 90)}"
        figure.suptitle(plain(head), x=0.01, ha="left", fontsize=11, fontweight="bold")
        save(figure, path)


def comparison_plot(summary: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """`comparison_plot.png`: validation loss of the final runs, tuning trials against learning rate, paired differences.

    `runs` maps the directories that the summary names to read_run's values; missing ones are left out.
    """
    with matplotlib.rc_context(RC):
        pairs = max(1, len(summary.get("verdicts", ())))
        figure = Figure(figsize=(13, max(4.4, 2.2 + 0.95 * pairs)), layout="constrained")
        grid = figure.add_gridspec(1, 3, width_ratios=(1, 1.08, 1))
        _curves(figure.add_subplot(grid[0]), summary, runs)
        _sensitivity(figure.add_subplot(grid[1]), summary)
        _differences(figure.add_subplot(grid[2]), summary)
        figure.suptitle(plain(summary["question"]), x=0.008, ha="left", fontsize=12, fontweight="bold")
        save(figure, path)


# --- panels of one run -----------------------------------------------------------------------------------------------


def _losses(axes: Axes, run: Mapping[str, Any], key: str, label: str) -> None:
    train = [
        (row[key], series.number(row["loss"]))
        for row in run["history"].get("train", ())
        if math.isfinite(series.number(row["loss"]))
    ]
    drawn = bool(train)
    if train:
        axes.plot(*zip(*train), color="#9aa4b1", linewidth=0.9, label="training batch")
    for split, look in SPLITS.items():
        rows = series.evaluations(run, split)
        if rows:
            xs, ys = [row[key] for row in rows], [row["cross_entropy"] for row in rows]
            axes.plot(xs, ys, **look, label=f"{split} split, last {style.loss(ys[-1])}")
            drawn = True
    axes.set_title(f"Loss against {'time' if key == 'seconds' else 'updates'}")
    axes.set_xlabel(label)
    axes.set_ylabel("cross-entropy, nats per token")
    if drawn:
        axes.legend()
    else:
        empty(axes, "no finite loss was recorded")


def _accuracy(axes: Axes, run: Mapping[str, Any]) -> None:
    drawn = False
    for split, look in SPLITS.items():
        rows = [r for r in series.evaluations(run, split) if math.isfinite(series.number(r.get("accuracy")))]
        if rows:
            ys = [100 * row["accuracy"] for row in rows]
            label = f"{split} split, last {ys[-1]:.1f} %"
            axes.plot([r["update"] for r in rows], ys, **look, label=label)
            drawn = True
    axes.set_title("Accuracy of the next token")
    axes.set_xlabel("updates")
    axes.set_ylabel("per cent")
    if drawn:
        axes.legend(loc="lower right")
    else:
        empty(axes, "no evaluation yet")


def _learning_rate(axes: Axes, run: Mapping[str, Any]) -> None:
    rows = run["history"].get("train", ())
    kinds: dict[tuple[float, ...], list[str]] = {}  # groups that share a learning rate share a line
    for kind in dict.fromkeys(kind for row in rows for kind in row.get("lr", ())):
        kinds.setdefault(tuple(series.number(row["lr"].get(kind)) for row in rows), []).append(kind)
    for rates, names in kinds.items():
        color = next((LR_KIND_COLORS[kind] for kind in LR_KIND_COLORS if kind in names), style.INK)
        axes.plot([row["update"] for row in rows], rates, color=color, label=plain(", ".join(names)))
    axes.set_title("Learning rate as applied")
    axes.set_xlabel("updates")
    if kinds:
        axes.set_ylim(bottom=0)
        axes.legend(title="parameters", alignment="left")
    else:
        empty(axes, "no update was made")


# --- panels of a comparison ------------------------------------------------------------------------------------------


def _curves(axes: Axes, summary: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(summary["optimizers"])
    color, slots = style.colors(names), style.slots(names)
    finals = {name: finals_of(summary, runs, name) for name in names}
    split = series.judged_split([run for group in finals.values() for run in group])
    curves = {name: curve for name in names if (curve := series.mean_curve(finals[name], split))}
    for name, curve in curves.items():
        axes.fill_between(curve.updates, curve.low, curve.high, color=color[name], alpha=0.2, linewidth=0)
        seeds = f"{len(curve.seeds)} seed{'s' if len(curve.seeds) != 1 else ''}"
        label = f"{name}, {style.loss(curve.mean[-1])} ({seeds})"
        marker = style.MARKERS[slots[name]]
        axes.plot(curve.updates, curve.mean, color=color[name], marker=marker, markersize=3.5, label=plain(label))
    axes.set_title("a  Final runs: validation loss")
    axes.set_xlabel("updates")
    axes.set_ylabel(f"{split} split, nats per token")
    if not curves:
        empty(axes, "no final run finished")
        return
    limits = series.zoom(list(curves.values()))
    if limits:
        axes.set_ylim(limits)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.legend(title="mean, band: lowest to highest seed", alignment="left")


def _sensitivity(axes: Axes, summary: Mapping[str, Any]) -> None:
    names = list(summary["optimizers"])
    color, slots = style.colors(names), style.slots(names)
    trials = {name: series.trials_of(summary, name) for name in names}
    losses = [trial.loss for group in trials.values() for trial in group]
    axes.set_title("b  Tuning: loss against learning rate")
    axes.set_ylabel("tune split, nats per token")
    if not any(math.isfinite(loss) for loss in losses):
        empty(axes, "no trial finished")
        return
    bottom, top = min(loss for loss in losses if math.isfinite(loss)), series.ceiling(losses)
    span = (top - bottom) or 0.1
    axes.set_xscale("log", base=2)
    bars = [name for name in names if series.sensitivity(trials[name])]
    for name in names:
        style_: dict[str, Any] = {"color": color[name], "marker": style.MARKERS[slots[name]]}
        lrs, best = series.best_by_lr(trials[name])
        axes.plot(lrs, [min(value, top) for value in best], color=color[name], linewidth=1.2, alpha=0.75)
        swept = series.sweep(trials[name])
        for trial in trials[name]:
            if not math.isfinite(trial.loss):
                axes.plot(trial.lr, top + 0.13 * span, color=color[name], marker="x", markersize=7, mew=2, linestyle="")
            elif trial.loss > top:
                axes.plot(trial.lr, top + 0.05 * span, color=color[name], marker=6, markersize=6, linestyle="")
            else:
                filled: dict[str, Any] = {} if trial in swept else {"markerfacecolor": "white"}
                axes.plot(trial.lr, trial.loss, markersize=5, linestyle="", **style_, **filled)
            if trial.chosen and math.isfinite(trial.loss):
                axes.plot(trial.lr, min(trial.loss, top), "o", markersize=13, mfc="none", mec=style.INK, mew=1.3)
    for place, name in enumerate(bars):
        width = series.sensitivity(trials[name])
        assert width is not None
        height = bottom - (0.2 + 0.1 * place) * span
        axes.plot([width.low, width.high], [height, height], color=color[name], linewidth=5, solid_capstyle="butt")
        least = "≥ " if width.open_low or width.open_high else ""
        text = f"{name}: {least}{width.octaves:.1f} octaves"
        middle = math.sqrt(width.low * width.high)
        share = axes.transAxes.inverted().transform(axes.transData.transform((middle, height)))[0]
        anchor, where = (
            (middle, "center") if 0.2 < share < 0.8 else (width.low, "left") if share < 0.5 else (width.high, "right")
        )
        axes.annotate(plain(text), (anchor, height), (0, 4), textcoords="offset points", ha=where, va="bottom",
                      fontsize=8, color=color[name])  # fmt: skip
    failed = any(not math.isfinite(loss) for loss in losses)
    axes.set_ylim(bottom - (0.14 + 0.1 * max(1, len(bars))) * span, top + (0.22 if failed else 0.1) * span)
    ticks = sorted({trial.lr for group in trials.values() for trial in series.sweep(group)})
    lr_ticks(axes, ticks)
    note = f"ring: chosen, hollow: other knobs moved{', ×: diverged' if failed else ''}"
    note += f"\nbar: range within {series.DELTA} nats of the best"
    axes.set_xlabel(f"learning rate of the hidden matrices\n{note}", fontsize=8.5)


def _differences(axes: Axes, summary: Mapping[str, Any]) -> None:
    verdicts = [v for v in summary.get("verdicts", ()) if v.get("differences")]
    axes.set_title("c  Verdict: paired differences by seed")
    if not verdicts:
        empty(axes, "no verdict")
        return
    color = style.colors(list(summary["optimizers"]))
    for row, verdict in enumerate(verdicts):
        y = len(verdicts) - 1 - row
        mine = color.get(verdict["candidate"], style.INK)
        low, high = (series.number(bound) for bound in verdict["interval"])
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [y, y], color=mine, linewidth=6, alpha=0.3, solid_capstyle="butt")
        values = [series.number(value) for value in verdict["differences"]]
        offsets = _spread(len(values))
        axes.plot(values, [y + offset for offset in offsets], "o", color=mine, markersize=5, alpha=0.9)
        mean = series.number(verdict["mean"])
        axes.plot([mean], [y], "|", color=style.INK, markersize=18, markeredgewidth=2)
        headline = f"{verdict['candidate']} − {verdict['reference']}: {verdict['verdict'] or 'no verdict'}"
        over_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(plain(headline), (0.02, y), (0, 18), xycoords=("axes fraction", "data"), va="bottom", bbox=over_line,
                      textcoords="offset points", fontweight="bold", fontsize=9.5,
                      color=style.VERDICT_COLORS.get(verdict["verdict"], style.INK))  # fmt: skip
        below = f"mean {style.signed(mean)}"
        if math.isfinite(low) and math.isfinite(high):
            below += f", {verdict['confidence']:.0%} interval {style.signed(low)} to {style.signed(high)}"
        axes.annotate(plain(below), (0.02, y), (0, -18), xycoords=("axes fraction", "data"), va="top", bbox=over_line,
                      textcoords="offset points", fontsize=8, color=style.MUTED)  # fmt: skip
    axes.axvline(0, color=style.INK, linewidth=1)
    axes.set_ylim(-0.75, len(verdicts) - 1 + 0.75)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    limit = max(abs(bound) for bound in axes.get_xlim())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.12 * limit), max(high, 0.12 * limit))
    axes.set_xlabel(
        "difference on the report split, nats per token\n← first is better    ·    first is worse →", fontsize=8.5
    )


# --- helpers ---------------------------------------------------------------------------------------------------------


def lr_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """Label the learning rates that were tried, those left out that would touch their neighbour's label."""
    low, high = (math.log2(bound) for bound in axes.get_xlim())
    kept: list[float] = []
    for tick in ticks:
        if not kept or (math.log2(tick) - math.log2(kept[-1])) > 0.15 * (high - low):
            kept.append(tick)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _spread(n: int) -> list[float]:
    """Small vertical offsets so that equal points do not hide each other."""
    return [0.0] if n == 1 else [0.16 * (i / (n - 1) - 0.5) for i in range(n)]


def empty(axes: Axes, text: str) -> None:
    """A panel that says why it shows nothing."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=style.MUTED)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    replace_file(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=150))
