"""The format of a study file: what each table and key is, checked as it is read."""

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from muonlab.errors import InputError, unknown
from muonlab.training.config import as_tables, merge, read_toml

TABLES = ("model", "data", "optimizer", "schedule", "loss", "training")
"""Tables of a run's configuration that a study may set."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(Table):
    """Numbers that the source states for a cell."""

    loss: float | None = None
    """Held-out cross-entropy in nats per token, at the end of training."""
    best_loss: float | None = None
    """The lowest held-out cross-entropy of the run."""
    accuracy: float | None = None
    """Next-token accuracy, 0 to 1."""
    perplexity: float | None = None
    minutes: float | None = None
    """Wall-clock time on the source's machine."""
    memory_gb: float | None = None

    def to_dict(self) -> dict[str, float]:
        return self.model_dump(exclude_none=True, include=set(Published.model_fields))


class PublishedCell(Published):
    """Numbers of a cell that axes made, by the cell's name."""

    cell: str


class Case(BaseModel):
    """One named configuration: its own tables are laid on the base."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = ""
    """The source's own name of the experiment."""
    group: str | None = None
    """Cases of one group are one optimizer in figures; not set: the optimizer's name."""
    published: Published | None = None

    @property
    def tables(self) -> dict[str, Any]:
        """The values laid on the base."""
        return dict(self.model_extra or {})


class AxisTable(Table):
    """Every case is multiplied by every axis that applies to it; several axes make a grid."""

    name: str
    field: str | None = None
    """Dotted path of the value that this axis sets, such as optimizer.lr."""
    fields: tuple[str, ...] = ()
    """Several such paths that move together (zip): each value is then a list with one entry per path."""
    values: tuple[Any, ...] = ()
    """The values, in order."""
    log_range: tuple[float, float, int] | None = None
    """From, to and count of values with a constant ratio, both ends included."""
    sobol: int = Field(default=0, ge=0)
    """Number of quasi-random points over `ranges`."""
    ranges: dict[str, tuple[Any, ...]] = {}
    """sobol: path -> [from, to], spaced logarithmically unless a third entry says "linear"."""
    observed: bool = False
    """Makes no cells: the cases' own values of `field` are their places on this axis, for figures along it."""
    only: str = "*"
    """Pattern of the names of cases that the axis applies to."""

    @model_validator(mode="after")
    def _one_way(self) -> "AxisTable":
        ways = [bool(self.values), self.log_range is not None, bool(self.sobol), self.observed]
        if sum(ways) != 1:
            raise InputError(f"axis {self.name!r} needs exactly one of values, log_range, sobol, observed")
        if self.sobol:
            if self.field or self.fields or not self.ranges:
                raise InputError(f"axis {self.name!r}: sobol takes `ranges` in place of field and fields")
        elif bool(self.field) == bool(self.fields) or (self.observed and not self.field):
            raise InputError(f"axis {self.name!r} needs either `field` or `fields`")
        if self.log_range is not None and not (0 < self.log_range[0] < self.log_range[1] and self.log_range[2] >= 2):
            raise InputError(f"axis {self.name!r}: log_range is [from, to, count] with 0 < from < to and count >= 2")
        for path, bounds in self.ranges.items():
            linear = len(bounds) == 3 and bounds[2] == "linear"
            numbers = [bound for bound in bounds[:2] if isinstance(bound, int | float)]
            if len(numbers) != 2 or not numbers[0] < numbers[1] or (len(bounds) != 2 and not linear):
                raise InputError(f"axis {self.name!r}: the range of {path} is [from, to] or [from, to, 'linear']")
            if not linear and numbers[0] <= 0:
                raise InputError(f"axis {self.name!r}: the logarithmic range of {path} must begin above 0")
        for value in self.values:
            if self.fields and not (isinstance(value, list | tuple) and len(value) == len(self.fields)):
                raise InputError(f"axis {self.name!r}: each value must be a list of {len(self.fields)}, as fields are")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.field,) if self.field else self.fields or tuple(self.ranges)

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """The settings of this axis, each one value per path."""
        if self.log_range is not None:
            low, high, count = self.log_range
            ratio = (high / low) ** (1 / (count - 1))
            return [(float(f"{low * ratio**index:.6g}"),) * len(self.paths) for index in range(count)]
        if self.sobol:
            return _sobol_points(self.sobol, list(self.ranges.values()))
        return [tuple(value) if self.fields else (value,) for value in self.values]


class Layer(Table):
    """Values laid on the base and on single cases."""

    base: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {}
    """Pattern of case names -> values."""


class Version(Layer):
    """One reading of the source: as-published (with what its code really did), corrected, ..."""

    note: str
    """What this version does and why, for the report."""
    published: bool = True
    """Whether the published numbers belong to this version."""


class Scale(Layer):
    """The same study in another size."""

    seeds: tuple[int, ...] | int | None = None
    """Its own seeds."""


