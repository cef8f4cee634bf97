"""Every optimizer of the laboratory by name: its options, how it is built, where to start searching its learning rate."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from muonlab.errors import InputError
from muonlab.optim.options import (
    AdamWOptions,
    ClassOptions,
    LionOptions,
    MuonOptions,
    OptimizerOptions,
    SGDOptions,
    SophiaGOptions,
)

if TYPE_CHECKING:  # names and options are read without waiting for torch
    import torch
    from torch import nn

Build = Callable[["nn.Module", Any], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """One line of the registry."""

    name: str
    options: type[OptimizerOptions]
    build: Build
    lr_center: float
    """Centre of a log-spaced learning-rate search for a transformer of 1-3 M parameters and 100 updates of 2,048 tokens."""
    summary: str


def build_optimizer(model: "nn.Module", options: OptimizerOptions) -> "torch.optim.Optimizer":
    """The optimizer that `options` describe, for all parameters of `model`.

    Every group carries lr, initial_lr, weight_decay, kind and param_names; `optimizer.routing()` tells who updates what.
    """
    for entry in OPTIMIZERS.values():
        if type(options) is entry.options:
            optimizer = entry.build(model, options)
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))
            return optimizer
    raise InputError(f"no optimizer is registered for options of type {type(options).__name__}")


def hybrid(hidden_rule: str) -> Build:
    """How to build an optimizer that updates hidden matrices by `hidden_rule`, all else by it too or by `options.fallback`."""

    def build(model: "nn.Module", options: OptimizerOptions) -> "torch.optim.Optimizer":
        from muonlab.optim.optimizer import HybridOptimizer

        return HybridOptimizer(model, options, hidden_rule, getattr(options, "fallback", hidden_rule))

    return build


def _sophia(model: "nn.Module", options: SophiaGOptions) -> "torch.optim.Optimizer":
    from muonlab.optim.rivals import SophiaG

    return SophiaG(model, **vars(options))


def _by_import_path(model: "nn.Module", options: ClassOptions) -> "torch.optim.Optimizer":
    import torch

    from muonlab.optim.groups import plan
    from muonlab.optim.optimizer import HybridOptimizer
    from muonlab.optim.routing import table_of

    module_name, _, class_name = options.class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"class_path {options.class_path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise InputError(f"class_path {options.class_path!r} is not a torch.optim.Optimizer")
    if issubclass(cls, HybridOptimizer):
        names = ", ".join(name for name in OPTIMIZERS if name != "class")
        raise InputError(f"class_path {options.class_path!r} has options of its own: use one of the names {names}")
    groups = plan(model, options, class_name, class_name)
    try:
        optimizer: torch.optim.Optimizer = cls(groups, **options.arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"{options.class_path} refused its arguments: {error}") from error
    optimizer.routing = MethodType(table_of, optimizer)  # type: ignore[attr-defined]
    return optimizer


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.name: entry
    for entry in (
        OptimizerEntry(
            name="muon",
            options=MuonOptions,
            build=hybrid("muon"),
            lr_center=1e-2,
            summary="orthogonalised momentum for hidden matrices, AdamW for the rest",
        ),
        OptimizerEntry(
            name="adamw",
            options=AdamWOptions,
            build=hybrid("adamw"),
            lr_center=2.5e-3,
            summary="adaptive moments with decoupled weight decay",
        ),
        OptimizerEntry(
            name="lion",
            options=LionOptions,
            build=hybrid("lion"),
            lr_center=1e-3,
            summary="sign of an interpolated momentum",
        ),
        OptimizerEntry(
            name="sophia",
            options=SophiaGOptions,
            build=_sophia,
            lr_center=1e-3,
            summary="momentum over a sampled Gauss-Newton diagonal, clipped",
        ),
        OptimizerEntry(
            name="sgd",
            options=SGDOptions,
            build=hybrid("sgd"),
            lr_center=0.3,
            summary="heavy-ball momentum",
        ),
        OptimizerEntry(
            name="class",
            options=ClassOptions,
            build=_by_import_path,
            lr_center=1e-3,
            summary="any torch.optim.Optimizer by import path",
        ),
    )
}
