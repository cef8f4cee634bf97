"""Muon, the drop-in class."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from muonlab.errors import unknown
from muonlab.optim.groups import param_groups, routes_of
from muonlab.optim.optimizer import HybridOptimizer
from muonlab.optim.options import MuonOptions


class Muon(HybridOptimizer):
    """Muon for hidden matrices and AdamW (or Lion) for everything else, in one optimizer.

    Given a module, it decides by itself (see `routing()`); the scale `moonlight` makes updates as large as AdamW's, so a
    learning rate and weight decay tuned for AdamW carry over. Given parameters or groups it takes the arguments and
    defaults of torch.optim.Muon: matrices and stacks of matrices go to Muon, vectors to AdamW.

    Args:
        params: a module, parameters, named parameters, or parameter groups.
        lr, weight_decay, momentum, nesterov, ns_steps: see `options.MuonOptions`.
        ns_coefficients, eps, adjust_lr_fn: as in torch.optim.Muon ("original" is scale `keller`, "match_rms_adamw" is
            `moonlight`).
        options: any other field of `options.MuonOptions`.

    Raises:
        InputError: an unknown option or value, no parameters, complex parameters.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float | None = None,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        **options: Any,
    ) -> None:
        given = dict(options, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)
        if not isinstance(params, nn.Module):
            given.setdefault("coefficients", "keller")
            given.setdefault("scale", "keller")
        if ns_coefficients is not None:
            given.update(coefficients=(tuple(ns_coefficients),) * (ns_steps or 5), ns_steps=None)
        if adjust_lr_fn is not None:
            given["scale"] = _adjust_lr_scale(adjust_lr_fn)
        known = [field.name for field in fields(MuonOptions)]
        for name in given:
            if name not in known:
                raise unknown("option of Muon", name, known)
        live = lr if isinstance(lr, Tensor) else None
        resolved = MuonOptions(lr=float(lr), **given)
        groups = param_groups(routes_of(params), resolved, "muon", resolved.fallback)
        if live is not None:
            for group in groups:
                group["lr"] = live.clone() if group["lr"] == resolved.lr else group["lr"]
        super().__init__(
            groups, {"lr": live if live is not None else resolved.lr, "weight_decay": resolved.weight_decay}
        )


def _adjust_lr_scale(adjust_lr_fn: str) -> str:
    names = {"original": "keller", "match_rms_adamw": "moonlight"}
    if adjust_lr_fn not in names:
        raise unknown("adjust_lr_fn", adjust_lr_fn, names)
    return names[adjust_lr_fn]
