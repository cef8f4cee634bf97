"""Update rules as functions of stacks: (gradient, state, hyper-parameters) -> update.

Tensors are `[..., *shape]`; leading axes are independent parameters (layers of one shape, experts, replicas of a sweep).
Every hyper-parameter may be a number or a tensor that broadcasts along them. A rule advances its state in place (a second
copy of it would cost as much memory as the state), changes nothing else, and knows neither learning rate nor decay: the one
function that changes a parameter is `apply_update_`, the same for all rules: `param -= shrink * param + step_size * update`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonlab.optim import variants
from muonlab.optim.coefficients import Iteration
from muonlab.optim.methods import DTypeName, Method
from muonlab.optim.polar import polar
from muonlab.optim.variants import Number, Variant, weight, widened

State = Mapping[str, Tensor]
PLAIN = Variant()


def muon(
    grad: Tensor,
    state: State,
    *,
    momentum: Number,
    nesterov: bool,
    iteration: Iteration,
    heavy_ball: bool = False,
    method: Method = "auto",
    dtype: torch.dtype | DTypeName = "auto",
    norm_eps: float = 0.0,
    variant: Variant = PLAIN,
) -> Tensor:
    """Orthogonalised momentum of matrices `grad` [..., m, n].

    State: `momentum_buffer` like `grad` (int8 with `momentum_scale` [..., m, 1]), and what `variant` needs. The update has
    spectral norm about 1 and is not yet scaled (`scaling.scale_factor`). Source: Keller Jordan,
    https://kellerjordan.github.io/posts/muon/; variants name theirs where they are defined.
    """
    gradient = grad
    if variant.mars_gamma is not None:
        grad = variants.variance_reduced(grad, state["previous_grad"], variant.mars_gamma, momentum)
    if variant.laprop_beta is not None:
        grad = variants.divided_by_rms(grad, state["squared_grad"], variant.laprop_beta)

    def orthogonalized(x: Tensor, overwrite: bool = False) -> Tensor:
        return polar(x, iteration, method, dtype, norm_eps, overwrite=overwrite)

    buffer = state["momentum_buffer"]
    work = momentum_of(state)
    if variant.row_fraction is not None:
        direction = work.add_(grad.to(work.dtype))
        update = variants.chosen_rows(work, variant.row_fraction, momentum, orthogonalized)
        keep_momentum(state, work)
    else:
        direction = advance_momentum(grad, work, momentum, nesterov=nesterov, heavy_ball=heavy_ball)
        keep_momentum(state, work)
        if variant.sign_momentum:
            direction = direction.sign()
        if variant.equilibrate_rows:
            direction = variants.equilibrated_rows(direction)
        scratch = direction is not buffer and not variant.nuclear_scale and variant.normuon_axis != "norm"
        update = orthogonalized(direction, overwrite=scratch)
    if variant.nuclear_scale:  # PolarGrad, https://arxiv.org/abs/2505.21799: the dual norm of the direction
        update = update * (update * direction).sum((-2, -1), keepdim=True)
    if variant.renormalize:
        update = variants.renormalized(update)
    if variant.normuon_beta is not None:
        second, beta, axis = state["second_moment"], variant.normuon_beta, variant.normuon_axis
        if axis in ("norm", "sum"):
            update = variants.sized_by_gradient(update, second, beta, axis, gradient, direction)
        else:
            update = variants.normalized(update, second, beta, axis)
    return variants.cautious(update, gradient) if variant.cautious_update else update


def momentum_of(state: State) -> Tensor:
    """The momentum at working precision: the buffer itself, or an fp32 copy of one in fewer bits."""
    buffer = state["momentum_buffer"]
    return buffer * state["momentum_scale"] if buffer.dtype == torch.int8 else widened(buffer)


def keep_momentum(state: State, work: Tensor) -> None:
    """Stores `work` from `momentum_of` after it was advanced, rounded once; int8 has one scale a row, its largest entry / 127.

    Source of linear 8-bit state for Muon: https://arxiv.org/abs/2509.23106.
    """
    buffer = state["momentum_buffer"]
    if buffer.dtype == torch.int8:
        scale = state["momentum_scale"].copy_(work.abs().amax(-1, keepdim=True) / 127)
        buffer.copy_((work / torch.where(scale > 0, scale, 1.0)).round_())
    elif work is not buffer:
        buffer.copy_(work)


def advance_momentum(grad: Tensor, buffer: Tensor, momentum: Number, *, nesterov: bool, heavy_ball: bool) -> Tensor:
    """Advances `buffer` in place and returns the direction to follow (`buffer` itself without Nesterov).

    An exponential moving average, `B = mu B + (1 - mu) G`, or heavy-ball momentum, `B = mu B + G`.
    """
    grad = grad.to(buffer.dtype)
    if heavy_ball:
        buffer.mul_(momentum).add_(grad)
        return grad + buffer * momentum if nesterov else buffer
    buffer.lerp_(grad, weight(1 - momentum, buffer))
    return torch.lerp(grad, buffer, weight(momentum, buffer)) if nesterov else buffer


def adamw(grad: Tensor, state: State, *, step: Tensor, betas: tuple[Number, Number], eps: Number) -> Tensor:
    """Adam's update with bias correction; state: `exp_avg`, `exp_avg_sq`. `step` counts this update (from 1), broadcastable.

    Source: https://arxiv.org/abs/1711.05101; the arithmetic of torch.optim.AdamW to rounding.
    """
    beta1, beta2 = betas
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    grad = grad.to(mean.dtype)
    mean.lerp_(grad, weight(1 - beta1, mean))
    if isinstance(beta2, Tensor):
        square.mul_(beta2).add_((grad * grad).mul_(1 - beta2))
    else:
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # mean / c1 / (sqrt(square / c2) + eps), with both corrections in the denominator.
    correction = bias_correction(beta1, step)
    denominator = square.sqrt().mul_(correction / bias_correction(beta2, step).sqrt()).add_(correction * eps)
    return torch.div(mean, denominator, out=denominator)


def bias_correction(beta: Number, step: Tensor) -> Tensor:
    """`1 - beta ** step`, without the cancellation that costs four digits in fp32 at beta = 0.999."""
    log_beta = torch.log1p(beta - 1) if isinstance(beta, Tensor) else math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(step * log_beta)


def lion(grad: Tensor, state: State, *, betas: tuple[Number, Number]) -> Tensor:
    """Sign of an interpolated momentum; state: `exp_avg`. Source: https://arxiv.org/abs/2302.06675."""
    beta1, beta2 = betas
    mean = state["exp_avg"]
    grad = grad.to(mean.dtype)
    update = torch.lerp(mean, grad, weight(1 - beta1, mean)).sign_()
    mean.lerp_(grad, weight(1 - beta2, mean))
    return update


