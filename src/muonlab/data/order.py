"""Which windows of a shard make which batch: pure functions, so that a resume needs no state.

A window is `seq_len` + 1 tokens, windows start every `seq_len` tokens: each token but the first is a target exactly once
an epoch. Batches walk through a permutation of the windows that depends on (seed, epoch) alone; an epoch ends in the
middle of a batch where it must, so that no window is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from muonlab.data.shards import Shard
from muonlab.errors import InputError

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def batch(shard: Shard, seq_len: int, sequences: int, seed: int, update: int) -> Batch:
    """The batch of update `update` (0-based).

    Returns inputs and targets, both [sequences, seq_len] int64, and the number of each input token's document within its
    window ([sequences, seq_len] int64) where the shard was opened with `document_mask`, else None.
    Raises InputError if the shard is shorter than one window.
    """
    count = window_count(shard, seq_len)
    position = np.arange(update * sequences, (update + 1) * sequences, dtype=np.int64)
    epoch, step = np.divmod(position, count)
    index = np.empty_like(step)
    for each in np.unique(epoch):
        chosen = epoch == each
        index[chosen] = permute(step[chosen], count, seed, int(each))
    return windows(shard, seq_len, index)


def evaluation_windows(shard: Shard, seq_len: int, tokens: int) -> Batch:
    """At most `tokens` target tokens in whole windows (at least one window), spread evenly over the shard, always the same.

    Same shapes as `batch`, with as many rows as there are windows.
    """
    count = window_count(shard, seq_len)
    chosen = min(count, max(1, tokens // seq_len))
    return windows(shard, seq_len, np.arange(chosen, dtype=np.int64) * count // chosen)


def window_count(shard: Shard, seq_len: int) -> int:
    """Windows in one epoch. Raises InputError if there is none."""
    if seq_len < 1:
        raise InputError(f"seq_len {seq_len} must be positive")
    count = (len(shard.tokens) - 1) // seq_len
    if count < 1:
        raise InputError(
            f"the {shard.name} split has {len(shard.tokens):,} tokens, shorter than one window of seq_len {seq_len} + 1;"
            " use more text, a larger fraction for this split or a smaller seq_len"
        )
    return count


def windows(shard: Shard, seq_len: int, index: np.ndarray) -> Batch:
    """The windows number `index` [n] as (inputs [n, seq_len], targets [n, seq_len], document ids or None)."""
    import torch  # takes seconds: counting windows does without it

    start = index * seq_len
    tokens = np.stack([shard.tokens[s : s + seq_len + 1] for s in start.tolist()]).astype(np.int64)  # [n, seq_len + 1]
    both = torch.from_numpy(tokens)
    documents = None
    if shard.document_mask:
        where = start[:, None] + np.arange(seq_len)
        number = np.searchsorted(shard.documents, where, side="right")
        documents = torch.from_numpy(number - number[:, :1])
    return both[:, :-1].contiguous(), both[:, 1:].contiguous(), documents


def permute(position: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(count), chosen by (seed, epoch), sends `position` (int64, any shape).

    A Feistel network over the next even power of two, walked until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002): a bijection by construction, no table to store or to rebuild on a resume,
    and the same on every version of numpy.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = _mix(
        np.arange(_ROUNDS, dtype=np.uint64) + _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    )
    value = position.astype(np.uint64)
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        value[outside] = (left << shift) | right
        outside = value >= np.uint64(count)
    return value.astype(np.int64)


_ROUNDS = 6


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 well mixed bits out."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
