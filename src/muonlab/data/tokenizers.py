"""Text to token ids and back: byte-level BPE trained here, raw bytes, or any tokenizer.json.

Every tokenizer offers `vocab_size`, `end_of_text`, `encode_batch(texts)`, `encode(text)`, `decode(ids)`. End-of-text is
never produced by text, not even by text that spells it: it stands only between documents.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from muonlab.errors import InputError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")  # in order of preference


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255, end-of-text as 256."""

    vocab_size = 257
    end_of_text = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint8 array per text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Ends of text are shown by name; a character cut in half becomes U+FFFD."""
        raw = b"".join(END_OF_TEXT.encode() if token == self.end_of_text else bytes([token]) for token in map(int, ids))
        return raw.decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[end] for end in _END_NAMES if end in vocabulary]
        if not ends:
            raise InputError(
                f"{name} has no end-of-text token; one of {', '.join(_END_NAMES)} must be in its vocabulary"
            )
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.library = tokenizer
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = ends[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text; uses all cores (RAYON_NUM_THREADS)."""
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        return list(self.library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.library.decode([int(token) for token in ids], skip_special_tokens=False))


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Byte-level BPE as GPT-2's, of at most `vocab_size` tokens (fewer if the text has no more pairs to merge).

    Tokens 0 = end-of-text, then the 256 bytes, then merges. Deterministic.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FileTokenizer(tokenizer, "the trained tokenizer")


def load_tokenizer(path: Path) -> FileTokenizer:
    """A tokenizer.json. Raises InputError if it is missing, damaged or has no end-of-text token."""
    if not path.is_file():
        raise InputError(f"tokenizer {str(path)!r} is not a file; give 'bpe', 'bytes' or the path of a tokenizer.json")
    library = _library()
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
    return FileTokenizer(tokenizer, str(path))


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise InputError("this tokenizer needs the package tokenizers: pip install 'muonlab[lab]'") from error
    return tokenizers