def sophia(grad: Tensor, state: State, *, betas: tuple[Number, Number], rho: Number, eps: Number) -> Tensor:
    """Momentum over an estimate of the diagonal curvature, clipped to [-1, 1]; state: `exp_avg`, `hessian`.

    `hessian` is an average of Gauss-Newton-Bartlett estimates and changes only when new estimates are given
    (`advance_curvature`); while it is zero the update is the sign of the momentum.
    Source: https://arxiv.org/abs/2305.14342, Algorithm 3.
    """
    mean = state["exp_avg"]
    mean.lerp_(grad.to(mean.dtype), weight(1 - betas[0], mean))
    return (mean / (rho * state["hessian"] + eps)).clamp_(-1, 1)


def advance_curvature(hessian: Tensor, sampled_grad: Tensor, *, beta2: Number, tokens: Number) -> None:
    """Moves `hessian` in place towards the Gauss-Newton-Bartlett estimate `tokens * g * g`.

    `sampled_grad` is the gradient of the *mean* loss over `tokens` positions on labels drawn from the model itself.
    Source: https://arxiv.org/abs/2305.14342, Algorithm 2.
    """
    sampled = sampled_grad.to(hessian.dtype)
    hessian.lerp_(sampled * sampled * tokens, weight(1 - beta2, hessian))


def sgd(grad: Tensor, state: State, *, momentum: Number, nesterov: bool) -> Tensor:
    """Heavy-ball momentum as in torch.optim.SGD without dampening; state: `momentum_buffer`."""
    work = momentum_of(state)
    direction = advance_momentum(grad, work, momentum, nesterov=nesterov, heavy_ball=True)
    keep_momentum(state, work)
    return direction


def apply_update_(
    param: Tensor, update: Tensor, *, step_size: Number, shrink: Number = 0.0, cautious: bool = False
) -> Tensor:
    """In place `param -= shrink * param + step_size * update`; returns `param`.

    `step_size` is the learning rate times the scale of the update, `shrink` the learning rate times the weight decay.
    `cautious`: entries that the update pushes away from zero (opposite signs of parameter and update) are not decayed
    (https://arxiv.org/abs/2510.12402). A half-precision parameter is computed in fp32 and rounded once.
    """
    work = widened(param)
    if cautious:
        shrink = torch.where(work * update >= 0, shrink, 0.0)
    if isinstance(shrink, Tensor) or shrink != 0:
        work.mul_(1 - shrink)
    if isinstance(step_size, Tensor):
        work.sub_(update.to(work.dtype) * step_size)
    else:
        work.add_(update, alpha=-step_size)
    return work if work is param else param.copy_(work)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An update rule for entries one by one: its function, its state and the group options that the function reads."""

    update: Callable[..., Tensor]
    state: tuple[str, ...]
    """Names of state tensors, each like the parameter, zero at first."""
    options: tuple[str, ...]
    counts: bool = False
    """The function takes `step`, the number of this update."""

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The function's hyper-parameters out of a parameter group."""
        return {name: group[name] for name in self.options}


ELEMENTWISE: dict[str, Rule] = {
    "adamw": Rule(update=adamw, state=("exp_avg", "exp_avg_sq"), options=("betas", "eps"), counts=True),
    "lion": Rule(update=lion, state=("exp_avg",), options=("betas",)),
    "sophia": Rule(update=sophia, state=("exp_avg", "hessian"), options=("betas", "rho", "eps")),
    "sgd": Rule(update=sgd, state=("momentum_buffer",), options=("momentum", "nesterov")),
}
