"""Muon, the drop-in class."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from muonlab.errors import InputError, unknown
from muonlab.optim.conventions import CONVENTIONS
from muonlab.optim.groups import torch_arguments
from muonlab.optim.optimizer import HybridOptimizer
from muonlab.optim.options import MuonOptions


class Muon(HybridOptimizer):
    """Muon for hidden matrices and AdamW (or Lion) for everything else, in one optimizer.

    Given a module, it decides by itself (see `routing()`); the scale `moonlight` makes updates as large as AdamW's, so a
    learning rate and weight decay tuned for AdamW carry over. Given parameters or groups it takes the arguments, defaults and
    arithmetic of torch.optim.Muon: matrices and stacks of matrices go to Muon, vectors to AdamW.

    Args:
        params: a module, parameters, (name, parameter) pairs, or groups of them.
        lr: learning rate, a number or a live tensor (1e-3).
        weight_decay, momentum, nesterov, ns_steps: see `options.MuonOptions` (0.1, 0.95, True, 5).
        ns_coefficients: one step (a, b, c) that is repeated, as in torch.optim.Muon; `coefficients` knows more.
        eps: lower bound of the norm that a matrix is divided by, as in torch.optim.Muon; with a module, epsilon of AdamW.
        adjust_lr_fn: "original" (scale `keller`) or "match_rms_adamw" (`moonlight`), as in torch.optim.Muon.
        convention: start from the arithmetic and defaults of another implementation, a name of `conventions.CONVENTIONS`.
        options: any other field of `options.MuonOptions`.

    Raises:
        InputError: unknown or contradictory options, no parameters, complex or duplicated parameters.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        nesterov: bool | None = None,
        ns_coefficients: tuple[float, float, float] | None = None,
        eps: float | None = None,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        convention: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise InputError(f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
        module = isinstance(params, nn.Module)
        live = lr if isinstance(lr, Tensor) else None
        given: dict[str, Any] = {
            "lr": None if lr is None else float(lr),
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps" if module else "norm_eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        given = torch_arguments({name: value for name, value in given.items() if value is not None} | options)
        known = [field.name for field in fields(MuonOptions)]
        for name in given:
            if name not in known:
                raise unknown("option of Muon", name, known)
        if convention is not None:
            resolved = MuonOptions.of(convention, **given)
        else:
            resolved = MuonOptions(**given) if module else MuonOptions(**{**_LIKE_TORCH, **given})
        super().__init__(params, resolved, "muon", resolved.fallback, live)


# Without a convention the iterations run in the precision that suits the device, for matrices of any size.
_LIKE_TORCH = {**CONVENTIONS["torch"], "dtype": "auto", "min_dim": 1}
