"""What the host does in a step before the device has anything to do, in microseconds, with warm caches and with cold ones.

A host that waited for the device, or for its next time slice, finds its caches full of others' data. `python
benchmarks/step_host.py` measures the shell of torch's `Optimizer.step` and, where Triton is installed, the scan of the 114
parameters of moe-79m; on a CUDA device also two ways of sending the table of addresses, while a kernel runs.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muonlab.bench.timing import milliseconds
from muonlab.training.tracking import write_json

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Empty(torch.optim.Optimizer):
    """Only torch's shell."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        return None


def microseconds(call: Callable[[], object], between: Callable[[], object], repeats: int) -> float:
    """Of the host alone."""
    return round(1e3 * milliseconds(call, torch.device("cpu"), repeats, between)["alone_ms"]["median"], 1)


def scan() -> Callable[[], object]:
    """What `FusedStep` looks at before every step."""
    from muonlab import Muon
    from muonlab.bench.parameter_sets import shapes_of
    from muonlab.optim.kernels.places import Places, look

    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes_of("moe-79m")]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = Muon(params)
    members = [look(param, group, optimizer._state) for group in optimizer.param_groups for param in group["params"]]
    return Places(members, optimizer.state).gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="write the numbers as JSON")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    others = torch.zeros(24_000_000)  # 96 MB
    shell = Empty()
    wrapped: Any = Empty.step
    calls: dict[str, Callable[[], object]] = {
        "torch's wrapper, no_grad and an empty step": shell.step,
        "no_grad and an empty step": lambda: wrapped.__wrapped__(shell),
        "an empty step": lambda: wrapped.__wrapped__.__wrapped__(shell),
    }
    if importlib.util.find_spec("triton") is not None:
        calls["scan of moe-79m's parameters"] = scan()
    rows = [
        {
            "what": name,
            "warm_us": microseconds(call, lambda: None, 500),
            "cold_us": microseconds(call, lambda: others.add_(1), 60),
        }
        for name, call in calls.items()
    ]
    if torch.cuda.is_available():
        table = torch.zeros(600, dtype=torch.int64)
        there, work = table.cuda(), torch.zeros(1 << 28, device="cuda")

        def busy() -> None:
            torch.cuda.synchronize()
            work.add_(1)  # about a millisecond

        pinned, event = torch.empty_like(table, pin_memory=True), torch.cuda.Event()

        def kept() -> None:
            event.synchronize()
            there.copy_(pinned.copy_(table), non_blocking=True)
            event.record()

        sent: dict[str, Callable[[], object]] = {
            "table pinned and sent": lambda: there.copy_(table.pin_memory(), non_blocking=True),
            "table sent through one that is pinned": kept,
        }
        rows += [{"what": name, "behind_a_kernel_us": microseconds(call, busy, 60)} for name, call in sent.items()]
    for row in rows:
        print(row)
    if output is not None:
        write_json(output, {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
