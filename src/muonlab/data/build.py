"""From a corpus to a dataset: read once, split by document, train the tokenizer, encode, and publish in one rename."""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from muonlab.data.cache import cache_folder, write_errors
from muonlab.data.corpora import Source, open_source
from muonlab.data.enwik8 import FetchError
from muonlab.data.options import DataOptions
from muonlab.data.progress import progress as show_progress
from muonlab.data.progress import say
from muonlab.data.shards import FORMAT, SPLITS, Dataset, ShardWriter, open_dataset, write_header
from muonlab.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_bpe
from muonlab.errors import InputError

BATCH_BYTES = 4_000_000  # of text that is encoded at once


def prepare(options: DataOptions, *, progress: bool = True, fallback: bool = False, rebuild: bool = False) -> Dataset:
    """The dataset that `options` describe; made on first use, mapped from the cache afterwards.

    With `fallback`, the default corpus gives way to `pydoc` when nothing can be downloaded; a notice in the result says so.
    With `rebuild`, what is cached is made again. Raises InputError: bad options, unreadable corpus, damaged cache.
    """
    try:
        with write_errors():
            return _prepare(options, progress, rebuild)
    except FetchError as error:
        if not (fallback and options.corpus == DataOptions.corpus):
            raise
        notice = f"{error.args[0]}: the small corpus 'pydoc' is used instead"
        say(notice, progress)
        instead = prepare(replace(options, corpus="pydoc"), progress=progress, rebuild=rebuild)
        return replace(instead, notices=[notice, *instead.notices])


def _prepare(options: DataOptions, progress: bool, rebuild: bool) -> Dataset:
    source = open_source(options)
    folder = cache_folder("datasets")
    key = _key(options, source)
    final = folder / key
    if rebuild or not final.exists():
        with _locked(folder / f".{key}.lock", f"{source.name}: another process prepares it; waiting", progress):
            if rebuild and final.exists():
                shutil.rmtree(final)
            if not final.exists():  # else the process that we waited for has made it
                _publish(options, source, final, progress)
    return open_dataset(final, source.name, options.document_mask)


def _key(options: DataOptions, source: Source) -> str:
    """Everything that determines the tokens, as 20 hexadecimal digits."""
    what: dict[str, Any] = {
        "format": FORMAT,
        "source": source.fingerprint,
        "max_documents": options.max_documents,
        "split": [options.tune_fraction, options.report_fraction, options.split_seed],
        "tokenizer": options.tokenizer,
    }
    if options.tokenizer == "bpe":
        what["bpe"] = [options.vocab_size, options.tokenizer_bytes]
    elif options.tokenizer != "bytes":
        path = Path(options.tokenizer).expanduser()
        load_tokenizer(path)
        what["tokenizer"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]


