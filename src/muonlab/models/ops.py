"""The few custom primitives beside the head: normalisation, dropout of silu, row gather, grouped matmul.

Each has exact gradients in every dtype.
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


def silu_dropout(x: Tensor, p: float) -> Tensor:
    """dropout(silu(x), p), 0 < p < 1, with a mask from torch's global generator; in half precision on a GPU one Triton kernel."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _drops_in_triton(x.get_device()):
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
        y: Tensor = _silu_dropout(x.contiguous(), seed, p)
        return y
    return F.dropout(F.silu(x), p)


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


@torch.library.custom_op("muonlab::silu_dropout", mutates_args=())
def _silu_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    from muonlab.models import dropout_kernels

    return dropout_kernels.forward(x, seed, p)


@torch.library.custom_op("muonlab::silu_dropout_backward", mutates_args=())
def _silu_dropout_backward(grad: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    from muonlab.models import dropout_kernels

    return dropout_kernels.backward(grad, x, seed, p)


@_silu_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


@_silu_dropout_backward.register_fake
def _(grad: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, ctx.p = inputs
    ctx.save_for_backward(x, seed)


def _silu_dropout_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _silu_dropout_backward(grad.contiguous(), *ctx.saved_tensors, ctx.p), None, None


_silu_dropout.register_autograd(_silu_dropout_gradient, setup_context=_keep_for_backward)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _drops_in_triton(device: int) -> bool:
    return _triton_drops(device)


@functools.cache
def _triton_drops(device: int) -> bool:
    """Whether the kernels compile here and drop what they should."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from muonlab.models import dropout_kernels

        x = torch.full((1 << 14,), 2.0, dtype=torch.bfloat16, device=f"cuda:{device}")
        seed = torch.ones(1, dtype=torch.int64, device=x.device)
        y, slopes = dropout_kernels.forward(x, seed, 0.25), dropout_kernels.backward(torch.ones_like(x), x, seed, 0.25)
        kept = y != 0
        s = torch.sigmoid(x[:1].float())
        right = abs(kept.float().mean().item() - 0.75) < 0.05
        right &= torch.allclose(y.float(), kept * 2 * s / 0.75, 1e-2)
        right &= torch.allclose(slopes.float(), kept * s * (3 - 2 * s) / 0.75, 1e-2)
        reason = "they drop the wrong entries"
    except Exception as error:  # a compiler's failure may be of any kind
        right, reason = False, (str(error).splitlines() or [type(error).__name__])[0][:100]
    if not right:
        warnings.warn(f"dropout's Triton kernels are not used on this GPU ({reason}): slower", stacklevel=2)
    return right


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
