"""Variants of Muon: what is done to the gradient before the momentum, to the direction before it is orthogonalised, and to the
update after. Functions of stacks [..., m, n] that advance their state in place and change nothing else; `rules.muon` puts them
in order.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = float | Tensor


class Variant(NamedTuple):
    """Which variants are on, by the names that they have in `options.MuonOptions`; all off is plain Muon."""

    mars_gamma: float | None = None
    laprop_beta: Number | None = None
    row_fraction: float | None = None
    sign_momentum: bool = False
    equilibrate_rows: bool = False
    renormalize: bool = False
    normuon_beta: Number | None = None
    normuon_axis: str = "rows"
    nuclear_scale: bool = False
    cautious_update: bool = False

    @property
    def state(self) -> tuple[str, ...]:
        """State tensors like the parameter that they need besides the momentum."""
        needed = {
            "previous_grad": self.mars_gamma is not None,
            "squared_grad": self.laprop_beta is not None,
            "second_moment": self.normuon_beta is not None and self.normuon_axis == "entries",
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def second_moment_shape(self, stack: Tensor) -> tuple[int, ...] | None:
        """Shape of the `second_moment` of a stack [k, m, n] where it is smaller than that; None if there is none."""
        if self.normuon_beta is None or self.normuon_axis == "entries":
            return None
        gone = _averaged(self.normuon_axis, stack)
        return tuple(1 if axis - stack.ndim in gone else size for axis, size in enumerate(stack.shape))

    @property
    def rests_at_weight_zero(self) -> bool:
        """Whether weight 0 in every average leaves all state of a matrix as it was."""
        return not self.state and self.row_fraction is None and self.normuon_axis != "sum"


def variant_of(group: Mapping[str, Any]) -> Variant:
    """The variants of a parameter group; one that it does not name is off."""
    return Variant(**{name: group[name] for name in Variant._fields if name in group})


def variance_reduced(grad: Tensor, previous: Tensor, gamma: float, momentum: Number) -> Tensor:
    """MARS: the gradient plus `gamma * momentum / (1 - momentum)` times its change since the last update.

    `previous` is that of the last update (at first zero) and becomes this one. Source: https://arxiv.org/abs/2411.10438, the
    variant in which each gradient is of its own batch.
    """
    grad = grad.to(previous.dtype)
    corrected = grad + (grad - previous) * (gamma * momentum / (1 - momentum))
    previous.copy_(grad)
    return corrected


def divided_by_rms(grad: Tensor, squares: Tensor, beta: Number) -> Tensor:
    """LaProp: entries over the root of the running average of their squares, which begins with the first that is not zero.

    Source: https://arxiv.org/abs/2002.04839; in front of Muon as in HeavyBall's MuonLaProp.
    """
    now = grad.to(squares.dtype).square()
    squares.copy_(torch.where(squares == 0, now, squares + (now - squares) * (1 - beta)))
    return grad * torch.where(squares > 0, squares.rsqrt(), 0.0)


def chosen_rows(buffer: Tensor, fraction: float, decay: Number, orthogonalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Dion2: only the rows (of a tall matrix the columns) with the largest sums of absolute values are orthogonalised.

    `buffer` [..., m, n] adds gradients up; of the chosen `fraction` of rows `decay` is left in it, the others wait at full
    size. The update is zero where nothing was chosen. Source: https://arxiv.org/abs/2512.16928, microsoft/dion dion2.py.
    """
    if buffer.shape[-2] > buffer.shape[-1]:
        return chosen_rows(buffer.mT, fraction, decay, orthogonalize).mT
    count = max(1, math.ceil(fraction * buffer.shape[-2]))
    index = buffer.abs().sum(-1).topk(count, dim=-1, sorted=False).indices  # [..., count]
    index = index[..., None].expand(*index.shape, buffer.shape[-1])
    chosen = buffer.gather(-2, index)
    update = orthogonalize(chosen)
    buffer.scatter_(-2, index, chosen * decay)
    return torch.zeros_like(buffer, dtype=update.dtype).scatter_(-2, index, update)


