"""A tiny study for tests: two cases, one with an axis, on pydoc; a run takes a fraction of a second."""

import copy
from pathlib import Path
from typing import Any

import tomli_w
from runs import TINY

from muonlab.studies.run import plan_study, run_study
from muonlab.studies.study import read_study

FILE: dict[str, Any] = {
    "title": "Tiny",
    "question": "Does it run?",
    "seeds": [1, 2],
    "reference": "adam",
    "base": {
        "model": TINY["model"],
        "data": TINY["data"],
        "training": {**TINY["training"], "updates": 6, "eval_every": 3},
    },
    "cases": [
        {"name": "muon", "optimizer": {"name": "muon", "weight_decay": 0.2}},
        {"name": "adam", "optimizer": {"name": "adamw", "lr": 0.003}, "published": {"loss": 5.5, "minutes": 2.0}},
    ],
    "axes": [{"name": "lr", "field": "optimizer.lr", "values": [0.005, 0.02, 0.08], "only": "muon"}],
    "published": [{"cell": "muon lr=0.02", "loss": 5.25}],
    "versions": {
        "as-published": {
            "note": "the clock counted micro-batches",
            "base": {"schedule": {"stretch": 4.0}},
            "cases": {"muon": {"optimizer": {"weight_decay": 0.0}}},
        },
        "corrected": {"note": "the clock counts updates", "published": False},
    },
    "default": "corrected",
    "scales": {"half": {"base": {"training": {"updates": 3}}, "seeds": 1}},
}


def file(**changes: Any) -> dict[str, Any]:
    """The file with top-level keys replaced; None removes one."""
    values = {**copy.deepcopy(FILE), **changes}
    return {key: value for key, value in values.items() if value is not None}


def written(folder: Any, **changes: Any) -> str:
    """That file on disk, by its path."""
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps(file(**changes)))
    return str(path)


def conduct_in_child(file: str, directory: str, started: Any = None, seeds: int | None = None) -> None:
    """Carry the study out; here, because a new process finds this module by its name."""
    planned = plan_study(read_study(file, seeds=seeds), Path(directory), progress=False)
    begun: Any = (lambda states: started.set()) if started is not None else None
    run_study(planned, Path(directory), on_progress=begun)
