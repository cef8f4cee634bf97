"""What must hold for the transformer whatever its options."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from muonlab.errors import InputError
from muonlab.models import ModelOptions, Transformer, head_stats
from muonlab.models.ops import rms_norm
from muonlab.models.transformer import rotary_tables, rotate

SMALL = ModelOptions(vocab_size=61, seq_len=24, d_model=32, n_layers=2, n_heads=4, d_ff=48, init_std=0.2)
VARIANTS = {
    "plain": {},
    "gelu": {"activation": "gelu", "fused_qkv": True, "qkv_bias": True},
    "swiglu": {"activation": "swiglu", "n_kv_heads": 2, "qk_norm": True},
    "geglu untied": {"activation": "geglu", "tied_head": False, "embedding_scale": True},
    "silu experts": {"activation": "silu", "n_experts": 4, "top_k": 2, "fused_qkv": True, "n_kv_heads": 1},
    "gated experts": {"activation": "swiglu", "n_experts": 3, "top_k": 1},
}


def build(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(dataclasses.replace(SMALL, **changes)).to(dtype).eval()


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_future_cannot_change_the_past(changes: dict) -> None:
    model, x = build(**changes), tokens()
    y = x.clone()
    y[:, 15:] = (y[:, 15:] + 7) % SMALL.vocab_size
    before, after = model(x).hidden, model(y).hidden
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-12)
    assert (before[:, 15:] - after[:, 15:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_gets_a_gradient(changes: dict) -> None:
    model, x = build(**changes), tokens()
    output = model(x)
    stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, x.roll(-1, 1).flatten())
    ((stats.lse - stats.target_logit).mean() + output.auxiliary_loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_document_mask_equals_separate_documents(changes: dict) -> None:
    model, x = build(**changes), tokens()
    ids = torch.zeros_like(x)
    ids[0, 9:], ids[1, 4:], ids[1, 17:] = 1, 5, 6
    together = model(x, ids).hidden
    for row, spans in ((0, [(0, 9), (9, 24)]), (1, [(0, 4), (4, 17), (17, 24)])):
        for start, stop in spans:
            alone = model(x[row : row + 1, start:stop]).hidden[0]
            torch.testing.assert_close(together[row, start:stop], alone, rtol=0, atol=1e-5)  # fp32 rotary tables


def test_rotated_products_depend_on_distance_alone() -> None:
    cos, sin = (table.double() for table in rotary_tables(64, 16, 10_000.0))
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated_q, rotated_k = (rotate(x.expand(1, 64, 1, 16), cos, sin)[0, :, 0] for x in (q, k))
    products = rotated_q @ rotated_k.T  # [64, 64]
    for distance in (0, 1, 17):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(64), rtol=1e-6, atol=0)
    assert products[0, 0] != pytest.approx(products[17, 0].item(), abs=1e-3)


def test_rotation_turns_pairs_by_the_angle_of_their_position() -> None:
    cos, sin = rotary_tables(8, 6, 100.0)
    x = torch.randn(1, 8, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = rotate(x, cos, sin)[0, :, 0]
    for position in range(8):
        for pair in range(3):
            turned = torch.polar(torch.ones(()).double(), torch.tensor(position * 100.0 ** (-2 * pair / 6)).double())
            expected = torch.complex(x[0, position, 0, pair], x[0, position, 0, pair + 3]) * turned
            assert y[position, pair].item() == pytest.approx(expected.real.item(), abs=1e-6)
            assert y[position, pair + 3].item() == pytest.approx(expected.imag.item(), abs=1e-6)


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped, full = build(n_kv_heads=2), build()
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("key.weight", "value.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).view(32, 32)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()).hidden, full(tokens()).hidden, rtol=0, atol=1e-12)


def test_one_fused_projection_equals_three() -> None:
    split, fused = build(n_kv_heads=2, qkv_bias=True), build(n_kv_heads=2, qkv_bias=True, fused_qkv=True)
    state = split.state_dict()
    for layer in range(2):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"blocks.{layer}.attention.{name}.{leaf}") for name in ("query", "key", "value")]
            state[f"blocks.{layer}.attention.qkv.{leaf}"] = torch.cat(parts)
    fused.load_state_dict(state)
    torch.testing.assert_close(split(tokens()).hidden, fused(tokens()).hidden, rtol=0, atol=1e-12)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = build(), build(tied_head=False)
    assert tied.head_weight is tied.embedding.weight
    assert tied.get_output_embeddings() is tied.get_input_embeddings()
    assert untied.head_weight is untied.get_output_embeddings().weight
    assert untied.head_weight.data_ptr() != untied.embedding.weight.data_ptr()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 61 * 32


@pytest.mark.parametrize("changes", [{}, {"n_experts": 4, "router_noise": 0.5}], ids=["dense", "experts"])
def test_dropout_and_noise_act_in_training_only(changes: dict) -> None:
    model, x = build(dropout=0.3, **changes), tokens()
    torch.testing.assert_close(model(x).hidden, model(x).hidden, rtol=0, atol=0)
    without = build(dropout=0.0, **{**changes, "router_noise": 0.0} if changes else {})
    torch.testing.assert_close(model(x).hidden, without(x).hidden, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x).hidden, model(x).hidden)
    torch.manual_seed(3)
    first = model(x).hidden
    torch.manual_seed(3)
    assert torch.equal(first, model(x).hidden)


def test_the_default_spread_is_torchs_own_for_the_width() -> None:
    assert ModelOptions(d_model=768, n_heads=6).initial_std == pytest.approx(0.0208, abs=1e-4)
    assert ModelOptions(d_model=768, n_heads=6, init_std=0.02).initial_std == 0.02
    linear = torch.nn.Linear(768, 768)
    assert ModelOptions(d_model=768, n_heads=6).initial_std == pytest.approx(linear.weight.std().item(), rel=0.01)


def test_initial_matrices_have_the_asked_spread_and_residual_outputs_less() -> None:
    torch.manual_seed(0)
    model = Transformer(
        ModelOptions(
            vocab_size=512, d_model=128, n_layers=8, d_ff=512, n_heads=4, n_experts=2, qkv_bias=True, init_std=0.03
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "experts.down"))
            expected = 0.03 / math.sqrt(2 * 8) if residual else 0.03
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name


def test_parameters_can_be_drawn_anew_in_place() -> None:
    model = build(torch.float32)
    pointers = [p.data_ptr() for p in model.parameters()]
    torch.manual_seed(5)
    model.reset_parameters()
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.manual_seed(5)
    model.reset_parameters()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_norm_is_the_formula_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, generator=generator, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (16,), weight, 1e-3), rtol=1e-13, atol=0)
    torch.testing.assert_close(rms_norm(x, None, 1e-3), F.rms_norm(x, (16,), None, 1e-3), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-3), (x,))


def test_autocast_keeps_the_residual_stream_in_fp32() -> None:
    model, exact = build(torch.float32, init_std=0.05), build(init_std=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(tokens()).hidden
    assert hidden.dtype == torch.float32
    error = (hidden - exact(tokens()).hidden).norm() / hidden.norm()
    assert 1e-6 < error < 0.02


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="25 tokens is longer than the model's seq_len 24"):
        build()(tokens(length=25))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_compiled_in_one_piece_it_has_the_gradients_of_eager_fp64(changes: dict) -> None:
    """No graph break: nothing in it depends on data or asks a device. No custom backward is dropped on the way."""
    model, x = build(**changes), tokens()

    def loss(x: torch.Tensor) -> torch.Tensor:
        output = model(x)
        stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, x.roll(-1, 1).flatten())
        return (stats.lse - stats.target_logit + 0.1 * stats.mean_logit).mean() + output.auxiliary_loss

    eager = torch.autograd.grad(loss(x), list(model.parameters()))
    compiled = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x), list(model.parameters())
    )
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
