import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from muonlab.data import DataOptions, batch, cache_home, cached_datasets, evaluation_windows, prepare
from muonlab.data.build import _Spool
from muonlab.data.corpora import CORPORA, markov_documents, open_source
from muonlab.data.shards import SPLITS, entropy, open_dataset
from muonlab.data.tokenizers import train_bpe
from muonlab.errors import InputError

SMALL = DataOptions(corpus="synthetic", max_documents=120, tokenizer="bytes")


def made(options=SMALL, **keywords):
    return prepare(options, progress=False, **keywords)


def documents_of(shard) -> list[list[int]]:
    return [shard.tokens[a:b].tolist() for a, b in zip(shard.documents, shard.documents[1:])]


def texts_of(dataset, name) -> list[str]:
    return [dataset.tokenizer.decode(ids[:-1]) for ids in documents_of(dataset.split(name))]


@pytest.fixture
def write(tmp_path):
    """Writes a jsonl corpus and returns options for it."""

    def write(texts, name="corpus.jsonl", **options) -> DataOptions:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return DataOptions(corpus=str(path), **{"tokenizer": "bytes", **options})

    return write


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_three_splits_hold_every_document_once(tokenizer):
    dataset = made(replace(SMALL, tokenizer=tokenizer, vocab_size=300))
    found = [text for name in SPLITS for text in texts_of(dataset, name)]
    expected = list(open_source(SMALL).documents(False))[:120]
    assert sorted(found) == sorted(expected)


def test_documents_end_with_end_of_text_and_hold_none_elsewhere():
    dataset = made()
    for name in SPLITS:
        for ids in documents_of(dataset.split(name)):
            assert ids[-1] == dataset.end_of_text
            assert dataset.end_of_text not in ids[:-1]


def test_no_window_of_one_split_contains_text_of_another():
    """256 bytes of the synthetic text are about 45 words of 1.75 bits: chance repeats none of them."""
    dataset = made(replace(SMALL, tune_fraction=0.2, report_fraction=0.2))
    windows, text = {}, {}
    for name in SPLITS:
        shard = dataset.split(name)
        text[name] = dataset.tokenizer.decode(shard.tokens)
        inputs, _, _ = evaluation_windows(shard, 256, len(shard.tokens))
        windows[name] = [dataset.tokenizer.decode(row) for row in inputs.tolist()]
        assert all(window in text[name] for window in windows[name])
    for name in SPLITS:
        for other in SPLITS:
            if name != other:
                assert not any(window in text[other] for window in windows[name])


def test_copies_of_a_document_land_in_one_split(write):
    texts = list(markov_documents(seed=4, documents=60))
    dataset = made(write(texts * 3, tune_fraction=0.2, report_fraction=0.2))
    found = [set(texts_of(dataset, name)) for name in SPLITS]
    assert sum(len(texts) for texts in found) == len(set.union(*found)) == 60
    assert sum(len(documents_of(dataset.split(name))) for name in SPLITS) == 180


def test_documents_keep_their_split_when_others_are_added(write):
    texts = list(markov_documents(seed=4, documents=200))
    few, many = made(write(texts[:100], "few.jsonl")), made(write(texts, "many.jsonl"))
    for name in SPLITS:
        assert set(texts_of(few, name)) <= set(texts_of(many, name))


def test_the_fractions_and_the_seed_of_the_split_are_obeyed(write):
    options = write(markov_documents(seed=4, documents=2_000, words=5), tune_fraction=0.3, report_fraction=0.1)
    dataset = made(options)
    share = {name: len(documents_of(dataset.split(name))) / 2_000 for name in SPLITS}
    assert share["tune"] == pytest.approx(0.3, abs=0.04)  # four standard deviations
    assert share["report"] == pytest.approx(0.1, abs=0.03)
    other = made(replace(options, split_seed=1))
    assert set(texts_of(other, "tune")) != set(texts_of(dataset, "tune"))


