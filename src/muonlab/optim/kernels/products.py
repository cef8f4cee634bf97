"""Triton kernels for the products of the polar iteration, on stacks of matrices in banks.

A symmetric matrix S [m, m] is kept in parts, because its rounding decides how accurate the iteration is: its entries off
the diagonal in half precision (`off`, zeros on the diagonal), its diagonal in fp32 (`diagonal`), and, where it is added
again later, what rounding took away (`rest`, times `REST`, tiles of the lower triangle only). Of a symmetric product only
the tiles of the lower triangle are computed; the upper ones are their mirror images.

    gram_kernel        R = alpha * X X^T                                  (X^T X for tall X)
    symmetric_kernel   C = alpha * A B + beta * B + gamma * I             (A, B symmetric and commuting)

A symmetric matrix Q that multiplies X next is kept *whole*, with its diagonal, so that any library can multiply by it. What
rounding took from the diagonal would be a large part of the error: `ratios` [k, m], exact over rounded diagonal, belong to the
rows of Y = Q X. They are multiplied into what is made of Y: into R, and into the columns of the next Q. Those of the last Q are
left out.

Descriptors are `[k, rows, cols]` stacks read in tiles; what lies outside a matrix reads as zero.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os
from typing import Any

import triton
import triton.language as tl

REST = tl.constexpr(2048.0)

# Triton's interpreter cannot time anything: one small configuration.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# The shape of the tiles that each descriptor of a kernel reads or writes.


def _tile_result(arguments):
    block = arguments["BLOCK"]
    for name in ("off", "rest"):
        arguments[name].block_shape = [1, block, block // 2]
    arguments["mirror"].block_shape = [1, block // 2, block]


def _tile_gram(arguments):
    block, depth = arguments["BLOCK"], arguments["DEPTH"]
    arguments["x"].block_shape = [1, block, depth] if arguments["WIDE"] else [1, depth, block]
    _tile_result(arguments)


def _tile_symmetric(arguments):
    block, depth = arguments["BLOCK"], arguments["DEPTH"]
    for name in ("a", "b"):
        arguments[name].block_shape = [1, block, depth]
    for name in ("a_tile", "b_tile", "b_rest"):
        arguments[name].block_shape = [1, block, block // 2]
    _tile_result(arguments)


def _configs(pre_hook, *more):
    """Tiles, warps, stages and registers to choose from."""
    # 128 registers: two programs share a multiprocessor and hide each other's beginning and end.
    tiles = [(128, 64, 8, 3, 128), (128, 64, 4, 3, None), (64, 64, 4, 4, None), *more]
    if INTERPRETED:
        tiles = [(32, 32, 4, 1, None)]
    return [
        triton.Config(
            {"BLOCK": block, "DEPTH": depth}, num_warps=warps, num_stages=stages, maxnreg=registers, pre_hook=pre_hook
        )
        for block, depth, warps, stages, registers in tiles
    ]


def _time(call, quantiles):
    try:
        return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)
    except Exception:  # what a compiler cannot do is no candidate, whatever it raises
        return [float("inf")] * 3


def fitting(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Small tiles for small matrices, large ones for large; R alone has a choice in between.

    What rounding took away is stored for tiles of the lower triangle only. Tiles that read it, those of `symmetric_kernel`, must
    therefore never be larger than those that wrote it: on the diagonal they would reach beyond.
    """
    m, is_gram = arguments["m"], "n" in arguments
    least, most = (128 if m > 512 else 0), (128 if m > (64 if is_gram else 512) else 64)
    return [config for config in configs if least <= config.kwargs["BLOCK"] <= most] or configs


@triton.jit
def _lower_tile(p):
    """Tile (i, j), i >= j, number `p` of the lower triangle."""
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def _matrix(last):
    """The matrix of this program: from 0 on, or from `last` down if that is not 0, so that a launch begins where the one before
    it ended, with what is still in the cache."""
    z = tl.program_id(1)
    return tl.where(last > 0, last - z, z)


