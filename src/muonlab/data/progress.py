"""Progress of the long steps of data preparation: a bar on a terminal, plain lines elsewhere. Always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_INTERVAL = 10.0  # seconds between plain lines
BAR_INTERVAL = 0.1

Advance = Callable[[int], None]


def say(message: str, show: bool = True) -> None:
    if show:
        print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int | None, show: bool = True) -> Iterator[Advance]:
    """Yields `advance(bytes)`, cheap enough to be called for every line. `total` in bytes, None where nobody knows."""
    if not show:
        yield lambda count: None
        return
    bar = _bar() if sys.stderr.isatty() else None
    start = time.monotonic()
    last, done = start, 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= (PLAIN_INTERVAL if bar is None else BAR_INTERVAL):
            last = now
            draw(now - start)

    def draw(seconds: float) -> None:
        if bar is not None:
            bar.update(task, completed=done)
            return
        left = f", {(total - done) * seconds / done:.0f} s left" if total and 0 < done <= total else ""
        say(f"{label}: {done / 1e6:.1f} MB, {done / 1e6 / seconds:.1f} MB/s{left}")

    if bar is None:
        yield advance
        say(f"{label}: {done / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    else:
        with bar:
            task = bar.add_task(label, total=total)
            yield advance
            bar.update(task, completed=done)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ModuleNotFoundError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
