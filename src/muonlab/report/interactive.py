"""Figures of the HTML page as plain plotly descriptions (dictionaries): nothing here needs plotly itself.

Each trace carries `meta.group`, and `meta.cell` in a study, by which the page's filter finds it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from muonlab.report import series, style
from muonlab.report.reading import Material

Trace = dict[str, Any]
MOST_POINTS = 20_000
"""Points of one figure, whatever the number of runs: pages go by mail."""
MOST_SEEDS = 60
"""Runs up to which every seed is a line of its own."""
FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif",
    "size": 13,
    "color": style.INK,
}
AXIS = {
    "gridcolor": "#e9ebee",
    "zeroline": False,
    "linecolor": style.MUTED,
    "ticks": "outside",
    "tickcolor": style.RULE,
    "automargin": True,
    "fixedrange": False,
}


def figure(traces: Sequence[Trace], x: str, y: str, **layout: Any) -> dict[str, Any]:
    """A plotly figure with the page's look; `layout` entries named xaxis and yaxis extend the axes."""
    axes = {
        "xaxis": {**AXIS, "title": {"text": x}, **layout.pop("xaxis", {})},
        "yaxis": {**AXIS, "title": {"text": y}, **layout.pop("yaxis", {})},
    }
    base = {
        "font": FONT,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 56, "r": 12, "t": 28, "b": 56},
        "height": 400,
        "hovermode": "closest",
        "showlegend": False,
        "hoverlabel": {"bgcolor": "white", "bordercolor": style.RULE, "font": {**FONT, "size": 12}},
    }
    return {"data": list(traces), "layout": {**base, **axes, **layout}}


def drawn(**made: dict[str, Any] | None) -> dict[str, Any]:
    """Figures by the id of their place, those left out that have nothing to show."""
    return {place: found for place, found in made.items() if found}


def text(value: Any) -> str:
    """Text for plotly, which reads a few HTML tags in labels."""
    return escape(str(value), quote=False)


@dataclass(frozen=True, kw_only=True)
class Line:
    """How one optimizer or cell is drawn."""

    name: str
    group: str
    color: str
    symbol: str = "circle"
    cell: str | None = None
    """Set where a group has several: the page's search finds it by this."""
    strong: bool = True
    """Whether it gets a band and its seeds; a weak line is its mean alone."""

    @property
    def meta(self) -> dict[str, Any]:
        return {"group": self.group} | ({"cell": self.cell} if self.cell is not None else {})