class StudyFile(Table):
    """A study: a base run, named cases, axes and seeds."""

    schema_: int = Field(alias="schema", default=1, ge=1, le=1)
    """Version of this format."""
    title: str
    question: str
    """What the study asks, in plain words."""
    source: str = ""
    """Where the experiment comes from."""
    notes: tuple[str, ...] = ()
    """What differs from the source, and why."""
    seeds: tuple[int, ...] | int = 3
    """Seeds of every cell: a list, or a number n for 1 to n."""
    reference: str | None = None
    """Cell that all others are judged against."""
    default: str | None = None
    """Version that runs unless another is asked for."""
    quick: tuple[str, ...] = ()
    """Patterns of the cells of --quick; not set: the first cell and the reference."""
    targets: tuple[float, ...] = ()
    """Losses (nats per token, report split) for updates, tokens and seconds to target."""
    base: dict[str, Any]
    """Nested values of a run's configuration."""
    cases: tuple[Case, ...] = ()
    axes: tuple[AxisTable, ...] = ()
    published: tuple[PublishedCell, ...] = ()
    versions: dict[str, Version] = {}
    scales: dict[str, Scale] = {}


def library() -> dict[str, Path]:
    """The packaged studies: name -> file."""
    folder = Path(str(resources.files("muonlab.studies") / "library"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_file(name: str | Path) -> tuple[str, StudyFile]:
    """The study of the library called `name`, or the one in a file: its name and its content. InputError in one line."""
    path = Path(name)
    if path.suffix != ".toml":
        packaged = library()
        if str(name) not in packaged:
            raise unknown("study", str(name), packaged)
        path = packaged[str(name)]
    values = read_toml(path)
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise _one_line(error, str(name)) from None
    for table, where in _layers(file):
        for key in table:
            if key not in (*TABLES, "seed"):
                raise InputError(f"{name}: {where}: {unknown('table', key, TABLES)}")
    if file.default is not None and file.default not in file.versions:
        raise InputError(f"{name}: {unknown('version', file.default, file.versions)}")
    return path.stem, file


def json_schema() -> str:
    """The JSON schema of study files, for editors."""
    return json.dumps(StudyFile.model_json_schema(), indent=1) + "\n"


def lay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` with the nested values of `over` laid on top; a table that is given another name begins anew.

    So the options of AdamW do not linger under a case that asks for Muon, nor those of one corpus or model under another.
    """
    merged = dict(under)
    for key, value in as_tables(over).items():
        old = merged.get(key)
        name = {"model": "preset", "optimizer": "name", "data": "corpus"}.get(key)
        anew = name is not None and isinstance(value, dict) and name in value and name in (old or {})
        if isinstance(value, dict) and isinstance(old, dict) and not (anew and value[name] != old[name]):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _layers(file: StudyFile) -> list[tuple[dict[str, Any], str]]:
    """Every table of configuration values in the file, with where it stands."""
    found: list[tuple[dict[str, Any], str]] = [(file.base, "base")]
    found += [(case.tables, f"case {case.name!r}") for case in file.cases]
    layers: list[tuple[str, Layer]] = [(f"versions.{name}", layer) for name, layer in file.versions.items()]
    layers += [(f"scales.{name}", layer) for name, layer in file.scales.items()]
    for where, layer in layers:
        found.append((layer.base, f"{where}.base"))
        found += [(values, f"{where}.cases.{name}") for name, values in layer.cases.items()]
    return found


def _sobol_points(count: int, bounds: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    from scipy.stats import qmc  # slow to import, and most studies have no such axis

    unit = qmc.Sobol(len(bounds), scramble=False).random_base2(math.ceil(math.log2(count + 1)))[1 : count + 1]
    points = []
    for row in unit.tolist():
        point = []
        for u, (low, high, *linear) in zip(row, bounds, strict=True):
            value = low + u * (high - low) if linear else low * (high / low) ** u
            point.append(float(f"{value:.4g}"))
        points.append(tuple(point))
    return points


def _one_line(error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return InputError(f"{where}: {cause}")
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        choices = [".".join([*path[:-1], key]) for key in _keys_at(first["loc"][:-1])]
        return InputError(f"{where}: {unknown('key', '.'.join(path), choices)}")
    return InputError(f"{where}: {'.'.join(path) or 'the file'}: {first['msg'][0].lower()}{first['msg'][1:]}")


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `location` may have."""
    kinds: dict[str, type[BaseModel]] = {
        "axes": AxisTable,
        "versions": Version,
        "scales": Scale,
        "published": PublishedCell,
    }
    kind = kinds.get(str(location[0]), Published) if location else StudyFile
    if len(location) > 1 and location[-1] == "published":
        kind = Published
    return ["schema" if key == "schema_" else key for key in kind.model_fields]
