"""The report as one self-contained page: everything inlined, nothing fetched, every name escaped."""

import json
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from muonlab.report import (
    content,
    interactive,
    series,
    study_axes,
    study_content,
    study_interactive,
    study_tables,
    study_text,
    style,
)
from muonlab.report.reading import Material, finals_of
from muonlab.report.stability import recommendations
from muonlab.report.study_threats import study_threats
from muonlab.report.threats import threats
from muonlab.training.config import flat

COMPARISON_SECTIONS = {
    "verdict": "Verdict",
    "loss": "Loss",
    "rates": "Learning rates",
    "threats": "Threats to validity",
    "protocol": "Protocol",
    "runs": "Runs",
    "configuration": "Configuration",
    "reproduce": "Reproduce",
}


def comparison_page(material: Material) -> str:
    """The HTML text of a comparison's report."""
    summary = material.summary
    names = list(summary["optimizers"])
    return _page(
        "comparison.html.j2",
        kicker="muonlab comparison",
        title=summary["question"],
        sections=COMPARISON_SECTIONS.items(),
        palette=style.colors(names),
        optimizers=names,
        answers=content.answers(summary),
        strips=content.strips(summary.get("verdicts", ())),
        overview=[content.overview(material, name) for name in names],
        targets=summary.get("to_target", ()),
        threats=threats(material),
        recommended=recommendations(summary),
        protocol=content.protocol(material),
        efficiency=[row for name in names if (row := content.efficiency(material, name))],
        rates=[rate for name in names if (rate := content.learning_rates(summary, name))],
        trial_rows=content.trial_rows(summary),
        stopped_rows=content.stopped_rows(summary),
        final_rows=content.final_rows(material),
        differences=content.differences(material),
        routing=content.routing(material),
        setting=content.setting(material),
        unreadable=material.unreadable,
        flags=summary.get("flags", ()),
        command=summary.get("command"),
        config=next((run["config"] for run in material.runs.values()), None),
        figures=figures(material),
    )


STUDY_SECTIONS = {
    "verdict": "Verdict",
    "cells": "Cells",
    "published": "Published",
    "loss": "Loss",
    "axes": "Axes",
    "cost": "Cost",
    "threats": "Threats to validity",
    "protocol": "Protocol",
    "runs": "Runs",
    "configuration": "Configuration",
    "reproduce": "Reproduce",
}
PUBLISHED = {
    "best_loss": "best over the run",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "minutes": "minutes",
    "memory_gb": "memory, GB",
}


def study_page(material: Material) -> str:
    """The HTML text of a study's report."""
    summary = material.summary
    cells, answers = study_content.cell_rows(summary), study_content.answers(summary)
    contrasts, published = study_content.contrast_rows(summary), study_content.published_rows(summary)
    sweeps = study_axes.sweeps(summary)
    drawn, effects = study_interactive.figures(material, cells, sweeps)
    heat = study_axes.heat(summary)
    targets = study_content.target_rows(summary)
    empty = {
        "published": not published,
        "axes": not (sweeps or heat or effects),
        "cost": not (targets or "pareto" in drawn or "profile" in drawn),
    }
    keys = [(key, label) for key, label in PUBLISHED.items() if any(key in row["published"] for row in published)]
    goals = summary.get("targets") or ()
    return _page(
        "study.html.j2",
        kicker=f"muonlab study {summary['name']}",
        title=str(summary.get("title") or summary["name"]),
        sections=[(place, name) for place, name in STUDY_SECTIONS.items() if not empty.get(place)],
        palette=style.colors(list(summary["groups"])),
        summary={"stale": (), "flags": (), "command": None, "reference": None, **summary},
        origin=study_text.origin(summary),
        answers=answers,
        strips=content.strips([answer["verdict"] or {} for answer in answers]),
        cards=study_content.CARDS,
        key=study_content.highlighted(summary),
        groups_of={row["cell"]: row["group"] for row in cells},
        judged=len(contrasts),
        contrasts=contrasts,
        recommended=study_text.recommendations(summary),
        cells=cells,
        published=published,
        published_note=study_content.published_note(summary),
        published_keys=keys,
        sweeps=[(line, study_tables.bounds(line), study_tables.optimum(line)) for line in sweeps if line.found],
        sweep_colors=study_interactive.sweep_colors(sweeps),
        sensitivity_places=[place for place in drawn if place.startswith("sensitivity-")],
        heat=heat,
        effects=effects,
        several_axes=len(study_content.axes_of(summary)) > 1,
        workloads="pairs of target and seed" if len(goals) > 1 else "seeds",
        profile_target=", ".join(f"{target:g} nats" for target in goals) or "the final loss of the median cell",
        targets=targets,
        speedups=study_content.speedup_rows(summary),
        speedup_note=study_content.speedup_note(summary) if summary.get("data_speedup") else "",
        shown={place for place in STUDY_SECTIONS if not empty.get(place)},
        efficient=any(math.isfinite(row["gain"]) for row in cells),
        first_seed_only=study_interactive.too_many(material),
        threats=study_threats(material),
        protocol=study_text.protocol(material),
        runs=study_content.run_rows(summary),
        problems=study_content.problems(material),
        differences=study_content.differences(material),
        routing=study_content.routing(material),
        setting=study_text.setting(material),
        config=next((run["config"] for run in material.runs.values()), None),
        figures=drawn,
    )


def figures(material: Material) -> dict[str, Any]:
    """The interactive figures of a comparison by the id of their place on the page."""
    lines = interactive.optimizer_lines(material)
    finals = {name: finals_of(material.summary, material.runs, name) for name in lines}
    runs = [(lines[name], run) for name in lines for run in finals[name]]
    split = series.judged_split([run for _, run in runs])
    curves = [(lines[name], curve) for name in lines if (curve := series.mean_curve(finals[name], split))]
    return interactive.drawn(
        curves=interactive.loss_curves(curves, split),
        sensitivity=interactive.lr_sensitivity(material),
        training=interactive.training_curves(runs, "loss", "training batch, nats per token"),
        gradients=interactive.training_curves(runs, "grad_norm", "gradient norm before clipping", log=True),
    )


def _page(template: str, **values: Any) -> str:
    """A template filled in, with plotly.js inlined once."""
    from plotly.offline import get_plotlyjs

    return (
        _environment()
        .get_template(template)
        .render(plotly=get_plotlyjs(), delta=series.DELTA, kind=template.split(".")[0], **values)
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("muonlab.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "loss": style.loss,
        "signed": style.signed,
        "short": style.short,
        "label": style.label,
        "percent": study_tables.percent,
        "memory": study_text.memory,
        "half": lambda row: f" ± {style.loss(row['half'])}" if math.isfinite(row["half"]) else "",
        "count": style.count,
        "duration": style.duration,
        "values": style.values_text,
        "options": _options,
        "pretty": lambda value: "\n".join(f"{key} = {json.dumps(item)}" for key, item in flat(value).items()),
    }
    return environment


def _options(text: str) -> Markup:
    """Text with command-line options set as code, so that no line breaks inside them."""
    return Markup(re.sub(r"--[\w-]+( \d+)?", r"<code>\g<0></code>", str(escape(text))))
