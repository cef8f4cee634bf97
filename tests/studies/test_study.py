"""A study file becomes exactly the runs that it describes, or one line that says what is wrong with it."""

import json
from pathlib import Path

import pytest
from tiny_study import FILE, file, written

from muonlab.errors import InputError
from muonlab.studies.format import json_schema, lay, read_file
from muonlab.studies.study import read_study


def cells(path, **options):
    return {cell.name: cell for cell in read_study(path, **options).cells}


def test_every_case_is_multiplied_by_the_axes_that_apply_to_it(tmp_path):
    found = cells(written(tmp_path))
    assert list(found) == ["muon lr=0.005", "muon lr=0.02", "muon lr=0.08", "adam"]
    assert [cell.config.optimizer.lr for cell in found.values()] == [0.005, 0.02, 0.08, 0.003]
    assert [cell.group for cell in found.values()] == ["muon", "muon", "muon", "adamw"]
    assert found["muon lr=0.02"].values == {"lr": 0.02}
    assert found["adam"].values == {}


def test_axes_make_a_grid_in_order(tmp_path):
    axes = [
        {"name": "lr", "field": "optimizer.lr", "values": [0.01, 0.1]},
        {"name": "momentum", "field": "optimizer.momentum", "values": [0.9, 0.95]},
    ]
    found = cells(written(tmp_path, cases=None, reference=None, axes=axes, published=None, versions=None, default=None))
    assert list(found) == [
        "lr=0.01 momentum=0.9",
        "lr=0.01 momentum=0.95",
        "lr=0.1 momentum=0.9",
        "lr=0.1 momentum=0.95",
    ]
    assert [(c.config.optimizer.lr, c.config.optimizer.momentum) for c in found.values()] == [
        (0.01, 0.9), (0.01, 0.95), (0.1, 0.9), (0.1, 0.95)
    ]  # fmt: skip


def test_fields_of_one_axis_move_together(tmp_path):
    axes = [{"name": "lr", "fields": ["optimizer.lr", "optimizer.embedding_lr"], "values": [[0.07, 0.007], [0.03, 0.003]], "only": "muon"}]  # fmt: skip
    found = cells(written(tmp_path, axes=axes, published=None))
    rates = [(c.config.optimizer.lr, c.config.optimizer.embedding_lr) for n, c in found.items() if n != "adam"]
    assert rates == [(0.07, 0.007), (0.03, 0.003)]
    assert next(iter(found)) == "muon lr=0.07"


def test_a_log_range_has_a_constant_ratio_and_both_ends(tmp_path):
    axes = [{"name": "lr", "field": "optimizer.lr", "log_range": [1e-3, 1e-1, 5], "only": "muon"}]
    study = read_study(written(tmp_path, axes=axes, published=None))
    assert study.axes[0].values == pytest.approx((1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1), rel=1e-5)
    assert study.axes[0].log


def test_quasi_random_points_fill_their_box_and_are_the_same_every_time(tmp_path):
    ranges = {"optimizer.lr": [1e-3, 1e-1], "optimizer.momentum": [0.8, 0.96, "linear"]}
    path = written(tmp_path, axes=[{"name": "point", "sobol": 8, "ranges": ranges, "only": "muon"}], published=None)
    options = [cell.config.optimizer for cell in read_study(path).cells if cell.group == "muon"]
    assert [o.lr for o in options] == [cell.config.optimizer.lr for cell in read_study(path).cells][:8]
    for count, low, high, value in ((4, 1e-3, 1e-2, "lr"), (4, 0.8, 0.88, "momentum")):
        inside = [low <= getattr(o, value) < high for o in options]
        assert abs(sum(inside) - count) <= 1  # half of the points in each half (of the logarithm) of a range
        assert len({getattr(o, value) for o in options}) == 8
    assert all(1e-3 <= o.lr <= 1e-1 and 0.8 <= o.momentum <= 0.96 for o in options)


