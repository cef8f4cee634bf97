"""Closed forms of parameters and arithmetic against built models and torch's own counter."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muonlab.diagnostics import count_parameters, hidden_matrices, token_flops
from muonlab.models import MODELS, ModelOptions, Transformer, head_stats

BUILT = {name: dataclasses.replace(o, vocab_size=o.vocab_size or 2048) for name, o in MODELS.items()}
BUILT["grouped"] = ModelOptions(vocab_size=99, n_heads=8, n_kv_heads=2, qkv_bias=True, fused_qkv=True, tied_head=False)


@pytest.mark.parametrize("name", BUILT)
def test_counts_by_kind_are_those_of_the_built_model(name: str) -> None:
    options = BUILT[name]
    with torch.device("meta"):
        model = Transformer(options)
    kinds = dict.fromkeys(("hidden", "embedding", "head", "router", "vector"), 0)
    for parameter_name, parameter in model.named_parameters():
        module = parameter_name.split(".")[-2]
        kind = module if module in ("embedding", "head", "router") else "hidden" if parameter.ndim > 1 else "vector"
        kinds[kind] += parameter.numel()
    counts = count_parameters(options)
    assert {kind: getattr(counts, kind) for kind in kinds} == kinds
    assert counts.total == sum(kinds.values())
    assert sum(m * n * count for (m, n), count in hidden_matrices(options).items()) == kinds["hidden"]


def test_active_parameters_of_the_experiments() -> None:
    assert count_parameters(MODELS["moe-79m"]).active == 36_592_512
    assert count_parameters(MODELS["moe-107m"]).active / 107_371_392 == pytest.approx(0.407, abs=1e-3)
    assert count_parameters(MODELS["qwen-385m"]).active == count_parameters(MODELS["qwen-385m"]).total


def test_the_measured_update_of_the_79m_model_costs_11_14_teraflop() -> None:
    assert token_flops(MODELS["moe-79m"]).training * 4 * 24 * 512 / 1e12 == pytest.approx(11.14, abs=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(vocab_size=80, seq_len=32, d_model=48, n_heads=4, n_layers=2, d_ff=96),
        ModelOptions(
            vocab_size=80, seq_len=32, d_model=48, n_heads=4, n_kv_heads=2, n_layers=3, d_ff=64, activation="swiglu"
        ),
        ModelOptions(
            vocab_size=80, seq_len=32, d_model=48, n_heads=4, n_layers=1, d_ff=96, fused_qkv=True, tied_head=False
        ),
    ],
)
def test_flops_are_those_that_torch_counts(options: ModelOptions) -> None:
    """Forward and backward; torch counts the full square of attention, of which causality allows (T + 1) / 2T."""
    model, tokens = Transformer(options), torch.randint(80, (3, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stats = head_stats(model(tokens).hidden.flatten(0, 1), model.head_weight, tokens.flatten())
        (stats.lse - stats.target_logit).sum().backward()
    flops = token_flops(options)
    square = flops.attention * 2 * 32 // 33
    assert counter.get_total_flops() == 3 * 32 * 3 * (flops.forward - flops.attention + square)
