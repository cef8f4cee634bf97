"""Optimizers: Muon and its rivals as pure rules over stacks of matrices, and the torch classes around them."""

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
