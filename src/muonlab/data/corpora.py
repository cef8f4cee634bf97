"""Corpora by name, and how any corpus becomes a stream of documents.

A new corpus is one entry of `CORPORA`: a function from options to a `Source`.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from muonlab.data import enwik8, readers
from muonlab.data.options import DataOptions
from muonlab.errors import InputError, unknown


@dataclass(frozen=True)
class Source:
    """Documents that are read once, and what identifies them before they are read."""

    name: str
    fingerprint: str  # equal fingerprints mean equal documents: part of the cache key
    documents: Callable[[bool], Iterator[str]]  # (show progress) -> the documents in order


@dataclass(frozen=True)
class Corpus:
    summary: str
    licence: str
    source: Callable[[DataOptions], Source]


def open_source(options: DataOptions) -> Source:
    """The corpus that `options` names: registered, local, or on the hub. Raises InputError if there is none."""
    name = options.corpus
    if name in CORPORA:
        return CORPORA[name].source(options)
    if _looks_local(name):
        return _local(options)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return _hub(options, name, options.subset)
    raise unknown("corpus", name, CORPORA)


def _looks_local(name: str) -> bool:
    return name.endswith(readers.SUFFIXES) or name[0] in "./~" or bool(set(name) & set("*?[\\")) or Path(name).exists()


def _local(options: DataOptions) -> Source:
    _refuse_hub_options(options)
    files = readers.local_files(options.corpus)
    digest = hashlib.sha256(f"{options.text_column} {readers.TXT_DOCUMENT}".encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())

    def documents(show: bool) -> Iterator[str]:
        for path in files:
            yield from readers.read_file(path, options.text_column)

    return Source(options.corpus, f"files {digest.hexdigest()}", documents)


def _hub(options: DataOptions, name: str, subset: str | None) -> Source:
    def documents(show: bool) -> Iterator[str]:
        return readers.hub_documents(name, subset, options.split, options.text_column)

    return Source(options.corpus, f"hub {name} {subset} {options.split} {options.text_column}", documents)


def _cosmopedia(options: DataOptions) -> Source:
    if options.max_documents is None:
        raise InputError(
            "corpus 'cosmopedia-v2' is larger than most disks; set data.max_documents, for example to 100000"
        )
    return _hub(options, "HuggingFaceTB/smollm-corpus", options.subset or "cosmopedia-v2")


def _refuse_hub_options(options: DataOptions) -> None:
    if options.subset is not None or options.split != DataOptions.split:
        raise InputError(
            f"data.subset and data.split choose a part of a hub dataset; corpus {options.corpus!r} has no parts"
        )


def _enwik8(options: DataOptions) -> Source:
    _refuse_hub_options(options)
    return Source("enwik8", enwik8.ENWIK8.fingerprint, lambda show: enwik8.prose(enwik8.ENWIK8, show))


def _pydoc(options: DataOptions) -> Source:
    _refuse_hub_options(options)
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise InputError("corpus 'pydoc' is missing: this Python was installed without pydoc_data") from error
    text = {name: str(topics[name]) for name in sorted(topics)}
    digest = hashlib.sha256("\0".join(text.values()).encode()).hexdigest()

    def documents(show: bool) -> Iterator[str]:
        for topic in text.values():
            yield from readers.text_documents(topic.splitlines(keepends=True))

    return Source("pydoc", f"pydoc {readers.TXT_DOCUMENT} {digest}", documents)


def _synthetic(options: DataOptions) -> Source:
    _refuse_hub_options(options)
    return Source("synthetic", "synthetic 1", lambda show: markov_documents(seed=0, documents=2_000))


def markov_documents(seed: int, documents: int, words: int = 300, vocabulary: int = 400) -> Iterator[str]:
    """Text of a first-order Markov chain over made-up words: each word has four successors, with probabilities
    1/2, 1/4, 1/8, 1/8, so its entropy is 1.75 bits per word where the words alone have about log2(vocabulary).
    """
    draw = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names: list[str] = []
    while len(names) < vocabulary:
        name = "".join(draw.choice(syllables) for _ in range(draw.randint(1, 3)))
        if name not in names:
            names.append(name)
    successors = [draw.sample(range(vocabulary), 4) for _ in names]
    for _ in range(documents):
        word = draw.randrange(vocabulary)
        chosen = []
        for _ in range(words):
            chosen.append(names[word])
            u = draw.random()
            word = successors[word][0 if u < 0.5 else 1 if u < 0.75 else 2 if u < 0.875 else 3]
        yield " ".join(chosen) + "."


CORPORA: dict[str, Corpus] = {
    "enwik8": Corpus(
        "English Wikipedia of 2006, 52.5 MB of prose, fetched on first use", "GFDL, CC BY-SA 3.0", _enwik8
    ),
    "pydoc": Corpus("Python's own language reference, 0.5 MB, needs no network", "PSF-2.0", _pydoc),
    "synthetic": Corpus("Markov chain over made-up words, 3 MB, needs no network", "MIT", _synthetic),
    "cosmopedia-v2": Corpus(
        "synthetic textbooks, streamed from the hub; tens of millions, so max_documents must be set",
        "ODC-BY",
        _cosmopedia,
    ),
    "openwebtext-100k": Corpus(
        "100,000 web pages, streamed from the hub",
        "as the pages",
        lambda options: _hub(options, "Elriggs/openwebtext-100k", options.subset),
    ),
}
