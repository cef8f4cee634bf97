"""Parameter groups out of routes and options: every option of every rule is a plain value of a group."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from muonlab.errors import InputError
from muonlab.optim import rules
from muonlab.optim.options import MuonOptions, OptimizerOptions
from muonlab.optim.routing import Route, route
from muonlab.optim.views import View, shapes


def param_groups(routes: list[Route], options: OptimizerOptions, hidden_rule: str, rule: str) -> list[dict[str, Any]]:
    """Parameter groups: one for every different treatment, in the order in which they first occur."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    if not routes:
        raise InputError("the optimizer got no parameters that want a gradient")
    min_dim = getattr(options, "min_dim", 1)
    for entry in routes:
        if entry.param.is_complex():
            raise InputError(f"parameter {entry.name!r} is complex; only real parameters are supported")
        matrix = (
            entry.kind == "hidden"
            and min(min(shape[-2:]) for shape in shapes(tuple(entry.param.shape), entry.view)) >= min_dim
        )
        kind = entry.kind
        used = hidden_rule if matrix else rule
        view = entry.view if used == "muon" else ()
        key = (kind, used, view)
        if key not in groups:
            groups[key] = {
                "params": [],
                "param_names": [],
                "reasons": [],
                "kind": kind,
                "rule": used,
                "lr": options.lr_of(kind),
                "weight_decay": options.weight_decay_of(kind),
                **_rule_options(options, used, view),
            }
        groups[key]["params"].append(entry.param)
        groups[key]["param_names"].append(entry.name)
        groups[key]["reasons"].append(
            entry.reason if matrix or entry.kind != "hidden" or hidden_rule == rule else "small matrix"
        )
    # torch wants the names beside the parameters, as pairs.
    for group in groups.values():
        group["params"] = list(zip(group.pop("param_names"), group["params"]))
    return list(groups.values())


def _rule_options(options: OptimizerOptions, rule: str, view: View) -> dict[str, Any]:
    if rule in rules.ELEMENTWISE:
        return rules.ELEMENTWISE[rule].hyper(vars(options))
    if rule != "muon":
        return {}
    assert isinstance(options, MuonOptions)
    names = (
        "momentum",
        "nesterov",
        "coefficients",
        "ns_steps",
        "method",
        "dtype",
        "scale",
        "block_size",
        "max_workspace_bytes",
    )
    return {"view": view, **{name: getattr(options, name) for name in names}}


def routes_of(params: nn.Module | Iterable[Any]) -> list[Route]:
    if isinstance(params, nn.Module):
        return route(params)
    entries = list(params)
    if entries and isinstance(entries[0], dict):
        raise InputError("parameter groups are not supported yet: give a module or a list of parameters")
    routes = []
    for i, item in enumerate(entries):
        name, param = item if isinstance(item, tuple) else (f"parameter {i}", item)
        matrix = param.ndim >= 2
        view: View = (("conv", 1),) if param.ndim > 3 else ()
        routes.append(Route(name=name, param=param, kind="hidden" if matrix else "vector", view=view, reason="given"))
    return routes
