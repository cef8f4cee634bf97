"""The few custom primitives: head, normalisation, row gather, grouped matmul. Each has exact gradients in every dtype."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HeadStats(NamedTuple):
    """Per token, what a loss over the vocabulary is made of. Cross-entropy is `lse - target_logit`."""

    target_logit: Tensor  # [N] fp32
    lse: Tensor  # [N] fp32: log-sum-exp of the logits
    mean_logit: Tensor  # [N] fp32: mean over the vocabulary
    correct: Tensor  # [N] bool: no other id has a larger logit (at ties: the first such id)


def head_stats(
    h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int = 32 * 2**20, equal_weights: bool = False
) -> HeadStats:
    """Statistics of the logits `h @ weight.T`, with exact gradients and never more than `chunk_bytes` of logits alive.

    Args:
        h: final hidden states [N, d]; under autocast they are cast to its dtype first.
        weight: output head [V, d]; pass the fp32 parameter itself, its gradient is accumulated in its own dtype.
        targets: token ids [N] int64.
        chunk_bytes: bytes of logits alive at any time (at least one token's). When all logits fit, they are kept for
            the backward pass; else they are computed again there, chunk by chunk.
        equal_weights: promise that the loss weighs every token's `lse` the same (a mean of cross-entropies, smoothed or
            not). Its gradient is then made chunk by chunk in the forward pass, no logits are kept and none computed
            twice. Breaking the promise is an error in the backward pass.

    Returns:
        Sums and logits in fp32 (fp64 for fp64 input), differentiable in `h` and `weight` except `correct`.
    """
    h = h.to(autocast_dtype(h))
    with without_autocast(h):
        ahead = equal_weights and torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
        target_logit, lse, correct, *_ = _Head.apply(h, weight, targets, chunk_bytes, ahead)  # type: ignore[no-untyped-call]
        # linear in the logits, so it needs none of them: mean(W h) = mean(W) h
        mean_logit = at_least_fp32(h) @ at_least_fp32(weight).mean(0)
    return HeadStats(target_logit, lse, mean_logit, correct)


@torch.no_grad()
def head_sample(h: Tensor, weight: Tensor, chunk_bytes: int = 32 * 2**20) -> Tensor:
    """Token ids [N] int64 drawn from the model's own distribution softmax(h @ weight.T), by the Gumbel-max trick.

    Arguments as in `head_stats`; logits and their noise together stay below `chunk_bytes`. Draws from torch's global
    generator.
    """
    h = h.to(autocast_dtype(h))
    low = weight.to(h.dtype)
    drawn = torch.empty(h.shape[0], dtype=torch.int64, device=h.device)
    with without_autocast(h):
        for part in _chunks(h.shape[0], weight.shape[0], torch.promote_types(h.dtype, torch.float32), chunk_bytes // 2):
            logits = _matmul(h[part], low.T)
            # the negative logarithm of an exponential variable is a Gumbel variable
            drawn[part] = logits.sub_(torch.empty_like(logits).exponential_().log_()).argmax(-1)
            del logits
    return drawn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, arXiv 1910.07467).

    On CPU torch has no fused kernel for it, and its derived backward makes twice the passes of the formula. A compiler
    fuses the derived form as well, and torch 2.11 was seen to compile a custom one into wrong gradients, without a word.
    """
    low = x.dtype not in (torch.float32, torch.float64) or (weight is not None and weight.dtype != x.dtype)
    if low or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def gather_rows(x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
    """Rows `x[order // copies]`: each row of x [n, d] `copies` times, permuted.

    `order` [n · copies] is a permutation and `inverse` its inverse, so the backward pass is a gather too: its sums have
    a fixed order on every device.
    """
    y: Tensor = _GatherRows.apply(x, order, inverse, copies)  # type: ignore[no-untyped-call]
    return y


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[i] @ weight[e].T` for the expert e that owns row i: rows sorted by expert, expert e's end before `ends[e]`.

    Args:
        x: [n, in], computed in autocast's dtype under autocast.
        weight: [E, out, in].
        ends: [E] int32, non-decreasing; the last is n.

    One grouped matmul where torch has it for the dtype and alignment. Otherwise (fp64, odd widths, all but bf16 on a GPU,
    where torch's own fallback asks the device for the group sizes) every expert sees every row, with the rows of others
    set to zero: E times the work, exact, and as free of host synchronisation.
    """
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if _has_grouped_mm(x, weight):
        grouped_mm = F.grouped_mm
        if torch.compiler.is_compiling() and x.dtype == torch.float32:
            # tracing knows bf16 alone, the CPU's kernel fp32 too
            grouped_mm = torch.compiler.disable(F.grouped_mm)  # type: ignore[no-untyped-call]
        return grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    owner = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device, dtype=ends.dtype), right=True)  # [n]
    mine = owner == torch.arange(weight.shape[0], device=x.device)[:, None]  # [E, n]
    return torch.bmm(x * mine[..., None], weight.transpose(-2, -1)).sum(0)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or unchanged when it is fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matmul of x runs: autocast's on x's device, else x's own."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> torch.autocast:
    """A region where the matmuls on x's device keep the dtype of their operands."""
    return torch.autocast(x.device.type, enabled=False)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    if x.dtype == torch.float64 or (x.is_cuda and x.dtype != torch.bfloat16):
        return False
    return all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 sums and result (fp64 for fp64)."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
    return a @ b


class _Head(torch.autograd.Function):
    """(target_logit, lse, correct, kept, expected, product); the last three are for the backward pass, or empty.

    With p the softmax [N, V], d lse / d logits = p. `kept` is p where all of it may be kept. `ahead` makes what the
    backward pass needs of it at once: `expected` = p @ weight [N, d], the gradient of lse in h, and `product` = p.T @ h
    [V, d], the gradient of the sum of all lse in weight. Otherwise the upstream gradient of a token scales its row, so it
    is applied to rows of width d before and after the matmuls: the backward pass touches the logits in matmuls only.
    """

    @staticmethod
    def forward(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int, ahead: bool) -> tuple[Tensor, ...]:
        n, weight = h.shape[0], weight.to(h.dtype)
        dtype = torch.promote_types(h.dtype, torch.float32)
        target_logit, lse, kept = (torch.empty(size, dtype=dtype, device=h.device) for size in (n, n, 0))
        expected = torch.empty(h.shape if ahead else 0, dtype=dtype, device=h.device)
        product = torch.zeros(weight.shape if ahead else 0, dtype=dtype, device=h.device)
        correct = torch.empty(n, dtype=torch.bool, device=h.device)
        if ahead and h.device.type == "cpu":
            # 256 rows keep a small vocabulary's logits in a core's cache and a large one's matmuls at full speed
            chunk_bytes = min(chunk_bytes, 256 * weight.shape[0] * dtype.itemsize)
        chunks = _chunks(n, weight.shape[0], dtype, chunk_bytes)
        for part in chunks:
            logits = _matmul(h[part], weight.T)  # [rows, V]
            largest, where = logits.max(-1)
            target_logit[part] = logits.gather(1, targets[part, None]).squeeze(1)
            correct[part] = where == targets[part]
            torch.softmax(logits, -1, out=logits)
            # the largest probability is at least 1/V: its logarithm loses nothing
            lse[part] = largest - logits.gather(1, where[:, None]).squeeze(1).log()
            if ahead:
                p = logits.to(h.dtype)
                expected[part] = _matmul(p, weight)
                _add_product(product, p, h[part])
                del p
            elif len(chunks) == 1:
                kept = logits
            del logits  # before the next chunk's are made
        return target_logit, lse, correct, kept, expected, product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, targets, ctx.chunk_bytes, ctx.ahead = inputs
        _, lse, correct, kept, expected, product = output
        ctx.mark_non_differentiable(correct, kept, expected, product)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, targets, lse, kept, expected, product)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        h, weight, targets, lse, kept, expected, product = ctx.saved_tensors
        grad_target, grad_lse = grads[:2]
        low = weight.to(h.dtype)
        grad_h, grad_weight = torch.zeros_like(h, dtype=lse.dtype), torch.zeros_like(weight, dtype=lse.dtype)
        with without_autocast(h):
            if grad_target is not None:
                grad_h += low[targets] * grad_target[:, None]
                grad_weight.index_add_(0, targets, h * grad_target[:, None])
            if grad_lse is not None and ctx.ahead:
                equal = (grad_lse == grad_lse[0]) | grad_lse.isnan()
                torch._assert_async(equal.all(), "head_stats(equal_weights=True): the loss weighs tokens differently")
                grad_h += expected * grad_lse[:, None]
                grad_weight += product * grad_lse[0]
            elif grad_lse is not None:
                scaled = (h * grad_lse[:, None]).to(h.dtype)
                chunks = _chunks(h.shape[0], weight.shape[0], lse.dtype, ctx.chunk_bytes)
                for part in chunks:
                    if len(chunks) == 1:
                        p = kept
                    else:
                        p = _matmul(h[part], low.T).sub_(lse[part, None]).exp_()
                    p = p.to(h.dtype)
                    grad_h[part] += _matmul(p, low) * grad_lse[part, None]
                    _add_product(grad_weight, p, scaled[part])
                    del p
        return grad_h.to(h.dtype), grad_weight.to(weight.dtype), None, None, None


def _add_product(total: Tensor, p: Tensor, rows: Tensor) -> None:
    """In place total += p.T @ rows, with the sums in the dtype of `total`."""
    if p.dtype == total.dtype:
        torch.addmm(total, p.T, rows, out=total)
    else:
        total += _matmul(p.T, rows)


def _chunks(n: int, vocab: int, dtype: torch.dtype, chunk_bytes: int) -> list[slice]:
    """Even slices of n tokens whose logits take at most chunk_bytes each."""
    most = max(1, chunk_bytes // (vocab * dtype.itemsize))
    rows = max(1, math.ceil(n / max(1, math.ceil(n / most))))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y = x * _inverse_rms(x, eps)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        scale = _inverse_rms(x, ctx.eps)
        normal = x * scale
        # `along` is the part of the gradient that would only change the length of x
        if weight is None:
            along = torch.linalg.vecdot(grad, normal).div_(x.shape[-1]).unsqueeze(-1)
            return (grad - normal.mul_(along)).mul_(scale), None, None
        product = grad * normal
        along = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        return (grad * weight).sub_(normal.mul_(along)).mul_(scale), product.flatten(0, -2).sum(0), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    mean_square: Tensor = torch.linalg.vecdot(x, x) / x.shape[-1]
    return (mean_square + eps).rsqrt().unsqueeze(-1)  # [..., 1]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.copies = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grad.index_select(0, inverse)
        return rows.view(-1, ctx.copies, rows.shape[-1]).sum(1) if ctx.copies > 1 else rows, None, None, None
