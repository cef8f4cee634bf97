"""The claims ledger as a file: what is refused, and that the real one is valid and complete."""

from collections import Counter
from pathlib import Path

import pytest

from muonlab.errors import InputError
from muonlab.studies.ledger import KINDS, read_ledger

DOCS = Path(__file__).parents[2] / "docs"
LOWER = '{ kind = "difference", candidate = "a", reference = "b", direction = "lower" }'
TOY = """title = "toy"
question = "?"
default = "corrected"
[base]
model = "micro"
[[cases]]
name = "a"
[[cases]]
name = "b"
[versions.corrected]
note = "n"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.toml").write_text(TOY)
    return tmp_path


def ledger_file(folder: Path, *statistics: str, study: str = "toy", extra: str = "") -> Path:
    rows = "".join(
        f'[[claims]]\nid = "S0-{i:02d}"\nclaim = "c"\nwhere = "w"\nstatistic = {statistic}\n'
        + ("" if '"none"' in statistic or '"arithmetic"' in statistic else f'study = "{study}"\nevidence = "micro"\n')
        + extra
        for i, statistic in enumerate(statistics, 1)
    )
    path = folder / "claims.toml"
    path.write_text(f'schema = 1\nstudies = ["toy.toml"]\n[seeds]\n000 = "t"\n{rows}')
    return path


@pytest.mark.parametrize(
    ("statistic", "extra", "says"),
    [
        (LOWER.replace("candidate", "candidat"), "", "did you mean 'candidate'"),
        (LOWER.replace('"difference"', '"diference"'), "", "did you mean 'difference'"),
        (LOWER.replace('"a"', '"aa*"'), "", "unknown cell of toy 'aa*'"),
        (LOWER.replace('"lower"', '"down"'), "", "direction"),
        (LOWER, 'version = "corected"\n', "did you mean 'corrected'"),
        (LOWER, 'wher = "x"\n', "did you mean 'where'"),
        ('{ kind = "optimum", axis = "lr", between = [1, 2] }', "", "lie on no axis"),
        ('{ kind = "ratio", candidate = "a", reference = "b", between = [2, 1] }', "", "must be the smaller"),
        ('{ kind = "equal", candidate = "a", reference = "b", within = 0 }', "", "within"),
        ('{ kind = "arithmetic", expression = "__import__(1)", claimed = 1 }', "", "may hold numbers"),
        ('{ kind = "none", reason = "" }', "", "reason"),
        ('{ kind = "none", reason = "x" }', 'study = "toy"\n', "takes no study"),
    ],
)
def test_a_bad_row_is_one_line_that_names_it(folder: Path, statistic: str, extra: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        read_ledger(ledger_file(folder, statistic, extra=extra))
    assert says in str(error.value)
    assert "S0-01" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_study_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'toy'"):
        read_ledger(ledger_file(folder, LOWER, study="toyy"))


@pytest.mark.parametrize(
    ("text", "says"),
    [("schema = 2", "schema = 1"), ("x = ", "not valid TOML"), ("schema = 1\nclaim = 1", "did you mean 'claims'")],
)
def test_a_bad_ledger_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "l.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        read_ledger(tmp_path / "l.toml")
    with pytest.raises(InputError, match="no ledger"):
        read_ledger(tmp_path / "nothing.toml")


def test_two_claims_of_one_name_are_refused(folder: Path) -> None:
    path = ledger_file(folder, LOWER, LOWER)
    path.write_text(path.read_text().replace("S0-02", "S0-01"))
    with pytest.raises(InputError, match="two claims"):
        read_ledger(path)


def test_the_ledger_of_the_seeds_is_valid_and_complete() -> None:
    ledger = read_ledger(DOCS / "claims.toml")  # checks that studies, versions, cells and axes exist
    assert Counter(claim.seed for claim in ledger.claims) == {"000": 54, "001": 69, "002": 29, "003": 37, "004": 20}
    assert {claim.statistic.kind for claim in ledger.claims} == set(KINDS)
    for seed in ledger.seeds:
        numbers = [int(claim.id[3:]) for claim in ledger.claims if claim.seed == seed]
        assert numbers == list(range(1, len(numbers) + 1))


def test_every_known_contradiction_of_the_seeds_has_a_row() -> None:
    text = (DOCS / "claims.toml").read_text()
    assert [
        i for i in range(1, 12) if f"contradiction C{i}" not in text.replace("Contradiction", "contradiction")
    ] == []
