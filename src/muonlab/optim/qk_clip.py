"""QK-clip: after an update, query and key weights of heads whose attention logits grew too large are scaled back.

Source: Kimi K2, https://arxiv.org/abs/2507.20534. Models that normalise queries and keys do not need it.
"""

import torch
from torch import Tensor

from muonlab.errors import InputError


def max_logits(query: Tensor, key: Tensor, scale: float | None = None, chunk: int = 256) -> Tensor:
    """Largest causal attention logit of every head, without ever holding more than `chunk` rows of logits.

    Args:
        query: [B, H, T, head_dim].
        key: [B, H_kv, T, head_dim]; H must be a multiple of H_kv.
        scale: factor of the logits; None means head_dim ** -0.5.
        chunk: queries at a time.

    Returns:
        [H] fp32, on the device of `query`; no gradient, no host sync.
    """
    _, heads, length, width = query.shape
    with torch.no_grad():
        key = key.repeat_interleave(heads // key.shape[1], dim=1).float()
        largest = torch.full((heads,), -torch.inf, device=query.device)
        positions = torch.arange(length, device=query.device)
        for start in range(0, length, chunk):
            rows = query[:, :, start : start + chunk].float()
            end = start + rows.shape[2]
            logits = rows @ key[:, :, :end].mT  # [B, H, chunk, end]
            future = positions[:end] > positions[start:end, None]
            largest = torch.maximum(largest, logits.masked_fill(future, -torch.inf).amax((0, 2, 3)))
    return largest * (width**-0.5 if scale is None else scale)


@torch.no_grad()
def qk_clip_(query: Tensor, key: Tensor, largest: Tensor, threshold: float = 100.0) -> Tensor:
    """Scales the rows of heads in place so that their largest logit falls to `threshold`; other heads stay bit for bit.

    Args:
        query: weight of the query projection [H * head_dim, d] (a slice of a fused weight will do), without QK-norm.
        key: weight of the key projection [H_kv * head_dim, d].
        largest: largest logit of every head since the last update [H], from `max_logits`; with several micro-batches or
            devices their maximum.
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
    factor = (threshold / largest.clamp(min=threshold)).to(query.dtype)  # [H], at most 1
    of_keys = factor.view(groups, -1).amin(1).sqrt()  # [H_kv]
    of_queries = (factor.view(groups, -1) / of_keys[:, None]).flatten()
    query.mul_(of_queries.repeat_interleave(head_dim)[:, None])
    key.mul_(of_keys.repeat_interleave(head_dim)[:, None])
    return factor
