"""Learning-rate schedules on the one clock there is: the index of the optimizer update.

A loop calls `set_lr(optimizer, schedule.factor(update, updates))` before each update; the optimizer itself has no clock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from muonlab.errors import InputError, unknown

if TYPE_CHECKING:  # a schedule is arithmetic: reading one does not wait for torch
    import torch
    from torch import Tensor

SCHEDULES: dict[str, str] = {
    "cosine": "half a cosine from the peak to the final fraction",
    "constant": "the peak, after the warm-up",
    "linear": "a straight line from the peak to the final fraction",
    "exponential": "the same ratio from update to update, from the peak to the final fraction",
    "step": "equal stages, each lower than the one before by the same ratio, the last at the final fraction",
    "rising": "the same ratio from update to update, from the final fraction up to the peak: a learning-rate range test",
    "wsd": "the peak, then a straight line to the final fraction over the last `decay` of all updates",
}
"""Names and one-line summaries."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The fraction of the peak learning rate at each update of a run of known length."""

    kind: Literal["cosine", "constant", "linear", "exponential", "step", "rising", "wsd"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup: float = 0.05
    """Fraction of all updates in which the factor rises linearly to 1."""
    final: float = 0.1
    """Factor at the last update, as a fraction of the peak."""
    decay: float = 0.2
    """wsd: fraction of all updates in which the factor falls."""
    stages: int = 4
    """step: number of equal stages."""
    stretch: float = 1.0
    """The shape, warm-up included, is laid over this many times the run's updates and cut off where the run ends. For
    reproducing published runs: a clock that counts 4 micro-batches per update gives 4."""
    momentum_warmup: int = 0
    """Updates in which the momentum of Muon rises linearly from `momentum_start` to its own value; 0: no warm-up."""
    momentum_start: float = 0.85
    """Momentum of Muon at the first update of the momentum warm-up."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise unknown("schedule", self.kind, SCHEDULES)
        for name in ("warmup", "final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"schedule.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.kind in ("exponential", "step", "rising") and self.final == 0:
            raise InputError(f"schedule.final must be above 0 for the {self.kind} schedule, which multiplies")
        if not 1 <= self.stretch < math.inf:
            raise InputError(f"schedule.stretch must be at least 1, got {self.stretch}")
        if self.stages < 1 or self.momentum_warmup < 0 or not 0 <= self.momentum_start < 1:
            raise InputError("schedule: stages >= 1, momentum_warmup >= 0 and 0 <= momentum_start < 1 are required")

    def factor(self, update: int, updates: int) -> float:
        """Fraction of the peak for update `update` (0-based, the one about to be made) of `updates` in all.

        The first update of a warm-up of w updates has 1/w, the one after it the peak, the last update of all `final`
        (unless the shape is stretched beyond it).
        """
        updates = round(self.stretch * updates)
        warmup = round(self.warmup * updates)
        if update < warmup:
            return (update + 1) / warmup
        last = max(updates - 1, 1)
        if self.kind == "wsd":
            start = min(max(warmup, updates - 1 - round(self.decay * updates)), last)
        else:
            start = min(warmup, last)
        progress = min(max((update - start) / max(last - start, 1), 0.0), 1.0)
        return _SHAPES[self.kind](progress, self)

    def momentum(self, update: int, momentum: float) -> float:
        """Momentum for update `update` when the optimizer's own is `momentum`."""
        return momentum_warmup(update, self.momentum_warmup, self.momentum_start, momentum)


def momentum_warmup(update: int, warmup: int, start: float, final: float) -> float:
    """Linear from `start` at update 0 to `final` at update `warmup` and after."""
    share = min(update / warmup, 1.0) if warmup > 0 else 1.0
    return (1 - share) * start + share * final


def set_lr(optimizer: "torch.optim.Optimizer", factor: float) -> None:
    """Sets `lr = initial_lr * factor` in every parameter group; a tensor learning rate is filled in place, without a host sync.

    The first call remembers each group's learning rate as `initial_lr`, as torch's schedulers do. `block_lr`, the second
    rate of a periodic block-wise Muon, follows in the same way.
    """
    options = [
        (group, name) for group in optimizer.param_groups for name in ("lr", "block_lr") if group.get(name) is not None
    ]
    for group, name in options:  # all are remembered before any is written: groups may share one tensor
        value = group[name]
        group.setdefault(f"initial_{name}", value.clone() if _is_tensor(value) else value)
    for group, name in options:
        _write(group, name, group[f"initial_{name}"] * factor)


def set_momentum(optimizer: "torch.optim.Optimizer", schedule: Schedule, update: int) -> None:
    """Sets the momentum of every Muon group for update `update`; the first call remembers `initial_momentum`."""
    if schedule.momentum_warmup == 0:
        return
    for group in optimizer.param_groups:
        if group.get("rule") == "muon":
            peak = group.setdefault("initial_momentum", float(group["momentum"]))
            _write(group, "momentum", schedule.momentum(update, peak))


def applied_lr(optimizer: "torch.optim.Optimizer") -> dict[str, float]:
    """kind ("hidden", "embedding", ...) -> learning rate that the next update uses, read from the groups (one host sync per tensor)."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates.setdefault(group.get("kind", "all"), float(group["lr"]))
    return rates


def _write(group: dict[str, Any], name: str, value: "float | Tensor") -> None:
    current = group[name]
    if not _is_tensor(current):
        group[name] = value
    elif _is_tensor(value):
        current.copy_(value)
    else:
        current.fill_(value)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "copy_")


def _step_shape(progress: float, schedule: Schedule) -> float:
    stage = min(int(progress * schedule.stages), schedule.stages - 1)
    return float(schedule.final ** (stage / (schedule.stages - 1))) if schedule.stages > 1 else 1.0


_SHAPES: dict[str, Callable[[float, Schedule], float]] = {
    "cosine": lambda t, s: s.final + (1 - s.final) * 0.5 * (1 + math.cos(math.pi * t)),
    "constant": lambda t, s: 1.0,
    "linear": lambda t, s: 1 - (1 - s.final) * t,
    "exponential": lambda t, s: float(s.final**t),
    "step": _step_shape,
    "rising": lambda t, s: float(s.final ** (1 - t)),
    "wsd": lambda t, s: 1 - (1 - s.final) * t,
}
