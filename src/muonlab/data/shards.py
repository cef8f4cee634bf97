"""Prepared data on disk: one folder per dataset, memory-mapped tokens, a header that says what every file must be.

    <key>/dataset.json              header: sizes and sha256 of all files, and of itself
          {train,tune,report}.bin   tokens, little-endian uint16 (uint32 for vocabularies above 65,536)
          {train,tune,report}.documents.bin   int64, where each document starts, and the end of the last
          tokenizer.json            unless the tokens are bytes

A document is its tokens and one end-of-text. Sizes are checked whenever a dataset is opened, checksums once per process:
damaged data is an error, it is never trained on.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from muonlab.data.cache import cache_home
from muonlab.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from muonlab.errors import InputError

FORMAT = 1  # part of every cache key: raise it when the files change
SPLITS = ("train", "tune", "report")
HEADER = "dataset.json"


@dataclass(frozen=True, eq=False)
class Shard:
    """The tokens of one split."""

    name: str
    tokens: np.ndarray  # [n] uint16 or uint32, memory-mapped
    documents: np.ndarray  # [documents + 1] int64, memory-mapped: document i is tokens[documents[i] : documents[i + 1]]
    bytes: int  # of the text in UTF-8, without ends of text
    unigram_entropy: float  # nats per token of the split's own token frequencies
    checksum: str  # sha256 of the tokens
    document_mask: bool = False

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, ends of text counted as tokens: bits per byte = nats / ln 2 / this."""
        return self.bytes / len(self.tokens)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of a corpus under one tokenizer."""

    directory: Path
    corpus: str  # the one really used, whatever was asked for
    train: Shard
    tune: Shard
    report: Shard
    vocab_size: int
    end_of_text: int
    checksum: str  # sha256 over the tokens and document boundaries of all splits and the vocabulary size
    tokenizer_kind: str
    notices: list[str] = field(default_factory=list)  # what a reader of the results must know

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the training split: what a model reaches that learned the token frequencies only."""
        return self.train.unigram_entropy

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first asked for."""
        return ByteTokenizer() if self.tokenizer_kind == "bytes" else load_tokenizer(self.directory / "tokenizer.json")

    def split(self, name: str) -> Shard:
        return {"train": self.train, "tune": self.tune, "report": self.report}[name]

    def bytes_per_token(self, split: str) -> float:
        return self.split(split).bytes_per_token

    def describe(self) -> dict[str, Any]:
        """Plain JSON: what metrics record about the data."""
        shards = [self.split(name) for name in SPLITS]
        return {
            "corpus": self.corpus,
            "checksum": self.checksum,
            "tokenizer": self.tokenizer_kind,
            "vocab_size": self.vocab_size,
            "unigram_entropy": self.unigram_entropy,
            "tokens": {shard.name: len(shard.tokens) for shard in shards},
            "documents": {shard.name: len(shard.documents) - 1 for shard in shards},
            "bytes": {shard.name: shard.bytes for shard in shards},
            "bytes_per_token": {shard.name: shard.bytes_per_token for shard in shards},
            "notices": list(self.notices),
        }


class ShardWriter:
    """Appends documents of token ids to the files of one split, counting as it goes."""

    def __init__(self, directory: Path, name: str, vocab_size: int, end_of_text: int) -> None:
        self.name, self.end_of_text = name, end_of_text
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.counts = np.zeros(vocab_size, np.int64)
        self.bytes = 0
        self.documents = 0
        self.length = 0
        self._tokens = open(directory / f"{name}.bin", "wb")  # noqa: SIM115 - closed in finish
        self._starts = open(directory / f"{name}.documents.bin", "wb")  # noqa: SIM115

    def append(self, documents: Iterable[np.ndarray], text_bytes: int) -> None:
        end = np.array([self.end_of_text], self.dtype)
        parts, starts = [], []
        for ids in documents:
            starts.append(self.length)
            parts += [ids.astype(self.dtype), end]
            self.length += len(ids) + 1
        tokens = np.concatenate(parts)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self.bytes += text_bytes
        self.documents += len(starts)
        self._tokens.write(tokens.data)  # not tofile: on a full disk that raises an OSError without its errno
        self._starts.write(np.array(starts, "<i8").data)

    def finish(self) -> dict[str, Any]:
        """Closes the files; returns the split's entry of the header."""
        self._starts.write(np.array([self.length], "<i8").data)
        self.close()
        return {
            "tokens": self.length,
            "documents": self.documents,
            "bytes": self.bytes,
            "dtype": self.dtype.str,
            "unigram_entropy": entropy(self.counts),
        }

    def close(self) -> None:
        self._tokens.close()
        self._starts.close()


