"""Figures over many runs."""

import math

from muonlab.report.surveys import heatmap_plot, pareto_front, pareto_plot, profile_plot
from muonlab.studies.curves import performance_profile


def test_the_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 2.0), (0.5, 9.0)]
    assert pareto_front(points) == [5, 0, 1, 3]
    assert pareto_front([]) == []


def test_survey_figures_are_drawn_with_failed_cells_and_without_any(tmp_path):
    table = {
        (lr, momentum): 3 + lr * momentum for lr in (1 / 32, 1 / 16, "auto") for momentum in (0.9, 0.95) if lr != "auto"
    }
    table[1 / 8, 0.95] = math.inf
    points = [("muon", f"cell {i}", 10.0 + i, 3 + 0.1 * (i % 3)) for i in range(6)] + [("adamw", "x", math.nan, 3.0)]
    for name, tables, kept in (("all", {"steps 4": table, "steps 8": {("auto", 0.9): 3.1}}, points), ("none", {}, [])):
        heatmap_plot(tables, "lr", "momentum", tmp_path / f"heat-{name}.png", title="loss")
        pareto_plot(kept, "tune", tmp_path / f"pareto-{name}.png")
    profile_plot(performance_profile({"muon": [10, 30, 40], "adamw": [12, 20, math.inf]}), tmp_path / "profile.png")
    many = {f"cell {i}": [10.0 + i, 20.0] for i in range(30)}
    profile_plot(performance_profile(many), tmp_path / "profile-many.png")
    assert len(list(tmp_path.glob("*.png"))) == 6
