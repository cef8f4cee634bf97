"""State of other implementations of Muon, taken over into this one in the middle of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import InputError, unknown
from muonlab.optim import rules
from muonlab.optim.optimizer import HybridOptimizer

# What each source calls the state that we call momentum_buffer, exp_avg, exp_avg_sq; whether its momentum adds up gradients.
_NAMES: dict[str, dict[str, str]] = {
    "torch": {"momentum_buffer": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "keller": {"momentum_buffer": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "moonlight": {"momentum_buffer": "momentum_buffer", "moment1": "exp_avg", "moment2": "exp_avg_sq"},
    "nanochat": {"momentum_buffer": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "dion": {"momentum": "momentum_buffer", "variance": "exp_avg_sq"},
}
_HEAVY_BALL = ("moonlight", "dion")


def import_state(
    optimizer: HybridOptimizer,
    state_dict: Mapping[str, Any],
    source: str,
    params: Sequence[Tensor] | Sequence[str] | None = None,
) -> None:
    """Takes momentum and moments out of the `state_dict()` of another optimizer; learning rates stay those of `optimizer`.

    Averaged and added-up momentum are converted into each other by the factor 1 - momentum. Parameters that the other
    optimizer did not have keep their state, so a pair such as torch.optim.Muon and torch.optim.AdamW takes two calls.

    Args:
        optimizer: a muonlab optimizer.
        state_dict: of torch.optim.Muon, AdamW or SGD ("torch"), KellerJordan/Muon ("keller"), Moonlight's example
            ("moonlight"), nanochat's MuonAdamW ("nanochat"), or microsoft/dion's Muon ("dion").
        source: one of those names.
        params: the parameters, or their names here, in the order in which the other optimizer got them; may be left out if
            the state dict holds `param_names` that are those of `optimizer`.

    Raises:
        InputError: an unknown source, an order that does not fit, a shape that differs, before anything is changed.
    """
    if source not in _NAMES:
        raise unknown("source of optimizer state", source, _NAMES)
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    targets = _targets(optimizer, groups, params)
    if len(targets) != len(indices):
        raise InputError(f"the state is of {len(indices)} parameters, but {len(targets)} were named")
    own = {
        id(param): (group, _name(group, i))
        for group in optimizer.param_groups
        for i, param in enumerate(group["params"])
    }
    entries = dict(state_dict["state"])
    planned: list[tuple[Tensor, dict[str, Tensor]]] = []
    position = 0
    for theirs in groups:
        members = targets[position : position + len(theirs["params"])]
        position += len(members)
        states = [dict(entries.get(index, {})) for index in theirs["params"]]
        if source == "nanochat":
            states = _unstacked(states)
        for param, state in zip(members, states):
            if id(param) not in own:
                raise InputError("a parameter that the state is for does not belong to this optimizer")
            group, name = own[id(param)]
            planned.append((param, _translated(state, source, theirs, group, param, name)))
    for param, values in planned:
        optimizer.state[param].update(values)


def _targets(
    optimizer: HybridOptimizer, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor] | Sequence[str] | None
) -> list[Tensor]:
    named = {
        name: param
        for group in optimizer.param_groups
        for name, param in zip(group.get("param_names", ()), group["params"])
    }
    if params is None:
        if not all("param_names" in group for group in groups):
            raise InputError(
                "the state does not name its parameters; give `params` in the order the other optimizer got them"
            )
        params = [name for group in groups for name in group["param_names"]]
    targets = []
    for param in params:
        if isinstance(param, str) and param not in named:
            raise unknown("parameter", param, named)
        targets.append(named[param] if isinstance(param, str) else param)
    return targets


def _translated(
    state: dict[str, Any], source: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], param: Tensor, name: str
) -> dict[str, Tensor]:
    values = {_NAMES[source].get(key, key): value for key, value in state.items()}
    if ours["rule"] == "muon":
        wanted: tuple[str, ...] = ("momentum_buffer",)
    else:
        wanted = rules.ELEMENTWISE[ours["rule"]].state
        if source == "dion" and "momentum_buffer" in values:
            values["exp_avg"] = values.pop("momentum_buffer")
    result: dict[str, Tensor] = {}
    for key in wanted:
        if key not in values:
            continue
        value = values[key]
        if value.numel() != param.numel():
            raise InputError(f"{name}: {key} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
        half = param.dtype in (torch.float16, torch.bfloat16)
        value = value.detach().to(device=param.device, dtype=torch.float32 if half else param.dtype, copy=True)
        value = torch.empty_like(param, dtype=value.dtype).copy_(value.reshape(param.shape))
        if ours["rule"] == "muon":
            value.mul_(_momentum_factor(source in _HEAVY_BALL, ours["heavy_ball"], _momentum(theirs)))
        result[key] = value
    step = values.get("step", theirs.get("step"))
    if result and step is not None and ours["rule"] != "muon" and rules.ELEMENTWISE[ours["rule"]].counts:
        result["step"] = torch.full((), float(step), dtype=torch.float32, device=param.device)
    return result


def _momentum(group: Mapping[str, Any]) -> float:
    return float(group.get("momentum", group.get("mu", 0.95)))


def _momentum_factor(from_heavy_ball: bool, to_heavy_ball: bool, momentum: float) -> float:
    if from_heavy_ball == to_heavy_ball:
        return 1.0
    return 1 - momentum if from_heavy_ball else 1 / (1 - momentum)


def _unstacked(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """nanochat keeps the momentum of all matrices of a group stacked in the state of the first."""
    stacked = states[0].get("momentum_buffer") if states else None
    if stacked is None:
        return states
    if len(stacked) != len(states):
        raise InputError(f"the stacked momentum holds {len(stacked)} matrices for a group of {len(states)} parameters")
    return [{"momentum_buffer": buffer} for buffer in stacked]


def _name(group: Mapping[str, Any], index: int) -> str:
    return str(group["param_names"][index]) if "param_names" in group else f"parameter {index}"