def test_an_observed_axis_makes_no_cells_and_places_the_cases_that_have_a_value(tmp_path):
    cases = [{"name": name, "optimizer": {"name": "muon", **size}} for name, size in (("a", {"block_size": 16}), ("b", {"block_size": 8}), ("whole", {}))]  # fmt: skip
    axes = [{"name": "block size", "field": "optimizer.block_size", "observed": True}]
    study = read_study(written(tmp_path, cases=cases, axes=axes, reference="whole", published=None, versions=None, default=None))  # fmt: skip
    assert [(cell.name, cell.values) for cell in study.cells] == [("a", {"block size": 16}), ("b", {"block size": 8}), ("whole", {})]  # fmt: skip
    assert study.axes[0].values == (8, 16)


def test_a_version_changes_what_it_says_and_nothing_else(tmp_path):
    path = written(tmp_path)
    published, corrected = read_study(path, version="as-published"), read_study(path)
    assert (corrected.version, published.note) == ("corrected", "the clock counted micro-batches")
    assert {cell.config.schedule.stretch for cell in published.cells} == {4.0}
    assert {cell.config.schedule.stretch for cell in corrected.cells} == {1.0}
    decay = {cell.name: cell.config.optimizer.weight_decay for cell in published.cells}
    assert decay == {"muon lr=0.005": 0.0, "muon lr=0.02": 0.0, "muon lr=0.08": 0.0, "adam": 0.1}
    assert {c.config.optimizer.weight_decay for c in corrected.cells if c.group == "muon"} == {0.2}
    assert published.published_applies
    assert not corrected.published_applies


def test_a_scale_has_its_own_sizes_and_seeds_and_no_published_numbers(tmp_path):
    half = read_study(written(tmp_path), scale="half", version="as-published")
    assert {cell.config.training.updates for cell in half.cells} == {3}
    assert half.seeds == (1,)
    assert not half.published_applies
    assert half.folder == "study-tiny-as-published-half"


def test_published_numbers_belong_to_their_cells(tmp_path):
    found = cells(written(tmp_path))
    assert found["adam"].published == {"loss": 5.5, "minutes": 2.0}
    assert found["muon lr=0.02"].published == {"loss": 5.25}
    assert found["muon lr=0.08"].published is None


def test_cells_are_chosen_by_name_case_or_pattern(tmp_path):
    path = written(tmp_path)
    assert list(cells(path, only=["muon lr=0.02", "adam"])) == ["muon lr=0.02", "adam"]
    assert list(cells(path, only=["muon"])) == ["muon lr=0.005", "muon lr=0.02", "muon lr=0.08"]
    assert list(cells(path, only=["*0.0[28]"])) == ["muon lr=0.02", "muon lr=0.08"]
    assert list(cells(path, quick=True)) == ["muon lr=0.005", "adam"]
    assert read_study(path, only=["muon"]).reference is None


def test_more_seeds_go_on_where_the_studys_own_end(tmp_path):
    path = written(tmp_path, seeds=[7, 3])
    assert read_study(path, seeds=1).seeds == (7,)
    assert read_study(path, seeds=4).seeds == (7, 3, 8, 9)


def test_overrides_are_laid_on_every_cell(tmp_path):
    study = read_study(written(tmp_path), overrides={"training": {"updates": 11}})
    assert {cell.config.training.updates for cell in study.cells} == {11}


