"""QK-clip: after an update, query and key weights of heads whose attention logits grew too large are scaled back.

An attention module takes part if it has an attribute `logit_meter`, None until it is asked for, that its forward pass calls with
queries and keys in training, and a method `query_key()` that returns the parameters behind them. `Muon(model, qk_clip=100.0)` puts
meters in, reads them in every step and sets them back. Source: Kimi K2, https://arxiv.org/abs/2507.20534. Models that normalise
queries and keys do not need it.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from muonlab.errors import InputError


class MeteredAttention(Protocol):
    """What an attention module offers to be clipped."""

    logit_meter: nn.Module | None

    def query_key(self) -> tuple[Sequence[Tensor], Sequence[Tensor], int] | None:
        """What scales queries, what scales keys, and H, the number of query heads.

        The first are the weight [H * head_dim, d], and the bias [H * head_dim] if there is one, or such parts of fused
        parameters; the second the same for H_kv heads. None if their scale does not matter.
        """


class LogitMeter(nn.Module):
    """Keeps the largest attention logit of every head since it was last read: `meter(query, key, mask)` in the forward pass.

    Exact: one more product of queries and keys, about a seventh of what attention computes forward and backward. It works
    compiled and captured. With several processes reduce `largest` over them by its maximum before the step, and let
    DistributedDataParallel leave buffers alone (`broadcast_buffers=False`).
    """

    largest: Tensor

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("largest", torch.full((heads,), -torch.inf, device=device), persistent=False)

    @torch.no_grad()
    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None) -> None:
        """Arguments as those of `max_logits`."""
        self.largest.copy_(torch.maximum(self.largest, max_logits(query, key, scale, mask=mask)))


def metered(model: nn.Module) -> list[MeteredAttention]:
    """The attention modules of `model` that can be clipped, each with a meter from now on."""
    found: list[MeteredAttention] = []
    for module in model.modules():
        if not (hasattr(module, "logit_meter") and hasattr(module, "query_key")):
            continue
        attention = cast(MeteredAttention, module)
        parts = attention.query_key()
        if parts is not None:
            if attention.logit_meter is None:
                attention.logit_meter = LogitMeter(parts[2], parts[0][0].device)
            found.append(attention)
    if not found:
        raise InputError(
            "qk_clip: no attention of this model has a `logit_meter` and `query_key()` (see muonlab.optim.qk_clip), or all "
            "normalise queries and keys, which bounds their logits already"
        )
    return found


@torch.no_grad()
def clip_attention_(modules: Sequence[MeteredAttention], threshold: float, keep: Tensor | None = None) -> None:
    """`qk_clip_` for every module by what its meter saw, and sets the meters back. No host sync.

    `keep`, a boolean on the device: False changes no weight.
    """
    for module in modules:
        parts, meter = module.query_key(), module.logit_meter
        assert parts is not None
        assert isinstance(meter, LogitMeter)
        largest = meter.largest if keep is None else torch.where(keep, meter.largest, -torch.inf)
        for query, key in zip(parts[0], parts[1], strict=True):
            qk_clip_(query, key, largest, threshold)
        meter.largest.fill_(-torch.inf)


def max_logits(
    query: Tensor, key: Tensor, scale: float | None = None, chunk: int = 256, mask: Tensor | None = None
) -> Tensor:
    """Largest causal attention logit of every head, without ever holding more than `chunk` rows of logits.

    Args:
        query: [B, H, T, head_dim].
        key: [B, H_kv, T, head_dim]; H must be a multiple of H_kv.
        scale: factor of the logits; None means head_dim ** -0.5.
        chunk: queries at a time.
        mask: [B, 1, T, T] or alike, True where a query sees a key; None means causal.

    Returns:
        [H] fp32, on the device of `query`, from products in its dtype; no gradient, no host sync.
    """
    _, heads, length, width = query.shape
    with torch.no_grad():
        query = query * (width**-0.5 if scale is None else scale)
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        largest = torch.full((heads,), -torch.inf, device=query.device)
        positions = torch.arange(length, device=query.device)
        for start in range(0, length, chunk):
            rows = query[:, :, start : start + chunk]
            end = start + rows.shape[2]
            logits = rows @ key[:, :, :end].mT  # [B, H, chunk, end]
            hidden = positions[:end] > positions[start:end, None]
            if mask is not None:
                hidden = hidden | ~mask[..., start:end, :end]
            largest = torch.maximum(largest, logits.masked_fill(hidden, -torch.inf).amax((0, 2, 3)).float())
    return largest


@torch.no_grad()
def qk_clip_(query: Tensor, key: Tensor, largest: Tensor, threshold: float = 100.0) -> Tensor:
    """Scales the rows of heads in place so that their largest logit falls to `threshold`; other heads stay bit for bit.

    Args:
        query: weight of the query projection [H * head_dim, d] (a slice of a fused weight will do), or its bias
            [H * head_dim], without QK-norm.
        key: weight of the key projection [H_kv * head_dim, d], or its bias.
        largest: largest logit of every head since the last update [H], from `max_logits`; with several micro-batches or
            devices their maximum. A head whose logits are not finite is left alone.
        threshold: the bound (100 in the paper).

    Returns:
        [H], the factor by which every head's logits were multiplied.

    The factor is shared between query and key as its root; with grouped queries a key head takes the root of the smallest
    factor of its group and each query head what remains.
    """
    heads = largest.shape[0]
    if threshold <= 0:
        raise InputError(f"threshold must be above 0, got {threshold}")
    if query.shape[0] % heads:
        raise InputError(f"{query.shape[0]} query rows cannot be divided into {heads} heads")
    head_dim = query.shape[0] // heads
    groups = key.shape[0] // head_dim
    if key.shape[0] % head_dim or heads % groups:
        raise InputError(f"{key.shape[0]} key rows do not fit {heads} heads of {head_dim}")
    largest = torch.where(torch.isfinite(largest), largest, 0.0)
    factor = threshold / largest.clamp(min=threshold)  # [H], at most 1
    of_keys = factor.view(groups, -1).amin(1).sqrt()  # [H_kv]
    of_queries = (factor.view(groups, -1) / of_keys[:, None]).flatten()
    for rows, factors in ((query, of_queries), (key, of_keys)):
        rows.mul_(factors.to(rows.dtype).repeat_interleave(head_dim).view(-1, *[1] * (rows.ndim - 1)))
    return factor
