"""Rows of a benchmark: each measured from a plain specification, so that one that fails, crashes or hangs costs only itself."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

Spec = dict[str, Any]
Measure = Callable[[Spec], dict[str, Any]]
"""A function of a module (a new process imports it): what to measure -> numbers and names."""
ROW_S = 240.0
"""Seconds for one row unless said otherwise, compilation included; one that takes longer has failed."""
START_S = 120.0
"""What a process may take to begin, which no row's limit counts."""


def rows(
    measure: Measure,
    specs: Sequence[Spec],
    *,
    isolate: bool,
    limit_s: float = ROW_S,
    deadline: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """`{**spec, **measure(spec)}` for each specification, in order; `{**spec, "failed": one line}` where that went wrong.

    `isolate`: in a process of its own, which goes on to the next row after a good one and is replaced after a bad one (a GPU
    that met an illegal address answers nothing any more) or when a row takes longer than `limit_s`. No row begins after
    `deadline`, a value of `time.monotonic`, and an isolated one does not last beyond it.
    """
    worker: _Worker | None = None
    try:
        for spec in specs:
            left = deadline - time.monotonic()
            if left <= 0:
                yield {**spec, "failed": "not begun: the time of this call is used up"}
                continue
            if not isolate:
                yield {**spec, **_guarded(measure, spec)}
                continue
            worker = worker or _Worker(measure)
            result = worker.ask(spec, min(limit_s, left))
            if "failed" in result:
                worker.stop()
                worker = None
            yield {**spec, **result}
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """A spawned process that measures one row after the other."""

    def __init__(self, measure: Measure) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # no daemon: compilers start processes of their own; it ends when this end of the pipe is closed
        self.process = context.Process(target=_serve, args=(theirs, measure))
        self.process.start()
        theirs.close()
        self.started = False

    def ask(self, spec: Spec, limit_s: float) -> dict[str, Any]:
        try:
            if not self.started:
                self.started = self.pipe.poll(START_S) and bool(self.pipe.recv())
            self.pipe.send(spec)
            if not self.pipe.poll(limit_s):
                return {"failed": f"took longer than {limit_s:.0f} s"}
            answer: dict[str, Any] = self.pipe.recv()
            return answer
        except (EOFError, OSError):
            self.process.join(10)
            return {"failed": f"its process died with exit code {self.process.exitcode}"}

    def stop(self) -> None:
        self.pipe.close()  # ends a process that waits for a row
        self.process.join(0.5)
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, measure: Measure) -> None:
    pipe.send("started")
    while True:
        try:
            spec = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_guarded(measure, spec))


def _guarded(measure: Measure, spec: Spec) -> dict[str, Any]:
    try:
        if str(spec.get("device")).startswith("cuda:"):
            torch.cuda.set_device(spec["device"])  # kernels are launched on the current one
        return measure(spec)
    except Exception as error:  # whatever a peer, a compiler or a device throws
        first = (str(error).strip() or "no message").splitlines()[0]
        return {"failed": f"{type(error).__name__}: {first[:200]}"}
