"""Optimizers: Muon and its rivals as pure rules over stacks of matrices, and the torch classes around them."""

from typing import TYPE_CHECKING

from muonlab.lazy import lazily

if TYPE_CHECKING:
    from muonlab.optim.coefficients import COEFFICIENTS, CoefficientSet
    from muonlab.optim.conventions import CONVENTIONS, convert_lr
    from muonlab.optim.interop import import_state
    from muonlab.optim.muon import Muon
    from muonlab.optim.optimizer import HybridOptimizer
    from muonlab.optim.options import (
        AdamWOptions,
        ClassOptions,
        LionOptions,
        MuonOptions,
        OptimizerOptions,
        Override,
        SGDOptions,
        SophiaGOptions,
    )
    from muonlab.optim.polar import orthogonalize
    from muonlab.optim.qk_clip import max_logits, qk_clip_
    from muonlab.optim.registry import OPTIMIZERS, OptimizerEntry, build_optimizer
    from muonlab.optim.rivals import Lion, SophiaG
    from muonlab.optim.routing import RoutingTable
    from muonlab.optim.schedules import SCHEDULES, Schedule, applied_lr, set_lr, set_momentum

_MODULES = {
    "COEFFICIENTS": "muonlab.optim.coefficients",
    "CoefficientSet": "muonlab.optim.coefficients",
    "CONVENTIONS": "muonlab.optim.conventions",
    "convert_lr": "muonlab.optim.conventions",
    "import_state": "muonlab.optim.interop",
    "Muon": "muonlab.optim.muon",
    "HybridOptimizer": "muonlab.optim.optimizer",
    "AdamWOptions": "muonlab.optim.options",
    "ClassOptions": "muonlab.optim.options",
    "LionOptions": "muonlab.optim.options",
    "MuonOptions": "muonlab.optim.options",
    "OptimizerOptions": "muonlab.optim.options",
    "Override": "muonlab.optim.options",
    "SGDOptions": "muonlab.optim.options",
    "SophiaGOptions": "muonlab.optim.options",
    "orthogonalize": "muonlab.optim.polar",
    "max_logits": "muonlab.optim.qk_clip",
    "qk_clip_": "muonlab.optim.qk_clip",
    "OPTIMIZERS": "muonlab.optim.registry",
    "OptimizerEntry": "muonlab.optim.registry",
    "build_optimizer": "muonlab.optim.registry",
    "Lion": "muonlab.optim.rivals",
    "SophiaG": "muonlab.optim.rivals",
    "RoutingTable": "muonlab.optim.routing",
    "SCHEDULES": "muonlab.optim.schedules",
    "Schedule": "muonlab.optim.schedules",
    "applied_lr": "muonlab.optim.schedules",
    "set_lr": "muonlab.optim.schedules",
    "set_momentum": "muonlab.optim.schedules",
}
__getattr__, __dir__ = lazily(__name__, _MODULES)

__all__ = [
    "COEFFICIENTS",
    "CONVENTIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamWOptions",
    "ClassOptions",
    "CoefficientSet",
    "HybridOptimizer",
    "Lion",
    "LionOptions",
    "Muon",
    "MuonOptions",
    "OptimizerEntry",
    "OptimizerOptions",
    "Override",
    "RoutingTable",
    "SGDOptions",
    "Schedule",
    "SophiaG",
    "SophiaGOptions",
    "applied_lr",
    "build_optimizer",
    "convert_lr",
    "import_state",
    "max_logits",
    "orthogonalize",
    "qk_clip_",
    "set_lr",
    "set_momentum",
]
