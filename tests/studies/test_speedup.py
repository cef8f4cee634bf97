"""The data that an optimizer saves, on losses that follow known laws."""

import math
from typing import Any

import pytest

from muonlab.studies.speedup import data_speedups

LENGTHS = (1e6, 2e6, 4e6, 8e6)


def reference_loss(tokens: float) -> float:
    return 40.0 * tokens**-0.2 + 2.5


def cell(group: str, tokens: float, loss: float, *, name: str | None = None, finished: int = 2) -> dict[str, Any]:
    runs = [{"seed": seed, "tokens": int(tokens)} for seed in (1, 2)]
    return {"cell": name or f"{group} {tokens:g}", "group": group, "runs": runs, "finished": finished, "mean": loss}


def two_groups(factor: float) -> list[dict[str, Any]]:
    """AdamW by its law, and Muon as good as AdamW with `factor` times the data."""
    adamw = [cell("adamw", tokens, reference_loss(tokens)) for tokens in LENGTHS]
    return [*adamw, *(cell("muon", tokens, reference_loss(factor * tokens)) for tokens in LENGTHS)]


def test_an_optimizer_as_good_as_the_reference_with_more_data_has_that_speed_up_at_every_length():
    found = data_speedups("adamw 1e+06", two_groups(1.4))
    assert found["group"] == "adamw"
    assert [row["tokens"] for row in found["rows"]] == list(LENGTHS)
    assert [row["speedup"] for row in found["rows"]] == pytest.approx([1.4] * 4, rel=1e-3)
    assert found["law"]["exponent"] == pytest.approx(0.2, rel=1e-3)
    assert found["law"]["floor"] == pytest.approx(2.5, rel=1e-3)


def test_a_group_counts_with_the_best_of_its_cells_that_finished_with_every_seed():
    worse = [cell("adamw", tokens, 9.0, name=f"worse {tokens}") for tokens in LENGTHS]
    lucky = [cell("muon", tokens, 2.0, name=f"lucky {tokens}", finished=1) for tokens in LENGTHS]
    found = data_speedups("worse 1000000.0", [*worse, *lucky, *two_groups(1.4)])
    assert [row["speedup"] for row in found["rows"]] == pytest.approx([1.4] * 4, rel=1e-3)


def test_a_loss_below_the_floor_of_the_law_is_infinitely_much_data():
    cells = [cell for cell in two_groups(1.4) if cell["group"] == "adamw"]
    assert data_speedups("adamw 1e+06", [*cells, cell("muon", 1e6, 2.0)])["rows"][0]["speedup"] == math.inf


@pytest.mark.parametrize(
    ("reference", "cells"),
    [
        (None, two_groups(1.4)),
        ("adamw 1e+06", [c for c in two_groups(1.4) if c["group"] == "muon" or c["runs"][0]["tokens"] < 3e6]),
        ("adamw 1e+06", [c for c in two_groups(1.4) if c["group"] == "adamw"]),
        ("adamw 1e+06", [{**c, "mean": 4.0} for c in two_groups(1.4)]),
    ],
    ids=["no reference", "two lengths", "nobody else", "losses that do not fall with data"],
)
def test_without_three_lengths_a_reference_and_another_there_is_none(reference, cells):
    assert data_speedups(reference, cells) is None
