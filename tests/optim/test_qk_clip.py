"""QK-clip: heads whose attention logits exceed the threshold come back to it, all others stay."""

import pytest
import torch
from torch import nn

from muonlab import Muon
from muonlab.errors import InputError
from muonlab.models import ModelOptions, Transformer
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


def attention_model(**options):
    """A model of the laboratory whose first head has logits far above the threshold."""
    sizes = {"vocab_size": 40, "seq_len": 12, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 32, "init_std": 0.3}
    torch.manual_seed(0)
    model = Transformer(ModelOptions(**{**sizes, **options}))
    with torch.no_grad():
        for block in model.blocks:
            for tensor in block.attention.query_key()[0]:
                tensor[:8] *= 20
    return model


def largest_logits(model, tokens, document_ids=None):
    """[layers, heads], measured apart from any optimizer by hooks in front of torch's attention."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        seen.append(max_logits(q, k, mask=attn_mask))
        return original(q, k, v, attn_mask=attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model.eval()(tokens, document_ids)
        model.train()
    return torch.stack(seen)


TOKENS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused_qkv", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_after_an_update_no_attention_logit_exceeds_the_threshold(fused_qkv, n_kv_heads, qkv_bias, compiled):
    if compiled and n_kv_heads != 2:
        pytest.skip("one shape is enough")
    model = attention_model(fused_qkv=fused_qkv, n_kv_heads=n_kv_heads, qkv_bias=qkv_bias)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    before = largest_logits(model, TOKENS)
    threshold = before[:, 1:].max().item() + 0.5
    assert (before[:, 0] > threshold).all()
    optimizer = Muon(model, lr=0.0, qk_clip=threshold)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for part in (TOKENS[:1], TOKENS[1:]):  # micro-batches: the largest of both counts
        forward(part).hidden.square().mean().backward()
    meters = torch.stack([block.attention.logit_meter.largest for block in model.blocks])
    torch.testing.assert_close(meters, before)
    optimizer.step()
    # The second layer sees other inputs once the first is clipped; its weights follow what it saw.
    after = largest_logits(model, TOKENS)
    assert after[0, 0].item() == pytest.approx(threshold, rel=1e-4)
    torch.testing.assert_close(after[0, 1:], before[0, 1:], rtol=1e-4, atol=1e-4)
    assert torch.isinf(model.blocks[0].attention.logit_meter.largest).all()
    for _ in range(3):
        model(TOKENS)
        optimizer.step()
    assert (largest_logits(model, TOKENS) <= threshold * 1.0001).all()


def test_documents_that_do_not_see_each_other_do_not_count():
    model = attention_model()
    ids = torch.arange(12).expand(3, 12) // 3
    Muon(model, qk_clip=1.0)
    model(TOKENS, ids)
    meters = torch.stack([block.attention.logit_meter.largest for block in model.blocks])
    torch.testing.assert_close(meters, largest_logits(model, TOKENS, ids))
    assert (meters <= largest_logits(model, TOKENS)).any()


def test_only_training_is_measured_and_a_model_without_the_option_has_no_meter():
    model = attention_model()
    Muon(model)
    assert model.blocks[0].attention.logit_meter is None
    names = list(model.state_dict())
    Muon(model, qk_clip=50.0)
    model.eval()
    model(TOKENS)
    assert torch.isinf(model.blocks[0].attention.logit_meter.largest).all()
    assert list(model.state_dict()) == names


def test_an_update_that_is_skipped_clips_nothing():
    model = attention_model()
    optimizer = Muon(model, lr=0.0, qk_clip=1.0, skip_nonfinite=True)
    before = [param.detach().clone() for param in model.parameters()]
    model(TOKENS).hidden.sum().backward()
    next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before))


def test_a_model_of_ones_own_takes_part_with_one_attribute_and_one_method():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
            self.logit_meter = None

        def query_key(self):
            return list(self.q.parameters()), list(self.k.parameters()), 2

        def forward(self, x):
            q, k = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (self.q(x), self.k(x)))
            if self.logit_meter is not None:
                self.logit_meter(q, k)
            return q, k

    torch.manual_seed(0)
    model, x = Own(), 30 * torch.randn(2, 6, 16)
    optimizer = Muon(model, lr=0.0, qk_clip=5.0)
    assert max_logits(*model(x)).max() > 50
    optimizer.step()
    assert max_logits(*model(x)).max() <= 5.0 * 1.0001


def test_heads_without_a_finite_logit_are_left_alone():
    query, key = torch.randn(32, 16), torch.randn(16, 16)
    copies = query.clone(), key.clone()
    qk_clip_(query, key, torch.tensor([torch.inf, torch.nan, -torch.inf, 1.0]), 2.0)
    assert torch.equal(query, copies[0])
    assert torch.equal(key, copies[1])


def test_models_that_cannot_be_clipped_are_refused():
    with pytest.raises(InputError, match="normalise queries and keys"):
        Muon(attention_model_with_norm(), qk_clip=100.0)
    with pytest.raises(InputError, match="no attention of this model"):
        Muon(nn.Linear(16, 16), qk_clip=100.0)
    with pytest.raises(InputError, match="give the optimizer the model"):
        Muon(nn.Linear(16, 16).parameters(), qk_clip=100.0)
    with pytest.raises(InputError, match="qk_clip must be a number > 0"):
        Muon(nn.Linear(16, 16), qk_clip=0.0)


def attention_model_with_norm():
    return Transformer(ModelOptions(vocab_size=40, d_model=32, n_layers=1, n_heads=4, d_ff=32, qk_norm=True))
