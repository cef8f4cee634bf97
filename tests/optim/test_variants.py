"""Variants of the one rule, each against the sentence that defines it."""

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.optim import rules
from muonlab.optim.rules import apply_update_
from muonlab.optim.variants import equilibrated_rows, normalized, renormalized


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cautious_decay_spares_entries_that_the_update_pushes_outwards():
    param, update = random(8, 8), random(8, 8, seed=1)
    plain = param - 0.1 * update
    result = apply_update_(param.clone(), update, step_size=0.1, shrink=0.5, cautious=True)
    inwards = param * update > 0
    torch.testing.assert_close(result[inwards], (plain - 0.5 * param)[inwards])
    torch.testing.assert_close(result[~inwards], plain[~inwards])


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_normuon_equalises_neurons_at_an_unchanged_norm(shape):
    update = random(3, *shape) * torch.logspace(-1, 1, shape[0])[:, None]
    second = torch.zeros(3, shape[0], 1)
    result = normalized(update, second, 0.0)
    rows = result.norm(dim=-1)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(result.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    torch.testing.assert_close(second, update.square().mean(-1, keepdim=True))
    zero = normalized(torch.zeros(1, *shape), torch.zeros(1, shape[0], 1), 0.9)
    assert torch.equal(zero, torch.zeros(1, *shape))


def test_normuon_averages_over_updates_and_keeps_the_state_of_every_matrix_apart():
    params = [nn.Parameter(torch.zeros(12, 20)), nn.Parameter(torch.zeros(2, 12, 20))]
    options = {
        "normuon_beta": 0.9,
        "dtype": "float32",
        "weight_decay": 0.0,
        "scale": "none",
        "lr": 1.0,
        "momentum": 0.0,
    }
    optimizer = Muon(params, **options)
    second = torch.zeros(3, 12, 1)
    for seed in range(4):
        gradients = random(3, 12, 20, seed=seed)
        params[0].grad, params[1].grad = gradients[0], gradients[1:]
        before = torch.cat([params[0].detach()[None], params[1].detach()])
        optimizer.step()
        update = orthogonalize(gradients, "keller", dtype="float32")
        second = 0.9 * second + 0.1 * update.square().mean(-1, keepdim=True)
        expected = update / second.sqrt()
        expected *= update.norm(dim=(1, 2), keepdim=True) / expected.norm(dim=(1, 2), keepdim=True)
        moved = before - torch.cat([params[0].detach()[None], params[1].detach()])
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)


def test_equilibrated_rows_have_the_mean_norm_and_zero_rows_stay_zero():
    x = random(2, 6, 9)
    x[0, 2] = 0
    rows = equilibrated_rows(x).norm(dim=-1)
    assert rows[0, 2] == 0
    torch.testing.assert_close(rows[1], (x[1].norm() / 6**0.5).expand(6))


def test_renormalised_updates_have_the_norm_of_an_orthogonal_matrix():
    update = orthogonalize(random(2, 6, 9), "keller")
    torch.testing.assert_close(renormalized(update).norm(dim=(1, 2)), torch.full((2,), 6**0.5))
    assert not renormalized(torch.zeros(1, 6, 9)).any()


def test_bf16_momentum_takes_half_the_memory_and_loses_little_direction():
    params = [nn.Parameter(torch.zeros(64, 128)) for _ in range(2)]
    options = {"lr": 0.02, "weight_decay": 0.0, "dtype": "float32"}
    half, full = Muon(params[:1], momentum_dtype="bfloat16", **options), Muon(params[1:], **options)
    mean = random(64, 128)
    for seed in range(100):
        for param in params:
            param.grad = mean + 3 * random(64, 128, seed=seed)
        half.step()
        full.step()
    buffers = [optimizer.state[param]["momentum_buffer"] for optimizer, param in zip((half, full), params)]
    assert [buffer.dtype for buffer in buffers] == [torch.bfloat16, torch.float32]
    assert torch.nn.functional.cosine_similarity(*(param.detach().flatten() for param in params), dim=0) > 0.999


def experts(idle, updates=3, **options):
    """A stack of 3 experts that all get gradients, then the second gets none; returns its movement per update after."""
    stack = nn.Parameter(random(3, 12, 16))
    optimizer = Muon([stack], idle=idle, lr=0.1, dtype="float32", **options)
    for seed in range(updates):
        stack.grad = random(3, 12, 16, seed=seed)
        optimizer.step()
    moves, buffers = [], []
    for seed in range(10):
        stack.grad = random(3, 12, 16, seed=seed)
        stack.grad[1] = 0
        before = stack.detach().clone()
        buffers.append(optimizer.state[stack]["momentum_buffer"].clone())
        optimizer.step()
        moves.append((stack.detach() - before).norm(dim=(1, 2)))
    return torch.stack(moves), torch.stack(buffers)


