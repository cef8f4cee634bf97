"""Defects that were found in public implementations, each as a thing that must not happen here."""

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.optim import AdamWOptions, build_optimizer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matrix(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("heavy_ball", [False, True])
@pytest.mark.parametrize("momentum_dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("work", ["auto", "bfloat16"])
def test_momentum_is_the_average_of_gradients_and_gradients_stay(dtype, nesterov, heavy_ball, momentum_dtype, work):
    """torch.optim.Muon and pytorch_optimizer normalise the bf16 momentum buffer itself, KellerJordan changes the gradient."""
    params = [nn.Parameter(matrix(12, 20, dtype=dtype)) for _ in range(2)]
    optimizer = Muon(params, nesterov=nesterov, heavy_ball=heavy_ball, momentum_dtype=momentum_dtype, dtype=work)
    expected = torch.zeros(12, 20, dtype=torch.float64)
    for i in range(5):
        gradient = 400 * matrix(12, 20, seed=i).to(dtype)
        expected = 0.95 * expected + (1.0 if heavy_ball else 0.05) * gradient.double()
        for param in params:
            param.grad = gradient.clone()
        optimizer.step()
        assert all(torch.equal(param.grad, gradient) for param in params)
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    rounding = 0.02 if buffer.dtype == torch.bfloat16 else 1e-5
    assert (buffer.double() - expected).norm() / expected.norm() < rounding


def test_aol_coefficients_without_preconditioning_are_not_offered_and_aol4_descends_near_rank_one():
    """Emerging-Optimizers' `aol` ascends along the dominant direction of a matrix of nearly rank one."""
    u, v = matrix(64, 1), matrix(1, 96, seed=1)
    x = u @ v / (u.norm() * v.norm()) + 1e-3 * matrix(64, 96, seed=2)
    for dtype in ("float32", "bfloat16"):
        along = (u.T @ orthogonalize(x, "aol4", dtype=dtype).float() @ v.T).item() / (u.norm() * v.norm()).item()
        assert 0.9 < along < 1.1


def test_cans_in_bf16_does_not_blow_up_and_zero_gradients_are_not_nan():
    """Emerging-Optimizers' `cans` has no margin: singular values up to 2.2 in bf16, NaN for zero with fp64 normalisation."""
    for seed in range(10):
        o = orthogonalize(matrix(128, 512, seed=seed), "cans", dtype="bfloat16").double()
        assert torch.linalg.svdvals(o).max() < 1.2
    assert not orthogonalize(torch.zeros(4, 6, dtype=torch.float64), "cans").any()


def test_a_loaded_learning_rate_is_used_and_the_fallback_state_is_saved():
    """gram-newton-schulz ignores the loaded learning rate and forgets the state of its scalar optimizer."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    a = Muon(model, lr=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    a.step()
    saved = a.state_dict()
    assert sum("exp_avg" in state for state in saved["state"].values()) == 2
    b = Muon(model, lr=0.01)
    b.load_state_dict(saved)
    assert {group["lr"] for group in b.param_groups} == {0.5}


def test_convolutions_of_one_shape_are_not_mixed_with_each_other():
    """dion's flatten=True joins the parameters of one shape into one matrix."""
    params = [nn.Parameter(matrix(8, 4, 3, 3, seed=i)) for i in range(3)]
    before = [param.detach().clone() for param in params]
    for i, param in enumerate(params):
        param.grad = matrix(8, 4, 3, 3, seed=10 + i)
    Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, dtype="float32", coefficients="polar_express").step()
    for i, (param, old) in enumerate(zip(params, before)):
        expected = orthogonalize(matrix(8, 4, 3, 3, seed=10 + i).flatten(1), dtype="float32").view(8, 4, 3, 3)
        torch.testing.assert_close(old - param.detach(), expected, rtol=0, atol=1e-5)


def test_groups_are_formed_by_shape_never_by_number_of_elements():
    """flash-muon groups parameters by number of elements."""
    params = [nn.Parameter(matrix(8, 18)), nn.Parameter(matrix(12, 12))]
    for param in params:
        param.grad = matrix(*param.shape, seed=3)
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    Muon(params, dtype="float32").step()
    for param, other in zip(params, alone):
        other.grad = param.grad
        Muon([other], dtype="float32").step()
        torch.testing.assert_close(param, other, rtol=0, atol=1e-6)


def test_a_parameter_without_a_gradient_stays_and_gets_no_state():
    """KellerJordan/Muon makes a zero gradient for it, and old momentum moves it on."""
    for options in ({}, {"convention": "keller"}):
        params = [nn.Parameter(matrix(8, 8)), nn.Parameter(matrix(8, 8))]
        optimizer = Muon(params, **options)
        for param in params:
            param.grad = matrix(8, 8, seed=1)
        optimizer.step()
        params[1].grad = None
        before = params[1].detach().clone()
        optimizer.step()
        assert torch.equal(params[1].detach(), before)
        assert params[1].grad is None


def test_heads_are_not_orthogonalised_and_ties_do_not_crash():
    """pytorch_optimizer looks for 'head' in the name `weight`; lm_head goes to Muon, tied embeddings raise."""
    model = nn.ModuleDict({"embed": nn.Embedding(64, 16), "lm_head": nn.Linear(16, 64, bias=False)})
    assert {row["rule"] for row in Muon(model).routing().rows} == {"adamw"}
    model["lm_head"].weight = model["embed"].weight
    assert len(Muon(model).routing().rows) == 1


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e6])
def test_tiny_and_huge_gradients_move_a_matrix_as_far_as_others(scale):
    """The exp9 code rounds to fp16 before it normalises: gradients below 6e-8 vanish, above 65504 overflow."""
    for work in ("float16", "bfloat16", "float32"):
        param = nn.Parameter(torch.zeros(16, 24))
        param.grad = scale * matrix(16, 24)
        Muon([param], lr=1.0, weight_decay=0.0, norm_eps=0.0, coefficients="polar_express", dtype=work).step()
        assert param.detach().norm().item() == pytest.approx(16**0.5, rel=0.1)


def test_hidden_matrices_are_decayed_exactly_as_adamw_would():
    """The exp9 code decays matrices in its AdamW runs and not in its Muon runs."""
    model = nn.Linear(16, 16, bias=False)
    start = model.weight.detach().clone()
    for make in (
        lambda: Muon(model, lr=0.1, weight_decay=0.5, idle="move"),
        lambda: build_optimizer(model, AdamWOptions(lr=0.1, weight_decay=0.5)),
    ):
        model.weight.data.copy_(start)
        model.weight.grad = torch.zeros(16, 16)
        make().step()
        torch.testing.assert_close(model.weight.detach(), start * 0.95)
