"""The report as one self-contained page: everything inlined, nothing fetched, every name escaped."""

import json
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from muonlab.report import content, interactive, series, style
from muonlab.report.differences import flat
from muonlab.report.reading import Material, finals_of
from muonlab.report.stability import recommendations
from muonlab.report.threats import threats

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


def figures(material: Material) -> dict[str, Any]:
    """The interactive figures of a comparison by the id of their place on the page."""
    lines = interactive.optimizer_lines(material)
    finals = {name: finals_of(material.summary, material.runs, name) for name in lines}
    runs = [(lines[name], run) for name in lines for run in finals[name]]
    split = series.judged_split([run for _, run in runs])
    curves = [(lines[name], curve) for name in lines if (curve := series.mean_curve(finals[name], split))]
    return _drawn(
        curves=interactive.loss_curves(curves, split),
        sensitivity=interactive.lr_sensitivity(material),
        training=interactive.training_curves(runs, "loss", "training batch, nats per token"),
        gradients=interactive.training_curves(runs, "grad_norm", "gradient norm before clipping", log=True),
    )


def _drawn(**made: dict[str, Any] | None) -> dict[str, Any]:
    return {place: figure for place, figure in made.items() if figure}


def _page(template: str, **values: Any) -> str:
    """A template filled in, with plotly.js inlined once."""
    from plotly.offline import get_plotlyjs

    return _environment().get_template(template).render(plotly=get_plotlyjs(), delta=series.DELTA, **values)


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
