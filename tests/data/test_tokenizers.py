import os
import subprocess
import sys

import numpy as np
import pytest

from muonlab.data.corpora import markov_documents
from muonlab.data.tokenizers import END_OF_TEXT, ByteTokenizer, load_tokenizer, train_bpe
from muonlab.errors import InputError

TEXTS = ["Grüße, 世界! \n\ttabs and  spaces", f"a text that spells {END_OF_TEXT} itself", "", "\x00\x7f"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(markov_documents(seed=1, documents=20), 400)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_encoding_loses_nothing_and_never_makes_an_end_of_text(kind, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.end_of_text not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_byte_tokens_are_the_bytes():
    (ids,) = ByteTokenizer().encode_batch(["é"])
    assert ids.tolist() == [0xC3, 0xA9]
    assert (ByteTokenizer.vocab_size, ByteTokenizer.end_of_text) == (257, 256)
    assert ByteTokenizer().decode([104, 105, 256]) == f"hi{END_OF_TEXT}"


def test_the_vocabulary_has_the_size_asked_for_and_holds_all_bytes(bpe):
    assert bpe.vocab_size == 400
    assert train_bpe(["no pair twice"], 257).vocab_size == 257
    everything = bytes(range(256)).decode("latin-1")
    assert train_bpe(["x"], 257).decode(train_bpe(["x"], 257).encode(everything)) == everything


def test_merges_shorten_the_text_they_were_trained_on(bpe):
    text = next(markov_documents(seed=1, documents=1))
    assert len(bpe.encode(text)) < 0.6 * len(text)


def test_training_gives_the_same_tokenizer_in_another_process(bpe):
    program = (
        "from muonlab.data.corpora import markov_documents as m\n"
        "from muonlab.data.tokenizers import train_bpe\n"
        "print(train_bpe(m(seed=1, documents=20), 400).library.to_str())"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == bpe.library.to_str()


def test_a_tokenizer_json_gives_the_same_tokens_whatever_it_would_add(bpe, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_str(bpe.library.to_str())
    library.enable_truncation(4)
    library.enable_padding(length=100)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for here, there in zip(bpe.encode_batch(TEXTS), loaded.encode_batch(TEXTS)):
        np.testing.assert_array_equal(here, there)


def test_a_file_that_is_no_tokenizer_gets_one_line(tmp_path):
    with pytest.raises(InputError, match=r"'bpe', 'bytes' or the path"):
        load_tokenizer(tmp_path / "bpee")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="end-of-text"):
        load_tokenizer(tmp_path / "tokenizer.json")
