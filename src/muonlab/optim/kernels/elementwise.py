"""Triton kernels for everything that is not a product: momentum, norm and cast before the iterations, decay and application
after them, and AdamW.

Each launch covers many tensors. A program handles one chunk: a row (tensor, index) of a chunk table. Parameters, gradients
and state are reached through tables of addresses and strides; they are never copied or rebound. A gradient with address 0
is absent: its tensor is left alone. All arithmetic is fp32.
"""

# A kernel's arguments are Triton's values, which have no types in Python.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

CHUNK = 2048
"""Entries of one program."""

# Columns of the address tables (int64, one row per parameter).
PARAM: tl.constexpr = tl.constexpr(0)
GRAD: tl.constexpr = tl.constexpr(1)
MOMENTUM: tl.constexpr = tl.constexpr(2)
SQUARE: tl.constexpr = tl.constexpr(3)
COUNT: tl.constexpr = tl.constexpr(4)
POINTERS: tl.constexpr = tl.constexpr(5)
# Columns of the layout table (int64, one row per matrix): who owns it, its shape, pitch in and offset into the bank, its
# group, and offset, row stride and column stride inside parameter, gradient and momentum, all in entries.
LAYOUT: tl.constexpr = tl.constexpr(15)
# Columns of the table of hyper-parameters (fp32, one row per group).
LR: tl.constexpr = tl.constexpr(0)
WEIGHT_DECAY: tl.constexpr = tl.constexpr(1)
HYPER: tl.constexpr = tl.constexpr(8)


@triton.jit
def _entries(layout, matrix, chunk, SIDE: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr):
    """Offsets of a chunk's entries inside one of the tensors (SIDE 0..2: parameter, gradient, momentum), and their mask."""
    row = layout + matrix * LAYOUT
    rows = tl.load(row + 1)
    cols = tl.load(row + 2)
    position = tl.cast(chunk, tl.int64) * SIZE + tl.arange(0, SIZE)
    start = tl.load(row + 6 + 3 * SIDE)
    if FLAT:
        if ALIGN > 1:
            size = tl.multiple_of(rows * cols, ALIGN)
            return tl.multiple_of(start, ALIGN) + position, position < size
        return start + position, position < rows * cols
    r = position // cols
    c = position - r * cols
    return start + r * tl.load(row + 7 + 3 * SIDE) + c * tl.load(row + 8 + 3 * SIDE), position < rows * cols


@triton.jit
def _bank_entries(layout, matrix, chunk, FLAT: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr):
    """Offsets of a chunk's entries inside the bank."""
    row = layout + matrix * LAYOUT
    position = tl.cast(chunk, tl.int64) * SIZE + tl.arange(0, SIZE)
    start = tl.load(row + 5)
    if FLAT:
        return tl.multiple_of(start, 8) + position
    cols = tl.load(row + 2)
    r = position // cols
    return start + r * tl.load(row + 3) + (position - r * cols)


