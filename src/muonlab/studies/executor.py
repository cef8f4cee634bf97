"""Runs jobs, in this process or in several, and reports how far each is; one job's failure never stops the rest."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonlab.errors import InputError
from muonlab.studies.leases import Lease
from muonlab.training.config import RunConfig, from_dict
from muonlab.training.tracking import RunInProgress

ASK_AGAIN = 1.0
"""Seconds until a run that another process holds is asked for again."""


@dataclass(frozen=True)
class Job:
    """One run to make, with what a table shows of it."""

    group: str
    label: str
    config: RunConfig[Any]
    directory: Path


@dataclass
class Progress:
    """Where a job stands."""

    job: Job
    status: str = "waiting"
    update: int = 0
    loss: float | None = None
    seconds: float = 0.0
    """Seconds of training so far."""
    message: str | None = None
    retried: bool = False
    """Whether its process died once, killed or out of memory."""


OnProgress = Callable[[list[Progress]], None]
Event = Callable[[dict[str, Any]], None]


def outline(metrics: dict[str, Any]) -> dict[str, Any]:
    """A run's metrics without its history, which stays on disk."""
    return {key: value for key, value in metrics.items() if key not in ("history", "routing", "config")}


def failed(directory: Path | str, error: BaseException) -> dict[str, Any]:
    """The outcome of a job that could not be carried out, which says nothing about its optimizer."""
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return {"status": "failed", "message": text.splitlines()[0], "directory": str(directory), "final": {}, "updates": 0}


class Executor:
    """Takes jobs with `submit`, gives their outcomes in the order they end with `results`: a run's metrics without its
    history, or status "failed" with a message. A job that dies with its process is tried once more; one that another
    process holds (see `leases`) waits until that process has finished it, or has gone and let its lease expire.

    `workers` 0 runs each job in this process when `results` is asked for it; otherwise that many processes run them,
    with as many threads as each job's configuration says. When `should_stop` says so, running jobs stop cleanly after
    their current update and `results` raises KeyboardInterrupt. Close it, or use it as a context manager.
    """

    def __init__(
        self, workers: int = 0, on_progress: OnProgress | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.on_progress, self.should_stop = on_progress, should_stop
        if workers < 0:
            raise InputError(f"the number of workers is {workers}; it must be 0 (this process) or more")
        self.workers = workers
        self.states: list[Progress] = []
        self._waiting: dict[Any, Progress] = {}
        self._inline: list[Progress] = []
        self._held: list[tuple[float, Progress]] = []  # when to ask again
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._stop: Any = None
        if workers:
            self._stop = multiprocessing.get_context("spawn").Event()
            self._pool = self._new_pool()

    def _new_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._stop,),
        )

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._pool is not None:
            if kind is not None:
                self._stop.set()  # running jobs stop cleanly after their current update
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, job: Job) -> None:
        state = Progress(job)
        self.states.append(state)
        self._queue(state)

    def _queue(self, state: Progress) -> None:
        if self._pool is None:
            self._inline.append(state)
        else:
            self._send(state)

    def _send(self, state: Progress) -> None:
        assert self._pool is not None
        try:
            future = self._pool.submit(_work, state.job.config.to_dict(), str(state.job.directory))
        except BrokenProcessPool:
            self._pool = self._new_pool()
            future = self._pool.submit(_work, state.job.config.to_dict(), str(state.job.directory))
        self._waiting[future] = state

    def results(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Outcomes until no submitted job is left; more may be submitted in between."""
        while self._inline or self._waiting or self._held:
            self._ask_again()
            if self._inline:
                state = self._inline.pop(0)
                yield from self._settle(state, self._run_here(state))
                continue
            if self._waiting:
                done, _ = concurrent.futures.wait(self._waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            else:
                done = set()
                time.sleep(ASK_AGAIN / 4)
            self._poll()
            if self.should_stop():
                raise KeyboardInterrupt
            for future in done:
                state = self._waiting.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool) and not state.retried:
                    state.retried, state.status = True, "waiting"
                    self._send(state)
                    continue
                yield from self._settle(state, failed(state.job.directory, error) if error else future.result())

    def _run_here(self, state: Progress) -> dict[str, Any]:
        last = 0.0

        def follow(row: dict[str, Any]) -> None:
            nonlocal last
            _advance(state, row)
            if time.monotonic() - last > 0.2:
                last = time.monotonic()
                self._show()

        return attempt(state.job.config, state.job.directory, self.should_stop, follow)

    def _settle(self, state: Progress, outcome: dict[str, Any]) -> Iterator[tuple[Job, dict[str, Any]]]:
        state.status = outcome["status"]
        if state.status == "held":
            self._held.append((time.monotonic() + ASK_AGAIN, state))
            return
        state.message, state.update = outcome.get("message"), outcome["updates"]
        self._show()
        if state.status == "interrupted":
            raise KeyboardInterrupt
        yield state.job, outcome

    def _ask_again(self) -> None:
        due = [state for when, state in self._held if when <= time.monotonic()]
        self._held = [(when, state) for when, state in self._held if when > time.monotonic()]
        for state in due:
            self._queue(state)

    def _poll(self) -> None:
        for state in [*self._waiting.values(), *(state for _, state in self._held)]:
            if (state.job.directory / "metrics.jsonl").exists():
                for row in _tail(state.job.directory):
                    _advance(state, row)
        self._show()

    def _show(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.states)


def attempt(
    config: RunConfig[Any], directory: Path, should_stop: Callable[[], bool], on_event: Event | None = None
) -> dict[str, Any]:
    """Make one run under a lease: its metrics without its history, or status "held" or "failed" with a message."""
    from muonlab.training.loop import run  # loads torch: a study with nothing left to run does without it

    lease = Lease(directory.with_name(f"{directory.name}.lease"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if not lease.acquire():
            return {"status": "held"}
        stop: Callable[[], bool] = lambda: should_stop() or lease.lost  # noqa: E731
        metrics = outline(run(config, directory=directory, on_event=on_event, should_stop=stop))
        return {"status": "held"} if lease.lost and metrics["status"] == "interrupted" else metrics
    except RunInProgress:
        return {"status": "held"}
    except Exception as error:  # out of memory, a full disk, a bug in one run: the others go on
        return failed(directory, error)
    finally:
        lease.release()


def _advance(state: Progress, row: dict[str, Any]) -> None:
    state.status, state.update, state.seconds = "running", row["update"], row["seconds"]
    if row["kind"] == "train":
        state.loss = row["loss"]


def _tail(directory: Path, size: int = 2000) -> Iterator[dict[str, Any]]:
    """The last whole rows of a growing metrics.jsonl."""
    try:
        with open(directory / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            lines = file.read().split(b"\n")[1:-1]
    except OSError:
        return
    for line in lines[-2:]:
        try:
            yield json.loads(line)
        except ValueError:
            continue


_stop_event: Any = None


def _start_worker(stop: Any) -> None:
    global _stop_event
    _stop_event = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets the event
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()


def _die_with_parent(parent: int) -> None:
    """A killed parent must not leave workers training for nobody; what they lose is as small as in any crash."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(config: dict[str, Any], directory: str) -> dict[str, Any]:
    try:
        return attempt(from_dict(config), Path(directory), _stop_event.is_set)
    except Exception as error:
        return failed(directory, error)
