"""The step's CUDA graph alone, as it is and with other priorities, lanes, slices and chunks than those that were chosen.

    python benchmarks/graph_variants.py --set moe-79m --coefficients polar_express -o variants.json

A variant is a change of constants of `muonlab.optim.kernels`; each gets an optimizer and a plan of its own, all on the same
parameters. The first is measured again at the end, which shows what is noise. Without a GPU the launches run one after the other
in Triton's interpreter (`TRITON_INTERPRET=1`), which shows that a variant works and says nothing about its speed.
"""

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muonlab import Muon
from muonlab.bench.parameter_sets import shapes_of
from muonlab.bench.timing import milliseconds
from muonlab.optim.coefficients import COEFFICIENTS
from muonlab.optim.kernels import elementwise, fused, tables
from muonlab.training.tracking import versions, write_json

CONSTANTS = {
    fused: ("_PASS", "_PRODUCT", "_SMALL", "_WARPS"),
    tables: ("HEAVY", "LANES", "PARTS", "WAVES", "DEFAULT_WORKSPACE"),
    elementwise: ("CHUNK",),
}
VARIANTS: dict[str, dict[str, int]] = {
    "as it is": {},
    "no priorities": {"_PRODUCT": 0, "_SMALL": 0},
    "small matrices first, products and passes alike": {"_PRODUCT": 0, "_SMALL": -1},
    "small matrices and products alike": {"_SMALL": -1},
    "passes before products": {"_PASS": -1, "_PRODUCT": 0},
    "one lane for small matrices": {"LANES": 3},
    "one heavy lane": {"HEAVY": 1, "LANES": 3},
    "three heavy lanes": {"HEAVY": 3, "LANES": 5},
    "slices of one wave, at most eight": {"PARTS": 8, "WAVES": 1},
    "the same, four heavy lanes": {"PARTS": 8, "WAVES": 1, "HEAVY": 4, "LANES": 6},
    "half the workspace": {"DEFAULT_WORKSPACE": tables.DEFAULT_WORKSPACE // 2},
    "twice the workspace": {"DEFAULT_WORKSPACE": tables.DEFAULT_WORKSPACE * 2},
    "chunks of 1024 entries": {"CHUNK": 1024},
    "chunks of 4096 entries": {"CHUNK": 4096},
    "4 warps a program of the passes": {"_WARPS": 4},
    "16 warps a program of the passes": {"_WARPS": 16},
    "as it is, again": {},
}


@contextmanager
def changed(constants: dict[str, int]) -> Iterator[None]:
    """The kernels' modules with other constants."""
    places = {name: module for module, names in CONSTANTS.items() for name in names}
    before = {name: getattr(places[name], name) for name in constants}
    fused._streams.cache_clear()
    try:
        for name, value in constants.items():
            setattr(places[name], name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(places[name], name, value)
        fused._streams.cache_clear()


def measure(params: list[nn.Parameter], coefficients: str, repeats: int) -> dict[str, Any]:
    """Launches of each lane, an iteration counted as one; milliseconds of the graph."""
    gc.collect()  # the plan before
    optimizer = Muon(params, lr=1e-6, coefficients=coefficients)
    plan = fused.FusedStep(optimizer.param_groups, optimizer.state, optimizer._state)
    gradients = plan.gradients(optimizer.param_groups, optimizer.state)
    assert gradients is not None
    plan.run(gradients)
    device = params[0].device
    times = milliseconds(plan._launch if plan._graph is None else plan._graph.replay, device, repeats)
    return {"launches": [len(lane) for lane in plan._lanes], **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="moe-79m", help="a parameter set of `muonlab bench step`")
    parser.add_argument("--coefficients", default="keller", choices=COEFFICIENTS)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("-o", "--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes_of(arguments.set)]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    rows = []
    for name, constants in VARIANTS.items():
        with changed(constants):
            row = {
                "variant": name,
                "constants": constants,
                **measure(params, arguments.coefficients, arguments.repeats),
            }
        rows.append(row)
        alone = row["alone_ms"]
        print(
            f"{name:50} {alone['median']:7.3f} ms ({alone['quartile_low']:.3f} to {alone['quartile_high']:.3f})",
            flush=True,
        )
    if arguments.output is not None:
        machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        about = {"set": arguments.set, "coefficients": arguments.coefficients, "device": machine}
        write_json(arguments.output, {**about, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
