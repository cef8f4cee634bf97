"""The floor is arithmetic on shapes, and shapes are those of public models."""

import math

import pytest

from muonlab.bench.figure import Point, attainable, draw_roofline
from muonlab.bench.floor import Work, adamw_work, muon_work, training_work
from muonlab.bench.machine import stated_peak
from muonlab.bench.parameter_sets import SETS, entries_of, shapes_of
from muonlab.diagnostics.flops import count_parameters, hidden_matrices, token_flops
from muonlab.errors import InputError
from muonlab.models import MODELS

RATES = {"copy_bytes_per_second": 1e3, "matmul_flops_per_second": 1e4}


def test_the_floor_of_muon_on_two_small_matrices_is_the_one_counted_by_hand():
    work = muon_work([(2, 5), (5, 2)])
    assert work.bytes == 2 * 10 * 20  # gradient read; momentum and parameter read and written; 4 bytes each
    assert work.flops == 2 * (6 * 2 * 2 * 5 + 14 * 2 * 2 * 2)
    assert work.seconds(RATES) == pytest.approx(400 / 1e3 + 464 / 1e4)
    assert work.intensity == pytest.approx(464 / 400)


def test_adamw_moves_seven_numbers_an_entry():
    assert adamw_work([(3, 4)]) == Work(12 * 7 * 4, 0)


def test_the_floor_of_the_baselines_comes_out_at_the_rates_they_state():
    rates = {"copy_bytes_per_second": 3.02e12, "matmul_flops_per_second": 795e12}
    floors = {name: 1e3 * muon_work(SETS[name]).seconds(rates) for name in ("moe-79m", "qwen-0.5b", "llama-1b")}
    assert floors["moe-79m"] == pytest.approx(0.69, rel=0.05)
    assert floors["qwen-0.5b"] == pytest.approx(6.5, rel=0.05)
    assert floors["llama-1b"] == pytest.approx(35.0, rel=0.06)


@pytest.mark.parametrize(
    ("name", "matrices", "entries"),
    [
        ("moe-79m", 114, 60_180_480),
        ("qwen-0.5b", 168, 357_826_560),
        ("gpt-124m", 72, 84_934_656),
        ("nanochat-d20", 120, 393_216_000),
        ("llama-1b", 112, 973_078_528),
    ],
)
def test_sets_have_the_matrices_and_parameters_of_their_models(name, matrices, entries):
    assert len(shapes_of(name)) == matrices
    assert entries_of(name) == entries


@pytest.mark.parametrize("name", ["moe-79m", "gpt-124m"])
def test_sets_that_are_presets_too_have_their_hidden_matrices(name):
    options = MODELS[name]
    ours = {shape: SETS[name].count(shape) for shape in SETS[name] if shape[0] != options.n_experts}
    assert ours == hidden_matrices(options)


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown parameter set 'llama-2b'; did you mean 'llama-1b'\?"):
        shapes_of("llama-2b")


def test_a_training_update_costs_its_active_flops_and_the_bytes_that_no_cache_saves():
    options = MODELS["moe-79m"]
    work = training_work(options, 1000)
    assert work.flops == 1000 * token_flops(options).training
    assert work.bytes == 40 * count_parameters(options).total


def test_the_roof_is_bandwidth_below_the_ridge_and_the_product_rate_above():
    assert attainable(5.0, RATES) == 5e3
    assert attainable(10.0, RATES) == attainable(1000.0, RATES) == 1e4


def test_a_stated_peak_is_that_of_the_chip_and_none_for_others():
    assert stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA L40S") == 362e12
    assert stated_peak("CPU (x86_64)") is None


def test_the_figure_is_a_png(tmp_path):
    points = [Point(f"point {i}", 10.0**i, 10.0 ** (i + 2)) for i in range(-1, 12)]
    draw_roofline(tmp_path / "roof.png", points, RATES, "a title")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(attainable(1.0, RATES))
