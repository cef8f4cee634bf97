"""What determines the tokens of a run: corpus, tokenizer, split."""

from dataclasses import dataclass
from typing import ClassVar

from muonlab.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A corpus and how it becomes tokens. Equal options give equal tokens, on every machine."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    corpus: str = "enwik8"
    """Name (see `muonlab list corpora`), local file, folder or glob (.txt, .jsonl, .parquet; .gz), or hub id owner/name[@revision]."""
    subset: str | None = None
    """Configuration of a hub dataset, where it has several."""
    split: str = "train"
    """Split of a hub dataset that is read (it is split again into train, tune and report here)."""
    text_column: str = "text"
    """Column or key that holds the text (jsonl, parquet, hub)."""
    max_documents: int | None = None
    """Read only the first so many documents."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the training split), "bytes", or the path of a tokenizer.json."""
    vocab_size: int = 2048
    """Vocabulary of "bpe", end-of-text included; at least 257."""
    tokenizer_bytes: int = 8_000_000
    """How much text of the training split "bpe" is trained on, in bytes."""
    tune_fraction: float = 0.05
    """Share of the documents that hyper-parameters are chosen on."""
    report_fraction: float = 0.05
    """Share of the documents that results are judged on."""
    split_seed: int = 0
    """Another seed gives another assignment of documents to splits."""
    document_mask: bool = False
    """Attend only within a document (costs speed; off: documents are packed and separated by end-of-text)."""

    def __post_init__(self) -> None:
        if not self.corpus.strip():
            raise InputError("data.corpus is empty; give a name such as 'enwik8', a file or a hub id")
        if not self.tokenizer.strip():
            raise InputError("data.tokenizer is empty; give 'bpe', 'bytes' or the path of a tokenizer.json")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise InputError(
                f"data.vocab_size {self.vocab_size} is too small; 256 bytes and end-of-text need at least 257"
            )
        if self.max_documents is not None and self.max_documents < 3:
            raise InputError(f"data.max_documents {self.max_documents} is too small; three splits need at least 3")
        if self.tokenizer_bytes < 1:
            raise InputError(f"data.tokenizer_bytes {self.tokenizer_bytes} must be positive")
        for name in ("tune_fraction", "report_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"data.{name} {getattr(self, name)} must lie between 0 and 1")
        if self.tune_fraction + self.report_fraction >= 1:
            raise InputError(
                "data.tune_fraction and data.report_fraction leave nothing to train on; their sum must be < 1"
            )
