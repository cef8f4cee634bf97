"""Triton kernels for the products of the polar iteration, on stacks of matrices in banks.

A symmetric matrix S [m, m] is kept in parts, because its rounding decides how accurate the iteration is: its entries off
the diagonal in half precision (`off`, zeros on the diagonal), its diagonal in fp32 (`diagonal`), and, where it is added
again later, what rounding took away (`rest`, times `REST`, tiles of the lower triangle only). Of a symmetric product only
the tiles of the lower triangle are computed; the upper ones are their mirror images.

    gram_kernel        R = alpha * X X^T                                  (X^T X for tall X)
    symmetric_kernel   C = alpha * A B + beta * B + gamma * I             (A, B symmetric and commuting)
    product_kernel     Y = scale * (A X)                                  (X A for tall X; A symmetric)

Descriptors are `[k, rows, cols]` stacks read in tiles; what lies outside a matrix reads as zero.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import os

import triton
import triton.language as tl

REST = tl.constexpr(2048.0)

# Triton's interpreter cannot time anything: one small configuration.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _tile_gram(arguments):
    block, depth = arguments["BLOCK"], arguments["DEPTH"]
    arguments["x"].block_shape = [1, block, depth] if arguments["WIDE"] else [1, depth, block]


def _tile_symmetric(arguments):
    arguments["a"].block_shape = arguments["b"].block_shape = [1, arguments["BLOCK"], arguments["DEPTH"]]


def _tile_product(arguments):
    block, breadth, depth = arguments["BLOCK"], arguments["BREADTH"], arguments["DEPTH"]
    arguments["a"].block_shape = [1, block, depth] if arguments["WIDE"] else [1, depth, breadth]
    arguments["x"].block_shape = [1, depth, breadth] if arguments["WIDE"] else [1, block, depth]


def _configs(names, tiles, pre_hook):
    """Tiles, warps and stages to choose from."""
    tiles = [((32,) * len(names), 4, 1)] if _INTERPRETED else tiles
    return [
        triton.Config(dict(zip(names, tile)), num_warps=warps, num_stages=stages, pre_hook=pre_hook)
        for tile, warps, stages in tiles
    ]


def _square(pre_hook):
    tiles = [((128, 64), 4, 3), ((128, 64), 8, 4), ((128, 128), 8, 3), ((64, 64), 4, 4)]
    return _configs(("BLOCK", "DEPTH"), tiles, pre_hook)


def _rectangular(pre_hook):
    tiles = [
        ((128, 128, 64), 4, 3),
        ((128, 128, 64), 8, 3),
        ((128, 256, 64), 8, 4),
        ((256, 128, 64), 8, 3),
        ((64, 64, 64), 4, 4),
    ]
    return _configs(("BLOCK", "BREADTH", "DEPTH"), tiles, pre_hook)


def _time(call, quantiles):
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _fitting(configs, arguments, **_):
    """Small tiles for small matrices only, large ones for large."""
    large = arguments["m"] > 64
    return [config for config in configs if (config.kwargs["BLOCK"] > 64) == large] or configs


@triton.jit
def _lower_tile(p):
    """Tile (i, j), i >= j, number `p` of the lower triangle."""
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def _store_symmetric(value, off, rest, diagonal, z, i, j, m, pitch, KEEP_REST: tl.constexpr, BLOCK: tl.constexpr):
    # No mask compares rows with columns: such a mask would make every store a scalar one.
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    start = z.to(tl.int64) * m * pitch
    if i == j:
        value = 0.5 * (value + tl.trans(value))
        on = rows[:, None] == cols[None, :]
        tl.store(diagonal + z.to(tl.int64) * m + rows, tl.sum(tl.where(on, value, 0.0), axis=1), mask=rows < m)
        value = tl.where(on, 0.0, value)
    half = value.to(off.dtype.element_ty)
    inside = (rows[:, None] < m) & (cols[None, :] < m)
    at = start + rows[:, None] * pitch + cols[None, :]
    tl.store(off + at, half, mask=inside)
    if KEEP_REST:
        tl.store(rest + at, ((value - half.to(tl.float32)) * REST).to(off.dtype.element_ty), mask=inside)
    if i != j:
        mirrored = (cols[:, None] < m) & (rows[None, :] < m)
        tl.store(off + start + cols[:, None] * pitch + rows[None, :], tl.trans(half), mask=mirrored)


@triton.autotune(
    _square(_tile_gram), key=["m", "n", "WIDE"], prune_configs_by={"early_config_prune": _fitting}, do_bench=_time
)
@triton.jit
def gram_kernel(
    x,  # descriptor [k, m, n], or [k, n, m] for tall matrices
    off,
    rest,
    diagonal,
    scale,  # fp32 [k]: squared, multiplies the product
    m,
    n,
    pitch,
    alpha,
    WIDE: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP_REST: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i, j = _lower_tile(tl.program_id(0))
    z = tl.program_id(1)
    value = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, n, DEPTH):
        if WIDE:
            a = x.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
            b = x.load([z, j * BLOCK, k]).reshape(BLOCK, DEPTH)
            value = tl.dot(a, b.T, value)
        else:
            a = x.load([z, k, i * BLOCK]).reshape(DEPTH, BLOCK)
            b = x.load([z, k, j * BLOCK]).reshape(DEPTH, BLOCK)
            value = tl.dot(a.T, b, value)
    if SCALED:
        s = tl.load(scale + z)
        value = value * s * s
    _store_symmetric(value * alpha, off, rest, diagonal, z, i, j, m, pitch, KEEP_REST, BLOCK)


@triton.autotune(
    _square(_tile_symmetric), key=["m", "KEEP_REST"], prune_configs_by={"early_config_prune": _fitting}, do_bench=_time
)
@triton.jit
def symmetric_kernel(
    a,  # descriptor [k, m, m] of A's entries off the diagonal
    b,  # the same of B
    a_off,
    a_diagonal,
    b_off,
    b_rest,
    b_diagonal,
    off,
    rest,
    diagonal,
    m,
    pitch,
    alpha,
    beta,
    gamma,
    HAS_REST: tl.constexpr,  # B has a rest
    KEEP_REST: tl.constexpr,  # C shall have one
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i, j = _lower_tile(tl.program_id(0))
    z = tl.program_id(1)
    value = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, m, DEPTH):
        left = a.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
        right = b.load([z, j * BLOCK, k]).reshape(BLOCK, DEPTH)
        value = tl.dot(left, right.T, value)
    # (A + D)(B + E) = A B + D B + A E + D E, for diagonal D and E.
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < m) & (cols[None, :] < m)
    at = z.to(tl.int64) * m * pitch + rows[:, None] * pitch + cols[None, :]
    d = tl.load(a_diagonal + z.to(tl.int64) * m + rows, mask=rows < m, other=0.0)
    e = tl.load(b_diagonal + z.to(tl.int64) * m + cols, mask=cols < m, other=0.0)
    right = tl.load(b_off + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_REST:
        right += tl.load(b_rest + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / REST)
    left = tl.load(a_off + at, mask=inside, other=0.0).to(tl.float32)
    value = alpha * (value + d[:, None] * right + left * e[None, :]) + beta * right
    value += tl.where(rows[:, None] == cols[None, :], (alpha * d[:, None] + beta) * e[None, :] + gamma, 0.0)
    _store_symmetric(value, off, rest, diagonal, z, i, j, m, pitch, KEEP_REST, BLOCK)


@triton.autotune(
    _rectangular(_tile_product),
    key=["m", "n", "WIDE"],
    prune_configs_by={"early_config_prune": _fitting},
    do_bench=_time,
)
@triton.jit
def product_kernel(
    a,  # descriptor [k, m, m] of A's entries off the diagonal
    x,  # descriptor [k, m, n], or [k, n, m] for tall matrices
    a_diagonal,
    x_bank,
    y_bank,
    scale,
    m,
    n,
    pitch,  # of the banks of X and Y
    WIDE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,  # along the rows of Y
    BREADTH: tl.constexpr,  # along its columns
    DEPTH: tl.constexpr,
):
    z = tl.program_id(1)
    y_rows = m if WIDE else n
    y_cols = n if WIDE else m
    across = tl.cdiv(y_cols, BREADTH)
    i = tl.program_id(0) // across
    j = tl.program_id(0) % across
    value = tl.zeros([BLOCK, BREADTH], tl.float32)
    for k in range(0, m, DEPTH):
        if WIDE:
            left = a.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
            right = x.load([z, k, j * BREADTH]).reshape(DEPTH, BREADTH)
        else:
            left = x.load([z, i * BLOCK, k]).reshape(BLOCK, DEPTH)
            right = a.load([z, k, j * BREADTH]).reshape(DEPTH, BREADTH)
        value = tl.dot(left, right, value)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BREADTH + tl.arange(0, BREADTH)
    inside = (rows[:, None] < y_rows) & (cols[None, :] < y_cols)
    at = z.to(tl.int64) * y_rows * pitch + rows[:, None].to(tl.int64) * pitch + cols[None, :]
    own = tl.load(x_bank + at, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        value += tl.load(a_diagonal + z.to(tl.int64) * m + rows, mask=rows < m, other=0.0)[:, None] * own
    else:
        value += tl.load(a_diagonal + z.to(tl.int64) * m + cols, mask=cols < m, other=0.0)[None, :] * own
    if SCALED:
        value *= tl.load(scale + z)
    tl.store(y_bank + at, value.to(y_bank.dtype.element_ty), mask=inside)
