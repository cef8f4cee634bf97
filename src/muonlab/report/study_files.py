"""Every picture and file of a study's report, beside its summary."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonlab.report import series, study_figures, surveys
from muonlab.report import study_content as content
from muonlab.report.reading import Material, runs_of


def pictures(material: Material) -> dict[str, Callable[[Path], None]]:
    """File name -> what draws it; only figures for which the study has axes and runs."""
    summary = material.summary
    rows = content.cell_rows(summary)
    split, curves = cell_curves(material)
    named = {name: color for name, color in content.highlighted(summary).items() if name in curves}
    others = [curve for name, curve in curves.items() if name not in named]
    points = [(row["group"], row["cell"], row["seconds"], row["loss"]) for row in rows]
    drawn: dict[str, Callable[[Path], None]] = {
        "curves_plot.png": lambda path: study_figures.curves_plot({n: curves[n] for n in named}, named, others, split, path),
        "performance_plot.png": lambda path: study_figures.performance_plot(rows, path),
        "pareto_plot.png": lambda path: surveys.pareto_plot(points, "report", path),
    }  # fmt: skip
    if sweeps := content.sweeps(summary):
        drawn["sensitivity_plot.png"] = lambda path: study_figures.sensitivity_plot(sweeps, path)
    if grid := content.grid(summary):
        title = "Loss on the report split, mean over seeds"
        drawn["heatmap_plot.png"] = lambda path: surveys.heatmap_plot(grid.tables, grid.x, grid.y, path, title=title)
    for effect in content.effects(summary):
        drawn[f"axis_{_slug(effect.axis)}_plot.png"] = lambda path, effect=effect: study_figures.effect_plot(
            effect, path
        )  # type: ignore[misc]
    if profile := content.profile(material):
        workloads = "pairs of target and seed" if len(summary.get("targets") or ()) > 1 else "seeds"
        drawn["profile_plot.png"] = lambda path: surveys.profile_plot(profile, path, workloads=workloads)
    return drawn


def cell_curves(material: Material) -> tuple[str, dict[str, series.Curve]]:
    """The split whose curves are drawn, and for each cell with a finished run its curve over seeds."""
    split = series.judged_split(list(material.runs.values()))
    found = {cell["cell"]: series.mean_curve(runs_of(material, cell), split) for cell in material.summary["cells"]}
    return split, {name: curve for name, curve in found.items() if curve}


def _slug(text: Any) -> str:
    return re.sub(r"[^\w.-]+", "-", str(text)).strip("-.")[:60] or "axis"
