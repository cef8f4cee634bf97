"""The page of claims says what the stored evidence says."""

import json
from pathlib import Path

import pytest

from muonlab.cli import main

ROOT = Path(__file__).parents[1]


def test_the_page_of_claims_is_the_one_that_the_evidence_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folders = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "evidence").glob("*-micro"))
    assert folders
    assert main(["claims", *folders, "-o", str(tmp_path / "claims.md")]) == 0
    made, kept = ((folder / "claims.md").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
    assert made.replace(str(tmp_path / "claims.md"), "docs/claims.md") == kept


@pytest.mark.parametrize("name", ["exp9-micro"])
def test_the_tables_of_a_report_are_those_of_its_evidence(name):
    summary = json.loads((ROOT / "docs" / "evidence" / name / "comparison_summary.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "reports" / f"{name}.md").read_text(encoding="utf-8")
    for cell in summary["cells"]:
        half = (cell["interval"][1] - cell["interval"][0]) / 2
        assert f"| {cell['rank']} | `{cell['cell']}` | {cell['mean']:.4f} ± {half:.4f} |" in page


def test_evidence_names_no_folder_of_the_machine_that_made_it():
    for path in (ROOT / "docs" / "evidence").glob("*/comparison_summary.json"):
        words = json.loads(path.read_text(encoding="utf-8"))["command"].split()
        assert not [word for word in words if Path(word).is_absolute()], path
