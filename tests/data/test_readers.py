import builtins
import gzip
import json

import pytest

from muonlab.data import DataOptions, prepare
from muonlab.data.corpora import open_source
from muonlab.data.readers import TXT_DOCUMENT, hub_documents, local_files, read_file, text_documents
from muonlab.errors import InputError

ROWS = [{"text": f"row {number} — ü", "other": number, "body": f"body {number}"} for number in range(40)]


def read(path, column="text"):
    return list(read_file(path, column))


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_txt_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {number}. " + "word " * 100 for number in range(30)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = read(path)
    assert all(len(document) >= TXT_DOCUMENT for document in documents[:-1])
    assert [part for document in documents for part in document.split("\n\n")] == paragraphs


def test_txt_without_blank_lines_is_still_cut():
    documents = list(text_documents("a sentence on its own line\n" for _ in range(5_000)))
    assert len(documents) > 3
    assert sum(document.count("sentence") for document in documents) == 5_000


def test_jsonl_parquet_and_gzip_give_the_same_documents(jsonl, parquet, tmp_path):
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    expected = [row["text"] for row in ROWS]
    assert read(jsonl) == read(parquet) == read(packed) == expected
    assert read(jsonl, "body") == read(parquet, "body") == [row["body"] for row in ROWS]


def test_a_hub_dataset_streams_through_the_same_path_as_local_files(jsonl, parquet):
    pytest.importorskip("datasets")
    folder = parquet.parent / "hub"
    folder.mkdir()
    parquet.rename(folder / "train.parquet")
    assert list(hub_documents(str(folder), None, "train", "text")) == [row["text"] for row in ROWS]
    with pytest.raises(InputError, match="did you mean 'text'"):
        list(hub_documents(str(folder), None, "train", "tekst"))
    with pytest.raises(InputError, match="test") as caught:
        list(hub_documents(str(folder), None, "test", "text"))
    one_line(caught)


def test_a_hub_id_without_network_gets_one_line_quickly(monkeypatch):
    pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for corpus in ("openwebtext-100k", "cosmopedia-v2", "someone/something"):
        with pytest.raises(InputError, match="hub cannot be reached") as caught:
            prepare(DataOptions(corpus=corpus, max_documents=100), progress=False)
        one_line(caught)


def test_a_corpus_larger_than_most_disks_asks_for_a_limit():
    with pytest.raises(InputError, match="max_documents"):
        open_source(DataOptions(corpus="cosmopedia-v2"))


def test_a_missing_datasets_package_is_one_line_with_the_pip_command(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *arguments, **keywords):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(InputError, match=r"pip install 'muonlab\[hub\]'") as caught:
        list(hub_documents("someone/something", None, "train", "text"))
    one_line(caught)


def test_folders_and_globs_name_their_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "ignored.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.name for path in local_files(str(tmp_path))] == ["a.txt", "b.txt", "c.jsonl"]
    assert [path.name for path in local_files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n \n\n", "no text"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "line 1 is not UTF-8"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "one object per line"),
        ("number.jsonl", b'{"text": 1}\n', "int"),
        ("column.jsonl", b'{"texts": "a"}\n', "did you mean 'texts'"),
        ("not.parquet", b"PAR0", "not a parquet file"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "not a complete gzip file"),
        ("data.csv", b"a,b\n", "unknown"),
        ("one.txt", b"Only one document.", "none falls into the"),
    ],
)
def test_a_bad_file_gets_one_line_and_leaves_nothing_in_the_cache(tmp_path, home, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        prepare(DataOptions(corpus=str(tmp_path / name)), progress=False)
    assert "None" not in one_line(caught)
    assert not [path for path in home.glob("datasets/*") if not path.name.endswith(".lock")]


def test_an_unknown_corpus_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown corpus 'enwik9'; did you mean 'enwik8'\?"):
        open_source(DataOptions(corpus="enwik9"))


def test_options_of_the_hub_are_refused_where_they_would_do_nothing(jsonl):
    for corpus in ("pydoc", "synthetic", "enwik8", str(jsonl)):
        with pytest.raises(InputError, match="hub"):
            open_source(DataOptions(corpus=corpus, subset="en"))
