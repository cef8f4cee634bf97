"""How much data an optimizer saves (D_eff/D): the data that the reference would need for a loss, over the data that was used."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from muonlab.studies.curves import data_speedup, fit_power_law

LENGTHS = 3
"""Lengths of training below which a power law with a floor cannot be fitted."""


def data_speedups(reference: str | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """D_eff/D of each group at each length of training, by the power law of the reference's group (Wen et al. 2509.02046).

    At every length a group counts with its best cell of those that finished with every seed. `cells` are those of a
    summary; None without a reference, with fewer than LENGTHS lengths of its group, or where its loss does not fall with
    data. A loss that the law never reaches has an infinite speed-up.
    """
    best: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        tokens = {run.get("tokens") for run in cell["runs"]}
        if cell["finished"] == len(cell["runs"]) and len(tokens) == 1 and None not in tokens:
            at, group = tokens.pop(), best.setdefault(cell["group"], {})
            group[at] = min(group.get(at, cell), cell, key=lambda one: one["mean"])
    home = next((cell["group"] for cell in cells if cell["cell"] == reference), None)
    theirs = best.pop(home, {}) if home is not None else {}
    if len(theirs) < LENGTHS or not best:
        return None
    law = fit_power_law(list(theirs), [cell["mean"] for cell in theirs.values()])
    if not law.scale > 0:
        return None
    rows = [
        {
            "group": group,
            "cell": cell["cell"],
            "tokens": tokens,
            "loss": cell["mean"],
            "speedup": data_speedup(law, tokens, cell["mean"]),
        }
        for group, points in best.items()
        for tokens, cell in sorted(points.items())
    ]
    return {"group": home, "lengths": sorted(theirs), "law": asdict(law), "rows": rows}
