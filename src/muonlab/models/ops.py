"""The few custom primitives of the models."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class HeadStats(NamedTuple):
    """Per token, what a loss over the vocabulary is made of. Cross-entropy is `lse - target_logit`."""

    target_logit: Tensor  # [N] fp32
    lse: Tensor  # [N] fp32: log-sum-exp of the logits
    mean_logit: Tensor  # [N] fp32: mean over the vocabulary
    correct: Tensor  # [N] bool: the target has the largest logit (the first such id, at ties)


def head_stats(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = 32 * 2**20) -> HeadStats:
    """Statistics of the logits `h @ weight.T` with exact gradients, without ever holding more than `chunk_bytes` of them.

    Args:
        h: final hidden states [N, d].
        weight: output head [V, d].
        targets: token ids [N] int64.
        chunk_bytes: bytes of fp32 logits alive at any time. When all of them fit they are kept for the backward pass,
            else they are computed again there, chunk by chunk.
    """
    target_logit, lse, correct, *_ = _Head.apply(h, weight, targets, chunk_bytes)
    # linear in the logits: needs none of them
    mean_logit = h.to(target_logit.dtype) @ weight.to(target_logit.dtype).mean(0)
    return HeadStats(target_logit, lse, mean_logit, correct)


class _Head(torch.autograd.Function):
    """(target_logit, lse, correct, softmax kept for the backward pass or an empty tensor)."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int) -> tuple[Tensor, ...]:
        n, vocab = h.shape[0], weight.shape[0]
        rows = max(1, chunk_bytes // (vocab * h.element_size()))
        lse, target_logit = h.new_empty(n), h.new_empty(n)
        correct = torch.empty(n, dtype=torch.bool, device=h.device)
        probabilities = h.new_empty(0)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = h[part] @ weight.T  # [rows, V]
            largest, where = logits.max(-1)
            target_logit[part] = logits.gather(1, targets[part, None]).squeeze(1)
            correct[part] = where == targets[part]
            torch.softmax(logits, -1, out=logits)
            lse[part] = largest - logits.gather(1, where[:, None]).squeeze(1).log()
            if rows >= n:
                probabilities = logits
        return target_logit, lse, correct, probabilities

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, targets, ctx.chunk_bytes = inputs
        _, lse, correct, probabilities = output
        ctx.mark_non_differentiable(correct, probabilities)
        ctx.save_for_backward(h, weight, targets, lse, probabilities)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, weight, targets, lse, probabilities = ctx.saved_tensors
        grad_target, grad_lse = grads[0], grads[1]
        n, vocab = h.shape[0], weight.shape[0]
        rows = max(1, ctx.chunk_bytes // (vocab * h.element_size()))
        grad_h = weight[targets] * grad_target[:, None]
        grad_weight = torch.zeros_like(weight).index_add_(0, targets, h * grad_target[:, None])
        scaled = h * grad_lse[:, None]
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            p = probabilities if rows >= n else (h[part] @ weight.T).sub_(lse[part, None]).exp_()
            grad_h[part] += (p @ weight) * grad_lse[part, None]
            grad_weight.addmm_(p.T, scaled[part])
        return grad_h, grad_weight, None, None
