"""Parameter groups out of routes and options: every option of every rule is a plain value of a group."""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn

from muonlab.errors import InputError, unknown
from muonlab.optim import rules
from muonlab.optim.options import MuonOptions, OptimizerOptions
from muonlab.optim.routing import Route, route, with_overrides
from muonlab.optim.views import View, shapes

_MUON = (
    "momentum",
    "nesterov",
    "heavy_ball",
    "momentum_dtype",
    "coefficients",
    "ns_steps",
    "method",
    "dtype",
    "norm_eps",
    "scale",
    "scaled_decay",
    "equilibrate_rows",
    "renormalize",
    "normuon_beta",
    "normuon_axis",
    "idle",
    "block_period",
    "block_lr",
    "max_workspace_bytes",
)
# A group names these only where they are on: a faster step refuses what it does not know.
_OFF = {
    "sign_momentum": False,
    "nuclear_scale": False,
    "cautious_update": False,
    "mars_gamma": None,
    "laprop_beta": None,
    "row_fraction": None,
    "fixed_norm": False,
    "stiefel": False,
}


def plan(
    params: nn.Module | Iterable[Any], options: OptimizerOptions, hidden_rule: str, rule: str, lr: Tensor | None = None
) -> list[dict[str, Any]]:
    """The groups for a module, or for parameters, (name, parameter) pairs or groups of them.

    A module is routed by `routing.route`. Of given parameters matrices and stacks of matrices go to `hidden_rule`, vectors to
    `rule`; four and more axes are a convolution. A given group may hold any field of the options, and `use_muon`.
    `lr` is a live tensor in place of `options.lr`.
    """
    if isinstance(params, nn.Module):
        return param_groups(route(params, options.overrides, options.strict), options, hidden_rule, rule, lr)
    entries = [params] if isinstance(params, (Tensor, dict)) else list(params)
    if not entries:
        raise InputError("the optimizer got an empty list of parameters")
    if not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    given = []
    routes: list[Route] = []
    for entry in entries:
        own, fields_of_group = _given(dict(entry), len(routes))
        given.append((len(own), fields_of_group))
        routes += own
    check(routes)
    if hidden_rule == "muon" and not options.overrides:
        _warn_of_tables(routes)
    routes = with_overrides(routes, options.overrides)
    groups: list[dict[str, Any]] = []
    for count, fields_of_group in given:
        own, routes = routes[:count], routes[count:]
        own_lr = fields_of_group.get("lr")
        live = fields_of_group.pop("lr") if isinstance(own_lr, Tensor) else lr if own_lr is None else None
        if own:  # a filter that found nothing is no mistake
            groups += param_groups(own, _with(options, fields_of_group), hidden_rule, rule, live)
    return groups


def param_groups(
    routes: list[Route], options: OptimizerOptions, hidden_rule: str, rule: str, lr: Tensor | None = None
) -> list[dict[str, Any]]:
    """One group for every different treatment, in the order in which they first occur."""
    check(routes)
    if lr is not None and getattr(options, "width_scaling", False):
        raise InputError("width_scaling multiplies learning rates: give lr as a number, not as a tensor")
    width = next((entry.param.shape[-1] for entry in routes if entry.kind == "embedding"), None)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in routes:
        used, reason = _rule_for(entry, options, hidden_rule, rule)
        muon = used == "muon"
        view: View = entry.view if muon else ()
        size = getattr(options, "block_size", None) if entry.block_size is None else entry.block_size
        key = (entry.kind, used, view, size, entry.lr, entry.weight_decay)
        if key not in groups:
            rate = options.lr_of(entry.kind) if entry.lr is None else entry.lr
            live = lr is not None and entry.lr is None and not options.sets_lr_of(entry.kind)
            scaling = (width / 768) ** -0.5 if width and not muon and getattr(options, "width_scaling", False) else 1.0
            groups[key] = {
                "params": [],
                "reasons": [],
                "kind": entry.kind,
                "rule": used,
                "lr": lr if live else rate * scaling,
                "weight_decay": options.weight_decay_of(entry.kind)
                if entry.weight_decay is None
                else entry.weight_decay,
                "cautious_decay": options.cautious_decay,
                "skip_nonfinite": options.skip_nonfinite,
                **({} if options.decay_form == "lr" else {"decay_form": options.decay_form}),
                **_rule_options(options, used),
            }
            if muon:
                groups[key].update(view=view, block_size=size or None, updates=0)
        groups[key]["params"].append((entry.name, entry.param))
        groups[key]["reasons"].append(reason)
    return list(groups.values())


