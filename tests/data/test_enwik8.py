"""Fetching and cleaning, against a small dump served on the loopback interface and a source distribution made here."""

import gzip
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from muonlab.data import DataOptions, enwik8, fetch, prepare
from muonlab.data.enwik8 import Dump, FetchError, prose
from muonlab.data.fetch import Distribution, SourceFailed, download, download_from_distribution
from muonlab.errors import InputError

ARTICLES = [f"Article {number} tells of a river that flows from the hills to the sea. " * 8 for number in range(60)]
CONTENT = "".join(
    f"  <page>\n    <title>River {number}</title>\n      <text>{text}</text>\n  </page>\n"
    for number, text in enumerate(ARTICLES)
).encode()
PROSE = [text.strip() for text in ARTICLES]


def zipped(content: bytes = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dump", content)
    return buffer.getvalue()


class Server:
    """Serves `body`; `cut` breaks the first so many responses half-way; `ranges` lists the Range headers that came."""

    def __init__(self, body: bytes) -> None:
        self.body, self.cut, self.honours_ranges = body, 0, True
        self.ranges: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and outer.honours_ranges else 0
                if start >= len(outer.body):
                    self.send_error(416)
                    return
                body = outer.body[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if outer.cut:
                    outer.cut -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/dump.zip"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    server = Server(zipped())
    yield server
    server.close()


def dump(url: str = "http://127.0.0.1:9/closed.zip", distributions: tuple[Distribution, ...] = ()) -> Dump:
    return Dump("dump", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), url, distributions)


def read(source: Dump) -> list[str]:
    return list(prose(source, show=False))


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.rglob("*") if path.name.startswith(".") or path.suffix in (".part", ".tmp")]


def test_a_dump_is_fetched_cleaned_and_asked_for_only_once(server, home):
    assert read(dump(server.url)) == PROSE
    assert read(dump(server.url)) == PROSE
    assert len(server.ranges) == 1
    assert not leftovers(home)


def test_a_broken_download_is_continued_where_it_broke(server, tmp_path):
    server.cut = 2
    download(server.url, tmp_path / "file", show=False)
    assert (tmp_path / "file").read_bytes() == server.body
    half = len(server.body) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + (len(server.body) - half) // 2}-"]


def test_a_download_that_a_killed_process_began_is_continued(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.body[:100])
    download(server.url, tmp_path / "file", show=False)
    assert server.ranges == ["bytes=100-"]
    assert (tmp_path / "file").read_bytes() == server.body
    assert not (tmp_path / "file.part").exists()


@pytest.mark.parametrize("honours_ranges", [True, False])
def test_a_part_that_does_not_fit_is_begun_again(server, tmp_path, honours_ranges):
    server.honours_ranges = honours_ranges
    (tmp_path / "file.part").write_bytes(b"x" * (len(server.body) + 5 if honours_ranges else 5))
    download(server.url, tmp_path / "file", show=False)
    assert (tmp_path / "file").read_bytes() == server.body


def test_a_download_that_keeps_breaking_leaves_no_file_but_its_part(server, tmp_path):
    server.cut = 99
    with pytest.raises(SourceFailed, match="broke after"):
        download(server.url, tmp_path / "file", show=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file.part"]


def test_a_slow_archive_is_left_for_another_source_and_taken_when_there_is_none(
    server, home, monkeypatch, distribution
):
    monkeypatch.setattr(fetch, "PATIENCE", -1.0)
    monkeypatch.setattr(fetch, "SLOWEST", float("inf"))
    assert read(dump(server.url, (distribution,))) == PROSE
    assert not (home / "downloads" / "dump.zip").exists()
    (home / "downloads" / "dump.gz").unlink()
    next((home / "corpora").glob("*.jsonl")).unlink()
    assert read(dump(server.url)) == PROSE
    assert (home / "downloads" / "dump.zip").read_bytes() == server.body


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/closed", "http://name.invalid/file"])
def test_a_server_that_is_not_there_fails_with_a_reason(url, tmp_path):
    with pytest.raises(SourceFailed, match=r"127\.0\.0\.1|no such host"):
        download(url, tmp_path / "file", show=False)


@pytest.mark.parametrize(
    "content", [zipped()[:-200], b"not a zip", zipped(CONTENT[:-1]), zipped(CONTENT.replace(b"sea", b"see"))]
)
def test_a_damaged_archive_is_deleted_and_fetched_again(server, home, capsys, content):
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / "dump.zip").write_bytes(content)
    assert list(prose(dump(server.url), show=True)) == PROSE
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1
    assert (home / "downloads" / "dump.zip").read_bytes() == server.body


