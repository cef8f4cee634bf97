"""The head against fp64, closed forms and the operations that torch has."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonlab.models.head import head_sample, head_stats

N, D, V = 30, 12, 41


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return h, weight, torch.randint(V, (N,), generator=generator)


def plain(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = F.linear(h, weight)
    return logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets


CHUNKS = [1, 8 * V * 7, 8 * V * N]  # bytes: one token at a time, seven, all


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_head_statistics_are_those_of_the_logits(chunk_bytes: int) -> None:
    h, weight, targets = problem()
    for ours, theirs in zip(head_stats(h, weight, targets, chunk_bytes), plain(h, weight, targets)):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("which", ["target_logit", "lse", "mean_logit", "all", "focal"])
def test_head_gradients_are_exact_for_any_upstream_gradient(chunk_bytes: int, which: str) -> None:
    h, weight, targets = problem()
    upstream = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(target: torch.Tensor, lse: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        parts = {"target_logit": target @ upstream[0], "lse": lse @ upstream[1], "mean_logit": mean @ upstream[2]}
        if which == "focal":
            ce = lse - target
            return ((1 - (-ce).exp()) ** 2 * ce).sum() + 0.1 * (target - mean).sum() + 1e-2 * lse.square().sum()
        return sum(parts.values()) if which == "all" else parts[which]

    ours = torch.autograd.grad(value(*head_stats(h, weight, targets, chunk_bytes)[:3]), [h, weight])
    theirs = torch.autograd.grad(value(*plain(h, weight, targets)[:3]), [h, weight])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_gradients_made_ahead_are_exact_where_every_token_counts_the_same(chunk_bytes: int) -> None:
    h, weight, targets = problem()

    def value(target: torch.Tensor, lse: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return 3.7 * (lse - target + 0.1 * (target - mean)).mean()

    ours = torch.autograd.grad(value(*head_stats(h, weight, targets, chunk_bytes, True)[:3]), [h, weight])
    theirs = torch.autograd.grad(value(*plain(h, weight, targets)[:3]), [h, weight])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_loss_that_breaks_the_promise_of_equal_weights_is_an_error_and_nan_is_not() -> None:
    h, weight, targets = problem()
    stats = head_stats(h, weight, targets, equal_weights=True)
    with pytest.raises(RuntimeError, match="weighs tokens differently"):
        stats.lse.square().sum().backward()
    stats = head_stats(h * torch.nan, weight, targets, equal_weights=True)
    (grad,) = torch.autograd.grad((stats.lse.mean() * torch.nan), h)
    assert grad.isnan().all()


@pytest.mark.parametrize("chunk_bytes", [4 * V * 7, 4 * V * N])
def test_head_in_fp32_is_as_exact_as_torchs_cross_entropy(chunk_bytes: int) -> None:
    h, weight, targets = problem(torch.float32)
    stats = head_stats(h, weight, targets, chunk_bytes)
    ours = torch.autograd.grad((stats.lse - stats.target_logit).mean(), [h, weight])
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(h, weight), targets), [h, weight])
    exact = torch.autograd.grad(F.cross_entropy(F.linear(h.double(), weight.double()), targets), [h, weight])
    for a, b, c in zip(ours, theirs, exact):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-7 * c.norm()


def test_logits_that_overflow_an_exponential_are_harmless() -> None:
    h, weight, targets = problem(torch.float32)
    stats = head_stats(h * 300, weight, targets)
    torch.testing.assert_close(
        stats.lse, (h.double() * 300 @ weight.double().T).logsumexp(-1).float(), rtol=1e-5, atol=1e-3
    )
    (grad,) = torch.autograd.grad((stats.lse - stats.target_logit).sum(), weight)
    assert grad.isfinite().all()


def test_all_logits_equal_counts_the_first_id_as_the_prediction() -> None:
    h, _, _ = problem()
    targets = torch.arange(N)
    assert head_stats(h, torch.zeros(V, D, dtype=h.dtype), targets).correct.tolist() == [True] + [False] * (N - 1)


def test_autocast_makes_the_matmul_low_and_the_sums_full() -> None:
    h, weight, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stats = head_stats(h, weight, targets)
        (stats.lse - stats.target_logit).mean().backward()
    assert stats.lse.dtype == stats.target_logit.dtype == stats.mean_logit.dtype == torch.float32
    assert h.grad.dtype == weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(F.cross_entropy(F.linear(h.double(), weight.double()), targets), [h, weight])
    for ours, theirs in zip((h.grad, weight.grad), exact):
        assert 1e-6 < (ours - theirs).norm() / theirs.norm() < 0.03


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor of at least `columns` columns that any operation returns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.bytes = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.columns,):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


@pytest.mark.parametrize("rows", [8, 50, 200, 1000])
def test_no_tensor_of_logits_is_larger_than_asked(rows: int) -> None:
    h, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(301, 8, requires_grad=True)
    chunk_bytes = rows * 301 * 4 + 5
    with LargestTensor(301) as seen:
        stats = head_stats(h, weight, torch.randint(301, (1000,)), chunk_bytes)
        (stats.lse - stats.target_logit + stats.mean_logit).sum().backward()
    assert rows * 301 * 4 / 2 <= seen.bytes <= chunk_bytes


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("chunk_bytes", [8 * V * 7, 8 * V * N])
def test_a_compiled_head_is_one_graph_and_keeps_its_gradients(chunk_bytes: int, equal: bool) -> None:
    """torch.compile inlines a custom function under vmap and drops its backward; plainly compiled, all must stay exact."""
    h, weight, targets = problem()

    def f(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stats = head_stats(h, weight, targets, chunk_bytes, equal)
        return (stats.lse * 3 - stats.target_logit * stats.mean_logit).sum()

    torch._dynamo.reset()
    target, lse, mean, _ = plain(h, weight, targets)
    exact = torch.autograd.grad((lse * 3 - target * mean).sum(), [h, weight])
    compiled = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(h, weight), [h, weight])
    for a, b in zip(compiled, exact):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_bytes", [8 * V * 7, 8 * V * N])
def test_vmap_refuses_the_head_rather_than_drop_its_backward(chunk_bytes: int) -> None:
    h, weight, targets = problem()
    stacked = h.detach().expand(3, N, D).clone().requires_grad_()

    def f(stacked: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda h: head_stats(h, weight, targets, chunk_bytes).lse.sum())(stacked).sum()

    for call in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        with pytest.raises(RuntimeError):
            call(stacked)


def test_sampled_labels_follow_the_softmax_of_the_logits_whatever_the_chunks() -> None:
    torch.manual_seed(0)
    n, vocab = 40_000, 7
    h = torch.randn(1, 5).expand(n, 5)
    weight = torch.randn(vocab, 5)
    expected = torch.softmax(h[0] @ weight.T, -1)
    for chunk_bytes in (32 << 20, 4 * vocab * 1000):
        drawn = head_sample(h, weight, chunk_bytes)
        frequency = torch.bincount(drawn, minlength=vocab) / n
        assert (frequency - expected).abs().max() < 5 * (0.25 / n) ** 0.5  # five standard errors at most
