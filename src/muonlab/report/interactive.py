"""Figures of the HTML page as plain plotly descriptions (dictionaries): nothing here needs plotly itself.

Each trace carries `meta.group`, by which the page's filter finds it.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from muonlab.report import series, style
from muonlab.report.reading import Material, finals_of

Trace = dict[str, Any]
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


def text(value: Any) -> str:
    """Text for plotly, which reads a few HTML tags in labels."""
    return escape(str(value), quote=False)


def loss_curves(material: Material) -> dict[str, Any] | None:
    """Validation loss of the final runs: the mean of each optimizer, its band, and every seed as a thin line."""
    names = material.summary["optimizers"]
    finals = {name: finals_of(material.summary, material.runs, name) for name in names}
    split = series.judged_split([run for group in finals.values() for run in group])
    curves = {name: curve for name in names if (curve := series.mean_curve(finals[name], split))}
    if not curves:
        return None
    traces: list[Trace] = []
    for name, curve in curves.items():
        look = _look(material, name)
        xs: dict[str, list[Any]] = {"updates": curve.updates, "tokens": curve.tokens, "seconds": curve.seconds}
        there_and_back = {key: [*values, *reversed(values)] for key, values in xs.items()}
        traces.append(
            {
                "x": there_and_back["updates"],
                "y": _rounded([*curve.high, *reversed(curve.low)]),
                "fill": "toself",
                "fillcolor": _faint(look["color"]),
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "meta": {"group": name, "x": there_and_back},
            }
        )
        for seed, losses in zip(curve.seeds, curve.each):
            traces.append(
                {
                    "x": curve.updates,
                    "y": _rounded(losses),
                    "mode": "lines",
                    "line": {"color": look["color"], "width": 0.7},
                    "opacity": 0.6,
                    "hovertemplate": f"{text(name)}, seed {text(seed)}: %{{y:.4f}} nats<extra></extra>",
                    "meta": {"group": name, "x": xs},
                }
            )
        traces.append(
            {
                "x": curve.updates,
                "y": _rounded(curve.mean),
                "name": text(name),
                "mode": "lines+markers",
                "line": {"color": look["color"], "width": 2.4},
                "marker": {"color": look["color"], "symbol": look["symbol"], "size": 7},
                "hovertemplate": f"<b>{text(name)}</b>, mean of {len(curve.seeds)}: %{{y:.4f}} nats at %{{x:,}}<extra></extra>",
                "meta": {"group": name, "x": xs},
            }
        )
    limits = series.zoom(list(curves.values()))
    return figure(traces, "updates", f"{split} split, nats per token", yaxis={"range": limits} if limits else {})


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


def training_curves(material: Material, key: str, label: str, log: bool = False) -> dict[str, Any] | None:
    """One row key of the training history (`loss`, `grad_norm`) of every final run, thinned to what a screen shows."""
    traces: list[Trace] = []
    for name in material.summary["optimizers"]:
        color = _look(material, name)["color"]
        for run in finals_of(material.summary, material.runs, name):
            rows = [row for row in run["history"].get("train", ()) if math.isfinite(series.number(row.get(key)))]
            rows = series.thinned(rows)
            if rows:
                xs = {
                    axis: [row[k] for row in rows]
                    for axis, k in (("updates", "update"), ("tokens", "tokens"), ("seconds", "seconds"))
                }
                traces.append(
                    {
                        "x": xs["updates"],
                        "y": [float(f"{row[key]:.4g}") for row in rows],
                        "mode": "lines",
                        "line": {"color": color, "width": 1},
                        "opacity": 0.8,
                        "hovertemplate": f"{text(name)}, seed {text(run['seed'])}: %{{y:.4g}} at %{{x:,}}<extra></extra>",
                        "meta": {"group": name, "x": xs},
                    }
                )
    return (
        figure(
            traces,
            "updates",
            label,
            yaxis={"type": "log", "tickformat": "~g", "dtick": "D2"} if log else {},
            height=320,
        )
        if traces
        else None
    )


def _look(material: Material, name: str) -> dict[str, str]:
    slot = style.slots(list(material.summary["optimizers"]))[name]
    return {"color": style.PALETTE[slot], "symbol": style.PLOTLY_MARKERS[slot]}


def _trial_text(name: str, trial: series.Trial) -> str:
    result = f"{trial.loss:.4f} nats" if math.isfinite(trial.loss) else trial.status
    lines = [f"<b>{text(name)}</b> trial {trial.index} ({text(trial.stage)}): {text(result)}"]
    lines += [text(style.values_text({key: value})) for key, value in trial.values.items()]
    return "<br>".join(lines + (["chosen"] if trial.chosen else []))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
