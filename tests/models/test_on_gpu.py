"""What only a GPU can show: the half-precision paths, and that no forward or backward pass waits for the device."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from muonlab.models import ModelOptions, Transformer, head_stats
from muonlab.models.ops import grouped_linear, silu_dropout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DENSE = ModelOptions(vocab_size=512, seq_len=64, d_model=128, n_layers=2, n_heads=4, d_ff=256, qk_norm=True)
EXPERTS = dataclasses.replace(
    DENSE, n_experts=4, activation="swiglu", router_noise=0.1, router_z_loss=1e-3, dropout=0.1
)


def loss(model: Transformer, tokens: torch.Tensor, chunk_bytes: int = 2**25) -> torch.Tensor:
    output = model(tokens)
    stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, tokens.roll(-1, 1).flatten(), chunk_bytes)
    return (stats.lse - stats.target_logit).mean() + 1e-3 * stats.mean_logit.mean() + output.auxiliary_loss


@pytest.mark.parametrize("options", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_an_update_never_waits_for_the_device(options: ModelOptions, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = Transformer(options).cuda()
    tokens = torch.randint(512, (4, 64), device="cuda")
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")
        try:
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                value = loss(model, tokens)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("chunk_bytes", [2**25, 4 * 517 * 50])
@pytest.mark.parametrize(
    ("d", "dtype"), [(128, torch.bfloat16), (40, torch.bfloat16), (192, torch.bfloat16), (64, torch.float16)]
)
def test_low_precision_heads_have_nearly_exact_gradients(d, dtype, chunk_bytes, equal, compiled) -> None:
    """Tile by tile (narrow, bf16), by rows (equal weights) and through torch; sizes that no tile divides."""
    torch.manual_seed(0)
    h = torch.randn(261, d, device="cuda", requires_grad=True)
    weight = (d**-0.5 * torch.randn(517, d, device="cuda")).requires_grad_()
    targets = torch.randint(517, (261,), device="cuda")
    slopes = torch.ones(261, device="cuda") if equal else torch.rand(261, device="cuda")

    def value(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stats = head_stats(h, weight, targets, chunk_bytes, equal)
        assert stats.lse.dtype == torch.float32
        return ((stats.lse - stats.target_logit) * slopes).mean()

    with torch.autocast("cuda", dtype):
        loss = (torch.compile(value) if compiled else value)(h, weight)
    ours = torch.autograd.grad(loss, [h, weight])
    logits = F.linear(h.double(), weight.double())
    exact = (F.cross_entropy(logits, targets, reduction="none") * slopes).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for a, b in zip(ours, torch.autograd.grad(exact, [h, weight])):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("d", [64, 256])
def test_statistics_of_low_precision_heads_are_those_of_the_logits(d: int) -> None:
    torch.manual_seed(0)
    h = torch.randn(300, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, d, device="cuda", dtype=torch.bfloat16)
    logits = h.double() @ weight.double().T
    targets = torch.where(torch.arange(300, device="cuda") % 3 > 0, logits.argmax(-1), 999)
    stats = head_stats(h, weight, targets, equal_weights=True)
    torch.testing.assert_close(stats.lse.double(), logits.logsumexp(-1), rtol=4e-3, atol=1e-2)
    torch.testing.assert_close(
        stats.target_logit.double(), logits.gather(1, targets[:, None])[:, 0], rtol=4e-3, atol=1e-2
    )
    assert (stats.correct == (logits.argmax(-1) == targets)).float().mean() > 0.99  # rounding makes ties


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_silu_drops_its_share_and_nothing_else_and_so_does_its_gradient(dtype, compiled) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 1111, device="cuda", dtype=dtype, requires_grad=True)
    run = torch.compile(silu_dropout) if compiled else silu_dropout
    y = run(x, 0.2)
    kept = y != 0
    share = kept.double().mean().item()
    assert abs(share - 0.8) < 5 * (0.2 * 0.8 / x.numel()) ** 0.5
    assert ((run(x, 0.2) != 0) == kept).double().mean().item() == pytest.approx(0.8**2 + 0.2**2, abs=0.01)
    exact = x.detach().double().requires_grad_()
    expected = F.silu(exact) * kept / 0.8
    upstream = torch.randn_like(y)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert (y - expected).norm() < tolerance * expected.norm()
    (ours,), (theirs,) = torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, exact, upstream.double())
    assert (ours - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grouped_linears_agree_with_fp64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 32, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 48, 32, device="cuda", dtype=dtype, requires_grad=True)
    ends = torch.tensor([3, 3, 30, 40], dtype=torch.int32, device="cuda")
    upstream = torch.randn(40, 48, device="cuda", dtype=dtype)
    grads = torch.autograd.grad(grouped_linear(x, weight, ends), [x, weight], upstream)
    wide = [x.double(), weight.double()]
    exact = torch.autograd.grad(grouped_linear(*wide, ends), wide, upstream.double())
    for a, b in zip(grads, exact):
        assert (a - b).norm() < {torch.float64: 1e-12, torch.float32: 2e-3}.get(dtype, 2e-2) * b.norm()


@pytest.mark.parametrize("options", [DENSE, dataclasses.replace(EXPERTS, router_noise=0.0, dropout=0.0)])
def test_a_gpu_and_a_cpu_agree_in_full_precision(options: ModelOptions) -> None:
    torch.manual_seed(0)
    model = Transformer(options)
    tokens = torch.randint(512, (4, 64))
    exact = torch.autograd.grad(loss(model.double(), tokens), list(model.parameters()))
    model = model.float().cuda()
    ours = torch.autograd.grad(loss(model, tokens.cuda()), list(model.parameters()))
    for a, b in zip(ours, exact):
        assert (a.cpu() - b).norm() < 1e-2 * b.norm() + 1e-7


@pytest.mark.parametrize("options", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_forward_and_backward_can_be_captured(options: ModelOptions) -> None:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(options, router_noise=0.0, dropout=0.0)).cuda()
    tokens = torch.randint(512, (4, 64), device="cuda")
    parameters = list(model.parameters())

    def update() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return torch.autograd.grad(loss(model, tokens), parameters)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = update()
        update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = update()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager):
        assert (a - b).norm() <= 1e-2 * b.norm()
