"""Figures of a study's page as plain plotly descriptions, each trace with its group and cell for the page's filter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.report import series, study_axes, style
from muonlab.report import study_content as content
from muonlab.report.interactive import MOST_SEEDS, Line, Trace, drawn, figure, loss_curves, text, training_curves
from muonlab.report.reading import Material, runs_of
from muonlab.report.study_axes import Effect, Sweep
from muonlab.report.study_content import cell_curves
from muonlab.report.surveys import pareto_front
from muonlab.studies.curves import PerformanceProfile

MOST_TICKS = 9
"""Values of an axis up to which each is written below it."""
QUANTITIES = (("loss", "report split, nats per token", 1.0), ("memory", "peak memory, GB", 1e9), ("seconds", "training seconds", 1.0))  # fmt: skip


def figures(
    material: Material, cells: Sequence[Mapping[str, Any]], sweeps: Sequence[Sweep]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All figures by the id of their place, and for each axis that is no learning rate the places of its figures."""
    summary = material.summary
    lines = lines_of(summary)
    split, curves = cell_curves(material)
    by_cell = {cell["cell"]: runs_of(material, cell) for cell in summary["cells"]}
    count = 1 if too_many(material) else None
    runs = [(line, run) for name, line in reversed(lines.items()) for run in by_cell[name][:count]]
    profile_ = study_axes.profile(material)
    found = drawn(
        curves=loss_curves([(line, curves[name]) for name, line in lines.items() if name in curves], split),
        training=training_curves(runs, "loss", "training batch, nats per token"),
        gradients=training_curves(runs, "grad_norm", "gradient norm before clipping", log=True),
        pareto=cost(cells, lines),
        profile=profile(profile_, lines) if profile_ else None,
    )
    for number, axis in enumerate(dict.fromkeys(line.axis for line in sweeps)):
        if figure_ := sensitivity([line for line in sweeps if line.axis == axis]):
            found[f"sensitivity-{number}"] = figure_
    effects = []
    for number, one in enumerate(study_axes.effects(summary)):
        made = {f"effect-{number}-{key}": effect(one, key, label, unit) for key, label, unit in QUANTITIES}
        effects.append({"axis": one.axis, "places": [place for place, figure_ in made.items() if figure_]})
        found |= drawn(**made)
    return found, effects


def too_many(material: Material) -> bool:
    """Whether there are more runs than lines that a figure can hold, so that it shows the first seed of each cell."""
    return len(material.runs) > MOST_SEEDS


def lines_of(summary: Mapping[str, Any]) -> dict[str, Line]:
    """The look of each cell, best first: those that figures name in full colours, the others in pale ones."""
    named = content.highlighted(summary)
    lines = {}
    for place, row in enumerate(content.cell_rows(summary)):
        slot = place % len(style.PALETTE)
        strong = row["cell"] in named
        lines[row["cell"]] = Line(
            name=row["cell"],
            group=row["group"],
            color=named[row["cell"]] if strong else style.pale(style.PALETTE[slot]),
            symbol=style.PLOTLY_MARKERS[slot],
            cell=row["cell"],
            strong=strong,
        )
    return lines


def sensitivity(sweeps: Sequence[Sweep]) -> dict[str, Any] | None:
    """Loss against one logarithmic axis: a line for each group and setting of the other axes, its good range below."""
    points = [point for line in sweeps for point in line.points]
    losses = [point["loss"] for point in points]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return None
    top, bottom = series.ceiling(losses), min(finite)
    span = (top - bottom) or 0.1
    shown = sweeps[: len(style.PALETTE)]
    slots = style.slots([line.label for line in shown])
    traces: list[Trace] = []
    colors = sweep_colors(sweeps)
    for place, line in reversed(list(enumerate(sweeps))):
        color = colors[line.label]
        symbol = style.PLOTLY_MARKERS[slots.get(line.label, place) % len(style.PLOTLY_MARKERS)]
        kept = [point for point in line.points if math.isfinite(point["loss"]) or point["failed"]]
        traces.append(
            {
                "x": [point["x"] for point in kept],
                "y": [round(min(_or(point["loss"], math.inf), top + 0.1 * span), 5) for point in kept],
                "name": text(line.label),
                "mode": "lines+markers",
                "line": {"color": color, "width": 1.6},
                "marker": {
                    "color": color,
                    "size": 9,
                    "symbol": ["x" if point["failed"] else symbol for point in kept],
                },
                "text": [f"<b>{text(p['cell'])}</b>: {style.loss(p['loss'])}{_half(p)} nats{_failed(p)}" for p in kept],
                "hovertemplate": "%{text}<extra></extra>",
                "meta": {"group": line.group, "cell": " ".join(point["cell"] for point in kept)},
            }
        )
        if line.found and place < len(shown):
            height = bottom - (0.08 + 0.05 * place) * span
            low, high = line.found["low"], line.found["high"]
            least = "at least " if line.found["open_low"] or line.found["open_high"] else ""
            hover = f"{text(line.label)}: within {series.DELTA} nats of the best from {low:.3g} to {high:.3g}, {least}{line.found['octaves']:.1f} octaves"
            xs = [low * (high / low) ** (i / 16) for i in range(17)]
            traces.append(
                {
                    "x": xs,
                    "y": [height] * len(xs),
                    "mode": "lines",
                    "line": {"color": color, "width": 6},
                    "hovertemplate": hover + "<extra></extra>",
                    "meta": {"group": line.group, "cell": " ".join(point["cell"] for point in kept)},
                }
            )
    tried = sorted({point["x"] for point in points})
    ticks: dict[str, Any] = {
        "type": "log",
        "dtick": 1,
        "tickformat": "~g",
        "minor": {"ticks": "outside", "showgrid": False},
    }
    if len(tried) <= MOST_TICKS:
        ticks = {"type": "log", "tickvals": tried, "ticktext": [style.label(x) for x in tried]}
    limits = [bottom - (0.12 + 0.05 * len(shown)) * span, top + 0.16 * span]
    return figure(traces, text(sweeps[0].axis), "report split, nats per token", xaxis=ticks, yaxis={"range": limits})


