"""What a study costs before it runs: arithmetic from the shapes, minutes from what this machine has shown it can do."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from muonlab.data.cache import cache_home
from muonlab.diagnostics.flops import token_flops
from muonlab.errors import InputError
from muonlab.studies.study import Study
from muonlab.training.config import RunConfig, with_vocabulary
from muonlab.training.tracking import write_json

SHARE_OF_MATMUL = 0.4
"""Share of the rate of a large product that training a small transformer reaches on a CPU: a guess, used until a study
has been run here."""


def run_flops(config: RunConfig[Any]) -> float:
    """FLOPs of training one run, evaluation not counted; a vocabulary that the tokenizer decides is the data's."""
    per_token = token_flops(with_vocabulary(config).model).training
    return float(per_token) * config.tokens_per_update * config.training.updates


def study_flops(study: Study) -> float:
    """FLOPs of training in all runs of a study."""
    return math.fsum(run_flops(cell.config) for cell in study.cells) * len(study.seeds)


def study_seconds(study: Study) -> float:
    """About how long a study takes on this machine, all cores at work."""
    return study_flops(study) / machine_rate()


def machine_rate() -> float:
    """FLOP/s of training on this machine: that of the last study run here, else a share of a matrix product's."""
    try:
        return float(json.loads(_speed_file().read_text(encoding="utf-8"))["flops_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        return SHARE_OF_MATMUL * _matmul_rate()


def remember_rate(made: Iterable[tuple[Mapping[str, Any], RunConfig[Any]]], at_a_time: int) -> None:
    """Keep the rate that runs have reached, `at_a_time` of them side by side, for the estimates of the next study."""
    work = [(run_flops(config), run["seconds"]["training"]) for run, config in made if run["status"] == "finished"]
    seconds = math.fsum(s for _, s in work)
    if seconds > 10:  # less says nothing
        rate = math.fsum(f for f, _ in work) / seconds * max(1, at_a_time)
        try:
            _speed_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(_speed_file(), {"flops_per_second": rate})
        except (OSError, InputError):
            return  # an estimate less


def _speed_file() -> Path:
    return cache_home() / "speed.json"


@cache
def _matmul_rate(size: int = 512) -> float:
    import numpy as np

    a = np.ones((size, size), dtype=np.float32)
    times: list[float] = []
    while sum(times) < 0.03 or len(times) < 4:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
