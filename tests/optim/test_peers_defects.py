"""Defects that were found in public implementations, each as a thing that must not happen here."""

import pytest
import torch
from torch import nn

from muonlab import Muon, orthogonalize
from muonlab.errors import InputError
from muonlab.models import ModelOptions, Transformer
from muonlab.optim import AdamWOptions, Schedule, build_optimizer, set_lr, set_momentum

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


def test_fp32_inputs_are_normalised_out_of_place_and_a_compiled_call_runs_compiled():
    """gram-newton-schulz divides the caller's tensor by its norm, and its torch.compile of __call__ is never reached."""
    x = matrix(12, 20)
    before = x.clone()
    compiled_calls = []

    def backend(graph, inputs):
        return lambda *arguments: compiled_calls.append(1) or graph(*arguments)

    compiled = torch.compile(lambda t: orthogonalize(t, dtype="float32"), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), orthogonalize(x, dtype="float32"))
    assert torch.equal(x, before)
    assert compiled_calls


def test_names_of_scales_mean_what_they_say():
    """pytorch_optimizer's `use_adjusted_lr` applies Moonlight's factor when off and Keller's when on."""
    for name, factor in ((None, 2.0), ("original", 2.0), ("match_rms_adamw", 0.2 * 64**0.5)):
        param = nn.Parameter(torch.zeros(64, 16))
        param.grad = matrix(64, 16)
        Muon([param], lr=1.0, weight_decay=0.0, adjust_lr_fn=name, coefficients="polar_express", method="svd").step()
        assert torch.linalg.matrix_norm(param.detach(), 2).item() == pytest.approx(factor, rel=1e-4)


def test_convolutions_are_scaled_as_the_matrix_that_they_are():
    """KellerJordan/Muon and flash-muon take the kernel's height over its width, which is always 1."""
    param = nn.Parameter(torch.zeros(64, 4, 2, 2))
    param.grad = matrix(64, 4, 2, 2)
    Muon([param], lr=1.0, weight_decay=0.0, scale="keller", method="svd").step()
    assert torch.linalg.matrix_norm(param.detach().flatten(1), 2).item() == pytest.approx(2.0, rel=1e-4)


def test_a_stack_of_experts_is_a_matrix_an_expert_with_neurons_of_its_own():
    """HeavyBall and pytorch_optimizer flatten it into one matrix [experts, out * in]; nanochat's second moment does not fit it."""
    param = nn.Parameter(torch.zeros(3, 24, 16))
    param.grad = matrix(3, 24, 16)
    optimizer = Muon(
        [param], lr=1.0, weight_decay=0.0, scale="none", method="svd", normuon_beta=0.95, normuon_axis="long"
    )
    optimizer.step()
    assert optimizer.state[param]["second_moment"].numel() == 3 * 24
    param.data.zero_()
    Muon([param], lr=1.0, weight_decay=0.0, scale="none", method="svd").step()
    torch.testing.assert_close(torch.linalg.svdvals(param.detach()), torch.ones(3, 16), rtol=0, atol=1e-4)


def test_more_steps_than_a_list_has_are_made_or_refused_never_dropped():
    """nanochat's slice of its five steps silently stays five."""
    x = torch.linalg.qr(matrix(32, 32, dtype=torch.float64))[0] * torch.logspace(0, -4, 32, dtype=torch.float64)
    assert not torch.allclose(orthogonalize(x, ns_steps=7), orthogonalize(x, ns_steps=5), atol=0.1)
    with pytest.raises(InputError, match="exactly 5 steps"):
        orthogonalize(x, "polar_express_1.02", ns_steps=7)


def test_the_exact_factor_is_exact_for_every_shape():
    """HeavyBall's exact mode silently falls back to the iteration for rectangular matrices."""
    for shape in ((8, 20), (20, 8), (12, 12)):
        s = torch.linalg.svdvals(orthogonalize(matrix(*shape, dtype=torch.float64), method="svd"))
        torch.testing.assert_close(s, torch.ones_like(s), rtol=0, atol=1e-12)


def test_fused_projections_and_routers_of_a_mixture_are_not_one_matrix_of_muon():
    """The exp9 code orthogonalises fused query, key and value as one matrix and gives the router to Muon."""
    options = ModelOptions(
        vocab_size=32, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=32, n_experts=4, fused_qkv=True
    )
    rows = {row["name"]: row for row in Muon(Transformer(options)).routing().rows}
    assert rows["blocks.0.attention.qkv.weight"]["view"] == "split 0 (32, 16, 16)"
    assert rows["blocks.0.feed_forward.router.weight"]["rule"] == "adamw"
    assert rows["blocks.0.feed_forward.experts.up"]["rule"] == "muon"


def test_a_schedule_reaches_momentum_and_both_learning_rates_of_a_compiled_step():
    """dion's captured step has the momentum baked in."""
    models = [nn.Linear(12, 20, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Muon(model, lr=torch.tensor(0.1), dtype="float32", idle="move") for model in models]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="aot_eager")]
    schedule = Schedule(warmup=0.5, momentum_warmup=4)
    for update in range(6):
        for model, optimizer, step in zip(models, optimizers, steps):
            for group in optimizer.param_groups:
                if not isinstance(group["momentum"], torch.Tensor):
                    group["momentum"] = torch.tensor(group["momentum"])
            set_lr(optimizer, schedule.factor(update, 6))
            set_momentum(optimizer, schedule, update)
            model.weight.grad = matrix(20, 12, seed=update)
            step()
    assert optimizers[0].param_groups[0]["momentum"].item() == pytest.approx(0.95)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-5, atol=1e-6)


def test_the_same_run_gives_the_same_bits():
    def weights():
        torch.manual_seed(0)
        model = Transformer(ModelOptions(vocab_size=32, d_model=32, n_layers=1, n_heads=4, d_ff=64, seq_len=16))
        optimizer = Muon(model, lr=0.01, normuon_beta=0.95, momentum_dtype="int8")
        for update in range(3):
            optimizer.zero_grad()
            model(
                torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(update))
            ).hidden.sum().backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    assert all(torch.equal(p, q) for p, q in zip(weights(), weights(), strict=True))
