"""Run directories in, tables, figures and one self-contained page out. Importing this loads no plotting library."""

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

    material = read_material(directory)
    picture, page = Path(directory) / "comparison_plot.png", Path(directory) / "report.html"
    comparison_plot(material.summary, material.runs, picture)
    text = comparison_page(material)
    _write_text(page, text)
    return [picture, page]


def write_exports(directory: str | Path) -> list[Path]:
    """Write the comparison in `directory` for other programs and for print, beside its summary.

    `runs.csv` (a row per run with its configuration), `curves.csv` (a row per evaluation), `tables.tex` (booktabs),
    `paper.tex` (an article around tables and figure), `EXPERIMENT_CARD.txt` and
    `pareto_plot.png` (time against loss of the final runs). InputError without a readable summary.
    """
    from muonlab.report import exports, series
    from muonlab.report.reading import read_material
    from muonlab.report.surveys import pareto_plot

    material = read_material(directory)
    texts = {
        "runs.csv": exports.runs_csv(material),
        "curves.csv": exports.curves_csv(material),
        "tables.tex": exports.comparison_tex(material),
        "paper.tex": exports.paper_tex(material),
        "EXPERIMENT_CARD.txt": exports.experiment_card(material),
    }
    for name, text in texts.items():
        _write_text(Path(directory) / name, text)
    picture = Path(directory) / "pareto_plot.png"
    entries = [e for e in material.summary["finals"] if e["directory"] in material.runs and e["status"] == "finished"]
    points = [
        (e["optimizer"], "", series.number(e.get("seconds")), series.number(e.get("report_cross_entropy")))
        for e in entries
    ]
    pareto_plot(points, "report", picture)
    return [*(Path(directory) / name for name in texts), picture]


def print_comparison(directory: str | Path, console: Any = None) -> None:
    """Print trials, final losses, targets and verdicts of the comparison in `directory` (to a rich console)."""
    from rich.console import Console

    from muonlab.report.reading import read_summary
    from muonlab.report.tables import comparison_tables
    from muonlab.studies.compare import SUMMARY

    console = console or Console()
    for part in comparison_tables(read_summary(Path(directory) / SUMMARY)):
        console.print(part)


def _write_text(path: Path, text: str) -> None:
    from muonlab.training.tracking import replace_file

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())  # bytes: CSV brings its own line ends

    replace_file(path, write)


__all__ = ["print_comparison", "write_comparison", "write_exports", "write_run"]
