"""What a study is said to cost is what its shapes cost, at the rate that was measured here."""

import json

import pytest
from tiny_study import written

from muonlab.studies.cost import machine_rate, remember_rate, run_flops, study_flops, study_seconds
from muonlab.studies.study import read_study


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MUONLAB_HOME", str(tmp_path / "home"))


def test_the_cost_of_a_study_is_that_of_all_its_runs(tmp_path):
    path = written(tmp_path)
    one = study_flops(read_study(path, only=["adam"], seeds=1))
    assert study_flops(read_study(path)) == pytest.approx(8 * one)
    assert study_flops(read_study(path, overrides={"training": {"updates": 12}})) == pytest.approx(16 * one)


def test_a_run_costs_three_forward_passes_of_two_flops_per_weight(tmp_path):
    """6 N D, and the attention's own products: 2 layers, width 32, heads see (T + 1) / 2 = 16.5 positions on average."""
    config = read_study(written(tmp_path)).cells[0].config
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 257 * 32
    attention = 2 * 4 * 32 * 16.5
    assert run_flops(config) == pytest.approx(3 * (2 * weights + attention) * 4 * 32 * 6)


def test_the_rate_of_the_last_study_is_what_the_next_is_estimated_by(tmp_path):
    study = read_study(written(tmp_path))
    assert machine_rate() > 1e8  # nothing has run: a share of a matrix product's
    config = study.cells[0].config
    run = {"status": "finished", "seconds": {"training": 20.0}}
    remember_rate([(run, config), ({"status": "failed"}, config)], at_a_time=2)
    assert machine_rate() == pytest.approx(2 * run_flops(config) / 20.0)
    assert study_seconds(study) == pytest.approx(study_flops(study) / machine_rate())


def test_runs_too_short_to_say_anything_and_a_damaged_file_change_nothing(tmp_path):
    config = read_study(written(tmp_path)).cells[0].config
    remember_rate([({"status": "finished", "seconds": {"training": 1.0}}, config)], at_a_time=1)
    assert not (tmp_path / "home" / "speed.json").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "speed.json").write_text(json.dumps({"rate": 1}))
    assert machine_rate() > 1e8
