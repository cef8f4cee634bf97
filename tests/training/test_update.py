"""One update: weights that are cast once give the numbers of autocast."""

from dataclasses import replace

import pytest
import torch
from runs import tiny
from torch import Tensor

from muonlab.models import MODELS, Transformer
from muonlab.models.head import head_stats
from muonlab.optim import kernels
from muonlab.training.loop import resolve
from muonlab.training.losses import cross_entropy, training_loss
from muonlab.training.programs import Program

MIXTURE = {"n_experts": 4, "top_k": 2}


def built(**changes):
    config = resolve(tiny(**changes))[0]
    return config, Program(config)


def batch(config) -> tuple[Tensor, Tensor]:
    rows = config.training.micro_batch_size * config.training.accumulation
    tokens = torch.randint(config.model.vocab_size, (rows, 33), generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1], tokens[:, 1:]


def by_autocast(model: Transformer, config, inputs: Tensor, targets: Tensor) -> list[Tensor | None]:
    """Gradients of all parameters, every micro-batch under plain autocast, added up by autograd."""
    count = config.training.accumulation
    model.zero_grad(set_to_none=True)
    for x, y in zip(inputs.chunk(count), targets.chunk(count)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            output = model(x)
            stats = head_stats(
                output.hidden.flatten(0, 1), model.head_weight, y.flatten(), config.training.logit_chunk_bytes, True
            )
        objective = training_loss(stats, config.loss).mean() + output.auxiliary_loss
        assert cross_entropy(stats).isfinite().all()
        (objective / count).backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("model", [{}, MIXTURE, {"activation": "swiglu", "fused_qkv": True, "qkv_bias": True}], ids=str)
def test_weights_cast_once_per_update_give_the_gradients_of_autocast_bit_for_bit(model):
    training = {"precision": "bf16", "accumulation": 3, "clip_norm": 0.0}
    config, program = built(model=model, training=training)
    assert program.update.micro_step._cast
    inputs, targets = batch(config)
    for update in range(2):  # the second with weights that the first has changed
        expected = by_autocast(program.model, config, inputs, targets)
        program.update(update, inputs, targets, None)
        for (name, parameter), grad in zip(program.model.named_parameters(), expected):
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype, name
            assert torch.equal(parameter.grad, grad), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [{}, MIXTURE], ids=["dense", "mixture"])
def test_the_compiled_program_makes_the_gradients_of_the_eager_one(model, precision):
    found = []
    for program in ("eager", "compile"):
        config, built_program = built(model=model, training={"precision": precision, "program": program})
        built_program.update(0, *batch(config), None)
        assert built_program.update.program == program
        found.append({name: parameter.grad for name, parameter in built_program.model.named_parameters()})
    for name, grad in found[0].items():
        error = (grad - found[1][name]).norm() / grad.norm()
        assert error < (1e-4 if precision == "fp32" else 5e-2), name


def test_the_forward_pass_reads_the_casts():
    config, program = built(training={"precision": "bf16", "accumulation": 2})
    micro_step = program.update.micro_step
    loss, _ = micro_step(*batch(config), None)
    for cast in micro_step._cast.values():
        cast.data.zero_()
    without, _ = micro_step(*batch(config), None)
    assert abs(loss - without) > 1e-3


def test_an_optimizer_that_steps_through_torch_is_named_by_its_update():
    _, program = built(optimizer={"name": "muon"})
    update = program.update
    assert update.notice is None
    kernels._plans.setdefault(update.optimizer, kernels._Plans()).refused = "GPUs older than Ampere (a T4)"
    assert update.notice == (
        "the optimizer steps through torch: its fast step does not cover GPUs older than Ampere (a T4)"
    )


def test_an_update_that_failed_leaves_no_gradient_for_the_next(monkeypatch):
    """As a capture that runs out of memory does: the error is caught, the next update runs."""
    training = {"precision": "bf16", "accumulation": 2, "clip_norm": 0.0}
    config, program = built(training=training)
    inputs, targets = batch(config)
    expected = by_autocast(program.model, config, inputs, targets)
    micro_step = program.update.micro_step
    with monkeypatch.context() as broken:
        broken.setattr(micro_step, "add_gradients", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            program.update(0, inputs, targets, None)
    program.update(0, inputs, targets, None)
    for parameter, grad in zip(program.model.parameters(), expected):
        assert torch.equal(parameter.grad, grad)


def test_a_weight_that_is_frozen_later_has_no_gradient_and_stays_until_it_is_thawed():
    config, program = built(training={"precision": "bf16", "accumulation": 2})
    weight = program.model.blocks[0].attention.output.weight
    for update, trained in enumerate((True, False, True)):
        weight.requires_grad_(trained)
        before = weight.clone()
        program.update(update, *batch(config), None)
        assert (weight.grad is not None) == trained
        assert torch.equal(weight, before) != trained


@pytest.mark.parametrize("changes", [{"precision": "fp32", "accumulation": 3}, {"precision": "bf16"}], ids=str)
def test_nothing_is_cast_where_every_weight_is_read_once_or_in_its_own_precision(changes):
    _, program = built(training=changes)
    assert not program.update.micro_step._cast


@pytest.mark.parametrize("changes", [{}, MIXTURE, {"tied_head": False, "activation": "swiglu"}], ids=str)
def test_the_weights_of_matmuls_are_all_matrices_but_embedding_head_and_router(changes):
    options = replace(MODELS["micro"], vocab_size=64, **changes)
    model = Transformer(options)
    names = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    apart = {name for name in names if name.split(".")[0] in ("embedding", "head") or ".router." in name}
    assert set(model.matmul_weights()) == names - apart
    assert apart
