"""A comparison for other programs and for print: CSV, LaTeX (booktabs), and a card of plain text."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.report import content, series, style
from muonlab.report.differences import flat
from muonlab.report.reading import Material
from muonlab.report.stability import recommendations
from muonlab.report.threats import threats

TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "±": r"\ensuremath{\pm}",
    "≥": r"\ensuremath{\geq}",
    "–": r"\textendash{}",
    "’": "'",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def runs_csv(material: Material) -> str:
    """Every run, tuning trials and final runs, one row each: outcome, cost, and the full configuration as columns."""
    rows = []
    for stage, entries in (("tune", material.summary.get("trials", ())), ("final", material.summary.get("finals", ()))):
        for entry in entries:
            run = material.runs.get(entry.get("directory"), {})
            final = (run.get("final") or {}).get("report" if stage == "final" else "tune") or {}
            rows.append(
                {
                    "stage": stage,
                    "optimizer": entry["optimizer"],
                    "trial": entry.get("index"),
                    "seed": entry.get("seed", run.get("seed")),
                    "status": entry["status"],
                    "cross_entropy": entry.get("report_cross_entropy" if stage == "final" else "tune_cross_entropy"),
                    "bits_per_byte": entry.get("bits_per_byte", final.get("bits_per_byte")),
                    "accuracy": final.get("accuracy"),
                    "updates": run.get("updates"),
                    "tokens": run.get("tokens"),
                    "training_seconds": entry.get("seconds"),
                    "updates_per_second": run.get("updates_per_second"),
                    "peak_memory_bytes": run.get("peak_memory_bytes"),
                    "directory": entry.get("directory"),
                    **{f"config.{key}": value for key, value in flat(run.get("config") or {}).items()},
                }
            )
    return _csv(rows)


def curves_csv(material: Material) -> str:
    """Every evaluation of every run: directory, optimizer, seed, split, update, tokens, seconds, cross-entropy."""
    rows = []
    for directory, run in material.runs.items():
        for row in run["history"].get("eval", ()):
            head = {"directory": directory, "optimizer": run["optimizer"], "seed": run["seed"]}
            keys = ("split", "update", "tokens", "seconds", "cross_entropy", "bits_per_byte", "accuracy")
            rows.append({**head, **{key: row.get(key) for key in keys}})
    return _csv(rows)


def comparison_tex(material: Material) -> str:
    """Two booktabs tables, to be read with \\input: the optimizers at a glance, and the verdicts."""
    summary = material.summary
    rows = [content.overview(material, name) for name in summary["optimizers"]]
    glance = _tabular(
        ["optimizer", "loss (nats/token)", "bits/byte", "training (s)", "good range (octaves)"],
        [
            [
                tex(row["name"]),
                f"${style.loss(row['loss'])}"
                + (rf" \pm {style.loss(row['spread'])}$" if math.isfinite(row["spread"]) else "$"),
                style.loss(row["bits"]),
                style.short(row["seconds"]),
                ((r"$\geq$\," if row["open"] else "") + f"{row['range'].octaves:.1f}") if row["range"] else "--",
            ]
            for row in rows
        ],
    )
    verdicts = _tabular(
        ["candidate", "reference", "difference (nats/token)", "interval", "verdict"],
        [
            [
                tex(verdict["candidate"]),
                tex(verdict["reference"]),
                f"${_tex_signed(verdict.get('mean'))}$",
                _tex_interval(*(verdict.get("interval") or (None, None))),
                tex(verdict.get("verdict") or "no verdict"),
            ]
            for verdict in summary.get("verdicts", ())
        ],
    )
    budget = summary["budget"]
    caption = (
        f"{budget['trials']} tuning trials and {budget['seeds']} seeds per optimizer, {budget['updates']} updates each."
    )
    return (
        "% needs \\usepackage{booktabs}\n"
        + _table(
            glance,
            f"Final loss on the report split, mean $\\pm$ standard deviation over seeds. {caption}",
            "tab:optimizers",
        )
        + "\n"
        + _table(verdicts, "Paired differences by seed; negative means that the candidate is better.", "tab:verdicts")
    )


def paper_tex(material: Material) -> str:
    """paper.tex: a short article around the tables and the figure that lie beside it."""
    summary = material.summary
    answer = " ".join(" ".join([a["headline"], *a["facts"]]) for a in content.answers(summary))
    sections = {
        "Result": f"{tex(answer)}\n\n\\input{{tables}}\n\n"
        "\\begin{figure}\n\\centering\n\\includegraphics[width=\\linewidth]{comparison_plot}\n"
        f"\\caption{{(a) Final runs: mean and range over seeds. (b) Tuning trials; bars: within {series.DELTA} nats of the best. "
        "(c) Paired differences by seed with their interval.}\n\\end{figure}",
        "Protocol": _description(content.protocol(material)),
        "Setting": _description(content.setting(material)),
        "Threats to validity": _description([(threat.title, threat.text) for threat in threats(material)]),
        "Reproduction": f"\\begin{{quote}}\\ttfamily {tex(summary.get('command') or 'not recorded')}\\end{{quote}}",
    }
    body = "\n\n".join(f"\\section{{{title}}}\n{text}" for title, text in sections.items())
    return (
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs,graphicx}\n"
        "\\usepackage[margin=2.5cm]{geometry}\n\\sloppy\n"
        f"\\title{{{tex(summary['question'])}}}\n\\date{{}}\n\\begin{{document}}\n\\maketitle\n\n{body}\n\n\\end{{document}}\n"
    )


def experiment_card(material: Material) -> str:
    """EXPERIMENT_CARD.txt: the whole comparison on one page of plain text."""
    summary = material.summary
    lines = [summary["question"], "=" * min(100, len(summary["question"])), ""]
    for answer in content.answers(summary):
        lines += [answer["headline"], *(f"  {fact}" for fact in answer["facts"])]
        lines += [f"  Next: {answer['next']}"] if answer["next"] else []
    lines += ["", "OPTIMIZERS"]
    for row in (content.overview(material, name) for name in summary["optimizers"]):
        spread = f" ± {style.loss(row['spread'])}" if math.isfinite(row["spread"]) else ""
        width = f"{'≥ ' if row['open'] else ''}{row['range'].octaves:.1f} octaves" if row["range"] else "–"
        lines.append(
            f"  {row['name']}: loss {style.loss(row['loss'])}{spread} nats per token, {row['finished']} seeds finished"
        )
        lines.append(
            f"    chosen {style.values_text(row['chosen']) or '–'}; good range of lr {width}; training {style.duration(row['seconds'])} per run"
        )
    lines += ["", "WHAT TO TAKE", *(f"  {r.kind}: {r.text}: {r.reason}" for r in recommendations(summary))]
    lines += ["", "PROTOCOL", *(f"  {term}: {text}" for term, text in content.protocol(material))]
    lines += ["", "SETTING", *(f"  {term}: {text}" for term, text in content.setting(material))]
    lines += [
        "",
        "THREATS TO VALIDITY",
        *(f"  {threat.title}: {threat.text} {threat.remedy}".rstrip() for threat in threats(material)),
    ]
    lines += ["", "REPRODUCE", f"  {summary.get('command') or 'the command was not recorded'}", ""]
    return "\n".join(lines)


def tex(value: Any) -> str:
    """Text that LaTeX prints as it is."""
    text = "".join(TEX.get(character, character) for character in str(value))
    return text.replace("--", "-{}-")  # two hyphens of a flag would become a dash


def _description(items: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f"\\item[{{{tex(term)}}}] {tex(text)}" for term, text in items)
    return f"\\begin{{description}}\n{lines}\n\\end{{description}}" if items else ""


def _tex_signed(value: Any, unknown: str = "?") -> str:
    number = series.number(value)
    return f"{number:+.4f}" if math.isfinite(number) else unknown


def _tex_interval(low: Any, high: Any) -> str:
    return "$[" + _tex_signed(low, r"-\infty") + ", " + _tex_signed(high, r"+\infty") + "]$"


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = " \\\\\n".join(" & ".join(row) for row in [head, *rows])
    first, _, rest = body.partition("\n")
    return f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{first}\n\\midrule\n{rest} \\\\\n\\bottomrule\n\\end{{tabular}}"


def _table(tabular: str, caption: str, label: str) -> str:
    return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{{label}}}\n{tabular}\n\\end{{table}}\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """RFC 4180 text with one header; lists as JSON, nothing where there is no value."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column) for column in columns]
        writer.writerow(["" if c is None else json.dumps(c) if isinstance(c, list | dict) else c for c in cells])
    return text.getvalue()
