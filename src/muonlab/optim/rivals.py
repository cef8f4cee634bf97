"""Muon's rivals as classes of their own: Lion and Sophia-G."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from muonlab.optim import rules
from muonlab.optim.optimizer import HybridOptimizer
from muonlab.optim.options import LionOptions, SophiaGOptions


class Lion(HybridOptimizer):
    """Lion for every parameter of a module or a list of parameters; arguments are the fields of `LionOptions`.

    Source: https://arxiv.org/abs/2302.06675.
    """

    def __init__(self, params: nn.Module | Iterable[Any], **options: Any) -> None:
        super().__init__(params, LionOptions(**options), "lion", "lion")


class SophiaG(HybridOptimizer):
    """Sophia-G for every parameter of a module or a list of parameters; arguments are the fields of `SophiaGOptions`.

    Every `curvature_every` updates call `update_curvature`. Source: https://arxiv.org/abs/2305.14342.
    """

    def __init__(self, params: nn.Module | Iterable[Any], **options: Any) -> None:
        super().__init__(params, SophiaGOptions(**options), "sophia", "sophia")

    @torch.no_grad()
    def update_curvature(self, closure: Callable[[], Any], tokens: int) -> None:
        """Moves the curvature towards a new Gauss-Newton-Bartlett estimate, `tokens * g * g`.

        `closure` must call `backward` on the *mean* cross-entropy over `tokens` positions in all, on labels sampled from the
        model's own distribution (never the data's labels); with gradient accumulation it runs all micro-batches, each loss
        weighted so that the gradients add up to that of the mean. Gradients that were there before are left as they were.
        """
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        kept = [param.grad for param in params]
        try:
            for param in params:
                param.grad = None
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        state = self._state(param, rules.ELEMENTWISE["sophia"].state)
                        beta2 = group["betas"][1]
                        rules.advance_curvature(state["hessian"], param.grad, beta2=beta2, tokens=tokens)
        finally:
            for param, grad in zip(params, kept):
                param.grad = grad
