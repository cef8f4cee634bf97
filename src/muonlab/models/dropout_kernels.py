"""Triton kernels for dropout(silu(x)): one draw of the generator makes four numbers, and the backward pass makes them again.

A compiler that fuses torch's own operations draws four numbers for each entry that needs one, and stores the mask.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

QUARTER = 512
"""A program handles four times as many entries."""


def forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Entries of silu(x), each zero with probability p, else over 1 - p. x of any shape, contiguous; seed int64 [1]."""
    y = torch.empty_like(x)
    forward_kernel[(triton.cdiv(x.numel(), 4 * QUARTER),)](x, y, seed, x.numel(), p, 1 / (1 - p), QUARTER, num_warps=4)
    return y


def backward(grad: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Gradient in x for the gradient in `forward(x, seed, p)`."""
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 4 * QUARTER),)
    backward_kernel[grid](grad, x, y, seed, x.numel(), p, 1 / (1 - p), QUARTER, num_warps=4)
    return y


@triton.jit
def _draw(seed, QUARTER: tl.constexpr):
    return tl.rand4x(tl.load(seed), tl.program_id(0) * QUARTER + tl.arange(0, QUARTER))


@triton.jit
def forward_kernel(x, y, seed, count, p, gain, QUARTER: tl.constexpr):
    draws = _draw(seed, QUARTER)
    for i in tl.static_range(4):
        at = tl.program_id(0).to(tl.int64) * 4 * QUARTER + i * QUARTER + tl.arange(0, QUARTER)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        value = tl.where(draws[i] >= p, value * tl.sigmoid(value) * gain, 0.0)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)


@triton.jit
def backward_kernel(grad, x, y, seed, count, p, gain, QUARTER: tl.constexpr):
    draws = _draw(seed, QUARTER)
    for i in tl.static_range(4):
        at = tl.program_id(0).to(tl.int64) * 4 * QUARTER + i * QUARTER + tl.arange(0, QUARTER)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        slope = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32)
        s = tl.sigmoid(value)
        slope = tl.where(draws[i] >= p, slope * gain * s * (1 + value * (1 - s)), 0.0)
        tl.store(y + at, slope.to(y.dtype.element_ty), mask=at < count)
