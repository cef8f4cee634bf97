"""The fast step on a GPU: Triton kernels, banks and a CUDA graph behind one function.

    elementwise   kernels for momentum, norm, cast, decay, application, AdamW
    products      kernels for the products of the polar iteration
    launching     launching kernels, and compiling them together
    iteration     the polar iteration on banks
    tables        which matrices there are, where they lie, which lane they take
    places        what a plan was made for, and whether it is still so
    capture       a CUDA graph, captured so that neither it nor its failure disturbs anything
    fused         the plan: tables, banks, launches, graph

Nothing here imports Triton before `step` meets a parameter on a GPU.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from muonlab.optim.coefficients import resolve

Work = list[tuple[dict[str, Any], list[Tensor]]]
State = Callable[[Tensor, tuple[str, ...], str], dict[str, Any]]

# Options of a group that the kernels follow, and options that they do not know but that change nothing at these values.
_FOLLOWED = (
    *("params", "param_names", "reasons", "kind", "rule", "view", "updates"),
    *("lr", "block_lr", "weight_decay", "cautious_decay", "scaled_decay", "scale", "block_size", "max_workspace_bytes"),
    *("momentum", "nesterov", "heavy_ball", "momentum_dtype", "coefficients", "ns_steps", "norm_eps", "betas", "eps"),
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "skip_nonfinite": (False, True),
    "method": ("auto", "standard", "gram"),
    "dtype": ("auto", "float16", "bfloat16"),
    "equilibrate_rows": (False,),
    "renormalize": (False,),
    "normuon_beta": (None,),
    "normuon_axis": ("rows", "long"),
    "idle": ("skip", "move"),
    "block_period": (0, None),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Captures of a user's own program in which addresses may differ; one pinned table each.
_CAPTURES = 8
# A plan takes a while to make: an optimizer that would need ever new ones is better off without.
_PLANS = 16

_plans: WeakKeyDictionary[torch.optim.Optimizer, "_Plans"] = WeakKeyDictionary()


class Unsupported(Exception):
    """Something that the kernels do not cover, found before anything was changed; the message says what."""


class _Plans:
    """The current plan of an optimizer and how many there have been."""

    def __init__(self) -> None:
        self.current: Any = None
        self.made = 0
        self.refused: str | None = None


def replay(optimizer: torch.optim.Optimizer) -> bool:
    """Makes the whole update if there is a plan for all of it that still holds; what most steps need, and nothing more."""
    plans = _plans.get(optimizer)
    if plans is None or plans.current is None or torch.compiler.is_compiling():
        return False
    groups = optimizer.param_groups
    gradients = plans.current.gradients(groups, optimizer.state)
    if gradients is None or not any(gradients) or any(group["skip_nonfinite"] for group in groups):
        return False
    try:
        return bool(plans.current.run(gradients))
    except Unsupported:
        return False  # `step` meets it again, and says so


def refusal(optimizer: torch.optim.Optimizer) -> str | None:
    """Why the fast step does not cover what it should, in a few words; None where it does, or where there is nothing for it."""
    plans = _plans.get(optimizer)
    return None if plans is None else plans.refused


def step(optimizer: torch.optim.Optimizer, work: Work, state: State, keep: Tensor | None = None) -> Work:
    """Updates what the kernels cover; returns the groups that are left for the plain path, with their parameters.

    Args:
        work: the optimizer's groups, each with those of its parameters that have a gradient.
        state: parameter, names of state tensors, dtype -> state of the parameter, made on first use.
        keep: a boolean on the device; False leaves everything as it is.
    """
    first = next((param for _, params in work for param in params), None)
    covered = [group for group, _ in work if group["rule"] in ("muon", "adamw")]
    if first is None or not first.is_cuda or not covered or torch.compiler.is_compiling():
        return work
    plans = _plans.setdefault(optimizer, _Plans())
    if plans.refused is not None:
        return work
    try:
        gradients = plans.current.gradients(covered, optimizer.state) if plans.current is not None else None
        if gradients is None:
            if torch.cuda.is_current_stream_capturing():  # a plan cannot be made now: it waits for the device
                return _captured_slowly(work, "make a step of this kind before the capture")
            reason = _obstacle(covered)
            if reason is None and plans.made == _PLANS:
                reason = "parameters, gradients or options that change their layout from step to step"
            if reason is not None:
                return _refuse(plans, work, reason)
            from muonlab.optim.kernels.fused import FusedStep

            plans.current = None  # frees its banks first
            plans.current = FusedStep(covered, optimizer.state, state)
            plans.made += 1
            gradients = plans.current.gradients(covered, optimizer.state)
            assert gradients is not None
        done = plans.current.run(gradients, keep)
    except Unsupported as error:
        return _refuse(plans, work, str(error))
    if not done:
        return _captured_slowly(
            work, f"give what changes as tensors on the device, and capture at most {_CAPTURES} places of gradients"
        )
    return [entry for entry in work if entry[0]["rule"] not in ("muon", "adamw")]


def _captured_slowly(work: Work, instead: str) -> Work:
    if any(group["rule"] == "muon" for group, _ in work):
        warnings.warn(f"this CUDA graph captures the optimizer's step through torch, slower: {instead}", stacklevel=3)
    return work


def _refuse(plans: _Plans, work: Work, reason: str) -> Work:
    plans.refused = reason
    plans.current = None
    if any(group["rule"] == "muon" for group, _ in work):
        warnings.warn(
            f"the fast GPU step does not cover {reason}: the optimizer steps through torch, slower", stacklevel=3
        )
    return work


def _obstacle(groups: list[dict[str, Any]]) -> str | None:
    """Why these groups cannot take the fast step, in a few words; None if they can."""
    device = groups[0]["params"][0].device
    for group in groups:
        for name, value in group.items():
            if name in _FOLLOWED or name.startswith("initial_"):
                continue
            if name not in _NEUTRAL or value not in _NEUTRAL[name]:
                return f"the option {name}={value!r}"
        if group.get("momentum_dtype") == "int8":
            return "the option momentum_dtype='int8'"
        if group["rule"] == "muon" and resolve(group["coefficients"], group["ns_steps"]).preconditioned:
            return f"coefficients made for scaled rows ({group['coefficients']!r})"
        for name in ("lr", "weight_decay", "momentum", "block_lr"):
            if isinstance(group.get(name), Tensor) and group[name].numel() != 1:
                return f"one {name} for each matrix"
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return "betas that are tensors"
        for param in group["params"]:
            if type(param) not in (Tensor, torch.nn.Parameter):
                return f"parameters of type {type(param).__name__}"
            if param.device != device:
                return "parameters on several devices"
            for tensor in (param, param.grad):
                if tensor is not None and (tensor.dtype not in _DTYPES or tensor.layout != torch.strided):
                    return f"tensors of {tensor.dtype}, {tensor.layout}"
    if importlib.util.find_spec("triton") is None:
        return "machines without triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"GPUs older than Ampere ({torch.cuda.get_device_name(device)})"
    return None