@pytest.mark.parametrize("content", [gzip.compress(CONTENT)[:-30], b"\x1f\x8bnot gzip"])
def test_a_damaged_gzip_is_deleted_and_fetched_again(server, home, content):
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / "dump.gz").write_bytes(content)
    assert read(dump(server.url)) == PROSE
    assert not (home / "downloads" / "dump.gz").exists()


def test_damaged_prose_is_cleaned_again_from_the_archive(server, home):
    read(dump(server.url))
    (text,) = (home / "corpora").glob("*.jsonl")
    text.write_bytes(text.read_bytes()[:-10])
    assert read(dump(server.url)) == PROSE
    assert len(server.ranges) == 1


def test_data_that_is_wrong_everywhere_is_never_used(server, home):
    server.body = zipped(b"something else\n" * 1000)
    with pytest.raises(FetchError, match="cannot be downloaded") as caught:
        read(dump(server.url))
    assert "\n" not in str(caught.value)
    assert not list((home / "corpora").glob("*.jsonl"))


@pytest.fixture
def distribution(tmp_path, monkeypatch) -> Distribution:
    """A source distribution with dump.gz inside, in a folder that pip is told to search instead of any index."""
    backend = "def prepare_metadata_for_build_wheel(folder, *_):\n    import os\n    os.mkdir(folder + '/carrier-1.0.dist-info')\n"
    backend += "    open(folder + '/carrier-1.0.dist-info/METADATA', 'w').write('Metadata-Version: 2.1\\nName: carrier\\nVersion: 1.0\\n')\n"
    backend += "    return 'carrier-1.0.dist-info'\n\ndef build_wheel(*_): raise NotImplementedError\n"
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend.encode(),
        "data/dump.gz": gzip.compress(CONTENT, mtime=0),
    }
    path = tmp_path / "index" / "carrier-1.0.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"carrier-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    content = path.read_bytes()
    return Distribution("carrier", "1.0", hashlib.sha256(content).hexdigest(), len(content), "data/dump.gz")


def test_when_the_archive_is_unreachable_pip_delivers_the_same_text(distribution, home):
    assert read(dump(distributions=(distribution,))) == PROSE
    assert not leftovers(home)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": "0" * 64}, "(?i)hash"),
        ({"version": "2.0"}, "carrier==2.0|No matching"),
        ({"member": "data/other.gz"}, "no carrier-1.0/data/other.gz inside"),
    ],
)
def test_a_distribution_that_is_not_what_was_pinned_fails_with_a_reason(distribution, tmp_path, change, reason):
    folder = tmp_path / "downloads"
    folder.mkdir()
    with pytest.raises(SourceFailed, match=reason) as caught:
        download_from_distribution(Distribution(**{**vars(distribution), **change}), folder / "dump.gz", show=False)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


def test_without_any_source_the_default_corpus_falls_back_to_pydoc_only_when_asked_and_says_so(monkeypatch):
    monkeypatch.setattr(enwik8, "ENWIK8", dump())
    with pytest.raises(InputError, match="cannot be downloaded") as caught:
        prepare(DataOptions(tokenizer="bytes"), progress=False)
    assert "\n" not in str(caught.value)
    dataset = prepare(DataOptions(tokenizer="bytes"), progress=False, fallback=True)
    assert dataset.corpus == "pydoc"
    assert "'pydoc' is used instead" in dataset.describe()["notices"][0]
    assert prepare(DataOptions(corpus="pydoc", tokenizer="bytes"), progress=False).notices == []


def test_no_other_corpus_falls_back(tmp_path):
    with pytest.raises(InputError):
        prepare(DataOptions(corpus=str(tmp_path / "missing.txt")), progress=False, fallback=True)


def test_the_pinned_sources_are_complete():
    assert len(enwik8.ENWIK8.sha256) == 64
    for pinned in enwik8.ENWIK8.distributions:
        assert len(pinned.sha256) == 64
        assert pinned.member.endswith(".gz")


def test_a_machine_without_network_needs_the_prepared_datasets_only(server, home, monkeypatch):
    source = dump(server.url)
    monkeypatch.setattr(enwik8, "ENWIK8", source)
    options = DataOptions(tokenizer="bytes", tune_fraction=0.2, report_fraction=0.2)
    there = prepare(options, progress=False)
    shutil.rmtree(home / "downloads")
    shutil.rmtree(home / "corpora")
    server.close()
    assert prepare(options, progress=False, fallback=True).describe() == there.describe()
    assert there.corpus == "enwik8"
