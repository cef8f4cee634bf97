"""What is searched: named knobs with the same range for every optimizer, and a trial as one point among them."""

import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from muonlab.errors import InputError, unknown
from muonlab.optim.options import ClassOptions
from muonlab.optim.registry import OPTIMIZERS, build_optimizer

STEP = 10.0**0.5
"""Ratio of neighbouring learning rates: two to a decade."""

AUXILIARY = 3.0
"""Where the learning rate of embeddings and head starts, as a multiple of the matrices': on the micro model both AdamW and
Muon were better at 3 than at 1 (by 0.6 and 0.1 nats after 100 updates). The same for every optimizer."""


@dataclass(frozen=True)
class Knob:
    """One thing to tune, spread evenly in its logarithm (or in that of its distance from 1) from `low` to `high`."""

    name: str
    text: str
    low: float
    high: float
    near_one: bool = False

    def at(self, share: float) -> float:
        """The value `share` (0 to 1) of the way from low to high."""
        if self.near_one:
            return 1.0 - (1.0 - self.low) * math.pow((1.0 - self.high) / (1.0 - self.low), share)
        return self.low * math.pow(self.high / self.low, share)


KNOBS = {
    knob.name: knob
    for knob in (
        Knob("lr", "learning rate of hidden matrices", 0.1, 10.0),  # times the optimizer's centre
        Knob("auxiliary", "learning rate of embeddings and head", AUXILIARY / 3, AUXILIARY * 3),  # times lr
        Knob("weight_decay", "weight decay", 0.003, 0.3),
        Knob("momentum", "momentum (Adam: beta 1)", 0.8, 0.98, near_one=True),
    )
}
"""The search space. An optimizer without a weight decay or a momentum has one knob fewer, and the summary says so."""


@dataclass(frozen=True)
class Point:
    """One trial: what to set, and the stage of the search that asked for it."""

    stage: str
    lr: float
    """Learning rate of hidden matrices and of everything without one of its own."""
    auxiliary: float = AUXILIARY
    """Learning rate of embeddings and head as a multiple of `lr`."""
    weight_decay: float | None = None
    """None keeps the optimizer's default, as does the next."""
    momentum: float | None = None
    updates: int | None = None
    """Stop after so many updates of the full-length schedule; None: a run of full length."""

    @property
    def values(self) -> dict[str, float]:
        """The knobs that it sets."""
        return {name: value for name in KNOBS if (value := getattr(self, name)) is not None}

    def options(self, optimizer: str) -> dict[str, Any]:
        """The optimizer's options that this point sets."""
        values: dict[str, Any] = {"lr": self.lr}
        values["embedding_lr"] = values["head_lr"] = self.lr * self.auxiliary
        if self.weight_decay is not None:
            values["weight_decay"] = self.weight_decay
        if is_import_path(optimizer):
            return _class_options(optimizer, self, values)
        if self.momentum is not None:
            options = OPTIMIZERS[optimizer].options
            if "momentum" in options.__dataclass_fields__:
                values["momentum"] = self.momentum
            else:
                values["betas"] = [self.momentum, vars(options())["betas"][1]]
        return values


def is_import_path(optimizer: str) -> bool:
    """Whether a name stands for a class to import, such as torch.optim.NAdam, and not for a registered optimizer."""
    return "." in optimizer


def registered_name(optimizer: str) -> str:
    """The name under which the registry builds it: its own, or that of all classes."""
    return "class" if is_import_path(optimizer) else optimizer


def center_of(optimizer: str) -> float:
    """Where the search of its learning rate begins: the registered one, AdamW's for a class."""
    return OPTIMIZERS["adamw" if is_import_path(optimizer) else optimizer].lr_center


def knobs_of(optimizer: str) -> list[str]:
    """The knobs that an optimizer has."""
    if is_import_path(optimizer):
        has = _parameters(optimizer)
        lacking = {"weight_decay"} - has.keys() | ({"momentum"} if not {"betas", "momentum"} & has.keys() else set())
    else:
        fields = OPTIMIZERS[optimizer].options.__dataclass_fields__
        lacking = set() if {"betas", "momentum"} & fields.keys() else {"momentum"}
    return [name for name in KNOBS if name not in lacking]


def check_optimizer(optimizer: str) -> None:
    """InputError for a name that is not registered, or a class that cannot be imported or take the lab's groups."""
    if is_import_path(optimizer):
        if not all(part.isidentifier() for part in optimizer.split(".")):
            raise InputError(f"{optimizer!r} is no import path of a class; one looks like torch.optim.NAdam")
        build_optimizer(nn.Linear(8, 8), ClassOptions(class_path=optimizer))
    elif optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    elif optimizer == "class":
        raise InputError("give the class by its import path in place of 'class', for example: torch.optim.NAdam")


def _parameters(class_path: str) -> dict[str, Any]:
    """Argument -> default of a class's constructor."""
    module, _, name = class_path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    return {key: parameter.default for key, parameter in signature.parameters.items()}


def _class_options(class_path: str, point: Point, values: dict[str, Any]) -> dict[str, Any]:
    """A class keeps its own defaults: torch's Adam and NAdam add the decay to the gradient, where the lab's 0.1 is far too much."""
    has = _parameters(class_path)
    if "weight_decay" not in values:
        default = has.get("weight_decay", 0.0)
        values["weight_decay"] = float(default) if isinstance(default, int | float) else 0.0
    arguments: dict[str, Any] = {}
    if point.weight_decay is not None and "decoupled_weight_decay" in has:
        arguments["decoupled_weight_decay"] = True  # so that the knob means the same as elsewhere
    if point.momentum is not None and "betas" in has:
        arguments["betas"] = [point.momentum, *list(has["betas"])[1:]]
    elif point.momentum is not None:
        arguments["momentum"] = point.momentum
    return {"class_path": class_path, **values, "arguments": arguments}
