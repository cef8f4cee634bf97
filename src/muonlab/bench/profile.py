"""Where one training update's time goes: every kernel, and the gaps in which the device waits for the host."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from muonlab.bench.plain import LR
from muonlab.bench.timing import synchronize
from muonlab.bench.train import PROGRAMS, case_of, config_of
from muonlab.diagnostics.flops import token_flops
from muonlab.errors import InputError, unknown
from muonlab.training import programs

Span = tuple[float, float, str]
"""Start and end of a kernel in microseconds, and its name."""


def specs(
    models: Sequence[str], wanted: Sequence[str], optimizers: Sequence[str], device: str, threads: int, updates: int
) -> list[dict[str, Any]]:
    """One for each model, program and optimizer."""
    for program in wanted:
        if program not in PROGRAMS:
            raise unknown("program", program, PROGRAMS)
    if "graph" in wanted and not device.startswith("cuda"):
        raise InputError("--programs graph needs a CUDA device; here eager and compile can run")
    for optimizer in optimizers:
        if optimizer not in LR:
            raise unknown("optimizer of bench profile", optimizer, LR)
    for model in models:
        case_of(model)
    common = {"device": device, "threads": threads, "updates": updates}
    return [{"model": m, "program": p, "optimizer": o, **common} for m in models for p in wanted for o in optimizers]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Kernels (on a CPU: operations) of one update by time spent in themselves, and on CUDA what the device did not do."""
    torch.set_num_threads(spec["threads"])
    device, case = torch.device(spec["device"]), case_of(spec["model"])
    micro, accumulation = case.cuda if device.type == "cuda" else case.cpu
    options, count = case.model, spec["updates"]
    config = config_of(
        options, spec["optimizer"], spec["program"], spec["device"], spec["threads"], micro, accumulation
    )
    program = programs.take(config)
    update = program.update
    tokens = torch.randint(options.vocab_size, (micro * accumulation, options.seq_len + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    made = 0
    while made < 2 or not update.ready:
        update(made, inputs, targets, None)
        made += 1
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(device)
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        for index in range(made, made + count):
            update(index, inputs, targets, None)
        synchronize(device)
        wall = 1e3 * (time.perf_counter() - start) / count
    averages = recorded.key_averages()
    if cuda:
        events: Any = recorded.events()
        spans = [
            (e.time_range.start, e.time_range.end, e.name)
            for e in events
            if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
        ]
        table = by_kernel(spans, count)
    else:
        spans = []
        entries: Any = averages
        table = kernel_table(((e.key, 1e-3 * e.self_cpu_time_total, e.count) for e in entries), count)
    result: dict[str, Any] = {
        "asked": spec["program"],
        "program": update.program,
        "notice": update.notice,
        "tokens_per_update": micro * accumulation * options.seq_len,
        "training_flops_per_token": token_flops(options).training,
        "wall_ms": wall,
        "kernels": table,
        "launches": sum(kernel["launches"] for kernel in table),
        **(gaps(spans, count) if cuda else {"busy_ms": None, "idle_ms": None, "gaps": []}),
    }
    programs.keep(program)
    return result


def by_kernel(spans: Iterable[Span], updates: int) -> list[dict[str, Any]]:
    """Kernels by name, the most expensive first, per update."""
    return kernel_table(((name, 1e-3 * (end - start), 1) for start, end, name in spans), updates)


def kernel_table(entries: Iterable[tuple[str, float, int]], updates: int) -> list[dict[str, Any]]:
    """(name, milliseconds, launches) of several updates, added up by name: per update, with shares of all."""
    total: dict[str, list[float]] = {}
    for name, took, launches in entries:
        so_far = total.setdefault(name, [0.0, 0])
        so_far[0] += took
        so_far[1] += launches
    everything = sum(took for took, _ in total.values()) or 1.0
    ordered = sorted(total.items(), key=lambda item: -item[1][0])
    return [
        {"name": name, "ms": took / updates, "launches": launches / updates, "share": took / everything}
        for name, (took, launches) in ordered
    ]


def gaps(spans: Iterable[Span], updates: int, longest: int = 5) -> dict[str, Any]:
    """How long a device was busy and idle between its first and last kernel, per update, and its longest waits in all.

    Kernels may overlap: busy is the union of their spans.
    """
    ordered = sorted(spans)
    busy = idle = 0.0
    waits: list[dict[str, Any]] = []
    if ordered:
        _, until, last = ordered[0]
        busy = until - ordered[0][0]
        for start, end, name in ordered[1:]:
            if start > until:
                idle += start - until
                waits.append({"ms": 1e-3 * (start - until), "after": last, "before": name})
            if end > until:
                busy += end - max(start, until)
                until, last = end, name
    waits.sort(key=lambda wait: -wait["ms"])
    return {"busy_ms": 1e-3 * busy / updates, "idle_ms": 1e-3 * idle / updates, "gaps": waits[:longest]}
