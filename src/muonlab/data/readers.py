"""Documents out of files and hub datasets, one at a time.

A jsonl line, a parquet row and a row of a hub dataset are one document each. A txt file is cut at the first blank line
after `TXT_DOCUMENT` characters (at the first line end after ten times as many, where blank lines are rare), so that
documents are longer than a paragraph and a book can be split; it is read line by line, never whole.
"""

import glob
import gzip
import json
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from muonlab.data.fetch import resolves
from muonlab.errors import InputError, unknown

TXT_DOCUMENT = 2_000  # characters
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")


def local_files(pattern: str) -> list[Path]:
    """The files that a path, folder (searched to the bottom) or glob names, sorted. Raises InputError if there is none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES) and file.is_file()]
        if not files:
            raise InputError(f"folder {pattern!r} holds no corpus file; expected {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        files = [path]
    elif any(character in pattern for character in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    else:
        files = []
    if not files:
        raise InputError(f"corpus file {pattern!r} does not exist")
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"corpus file {str(file)!r} has an unknown type; expected {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise InputError(f"corpus file {str(file)!r} is empty; give a file with text")
        if not os.access(file, os.R_OK):
            raise InputError(f"corpus file {str(file)!r} may not be read; check its permissions")
    return files


def read_file(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one local file."""
    if path.suffix == ".parquet":
        return texts(_parquet_rows(path, text_column), text_column, str(path))
    lines = _utf8_lines(path)
    if ".json" in path.name:
        return texts(_json_rows(lines, path), text_column, str(path))
    return text_documents(lines)


def text_documents(lines: Iterable[str]) -> Iterator[str]:
    """Cuts running text into documents (see the top of this file)."""
    part: list[str] = []
    length = 0
    for line in lines:
        blank = not line.strip()
        if part and ((blank and length >= TXT_DOCUMENT) or length >= 10 * TXT_DOCUMENT):
            yield "".join(part).strip("\n")
            part, length = [], 0
        if part or not blank:
            part.append(line)
            length += len(line)
    if part:
        yield "".join(part).strip("\n")


def texts(rows: Iterable[Mapping[str, Any]], column: str, where: str) -> Iterator[str]:
    """The text of each row: the one path of jsonl, parquet and hub datasets."""
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise _with_place(unknown("text_column", column, map(str, row)), where)
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}, row {number}: {column!r} holds {type(text).__name__}; a text column is needed")
        yield text or ""


def hub_documents(name: str, subset: str | None, split: str, column: str) -> Iterator[str]:
    """Streams a dataset `owner/name[@revision]` of the Hugging Face hub (or a local folder of such files)."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(f"corpus {name!r} needs the package datasets: pip install 'muonlab[hub]'") from error
    repository, _, revision = name.partition("@")
    if not Path(repository).exists():
        _require_hub(repository, revision or None)
    try:
        rows = datasets.load_dataset(repository, subset, split=split, streaming=True, revision=revision or None)
        yield from texts(cast(Iterable[Mapping[str, Any]], rows), column, name)
    except InputError:
        raise
    except Exception as error:  # the library and its transports raise dozens of kinds
        raise InputError(f"corpus {name!r} cannot be read from the hub: {_first_line(error)}") from error


def _require_hub(repository: str, revision: str | None) -> None:
    """One quick question before `datasets`, which retries an unreachable hub for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
        if not constants.HF_HUB_OFFLINE and not resolves(host):
            raise ConnectionError(f"{host}: no network or no such host")
        HfApi().dataset_info(repository, revision=revision, timeout=5)
    except RevisionNotFoundError as error:
        raise InputError(f"the hub dataset {repository!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no public dataset {repository!r}, and no local file has that name") from error
    except Exception as error:
        raise InputError(
            f"the hub cannot be reached for corpus {repository!r} ({_first_line(error)}); prepare it on a machine with"
            " network by `muonlab data prepare` and copy $MUONLAB_HOME, or use a local file or 'enwik8'"
        ) from error


def _parquet_rows(path: Path, column: str) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(f"corpus file {str(path)!r} needs the package pyarrow: pip install 'muonlab[hub]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {_first_line(error)}") from error
    names = file.schema_arrow.names
    for batch in file.iter_batches(batch_size=256, columns=[column] if column in names else None):
        yield from batch.to_pylist()


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); one object per line is needed") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} holds {type(row).__name__}; one object per line is needed")
        yield row


def _utf8_lines(path: Path) -> Iterator[str]:
    with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as file:
        try:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield line.decode("utf-8").replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    bad = line[error.start]
                    raise InputError(
                        f"{path}, line {number} is not UTF-8 (byte 0x{bad:02x}); convert the file to UTF-8"
                    ) from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise InputError(f"{path} is not a complete gzip file: {_first_line(error)}") from error


def _with_place(error: InputError, where: str) -> InputError:
    return InputError(f"{where}: {error}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
