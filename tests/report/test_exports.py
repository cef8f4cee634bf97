"""What leaves the lab as CSV, LaTeX and plain text."""

import csv
import io
import re
import shutil
import subprocess

import pytest

from muonlab.report import exports, write_comparison, write_exports
from muonlab.report.reading import read_material


@pytest.fixture(scope="module")
def material(comparison):
    return read_material(comparison)


def test_every_run_is_a_row_that_reads_back(material):
    rows = list(csv.DictReader(io.StringIO(exports.runs_csv(material))))
    summary = material.summary
    assert len(rows) == len(summary["trials"]) + len(summary["finals"])
    losses = [float(row["cross_entropy"]) for row in rows if row["stage"] == "final"]
    assert losses == [entry["report_cross_entropy"] for entry in summary["finals"]]
    assert {row["config.optimizer.lr"] for row in rows if row["optimizer"] == "muon" and row["stage"] == "final"} == {
        "0.02"
    }
    assert [row["cross_entropy"] for row in rows if row["status"] == "diverged"] == [""]


def test_every_evaluation_is_a_row(material):
    rows = list(csv.DictReader(io.StringIO(exports.curves_csv(material))))
    assert len(rows) == sum(len(run["history"]["eval"]) for run in material.runs.values())
    assert {row["split"] for row in rows} == {"tune", "report"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b", r"a\_b"),
        ("--seeds 3", r"-{}-seeds 3"),
        ("50 % & $x$", r"50 \% \& \$x\$"),
        ("\\{}", r"\textbackslash{}\{\}"),
        ("a^~#", r"a\textasciicircum{}\textasciitilde{}\#"),
        ("β é\n\x00", "[U+03B2] é  "),
    ],
)
def test_names_are_escaped_for_latex(text, expected):
    assert exports.tex(text) == expected


def test_the_latex_tables_are_well_formed(material):
    text = exports.comparison_tex(material)
    for environment in ("table", "tabular"):
        assert text.count(f"\\begin{{{environment}}}") == text.count(f"\\end{{{environment}}}") == 2
    assert text.count("\\toprule") == text.count("\\midrule") == text.count("\\bottomrule") == 2
    for body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", text, re.DOTALL):
        columns, rows = body
        assert {row.count("&") for row in rows.split("\\\\") if "&" in row} == {len(columns) - 1}
    assert "better" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
def test_latex_accepts_the_paper_even_with_hostile_names(fake, tmp_path):
    evil = "<b>50 % of $x_1$ & \\alpha{^~#} “é”"
    fake.fake_comparison(tmp_path, ("a_b", "adamw"), question=evil, name=evil, notices=[evil])
    write_comparison(tmp_path)
    write_exports(tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-1500:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def test_the_card_holds_verdict_protocol_threats_and_command(material):
    card = exports.experiment_card(material)
    for needed in (
        "muon is better than adamw here.",
        "PROTOCOL",
        "THREATS TO VALIDITY",
        "octaves",
        material.summary["command"],
    ):
        assert needed in card
    assert "<" not in card


def test_an_interval_of_one_seed_is_unbounded_in_print(fake, tmp_path):
    fake.fake_comparison(tmp_path, seeds=1)
    assert r"$[-\infty, +\infty]$" in exports.comparison_tex(read_material(tmp_path))


def test_exports_lie_beside_the_summary(fake, tmp_path):
    fake.fake_comparison(tmp_path)
    written = write_exports(tmp_path)
    assert [path.name for path in written] == [
        "runs.csv",
        "curves.csv",
        "tables.tex",
        "paper.tex",
        "EXPERIMENT_CARD.txt",
        "pareto_plot.png",
    ]
    assert all(path.stat().st_size > 100 for path in written)
