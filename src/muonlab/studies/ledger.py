"""The claims ledger: what the five seeds say, row by row, as data.

A row names a claim, the study and the statistic that would decide it. It holds no verdict: those are computed (claims).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from muonlab.errors import InputError, unknown
from muonlab.studies.format import Table, library, read_file
from muonlab.studies.study import Cell, read_study
from muonlab.studies.verdicts import evaluate
from muonlab.training.config import read_toml

Measure = Literal["loss", "best_loss", "perplexity", "accuracy", "seconds", "memory", "spikes", "plateaus"]
Patterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
"""Names or patterns of cells; `OTHER-STUDY/cell` takes them from another study."""
Interval = tuple[float, float]


class Pair(Table):
    """Two sides, paired by seed. A side of several cells is the one of them that the first seed's tune split chooses."""

    candidate: Patterns
    reference: Patterns
    measure: Measure = "loss"
    pick: Literal["best", "mean"] = "best"
    """Several cells on a side: the best one (chosen on the first seed, judged on the others) or their mean."""

    @property
    def sides(self) -> tuple[Patterns, ...]:
        return (self.candidate, self.reference)


class Difference(Pair):
    """candidate − reference lies on the claimed side of zero, by `minimum` or more."""

    kind: Literal["difference"]
    direction: Literal["lower", "higher"]
    minimum: float = Field(default=0.0, ge=0)


class Equal(Pair):
    """candidate − reference lies within ± `within`: two one-sided tests."""

    kind: Literal["equal"]
    within: float = Field(gt=0)


class Ratio(Pair):
    """candidate / reference (geometric mean over seeds) lies in a range."""

    kind: Literal["ratio"]
    between: Interval


class Order(Table):
    """Every cell of a tier beats every cell of the next; a cell belongs to the first tier that matches it."""

    kind: Literal["order"]
    tiers: tuple[Patterns, ...] = Field(min_length=2)
    measure: Measure = "loss"
    direction: Literal["lower", "higher"] = "lower"

    @property
    def sides(self) -> tuple[Patterns, ...]:
        return self.tiers


class Optimum(Table):
    """The best cell with the axis in a range beats the best cell outside it, and does not lie at the end of the axis."""

    kind: Literal["optimum"]
    cells: Patterns = ("*",)
    axis: str
    between: Interval

    @property
    def sides(self) -> tuple[Patterns, ...]:
        return (self.cells,)


class ToleranceRatio(Table):
    """Width (high / low) of the range whose loss is within `delta` nats of the best, candidate over reference."""

    kind: Literal["tolerance-ratio"]
    candidate: Patterns
    reference: Patterns
    axis: str
    delta: float = Field(default=0.05, gt=0)
    between: Interval

    @property
    def sides(self) -> tuple[Patterns, ...]:
        return (self.candidate, self.reference)


class Finished(Table):
    """No run of these cells diverged; with `learned`, each also ended below the entropy of single tokens."""

    kind: Literal["finished"]
    cells: Patterns = ("*",)
    learned: bool = False

    @property
    def sides(self) -> tuple[Patterns, ...]:
        return (self.cells,)


class Arithmetic(Table):
    """A number that follows, or does not follow, from other numbers of the source."""

    kind: Literal["arithmetic"]
    expression: str
    claimed: float
    tolerance: float = Field(default=0.02, ge=0)
    """Largest relative error that still counts as the claimed number."""


class NoRun(Table):
    """No run of this laboratory can decide it."""

    kind: Literal["none"]
    reason: str = Field(min_length=1)


KINDS: dict[str, type[Table]] = {
    "difference": Difference,
    "equal": Equal,
    "ratio": Ratio,
    "order": Order,
    "optimum": Optimum,
    "tolerance-ratio": ToleranceRatio,
    "finished": Finished,
    "arithmetic": Arithmetic,
    "none": NoRun,
}


class Claim(Table):
    """One row of the ledger."""

    id: str = Field(pattern=r"^S\d-\d\d$")
    claim: str = Field(min_length=1)
    """What is claimed, in short."""
    where: str = Field(min_length=1)
    """Where it stands in the seed."""
    study: str | None = None
    """Study that decides it; not set for arithmetic and none."""
    version: str | None = None
    """Version of the study; not set: the study's own default."""
    evidence: Literal["micro", "gpu"] | None = None
    """Size of the evidence that the claim is about: what micro runs say of a gpu claim is labelled as such."""
    known: str = ""
    """What reading the source and its code showed already."""
    statistic: Any

    @property
    def seed(self) -> str:
        return f"00{self.id[1]}"

    @property
    def needs_runs(self) -> bool:
        return self.statistic.kind not in ("arithmetic", "none")

    @model_validator(mode="after")
    def _runs_need_a_study(self) -> "Claim":
        given = [key for key in ("study", "evidence") if getattr(self, key) is not None]
        if self.needs_runs and len(given) < 2:
            raise InputError(f"{self.id}: a statistic of runs needs `study` and `evidence`")
        if not self.needs_runs and (given or self.version):
            raise InputError(f"{self.id}: {self.statistic.kind} takes no study, version or evidence")
        return self


KEYS = ("schema", "seeds", "studies", "claims")
Studies = dict[str, Path]
"""Name -> file of every study that a row may name."""


@dataclass(frozen=True)
class Ledger:
    path: Path
    studies: Studies
    seeds: dict[str, str]
    """Seed ("001") -> its title."""
    claims: tuple[Claim, ...]