def sweep_colors(sweeps: Sequence[Sweep]) -> dict[str, str]:
    """Label of each line -> its colour: full ones for the best, pale ones for the rest."""
    names = [line.label for line in sweeps]
    rest = names[len(style.PALETTE) :]
    pale = {name: style.pale(style.PALETTE[i % len(style.PALETTE)]) for i, name in enumerate(rest)}
    return style.colors(names[: len(style.PALETTE)]) | pale


def cost(rows: Sequence[Mapping[str, Any]], lines: Mapping[str, Line]) -> dict[str, Any] | None:
    """Training time against loss, a point for each cell, with the front that nothing beats."""
    kept = [row for row in rows if math.isfinite(row["loss"]) and math.isfinite(row["seconds"])]
    if not kept:
        return None
    top = series.ceiling([row["loss"] for row in kept])
    front = [kept[i] for i in pareto_front([(row["seconds"], row["loss"]) for row in kept])]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    slots = style.slots(groups)
    traces: list[Trace] = [
        {
            "x": [row["seconds"] for row in front],
            "y": [row["loss"] for row in front],
            "mode": "lines",
            "line": {"color": style.MUTED, "width": 1, "dash": "dash", "shape": "hv"},
            "hoverinfo": "skip",
            "meta": {},
        }
    ]
    for row in kept:
        slot = slots[row["group"]]
        traces.append(
            {
                "x": [row["seconds"]],
                "y": [min(row["loss"], top)],
                "mode": "markers",
                "name": text(row["cell"]),
                "marker": {"color": style.PALETTE[slot], "symbol": style.PLOTLY_MARKERS[slot], "size": 9, "opacity": 0.85},
                "text": f"<b>{text(row['cell'])}</b>: {style.loss(row['loss'])}{_half(row)} nats in {style.duration(row['seconds'])}",
                "hovertemplate": "%{text}<extra></extra>",
                "meta": lines[row["cell"]].meta,
            }
        )  # fmt: skip
    return figure(traces, "training seconds, without evaluation and compilation", "report split, nats per token")


def profile(found: PerformanceProfile, lines: Mapping[str, Line]) -> dict[str, Any]:
    """The share of workloads that each cell solved within a multiple of the fastest cell's time."""
    traces: list[Trace] = []
    for name in sorted(found.ratios, key=lambda name: found.scores[name]):
        taus = sorted({1.0, *(r for r in found.ratios[name] if r <= found.tau_max), found.tau_max})
        hover = f"<b>{text(name)}</b>, score {found.scores[name]:.2f}: %{{y:.0f}} % within %{{x:.2f}} times the fastest"
        traces.append(
            {
                "x": taus,
                "y": [100 * found.share(name, tau) for tau in taus],
                "mode": "lines",
                "name": text(name),
                "line": {"color": lines[name].color, "width": 2, "shape": "hv"},
                "hovertemplate": hover + "<extra></extra>",
                "meta": lines[name].meta,
            }
        )
    return figure(traces, "time to target, relative to the fastest", "workloads solved, per cent")


def effect(found: Effect, key: str, label: str, unit: float) -> dict[str, Any] | None:
    """One quantity of cell_rows along an axis, in `unit`s, a line for each group."""
    traces: list[Trace] = []
    slots = style.slots(list(found.groups))
    names = [text(style.label(value)) for value in found.values]
    for group, points in found.groups.items():
        kept = [(names[i], points[i]) for i in sorted(points) if math.isfinite(points[i][key])]
        slot = slots[group]
        halves = [_or(row["half"], 0.0) for _, row in kept]
        if kept:
            traces.append(
                {
                    "x": [name for name, _ in kept],
                    "y": [row[key] / unit for _, row in kept],
                    "mode": "lines+markers",
                    "name": text(group),
                    "line": {"color": style.PALETTE[slot], "width": 1.8},
                    "marker": {"color": style.PALETTE[slot], "symbol": style.PLOTLY_MARKERS[slot], "size": 8},
                    "text": [f"<b>{text(row['cell'])}</b>: {row[key] / unit:.4g}" for _, row in kept],
                    "hovertemplate": "%{text}<extra></extra>",
                    "meta": {"group": group},
                }
                | ({"error_y": {"array": halves, "thickness": 1}} if key == "loss" and any(halves) else {})
            )
    if not traces:
        return None
    axis = {"type": "category", "categoryorder": "array", "categoryarray": names}
    return figure(traces, text(found.axis), label, xaxis=axis, yaxis={"rangemode": "nonnegative"}, height=300)


def _half(row: Mapping[str, Any]) -> str:
    return f" ± {style.loss(row['half'])}" if math.isfinite(row["half"]) else ""


def _failed(row: Mapping[str, Any]) -> str:
    return f"<br>{text(', '.join(row['failed']))}" if row["failed"] else ""


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise
