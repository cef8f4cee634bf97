"""The mixture of experts against all experts computed and weighted, and its two losses against closed forms."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from muonlab.models import ModelOptions, Transformer
from muonlab.models.moe import MixtureOfExperts, load_balancing_loss, router_z_loss

OPTIONS = ModelOptions(d_model=16, n_heads=2, d_ff=24, n_experts=5, top_k=2, activation="silu", init_std=0.3)


def build(dtype: torch.dtype = torch.float64, **changes) -> MixtureOfExperts:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(dataclasses.replace(OPTIONS, **changes)).to(dtype)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixture


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def all_experts(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, weighted by gates that are zero outside the top k."""
    logits = mixture.router(x)
    kept = logits.topk(mixture.options.top_k, dim=-1).values[..., -1:]
    gates = logits.masked_fill(logits < kept, -math.inf).softmax(-1)  # [..., E]
    up = torch.einsum("...d,efd->...ef", x, mixture.experts.up)
    if mixture.experts.gate is None:
        hidden = F.silu(up)
    else:
        hidden = F.silu(torch.einsum("...d,efd->...ef", x, mixture.experts.gate)) * up
    return torch.einsum("...e,...ef,edf->...d", gates, hidden, mixture.experts.down)


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu"}, {"top_k": 1}, {"top_k": 5}])
def test_output_and_gradients_equal_all_experts_weighted_by_gates(changes: dict) -> None:
    mixture, x = build(**changes), inputs().requires_grad_()
    upstream = torch.randn(3, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours, theirs = mixture(x)[0], all_experts(mixture, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves = [x, *mixture.parameters()]
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_fp32_with_grouped_matmuls_equals_fp64_without() -> None:
    ours, exact = build(torch.float32), build()
    exact.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(inputs(torch.float32))[0].double(), exact(inputs())[0], rtol=1e-5, atol=1e-5)


def test_an_expert_that_nobody_visits_gets_a_zero_gradient() -> None:
    mixture = build(torch.float32)
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[0], mixture.router.weight[1] = 5.0, 4.0
    y, _, load = mixture(inputs(torch.float32).abs())
    y.square().sum().backward()
    assert load.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0])
    assert not mixture.experts.up.grad[2:].any()
    assert mixture.experts.up.grad[:2].abs().amax() > 0


def test_load_balancing_is_one_at_even_load_and_the_number_of_experts_at_collapse() -> None:
    even = torch.zeros(40, 8, dtype=torch.float64)
    assert load_balancing_loss(even, torch.full((8,), 1 / 8, dtype=torch.float64)).item() == pytest.approx(1.0)
    collapsed = torch.zeros(40, 8, dtype=torch.float64)
    collapsed[:, 3] = 100.0
    load = torch.eye(8, dtype=torch.float64)[3]
    assert load_balancing_loss(collapsed, load).item() == pytest.approx(8.0)


def test_no_consistent_routing_is_better_balanced_than_the_even_one() -> None:
    """Where the load equals the mean probability the loss is n · Σ p², which is least at p = 1/n."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, 6, dtype=torch.float64, generator=generator).expand(10, 6)
        p = logits[0].softmax(-1)
        assert load_balancing_loss(logits, p).item() == pytest.approx(6 * p.square().sum().item())
        assert load_balancing_loss(logits, p) > 1


def test_router_z_loss_is_the_mean_squared_log_sum_exp() -> None:
    assert router_z_loss(torch.zeros(7, 8)).item() == pytest.approx(math.log(8) ** 2)
    assert router_z_loss(torch.full((7, 8), 2.0)).item() == pytest.approx((math.log(8) + 2) ** 2)


@pytest.mark.parametrize("option", ["load_balancing", "router_z_loss"])
def test_the_weight_of_an_auxiliary_loss_scales_its_gradient(option: str) -> None:
    off = {"load_balancing": 0.0, "router_z_loss": 0.0}

    def router_grad(weight: float) -> torch.Tensor:
        mixture = build(**{**off, option: weight})
        y, auxiliary, _ = mixture(inputs())
        return torch.autograd.grad(y.sum() + auxiliary, mixture.router.weight)[0]

    without, once, thrice = router_grad(0.0), router_grad(0.1), router_grad(0.3)
    assert (once - without).norm() > 1e-6
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-9, atol=1e-12)


def test_a_model_sums_the_auxiliary_losses_of_its_layers_and_reports_each_load() -> None:
    torch.manual_seed(0)
    options = dataclasses.replace(
        OPTIONS, vocab_size=50, seq_len=16, n_layers=3, load_balancing=0.5, router_z_loss=0.25
    )
    model = Transformer(options).double()
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.weight.zero_()
    output = model(torch.randint(50, (2, 16)))
    # uniform probabilities give n · Σ load / n = 1 whatever the load, and log-sum-exp = log n
    assert output.auxiliary_loss.item() == pytest.approx(3 * (0.5 + 0.25 * math.log(5) ** 2))
    assert output.expert_load.shape == (3, 5)
    torch.testing.assert_close(output.expert_load.sum(1), torch.ones(3, dtype=torch.float64))
    assert not output.expert_load.requires_grad


def test_router_noise_moves_the_routing_in_training_alone() -> None:
    mixture, tokens = build(router_noise=2.0), inputs().flatten(0, 1)
    torch.manual_seed(0)
    noisy = mixture.train().route(tokens)
    torch.manual_seed(0)
    assert torch.equal(noisy.experts, mixture.route(tokens).experts)
    quiet = mixture.eval().route(tokens)
    assert torch.equal(quiet.experts, mixture.route(tokens).experts)
    assert not torch.equal(noisy.experts, quiet.experts)


def test_no_operation_of_forward_and_backward_has_a_shape_that_depends_on_data() -> None:
    """Traced symbolically: a value read on the host, a boolean index or a count would stop the trace or fix the routing."""
    mixture = build()

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, auxiliary, _ = mixture(x)
        return torch.autograd.grad(y.square().sum() + auxiliary, list(mixture.parameters()))

    traced = make_fx(f, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        torch.randn(1, 11, 16, dtype=torch.float64)
    )
    for a, b in zip(traced(inputs()[1:2]), f(inputs()[1:2])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_twice_the_same_input_gives_the_same_bits() -> None:
    mixture, x = build(torch.float32), inputs(torch.float32)
    runs = []
    for _ in range(2):
        y, auxiliary, _ = mixture(x)
        runs.append([y, *torch.autograd.grad(y.square().sum() + auxiliary, list(mixture.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_optimizers_find_the_markers() -> None:
    mixture = build()
    assert mixture.experts.is_expert_stack
    assert mixture.router.is_router
    assert isinstance(mixture.router, torch.nn.Linear)
    assert {tuple(p.shape) for p in mixture.experts.parameters()} == {(5, 24, 16), (5, 16, 24)}