@triton.jit
def _address(pointers, owner, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    # The alignment of an integer is forgotten when it becomes a pointer: loads would be of 4 bytes.
    address = tl.load(pointers + owner * POINTERS + COLUMN).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(address, 16) if ALIGN > 1 else address


@triton.jit
def _direction(grad, momentum, mu, NESTEROV: tl.constexpr, HEAVY_BALL: tl.constexpr):
    """The direction to follow, from the gradient and the new momentum."""
    if NESTEROV:
        return grad + mu * momentum if HEAVY_BALL else grad + mu * (momentum - grad)
    return momentum


@triton.jit
def momentum_kernel(
    chunks,  # int32 [chunks, 2]
    pointers,  # int64 [parameters, POINTERS]
    layout,  # int64 [matrices, LAYOUT]
    hyper,  # fp32 [groups, HYPER]; column 2 is the momentum
    multiplier,  # fp32 [matrices]: what the direction is multiplied by before it is cast
    partial,  # fp32 [chunks, 3]: largest absolute entry, sum of squares divided by its square, 1 if any gradient
    bank,
    first,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    NESTEROV: tl.constexpr,
    HEAVY_BALL: tl.constexpr,
    SKIP_IDLE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """New momentum in place, and the direction, cast with the multiplier that fitted the last update, into the bank.

    SKIP_IDLE: where the whole gradient of a matrix is zero its momentum must not change. A chunk without any gradient
    therefore leaves it to `settle_kernel`, which knows the other chunks.
    """
    program = first + tl.program_id(0)
    matrix = tl.load(chunks + 2 * program)
    chunk = tl.load(chunks + 2 * program + 1)
    owner = tl.load(layout + matrix * LAYOUT)
    target = bank + _bank_entries(layout, matrix, chunk, FLAT, ALIGN, SIZE)
    grad_offsets, inside = _entries(layout, matrix, chunk, 1, FLAT, ALIGN, SIZE)
    if tl.load(pointers + owner * POINTERS + GRAD) == 0:
        tl.store(target, tl.zeros([SIZE], tl.float32).to(bank.dtype.element_ty), mask=inside)
        tl.store(partial + 3 * program, 0.0)
        tl.store(partial + 3 * program + 1, 0.0)
        tl.store(partial + 3 * program + 2, 0.0)
    else:
        mu = tl.load(hyper + tl.load(layout + matrix * LAYOUT + 4) * HYPER + 2)
        grad = tl.load(_address(pointers, owner, GRAD, GRAD_TYPE, ALIGN) + grad_offsets, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        own_offsets, _ = _entries(layout, matrix, chunk, 2, FLAT, ALIGN, SIZE)
        place = _address(pointers, owner, MOMENTUM, MOMENTUM_TYPE, ALIGN) + own_offsets
        momentum = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if HEAVY_BALL:
            momentum = mu * momentum + grad
        else:
            momentum = momentum + (1.0 - mu) * (grad - momentum)
        active = tl.max(tl.where(grad != 0, 1.0, 0.0), axis=0)
        tl.store(partial + 3 * program + 2, active)
        tl.store(place, momentum.to(MOMENTUM_TYPE), mask=inside & (active > 0) if SKIP_IDLE else inside)
        direction = _direction(grad, momentum, mu, NESTEROV, HEAVY_BALL)
        largest = tl.max(tl.abs(direction), axis=0)
        ratio = direction / tl.where(largest > 0, largest, 1.0)
        tl.store(partial + 3 * program, largest)
        # An infinity or a NaN makes this sum NaN, and with it the whole matrix.
        tl.store(partial + 3 * program + 1, tl.sum(ratio * ratio, axis=0))
        tl.store(target, (direction * tl.load(multiplier + matrix)).to(bank.dtype.element_ty), mask=inside)


@triton.jit
def norm_kernel(
    starts,  # int32 [matrices + 1]: chunks of a matrix
    gains,  # fp32 [matrices, 2]: the Frobenius norm that the cast matrix should have; lower bound of what is divided by
    partial,
    multiplier,
    active,  # fp32 [matrices]: 1 if it has any gradient
    late,  # fp32 [matrices]: 1 if `settle_kernel` has to finish its momentum
    redo,  # fp32 [matrices]: 0, or the multiplier of a second cast
    scale,  # fp32 [matrices]: what the cast matrix is to be multiplied by to have norm 1
    first,
    SIZE: tl.constexpr,
):
    """The norm of every matrix; whether the cast kept its precision; the multiplier for the next update."""
    matrix = first + tl.program_id(0)
    start = tl.load(starts + matrix)
    end = tl.load(starts + matrix + 1)
    gain = tl.load(gains + 2 * matrix)
    least = tl.load(gains + 2 * matrix + 1)
    largest = tl.zeros([SIZE], tl.float32)
    moved = tl.zeros([SIZE], tl.float32)
    for at in range(start, end, SIZE):
        index = at + tl.arange(0, SIZE)
        largest = tl.maximum(largest, tl.load(partial + 3 * index, mask=index < end, other=0.0))
        moved += tl.load(partial + 3 * index + 2, mask=index < end, other=0.0)
    chunks = tl.sum(moved, axis=0)
    tl.store(active + matrix, tl.where(chunks > 0, 1.0, 0.0))
    tl.store(late + matrix, tl.where((chunks > 0) & (chunks < end - start), 1.0, 0.0))
    top = tl.max(largest, axis=0)
    divisor = tl.where(top > 0, top, 1.0)
    total = tl.zeros([SIZE], tl.float32)
    for at in range(start, end, SIZE):
        index = at + tl.arange(0, SIZE)
        ratio = tl.load(partial + 3 * index, mask=index < end, other=0.0) / divisor
        total += tl.load(partial + 3 * index + 1, mask=index < end, other=0.0) * ratio * ratio
    root = tl.sqrt(tl.sum(total, axis=0))  # norm = divisor * root, which may itself be outside the range of fp32
    zero = root == 0
    root = tl.where(root * divisor < least, least / divisor, root)
    wanted = tl.maximum(tl.minimum(gain / tl.where(zero, 1.0, root) / divisor, 1e37), 1e-37)
    # A power of two: the cast then rounds the same way whatever the norm of the last update, also after a resume.
    wanted = (wanted.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    used = tl.load(multiplier + matrix)
    drift = used * divisor * root / gain
    kept = ((drift > 0.015625) & (drift < 8.0)) | zero
    tl.store(redo + matrix, tl.where(kept, 0.0, tl.where(root == root, wanted, root)))
    used = tl.where(kept, used, wanted)
    tl.store(scale + matrix, tl.where(zero, 1.0, 1.0 / (used * divisor * root)))
    good = (wanted > 0) & (wanted < 1e38) & (zero == 0)
    tl.store(multiplier + matrix, tl.where(good, wanted, tl.load(multiplier + matrix)))


@triton.jit
def settle_kernel(
    starts,
    pointers,
    layout,
    hyper,
    partial,
    late,
    redo,
    bank,
    first,
    GRAD_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    NESTEROV: tl.constexpr,
    HEAVY_BALL: tl.constexpr,
    SKIP_IDLE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """What could only be decided with the whole matrix in view: momentum where a chunk had no gradient, and a second cast
    where the norm has changed too much since the last update. Most matrices need neither and return at once."""
    matrix = first + tl.program_id(0)
    again = tl.load(redo + matrix)
    finish = (tl.load(late + matrix) != 0) & SKIP_IDLE
    owner = tl.load(layout + matrix * LAYOUT)
    if ((again != 0) | finish) & (tl.load(pointers + owner * POINTERS + GRAD) != 0):
        mu = tl.load(hyper + tl.load(layout + matrix * LAYOUT + 4) * HYPER + 2)
        start = tl.load(starts + matrix)
        count = tl.load(starts + matrix + 1) - start
        for chunk in range(tl.program_id(1), count, tl.num_programs(1)):
            offsets, inside = _entries(layout, matrix, chunk, 1, FLAT, ALIGN, SIZE)
            grad = tl.load(_address(pointers, owner, GRAD, GRAD_TYPE, ALIGN) + offsets, mask=inside, other=0.0)
            offsets, inside = _entries(layout, matrix, chunk, 2, FLAT, ALIGN, SIZE)
            place = _address(pointers, owner, MOMENTUM, MOMENTUM_TYPE, ALIGN) + offsets
            momentum = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            if SKIP_IDLE:
                left = tl.load(partial + 3 * (start + chunk) + 2) == 0
                momentum = tl.where(left, mu * momentum, momentum)
                tl.store(place, momentum.to(MOMENTUM_TYPE), mask=inside & left & finish)
            if again != 0:
                direction = _direction(grad.to(tl.float32), momentum, mu, NESTEROV, HEAVY_BALL)
                target = bank + _bank_entries(layout, matrix, chunk, FLAT, ALIGN, SIZE)
                tl.store(target, (direction * again).to(bank.dtype.element_ty), mask=inside)


@triton.jit
def apply_kernel(
    chunks,
    pointers,
    layout,
    hyper,
    factors,  # fp32 [matrices, 2]: factors of the learning rate and of the decay
    active,
    scale,  # fp32 [matrices]: what the bank's are to be multiplied by
    bank,  # polar factors
    first,
    PARAM_TYPE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    SKIP_IDLE: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """param -= lr * weight_decay * param + lr * factor * update, in place.

    CAUTIOUS: entries that the update pushes away from zero are not decayed. From the end on: that was written last and is still
    in the cache.
    """
    program = first + tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = tl.load(chunks + 2 * program)
    chunk = tl.load(chunks + 2 * program + 1)
    owner = tl.load(layout + matrix * LAYOUT)
    moves = tl.load(pointers + owner * POINTERS + GRAD) != 0
    if SKIP_IDLE:
        moves = moves & (tl.load(active + matrix) != 0)
    if moves:
        group = hyper + tl.load(layout + matrix * LAYOUT + 4) * HYPER
        lr = tl.load(group + LR)
        offsets, inside = _entries(layout, matrix, chunk, 0, FLAT, ALIGN, SIZE)
        place = _address(pointers, owner, PARAM, PARAM_TYPE, ALIGN) + offsets
        source = bank + _bank_entries(layout, matrix, chunk, FLAT, ALIGN, SIZE)
        update = tl.load(source, mask=inside, other=0.0).to(tl.float32) * tl.load(scale + matrix)
        param = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        shrink = lr * tl.load(group + WEIGHT_DECAY) * tl.load(factors + 2 * matrix + 1)
        if CAUTIOUS:
            shrink = tl.where(param * update >= 0, shrink, 0.0)
        param = param * (1.0 - shrink) - lr * tl.load(factors + 2 * matrix) * update
        tl.store(place, param.to(PARAM_TYPE), mask=inside)


@triton.jit
def count_kernel(pointers, counts, first):
    """step += 1 for every parameter that counts and has a gradient."""
    row = pointers + (first + tl.program_id(0)) * POINTERS
    if (tl.load(counts + first + tl.program_id(0)) != 0) & (tl.load(row + GRAD) != 0):
        place = tl.load(row + COUNT).to(tl.pointer_type(tl.float32))
        tl.store(place, tl.load(place) + 1.0)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, 1 - tl.exp(x))


@triton.jit
def adamw_kernel(
    chunks,  # int32 [chunks, 2]: parameter, chunk of it
    pointers,  # int64 [parameters, POINTERS]: parameter, gradient, exp_avg, exp_avg_sq, step
    sizes,  # int64 [parameters, 2]: entries, group
    hyper,  # fp32 [groups, HYPER]: lr, weight_decay, log beta1, log beta2, eps, 1 - beta1, 1 - beta2
    first,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    SIZE: tl.constexpr,
):
    """AdamW with decoupled decay and bias correction (https://arxiv.org/abs/1711.05101) on dense tensors, in place."""
    program = first + tl.program_id(0)
    owner = tl.load(chunks + 2 * program)
    offsets = tl.load(chunks + 2 * program + 1).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    if tl.load(pointers + owner * POINTERS + GRAD) != 0:
        size = tl.load(sizes + 2 * owner)
        if ALIGN > 1:
            size = tl.multiple_of(size, ALIGN)
        inside = offsets < size
        group = hyper + tl.load(sizes + 2 * owner + 1) * HYPER
        lr = tl.load(group + LR)
        step = tl.load(tl.load(pointers + owner * POINTERS + COUNT).to(tl.pointer_type(tl.float32)))
        correction1 = _one_minus_exp(step * tl.load(group + 2))
        correction2 = _one_minus_exp(step * tl.load(group + 3))
        grad = tl.load(_address(pointers, owner, GRAD, GRAD_TYPE, ALIGN) + offsets, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        mean_at = _address(pointers, owner, MOMENTUM, STATE_TYPE, ALIGN) + offsets
        square_at = _address(pointers, owner, SQUARE, STATE_TYPE, ALIGN) + offsets
        param_at = _address(pointers, owner, PARAM, PARAM_TYPE, ALIGN) + offsets
        mean = tl.load(mean_at, mask=inside, other=0.0).to(tl.float32)
        mean += tl.load(group + 5) * (grad - mean)
        square = tl.load(square_at, mask=inside, other=0.0).to(tl.float32)
        square += tl.load(group + 6) * (grad * grad - square)
        tl.store(mean_at, mean.to(STATE_TYPE), mask=inside)
        tl.store(square_at, square.to(STATE_TYPE), mask=inside)
        update = mean / ((tl.sqrt(square / correction2) + tl.load(group + 4)) * correction1)
        param = tl.load(param_at, mask=inside, other=0.0).to(tl.float32)
        shrink = lr * tl.load(group + WEIGHT_DECAY)
        if CAUTIOUS:
            shrink = tl.where(param * update >= 0, shrink, 0.0)
        param = param * (1.0 - shrink) - lr * update
        tl.store(param_at, param.to(PARAM_TYPE), mask=inside)
