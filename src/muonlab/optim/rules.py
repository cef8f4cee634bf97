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

from muonlab.optim.coefficients import Iteration
from muonlab.optim.polar import DTypeName, Method, polar

State = Mapping[str, Tensor]
Number = float | Tensor


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
    equilibrate_rows: bool = False,
    renormalize: bool = False,
    normuon_beta: Number | None = None,
    normuon_axis: str = "rows",
) -> Tensor:
    """Orthogonalised momentum of matrices `grad` [..., m, n]; state: `momentum_buffer` like `grad`, for NorMuon `second_moment`.

    The update has spectral norm about 1 and is not yet scaled (`scaling.scale_factor`).
    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/; the variants name theirs where they are defined.
    """
    buffer = state["momentum_buffer"]
    direction = advance_momentum(grad, buffer, momentum, nesterov=nesterov, heavy_ball=heavy_ball)
    if equilibrate_rows:
        direction = equilibrated_rows(direction)
    update = polar(direction, iteration, method, dtype, norm_eps, overwrite=direction is not buffer)
    if renormalize:
        update = renormalized(update)
    if normuon_beta is not None:
        update = normalized_neurons(update, state["second_moment"], normuon_beta, normuon_axis)
    return update


def advance_momentum(grad: Tensor, buffer: Tensor, momentum: Number, *, nesterov: bool, heavy_ball: bool) -> Tensor:
    """Advances `buffer` in place and returns the direction to follow (`buffer` itself without Nesterov).

    An exponential moving average, `B = mu B + (1 - mu) G`, or heavy-ball momentum, `B = mu B + G`. A half-precision buffer is
    advanced in fp32 and rounded once.
    """
    work = _widened(buffer)
    grad = grad.to(work.dtype)
    if heavy_ball:
        work.mul_(momentum).add_(grad)
        direction = grad + work * momentum if nesterov else work
    else:
        work.lerp_(grad, _weight(1 - momentum, work))
        direction = torch.lerp(grad, work, _weight(momentum, work)) if nesterov else work
    if work is not buffer:
        buffer.copy_(work)
    return direction


def equilibrated_rows(x: Tensor) -> Tensor:
    """Every row [..., m, n] at the mean row norm: a better conditioned start. Source: https://arxiv.org/abs/2603.28254."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., m, 1]
    mean = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / math.sqrt(x.shape[-2])
    result: Tensor = x * (mean / rows.clamp(min=torch.finfo(x.dtype).tiny))
    return result


def renormalized(update: Tensor) -> Tensor:
    """The Frobenius norm of an exactly semi-orthogonal matrix, sqrt(min(m, n)). Source: https://arxiv.org/abs/2602.21545."""
    update = _widened(update)
    norm: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    target = math.sqrt(min(update.shape[-2:]))
    return update * torch.where(norm > 0, target / norm, 0.0)


def normalized_neurons(update: Tensor, second_moment: Tensor, beta: Number, axis: str = "rows") -> Tensor:
    """NorMuon: rows divided by the root of the running mean of their squares, at an unchanged Frobenius norm.

    `second_moment` [..., m, 1] is advanced in place; with axis "long" the neurons are whichever of rows and columns are more
    ([..., 1, n] for a wide matrix, as nanochat does). Source: https://arxiv.org/abs/2510.05491.
    """
    update = _widened(update)
    across = -1 if axis == "rows" or update.shape[-2] >= update.shape[-1] else -2
    squares = update.square().mean(across, keepdim=True).to(second_moment.dtype)
    second_moment.lerp_(squares, _weight(1 - beta, second_moment))
    scaled = update * second_moment.clamp(min=1e-10).rsqrt()
    before: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    after: Tensor = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return scaled * torch.where(after > 0, before / after, 0.0)


def adamw(grad: Tensor, state: State, *, step: Tensor, betas: tuple[Number, Number], eps: Number) -> Tensor:
    """Adam's update with bias correction; state: `exp_avg`, `exp_avg_sq`. `step` counts this update (from 1), broadcastable.

    Source: https://arxiv.org/abs/1711.05101; the arithmetic of torch.optim.AdamW to rounding.
    """
    beta1, beta2 = betas
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    grad = grad.to(mean.dtype)
    mean.lerp_(grad, _weight(1 - beta1, mean))
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
    update = torch.lerp(mean, grad, _weight(1 - beta1, mean)).sign_()
    mean.lerp_(grad, _weight(1 - beta2, mean))
    return update


def sophia(grad: Tensor, state: State, *, betas: tuple[Number, Number], rho: Number, eps: Number) -> Tensor:
    """Momentum over an estimate of the diagonal curvature, clipped to [-1, 1]; state: `exp_avg`, `hessian`.

    `hessian` is an average of Gauss-Newton-Bartlett estimates and changes only when new estimates are given
    (`advance_curvature`); while it is zero the update is the sign of the momentum.
    Source: https://arxiv.org/abs/2305.14342, Algorithm 3.
    """
    mean = state["exp_avg"]
    mean.lerp_(grad.to(mean.dtype), _weight(1 - betas[0], mean))
    return (mean / (rho * state["hessian"] + eps)).clamp_(-1, 1)


def advance_curvature(hessian: Tensor, sampled_grad: Tensor, *, beta2: Number, tokens: Number) -> None:
    """Moves `hessian` in place towards the Gauss-Newton-Bartlett estimate `tokens * g * g`.

    `sampled_grad` is the gradient of the *mean* loss over `tokens` positions on labels drawn from the model itself.
    Source: https://arxiv.org/abs/2305.14342, Algorithm 2.
    """
    sampled = sampled_grad.to(hessian.dtype)
    hessian.lerp_(sampled * sampled * tokens, _weight(1 - beta2, hessian))


def sgd(grad: Tensor, state: State, *, momentum: Number, nesterov: bool) -> Tensor:
    """Heavy-ball momentum as in torch.optim.SGD without dampening; state: `momentum_buffer`."""
    return advance_momentum(grad, state["momentum_buffer"], momentum, nesterov=nesterov, heavy_ball=True)


def apply_update_(
    param: Tensor, update: Tensor, *, step_size: Number, shrink: Number = 0.0, cautious: bool = False
) -> Tensor:
    """In place `param -= shrink * param + step_size * update`; returns `param`.

    `step_size` is the learning rate times the scale of the update, `shrink` the learning rate times the weight decay.
    `cautious`: entries that the update pushes away from zero (opposite signs of parameter and update) are not decayed
    (https://arxiv.org/abs/2510.12402). A half-precision parameter is computed in fp32 and rounded once.
    """
    work = _widened(param)
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


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _weight(value: Number, like: Tensor) -> Number:
    """torch.lerp wants a tensor weight in the dtype of its operands."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value
