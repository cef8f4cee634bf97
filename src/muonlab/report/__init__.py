"""Run directories in, tables, figures and one self-contained page out. Importing this loads no plotting library."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_run(directory: str | Path) -> Path:
    """Draw `metrics_plot.png` of the run in `directory` and return its path. InputError where no run can be read."""
    from muonlab.report.figures import run_plot
    from muonlab.training.tracking import read_run

    path = Path(directory) / "metrics_plot.png"
    run_plot(read_run(directory), path)
    return path


def write_comparison(directory: str | Path) -> list[Path]:
    """Write `comparison_plot.png` and `report.html` beside the `comparison_summary.json` in `directory`.

    Run directories that are missing or damaged are listed in the report and break nothing. InputError without a
    readable summary. Files are replaced atomically.
    """
    from muonlab.report.figures import comparison_plot
    from muonlab.report.html import comparison_page
    from muonlab.report.reading import read_material

    material = read_material(directory, "comparison")
    picture, page = Path(directory) / "comparison_plot.png", Path(directory) / "report.html"
    comparison_plot(material.summary, material.runs, picture)
    text = comparison_page(material)
    _write_text(page, text)
    return [picture, page]


def write_study(directory: str | Path) -> list[Path]:
    """Write everything about the study in `directory` beside its `comparison_summary.json`: `report.html`, pictures
    (`*_plot.png`, those for which it has axes) and the texts of write_exports. Every run is read once.

    Run directories that are missing or damaged are listed in the report and break nothing. InputError without a
    readable summary. Files are replaced atomically.
    """
    from muonlab.report.html import study_page
    from muonlab.report.reading import read_material
    from muonlab.report.study_files import pictures, texts

    root = Path(directory)
    with _collector_paused():
        material = read_material(root, "study")
        drawings = pictures(material)
        for name, draw in drawings.items():
            draw(root / name)
        written = {"report.html": study_page(material), **texts(material, list(drawings))}
    for name, text in written.items():
        _write_text(root / name, text)
    return [root / name for name in (*written, *drawings)]


def write_report(directory: str | Path) -> list[Path]:
    """Everything about the comparison or the study in `directory`, whichever its summary is."""
    if _kind(directory) == "study":
        return write_study(directory)
    return write_comparison(directory) + write_exports(directory)


def write_exports(directory: str | Path) -> list[Path]:
    """Write the comparison or study in `directory` for other programs and for print, beside its summary.

    `runs.csv` (a row per run with its configuration), `curves.csv` (a row per evaluation), `tables.tex` (booktabs),
    `paper.tex` (an article around tables and pictures), `EXPERIMENT_CARD.txt`, and for a comparison
    `pareto_plot.png` (time against loss of the final runs). InputError without a readable summary.
    """
    from muonlab.report import exports, series
    from muonlab.report.reading import read_material
    from muonlab.report.surveys import pareto_plot

    root, material = Path(directory), read_material(directory)
    if material.summary["kind"] == "study":
        from muonlab.report.study_files import pictures
        from muonlab.report.study_files import texts as study_texts

        texts = study_texts(material, [name for name in pictures(material) if (root / name).exists()])
    else:
        texts = {
            "runs.csv": exports.runs_csv(material),
            "curves.csv": exports.curves_csv(material),
            "tables.tex": exports.comparison_tex(material),
            "paper.tex": exports.paper_tex(material),
            "EXPERIMENT_CARD.txt": exports.experiment_card(material),
        }
    for name, text in texts.items():
        _write_text(root / name, text)
    written = [root / name for name in texts]
    if material.summary["kind"] == "study":
        return written
    entries = [e for e in material.summary["finals"] if e["directory"] in material.runs and e["status"] == "finished"]
    points = [
        (e["optimizer"], "", series.number(e.get("seconds")), series.number(e.get("report_cross_entropy")))
        for e in entries
    ]
    pareto_plot(points, "report", root / "pareto_plot.png")
    return [*written, root / "pareto_plot.png"]


def print_comparison(directory: str | Path, console: Any = None) -> None:
    """Print trials, final losses, targets and verdicts of the comparison in `directory` (to a rich console)."""
    from muonlab.report.reading import read_summary
    from muonlab.report.tables import comparison_tables
    from muonlab.studies.judge import SUMMARY

    _print(comparison_tables(read_summary(Path(directory) / SUMMARY, "comparison")), console)


def print_study(directory: str | Path, console: Any = None) -> None:
    """Print cells, published numbers, good ranges, targets and verdicts of the study in `directory` (to a rich console)."""
    from muonlab.report.reading import read_summary
    from muonlab.report.study_tables import study_tables
    from muonlab.studies.judge import SUMMARY

    _print(study_tables(read_summary(Path(directory) / SUMMARY, "study")), console)


def print_side_by_side(directories: Sequence[str | Path], console: Any = None) -> None:
    """Print several studies, such as the versions of one, as one table: a row for each cell, a column for each folder."""
    from muonlab.report.reading import read_summary
    from muonlab.report.study_tables import versions_table
    from muonlab.studies.judge import SUMMARY

    summaries = [read_summary(Path(directory) / SUMMARY, "study") for directory in directories]
    labels = [" ".join(filter(None, (s["name"], s.get("version"), s.get("scale")))) for s in summaries]
    if len(set(labels)) < len(labels):
        labels = [str(directory) for directory in directories]
    _print([versions_table(list(zip(labels, summaries)))], console)


def _print(parts: Iterable[Any], console: Any) -> None:
    import sys

    from rich.console import Console

    console = console or Console(width=None if sys.stdout.isatty() else 200)  # names in a pipe stay in one piece
    for part in parts:
        console.print(part)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cyclic garbage collector, which would walk the millions of numbers of a large study again and again, and
    find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _kind(directory: str | Path) -> str:
    from muonlab.report.reading import read_summary
    from muonlab.studies.judge import SUMMARY

    return str(read_summary(Path(directory) / SUMMARY)["kind"])


def _write_text(path: Path, text: str) -> None:
    from muonlab.training.tracking import replace_file

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())  # bytes: CSV brings its own line ends

    replace_file(path, write)


__all__ = [
    "print_comparison",
    "print_side_by_side",
    "print_study",
    "write_comparison",
    "write_exports",
    "write_report",
    "write_run",
    "write_study",
]
