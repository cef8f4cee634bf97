"""What the report room writes: complete, atomic, and unharmed by broken or hostile input."""

import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from muonlab.errors import InputError
from muonlab.report import print_comparison, write_comparison, write_run


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


class Page(HTMLParser):
    """Visible text and tags of a page, scripts and styles left out."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.attributes, self._skip = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)

    @property
    def visible(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def test_importing_the_room_loads_no_plotting_library():
    code = "import sys, muonlab.report; print([m for m in ('matplotlib', 'plotly', 'jinja2', 'rich', 'numpy', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(json.loads(found.replace("'", '"'))) <= {"torch", "numpy"}  # what `import muonlab` itself may load


def test_drawing_leaves_the_users_pyplot_alone(fake, tmp_path):
    fake.fake_run(tmp_path / "run")
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy(); from muonlab.report import write_run; write_run(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules; assert {k for k in before if dict.get(before, k) != dict.get(matplotlib.rcParams, k)} <= {'backend'}"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)


def test_a_run_gets_its_four_panels(fake, tmp_path):
    fake.fake_run(tmp_path / "run")
    path = write_run(tmp_path / "run")
    assert path.name == "metrics_plot.png"
    width, height = png_size(path)
    assert width >= 1000
    assert height >= 600


@pytest.mark.parametrize("damage", ["diverged", "no evaluation", "no update", "only nulls"])
def test_a_run_without_much_in_it_is_still_drawn(fake, tmp_path, damage):
    metrics = fake.fake_run(tmp_path / "run", status="diverged" if damage == "diverged" else "finished")
    if damage == "no evaluation":
        metrics["history"]["eval"] = []
    if damage == "no update":
        metrics["history"] = {"train": [], "eval": []}
    if damage == "only nulls":
        for row in metrics["history"]["train"]:
            row["loss"] = row["grad_norm"] = None
        for row in metrics["history"]["eval"]:
            row["cross_entropy"] = row["accuracy"] = None
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    assert png_size(write_run(tmp_path / "run"))[0] > 0


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        write_run(tmp_path)


def test_a_comparison_gets_a_picture_and_a_page_and_nothing_else(comparison):
    assert png_size(comparison / "comparison_plot.png")[0] >= 1500
    assert (comparison / "report.html").stat().st_size < 8_000_000
    assert not list(comparison.glob(".*")), "temporary files must be gone"


def test_the_page_fetches_nothing(comparison):
    page = Page((comparison / "report.html").read_text())
    assert "link" in page.tags
    assert not {"img", "iframe"} & set(page.tags)
    addresses = [value for key, value in page.attributes if key in ("src", "href")]
    assert all(address.startswith(("#", "data:")) for address in addresses)


def test_the_page_says_the_verdict_first(comparison):
    text = Page((comparison / "report.html").read_text()).visible
    assert text.index("muon is better than adamw here.") < text.index("Protocol and budget")
    for needed in (
        "adamw's final loss",
        "never",
        "diverged",
        "3 of 3",
        "muonlab compare muon adamw --quick",
        "enwik8",
        "optimizer.lr",
    ):
        assert needed in text, needed


def test_hostile_names_are_shown_as_text(fake, tmp_path):
    evil = "<script>alert(1)</script> $\\alpha_1^{ & _x"
    fake.fake_comparison(
        tmp_path, ("_new<b>$x$</b>", "adamw"), question=f"is {evil} better?", name=evil, notices=[evil], message=evil
    )
    summary = json.loads((tmp_path / "comparison_summary.json").read_text())
    summary["flags"] = [evil]
    summary["command"] = evil
    summary["trials"][0] |= {"status": "failed", "message": evil, "tune_cross_entropy": None, "stage": evil}
    (tmp_path / "comparison_summary.json").write_text(json.dumps(summary))
    picture, page = write_comparison(tmp_path)
    assert png_size(picture)[0] > 0
    text = page.read_text()
    assert "<script>alert" not in text
    assert text.count("<script") == 3 + text.count(
        '"<script'
    )  # plotly, figures, page; plotly's own source names the tag
    visible = Page(text).visible
    assert visible.count("<script>alert(1)</script>") >= 4
    assert "_new<b>$x$</b>" in visible
    run = next((tmp_path / "finals").iterdir())
    assert png_size(write_run(run))[0] > 0


def test_damaged_missing_and_foreign_run_directories_are_listed(fake, tmp_path):
    fake.fake_comparison(tmp_path)
    (tmp_path / "finals" / "1-muon" / "metrics.json").write_text('{"schema": 1, "hist')
    (tmp_path / "finals" / "2-muon" / "metrics.json").unlink()
    (tmp_path / "trials" / "00-muon" / "metrics.json").write_text("[1, 2]")
    text = Page(write_comparison(tmp_path)[1].read_text()).visible
    assert "Directories that could not be read" in text
    for directory in ("finals/1-muon", "finals/2-muon", "trials/00-muon"):
        assert directory in text


def test_a_half_written_run_joins_from_its_journal(fake, tmp_path):
    fake.fake_comparison(tmp_path)
    run = tmp_path / "finals" / "1-muon"
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"status": "running", "history": {"train": [], "eval": []}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    journal = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(journal[:-40])  # the crash cut the last line
    assert all(path.exists() for path in write_comparison(tmp_path))


def test_a_comparison_in_which_nothing_finished_still_has_a_report(fake, tmp_path, capsys):
    fake.fake_comparison(tmp_path, seeds=1, gate=False)
    summary = json.loads((tmp_path / "comparison_summary.json").read_text())
    for entry in summary["trials"]:
        entry |= {"status": "diverged", "tune_cross_entropy": None}
    for entry in summary["finals"]:
        entry |= {"status": "diverged", "report_cross_entropy": None, "bits_per_byte": None, "directory": "gone"}
    summary |= {"to_target": [], "chosen": {}}
    (tmp_path / "comparison_summary.json").write_text(json.dumps(summary))
    text = Page(write_comparison(tmp_path)[1].read_text()).visible
    assert "No verdict." in text
    print_comparison(tmp_path)
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "study"}', '{"kind": "comparison"}'])
def test_a_folder_without_a_readable_summary_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "comparison_summary.json").write_text(content)
    with pytest.raises(InputError, match=r"comparison_summary.json[^\n]+$"):
        write_comparison(tmp_path)


def test_a_failing_write_leaves_the_old_page(fake, comparison, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(comparison, copy)
    before = (copy / "report.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        write_comparison(copy)
    assert (copy / "report.html").read_bytes() == before
    assert not list(copy.glob(".*"))


def test_the_terminal_shows_every_part(comparison, capsys):
    print_comparison(comparison)
    out = " ".join(capsys.readouterr().out.split())
    for needed in ("muon is better than adamw", "octaves", "never", "3 of 3"):
        assert needed in out
