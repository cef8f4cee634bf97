"""A study: named configurations times seeds, made from a study file for one version and one scale."""

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonlab.errors import InputError, unknown
from muonlab.studies.format import AxisTable, Case, Layer, StudyFile, lay, read_file
from muonlab.training.config import RunConfig, as_tables, flat, from_dict, merge, optimizer_name, replace

FULL = "full"
"""The scale of the file's own base."""


@dataclass(frozen=True)
class Axis:
    """One knob, or several that move together, and the values that it takes."""

    name: str
    fields: tuple[str, ...]
    values: tuple[Any, ...]
    """What names a cell along this axis: the value, the first of several, or the number of a quasi-random point."""
    log: bool
    """Whether ratios of its values matter, not differences: learning rates."""


@dataclass(frozen=True)
class Cell:
    """One configuration of a study; with a seed it is a run."""

    name: str
    group: str
    case: str
    values: Mapping[str, Any]
    """Its place on the axes."""
    config: RunConfig[Any]
    """Its run with the study's first seed."""
    published: Mapping[str, float] | None


@dataclass(frozen=True)
class Study:
    """What runs: one version of a study file at one scale."""

    name: str
    title: str
    question: str
    source: str
    notes: tuple[str, ...]
    version: str | None
    note: str | None
    published_applies: bool
    """Whether the published numbers belong to this version at this scale."""
    scale: str
    seeds: tuple[int, ...]
    reference: str | None
    targets: tuple[float, ...]
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    base: RunConfig[Any]
    """What the cells have in common before their own values are laid on it."""

    @property
    def runs(self) -> int:
        return len(self.cells) * len(self.seeds)

    def with_threads(self, threads: int) -> "Study":
        """The same study with so many CPU threads for each run."""
        cells = [dataclasses.replace(c, config=replace(c.config, training={"threads": threads})) for c in self.cells]
        base = replace(self.base, training={"threads": threads})
        return dataclasses.replace(self, cells=tuple(cells), base=base)

    @property
    def folder(self) -> str:
        """Name of the study's folder unless another is given."""
        parts = [self.name, self.version, None if self.scale == FULL else self.scale]
        return "study-" + "-".join(part for part in parts if part)

    @property
    def identity(self) -> str:
        values = [self.name, self.version, self.scale, self.seeds, [cell.config.to_dict() for cell in self.cells]]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def read_study(
    source: str | Path,
    *,
    version: str | None = None,
    scale: str = FULL,
    seeds: int | None = None,
    only: Sequence[str] = (),
    quick: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Study:
    """The study of the library called `source`, or that in the file `source`, ready to run.

    `version` and `scale` name a reading and a size of it; `seeds` replaces the number of seeds; `only` are names or
    patterns of cells or cases and `quick` the file's own selection; `overrides` are nested values laid on every cell.
    Raises InputError with one line that says what in which file is wrong.
    """
    name, file = read_file(source)
    chosen = version or file.default
    if chosen is not None and chosen not in file.versions:
        raise InputError(f"{name}: {unknown('version', chosen, file.versions)}")
    if scale != FULL and scale not in file.scales:
        raise InputError(f"{name}: {unknown('scale', scale, [FULL, *file.scales])}")
    reading = file.versions[chosen] if chosen is not None else None
    layers: list[Layer] = [layer for layer in (reading, file.scales.get(scale)) if layer is not None]
    own_seeds = file.scales[scale].seeds if scale in file.scales else None
    numbers = _seeds(file.seeds if own_seeds is None else own_seeds, seeds, name)
    base = as_tables(file.base)
    for layer in layers:
        base = lay(base, layer.base)
    changes = as_tables(overrides or {})
    cells = [cell for case in file.cases or (Case(),) for cell in _cells(case, file, base, layers, changes, name)]
    names = [cell.name for cell in cells]
    if twice := next((cell for cell in names if names.count(cell) > 1), None):
        raise InputError(f"{name}: two cells are called {twice!r}; give the cases names, or the axis other values")
    cells = _with_published(cells, file, name)
    reference = file.reference
    if reference is not None and reference not in names:
        raise InputError(f"{name}: {unknown('reference cell', reference, names)}")
    patterns = list(only)
    if quick:
        patterns += file.quick or [names[0], *([reference] if reference else [])]
    cells = _select(cells, patterns, name)
    if not cells:
        raise InputError(f"{name}: the study has no cell to run")
    first = {"seed": numbers[0]}
    seeded = [dataclasses.replace(cell, config=cell.config.model_copy(update=first)) for cell in cells]
    return Study(
        name=name,
        title=file.title,
        question=file.question,
        source=file.source,
        notes=file.notes,
        version=chosen,
        note=reading.note if reading else None,
        published_applies=scale == FULL and (reading is None or reading.published),
        scale=scale,
        seeds=numbers,
        reference=reference if any(cell.name == reference for cell in cells) else None,
        targets=file.targets,
        axes=tuple(_axis(axis, seeded) for axis in file.axes),
        cells=tuple(seeded),
        base=from_dict(lay(base, changes), f"{name}: base"),
    )


def slug(cell: str) -> str:
    """A cell's name as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", cell).strip("-.")[:80] or "cell"


def _seeds(own: tuple[int, ...] | int, wanted: int | None, name: str) -> tuple[int, ...]:
    seeds = list(range(1, own + 1)) if isinstance(own, int) else list(own)
    if wanted is not None:
        seeds += range(max(seeds, default=0) + 1, max(seeds, default=0) + 1 + max(0, wanted - len(seeds)))
        seeds = seeds[: max(0, wanted)]
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"{name}: the seeds are {seeds}; one or more different numbers from 0 on are needed")
    return tuple(seeds)


def _axis(table: AxisTable, cells: Sequence[Cell]) -> Axis:
    if table.observed:
        found = {cell.values[table.name] for cell in cells if table.name in cell.values}
        return Axis(table.name, table.paths, tuple(sorted(found)), False)
    log = table.log_range is not None or any(path.endswith("lr") for path in table.paths[:1])
    return Axis(table.name, table.paths, _labels(table), log)


def _labels(table: AxisTable) -> tuple[Any, ...]:
    if table.sobol:
        return tuple(range(1, table.sobol + 1))
    return tuple(point[0] for point in table.points)


def _cells(
    case: Case, file: StudyFile, base: dict[str, Any], layers: list[Layer], changes: dict[str, Any], name: str
) -> list[Cell]:
    values = lay(base, case.tables)
    for layer in layers:
        for pattern, table in layer.cases.items():
            if fnmatch.fnmatchcase(case.name, pattern):
                values = lay(values, table)
            elif not any(fnmatch.fnmatchcase(other.name, pattern) for other in file.cases or (Case(),)):
                raise InputError(f"{name}: {unknown('case', pattern, [other.name for other in file.cases])}")
    values = lay(values, changes)
    applying = [axis for axis in file.axes if fnmatch.fnmatchcase(case.name, axis.only)]
    axes = [axis for axis in applying if not axis.observed]
    made = []
    for choice in itertools.product(*(list(zip(_labels(axis), axis.points, strict=True)) for axis in axes)):
        cell, place = values, {}
        for axis, (label, point) in zip(axes, choice, strict=True):
            place[axis.name] = label
            for path, value in zip(axis.paths, point, strict=True):
                cell = merge(cell, _nested(path, value, f"{name}: axis {axis.name!r}"))
        title = " ".join([case.name, *(f"{key}={_text(label)}" for key, label in place.items())]).strip()
        if not title:
            raise InputError(f"{name}: a case needs a name, or an axis that makes its cells")
        config = from_dict({**cell, "name": slug(title)}, f"{name}: cell {title!r}")
        group = case.group or optimizer_name(config.optimizer)
        own = flat(config.to_dict())
        for axis in (axis for axis in applying if axis.observed):
            if own.get(axis.paths[0]) is not None:
                place[axis.name] = own[axis.paths[0]]
        published = case.published.to_dict() if case.published and not axes else None
        made.append(Cell(title, group, case.name, place, config, published))
    return made


def _text(label: Any) -> str:
    return f"{label:g}" if isinstance(label, int | float) and not isinstance(label, bool) else str(label)


def _nested(path: str, value: Any, where: str) -> dict[str, Any]:
    keys = path.split(".")
    if len(keys) < 2 or not all(keys):
        raise InputError(f"{where}: {path!r} is not the path of a field, as in optimizer.lr")
    nested: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        nested = {key: nested}
    return nested


def _with_published(cells: list[Cell], file: StudyFile, name: str) -> list[Cell]:
    stated = {entry.cell: entry.to_dict() for entry in file.published}
    names = [cell.name for cell in cells]
    for cell in stated:
        if cell not in names:
            raise InputError(f"{name}: published numbers of an {unknown('cell', cell, names)}")
    return [dataclasses.replace(cell, published=stated.get(cell.name) or cell.published) for cell in cells]


def _select(cells: list[Cell], patterns: Sequence[str], name: str) -> list[Cell]:
    if not patterns:
        return cells
    known = [cell.name for cell in cells]
    known += [cell.case for cell in cells if cell.case and cell.case not in known]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [c.name for c in cells if fnmatch.fnmatchcase(c.name, pattern) or fnmatch.fnmatchcase(c.case, pattern)]
        if not found:
            raise InputError(f"{name}: {unknown('cell', pattern, known)}")
        chosen.update(found)
    return [cell for cell in cells if cell.name in chosen]
