"""The folder for downloads and prepared data: `$MUONLAB_HOME`, or the platform's cache folder.

downloads/   archives as fetched        corpora/   cleaned text        datasets/<key>/   tokens
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muonlab.errors import InputError


def cache_home() -> Path:
    """`$MUONLAB_HOME`, else `muonlab` in the platform's cache folder. Not created here."""
    chosen = os.environ.get("MUONLAB_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "muonlab"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "muonlab" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muonlab"


def cache_folder(name: str) -> Path:
    """A folder of the cache, created."""
    folder = cache_home() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
)


@contextmanager
def write_errors() -> Iterator[None]:
    """A cache that cannot be written (full, read-only, forbidden) becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write the data cache {cache_home()}: {reason}; free some space or set MUONLAB_HOME to another folder"
        ) from error