def test_the_tokenizer_is_trained_on_the_training_split_only():
    dataset = made(replace(SMALL, tokenizer="bpe", vocab_size=320, tune_fraction=0.2, report_fraction=0.2))
    expected = train_bpe(texts_of(dataset, "train"), 320)
    other = train_bpe([text for name in SPLITS for text in texts_of(dataset, name)], 320)
    merges = json.loads((dataset.directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges == json.loads(expected.library.to_str())["model"]["merges"]
    assert merges != json.loads(other.library.to_str())["model"]["merges"]


def test_the_tokenizer_sees_at_most_tokenizer_bytes_from_all_over_the_split(tmp_path):
    spool = _Spool(tmp_path / "train.txt")
    texts = [f"{number:03d}" + "é" * 48 for number in range(100)]  # 99 bytes each
    for text in texts:
        spool.append(text.encode())
    spool.done()
    sample = list(spool.sample(1_000))
    assert 900 <= sum(len(text.encode()) for text in sample) <= 1_000
    numbers = [int(text[:3]) for text in sample]
    assert numbers == list(range(0, 100, 10))
    assert list(spool.sample(10**9)) == texts
    assert len("".join(spool.sample(50)).encode()) in (49, 50)  # cut inside a document, never inside a character


def test_same_options_give_the_same_checksum_and_other_text_another(write, home, monkeypatch):
    texts = list(markov_documents(seed=4, documents=60))
    first = made(write(texts)).checksum
    monkeypatch.setenv("MUONLAB_HOME", str(home) + "-elsewhere")
    assert made(write(texts)).checksum == first
    assert made(write([*texts[:-1], texts[-1] + "x"])).checksum != first


def test_a_second_call_maps_the_files_of_the_first():
    first = made()
    stamps = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    second = made()
    assert isinstance(second.train.tokens, np.memmap)
    assert second.describe() == first.describe()
    assert stamps == {path: path.stat().st_mtime_ns for path in second.directory.iterdir()}


def test_the_document_mask_changes_no_token():
    plain, masked = made(), made(replace(SMALL, document_mask=True))
    assert masked.directory == plain.directory
    assert batch(plain.train, 32, 2, 0, 0)[2] is None
    assert batch(masked.train, 32, 2, 0, 0)[2] is not None


def test_sizes_and_entropy_describe_the_tokens():
    dataset = made(replace(SMALL, tokenizer="bpe", vocab_size=300))
    for name in SPLITS:
        shard = dataset.split(name)
        text_bytes = sum(len(text.encode()) for text in texts_of(dataset, name))
        assert shard.bytes == text_bytes
        assert dataset.bytes_per_token(name) == pytest.approx(text_bytes / len(shard.tokens))
        frequency = np.unique(shard.tokens, return_counts=True)[1] / len(shard.tokens)
        assert shard.unigram_entropy == pytest.approx(-(frequency * np.log(frequency)).sum())
    assert dataset.unigram_entropy == dataset.train.unigram_entropy
    assert json.loads(json.dumps(dataset.describe()))["tokens"]["train"] == len(dataset.train.tokens)


def test_entropy_of_known_distributions():
    assert entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert entropy(np.array([0, 7])) == 0


def test_the_synthetic_text_can_be_learned():
    """Known from its construction: 1.75 bits a word, while the frequencies of its words alone say far more."""
    words = [text.rstrip(".").split() for text in markov_documents(seed=0, documents=200)]
    names, inverse = np.unique(np.concatenate(words), return_inverse=True)
    assert entropy(np.bincount(inverse)) > 3 * 1.75 * np.log(2)
    assert len(names) > 200


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_tokens_are_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, vocab_size, dtype):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(33 + i) if i < 90 else f"w{i}": i for i in range(vocab_size - 1)} | {"</s>": vocab_size - 1}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="!"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    dataset = made(replace(SMALL, tokenizer=str(tmp_path / "tokenizer.json")))
    assert dataset.vocab_size == vocab_size
    assert dataset.train.tokens.dtype == np.dtype(dtype)
    assert dataset.train.tokens[dataset.train.documents[1] - 1] == vocab_size - 1 == dataset.end_of_text


def test_a_vocabulary_that_the_text_cannot_fill_is_noticed():
    dataset = made(replace(SMALL, tokenizer="bpe", vocab_size=50_000))
    assert dataset.vocab_size < 50_000
    assert "50,000" in dataset.notices[0]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "header"])
