"""What a tracker was sent is what metrics.jsonl holds; its troubles are not the run's."""

import json

import pytest
from runs import tiny

from muonlab.errors import InputError
from muonlab.training.loop import run
from muonlab.training.trackers import scalars, tracker


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_holds_every_row_of_the_run(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny()
    with tracker("tensorboard", "project", config.to_dict()) as send:
        run(config, directory=tmp_path / "run", on_event=send)
    stored = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    stored.Reload()
    expected: dict[str, dict[int, float]] = {}
    for row in rows_of(tmp_path / "run"):
        for key, value in scalars(row).items():
            expected.setdefault(key, {})[row["update"]] = value
    assert {"train/loss", "lr/hidden", "tune/cross_entropy", "tune/bits_per_byte"} <= set(expected)
    assert set(stored.Tags()["scalars"]) == set(expected)
    for key, values in expected.items():
        assert {event.step: event.value for event in stored.Scalars(key)} == pytest.approx(values, rel=1e-6)


def test_wandb_follows_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny()
    with tracker("wandb", "project", config.to_dict()) as send:
        metrics = run(config, directory=tmp_path / "run", on_event=send)
    assert metrics["status"] == "finished"
    assert [path for path in (tmp_path / "run" / "wandb").rglob("*.wandb") if path.stat().st_size > 0]


def test_trouble_of_the_tracker_is_one_line_and_the_run_goes_on(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    config = tiny()
    with tracker("tensorboard", "project", config.to_dict()) as send:

        def spoilt(row):
            send({**row, "directory": "/dev/null/nowhere"})

        metrics = run(config, directory=tmp_path / "run", on_event=spoilt)
    assert metrics["status"] == "finished"
    assert capsys.readouterr().err.count("the run goes on") == 1


def test_an_unknown_tracker_names_the_nearest_and_an_upload_needs_wandb():
    with pytest.raises(InputError, match="did you mean 'wandb'"), tracker("wandbb", "p", {}):
        pass
    pytest.importorskip("tensorboard")
    with (
        pytest.raises(InputError, match="leave --upload-checkpoints out"),
        tracker("tensorboard", "p", {}, upload=True),
    ):
        pass