@triton.jit
def _halves(tile):
    """Columns of a tile in two halves: one at a time leaves registers free."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _store_symmetric(
    value, off, mirror, rest, diagonal, z, row, col, m, DIAGONAL: tl.constexpr, KEEP_REST: tl.constexpr
):
    """Stores half a tile that begins at (row, col), and its mirror image if it is not on the diagonal."""
    HEIGHT: tl.constexpr = value.shape[0]
    WIDTH: tl.constexpr = value.shape[1]
    if DIAGONAL:
        rows = row + tl.arange(0, HEIGHT)
        on = rows[:, None] == (col + tl.arange(0, WIDTH))[None, :]
        own = tl.sum(tl.where(on, value, 0.0), axis=1)
        tl.store(diagonal + z.to(tl.int64) * m + rows, own, mask=(rows >= col) & (rows < col + WIDTH) & (rows < m))
        value = tl.where(on, 0.0, value)
    half = value.to(off.dtype)
    off.store([z, row, col], half.reshape(1, HEIGHT, WIDTH))
    if not DIAGONAL:
        mirror.store([z, col, row], tl.trans(half).reshape(1, WIDTH, HEIGHT))
    if KEEP_REST:
        left = ((value - half.to(tl.float32)) * REST).to(off.dtype)
        rest.store([z, row, col], left.reshape(1, HEIGHT, WIDTH))


@triton.jit
def _store_whole(value, off, mirror, ratios, before, z, row, col, m, DIAGONAL: tl.constexpr, FOLDED: tl.constexpr):
    """Stores half a tile of a whole matrix and its mirror image, their columns times the ratios of the block before."""
    HEIGHT: tl.constexpr = value.shape[0]
    WIDTH: tl.constexpr = value.shape[1]
    rows = row + tl.arange(0, HEIGHT)
    cols = col + tl.arange(0, WIDTH)
    across = value
    down = value
    if FOLDED:
        before += z.to(tl.int64) * m
        across = value * tl.load(before + cols, mask=cols < m, other=1.0)[None, :]
        down = value * tl.load(before + rows, mask=rows < m, other=1.0)[:, None]
    half = across.to(off.dtype)
    off.store([z, row, col], half.reshape(1, HEIGHT, WIDTH))
    if DIAGONAL:
        on = rows[:, None] == cols[None, :]
        exact = tl.sum(tl.where(on, across, 0.0), axis=1)
        kept = tl.sum(tl.where(on, half.to(tl.float32), 0.0), axis=1)
        ratio = tl.where(kept == 0, 1.0, exact / tl.where(kept == 0, 1.0, kept))
        tl.store(ratios + z.to(tl.int64) * m + rows, ratio, mask=(rows >= col) & (rows < col + WIDTH) & (rows < m))
    else:
        mirror.store([z, col, row], tl.trans(down.to(off.dtype)).reshape(1, WIDTH, HEIGHT))


@triton.jit
def _store_gram(value, off, mirror, rest, diagonal, z, row, col, m, DIAGONAL: tl.constexpr, KEEP_REST: tl.constexpr):
    halves = _halves(value)
    WIDTH: tl.constexpr = value.shape[1] // 2
    for side in tl.static_range(2):
        start = col + side * WIDTH
        _store_symmetric(halves[side], off, mirror, rest, diagonal, z, row, start, m, DIAGONAL, KEEP_REST)


@triton.jit
def _gram_tile(
    x, before, scale, z, i, j, m, n, alpha,
    DIAGONAL: tl.constexpr, WIDE: tl.constexpr, FOLDED: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    value = tl.zeros([BLOCK, BLOCK], tl.float32)
    # What bounds these products is what they read from the cache: on the diagonal one operand is enough.
    for k in range(0, n, DEPTH):
        if WIDE:
            a = x.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
            b = a if DIAGONAL else x.load([z, j * BLOCK, k]).reshape(BLOCK, DEPTH)
            value = tl.dot(a, b.T, value)
        else:
            a = x.load([z, k, i * BLOCK]).reshape(DEPTH, BLOCK)
            b = a if DIAGONAL else x.load([z, k, j * BLOCK]).reshape(DEPTH, BLOCK)
            value = tl.dot(a.T, b, value)
    s = tl.load(scale + z)
    value = value * s * s * alpha
    if FOLDED:
        rows = i * BLOCK + tl.arange(0, BLOCK)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        value *= tl.load(before + rows, mask=rows < m, other=1.0)[:, None]
        value *= tl.load(before + cols, mask=cols < m, other=1.0)[None, :]
    return value


@triton.autotune(
    _configs(_tile_gram, (128, 128, 8, 3, None)),
    key=["m", "n", "WIDE"],
    prune_configs_by={"early_config_prune": fitting},
    do_bench=_time,
)
@triton.jit(do_not_specialize=["last"])
def gram_kernel(
    x,  # descriptor [k, m, n], or [k, n, m] for tall matrices
    off,  # descriptors of the result's parts, in halves of tiles
    mirror,  # the same as `off`, in halves of transposed tiles
    rest,
    diagonal,
    before,  # fp32 [k, m]: ratios of the rows of X
    scale,  # fp32 [k]: what X is to be multiplied by
    m,
    n,
    alpha,
    last,
    WIDE: tl.constexpr,
    FOLDED: tl.constexpr,  # there are such ratios
    KEEP_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i, j = _lower_tile(tl.program_id(0))
    z = _matrix(last)
    before += z.to(tl.int64) * m
    if i == j:
        value = _gram_tile(x, before, scale, z, i, j, m, n, alpha, True, WIDE, FOLDED, BLOCK, DEPTH)
        _store_gram(value, off, mirror, rest, diagonal, z, i * BLOCK, j * BLOCK, m, True, KEEP_REST)
    else:
        value = _gram_tile(x, before, scale, z, i, j, m, n, alpha, False, WIDE, FOLDED, BLOCK, DEPTH)
        _store_gram(value, off, mirror, rest, diagonal, z, i * BLOCK, j * BLOCK, m, False, KEEP_REST)


@triton.jit
def _product_tile(a, b, z, i, j, m, ONE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of A B; ONE: both operands are the same."""
    value = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, m, DEPTH):
        left = a.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
        right = left if ONE else b.load([z, j * BLOCK, k]).reshape(BLOCK, DEPTH)
        value = tl.dot(left, right.T, value)
    return value


