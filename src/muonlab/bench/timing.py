"""Clocks: medians with quartiles, and a stopwatch for the phases of an update that also works inside a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Spread = dict[str, float]
"""median, quartile_low, quartile_high."""
ENOUGH_S = 2.0
"""Work is not repeated for longer than this."""


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles of a few measurements."""
    numbers = sorted(values)
    low, middle, high = statistics.quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Of measurements that took turns: the ratios within a turn."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    work: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """What one call of `work` takes after three that do not count.

    At most `repeats` measurements, and fewer, but five, of work that takes long (`repeats` in the result).
    `alone_ms`: from an idle device to an idle device, so that a host that is slower than the device shows.
    `host_ms`: until `work` returns, on CUDA. `in_a_row_ms`: a mean of `repeats` calls without waiting, `before` included.
    `before` runs before each call; alone it is not timed.
    """
    for _ in range(3):
        before()
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
    took = time.perf_counter() - start
    repeats = min(repeats, max(5, round(ENOUGH_S / took)))
    alone, host = [], []
    for _ in range(repeats):
        before()
        synchronize(device)
        start = time.perf_counter()
        work()
        host.append(1e3 * (time.perf_counter() - start))
        synchronize(device)
        alone.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(repeats):
        before()
        work()
    synchronize(device)
    in_a_row = 1e3 * (time.perf_counter() - start) / repeats
    return {
        "alone_ms": spread(alone),
        "host_ms": spread(host) if device.type == "cuda" else None,
        "in_a_row_ms": in_a_row,
        "repeats": repeats,
    }


class Stopwatch:
    """Marks the beginning of each phase of an update: `update.on_phase = Stopwatch(device)`.

    In a CUDA graph a mark becomes a node of it, which writes its time at every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, phase: str) -> None:
        if self.device.type != "cuda":
            self.marks.append((phase, time.perf_counter()))
            return
        capturing = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=capturing)  # type: ignore[no-untyped-call]
        event.record()
        self.marks.append((phase, event))

    def read(self) -> dict[str, float]:
        """Milliseconds of each phase in the last update, micro-batches added up."""
        synchronize(self.device)
        total: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:]):
            took = 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
            total[phase] = total.get(phase, 0.0) + took
        return total