def loss_curves(curves: Sequence[tuple[Line, series.Curve]], split: str) -> dict[str, Any] | None:
    """Validation loss: the mean of each line, its band, and every seed as a thin line; the first in front."""
    if not curves:
        return None
    few = all(line.strong for line, _ in curves) and sum(len(curve.seeds) for _, curve in curves) <= MOST_SEEDS
    points = max(20, min(250, MOST_POINTS // sum(4 if line.strong else 1 for line, _ in curves)))
    traces: list[Trace] = []
    for line, curve in reversed(curves):
        traces += _curve_traces(line, curve.thinned(points), each=few)
    limits = series.zoom([curve for _, curve in curves])
    return figure(traces, "updates", f"{split} split, nats per token", yaxis={"range": limits} if limits else {})


def _curve_traces(line: Line, curve: series.Curve, each: bool) -> list[Trace]:
    xs: dict[str, list[Any]] = {"updates": curve.updates, "tokens": curve.tokens, "seconds": _rounded(curve.seconds, 2)}
    there_and_back = {key: [*values, *reversed(values)] for key, values in xs.items()}
    traces: list[Trace] = []
    if line.strong and len(curve.seeds) > 1:
        traces.append(
            {
                "x": there_and_back["updates"],
                "y": _rounded([*curve.high, *reversed(curve.low)]),
                "fill": "toself",
                "fillcolor": _faint(line.color),
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "meta": {**line.meta, "x": there_and_back},
            }
        )
    for seed, losses in zip(curve.seeds, curve.each if each and len(curve.seeds) > 1 else ()):
        traces.append(
            {
                "x": curve.updates,
                "y": _rounded(losses),
                "mode": "lines",
                "line": {"color": line.color, "width": 0.7},
                "opacity": 0.6,
                "hovertemplate": f"{text(line.name)}, seed {text(seed)}: %{{y:.4f}} nats<extra></extra>",
                "meta": {**line.meta, "x": xs},
            }
        )
    traces.append(
        {
            "x": curve.updates,
            "y": _rounded(curve.mean),
            "name": text(line.name),
            "mode": "lines+markers" if len(curve.updates) <= 60 else "lines",
            "line": {"color": line.color, "width": 2.4 if line.strong else 1.4},
            "marker": {"color": line.color, "symbol": line.symbol, "size": 7 if line.strong else 4},
            "hovertemplate": f"<b>{text(line.name)}</b>, mean of {len(curve.seeds)}: %{{y:.4f}} nats at %{{x:,}}<extra></extra>",
            "meta": {**line.meta, "x": xs},
        }
    )
    return traces


def lr_sensitivity(material: Material) -> dict[str, Any] | None:
    """Every tuning trial as final loss against learning rate; the best of each rate joined, the chosen one ringed."""
    names = material.summary["optimizers"]
    trials = {name: series.trials_of(material.summary, name) for name in names}
    losses = [trial.loss for group in trials.values() for trial in group]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return None
    top = series.ceiling(losses)
    span = (top - min(finite)) or 0.1
    failed_at = top + 0.12 * span
    traces: list[Trace] = []
    shapes: list[dict[str, Any]] = []
    for place, name in enumerate(names):
        look = _look(material, name)
        lrs, best = series.best_by_lr(trials[name])
        line = {"color": look["color"], "width": 1.6}
        traces.append(
            {"x": lrs, "y": best, "mode": "lines", "line": line, "hoverinfo": "skip", "meta": {"group": name}}
        )
        points = trials[name]
        ok = [math.isfinite(trial.loss) for trial in points]
        in_sweep = series.sweep(points)
        swept = [trial in in_sweep for trial in points]
        traces.append(
            {
                "x": [trial.lr for trial in points],
                "y": [trial.loss if fine else failed_at for trial, fine in zip(points, ok)],
                "mode": "markers",
                "name": text(name),
                "marker": {
                    "color": [look["color"] if full or not fine else "white" for full, fine in zip(swept, ok)],
                    "symbol": [look["symbol"] if fine else "x-thin" for fine in ok],
                    "opacity": 1,
                    "size": [9 if fine else 10 for fine in ok],
                    "line": {"color": look["color"], "width": [1.5 if fine else 3 for fine in ok]},
                },
                "text": [_trial_text(name, trial) for trial in points],
                "hovertemplate": "%{text}<extra></extra>",
                "meta": {"group": name},
            }
        )
        chosen = [trial for trial in points if trial.chosen and math.isfinite(trial.loss)]
        ring = {"color": "rgba(0,0,0,0)", "size": 19, "line": {"color": style.INK, "width": 1.6}}
        traces.append(
            {
                "x": [trial.lr for trial in chosen],
                "y": [trial.loss for trial in chosen],
                "mode": "markers",
                "marker": ring,
                "hoverinfo": "skip",
                "meta": {"group": name},
            }
        )
        width = series.sensitivity(points)
        if width:
            height = min(finite) - (0.08 + 0.06 * place) * span
            least = "at least " if width.open_low or width.open_high else ""
            hover = f"{text(name)}: within {series.DELTA} nats of the best from {width.low:.3g} to {width.high:.3g}, {least}{width.octaves:.1f} octaves"
            steps = 24
            xs = [width.low * (width.high / width.low) ** (i / steps) for i in range(steps + 1)]
            traces.append(
                {
                    "x": xs,
                    "y": [height] * len(xs),
                    "mode": "lines",
                    "line": {"color": look["color"], "width": 7},
                    "hovertemplate": hover + "<extra></extra>",
                    "meta": {"group": name},
                }
            )
    limits = [min(finite) - (0.08 + 0.06 * len(names)) * span, failed_at + 0.06 * span]
    return figure(
        traces,
        "learning rate of the hidden matrices",
        "tune split, nats per token",
        shapes=shapes,
        xaxis={"type": "log", "dtick": 1, "tickformat": "~g", "minor": {"ticks": "outside", "showgrid": False}},
        yaxis={"range": limits},
    )


def training_curves(
    runs: Sequence[tuple[Line, Mapping[str, Any]]], key: str, label: str, log: bool = False
) -> dict[str, Any] | None:
    """One row key of the training history (`loss`, `grad_norm`) of runs, thinned to what a screen shows."""
    traces: list[Trace] = []
    points = max(20, min(250, MOST_POINTS // max(1, len(runs))))
    for line, run in runs:
        rows = [row for row in run["history"].get("train", ()) if math.isfinite(series.number(row.get(key)))]
        rows = series.thinned(rows, points)
        if rows:
            xs = {
                "updates": [row["update"] for row in rows],
                "tokens": [row["tokens"] for row in rows],
                "seconds": _rounded([row["seconds"] for row in rows], 2),
            }
            traces.append(
                {
                    "x": xs["updates"],
                    "y": [float(f"{row[key]:.4g}") for row in rows],
                    "mode": "lines",
                    "line": {"color": line.color, "width": 1},
                    "opacity": 0.8,
                    "hovertemplate": f"{text(line.name)}, seed {text(run['seed'])}: %{{y:.4g}} at %{{x:,}}<extra></extra>",
                    "meta": {**line.meta, "x": xs},
                }
            )
    if not traces:
        return None
    axis = {"type": "log", "tickformat": "~g", "dtick": "D2"} if log else {}
    return figure(traces, "updates", label, yaxis=axis, height=320)


def optimizer_lines(material: Material) -> dict[str, Line]:
    """The look of each optimizer of a comparison."""
    names = material.summary["optimizers"]
    looks = {name: _look(material, name) for name in names}
    return {
        name: Line(name=name, group=name, color=look["color"], symbol=look["symbol"]) for name, look in looks.items()
    }


def _look(material: Material, name: str) -> dict[str, str]:
    slot = style.slots(list(material.summary["optimizers"]))[name]
    return {"color": style.PALETTE[slot], "symbol": style.PLOTLY_MARKERS[slot]}


def _trial_text(name: str, trial: series.Trial) -> str:
    result = f"{trial.loss:.4f} nats" if math.isfinite(trial.loss) else trial.status
    lines = [f"<b>{text(name)}</b> trial {trial.index} ({text(trial.stage)}): {text(result)}"]
    lines += [text(style.values_text({key: value})) for key, value in trial.values.items()]
    return "<br>".join(lines + (["chosen"] if trial.chosen else []))


def _rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    return [round(value, digits) for value in values]


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
