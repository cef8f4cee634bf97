"""Every picture and text of a study's report, by its file name."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muonlab.report import study_axes, study_figures, surveys
from muonlab.report import study_content as content
from muonlab.report import study_exports as exports
from muonlab.report.exports import curves_csv
from muonlab.report.reading import Material


def pictures(material: Material) -> dict[str, Callable[[Path], None]]:
    """File name -> what draws it; only figures for which the study has axes and runs."""
    summary = material.summary
    rows = content.cell_rows(summary)
    split, curves = content.cell_curves(material)
    named = {name: color for name, color in content.highlighted(summary).items() if name in curves}
    others = [curve for name, curve in curves.items() if name not in named]
    points = [(row["group"], row["cell"], row["seconds"], row["loss"]) for row in rows]
    drawn: dict[str, Callable[[Path], None]] = {
        "comparison_plot.png": lambda path: study_figures.curves_plot({n: curves[n] for n in named}, named, others, split, path),
        "performance_plot.png": lambda path: study_figures.performance_plot(rows, path),
        "pareto_plot.png": lambda path: surveys.pareto_plot(points, "report", path),
    }  # fmt: skip
    if sweeps := study_axes.sweeps(summary):
        drawn["sensitivity_plot.png"] = lambda path: study_figures.sensitivity_plot(sweeps, path)
    if grid := study_axes.grid(summary):
        title = "Loss on the report split, mean over seeds"
        drawn["heatmap_plot.png"] = lambda path: surveys.heatmap_plot(grid.tables, grid.x, grid.y, path, title=title)
    for effect in study_axes.effects(summary):
        drawn[f"axis_{_slug(effect.axis)}_plot.png"] = lambda path, effect=effect: study_figures.effect_plot(
            effect, path
        )  # type: ignore[misc]
    if profile := study_axes.profile(material):
        workloads = "pairs of target and seed" if len(summary.get("targets") or ()) > 1 else "seeds"
        drawn["profile_plot.png"] = lambda path: surveys.profile_plot(profile, path, workloads=workloads)
    return drawn


def texts(material: Material, drawn: Sequence[str]) -> dict[str, str]:
    """File name -> text for other programs and for print; `drawn` are the pictures that the article shows."""
    return {
        "runs.csv": exports.runs_csv(material),
        "curves.csv": curves_csv(material),
        "tables.tex": exports.study_tex(material.summary),
        "paper.tex": exports.study_paper(material, drawn),
        "EXPERIMENT_CARD.txt": exports.study_card(material),
    }


def _slug(text: Any) -> str:
    return re.sub(r"[^\w.-]+", "-", str(text)).strip("-.")[:60] or "axis"
