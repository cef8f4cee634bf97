"""What the axes of a study do to its cells, as plain values: sweeps, effects, grids; and how fast cells reach a target."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muonlab.report import series, style
from muonlab.report.reading import Material, runs_of
from muonlab.report.study_content import axes_of, cell_rows
from muonlab.studies.curves import PerformanceProfile, performance_profile, to_target


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One line of loss against one logarithmic axis: a group at one setting of the other axes."""

    group: str
    case: str
    """Set where several cases of the group have this axis."""
    axis: str
    rest: dict[str, Any]
    points: list[dict[str, Any]]
    """Rows of cell_rows with their place on the axis as `x`, by rising x."""
    found: dict[str, Any] | None
    """The summary's good range and optimum, None where nothing finished."""

    @property
    def label(self) -> str:
        return " ".join([self.case or self.group, *(f"{key}={style.label(value)}" for key, value in self.rest.items())])


def sweeps(summary: Mapping[str, Any]) -> list[Sweep]:
    """The lines of every logarithmic axis, best line first."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for entry in summary.get("sensitivity") or ():
        found.setdefault((entry["group"], entry["axis"], _key(entry["rest"])), []).append(entry)
    result = []
    for axis in (axis["name"] for axis in axes_of(summary) if axis.get("log")):
        lines: dict[tuple[str, Any], dict[str, list[dict[str, Any]]]] = {}
        for row in cell_rows(summary):
            x = series.number(row["values"].get(axis))
            if x > 0:
                rest = _key({key: value for key, value in row["values"].items() if key != axis})
                lines.setdefault((row["group"], rest), {}).setdefault(row["case"], []).append({**row, "x": x})
        for (group, rest), cases in lines.items():
            entries = found.get((group, axis, rest), [])
            for case, points in cases.items():
                if len(points) > 1:
                    mine = [entry for entry in entries if entry.get("case", case) == case]
                    result.append(
                        Sweep(
                            group=group,
                            case=case if len(cases) > 1 else "",
                            axis=axis,
                            rest=dict(rest),
                            points=sorted(points, key=lambda point: point["x"]),
                            found=mine[0] if len(mine) == 1 and (len(cases) == 1 or "case" in mine[0]) else None,
                        )
                    )
    return sorted(
        result, key=lambda line: min((p["loss"] for p in line.points if math.isfinite(p["loss"])), default=math.inf)
    )


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one axis that is no learning rate does to quality, memory and time: for each group the best cell at each value."""

    axis: str
    values: list[Any]
    groups: dict[str, dict[int, dict[str, Any]]]
    """Group -> index of a value -> row of cell_rows."""


def effects(summary: Mapping[str, Any]) -> list[Effect]:
    """One Effect per axis that is not logarithmic and was varied; over the other axes the best cell counts."""
    result = []
    rows = [row for row in cell_rows(summary) if math.isfinite(row["loss"])]
    for axis in axes_of(summary):
        if axis.get("log"):
            continue
        groups: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:  # best first
            value = row["values"].get(axis["name"])
            if axis["name"] in row["values"] and value in axis["values"]:
                groups.setdefault(row["group"], {}).setdefault(axis["values"].index(value), row)
        groups = {name: points for name, points in groups.items() if len(points) > 1}
        if groups:
            result.append(Effect(axis=axis["name"], values=list(axis["values"]), groups=groups))
    return result


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Mean loss over two axes, a table for each group and each value of a third; infinity where no seed finished."""

    x: str
    y: str
    tables: dict[str, dict[tuple[Any, Any], float]]
    """Title of the panel -> (value of x, value of y) -> loss; of several cells the best counts."""


def grid(summary: Mapping[str, Any]) -> Grid | None:
    """The study as heat maps: x is its first logarithmic axis; None with fewer than two axes of two values."""
    axes = [axis for axis in axes_of(summary) if len(axis["values"]) > 1 and len(axis["fields"]) < 3]
    axes.sort(key=lambda axis: not axis.get("log"))  # stable: learning rates first
    if len(axes) < 2:
        return None
    x, y, *more = (axis["name"] for axis in axes)
    tables: dict[str, dict[tuple[Any, Any], float]] = {}
    rows = [row for row in cell_rows(summary) if x in row["values"] and y in row["values"]]
    rows.sort(key=lambda row: [axis["values"].index(row["values"][axis["name"]]) for axis in axes[2:3] if axis["name"] in row["values"]])  # fmt: skip
    groups = {row["group"] for row in rows}
    for row in rows:
        title = [row["group"]] if len(groups) > 1 else []
        title += [f"{name} {style.label(row['values'][name])}" for name in more[:1] if name in row["values"]]
        table = tables.setdefault(" · ".join(title), {})
        place = (row["values"][x], row["values"][y])
        table[place] = min(table.get(place, math.inf), row["loss"] if math.isfinite(row["loss"]) else math.inf)
    return Grid(x=x, y=y, tables=tables) if tables else None


def heat(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The grid as rows of cells with a shade: 0.85 for the best, 0 for what lies a nat (or the worst) above it."""
    found = grid(summary)
    if found is None:
        return None
    xs = series.ordered(place[0] for table in found.tables.values() for place in table)
    ys = series.ordered(place[1] for table in found.tables.values() for place in table)
    finite = [loss for table in found.tables.values() for loss in table.values() if math.isfinite(loss)]
    best = min(finite, default=0.0)
    top = min(1.0, max(finite, default=1.0) - best) or 1.0

    def cell(loss: float | None) -> dict[str, Any]:
        if loss is None or not math.isfinite(loss):
            return {"text": "" if loss is None else "×", "shade": None}
        return {"text": f"{loss:.3f}", "shade": round(0.85 * max(0.0, 1 - (loss - best) / top), 2)}

    panels = [
        {"title": title, "rows": [(y, [cell(table.get((x, y))) for x in xs]) for y in ys]}
        for title, table in found.tables.items()
    ]
    return {"x": found.x, "y": found.y, "xs": xs, "panels": panels}


def profile(material: Material) -> PerformanceProfile | None:
    """Training seconds to a target as a performance profile over cells; a workload is a target with a seed.

    Targets are the study's own, else what the median cell reached at its end. Workloads that nobody solved, or that are
    solved before the first update, are left out; None without two cells and a workload.
    """
    summary = material.summary
    means = [x for cell in summary["cells"] if math.isfinite(x := series.number(cell.get("mean")))]
    targets = [float(target) for target in summary.get("targets") or ()] or (
        [statistics.median(means)] if means else []
    )
    times: dict[str, list[float]] = {}
    for cell in summary["cells"]:
        by_seed = {run["seed"]: run for run in runs_of(material, cell)}
        times[cell["cell"]] = [
            to_target(series.evaluations(by_seed[seed], "report"), target).seconds if seed in by_seed else math.inf
            for target in targets
            for seed in summary["seeds"]
        ]
    columns = [column for column in zip(*times.values()) if math.isfinite(min(column)) and min(column) > 0]
    names = list(times)
    if len(names) < 2 or not columns:
        return None
    return performance_profile({name: list(row) for name, row in zip(names, zip(*columns))})


def _key(rest: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, series.hashable(value)) for key, value in rest.items()))
