"""What the report of a study writes: complete, well-formed, and unharmed by broken or hostile input."""

import csv
import json
import re
import shutil
import statistics
import struct
import subprocess
from html.parser import HTMLParser

import pytest

from muonlab.errors import InputError
from muonlab.report import print_side_by_side, print_study, write_exports, write_report, write_study
from muonlab.studies.judge import judge

EVIL = "<script>alert(1)</script> 50 % of $x_1$ & \\alpha{^~#} “é” μ中 _x"


class Page(HTMLParser):
    """Visible text, tags and ids of a page, scripts and styles left out."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.tags, self.ids, self.addresses, self._skip = [], [], [], [], False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.texts.append(data)

    @property
    def visible(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def is_png(path):
    head = path.read_bytes()[:24]
    return head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:24])) > 100


def rows(path):
    with open(path, newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_study_gets_every_file_that_its_axes_allow(study, grid):
    assert {path.name for path in grid.glob("*_plot.png")} == {
        "comparison_plot.png",
        "performance_plot.png",
        "pareto_plot.png",
        "profile_plot.png",
        "sensitivity_plot.png",
        "heatmap_plot.png",
        "axis_momentum_plot.png",
        "axis_steps_plot.png",
    }
    assert "heatmap_plot.png" not in {path.name for path in study.iterdir()}
    for root in (study, grid):
        assert all(is_png(path) for path in root.glob("*.png"))
        texts = ("report.html", "runs.csv", "curves.csv", "tables.tex", "paper.tex", "EXPERIMENT_CARD.txt")
        assert all((root / name).stat().st_size > 100 for name in texts)
        assert (root / "report.html").stat().st_size < 8_000_000
        assert not list(root.glob(".*")), "temporary files must be gone"


def test_the_page_says_what_was_asked_then_the_verdict_then_the_rest(study):
    page = Page(study / "report.html")
    text = page.visible
    order = ("Is Muon better than AdamW here?", "muon is better than adamw here.", "Published beside ours", "Threats to validity", "Protocol and budget")  # fmt: skip
    places = [text.index(part, text.index("muon is better") - 200 if i > 1 else 0) for i, part in enumerate(order)]
    assert (
        text.index(order[0])
        < text.index(order[1])
        < text.rindex(order[2])
        < text.rindex(order[3])
        < text.rindex(order[4])
    )
    assert len(places) == len(order)
    for needed in ("seed 001, Experiments 1-7", "adam_high failed on seed 2", "diverged", "3 of 3", "2 of 3", "muonlab study core", "optimizer.lr"):  # fmt: skip
        assert needed in text, needed


def test_the_page_fetches_nothing_and_names_no_place_twice(study, grid):
    for root in (study, grid):
        page = Page(root / "report.html")
        assert not {"img", "iframe"} & set(page.tags)
        assert all(address.startswith(("#", "data:")) for address in page.addresses)
        assert len(page.ids) == len(set(page.ids))
        targets = {address[1:] for address in page.addresses if address.startswith("#")}
        assert targets <= set(page.ids)


def test_published_and_ours_stand_in_one_row_with_their_difference(study):
    summary = json.loads((study / "comparison_summary.json").read_text())
    muon = next(cell for cell in summary["cells"] if cell["cell"] == "muon_baseline")
    mean, best = muon["mean"], statistics.fmean(run["best_report_cross_entropy"] for run in muon["runs"])
    row = re.search(r'id="published".*?<tr [^>]*data-cell="muon_baseline">(.*?)</tr>', (study / "report.html").read_text(), re.DOTALL).group(1)  # fmt: skip
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
    assert cells[0] == "3.6100"
    assert cells[2].startswith(f"{mean:.4f} ± ")
    assert cells[4].replace("−", "-") == f"{mean - 3.61:+.4f}"
    assert cells[5:7] == ["3.5900", f"{best:.4f}"]
    assert f"best over the run 3.5900 and {best:.4f}" in (study / "EXPERIMENT_CARD.txt").read_text()
    assert f"& 3.5900 & {best:.4f}" in (study / "tables.tex").read_text()


def test_every_run_and_every_evaluation_is_a_row(grid):
    summary = json.loads((grid / "comparison_summary.json").read_text())
    found = rows(grid / "runs.csv")
    assert len(found) == 36
    losses = [run["report_cross_entropy"] for cell in summary["cells"] for run in cell["runs"]]
    assert [float(row["report_cross_entropy"]) for row in found] == losses
    assert {(row["axis.lr"], row["config.optimizer.lr"]) for row in found} == {(x, x) for x in ("0.03125", "0.0625", "0.125")}  # fmt: skip
    curves = rows(grid / "curves.csv")
    assert {row["cell"] for row in curves} == {cell["cell"] for cell in summary["cells"]}
    last = [row for row in curves if row["split"] == "report" and row["update"] == "40"]
    assert sorted(float(row["cross_entropy"]) for row in last) == pytest.approx(sorted(losses))


def test_the_latex_tables_are_well_formed(study):
    text = (study / "tables.tex").read_text()
    for environment in ("table", "tabular"):
        assert text.count(f"\\begin{{{environment}}}") == text.count(f"\\end{{{environment}}}") == 3
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", text, re.DOTALL):
        assert {row.count("&") - 2 * row.count("\\&") for row in body.split("\\\\") if "&" in row} == {len(columns) - 1}


def test_the_card_holds_question_cells_threats_and_command(study):
    card = (study / "EXPERIMENT_CARD.txt").read_text()
    for needed in ("Is Muon better", "CELLS, BEST FIRST", "PUBLISHED BESIDE OURS", "WHAT TO TAKE", "THREATS TO VALIDITY", "muonlab study core"):  # fmt: skip
        assert needed in card
    assert card.index("muon_baseline") < card.index("adam_high")


def hostile(fake, root):
    cells = [
        fake.cell(f"a {EVIL}", f"g {EVIL}", values={"lr": 0.01, "x": EVIL}, published={"loss": 3.0}),
        fake.cell("b", f"g {EVIL}", values={"lr": 0.02, "x": EVIL}),
        fake.cell("c", "$math$", values={"lr": 0.02, "x": "</td>"}, options={"optimizer.note": EVIL}, diverged=(1,)),
        fake.cell("_d", "$math$", values={"lr": 0.01, "x": "</td>"}),
    ]
    axes = [fake.axis("lr", "optimizer.lr", (0.01, 0.02), True), fake.axis("x", "optimizer.x", (EVIL, "</td>"))]
    fake.fake_study(root, cells, axes, title=EVIL, question=EVIL, note=EVIL, reference="b", updates=20, message=EVIL, notices=[EVIL])  # fmt: skip
    summary = json.loads((root / "comparison_summary.json").read_text())
    summary |= {"command": EVIL, "flags": [EVIL], "stale": [EVIL], "source": EVIL, "notes": [EVIL]}
    summary["problems"].append({"directory": EVIL, "message": EVIL})
    (root / "comparison_summary.json").write_text(json.dumps(summary))


def test_hostile_names_and_values_are_shown_as_text(fake, tmp_path, capsys):
    hostile(fake, tmp_path)
    write_study(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in text
    scripts = text.count("<script") - text.count('"<script')  # plotly's own source names the tag
    assert scripts == 3
    visible = Page(tmp_path / "report.html").visible
    assert visible.count("<script>alert(1)</script>") >= 10
    assert all(is_png(path) for path in tmp_path.glob("*.png"))
    print_study(tmp_path)
    assert "<script>alert(1)" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
def test_latex_accepts_the_paper_even_with_hostile_names(fake, tmp_path):
    hostile(fake, tmp_path)
    write_study(tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-1500:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def small(fake, root, **options):
    cells = [fake.cell("a", "muon", 0.02), fake.cell("b", "adamw", 0.003)]
    return fake.fake_study(root, cells, **{"seeds": (1, 2), "updates": 20, "points": 4, "reference": "b", **options})


def test_damaged_half_written_missing_and_stale_runs_are_named(fake, tmp_path, capsys):
    small(fake, tmp_path, seeds=(1, 2, 3))
    (tmp_path / "runs" / "c00-s1" / "metrics.json").write_text('{"schema": 1, "hist')
    shutil.rmtree(tmp_path / "runs" / "c00-s2")
    half = tmp_path / "runs" / "c01-s2"
    metrics = json.loads((half / "metrics.json").read_text())
    (half / "metrics.json").write_text(json.dumps({**metrics, "status": "interrupted"}))
    (half / "metrics.jsonl").write_text((half / "metrics.jsonl").read_text()[:-40])  # the crash cut the last line
    fake.fake_run(tmp_path / "runs" / "old-s1", updates=20)
    judge(tmp_path)
    write_study(tmp_path)
    visible = Page(tmp_path / "report.html").visible
    problems = visible[visible.index("Problems") : visible.index("All runs")]
    for directory, reason in (("c00-s1", "damaged"), ("c00-s2", "not yet run"), ("c01-s2", "interrupted"), ("old-s1", "earlier plan")):  # fmt: skip
        assert f"runs/{directory}" in problems
        assert reason in problems
    assert "Runs that are missing, damaged or unfinished" in visible
    assert "runs/c00-s1" in (tmp_path / "EXPERIMENT_CARD.txt").read_text()
    print_study(tmp_path)
    out = capsys.readouterr().out
    assert all(f"runs/{name}" in out for name in ("c00-s1", "c00-s2", "c01-s2", "old-s1"))


def test_a_run_that_broke_after_judging_is_named_too(fake, tmp_path):
    small(fake, tmp_path)
    (tmp_path / "runs" / "c00-s1" / "metrics.json").write_text("[1, 2]")
    write_study(tmp_path)
    assert "runs/c00-s1" in Page(tmp_path / "report.html").visible


@pytest.mark.parametrize("state", ["no run at all", "all diverged", "planned and not begun"])
def test_a_study_of_which_nothing_finished_still_has_a_report(fake, tmp_path, capsys, state):
    if state == "all diverged":
        cells = [fake.cell("a", "muon", 0.02, diverged=(1,)), fake.cell("b", "adamw", diverged=(1,))]
        axes = [fake.axis("lr", "optimizer.lr", (0.01, 0.02), True)]
        fake.fake_study(tmp_path, cells, axes, seeds=(1,), reference="b", updates=20)
    else:
        small(fake, tmp_path)
        shutil.rmtree(tmp_path / "runs")
        if state == "no run at all":
            (tmp_path / "runs").mkdir()
        judge(tmp_path)
    written = write_report(tmp_path)
    assert all(path.exists() for path in written)
    visible = Page(tmp_path / "report.html").visible
    assert "No run finished." in visible
    assert "0 of " in visible
    print_study(tmp_path)
    assert "a" in capsys.readouterr().out


def test_losses_that_are_not_numbers_are_left_out(fake, tmp_path):
    small(fake, tmp_path)
    path = tmp_path / "runs" / "c00-s1" / "metrics.json"
    metrics = json.loads(path.read_text())
    for row in metrics["history"]["train"][5:9]:
        row["loss"] = row["grad_norm"] = None
    for row in metrics["history"]["eval"][2:4]:
        row["cross_entropy"] = float("nan")
    path.write_text(json.dumps(metrics))
    judge(tmp_path)
    write_study(tmp_path)
    figures = re.search(r'<script id="figures"[^>]*>(.*?)</script>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert "NaN" not in figures.group(1)
    assert "Infinity" not in figures.group(1)


def test_one_seed_has_no_error_bar_anywhere(fake, tmp_path):
    small(fake, tmp_path, seeds=(1,))
    write_study(tmp_path)
    visible = Page(tmp_path / "report.html").visible
    assert "One seed" in visible
    assert "nan" not in visible.lower().replace("finance", "")
    assert "±" not in (tmp_path / "EXPERIMENT_CARD.txt").read_text()
    assert r"$[-\infty, +\infty]$" in (tmp_path / "tables.tex").read_text()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "comparison"}', '{"kind": "study", "name": "x"}', '{"kind": "study", "name": "x", "groups": [], "seeds": [], "cells": [{}]}'])  # fmt: skip
def test_a_folder_without_a_readable_summary_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "comparison_summary.json").write_text(content)
    with pytest.raises(InputError, match=r"comparison_summary.json[^\n]+$"):
        write_study(tmp_path)


def test_a_failing_write_leaves_the_old_page(fake, tmp_path, monkeypatch):
    small(fake, tmp_path)
    write_study(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        write_study(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_exports_of_a_study_need_no_new_drawing(fake, tmp_path):
    small(fake, tmp_path)
    written = write_exports(tmp_path)
    assert [path.name for path in written] == ["runs.csv", "curves.csv", "tables.tex", "paper.tex", "EXPERIMENT_CARD.txt"]  # fmt: skip
    assert "includegraphics" not in (tmp_path / "paper.tex").read_text()  # a picture that is not there is not included
    assert not list(tmp_path.glob("*.png"))


def test_versions_of_a_study_stand_side_by_side(fake, tmp_path, capsys):
    ours = small(fake, tmp_path / "a", version="corrected")
    theirs = small(fake, tmp_path / "b", version="as-published", updates=10)
    print_side_by_side([tmp_path / "a", tmp_path / "b"])
    out = capsys.readouterr().out
    assert "core corrected full" in out
    assert "core as-published full" in out
    for summary in (ours, theirs):
        assert f"{summary['cells'][0]['mean']:.4f}" in out


def test_the_terminal_shows_every_part(study, grid, capsys):
    print_study(study)
    print_study(grid)
    out = " ".join(capsys.readouterr().out.split())
    for needed in ("muon is better than adamw", "published beside ours", "never", "octaves", "primary: muon_baseline", "adam_high: seed 2 diverged", "noise floor: runs that differ"):  # fmt: skip
        assert needed in out, needed
