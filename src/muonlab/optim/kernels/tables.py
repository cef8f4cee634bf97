"""Which matrices an optimizer updates, in which order, and where they lie: plain data for `fused.FusedStep`, no kernels.

A *matrix* is one of a parameter's view. Matrices are sorted so that those that share launches are neighbours:

    slice     matrices with one smaller side, one iteration and one grouping of its steps, whose work fits the workspace together
    section   neighbours of one shape: one bank, one launch of each product
    run       neighbours with one memory layout and one set of options: one launch of each elementwise kernel
    lane      slices that follow each other and share banks; lanes run beside each other
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from muonlab.optim.coefficients import Iteration, resolve
from muonlab.optim.scaling import scale_factor
from muonlab.optim.views import View, matrices

DEFAULT_WORKSPACE = 720 << 20
"""Bytes of banks unless `max_workspace_bytes` says otherwise: a few waves of tiles on the largest devices."""
HEAVY = 2
"""Lanes of slices that fill the device ..."""
LANES = HEAVY + 2
"""... and of those that do not."""
PARTS = 4
"""Slices that a family is cut into even if all of it fits the workspace ..."""
WAVES = 2
"""... as long as each launch still has this many tiles for each multiprocessor."""
_TILE = 128


@dataclass(frozen=True)
class Place:
    """Where a matrix lies inside a tensor: offset from its first entry, row stride, column stride, all in entries."""

    offset: int
    row: int
    col: int

    def swapped(self) -> "Place":
        return Place(self.offset, self.col, self.row)


@dataclass(frozen=True)
class Launch:
    """What one launch of the elementwise kernels has in common."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # parameter, gradient, momentum
    flat: bool  # rows follow each other without gaps, in all three
    align: int  # 16: vectors of 16 bytes; 1: entry by entry
    nesterov: bool
    heavy_ball: bool
    skip_idle: bool
    cautious: bool


@dataclass(frozen=True)
class Matrix:
    owner: int
    """Index of its parameter."""
    group: int
    rows: int
    cols: int
    places: tuple[Place, Place, Place]  # in parameter, gradient, momentum
    launch: Launch
    iteration: Iteration
    dtype: torch.dtype
    """Of the iterations."""
    method: str
    factor: float
    """The scale convention's, for the shape before any transposition."""
    decay: float
    """Factor of the weight decay."""
    eps: float
    """Lower bound of the norm that it is divided by."""

    @property
    def short(self) -> int:
        return min(self.rows, self.cols)

    @property
    def blocks(self) -> tuple[int, ...]:
        return blocks_of(self.short, max(self.rows, self.cols), self.iteration, self.method)

    @property
    def pitch(self) -> int:
        """Row pitch in its bank."""
        return pitch_of(self.cols)


@dataclass(frozen=True)
class Slice:
    """Matrices `first` to `last` of the sorted list."""

    first: int
    last: int
    sections: tuple[tuple[int, int], ...]
    runs: tuple[tuple[int, int], ...]


