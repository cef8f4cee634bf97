"""What an optimizer does to matrices: singular values, rank, orthogonality and size of weights, momentum and updates."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muonlab.optim.scaling import scale_factor
from muonlab.optim.views import matrices


def spectrum(x: Tensor) -> dict[str, Tensor]:
    """Properties of matrices `x` [..., m, n] from their singular values, in fp32 or fp64; each result is [...].

    Returns:
        largest, median, smallest: singular values.
        stable_rank: squared Frobenius over squared spectral norm, from 1 to min(m, n).
        entropy: of the squared singular values as shares of their sum, over log min(m, n): 1 if all are equal, 0 for rank one.
        orthogonality_error: |S^2 - 1| / sqrt(min(m, n)), 0 for a semi-orthogonal matrix.
        All but the singular values themselves are NaN for a matrix of zeros, the last one is 1.
    """
    s = torch.linalg.svdvals(x if x.dtype == torch.float64 else x.float())  # [..., k], falling
    energy = s.square()
    share = energy / energy.sum(-1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(-1) / math.log(max(2, s.shape[-1]))
    return {
        "largest": s[..., 0],
        "median": s[..., s.shape[-1] // 2],
        "smallest": s[..., -1],
        "stable_rank": energy.sum(-1) / energy[..., 0],
        "entropy": entropy,
        "orthogonality_error": (energy - 1).norm(dim=-1) / math.sqrt(s.shape[-1]),
    }


@torch.no_grad()
def watched_step(
    optimizer: torch.optim.Optimizer, step: Callable[[], object] | None = None, most: int = 16
) -> list[dict[str, Any]]:
    """Makes one step and says what it did to every hidden matrix: a row for each stack of matrices of each parameter.

    Costs a copy of the hidden parameters and exact decompositions of up to `most` matrices a stack: once in a while, not in every
    update. `step` replaces `optimizer.step`. Decay is part of what moved a weight, so measure with a weight decay of 0 to see
    the update alone.

    Returns:
        Rows with name, shape (of one matrix), matrices, lr, scale (factor of the convention), update_rms, relative_update (length of
        what was added over that of the weight), cosine (of the update with the exact polar factor of the momentum, mean), and
        the means of `spectrum` over the matrices as weight_*, momentum_* and update_* (the update over lr and scale).
    """
    groups = [group for group in optimizer.param_groups if group.get("rule") == "muon"]
    before = [[param.detach().clone() for param in group["params"]] for group in groups]
    (step or optimizer.step)()
    rows = []
    for group, old in zip(groups, before, strict=True):
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(old))]
        for name, param, start in zip(names, group["params"], old, strict=True):
            state = optimizer.state.get(param, {})
            momentum = state.get("momentum_buffer")
            if momentum is None or momentum.dtype == torch.int8:
                continue
            moved = start - param.detach()
            parts = (matrices(tensor, tuple(group["view"]), param) for tensor in (param.detach(), momentum, moved))
            for weight, average, change in zip(*parts, strict=True):
                rows.append({"name": name, **_row(weight, average, change, group, most)})
    return rows


def _row(weight: Tensor, momentum: Tensor, moved: Tensor, group: dict[str, Any], most: int) -> dict[str, Any]:
    weight, momentum, moved = (x.reshape(-1, *x.shape[-2:]).float() for x in (weight, momentum, moved))
    count, rows, cols = weight.shape
    scale, lr = scale_factor(group["scale"], rows, cols), float(group["lr"])
    row = {"shape": [rows, cols], "matrices": count, "lr": lr, "scale": scale}
    row["update_rms"] = moved.square().mean().sqrt().item()
    row["relative_update"] = (moved.norm() / weight.norm()).item()
    weight, momentum, moved = (x[:most] for x in (weight, momentum, moved))
    u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
    row["cosine"] = torch.cosine_similarity((u @ vh).flatten(1), moved.flatten(1)).mean().item()
    update = moved / (lr * scale) if lr else moved
    for kind, x in (("weight", weight), ("momentum", momentum), ("update", update)):
        row |= {f"{kind}_{name}": value.mean().item() for name, value in spectrum(x).items()}
    return row