def test_a_table_that_is_given_another_name_begins_anew():
    under = {"optimizer": {"name": "adamw", "betas": [0.9, 0.95]}, "training": {"updates": 5, "threads": 1}}
    over = {"optimizer": {"name": "muon", "lr": 0.1}, "training": {"updates": 7}}
    assert lay(under, over) == {"optimizer": {"name": "muon", "lr": 0.1}, "training": {"updates": 7, "threads": 1}}
    assert lay(under, {"optimizer": {"eps": 1e-6}})["optimizer"]["name"] == "adamw"
    assert lay({"model": {"preset": "micro", "d_model": 64}}, {"model": "moe-79m"})["model"] == {"preset": "moe-79m"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'"),
        ({"axes": [{"name": "lr", "feild": "optimizer.lr", "values": [1]}]}, "did you mean 'axes.0.field'"),
        ({"axes": [{"name": "lr", "field": "optimizer.lrr", "values": [0.1], "only": "muon"}]}, "did you mean 'optimizer.lr'"),
        ({"axes": [{"name": "lr", "field": "lr", "values": [0.1]}]}, "not the path of a field"),
        ({"axes": [{"name": "lr", "field": "optimizer.lr"}]}, "exactly one of values, log_range, sobol, observed"),
        ({"axes": [{"name": "lr", "field": "optimizer.lr", "values": [0.1], "sobol": 4}]}, "exactly one of"),
        ({"axes": [{"name": "lr", "fields": ["optimizer.lr", "optimizer.embedding_lr"], "values": [0.1]}]}, "a list of 2"),
        ({"axes": [{"name": "lr", "field": "optimizer.lr", "log_range": [1, 0.1, 3]}]}, "0 < from < to"),
        ({"axes": [{"name": "p", "sobol": 4, "ranges": {"optimizer.lr": [0, 1]}}]}, "must begin above 0"),
        ({"axes": [{"name": "lr", "field": "optimizer.lr", "values": [0.1, 0.1], "only": "muon"}]}, "two cells are called"),
        ({"reference": "adm"}, "unknown reference cell 'adm'; did you mean 'adam'"),
        ({"default": "correct"}, "did you mean 'corrected'"),
        ({"published": [{"cell": "muon lr=0.03", "loss": 1.0}]}, "did you mean 'muon lr=0.0"),
        ({"published": [{"cell": "adam", "los": 1.0}]}, "did you mean 'published.0.loss'"),
        ({"cases": [{"name": "muon", "optimiser": "muon"}]}, "unknown table 'optimiser'; did you mean 'optimizer'"),
        ({"cases": [{"name": "adam", "optimizer": {"name": "adamm"}}]}, "did you mean 'adamw'"),
        ({"cases": [{"name": "adam", "optimizer": {"name": "adamw", "lr": "fast"}}]}, "optimizer.lr is 'fast'"),
        ({"cases": [], "axes": [], "reference": None, "published": [], "versions": {}, "default": None}, "a case needs a name"),
        ({"seeds": []}, "one or more different numbers"),
        ({"seeds": [1, 1]}, "one or more different numbers"),
        ({"seeds": 0}, "one or more different numbers"),
        ({"question": None}, "question: field required"),
        ({"versions": {"x": {"note": "n", "cases": {"moun": {}}}}, "default": "x"}, "unknown case 'moun'; did you mean 'muon'"),
        ({"schema": 2}, "schema"),
    ],
)  # fmt: skip
def test_a_bad_file_gets_one_line_that_names_what_is_near(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        read_study(written(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "as-publisht"}, "unknown version 'as-publisht'; did you mean 'as-published'"),
        ({"scale": "haf"}, "unknown scale 'haf'; did you mean 'half'"),
        ({"only": ["adamm"]}, "unknown cell 'adamm'; did you mean 'adam'"),
        ({"seeds": 0}, "one or more different numbers"),
    ],
)
def test_a_bad_choice_gets_one_line(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        read_study(written(tmp_path), **options)


def test_an_unknown_study_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown study 'exp99'; did you mean 'exp9'"):
        read_study("exp99")


def test_the_schema_accepts_the_file_that_the_reader_accepts(tmp_path):
    schema = json.loads(json_schema())
    assert set(file()) <= set(schema["properties"])
    assert read_file(written(tmp_path))[1].title == FILE["title"]


def test_the_example_in_the_documentation_is_a_study(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "studies.md"
    (tmp_path / "example.toml").write_text(page.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0])
    study = read_study(tmp_path / "example.toml", scale="tiny")
    assert [cell.name for cell in study.cells] == ["without lr=0.01", "without lr=0.03", "with lr=0.01", "with lr=0.03"]
    assert study.reference == "without lr=0.01"