@triton.jit
def _finish(
    value, a_tile, b_tile, b_rest, a_diagonal, b_diagonal, off, mirror, rest, diagonal, before,
    z, row, col, m, alpha, beta, gamma, DIAGONAL: tl.constexpr, SAME: tl.constexpr, HAS_REST: tl.constexpr,
    KEEP_REST: tl.constexpr, WHOLE: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """(A + D)(B + E) = A B + D B + A E + D E for diagonal D and E, of which `value` holds a tile of A B."""
    HEIGHT: tl.constexpr = value.shape[0]
    WIDTH: tl.constexpr = value.shape[1] // 2
    a_diagonal += z.to(tl.int64) * m
    b_diagonal += z.to(tl.int64) * m
    rows = row + tl.arange(0, HEIGHT)
    d = tl.load(a_diagonal + rows, mask=rows < m, other=0.0)[:, None]
    halves = _halves(value)
    for side in tl.static_range(2):
        part = alpha * halves[side]
        start = col + side * WIDTH
        cols = start + tl.arange(0, WIDTH)
        e = tl.load(b_diagonal + cols, mask=cols < m, other=0.0)[None, :]
        own = b_tile.load([z, row, start]).reshape(HEIGHT, WIDTH).to(tl.float32)
        if HAS_REST:
            own += b_rest.load([z, row, start]).reshape(HEIGHT, WIDTH).to(tl.float32) * (1.0 / REST)
        if SAME:
            part += (alpha * (d + e) + beta) * own
        else:
            other = a_tile.load([z, row, start]).reshape(HEIGHT, WIDTH).to(tl.float32)
            part += (alpha * d + beta) * own
            part += (alpha * e) * other
        if DIAGONAL:
            part += tl.where(rows[:, None] == cols[None, :], (alpha * d + beta) * e + gamma, 0.0)
        if WHOLE:
            _store_whole(part, off, mirror, diagonal, before, z, row, start, m, DIAGONAL, FOLDED)
        else:
            _store_symmetric(part, off, mirror, rest, diagonal, z, row, start, m, DIAGONAL, KEEP_REST)


@triton.autotune(
    _configs(_tile_symmetric),
    key=["m", "SAME", "KEEP_REST"],
    prune_configs_by={"early_config_prune": fitting},
    do_bench=_time,
)
@triton.jit(do_not_specialize=["last"])
def symmetric_kernel(
    a,  # descriptor [k, m, m] of A's entries off the diagonal, in operand tiles
    b,  # the same of B
    a_tile,  # the same as `a`, in halves of the result's tiles
    b_tile,
    b_rest,
    a_diagonal,
    b_diagonal,
    off,
    mirror,
    rest,
    diagonal,  # of a whole C: its ratios
    before,  # fp32 [k, m]: ratios that the columns of a whole C are multiplied by
    m,
    alpha,
    beta,
    gamma,
    last,
    SAME: tl.constexpr,  # A is B
    HAS_REST: tl.constexpr,  # B has a rest
    KEEP_REST: tl.constexpr,  # C shall have one
    WHOLE: tl.constexpr,  # C shall be whole
    FOLDED: tl.constexpr,  # there are ratios before
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i, j = _lower_tile(tl.program_id(0))
    z = _matrix(last)
    if i == j:
        value = _product_tile(a, b, z, i, j, m, SAME, BLOCK, DEPTH)
        _finish(
            value, a_tile, b_tile, b_rest, a_diagonal, b_diagonal, off, mirror, rest, diagonal, before,
            z, i * BLOCK, j * BLOCK, m, alpha, beta, gamma, True, SAME, HAS_REST, KEEP_REST, WHOLE, FOLDED,
        )  # fmt: skip
    else:
        value = _product_tile(a, b, z, i, j, m, False, BLOCK, DEPTH)
        _finish(
            value, a_tile, b_tile, b_rest, a_diagonal, b_diagonal, off, mirror, rest, diagonal, before,
            z, i * BLOCK, j * BLOCK, m, alpha, beta, gamma, False, SAME, HAS_REST, KEEP_REST, WHOLE, FOLDED,
        )  # fmt: skip
