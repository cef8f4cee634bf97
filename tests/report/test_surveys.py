"""Figures over many runs."""

import pytest

from muonlab.report.surveys import heatmap_plot, pareto_front, pareto_plot, profile_plot
from muonlab.studies.curves import performance_profile
from muonlab.training.tracking import read_run


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 2.0), (0.5, 9.0)]
    assert pareto_front(points) == [5, 0, 1, 3]
    assert pareto_front([]) == []


@pytest.fixture(scope="module")
def runs(fake, tmp_path_factory):
    root = tmp_path_factory.mktemp("grid")
    for steps in (4, 8):
        for momentum in (0.875, 0.9375):
            for lr in (1 / 32, 1 / 16, 1 / 8):
                status = "diverged" if lr == 1 / 8 and momentum > 0.9 else "finished"
                config = {"optimizer": {"lr": lr, "momentum": momentum, "ns_steps": steps}}
                fake.fake_run(root / f"{steps}-{momentum}-{lr}", lr=lr, config=config, status=status, updates=20)
    return [read_run(path) for path in sorted(root.iterdir())]


def test_survey_figures_are_drawn_with_diverged_runs_and_without_any(runs, tmp_path):
    for name, kept in (("all", runs), ("none", [])):
        heatmap_plot(
            kept,
            "optimizer.lr",
            "optimizer.momentum",
            "tune",
            tmp_path / f"heat-{name}.png",
            panel="optimizer.ns_steps",
        )
        pareto_plot(kept, "tune", tmp_path / f"pareto-{name}.png")
    profile = performance_profile({"muon": [10, 30, 40], "adamw": [12, 20, float("inf")]})
    profile_plot(profile, tmp_path / "profile.png")
    assert len(list(tmp_path.glob("*.png"))) == 5
