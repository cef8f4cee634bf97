"""Who works on a run: a file that its holder keeps fresh and that expires when the holder is gone.

A lock of the operating system protects a run among the processes of one machine; a lease also works between machines
that share a folder, where such locks may not.
"""

import contextlib
import os
import socket
import threading
import uuid
from pathlib import Path

EXPIRES = 60.0
"""Seconds after which a lease that nobody refreshed may be taken over."""


class Lease:
    """The claim of one process on `path`, refreshed by a thread of its own while it is held.

    Ages are differences of modification times, made by the file system that holds the file: machines whose clocks
    disagree share one.
    """

    def __init__(self, path: Path, expires: float = EXPIRES) -> None:
        self.path, self.expires = path, expires
        self.owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether another has taken it over, because this process slept for longer than the lease is good for."""
        return self._lost.is_set()

    def acquire(self) -> bool:
        """Take the lease if nobody holds it, or if its holder let it expire; False where another holds it."""
        if not self._create():
            self._remove_expired()
            if not self._create():
                return False
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._holder() == self.owner:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(file, "w", encoding="utf-8") as opened:
            opened.write(self.owner)
        return True

    def _remove_expired(self) -> None:
        holder = self._holder()
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        aside.touch()
        try:
            now = aside.stat().st_mtime
            if _is_dead(holder) or now - self.path.stat().st_mtime > self.expires:
                os.replace(self.path, aside)
                if aside.read_text(encoding="utf-8") != holder:  # another was quicker and holds it by now: give it back
                    os.replace(aside, self.path)
        except FileNotFoundError:
            pass
        finally:
            aside.unlink(missing_ok=True)

    def _holder(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:
            return None

    def _refresh(self) -> None:
        while not self._stop.wait(self.expires / 4):
            if self._holder() != self.owner:
                self._lost.set()
                return
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)


def _is_dead(holder: str | None) -> bool:
    """Whether the holder was a process of this machine that no longer runs: no need to wait until its lease expires."""
    host, _, rest = (holder or "").partition(" ")
    process = rest.partition(" ")[0]
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