def test_idle_matrices_are_skipped_bit_for_bit():
    for options in ({}, {"heavy_ball": True}, {"normuon_beta": 0.95}, {"momentum_dtype": "bfloat16"}):
        moves, buffers = experts("skip", **options)
        assert (moves[:, 1] == 0).all()
        assert (moves[:, [0, 2]] > 0).all()
        assert (buffers[:, 1] == buffers[0, 1]).all()


def test_idle_matrices_fade_as_their_momentum_does():
    moves, _ = experts("fade", weight_decay=0.0)
    ratios = moves[1:, 1] / moves[:-1, 1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.95), rtol=1e-2, atol=0)


def test_idle_matrices_that_move_do_so_at_full_speed_as_in_every_other_implementation():
    moves, _ = experts("move", weight_decay=0.0)
    assert (moves[:, 1] > 0.9 * moves[0, 1]).all()


def test_an_expert_that_comes_back_goes_on_as_if_nothing_had_been():
    a, b = nn.Parameter(random(2, 12, 16)), nn.Parameter(random(2, 12, 16))
    optimizers = [Muon([param], idle="skip", dtype="float32") for param in (a, b)]
    for seed in range(6):
        a.grad = random(2, 12, 16, seed=seed)
        optimizers[0].step()
        b.grad = a.grad.clone()
        optimizers[1].step()
        b.grad = torch.zeros(2, 12, 16)
        optimizers[1].step()
    assert torch.equal(a, b)


def test_hyper_parameters_broadcast_along_the_leading_axes():
    """A sweep: two replicas with their own momentum, learning rate and decay in one call."""
    gradients = random(2, 5, 12, 16)
    momentum, lr = torch.tensor([0.9, 0.5])[:, None, None, None], torch.tensor([0.1, 0.01])[:, None, None, None]
    from muonlab.optim.coefficients import resolve

    iteration = resolve("polar_express")
    together = torch.zeros(2, 5, 12, 16)
    buffer = torch.zeros(2, 5, 12, 16)
    update = rules.muon(
        gradients, {"momentum_buffer": buffer}, momentum=momentum, nesterov=True, iteration=iteration, dtype="float32"
    )
    apply_update_(together, update, step_size=lr, shrink=lr * 0.1)
    for i in range(2):
        alone, own = torch.zeros(5, 12, 16), torch.zeros(5, 12, 16)
        update = rules.muon(
            gradients[i],
            {"momentum_buffer": own},
            momentum=momentum[i].item(),
            nesterov=True,
            iteration=iteration,
            dtype="float32",
        )
        apply_update_(alone, update, step_size=lr[i].item(), shrink=lr[i].item() * 0.1)
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(buffer[i], own)


@pytest.mark.parametrize("rule", rules.ELEMENTWISE)
def test_elementwise_rules_broadcast_too(rule):
    entry = rules.ELEMENTWISE[rule]
    hyper = {"betas": (0.9, 0.99), "eps": 1e-8, "rho": 0.04, "momentum": 0.9, "nesterov": True}
    hyper = {name: hyper[name] for name in entry.options}
    stacked = {
        name: tuple(torch.tensor([v, v / 2])[:, None] for v in value)
        if isinstance(value, tuple)
        else torch.tensor([value, value / 2])[:, None]
        for name, value in hyper.items()
        if name != "nesterov"
    } | ({"nesterov": True} if "nesterov" in hyper else {})
    if entry.counts:
        stacked["step"], hyper["step"] = torch.tensor([[3.0], [3.0]]), torch.tensor(3.0)
    gradient = random(2, 7)
    state = {name: random(2, 7, seed=1).abs() for name in entry.state}
    first = {name: value[0].clone() for name, value in state.items()}
    together = entry.update(gradient, state, **stacked)
    alone = entry.update(gradient[0], first, **hyper)
    torch.testing.assert_close(together[0], alone, rtol=1e-5, atol=1e-6)
    for name in entry.state:
        torch.testing.assert_close(state[name][0], first[name], rtol=1e-5, atol=1e-6)