def entropy(counts: np.ndarray) -> float:
    """Nats of the distribution proportional to `counts`."""
    frequency = counts[counts > 0] / counts.sum()
    return max(0.0, -math.fsum(frequency * np.log(frequency)))


def write_header(directory: Path, fields: dict[str, Any]) -> None:
    """The last file written: sizes and checksums of all others, the checksum of the dataset and of the header."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(directory.iterdir())
    }  # fmt: skip
    tokens = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".bin")}
    identity = {"vocab_size": fields["vocab_size"], "end_of_text": fields["end_of_text"], "files": tokens}
    header = {**fields, "format": FORMAT, "files": files, "checksum": _digest(identity)}
    header["header_sha256"] = _digest(header)
    (directory / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def open_dataset(directory: Path, corpus: str | None = None, document_mask: bool = False) -> Dataset:
    """Maps a prepared dataset. Raises InputError, naming the file, if anything is missing or damaged."""
    header = read_header(directory)
    for name, expected in header["files"].items():
        _verify(directory, name, expected)
    shards = {
        name: Shard(
            name=name,
            tokens=np.memmap(directory / f"{name}.bin", np.dtype(split["dtype"]), "r"),
            documents=np.memmap(directory / f"{name}.documents.bin", "<i8", "r"),
            bytes=split["bytes"],
            unigram_entropy=split["unigram_entropy"],
            checksum=header["files"][f"{name}.bin"]["sha256"],
            document_mask=document_mask,
        )
        for name, split in header["splits"].items()
    }
    return Dataset(
        directory=directory,
        corpus=corpus or header["corpus"],
        vocab_size=header["vocab_size"],
        end_of_text=header["end_of_text"],
        checksum=header["checksum"],
        tokenizer_kind=header["tokenizer"],
        notices=list(header["notices"]),
        **shards,
    )


def read_header(directory: Path) -> dict[str, Any]:
    path = directory / HEADER
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        claimed = header.pop("header_sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path, "it is missing or unreadable") from error
    if claimed != _digest(header):
        raise _damaged(path, "its checksum differs")
    return header


def cached_datasets() -> list[dict[str, Any]]:
    """What is prepared in the cache: corpus, vocab_size, tokens, size in bytes, path; damaged ones have an "error"."""
    found = []
    for directory in sorted((cache_home() / "datasets").glob("[!.]*/")):
        size = sum(path.stat().st_size for path in directory.iterdir())
        entry: dict[str, Any] = {"path": str(directory), "size": size}
        try:
            header = read_header(directory)
            tokens = sum(split["tokens"] for split in header["splits"].values())
            entry |= {key: header[key] for key in ("corpus", "tokenizer", "vocab_size", "checksum")} | {
                "tokens": tokens
            }
        except InputError as error:
            entry["error"] = str(error)
        found.append(entry)
    return found


_verified: set[tuple[str, int, int]] = set()  # (path, size, mtime) of files whose checksum this process has seen


def _verify(directory: Path, name: str, expected: dict[str, Any]) -> None:
    path = directory / name
    try:
        stat = path.stat()
    except OSError as error:
        raise _damaged(path, "it is missing") from error
    if stat.st_size != expected["size"]:
        raise _damaged(path, f"it has {stat.st_size:,} bytes instead of {expected['size']:,}")
    seen = (str(path), stat.st_size, stat.st_mtime_ns)
    if seen not in _verified:
        if _sha256(path) != expected["sha256"]:
            raise _damaged(path, "its checksum differs")
        _verified.add(seen)


def _damaged(path: Path, how: str) -> InputError:
    return InputError(f"{path} is damaged: {how}; delete the folder {path.parent} and prepare the data again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