def _rule_for(entry: Route, options: OptimizerOptions, hidden_rule: str, rule: str) -> tuple[str, str]:
    if entry.kind != "hidden":
        return rule, entry.reason
    smallest = min(min(shape[-2:]) for shape in _shapes(entry))
    if smallest < getattr(options, "min_dim", 1) and rule != hidden_rule:
        return rule, "small matrix"
    return hidden_rule, entry.reason


def _shapes(entry: Route) -> list[tuple[int, ...]]:
    try:
        return shapes(tuple(entry.param.shape), entry.view)
    except InputError as error:
        raise InputError(f"parameter {entry.name!r}: {error}") from None


def _rule_options(options: OptimizerOptions, rule: str) -> dict[str, Any]:
    if rule in rules.ELEMENTWISE:
        return rules.ELEMENTWISE[rule].hyper(vars(options))
    if rule != "muon":
        return {}
    on = {name: getattr(options, name) for name, off in _OFF.items() if getattr(options, name) != off}
    return {name: getattr(options, name) for name in _MUON} | on


def check(routes: list[Route]) -> None:
    """InputError for no parameters, complex ones, the same one twice, and things that are no parameters."""
    if not routes:
        raise InputError("the optimizer got no parameters that want a gradient")
    seen: dict[int, str] = {}
    for entry in routes:
        if not isinstance(entry.param, Tensor):
            raise InputError(f"{entry.name} is a {type(entry.param).__name__}, not a parameter")
        if entry.param.is_complex():
            raise InputError(f"parameter {entry.name!r} is complex; only real parameters are supported")
        if id(entry.param) in seen:
            raise InputError(f"parameter {entry.name!r} is given twice, first as {seen[id(entry.param)]!r}")
        seen[id(entry.param)] = entry.name


def _given(group: dict[str, Any], number: int) -> tuple[list[Route], dict[str, Any]]:
    """Routes of a group of parameters that a user made, and its options."""
    params = group.pop("params", None)
    if params is None:
        raise InputError("a parameter group needs the key 'params'")
    reason = "given, use_muon" if "use_muon" in group else "given"
    use_muon = group.pop("use_muon", True)
    routes = []
    for i, item in enumerate([params] if isinstance(params, Tensor) else params):
        name, param = item if isinstance(item, tuple) else (f"parameter {number + i}", item)
        matrix = use_muon and getattr(param, "ndim", 0) >= 2
        view: View = (("conv", 1),) if matrix and param.ndim > 3 else ()
        routes.append(Route(name=name, param=param, kind="hidden" if matrix else "vector", view=view, reason=reason))
    if not use_muon and "weight_decay" in group:
        group.setdefault("vector_weight_decay", group["weight_decay"])
    return routes, group


def _warn_of_tables(routes: list[Route]) -> None:
    """One warning if a matrix among bare parameters looks like an embedding or a head.

    Such a matrix has thousands of rows, at least two for each column, and unlike a layer's it neither has more than one like it
    nor a partner that takes its outputs in.
    """
    given = [entry for entry in routes if entry.kind == "hidden" and entry.reason == "given" and entry.param.ndim == 2]
    inputs = {entry.param.shape[1] for entry in given}
    outputs = Counter(entry.param.shape[0] for entry in given)
    for entry in given:
        rows, cols = entry.param.shape
        if rows >= 8192 and rows >= 2 * cols and outputs[rows] <= 2 and rows not in inputs:
            warnings.warn(
                f"{entry.name} [{rows}, {cols}] looks like an embedding or a head, which Muon is not meant for: give the model "
                "itself, Muon(model, ...), or put it in a group with use_muon=False",
                stacklevel=5,
            )
            return


def _with(options: OptimizerOptions, given: dict[str, Any]) -> OptimizerOptions:
    given = torch_arguments(given) if isinstance(options, MuonOptions) else given
    known = [field.name for field in fields(options)]
    for name in given:
        if name not in known:
            raise unknown("key of a parameter group", name, [*known, "params", "use_muon"])
    return replace(options, **given)


def torch_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the words of torch.optim.Muon as fields of `MuonOptions`."""
    given = dict(given)
    coefficients = given.pop("ns_coefficients", None)
    if coefficients is not None:
        if len(coefficients) != 3:
            raise InputError(f"ns_coefficients must be three numbers (a, b, c), got {tuple(coefficients)}")
        steps = given.pop("ns_steps", None) or 5
        given.update(coefficients=(tuple(coefficients),) * steps, ns_steps=None)
    if "adjust_lr_fn" in given:
        names = {None: "keller", "original": "keller", "match_rms_adamw": "moonlight"}
        adjust = given.pop("adjust_lr_fn")
        if adjust not in names:
            raise unknown("adjust_lr_fn", str(adjust), [name for name in names if name])
        given["scale"] = names[adjust]
    return given
