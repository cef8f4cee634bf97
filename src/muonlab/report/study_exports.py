"""A study for other programs and for print: LaTeX (booktabs), an article around it, and a card of plain text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.report import series, study_axes, style
from muonlab.report import study_content as content
from muonlab.report.exports import article, csv_text, description, floating, signed_tex, tabular, tex, tex_interval
from muonlab.report.reading import Material
from muonlab.report.study_tables import bounds, optimum, percent
from muonlab.report.study_text import memory, origin, protocol, recommendations, setting
from muonlab.report.study_threats import study_threats
from muonlab.training.config import flat

ROWS = 45
"""Rows of a table that fit on a page."""
CAPTIONS = {
    "comparison_plot": "Validation loss against updates and against training time: mean of seeds, band from lowest to highest.",
    "performance_plot": "All cells, best first: loss with its seeds and 95\\,\\% interval, perplexity, accuracy, training time.",
    "sensitivity_plot": f"Loss against each logarithmic axis; bars: within {series.DELTA} nats of the best.",
    "heatmap_plot": "Loss over two axes, mean over seeds.",
    "pareto_plot": "Training time against loss; dashed: nothing is faster and better.",
    "profile_plot": "Performance profile: share of workloads solved within a multiple of the fastest cell's time.",
}


def runs_csv(material: Material) -> str:
    """Every run, one row each: cell, place on the axes, outcome, cost, and the full configuration as columns."""
    rows = []
    for cell in material.summary["cells"]:
        for entry in cell["runs"]:
            run = material.runs.get(entry["directory"], {})
            rows.append(
                {
                    "cell": cell["cell"],
                    "group": cell["group"],
                    **{f"axis.{name}": value for name, value in cell["values"].items()},
                    **{key: entry.get(key) for key in ("seed", "status", "report_cross_entropy", "tune_cross_entropy")},
                    **{key: entry.get(key) for key in ("bits_per_byte", "perplexity", "accuracy", "updates")},
                    "tokens": run.get("tokens"),
                    "training_seconds": entry.get("seconds"),
                    **{
                        key: entry.get(key) for key in ("updates_per_second", "peak_memory_bytes", "spikes", "plateaus")
                    },
                    **{key: entry.get(key) for key in ("directory", "message")},
                    **{f"config.{key}": value for key, value in flat(run.get("config") or {}).items()},
                }
            )
    return csv_text(rows)


def study_tex(summary: Mapping[str, Any]) -> str:
    """Booktabs tables, to be read with \\input: cells, verdicts, published numbers, good ranges, data speed-ups."""
    tables = [_cells(summary), _contrasts(summary), _published(summary), _ranges(summary), _speedups(summary)]
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(filter(None, tables))


def _cells(summary: Mapping[str, Any]) -> str:
    rows = content.cell_rows(summary)
    body = [
        [
            tex(style.clipped(row["cell"], 48)),
            tex(style.loss(row["loss"])) + (rf" $\pm$ {style.loss(row['half'])}" if math.isfinite(row["half"]) else ""),
            tex(style.loss(row["bits_per_byte"])),
            tex(percent(row["accuracy"])),
            tex(style.duration(row["seconds"])),
            f"{row['finished']} of {row['seeds']}",
        ]
        for row in rows[:ROWS]
    ]
    caption = f"Loss on the report split in nats per token, mean $\\pm$ half of the 95\\,\\% interval.{_more(rows)}"
    head = ["cell", "loss", "bits/byte", "accuracy", "training", "finished"]
    return floating(tabular(head, body), caption, "tab:cells")


def _contrasts(summary: Mapping[str, Any]) -> str:
    groups = [{**row, "holm": row.get("holm")} for row in summary.get("group_contrasts") or ()]
    rows = [*groups, *content.contrast_rows(summary)]
    body = [
        [
            tex(
                style.clipped(
                    f"{row['candidate']} against {row['reference']}" if row in groups else row["candidate"], 48
                )
            ),
            f"${signed_tex(row.get('mean'))}$",
            tex_interval(*(row.get("interval") or (None, None))),
            tex(style.short(series.number(row.get("holm")), 2)),
            tex(row.get("verdict") or "no verdict"),
        ]
        for row in rows[:ROWS]
    ]
    if not body:
        return ""
    against = f" to {tex(summary['reference'])}" if summary.get("reference") else ""
    caption = f"Paired differences{against} by seed in nats per token; negative is better. $p$ after Holm.{_more(rows)}"
    return floating(tabular(["candidate", "difference", "interval", "$p$", "verdict"], body), caption, "tab:contrasts")


def _published(summary: Mapping[str, Any]) -> str:
    rows = content.published_rows(summary)
    body = [
        [
            tex(style.clipped(row["cell"], 48)),
            tex(style.loss(row["published"].get("loss"))),
            tex(style.loss(row["loss"])) + (rf" $\pm$ {style.loss(row['half'])}" if math.isfinite(row["half"]) else ""),
            f"${signed_tex(row['difference'])}$" if row["applies"] and math.isfinite(row["difference"]) else "--",
            *(tex(style.loss(number)) for number in (row["published"].get("best_loss"), row["best_loss"])),
        ]
        for row in rows[:ROWS]
    ]
    head = ["cell", "published", "ours", "difference", "best, published", "ours"]
    caption = f"Published beside ours; best: over the run. {tex(content.published_note(summary))}{_more(rows)}"
    return floating(tabular(head, body), caption, "tab:published") if body else ""


def _ranges(summary: Mapping[str, Any]) -> str:
    lines = [line for line in study_axes.sweeps(summary) if line.found]
    body = []
    for line in lines[:ROWS]:
        found, (low, high, least) = line.found or {}, bounds(line)
        cells = [
            line.axis,
            line.label,
            style.label(found["best"]),
            f"{low} to {high}",
            f"{least}{found['octaves']:.1f}",
            optimum(line),
        ]
        body.append([tex(style.clipped(cell, 44)) for cell in cells])
    head = ["axis", "line", "best", "good range", "octaves", "fitted optimum"]
    caption = f"Ranges within {series.DELTA} nats of the best.{_more(lines)}"
    return floating(tabular(head, body), caption, "tab:ranges") if body else ""


def _speedups(summary: Mapping[str, Any]) -> str:
    rows = content.speedup_rows(summary)
    if not rows:
        return ""
    body = [
        [
            tex(style.clipped(row["group"], 48)),
            tex(style.count(row["tokens"])),
            tex(style.loss(row["loss"])),
            tex(row["text"]),
        ]
        for row in rows[:ROWS]
    ]
    caption = f"Data speed-up $D_{{\\mathrm{{eff}}}}/D$. {tex(content.speedup_note(summary))}{_more(rows)}"
    return floating(tabular(["group", "tokens", "loss", "speed-up"], body), caption, "tab:speedups")


def _more(rows: Sequence[Any]) -> str:
    return f" {len(rows) - ROWS} more rows are in runs.csv." if len(rows) > ROWS else ""


def study_paper(material: Material, pictures: Sequence[str]) -> str:
    """paper.tex: a short article around the tables and the pictures (names of PNG files) that lie beside it."""
    summary = material.summary
    answer = "\n\n".join(tex(" ".join([a["headline"], *a["facts"]])) for a in content.answers(summary))
    figures = []
    for name in pictures:
        stem = name.removesuffix(".png")
        caption = (
            CAPTIONS.get(stem)
            or f"Loss, memory and time along {tex(stem.removeprefix('axis_').removesuffix('_plot'))}."
        )
        figures.append(f"\\begin{{figure}}[htbp]\n\\centering\n\\includegraphics[width=\\linewidth,height=.8\\textheight,keepaspectratio]{{{stem}}}\n\\caption{{{caption}}}\n\\end{{figure}}")  # fmt: skip
    advice = description([(r.kind, f"{r.text}: {r.reason}") for r in recommendations(summary)])
    sections = {
        "Question": description(origin(summary)),
        "Result": f"{answer}\n\n{advice}\n\n\\input{{tables}}\n\n" + "\n\n".join(figures) + "\n\\clearpage",
        "Protocol": description(protocol(material)),
        "Setting": description(setting(material)),
        "Threats to validity": description([(threat.title, threat.text) for threat in study_threats(material)]),
        "Reproduction": f"\\begin{{quote}}\\ttfamily {tex(summary.get('command') or 'not recorded')}\\end{{quote}}",
    }
    return article(str(summary.get("title") or summary["name"]), sections)


def study_card(material: Material) -> str:
    """EXPERIMENT_CARD.txt: the whole study on a page or two of plain text."""
    summary = material.summary
    title = str(summary.get("title") or summary["name"])
    lines = [title, "=" * min(100, len(title)), "", *(f"{term}: {text}" for term, text in origin(summary)), ""]
    for answer in content.answers(summary):
        lines += [answer["headline"], *(f"  {fact}" for fact in answer["facts"])]
        lines += [f"  Next: {answer['next']}"] if answer["next"] else []
    lines += ["", "CELLS, BEST FIRST (nats per token on the report split)"]
    for row in content.cell_rows(summary):
        half = f" ± {style.loss(row['half'])}" if math.isfinite(row["half"]) else ""
        cost = f"{style.duration(row['seconds'])}, {memory(row['memory'])}, {row['finished']} of {row['seeds']} seeds"
        lines.append(
            f"  {style.loss(row['loss'])}{half}  {row['cell']}{' (reference)' if row['reference'] else ''}: {cost}"
        )
    if published := content.published_rows(summary):
        lines += ["", "PUBLISHED BESIDE OURS", *filter(None, [content.published_note(summary)])]
        lines += [
            f"  {row['cell']}: {style.loss(row['published'].get('loss'))} published, {style.loss(row['loss'])} ours"
            + (f", difference {style.signed(row['difference'])}" if math.isfinite(row["difference"]) else "")
            + (
                f"; best over the run {style.loss(row['published']['best_loss'])} and {style.loss(row['best_loss'])}"
                if "best_loss" in row["published"]
                else ""
            )
            for row in published
        ]
    if ranges := [line for line in study_axes.sweeps(summary) if line.found]:
        lines += ["", f"GOOD RANGES (within {series.DELTA} nats)"]
        for line in ranges:
            low, high, least = bounds(line)
            octaves = (line.found or {})["octaves"]
            lines.append(
                f"  {line.label}: {line.axis} {low} to {high}, {least}{octaves:.1f} octaves; optimum {optimum(line)}"
            )
    if speedups := content.speedup_rows(summary):
        lines += ["", "DATA SPEED-UP (D_eff/D)", content.speedup_note(summary)]
        lines += [f"  {row['group']}: {row['text']} at {style.count(row['tokens'])} tokens" for row in speedups]
    sections = {
        "WHAT TO TAKE": [(r.kind, f"{r.text}: {r.reason}") for r in recommendations(summary)],
        "PROTOCOL": protocol(material),
        "SETTING": setting(material),
        "THREATS TO VALIDITY": [(t.title, f"{t.text} {t.remedy}".rstrip()) for t in study_threats(material)],
        "PROBLEMS": list(content.problems(material).items()),
    }
    for heading, pairs in sections.items():
        if pairs:
            lines += ["", heading, *(f"  {term}: {text}" for term, text in pairs)]
    lines += ["", "REPRODUCE", f"  {summary.get('command') or 'the command was not recorded'}", ""]
    return "\n".join(lines)