def read_ledger(path: str | Path) -> Ledger:
    """The ledger in a TOML file, every row checked against the studies that it names; InputError in one line.

    `studies` in the file lists study files of its own, relative to it, beside those of the library.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no ledger at {path}; name one with --ledger")
    values = read_toml(path)
    for key in values:
        if key not in KEYS:
            raise InputError(f"{path}: {unknown('key', key, KEYS)}")
    seeds, rows = values.get("seeds", {}), values.get("claims", [])
    if values.get("schema") != 1 or not isinstance(seeds, dict) or not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: a ledger is `schema = 1`, a table `seeds` and one or more `[[claims]]`")
    claims = tuple(_claim(row, f"{path}: claim {i}") for i, row in enumerate(rows, 1))
    own = [path.parent / str(file) for file in values.get("studies", [])]
    studies = library() | {file.stem: file for file in own}
    ids = [claim.id for claim in claims]
    for claim in claims:
        if ids.count(claim.id) > 1:
            raise InputError(f"{path}: two claims are called {claim.id}")
        if claim.seed not in seeds:
            raise InputError(f"{path}: {claim.id}: {unknown('seed', claim.seed, seeds)}")
        _check(claim, studies, str(path))
    return Ledger(path, studies, {key: str(title) for key, title in seeds.items()}, claims)


# --- reading and checking rows -------------------------------------------------------------------------------------


def _claim(values: Any, where: str) -> Claim:
    if not isinstance(values, dict):
        raise InputError(f"{where} is not a table")
    where = f"{where} ({values['id']})" if isinstance(values.get("id"), str) else where
    statistic = values.get("statistic")
    if not isinstance(statistic, dict) or "kind" not in statistic:
        raise InputError(f"{where}: `statistic` must be a table with a `kind`: {', '.join(KINDS)}")
    if statistic["kind"] not in KINDS:
        raise InputError(f"{where}: {unknown('kind of statistic', str(statistic['kind']), KINDS)}")
    claim: Claim = _model(Claim, {**values, "statistic": _model(KINDS[statistic["kind"]], statistic, where)}, where)
    return claim


def _model(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = min(
            error.errors(), key=lambda found: found["type"] != "extra_forbidden"
        )  # a misspelt key explains a missing one
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise InputError(f"{where}: {cause}") from None
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: {unknown('key', key, _keys(kind))}") from None
        raise InputError(f"{where}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _keys(kind: type[BaseModel]) -> list[str]:
    return list(kind.model_fields)


def _check(claim: Claim, studies: Studies, where: str) -> None:
    """InputError unless the studies, version, cells and axis of a row exist and its numbers make sense."""
    s = claim.statistic
    try:
        if s.kind == "arithmetic":
            evaluate(s.expression)
        if hasattr(s, "between") and not s.between[0] < s.between[1]:
            raise InputError(f"between is [{s.between[0]:g}, {s.between[1]:g}]; the first must be the smaller")
        if not claim.needs_runs:
            return
        for study in studies_of(claim):
            version_of(claim, study, studies)
        cells = [cell for _, cell in cells_of(claim, studies)]
        if hasattr(s, "axis"):
            values = [cell.values[s.axis] for cell in cells if s.axis in cell.values]
            if len(values) < len(cells):
                axes = sorted({axis for cell in cells for axis in cell.values})
                raise unknown("axis of these cells", s.axis, axes) if axes else InputError("these cells lie on no axis")
            if s.kind == "optimum" and not 0 < sum(s.between[0] <= x <= s.between[1] for x in values) < len(values):
                raise InputError(f"the range of {s.axis} must hold some of its values and leave out others")
    except InputError as error:
        raise InputError(f"{where}: {claim.id}: {error}") from None


def studies_of(claim: Claim) -> list[str]:
    """The studies that a row reads."""
    patterns = [pattern for side in claim.statistic.sides for pattern in side]
    return list(dict.fromkeys(pattern.rpartition("/")[0] or str(claim.study) for pattern in patterns))


def cells_of(claim: Claim, studies: Studies) -> Iterator[tuple[str, Cell]]:
    """(study, cell) of every cell that a row names; InputError for a pattern that names none."""
    for side in claim.statistic.sides:
        for pattern in side:
            other, _, name = pattern.rpartition("/")
            study = other or str(claim.study)
            known = _read(study, studies)[2]
            found = [cell for cell in known if fnmatchcase(cell.name, name)]
            if not found:
                raise unknown(f"cell of {study}", name, [cell.name for cell in known])
            yield from ((study, cell) for cell in found)


def version_of(claim: Claim, study: str, studies: Studies) -> str | None:
    """The version of a study that a row is about."""
    default, versions, _ = _read(study, studies)
    if claim.version is None:
        return default
    if claim.version not in versions:
        raise unknown(f"version of {study}", claim.version, versions)
    return claim.version


def _read(study: str, studies: Studies) -> tuple[str | None, tuple[str, ...], tuple[Cell, ...]]:
    """Default version, versions and cells of a study; all versions and scales have the same cells."""
    if study not in studies:
        raise unknown("study", study, studies)
    return _read_file(studies[study])


@cache
def _read_file(path: Path) -> tuple[str | None, tuple[str, ...], tuple[Cell, ...]]:
    file = read_file(path)[1]
    return file.default, tuple(file.versions), read_study(path).cells
