"""The custom primitives beside the head against fp64, closed forms and the operations that torch has."""

import pytest
import torch

from muonlab.models.ops import gather_rows, grouped_linear


def test_gathered_rows_are_indexed_rows_and_so_are_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    order = torch.randperm(18, generator=generator)
    inverse = order.argsort()
    upstream = torch.randn(18, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(gather_rows(x, order, inverse, 3), x.repeat_interleave(3, 0)[order], rtol=0, atol=0)
    ours = torch.autograd.grad(gather_rows(x, order, inverse, 3), x, upstream)
    theirs = torch.autograd.grad(x.repeat_interleave(3, 0)[order], x, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 8), (torch.float32, 8), (torch.float32, 7), (torch.bfloat16, 8)]
)
def test_a_grouped_linear_is_one_linear_per_group(dtype: torch.dtype, width: int) -> None:
    """In every dtype and alignment: by torch's grouped matmul or by the plain path. The third group is empty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([5, 6, 6, 20], dtype=torch.int32)
    upstream = torch.randn(20, 16, dtype=torch.float64, generator=generator)

    def one_by_one(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:5] @ weight[0].T, x[5:6] @ weight[1].T, x[6:] @ weight[3].T])

    ours = grouped_linear(x, weight, ends)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours.double(), one_by_one(x.double(), weight.double()), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(ours, [x, weight], upstream.to(dtype))
    exact = torch.autograd.grad(one_by_one(x.double(), weight.double()), [x, weight], upstream.to(dtype).double())
    for a, b in zip(grads, exact):
        assert (a - b).norm() <= tolerance * b.norm()
