"""A comparison for other programs and for print: CSV, LaTeX (booktabs), and a card of plain text."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.report import content, series, style
from muonlab.report.reading import Material
from muonlab.report.stability import recommendations
from muonlab.report.threats import threats
from muonlab.training.config import flat

TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "±": r"\ensuremath{\pm}",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
    "→": r"\ensuremath{\to}",
    "·": r"\ensuremath{\cdot}",
    "…": r"\dots{}",
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
    return csv_text(rows)


def curves_csv(material: Material) -> str:
    """Every evaluation of every run: directory, optimizer (and cell), seed, split, update, tokens, seconds, cross-entropy."""
    rows = []
    cells = {run["directory"]: cell["cell"] for cell in material.summary.get("cells", ()) for run in cell["runs"]}
    keys = ("split", "update", "tokens", "seconds", "cross_entropy", "bits_per_byte", "accuracy")
    for directory, run in material.runs.items():
        head = {"directory": directory} | ({"cell": cells[directory]} if directory in cells else {})
        head |= {"optimizer": run.get("optimizer"), "seed": run["seed"]}
        rows += [{**head, **{key: row.get(key) for key in keys}} for row in run["history"].get("eval", ())]
    return csv_text(rows)


def comparison_tex(material: Material) -> str:
    """Two booktabs tables, to be read with \\input: the optimizers at a glance, and the verdicts."""
    summary = material.summary
    rows = [content.overview(material, name) for name in summary["optimizers"]]
    glance = tabular(
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
    verdicts = tabular(
        ["candidate", "reference", "difference (nats/token)", "interval", "verdict"],
        [
            [
                tex(verdict["candidate"]),
                tex(verdict["reference"]),
                f"${signed_tex(verdict.get('mean'))}$",
                tex_interval(*(verdict.get("interval") or (None, None))),
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
        "% needs \\usepackage{booktabs,graphicx}\n"
        + floating(
            glance,
            f"Final loss on the report split, mean $\\pm$ standard deviation over seeds. {caption}",
            "tab:optimizers",
        )
        + "\n"
        + floating(verdicts, "Paired differences by seed; negative means that the candidate is better.", "tab:verdicts")
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
        "Protocol": description(content.protocol(material)),
        "Setting": description(content.setting(material)),
        "Threats to validity": description([(threat.title, threat.text) for threat in threats(material)]),
        "Reproduction": f"\\begin{{quote}}\\ttfamily {tex(summary.get('command') or 'not recorded')}\\end{{quote}}",
    }
    return article(summary["question"], sections)


def article(title: str, sections: Mapping[str, str]) -> str:
    """A LaTeX document with a title and sections of LaTeX text."""
    body = "\n\n".join(f"\\section{{{name}}}\n{text}" for name, text in sections.items())
    return (
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage[utf8]{inputenc}\n\\usepackage{booktabs,graphicx}\n"
        "\\usepackage[margin=2.5cm]{geometry}\n\\sloppy\n"
        f"\\title{{{tex(title)}}}\n\\date{{}}\n\\begin{{document}}\n\\maketitle\n\n{body}\n\n\\end{{document}}\n"
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
    """Text that LaTeX prints as it is; a character that its fonts lack by its number, so that no name stops a paper."""
    text = "".join(TEX.get(character) or _letter(character) for character in str(value))
    return text.replace("--", "-{}-")  # two hyphens of a flag would become a dash


def _letter(character: str) -> str:
    if character in "“”‘—„‚•":
        return character
    return " " if not character.isprintable() else character if ord(character) < 0x180 else f"[U+{ord(character):04X}]"


def description(items: Sequence[tuple[str, str]]) -> str:
    """Terms and texts as a LaTeX list."""
    lines = "\n".join(f"\\item[{{{tex(term)}}}] {tex(text)}" for term, text in items)
    return f"\\begin{{description}}\n{lines}\n\\end{{description}}" if items else ""


def signed_tex(value: Any, unknown: str = "?") -> str:
    """A difference for math mode."""
    number = series.number(value)
    return f"{number:+.4f}" if math.isfinite(number) else unknown


def tex_interval(low: Any, high: Any) -> str:
    """An interval in math mode; bounds that are not finite are infinite."""
    return "$[" + signed_tex(low, r"-\infty") + ", " + signed_tex(high, r"+\infty") + "]$"


def tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs tabular; cells are LaTeX text."""
    body = " \\\\\n".join(" & ".join(row) for row in [head, *rows])
    first, _, rest = body.partition("\n")
    return f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{first}\n\\midrule\n{rest} \\\\\n\\bottomrule\n\\end{{tabular}}"


def floating(tabular: str, caption: str, label: str) -> str:
    """A tabular as a floating table, made smaller where it is wider than the text."""
    fitted = f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{tabular}}}"
    return (
        f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{caption}}}\n\\label{{{label}}}\n{fitted}\n\\end{{table}}\n"
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """RFC 4180 text with one header; lists as JSON, nothing where there is no value."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column) for column in columns]
        writer.writerow(["" if c is None else json.dumps(c) if isinstance(c, list | dict) else c for c in cells])
    return text.getvalue()
