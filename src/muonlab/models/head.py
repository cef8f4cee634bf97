"""The head: what any loss needs of the logits of a vocabulary, without ever holding all of them.

Three ways, all with exact gradients. In chunks through torch, everywhere. Training on a GPU in bf16 with `NARROW` or fewer
hidden units, tile by tile in Triton: no logit is ever written to memory. Training on a GPU in bf16 otherwise, where the loss
weighs tokens equally, in chunks whose softmax is one Triton kernel over bf16 logits, as a linear layer under autocast makes
them.
"""

import functools
import importlib.util
import math
import types
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonlab.models.ops import at_least_fp32, autocast_dtype, without_autocast

NARROW = 128
"""Most hidden units for which making every logit three times is cheaper than writing it once."""


class HeadStats(NamedTuple):
    """Per token, what a loss over the vocabulary is made of. Cross-entropy is `lse - target_logit`."""

    target_logit: Tensor  # [N] fp32
    lse: Tensor  # [N] fp32: log-sum-exp of the logits
    mean_logit: Tensor  # [N] fp32: mean over the vocabulary
    correct: Tensor  # [N] bool: no other id has a larger logit (at ties the first such id; in Triton any of them)


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
            twice. Breaking the promise is an error in the backward pass, except where the promise is not needed (tile by
            tile).

    Returns:
        Sums in fp32 (fp64 for fp64 input), differentiable in `h` and `weight` except `correct`; those of bf16 logits with
        `equal_weights` on a GPU, else of fp32 ones. A target outside of the vocabulary is an error or NaN.
    """
    h = h.to(autocast_dtype(h))
    with without_autocast(h):
        training = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
        if training and _is_narrow(h):
            target_logit, lse, correct, _ = _NarrowHead.apply(h, weight, targets, chunk_bytes)  # type: ignore[no-untyped-call]
        else:
            ahead = equal_weights and training
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
        weight = weight.to(h.dtype)
        dtype = torch.promote_types(h.dtype, torch.float32)
        # fp16 would overflow where fp32 logits do not
        fused = ahead and h.is_cuda and h.dtype == torch.bfloat16
        kept = torch.empty(0, dtype=dtype, device=h.device)
        product: Tensor | None = None
        if ahead and h.device.type == "cpu":
            # 256 rows keep a small vocabulary's logits in a core's cache and a large one's matmuls at full speed
            chunk_bytes = min(chunk_bytes, 256 * weight.shape[0] * dtype.itemsize)
        if fused:  # logits and their softmax are alive together
            chunks = _chunks(h.shape[0], weight.shape[0], h.dtype, chunk_bytes // 2)
        else:
            chunks = _chunks(h.shape[0], weight.shape[0], dtype, chunk_bytes)
        found = []
        for part in chunks:
            if fused:
                p, target_logit, lse, correct = softmax_rows(h[part] @ weight.T, targets[part])
            else:
                p, target_logit, lse, correct = _softmax(_matmul(h[part], weight.T), targets[part])
            expected = kept.clone()
            if ahead:
                low = p.to(h.dtype)
                expected = _matmul(low, weight)
                product = _matmul(low.T, h[part]) if product is None else _add_product(product, low, h[part])
                del low
            elif len(chunks) == 1:
                kept = p
            del p  # before the next chunk's is made
            found.append((target_logit, lse, correct, expected))
        target_logit, lse, correct, expected = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*found))
        return target_logit, lse, correct, kept, expected, kept.clone() if product is None else product

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


class _NarrowHead(torch.autograd.Function):
    """(target_logit, lse, correct, expected), the last for the backward pass: softmax @ weight, the gradient of lse in h."""

    @staticmethod
    def forward(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int) -> tuple[Tensor, ...]:
        out: tuple[Tensor, ...] = narrow_head(h.contiguous(), weight.to(h.dtype).contiguous(), targets, chunk_bytes)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, weight, targets, ctx.chunk_bytes = inputs
        _, lse, correct, expected = output
        ctx.mark_non_differentiable(correct, expected)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, targets, lse, expected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        h, weight, targets, lse, expected = ctx.saved_tensors
        grad_target, grad_lse = (torch.zeros_like(lse) if grad is None else grad for grad in grads[:2])
        low = weight.to(h.dtype).contiguous()
        grad_h = expected * grad_lse[:, None] + low[targets] * grad_target[:, None]
        grad_weight = narrow_head_gradient(h.contiguous(), low, targets, lse, grad_target, grad_lse, ctx.chunk_bytes)
        return grad_h.to(h.dtype), grad_weight.to(weight.dtype), None, None


@torch.library.custom_op("muonlab::softmax_rows", mutates_args=())
def softmax_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax of logits [N, V] in their dtype; the target's logit, the log-sum-exp [N] fp32; whether it is the largest [N]."""
    kernels = _kernels(logits.device)
    if kernels is not None:
        return kernels.softmax(logits.contiguous(), targets.contiguous())  # type: ignore[no-any-return]
    p, target_logit, lse, correct = _softmax(logits.float(), targets)
    return p.to(logits.dtype), target_logit, lse, correct


