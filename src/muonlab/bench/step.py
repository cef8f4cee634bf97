"""`optimizer.step()` of every optimizer that is installed, on named sets of matrices, beside the physical floor."""

import gc
import time
import warnings
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import nn

from muonlab.bench import peers
from muonlab.bench.floor import adamw_work, muon_work
from muonlab.bench.parameter_sets import entries_of, shapes_of
from muonlab.bench.peers import NotInstalled
from muonlab.bench.timing import milliseconds, synchronize

DTYPES = "parameters, gradients and state fp32; iterations as each optimizer chooses"


def specs(sets: Sequence[str], names: Sequence[str], device: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One for each optimizer on each set; InputError for a name that there is not."""
    for name in sets:
        shapes_of(name)
    for name in names:
        peers.find(name)
    common = {"device": device, "threads": threads, "repeats": repeats}
    return [{"set": one, "peer": name, **common} for one in sets for name in names]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """One optimizer on one set. spec: set, peer, device, threads, repeats.

    Gradients are measured twice: with the same storage at every step, their values written in place as a backward pass does,
    and fresh, as after `zero_grad(set_to_none=True)`, under a scheduler that changes the learning rate. Writing them, handing
    them over and the scheduler are not timed.
    """
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    gc.collect()  # what rows before it left behind is not to be freed in the middle of this one
    device, peer = torch.device(spec["device"]), peers.find(spec["peer"])
    params = parameters(spec["set"], device)
    common = {
        "rule": peer.rule,
        "call": peer.call,
        "dtypes": DTYPES,
        "matrices": len(params),
        "parameters": entries_of(spec["set"]),
    }
    held = allocated(device)
    start = time.perf_counter()
    try:
        optimizer = peer.make(params)
    except NotInstalled as reason:
        return {**common, "skipped": str(reason)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row names the program that ran
        optimizer.step()
    synchronize(device)
    first = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    synchronize(device)
    extra = None
    if device.type == "cuda":
        extra = torch.cuda.max_memory_allocated(device) - held - state_bytes(optimizer)
    values = [[1e-3 * torch.randn_like(param) for param in params] for _ in range(2)]
    stay = staying(optimizer, params, values, device, spec["repeats"])
    graph = peers.graph_of(optimizer)
    return {
        **common,
        "first_step_seconds": first,
        "extra_bytes": extra,
        "gradients_stay": stay,
        "gradients_fresh": fresh(optimizer, params, values, device, spec["repeats"]),
        "graph_alone": milliseconds(graph, device, spec["repeats"]) if graph is not None else None,
        "program": peers.program_of(optimizer),
    }


def parameters(name: str, device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes_of(name)]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def staying(
    optimizer: Any, params: list[nn.Parameter], values: list[list[torch.Tensor]], device: torch.device, repeats: int
) -> dict[str, Any]:
    """As `milliseconds`, with other values in the same gradients at every step."""
    grads = [param.grad for param in params if param.grad is not None]
    turns = cycle(values)
    return milliseconds(optimizer.step, device, repeats, lambda: torch._foreach_copy_(grads, next(turns)))


def fresh(
    optimizer: Any, params: list[nn.Parameter], values: list[list[torch.Tensor]], device: torch.device, repeats: int
) -> dict[str, Any] | None:
    """As `milliseconds`, with other gradient tensors and another learning rate at every step."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (1 + update))
    turns = cycle(values)
    started = False

    def prepare() -> None:
        nonlocal started
        if started:
            scheduler.step()
        started = True
        optimizer.zero_grad(set_to_none=True)
        for param, grad in zip(params, next(turns), strict=True):
            param.grad = grad

    return milliseconds(optimizer.step, device, repeats, prepare)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's state, which is not extra memory."""
    states = optimizer.state.values() if isinstance(optimizer, torch.optim.Optimizer) else []
    tensors = {id(v): v for state in states for v in state.values() if isinstance(v, torch.Tensor)}
    return sum(v.numel() * v.element_size() for v in tensors.values())


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def with_floor(row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """A row with the floor of its rule and set, and how many times the floor it took."""
    work = (adamw_work if row.get("rule") == "adamw" else muon_work)(shapes_of(row["set"]))
    floor = 1e3 * work.seconds(rates)
    times = {
        f"{kind}_over_floor": row[kind]["alone_ms"]["median"] / floor
        for kind in ("gradients_stay", "gradients_fresh", "graph_alone")
        if row.get(kind)
    }
    return {**row, "floor_ms": floor, "floor_bytes": work.bytes, "floor_flops": work.flops, **times}