@contextmanager
def _locked(path: Path, message: str, progress: bool) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(message, progress)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(options: DataOptions, source: Source, final: Path, progress: bool) -> None:
    for stale in final.parent.glob(f".{final.name}-*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    try:
        built = work / "dataset"
        built.mkdir()
        spools = _read_and_split(options, source, work, progress)
        tokenizer = _tokenizer(options, spools["train"], built, progress)
        header = {
            "corpus": source.name,
            "source": source.fingerprint,
            "options": {key: value for key, value in asdict(options).items() if key != "document_mask"},
            "tokenizer": options.tokenizer if options.tokenizer in ("bpe", "bytes") else Path(options.tokenizer).name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "splits": _encode(spools, tokenizer, built, progress),
            "notices": [],
        }
        if options.tokenizer == "bpe" and tokenizer.vocab_size < options.vocab_size:
            header["notices"] = [
                f"the text yields a vocabulary of {tokenizer.vocab_size:,}, less than the {options.vocab_size:,} asked for"
            ]
        write_header(built, header)
        os.rename(built, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Spool:
    """Documents of one split on disk between reading and encoding: a corpus is read once and never held whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths = array("q")
        self.bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed in done

    def append(self, raw: bytes) -> None:
        self._file.write(raw)
        self.lengths.append(len(raw))
        self.bytes += len(raw)

    def done(self) -> None:
        self._file.close()

    def sample(self, limit: int) -> Iterator[str]:
        """Documents spread evenly over the split, at most `limit` bytes in all."""
        stride = max(1, -(-self.bytes // limit))
        offset, left = 0, limit
        with open(self.path, "rb") as file:
            for number, length in enumerate(self.lengths):
                if number % stride == 0 and left > 0:
                    file.seek(offset)
                    yield file.read(min(length, left)).decode("utf-8", "ignore")  # the last may be cut in a character
                    left -= length
                offset += length

    def batches(self, limit: int) -> Iterator[tuple[list[str], int]]:
        """All documents in order, as lists of about `limit` bytes, with their size in bytes."""
        texts: list[str] = []
        size = 0
        with open(self.path, "rb") as file:
            for length in self.lengths:
                texts.append(file.read(length).decode("utf-8"))
                size += length
                if size >= limit:
                    yield texts, size
                    texts, size = [], 0
        if texts:
            yield texts, size


def _read_and_split(options: DataOptions, source: Source, work: Path, progress: bool) -> dict[str, _Spool]:
    spools = {name: _Spool(work / f"{name}.txt") for name in SPLITS}
    count = 0
    try:
        documents = source.documents(progress)
        first = next(documents, "")  # what must be fetched for it shows a progress of its own
        with show_progress(f"{source.name}: reading", None, progress) as advance:
            for text in chain([first], documents):
                if not text.strip():
                    continue
                raw = text.encode("utf-8", "replace")  # a lone surrogate, which JSON can spell, has no UTF-8
                spools[split_of(raw, options)].append(raw)
                advance(len(raw))
                count += 1
                if count == options.max_documents:
                    break
    finally:
        for spool in spools.values():
            spool.done()
    if not count:
        raise InputError(f"corpus {source.name!r} holds no text")
    for name, spool in spools.items():
        if not spool.lengths:
            raise InputError(
                f"corpus {source.name!r} has {count} document(s) and none falls into the {name} split; use more documents,"
                " larger data.tune_fraction and data.report_fraction, or another data.split_seed"
            )
    return spools


def split_of(document: bytes, options: DataOptions) -> str:
    """The split of a document: a function of its own text, so that no copy of it lands in another split."""
    digest = hashlib.blake2b(document, digest_size=8, key=str(options.split_seed).encode()).digest()
    u = int.from_bytes(digest, "big") / 2**64
    if u < options.tune_fraction:
        return "tune"
    return "report" if u < options.tune_fraction + options.report_fraction else "train"


def _tokenizer(options: DataOptions, train: _Spool, built: Path, progress: bool) -> Tokenizer:
    if options.tokenizer == "bytes":
        return ByteTokenizer()
    if options.tokenizer == "bpe":
        say(
            f"training a tokenizer of {options.vocab_size:,} on {min(options.tokenizer_bytes, train.bytes) / 1e6:.1f} MB",
            progress,
        )
        tokenizer: FileTokenizer = train_bpe(train.sample(options.tokenizer_bytes), options.vocab_size)
    else:
        tokenizer = load_tokenizer(Path(options.tokenizer).expanduser())
    (built / "tokenizer.json").write_text(tokenizer.library.to_str(), encoding="utf-8")
    return tokenizer


def _encode(spools: dict[str, _Spool], tokenizer: Tokenizer, built: Path, progress: bool) -> dict[str, Any]:
    splits = {}
    with show_progress("encoding", sum(spool.bytes for spool in spools.values()), progress) as advance:
        for name, spool in spools.items():
            writer = ShardWriter(built, name, tokenizer.vocab_size, tokenizer.end_of_text)
            try:
                for texts, size in spool.batches(BATCH_BYTES):
                    writer.append(tokenizer.encode_batch(texts), size)
                    advance(size)
                splits[name] = writer.finish()
            finally:
                writer.close()
    return splits
