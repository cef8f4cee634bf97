"""The memory formula against tensors that are really there."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from muonlab.diagnostics import training_memory
from muonlab.errors import InputError
from muonlab.models import MODELS, ModelOptions, Transformer, head_stats
from muonlab.optim.registry import OPTIMIZERS, build_optimizer

MICRO = dataclasses.replace(MODELS["micro"], vocab_size=128, seq_len=64)
MIXTURE = ModelOptions(vocab_size=128, seq_len=64, n_layers=2, d_ff=256, n_experts=4, activation="swiglu", n_kv_heads=2)


def run(model: Transformer, batch: int) -> torch.Tensor:
    options = model.options
    tokens = torch.randint(options.vocab_size, (batch, options.seq_len))
    output = model(tokens)
    stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, tokens.flatten())
    return (stats.lse - stats.target_logit).mean() + output.auxiliary_loss


@pytest.mark.parametrize("name", ["muon", "adamw", "lion", "sophia", "sgd"])
@pytest.mark.parametrize("options", [MICRO, MIXTURE], ids=["dense", "experts"])
def test_what_stays_is_exactly_what_a_step_leaves(options: ModelOptions, name: str) -> None:
    torch.manual_seed(0)
    model = Transformer(options)
    optimizer = build_optimizer(model, OPTIMIZERS[name].options(lr=1e-3))
    run(model, 1).backward()
    optimizer.step()
    memory = training_memory(options, name, micro_batch_size=1)
    assert memory.parameters == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor) and x.ndim]
    assert memory.optimizer_state == sum(x.nbytes for x in state)


@pytest.mark.parametrize(
    "options",
    [MICRO, dataclasses.replace(MICRO, activation="geglu", qk_norm=True), MIXTURE],
    ids=["dense", "gated", "experts"],
)
def test_activations_are_within_a_quarter_of_what_autograd_keeps(options: ModelOptions) -> None:
    torch.manual_seed(0)
    model = Transformer(options)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        run(model, 8)
    measured = sum(storage.nbytes() for storage in kept.values())
    memory = training_memory(options, "muon", micro_batch_size=8)
    assert memory.activations + memory.logits == pytest.approx(measured, rel=0.25)


def test_half_precision_halves_most_activations_and_nothing_that_stays() -> None:
    full, low = (training_memory(MICRO, "adamw", micro_batch_size=64, precision=p) for p in ("fp32", "bf16"))
    assert 0.5 < low.activations / full.activations < 0.75
    assert (low.parameters, low.gradients, low.optimizer_state) == (
        full.parameters,
        full.gradients,
        full.optimizer_state,
    )


def test_muon_needs_less_state_than_adamw_and_lion_half() -> None:
    options = MODELS["qwen-385m"]
    state = {
        n: training_memory(options, n, micro_batch_size=1).optimizer_state for n in ("muon", "adamw", "lion", "sophia")
    }
    assert state["lion"] * 2 == state["adamw"] == state["sophia"] > state["muon"] > state["lion"]


def test_an_unknown_optimizer_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'muon'"):
        training_memory(MICRO, "moun", micro_batch_size=1)
