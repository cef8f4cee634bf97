"""Triton kernels of the head: softmax of rows of logits, and a head that never writes a logit to memory.

    softmax_kernel     p = softmax(logits), row by row, with what the loss needs
    forward_kernel     log-sum-exp, target's logit and p @ weight, tile by tile with a running maximum
    merge_kernel       parts of a vocabulary put together
    backward_kernel    the gradient in weight, from logits made again tile by tile

The middle ones are attention of hidden states over a vocabulary whose keys and values are both the head's weight
(FlashAttention, https://arxiv.org/abs/2205.14135). Descriptors are read in tiles; outside a tensor they read as zero.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
WHOLE = 65536
"""Largest vocabulary of which a program holds a row in registers."""
PART = 16384
FORWARD, BACKWARD = (128, 128, 8, 3), (64, 64, 4, 3)
"""Tokens and ids of a tile, warps, stages of the pipeline."""


def softmax(logits: Tensor, targets: Tensor, whole: bool | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax [N, V] in the dtype of `logits` [N, V]; target's logit, log-sum-exp [N] fp32; whether it is the largest [N] bool."""
    n, vocab = logits.shape
    p = torch.empty_like(logits)
    target_logit, lse = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    correct = torch.empty(n, dtype=torch.bool, device=logits.device)
    whole = vocab <= WHOLE if whole is None else whole
    block = triton.next_power_of_2(vocab) if whole else PART
    softmax_kernel[(n,)](
        logits, p, targets, target_logit, lse, correct, vocab, whole, block, num_warps=min(max(block // 2048, 4), 16)
    )
    return p, target_logit, lse, correct


def forward(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target's logit, log-sum-exp [N] fp32, whether it is the largest [N] bool, softmax(h @ weight.T) @ weight [N, d] fp32.

    h [N, d] and weight [V, d] in one half-precision dtype, d a multiple of 8 up to 128.
    """
    (n, d), vocab = h.shape, weight.shape[0]
    block, breadth, warps, stages = FORWARD
    width = max(16, triton.next_power_of_2(d))
    rows = triton.cdiv(n, block)
    parts = _parts(rows, triton.cdiv(vocab, breadth), h.device)
    length = triton.cdiv(triton.cdiv(vocab, breadth), parts) * breadth
    sums = torch.empty(parts, 3, n, dtype=torch.float32, device=h.device)
    outputs = torch.empty(parts, n, d, dtype=torch.float32, device=h.device)
    forward_kernel[(rows, parts)](
        _tiles(h, block, width), _tiles(weight, breadth, width), targets, sums, outputs,
        n, vocab, d, length, width, block, breadth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    target_logit, lse = (torch.empty(n, dtype=torch.float32, device=h.device) for _ in range(2))
    correct = torch.empty(n, dtype=torch.bool, device=h.device)
    expected = torch.empty(n, d, dtype=torch.float32, device=h.device)
    merge_kernel[(triton.cdiv(n, 16),)](
        sums, outputs, targets, target_logit, lse, correct, expected, n, vocab, d, parts, width, 16
    )
    return target_logit, lse, correct, expected


def backward(h: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, grad_target: Tensor, grad_lse: Tensor) -> Tensor:
    """Gradient in weight [V, d] fp32: sum over tokens of (grad_target onehot + grad_lse softmax) h. Arguments as above; [N] fp32."""
    (n, d), vocab = h.shape, weight.shape[0]
    block, breadth, warps, stages = BACKWARD
    width = max(16, triton.next_power_of_2(d))
    rows = triton.cdiv(vocab, breadth)
    parts = _parts(rows, triton.cdiv(n, block), h.device)
    length = triton.cdiv(triton.cdiv(n, block), parts) * block
    outputs = torch.empty(parts, vocab, d, dtype=torch.float32, device=h.device)
    backward_kernel[(rows, parts)](
        _tiles(h, block, width), _tiles(weight, breadth, width), targets, lse, grad_target, grad_lse, outputs,
        n, vocab, d, length, width, block, breadth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return outputs[0] if parts == 1 else outputs.sum(0)


def disagreement(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What these kernels get wrong on random numbers, in a few words; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    n, vocab, d = 150, 300, 64
    h, weight = (torch.randn(size, d, generator=generator).to(device, dtype) for size in (n, vocab))
    targets = torch.randint(vocab, (n,), generator=generator).to(device)
    slopes = torch.randn(2, n, generator=generator).to(device)
    logits = h.float() @ weight.float().T
    p, lse = logits.softmax(-1), logits.logsumexp(-1)
    jumps = torch.zeros_like(p).scatter_(1, targets[:, None], slopes[0, :, None])
    low, target, *_ = softmax(logits.to(dtype), targets)
    parts, *_ = softmax(logits.to(dtype), targets, whole=False)
    target_narrow, lse_narrow, _, expected = forward(h, weight, targets)
    gradient = backward(h, weight, targets, lse_narrow, slopes[0], slopes[1])
    pairs = {
        "softmax": (low.float(), p),
        "softmax in parts": (parts.float(), p),
        "target's logit": (torch.cat([target, target_narrow]), logits.gather(1, targets[:, None])[:, 0].repeat(2)),
        "log-sum-exp": (lse_narrow, lse),
        "mean": (expected, p @ weight.float()),
        "gradient": (gradient, (jumps + p * slopes[1][:, None]).T @ h.float()),
    }
    for name, (ours, theirs) in pairs.items():
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < 0.05:
            return f"{name} differs by {error:.2g}"
    return None


def _tiles(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    # Descriptors begin at multiples of 16 bytes; the stride of a single row may be anything.
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, width])


def _parts(programs: int, most: int, device: torch.device) -> int:
    """How many parts to cut an inner loop of `most` steps into, so that its programs fill the device's multiprocessors evenly."""
    if device.type != "cuda":
        return min(2, most)
    slots = torch.cuda.get_device_properties(device).multi_processor_count

    def full(parts: int) -> float:
        count = programs * parts
        return count / (slots * math.ceil(count / slots))

    return max(range(1, min(8, most) + 1), key=lambda parts: full(parts) - 0.02 * parts)


@triton.jit
def softmax_kernel(
    logits,
    p,
    targets,
    target_logit,
    lse,
    correct,
    vocab,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * vocab
    at = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(logits + start + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        largest = tl.max(x, axis=0)
        e = tl.exp2((x - largest) * LOG2E)
        total = tl.sum(e, axis=0)
        tl.store(p + start + at, (e * (1.0 / total)).to(p.dtype.element_ty), mask=at < vocab)
    else:
        most = tl.full([BLOCK], -float("inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            x = tl.load(logits + start + first + at, mask=first + at < vocab, other=-float("inf")).to(tl.float32)
            new = tl.maximum(tl.maximum(most, x), -1e38)
            sums = sums * tl.exp2((most - new) * LOG2E) + tl.exp2((x - new) * LOG2E)
            most = new
        largest = tl.max(most, axis=0)
        total = tl.sum(sums * tl.exp2((most - largest) * LOG2E), axis=0)
        for first in range(0, vocab, BLOCK):
            inside = first + at < vocab
            x = tl.load(logits + start + first + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                p + start + first + at, (tl.exp2((x - largest) * LOG2E) / total).to(p.dtype.element_ty), mask=inside
            )
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < vocab)
    t = tl.load(logits + start + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(target_logit + row, t)
    tl.store(lse + row, largest + tl.log(total))
    tl.store(correct + row, t >= largest)


@triton.jit
def forward_kernel(
    h,  # descriptor [N, d]
    weight,  # descriptor [V, d]
    targets,
    sums,  # fp32 [parts, 3, N]: target's logit if it is here, largest logit, sum of exp(logit - largest)
    outputs,  # fp32 [parts, N, d]: sum of exp(logit - largest) * weight
    n,
    vocab,
    d,
    length,  # ids of a part
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BREADTH: tl.constexpr,
):
    i = tl.program_id(0)
    part = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + rows, mask=rows < n, other=-1).to(tl.int32)
    own = h.load([i * BLOCK, 0])
    # The maximum and the exponentials are in units of log 2; the bound keeps a row of -inf from making NaN.
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.float32)
    output = tl.zeros([BLOCK, WIDTH], tl.float32)
    begin = part * length
    for first in range(begin, tl.minimum(begin + length, vocab), BREADTH):
        keys = weight.load([first, 0])
        logits = tl.dot(own, keys.T)
        ids = first + tl.arange(0, BREADTH)
        found += tl.sum(tl.where(ids[None, :] == target[:, None], logits, 0.0), axis=1)
        logits = tl.where(ids[None, :] < vocab, logits * LOG2E, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        p = tl.exp2(logits - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, axis=1)
        output = tl.dot(p.to(keys.dtype), keys, output * shrink[:, None])
        largest = new
    inside = rows < n
    tl.store(sums + (part * 3 + 0) * n + rows, found, mask=inside)
    tl.store(sums + (part * 3 + 1) * n + rows, largest, mask=inside)
    tl.store(sums + (part * 3 + 2) * n + rows, total, mask=inside)
    cols = tl.arange(0, WIDTH)
    at = (part * n + rows)[:, None].to(tl.int64) * d + cols[None, :]
    tl.store(outputs + at, output, mask=inside[:, None] & (cols[None, :] < d))


@triton.jit
def merge_kernel(
    sums,
    outputs,
    targets,
    target_logit,
    lse,
    correct,
    expected,
    n,
    vocab,
    d,
    parts,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, WIDTH)
    inside = rows < n
    both = inside[:, None] & (cols[None, :] < d)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(sums + (part * 3 + 1) * n + rows, mask=inside, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.float32)
    output = tl.zeros([BLOCK, WIDTH], tl.float32)
    for part in range(parts):
        share = tl.exp2(tl.load(sums + (part * 3 + 1) * n + rows, mask=inside, other=0.0) - largest)
        total += share * tl.load(sums + (part * 3 + 2) * n + rows, mask=inside, other=1.0)
        found += tl.load(sums + part * 3 * n + rows, mask=inside, other=0.0)
        at = (part * n + rows)[:, None].to(tl.int64) * d + cols[None, :]
        output += share[:, None] * tl.load(outputs + at, mask=both, other=0.0)
    target = tl.load(targets + rows, mask=inside, other=0)
    found = tl.where((target >= 0) & (target < vocab), found, float("nan"))
    tl.store(target_logit + rows, found, mask=inside)
    tl.store(lse + rows, largest / LOG2E + tl.log(total), mask=inside)
    # `largest` went through one multiplication more.
    tl.store(correct + rows, found * LOG2E >= largest, mask=inside)
    at = rows[:, None].to(tl.int64) * d + cols[None, :]
    tl.store(expected + at, output / total[:, None], mask=both)


@triton.jit
def backward_kernel(
    h,  # descriptor [N, d]
    weight,  # descriptor [V, d]
    targets,
    lse,
    grad_target,
    grad_lse,
    outputs,  # fp32 [parts, V, d]
    n,
    vocab,
    d,
    length,  # tokens of a part
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BREADTH: tl.constexpr,
):
    i = tl.program_id(0)
    part = tl.program_id(1)
    ids = i * BREADTH + tl.arange(0, BREADTH)
    own = weight.load([i * BREADTH, 0])
    output = tl.zeros([BREADTH, WIDTH], tl.float32)
    begin = part * length
    for first in range(begin, tl.minimum(begin + length, n), BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < n
        keys = h.load([first, 0])
        target = tl.load(targets + rows, mask=inside, other=-1).to(tl.int32)
        least = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
        slope = tl.load(grad_lse + rows, mask=inside, other=0.0)
        jump = tl.load(grad_target + rows, mask=inside, other=0.0)
        logits = tl.dot(own, keys.T)  # [ids, tokens]
        p = tl.exp2(logits * LOG2E - least[None, :]) * slope[None, :]
        p += tl.where(ids[:, None] == target[None, :], jump[None, :], 0.0)
        output = tl.dot(p.to(keys.dtype), keys, output)
    cols = tl.arange(0, WIDTH)
    at = (part * vocab + ids)[:, None].to(tl.int64) * d + cols[None, :]
    tl.store(outputs + at, output, mask=(ids < vocab)[:, None] & (cols[None, :] < d))
