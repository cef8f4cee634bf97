"""The Triton kernels of head and dropout against fp64: on a GPU as they are, elsewhere in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from tests.interpreted import DEVICE, GPU

# isort: split
from muonlab.models import dropout_kernels, head, head_kernels

# The interpreter multiplies fp16 alone.
DTYPE = torch.bfloat16 if GPU else torch.float16
TOLERANCE = 1e-2 if GPU else 2e-3


def problem(n: int, vocab: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, d, generator=generator).to(DEVICE, DTYPE)
    weight = (2 * d**-0.5 * torch.randn(vocab, d, generator=generator)).to(DEVICE, DTYPE)
    return h, weight, torch.randint(vocab, (n,), generator=generator).to(DEVICE)


def close(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((ours.double() - exact).norm() <= TOLERANCE * exact.norm() + 1e-6)


SIZES = [(1, 1, 8), (5, 300, 24), (150, 7, 128), (129, 257, 64)]


@pytest.mark.parametrize(("n", "vocab", "d"), SIZES)
def test_a_head_without_logits_has_their_statistics_and_exact_gradients(n: int, vocab: int, d: int) -> None:
    h, weight, targets = problem(n, vocab, d)
    wide, head = h.double().requires_grad_(), weight.double().requires_grad_()
    logits = wide @ head.T
    lse, chosen = logits.logsumexp(-1), logits.gather(1, targets[:, None])[:, 0]
    target_logit, ours, correct, expected = head_kernels.forward(h, weight, targets)
    assert close(ours, lse)
    assert close(target_logit, chosen)
    assert close(expected, logits.softmax(-1) @ head)
    clear = (logits.topk(min(2, vocab)).values.diff().abs() > 1e-2).all(-1)
    assert (correct == (logits.argmax(-1) == targets))[clear].all()
    slopes = torch.randn(2, n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (exact,) = torch.autograd.grad((chosen * slopes[0] + lse * slopes[1]).sum(), head)
    assert close(head_kernels.backward(h, weight, targets, ours, slopes[0], slopes[1]), exact)


@pytest.mark.parametrize("which", ["lse", "target_logit", "both"])
def test_a_sum_of_statistics_has_exact_gradients_and_targets_may_be_strided(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a sum is one number, expanded; a kernel that reads it as a vector reads outside of it."""
    monkeypatch.setattr(head, "_kernels", lambda device: head_kernels)
    h, weight, _ = problem(20, 33, 16)
    h, weight = h.requires_grad_(), weight.float().requires_grad_()
    targets = torch.randint(33, (20, 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, 1]
    target_logit, lse, _, _ = head._NarrowHead.apply(h, weight, targets, 1 << 20)
    parts = {"lse": lse.sum(), "target_logit": target_logit.sum(), "both": (lse - target_logit).sum()}
    wide, exact = h.detach().double().requires_grad_(), weight.detach().to(DTYPE).double().requires_grad_()
    logits = wide @ exact.T
    chosen = logits.gather(1, targets[:, None])[:, 0]
    sums = {"lse": logits.logsumexp(-1), "target_logit": chosen, "both": logits.logsumexp(-1) - chosen}
    for ours, theirs in zip(
        torch.autograd.grad(parts[which], [h, weight]), torch.autograd.grad(sums[which].sum(), [wide, exact])
    ):
        assert close(ours, theirs)


def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan() -> None:
    h, weight, targets = problem(10, 50, 16)
    targets[2], targets[5] = -100, 50
    for found in (head_kernels.forward(h, weight, targets)[0], head_kernels.softmax(h @ weight.T, targets)[1]):
        assert found.isnan().nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("offset", [0, 1])
def test_hidden_states_may_begin_anywhere(offset: int) -> None:
    h, weight, targets = problem(9, 20, 16)
    moved = torch.empty(9 * 16 + 1, dtype=h.dtype, device=DEVICE)[offset : offset + 9 * 16].view(9, 16).copy_(h)
    for ours, same in zip(head_kernels.forward(moved, weight, targets), head_kernels.forward(h, weight, targets)):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("whole", [65536, 100])
def test_the_softmax_of_rows_is_that_of_fp64_and_a_nan_stays_one(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_kernels, "WHOLE", whole)  # below the vocabulary: rows in two passes
    monkeypatch.setattr(head_kernels, "PART", 64)
    h, weight, targets = problem(20, 301, 16)
    logits = h @ weight.T
    logits[3] *= 100
    logits[7, 5] = torch.nan
    p, target_logit, lse, correct = head_kernels.softmax(logits, targets)
    exact = logits.double()
    rest = torch.arange(20, device=DEVICE) != 7
    assert close(p[rest], exact.softmax(-1)[rest])
    assert close(lse[rest], exact.logsumexp(-1)[rest])
    assert (target_logit == logits.gather(1, targets[:, None])[:, 0].float())[rest].all()
    assert (correct == (exact.argmax(-1) == targets))[rest].all()
    assert lse[7].isnan()


def test_a_hidden_state_that_is_nan_gives_a_loss_that_is() -> None:
    h, weight, targets = problem(10, 50, 16)
    h[4, 3] = torch.nan
    _, lse, _, expected = head_kernels.forward(h, weight, targets)
    assert lse.isnan().nonzero().flatten().tolist() == [4]
    assert expected[4].isnan().all()


def test_dropout_of_silu_keeps_its_share_and_its_gradient_has_the_same_mask() -> None:
    x = torch.randn(37, 131, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    y = dropout_kernels.forward(x, seed, 0.25)
    kept = y != 0
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    exact = x.double().requires_grad_()
    expected = F.silu(exact) * kept / 0.75
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected, exact, x.double())
    torch.testing.assert_close(dropout_kernels.backward(x, x, seed, 0.25).double(), gradient, rtol=1e-5, atol=1e-6)
    other = dropout_kernels.forward(x, seed + 1, 0.25) != 0
    assert abs((other == kept).double().mean().item() - 0.625) < 0.05