def test_a_damaged_shard_is_named_and_never_trained_on(damage):
    directory = made().directory
    victim = directory / ("dataset.json" if damage == "header" else "tune.bin")
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[:-2])
    elif damage == "delete":
        victim.unlink()
    elif damage == "header":
        victim.write_bytes(content.replace(b'"vocab_size": 257', b'"vocab_size": 258'))
    else:
        victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(InputError, match="damaged") as caught:
        made()
    assert str(victim) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert made(rebuild=True).train.tokens.size
    assert open_dataset(directory).checksum == made().checksum


def test_text_of_lone_surrogates_and_empty_rows_does_no_harm(tmp_path):
    path = tmp_path / "odd.jsonl"
    rows = [json.dumps({"text": text}) for text in markov_documents(seed=4, documents=60)]
    path.write_text("\n".join(['{"text": "a \\ud800 b"}', '{"text": ""}', '{"text": null}', *rows]))
    dataset = made(DataOptions(corpus=str(path), tokenizer="bytes"))
    assert sum(len(documents_of(dataset.split(name))) for name in SPLITS) == 61
    assert "a ? b" in {text for name in SPLITS for text in texts_of(dataset, name)}


def test_max_documents_stops_reading(write):
    options = write(markov_documents(seed=4, documents=90), max_documents=50)
    with open(options.corpus, "a", encoding="utf-8") as file:
        file.write("this is not JSON\n")
    assert sum(len(documents_of(made(options).split(name))) for name in SPLITS) == 50


def test_processes_that_prepare_at_once_get_one_intact_dataset(home):
    program = (
        "from muonlab.data import DataOptions, prepare\n"
        "options = DataOptions(corpus='synthetic', max_documents=1_500, tokenizer='bytes')\n"
        "print(prepare(options, progress=False).checksum)"
    )
    command = [sys.executable, "-c", program]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    checksums = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert checksums == {made(replace(SMALL, max_documents=1_500)).checksum}
    assert len([path for path in (home / "datasets").iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_cleared_away(home):
    directory = made().directory
    stale = directory.parent / f".{directory.name}-killed"
    (stale / "dataset").mkdir(parents=True)
    made(rebuild=True)
    assert not stale.exists()


def test_the_cache_is_where_the_environment_says_and_lists_what_it_holds(home, monkeypatch):
    assert cache_home() == home
    assert cached_datasets() == []
    dataset = made()
    (entry,) = cached_datasets()
    assert entry["path"] == str(dataset.directory)
    assert entry["corpus"] == "synthetic"
    assert entry["size"] == sum(path.stat().st_size for path in dataset.directory.iterdir())
    (dataset.directory / "dataset.json").write_text("")
    assert "damaged" in cached_datasets()[0]["error"]
    monkeypatch.delenv("MUONLAB_HOME")
    assert cache_home().is_absolute()


def test_a_cache_that_cannot_be_made_gets_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUONLAB_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InputError, match="MUONLAB_HOME") as caught:
        made()
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_gets_one_line_and_leaves_nothing_half_written(home):
    """A limit on the size of files stands for the full disk: the writes fail in the middle, as they would there."""
    resource = pytest.importorskip("resource")
    program = (
        "import resource, sys\n"
        "from muonlab.data import DataOptions, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "try: prepare(DataOptions(corpus='synthetic', max_documents=300, tokenizer='bytes'), progress=False)\n"
        "except ValueError as error: print(error)"
    )
    assert resource.RLIMIT_FSIZE is not None
    for limit in (100_000, 700_000):  # while reading; while encoding
        done = subprocess.run([sys.executable, "-c", program, str(limit)], capture_output=True, text=True, check=False)
        assert done.stdout.startswith(f"cannot write the data cache {home}"), done.stderr
        assert done.stdout.count("\n") == 1
        assert not [path for path in (home / "datasets").iterdir() if path.is_dir()]


def test_every_corpus_says_what_it_is_and_its_licence():
    for corpus in CORPORA.values():
        assert corpus.summary
        assert corpus.licence
