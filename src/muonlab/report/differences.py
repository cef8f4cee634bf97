"""What differs between the configurations of runs: the first question about any two curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.training.config import flat

MISSING = None


def differing(configs: Sequence[Mapping[str, Any]], ignore: Sequence[str] = ("name", "seed")) -> dict[str, list[Any]]:
    """{key: value in each configuration} for the keys that are not the same in all; None where a key is absent."""
    tables = [flat(config) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, MISSING) for table in tables] for key in keys if key not in ignore}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def routing_rules(routing: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The routing table with parameters of one shape and treatment in one row: names, count, how they are updated."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in routing:
        treatment = {key: value for key, value in row.items() if key != "name"}
        key = tuple(str(value) for value in treatment.values())
        group = groups.setdefault(key, {"names": [], **treatment})
        group["names"].append(row["name"])
    return list(groups.values())