def pitch_of(cols: int) -> int:
    """Row pitch of half-precision matrices in a bank: rows start at multiples of 16 bytes."""
    return -(-cols // 8) * 8


def blocks_of(m: int, n: int, iteration: Iteration, method: str = "auto") -> tuple[int, ...]:
    """How many steps of the polar iteration each block takes, for matrices with smaller side `m` and larger side `n`.

    "standard" is one by one. "gram" and "auto" are three and two steps where the iteration is sturdy and has at least five, else
    two, then one by one: what few operations allow as long as the error against fp64 stays within 1.2 times that of the standard
    fp16 iteration on spectra from flat to 1e-7 and on those of real directions, few large values and many small
    (`benchmarks/gram_blocks.py`; what a block of three takes from small values, two steps after it make up for, not fewer).
    Small and nearly square matrices take single steps in any case: a block would be less exact there and save little.
    """
    steps = len(iteration.steps)
    if steps < 3 or method == "standard" or m < 256 or n < 2 * m:
        return (1,) * steps
    if not iteration.sturdy or steps < 5:
        return (2, *[1] * (steps - 2))
    return (3, 2) if steps == 5 else (3, *[1] * (steps - 3))


def matrices_of(
    param: Tensor,
    grad: Tensor | None,
    momentum: Tensor | None,
    view: View,
    owner: int,
    index: int,
    group: Mapping[str, Any],
) -> list[Matrix] | None:
    """The matrices of one parameter; None where a view of the gradient would have to be copied."""
    grad = param if grad is None else grad
    momentum = param if momentum is None else momentum
    tensors = (param, grad, momentum)
    stacks = [matrices(tensor.detach(), view, param) for tensor in tensors]
    if any(
        part.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
        for t, s in zip(tensors, stacks)
        for part in s
    ):
        return None
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    iteration = resolve(group["coefficients"], group["ns_steps"])
    dtype = torch.bfloat16 if group["dtype"] == "bfloat16" else torch.float16
    found = []
    for parts in zip(*stacks):
        rows, cols = parts[0].shape[-2:]
        factor = scale_factor(group["scale"], rows, cols)
        places = [list(_places(part, tensor)) for part, tensor in zip(parts, tensors)]
        for trio in zip(*places):
            # An update of the transpose is the transpose of the update: take whichever has its rows in one piece.
            swap = trio[0].row == 1 and trio[0].col != 1
            r, c = (cols, rows) if swap else (rows, cols)
            where = tuple(place.swapped() if swap else place for place in trio)
            flat = all(place.col == 1 and place.row == c for place in where) and c % 8 == 0
            even = aligned and flat and r * c % 16 == 0 and all(place.offset % 16 == 0 for place in where)
            launch = Launch(
                (param.dtype, grad.dtype, momentum.dtype if momentum is not param else _momentum_dtype(param, group)),
                flat,
                16 if even else 1,
                bool(group["nesterov"]),
                bool(group["heavy_ball"]),
                group["idle"] == "skip",
                bool(group["cautious_decay"]),
            )
            decay = factor if group["scaled_decay"] else 1.0
            found.append(
                Matrix(
                    owner,
                    index,
                    r,
                    c,
                    (where[0], where[1], where[2]),
                    launch,
                    iteration,
                    dtype,
                    group["method"],
                    factor,
                    decay,
                    group["norm_eps"],
                )
            )
    return found


def in_order(found: Sequence[Matrix]) -> list[Matrix]:
    """Neighbours share as much as possible; large products come first."""
    launches = {launch: i for i, launch in enumerate(dict.fromkeys(matrix.launch for matrix in found))}
    return sorted(
        found,
        key=lambda x: (
            -x.short,
            str(_family(x)),
            -x.rows * x.cols,
            -x.rows,
            launches[x.launch],
            x.owner,
            x.places[0].offset,
        ),
    )


def lanes_of(ordered: Sequence[Matrix], budget: int, processors: int) -> list[list[Slice]]:
    """Slices for each of `LANES` lanes; banks of the heavy ones stay near `budget` bytes, small ones come on top.

    While a launch of one lane ends, the other's fills the device.
    """
    heavy = HEAVY if HEAVY * max(map(matrix_bytes, ordered)) <= budget else 1
    lanes: list[list[Slice]] = [[] for _ in range(LANES)]
    slices: list[Slice] = []
    first = 0
    for _, members in groupby(ordered, _family):
        family = list(members)
        last = first + len(family)
        tiles = sum(map(_tiles, family))
        if heavy > 1 and tiles < processors:
            min(lanes[HEAVY:], key=len).extend(slices_of(ordered, first, last, budget // heavy))
        else:
            parts = 1 if heavy == 1 else max(1, min(PARTS, tiles // (WAVES * processors)))
            slices += slices_of(ordered, first, last, budget // heavy, parts)
        first = last

    def work(part: Slice) -> float:
        return sum(map(_operations, ordered[part.first : part.last]))

    # The largest first: lanes then end together, and the first of them, which begins before the others, has the most to do.
    loads = [0.0] * heavy
    for part in sorted(slices, key=work, reverse=True):
        lane = loads.index(min(loads))
        loads[lane] += work(part)
        lanes[lane].append(part)
    return lanes


def slices_of(ordered: Sequence[Matrix], first: int, last: int, budget: int, parts: int = 1) -> list[Slice]:
    """A family, `ordered[first:last]`, in at least `parts` slices, about equally large, of about `budget` bytes or one matrix.

    A cut between two shapes may miss its place by an eighth of a slice: a few matrices of a shape cost launches of their own.
    """
    ends = list(accumulate(map(matrix_bytes, ordered[first:last])))
    count = max(parts, math.ceil(ends[-1] / budget))
    share = ends[-1] / count
    shapes = list(map(_shape, ordered[first:last]))

    def miss(at: int, target: float) -> float:
        return abs(ends[at - 1] - target) - (share / 8 if shapes[at - 1] != shapes[at] else 0)

    inner = range(1, len(ends))
    cuts = {min(inner, key=lambda at: miss(at, number * share)) for number in range(1, count) if inner}
    borders = [first, *sorted(first + at for at in cuts), last]
    return [_slice(ordered, start, end) for start, end in pairwise(borders)]


def matrix_bytes(matrix: Matrix) -> int:
    """Bytes of workspace for one matrix: two banks of its shape, six symmetric ones."""
    return 2 * (2 * matrix.rows * matrix.pitch + 6 * matrix.short * pitch_of(matrix.short))


def layout_of(ordered: Sequence[Matrix], slices: Sequence[Slice]) -> list[list[int]]:
    """Rows of the layout table of `elementwise`."""
    table = []
    for part in slices:
        offset = 0
        for matrix in ordered[part.first : part.last]:
            places = [value for place in matrix.places for value in (place.offset, place.row, place.col)]
            table.append([matrix.owner, matrix.rows, matrix.cols, matrix.pitch, matrix.group, offset, *places])
            offset += matrix.rows * matrix.pitch
    return table


def chunks_of(sizes: Sequence[int], chunk: int) -> tuple[Tensor, list[int]]:
    """The chunk table [chunks, 2] (tensor, index of the chunk in it), and where each tensor's chunks start."""
    counts = torch.tensor([-(-size // chunk) for size in sizes])
    starts = [0, *counts.cumsum(0).tolist()]
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    index = torch.arange(starts[-1]) - torch.tensor(starts)[owners]
    return torch.stack([owners, index], 1).int(), starts


def dense(tensor: Tensor) -> bool:
    """Whether the entries fill one piece of memory, in whatever order of axes."""
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True


def _tiles(matrix: Matrix) -> int:
    """Of one triangle, as the products compute it."""
    side = -(-matrix.short // _TILE)
    return side * (side + 1) // 2


def _operations(matrix: Matrix) -> float:
    """Of the whole iteration; symmetric products at half price."""
    steps, blocks = sum(matrix.blocks), len(matrix.blocks)
    return matrix.short**2 * (
        3.0 * blocks * max(matrix.rows, matrix.cols) + (4.0 * steps - 3.0 * blocks) * matrix.short
    )


def _family(matrix: Matrix) -> tuple[Any, ...]:
    return matrix.short, matrix.iteration, matrix.dtype, matrix.blocks


def _shape(matrix: Matrix) -> tuple[int, int]:
    return matrix.rows, matrix.cols


def _slice(ordered: Sequence[Matrix], first: int, last: int) -> Slice:
    def neighbours(key: Any) -> tuple[tuple[int, int], ...]:
        spans = []
        at = first
        for _, items in groupby(ordered[first:last], key):
            count = len(list(items))
            spans.append((at, at + count))
            at += count
        return tuple(spans)

    return Slice(first, last, neighbours(_shape), neighbours(lambda x: x.launch))


def _places(stack: Tensor, owner: Tensor) -> Iterator[Place]:
    """Places of all matrices of a stack [..., m, n] that shares memory with `owner`."""
    base = stack.storage_offset() - owner.storage_offset()
    leading = [torch.arange(size) * stride for size, stride in zip(stack.shape[:-2], stack.stride()[:-2])]
    offsets = torch.zeros((), dtype=torch.int64)
    for axis in leading:
        offsets = offsets[..., None] + axis
    row, col = stack.stride()[-2:]
    for offset in offsets.flatten().tolist():
        yield Place(base + offset, row, col)


def _momentum_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    if group["momentum_dtype"] != "auto":
        return torch.bfloat16 if group["momentum_dtype"] == "bfloat16" else torch.float32
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
