"""What the terminal shows while work is going on: a live table, or plain lines where there is no terminal."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from muonlab.studies.executor import Progress


def clock(seconds: float) -> str:
    """Seconds as people write them: 42 s, 3 min 20 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class RunProgress:
    """Follows one run: call it with every row of its metrics."""

    def __init__(self, updates: int, console: Console, quiet: bool = False) -> None:
        self.updates, self.console, self.quiet = updates, console, quiet
        self.began = self.shown = time.monotonic()
        self.first: int | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        clear = "\r\x1b[2K" if self.console.is_terminal else ""
        if row["kind"] == "eval":
            text = f"{row['split']:>6} loss {row['cross_entropy']:.4f}  {row['bits_per_byte']:.4f} bits/byte  accuracy {row['accuracy']:.3f}"
            self.console.file.write(f"{clear}update {row['update']:>6}/{self.updates}  {text}\n")
        else:
            self.first = row["update"] if self.first is None else self.first
            now = time.monotonic()
            if not self.console.is_terminal or now - self.shown < 0.2:
                return
            self.shown = now
            rate = (row["update"] - self.first + 1) / max(1e-9, now - self.began)
            left = clock((self.updates - row["update"]) / rate)
            lr = next(iter(row["lr"].values()), math.nan)
            self.console.file.write(
                f"{clear}update {row['update']:>6}/{self.updates}  train loss {row['loss']:.4f}  lr {lr:.3g}  "
                f"{rate:.1f} updates/s  {left} left"
            )
        self.console.file.flush()


class StudyProgress:
    """Follows the jobs of a study: a live table in a terminal, one line per finished run elsewhere."""

    def __init__(self, runs: int, updates: int, workers: int, console: Console, quiet: bool = False) -> None:
        self.runs, self.updates, self.workers, self.console, self.quiet = runs, updates, max(1, workers), console, quiet
        self.began = time.monotonic()
        self.reported: set[int] = set()
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal and not quiet else None

    def __enter__(self) -> Callable[[list["Progress"]], None]:
        if self.live is not None:
            self.live.start()
        return self.show

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def time_left(self, states: Sequence["Progress"]) -> float:
        """Seconds until the whole study is done, at the rate of updates so far."""
        done = sum(state.update for state in states)
        rate = done / (time.monotonic() - self.began)
        return (self.runs * self.updates - done) / rate if rate > 0 else math.inf

    def show(self, states: list["Progress"]) -> None:
        if self.live is not None:
            self.live.update(self.table(states))
            return
        for index, state in enumerate(states):
            if index in self.reported or state.status in ("waiting", "running"):
                continue
            self.reported.add(index)
            if not self.quiet:
                left = clock(self.time_left(states))
                self.console.print(
                    f"[{len(self.reported)}/{self.runs}] {state.job.group} {state.job.label}: {state.status}"
                    f"{self.loss(state)}  ({left} left)",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

    @staticmethod
    def loss(state: "Progress") -> str:
        return "" if state.loss is None else f", train loss {state.loss:.4f}"

    def table(self, states: list["Progress"]) -> Table:
        table = Table(
            title=f"{sum(s.status == 'finished' for s in states)} of {self.runs} runs, {clock(self.time_left(states))} left"
        )
        for name in ("optimizer", "run", "status"):
            table.add_column(name)
        for name in ("update", "train loss", "seconds"):
            table.add_column(name, justify="right")
        room = max(5, self.console.height - 6)
        for state in states[-room:]:
            table.add_row(
                state.job.group,
                state.job.label,
                state.status,
                f"{state.update}/{self.updates}",
                "" if state.loss is None else f"{state.loss:.4f}",
                f"{state.seconds:.1f}",
            )
        return table
