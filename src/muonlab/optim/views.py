"""A parameter seen as stacks of matrices.

A view is a tuple of plain operations, so that it can be printed, compared and stored in a checkpoint:

    ("transpose",)              [..., in, out] -> [..., out, in]: transformers' Conv1D, experts applied as x @ W
    ("conv", groups)            [out, in/groups, *kernel] -> [groups, out/groups, in/groups * kernel]
    ("conv_transpose", groups)  [in, out/groups, *kernel] -> [groups, out/groups * kernel, in/groups]
    ("split", axis, sizes)      fused projections along the rows (axis 0) or columns (axis 1), sizes may be uneven
    ("interleaved", n)          rows that take turns, as gate and up of gpt-oss: n matrices of every n-th row
    ("heads", axis, size)       groups of `size` rows (axis 0) or columns (axis 1): one matrix a head
    ("tiles", size)             size x size tiles; those at the right and lower edge are smaller

Operations compose from left to right. Every resulting stack shares the memory of the parameter: writing to it writes the
parameter. A ragged edge is a stack of its own, exactly as large as it is, so no method ever sees padding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from muonlab.errors import InputError, unknown

View = tuple[tuple[Any, ...], ...]


def matrices(tensor: Tensor, view: View, like: Tensor | None = None) -> list[Tensor]:
    """The stacks of matrices `[..., m, n]` that `view` makes of `tensor`; without operations the tensor itself.

    `like` is the tensor whose memory order decides the order of a convolution's columns (the parameter, when `tensor` is
    its gradient or state): orthogonalisation does not depend on it, but all three must agree.
    """
    like = tensor if like is None else like
    stacks = [tensor]
    for name, *arguments in view:
        if name in ("conv", "conv_transpose"):
            stacks = [_conv(tensor, like, name == "conv_transpose", *arguments)]
        elif name not in OPERATIONS:
            raise unknown("view", name, [*OPERATIONS, "conv", "conv_transpose"])
        else:
            operation = OPERATIONS[name]
            stacks = [result for stack in stacks for result in operation(stack, *arguments)]
    return stacks


def shapes(shape: tuple[int, ...], view: View) -> list[tuple[int, ...]]:
    """The shapes of `matrices(tensor of this shape, view)`; raises InputError if the view does not fit."""
    meta = torch.empty(shape, device="meta")
    return [tuple(stack.shape) for stack in matrices(meta, view)]


def describe(view: View) -> str:
    """One line for tables: `split 0 (64, 32, 32) > tiles 16`; a plain matrix is `matrix`."""
    return " > ".join(" ".join(str(part) for part in operation) for operation in view) or "matrix"


def _conv(tensor: Tensor, like: Tensor, transposed: bool, groups: int) -> Tensor:
    # Kernel axes in the parameter's order of memory: flattening them then needs no copy, whatever the memory format.
    inner = sorted(range(1, tensor.ndim), key=like.stride, reverse=True)
    rows = tensor.permute(0, *inner)
    shape = (groups, tensor.shape[0] // groups, -1)
    # A gradient may lie in memory in another order and is only read; parameter and state are written and must not be copied.
    stack = rows.view(shape) if tensor.stride() == like.stride() else rows.reshape(shape)
    return stack.mT if transposed else stack


def _transpose(stack: Tensor) -> list[Tensor]:
    return [stack.mT]


def _split(stack: Tensor, axis: int, sizes: tuple[int, ...]) -> list[Tensor]:
    if sum(sizes) != stack.shape[axis - 2] or min(sizes) < 1:
        raise InputError(
            f"split {tuple(sizes)} does not add up to the {stack.shape[axis - 2]} {'rows' if axis == 0 else 'columns'} "
            f"of a {stack.shape[-2]} x {stack.shape[-1]} matrix"
        )
    return list(torch.split(stack, list(sizes), dim=axis - 2))


def _interleaved(stack: Tensor, count: int) -> list[Tensor]:
    if count < 1 or stack.shape[-2] % count:
        raise InputError(f"{stack.shape[-2]} rows cannot take turns among {count} matrices")
    return [stack[..., i::count, :] for i in range(count)]


def _heads(stack: Tensor, axis: int, size: int) -> list[Tensor]:
    length = stack.shape[axis - 2]
    if size < 1 or length % size:
        raise InputError(f"{length} {'rows' if axis == 0 else 'columns'} cannot be divided into heads of {size}")
    heads = torch.unflatten(stack, axis - 2, (length // size, size))
    return [heads if axis == 0 else heads.movedim(-2, -3)]


def _tiles(stack: Tensor, size: int) -> list[Tensor]:
    if size < 1:
        raise InputError(f"block size must be at least 1, got {size}")
    rows, cols = stack.shape[-2:]
    if size >= rows and size >= cols:
        return [stack]
    return [
        _grid(part, min(size, part.shape[-2]), min(size, part.shape[-1]))
        for band in torch.split(stack, _whole_and_rest(rows, size), dim=-2)
        for part in torch.split(band, _whole_and_rest(cols, size), dim=-1)
    ]


def _grid(stack: Tensor, rows: int, cols: int) -> Tensor:
    grid = torch.unflatten(torch.unflatten(stack, -2, (-1, rows)), -1, (-1, cols))  # [..., R, rows, C, cols]
    return grid.movedim(-2, -3)  # [..., R, C, rows, cols]


def _whole_and_rest(length: int, size: int) -> list[int]:
    whole = length // size * size
    return [part for part in (whole, length - whole) if part]


OPERATIONS: dict[str, Callable[..., list[Tensor]]] = {
    "transpose": _transpose,
    "split": _split,
    "interleaved": _interleaved,
    "heads": _heads,
    "tiles": _tiles,
}
"""name -> function (stack [..., m, n], *arguments) -> stacks that share its memory."""
