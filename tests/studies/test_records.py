"""The index of a study is a memory of its run directories, believed only as far as it is certain to be theirs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from muonlab.studies import records
from muonlab.studies.records import INDEX, read_records


def metrics(loss: float) -> dict[str, Any]:
    row = {"update": 3, "tokens": 192, "seconds": 0.5, "split": "report", "cross_entropy": loss}
    return {
        "status": "finished",
        "seed": 1,
        "updates": 3,
        "config": {},
        "seconds": {"training": 0.5},
        "data": {},
        "versions": {},
        "history": {"train": [{"update": 3, "loss": loss}], "eval": [row]},
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "metrics.json").write_text(json.dumps(metrics(4.25)))
    return tmp_path


def best(study: Path) -> float:
    return read_records(study).runs["runs/a"]["best_report_cross_entropy"]


def falsify(study: Path, **changes: Any) -> None:
    """An index that says something else than the run directory, so that its use shows."""
    index = json.loads((study / INDEX).read_text())
    index["runs"]["runs/a"]["record"]["best_report_cross_entropy"] = 1.0
    (study / INDEX).write_text(json.dumps({**index, **changes}))


def test_what_was_read_is_remembered(study):
    assert best(study) == 4.25
    falsify(study)
    assert best(study) == 1.0


def test_an_index_made_by_code_that_reads_runs_otherwise_is_made_anew(study, monkeypatch):
    best(study)
    falsify(study)
    monkeypatch.setattr(records, "FORMAT", records.FORMAT + 1)
    assert best(study) == 4.25
    monkeypatch.undo()
    assert best(study) == 4.25, "nor does older code trust what newer code has remembered"


def test_a_run_that_was_made_again_is_read_again(study):
    best(study)
    falsify(study)
    file = study / "runs" / "a" / "metrics.json"
    stat = file.stat()
    file.write_text(json.dumps(metrics(3.75)))  # of the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert best(study) == 3.75


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 1}', '{"code": "0.1.0", "runs": {}}', '{"format": 2, "runs": 3}']
)
def test_a_damaged_or_older_index_is_replaced(study, content):
    (study / INDEX).write_text(content)
    assert best(study) == 4.25
    assert json.loads((study / INDEX).read_text())["format"] == records.FORMAT