def equilibrated_rows(x: Tensor) -> Tensor:
    """MuonEq: every row [..., m, n] at the mean row norm, a better conditioned start. Source: https://arxiv.org/abs/2603.28254."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., m, 1]
    mean = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / math.sqrt(x.shape[-2])
    result: Tensor = x * (mean / rows.clamp(min=torch.finfo(x.dtype).tiny))
    return result


def renormalized(update: Tensor) -> Tensor:
    """Muon+: the Frobenius norm of an exactly semi-orthogonal matrix, sqrt(min(m, n)). Source: https://arxiv.org/abs/2602.21545."""
    return with_norm(widened(update), math.sqrt(min(update.shape[-2:])))


def normalized(update: Tensor, second_moment: Tensor, beta: Number, axis: str = "rows") -> Tensor:
    """The update over the root of the running mean of its squares, brought back to its Frobenius norm.

    `second_moment`, advanced in place, has one number for every row [..., m, 1] (axis "rows": NorMuon,
    https://arxiv.org/abs/2510.05491), for whichever of rows and columns are more ("long", as nanochat does), or for every
    entry ("entries": AdaMuon, https://arxiv.org/abs/2507.11005, with the norm of an exactly orthogonal matrix). What has no
    update keeps its number.
    """
    update = widened(update)
    squares = update.square().to(second_moment.dtype)
    across = _averaged(axis, update)
    if across:
        squares = squares.mean(across, keepdim=True)
    second_moment.lerp_(torch.where(squares > 0, squares, second_moment), weight(1 - beta, second_moment))
    norm = math.sqrt(min(update.shape[-2:])) if axis == "entries" else frobenius(update)
    return with_norm(update * second_moment.clamp(min=1e-10).rsqrt(), norm)


def sized_by_gradient(
    update: Tensor, second_moment: Tensor, beta: Number, axis: str, grad: Tensor, direction: Tensor
) -> Tensor:
    """The update of a matrix times a step size of its own, from norms; `second_moment` [..., 1, 1] is advanced in place.

    Axis "norm" is NAMO: the norm of the direction that was orthogonalised over the root of the running mean of squared gradient
    norms (https://arxiv.org/abs/2602.17080). "sum" is AdaGO: the norm of the gradient over the root of the sum of all its squares
    so far, at least 0.01 (https://arxiv.org/abs/2509.02981; clipping the gradient first is left to the loop).
    """
    size = frobenius(grad.to(second_moment.dtype))
    if axis == "sum":
        second_moment.add_(size.square())
        return update * torch.where(second_moment > 0, (size * second_moment.rsqrt()).clamp(min=0.01), 0.0)
    second_moment.lerp_(size.square(), weight(1 - beta, second_moment))
    return update * torch.where(second_moment > 0, frobenius(direction) * second_moment.rsqrt(), 0.0)


def cautious(update: Tensor, grad: Tensor) -> Tensor:
    """Only entries of the update that agree in sign with the gradient, the others made up for by a larger step.

    Source: https://arxiv.org/abs/2411.16085.
    """
    agrees = update.sign() * grad.sign() > 0
    share = agrees.to(torch.float32).mean((-2, -1), keepdim=True)
    return torch.where(agrees, update, 0.0) / torch.where(share > 0, share, 1.0)


def frobenius(x: Tensor) -> Tensor:
    """Frobenius norms [..., 1, 1] of matrices [..., m, n]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


def with_norm(x: Tensor, norm: Number) -> Tensor:
    """`x` [..., m, n] scaled to a Frobenius norm (a number or [..., 1, 1]); zero stays zero."""
    own = frobenius(x)
    return x * torch.where(own > 0, norm / own, 0.0)


def widened(x: Tensor) -> Tensor:
    """Half precision as fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def weight(value: Number, like: Tensor) -> Number:
    """torch.lerp wants a tensor weight in the dtype of its operands."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _averaged(axis: str, stack: Tensor) -> tuple[int, ...]:
    """The axes that one number of the second moment stands for."""
    if axis == "long":
        return (-1,) if stack.shape[-2] >= stack.shape[-1] else (-2,)
    return {"rows": (-1,), "entries": (), "norm": (-2, -1), "sum": (-2, -1)}[axis]
