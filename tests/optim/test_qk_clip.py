import pytest
import torch

from muonlab.errors import InputError
from muonlab.optim import max_logits, qk_clip_


def logits(x, query, key, heads, kv_heads):
    q = (x @ query.T).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = (x @ key.T).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
    return q, k


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("chunk", [3, 256])
def test_the_largest_logit_is_that_of_the_whole_causal_matrix(kv_heads, chunk):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, kv_heads, 10, 8)
    whole = q @ k.repeat_interleave(4 // kv_heads, 1).mT * 8**-0.5
    whole = whole.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(max_logits(q, k, chunk=chunk), whole.amax((0, 2, 3)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_clipped_heads_fall_to_the_threshold_and_others_keep_their_logits(kv_heads):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 16)
    query, key = torch.randn(32, 16), torch.randn(8 * kv_heads, 16)
    query[:8] *= 10
    before = max_logits(*logits(x, query, key, 4, kv_heads))
    threshold = before[1:].max().item() * 1.01
    factor = qk_clip_(query, key, before, threshold)
    after = max_logits(*logits(x, query, key, 4, kv_heads))
    assert after[0].item() == pytest.approx(threshold, rel=1e-4)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-4)


def test_nothing_changes_below_the_threshold():
    query, key = torch.randn(32, 16), torch.randn(16, 16)
    copies = query.clone(), key.clone()
    qk_clip_(query, key, torch.full((4,), 99.0), 100.0)
    assert torch.equal(query, copies[0])
    assert torch.equal(key, copies[1])


def test_weights_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(InputError, match="cannot be divided into 3 heads"):
        qk_clip_(torch.ones(32, 8), torch.ones(32, 8), torch.ones(3))
    with pytest.raises(InputError, match="do not fit"):
        qk_clip_(torch.ones(32, 8), torch.ones(24, 8), torch.ones(4))
    with pytest.raises(InputError, match="above 0"):
        qk_clip_(torch.ones(32, 8), torch.ones(32, 8), torch.ones(4), 0.0)
