import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonlab.data.order import batch, evaluation_windows, permute, window_count
from muonlab.data.shards import Shard
from muonlab.errors import InputError


def shard(tokens: int, documents=(0,), document_mask: bool = False) -> Shard:
    """Token i has the value i: a window tells where it comes from."""
    return Shard(
        name="train",
        tokens=np.arange(tokens, dtype=np.uint16),
        documents=np.array([*documents, tokens], np.int64),
        bytes=tokens,
        unigram_entropy=1.0,
        checksum="",
        document_mask=document_mask,
    )


@given(st.integers(1, 700), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection_of_any_range(count, seed, epoch):
    assert sorted(permute(np.arange(count), count, seed, epoch).tolist()) == list(range(count))


def test_permute_spreads_every_position_over_the_range_as_chance_would():
    count, seeds = 10, 4_000
    landed = np.stack([permute(np.arange(count), count, seed, 3) for seed in range(seeds)])  # [seeds, count]
    for position in range(count):
        observed = np.bincount(landed[:, position], minlength=count)
        chi_square = ((observed - seeds / count) ** 2 / (seeds / count)).sum()
        assert chi_square < 35  # 9 degrees of freedom: probability 6e-5 each under chance, and the seeds are fixed
    neighbours = (np.diff(landed, axis=1) == 1).mean()  # under chance 9 * 8! * ... / 10! = 1 / 10
    assert abs(neighbours - 0.1) < 0.01


@pytest.mark.parametrize(("tokens", "seq_len", "sequences"), [(97, 4, 5), (1_025, 16, 8), (17, 16, 3), (200, 7, 64)])
def test_every_window_comes_exactly_once_an_epoch(tokens, seq_len, sequences):
    data = shard(tokens)
    count = window_count(data, seq_len)
    epochs = 3
    starts = []
    for update in range(-(-epochs * count // sequences)):
        inputs, _, _ = batch(data, seq_len, sequences, 5, update)
        starts += inputs[:, 0].tolist()
    expected = [window * seq_len for window in range(count)]
    for epoch in range(epochs):
        assert sorted(starts[epoch * count : (epoch + 1) * count]) == expected


def test_targets_are_the_inputs_moved_by_one_and_all_but_the_first_token_are_targets():
    data = shard(1_025)
    inputs, targets, documents = batch(data, 16, 64, 0, 0)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (64, 16)
    assert documents is None
    torch.testing.assert_close(targets, inputs + 1, rtol=0, atol=0)
    assert sorted(targets.flatten().tolist()) == list(range(1, 1_025))


def test_a_batch_depends_on_its_arguments_alone():
    data = shard(4_000)
    forward = [batch(data, 16, 8, 7, update)[0] for update in range(50)]
    for update in reversed(range(50)):
        assert torch.equal(batch(data, 16, 8, 7, update)[0], forward[update])


def test_another_seed_or_epoch_is_another_order():
    data = shard(4_001)
    first = batch(data, 4, 1_000, 0, 0)[0]
    assert not torch.equal(first, batch(data, 4, 1_000, 1, 0)[0])
    assert not torch.equal(first, batch(data, 4, 1_000, 0, 1)[0])
    assert not torch.equal(first[:, 0], torch.sort(first[:, 0]).values)


def test_the_batch_size_does_not_change_the_order_of_windows():
    data = shard(4_001)
    whole = batch(data, 4, 60, 3, 0)[0]
    parts = torch.cat([batch(data, 4, 20, 3, update)[0] for update in range(3)])
    assert torch.equal(whole, parts)


def test_document_ids_count_the_documents_inside_a_window():
    data = shard(17, documents=(0, 3, 4, 12), document_mask=True)
    inputs, _, documents = evaluation_windows(data, 8, 16)
    assert inputs[:, 0].tolist() == [0, 8]
    assert documents is not None
    assert documents.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_evaluation_windows_are_fixed_disjoint_and_spread_over_the_split():
    data = shard(10_001)
    inputs, targets, _ = evaluation_windows(data, 10, 250)
    assert inputs.shape == targets.shape == (25, 10)
    starts = inputs[:, 0].tolist()
    assert starts == list(range(0, 10_000, 400))
    assert torch.equal(inputs, evaluation_windows(data, 10, 250)[0])


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (10**9, 1_000), (9_999, 999)])
def test_evaluation_takes_at_least_one_window_and_at_most_all(tokens, rows):
    inputs, _, _ = evaluation_windows(shard(10_001), 10, tokens)
    assert len(inputs) == rows
    assert len(set(inputs[:, 0].tolist())) == rows


def test_a_shard_shorter_than_one_window_gets_one_line():
    with pytest.raises(InputError, match=r"train split has 16 tokens.*seq_len 16") as caught:
        batch(shard(16), 16, 1, 0, 0)
    assert "\n" not in str(caught.value)
    assert batch(shard(17), 16, 1, 0, 0)[0].shape == (1, 16)