@softmax_rows.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return torch.empty_like(logits), one, torch.empty_like(one), torch.empty_like(one, dtype=torch.bool)


@torch.library.custom_op("muonlab::narrow_head", mutates_args=())
def narrow_head(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The target's logit, log-sum-exp [N] fp32, whether it is the largest [N], softmax @ weight [N, d] fp32; h, weight [V, d]
    contiguous in one half precision."""
    kernels = _kernels(h.device)
    if kernels is not None:
        return kernels.forward(h, weight, targets.contiguous())  # type: ignore[no-any-return]
    found = []
    for part in _chunks(h.shape[0], weight.shape[0], torch.float32, chunk_bytes // 2):
        p, target_logit, lse, correct = _softmax(_matmul(h[part], weight.T), targets[part])
        found.append((target_logit, lse, correct, _matmul(p.to(h.dtype), weight)))
    target_logit, lse, correct, expected = (torch.cat(values) for values in zip(*found))
    return target_logit, lse, correct, expected


@narrow_head.register_fake
def _(h: Tensor, weight: Tensor, targets: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = h.new_empty(h.shape[0], dtype=torch.float32)
    return one, torch.empty_like(one), torch.empty_like(one, dtype=torch.bool), torch.empty_like(h, dtype=torch.float32)


@torch.library.custom_op("muonlab::narrow_head_gradient", mutates_args=())
def narrow_head_gradient(
    h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad_target: Tensor, grad_lse: Tensor, chunk_bytes: int
) -> Tensor:
    """Gradient in weight [V, d] fp32 from those of the target's logits and of their log-sum-exps [N] fp32."""
    kernels = _kernels(h.device)
    if kernels is not None:
        # the gradient of a sum is one number, expanded
        dense = [x.contiguous() for x in (targets, lse, grad_target, grad_lse)]
        return kernels.backward(h, weight, *dense)  # type: ignore[no-any-return]
    total = torch.zeros_like(weight, dtype=torch.float32)
    for part in _chunks(h.shape[0], weight.shape[0], torch.float32, chunk_bytes):
        p = _matmul(h[part], weight.T).sub_(lse[part, None]).exp_().to(h.dtype)
        _add_product(total, p, (h[part] * grad_lse[part, None]).to(h.dtype))
    return total.index_add_(0, targets, h * grad_target[:, None])


@narrow_head_gradient.register_fake
def _(
    h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad_target: Tensor, grad_lse: Tensor, chunk_bytes: int
) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _is_narrow(h: Tensor) -> bool:
    # in fp16 the gradient of one logit would be too small to be a factor of a product
    return h.is_cuda and h.dtype == torch.bfloat16 and h.shape[1] <= NARROW and h.shape[1] % 8 == 0


@functools.cache
def _kernels(device: torch.device) -> types.ModuleType | None:
    """The Triton kernels where they compile and agree with torch, else None; what a compiler got wrong must not train a
    model in silence."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from muonlab.models import head_kernels

        reason = head_kernels.disagreement(device)
    except Exception as error:  # a compiler's failure may be of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
    if reason is None:
        return head_kernels
    warnings.warn(f"the head's Triton kernels are not used on this GPU ({reason}): slower", stacklevel=2)
    return None


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `softmax_rows`, in place, in fp32 or fp64."""
    largest, where = logits.max(-1)
    target_logit = _at(logits, targets)
    torch.softmax(logits, -1, out=logits)
    # the largest probability is at least 1/V: its logarithm loses nothing
    lse = largest - _at(logits, where).log()
    return logits, target_logit, lse, where == targets


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1)


def _add_product(total: Tensor, p: Tensor, rows: Tensor) -> Tensor:
    """In place total += p.T @ rows, with the sums in the dtype of `total`."""
    if p.dtype == total.dtype:
        return torch.addmm(total, p.T, rows, out=total)
    return total.add_(_matmul(p.T, rows))


def _chunks(n: int, vocab: int, dtype: torch.dtype, chunk_bytes: int) -> list[slice]:
    """Even slices of n tokens whose logits take at most chunk_bytes each."""
    most = max(1, chunk_bytes // (vocab * dtype.itemsize))
    rows = max(1, math.ceil(n / max(1, math.ceil(n / most))))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
