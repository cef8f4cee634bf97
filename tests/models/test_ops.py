"""The custom primitives beside the head against fp64, closed forms and the operations that torch has."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from muonlab.models.ops import gather_rows, grouped_linear, rms_norm


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


def primitives() -> dict[str, Callable[[Tensor], Tensor]]:
    """Of x [10, 8], in x's dtype."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(20, generator=generator)
    inverse = order.argsort()
    scale = torch.randn(8, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 8, 8, dtype=torch.float64, generator=generator)
    ends = torch.tensor([3, 7, 10], dtype=torch.int32)
    return {
        "gather_rows": lambda x: gather_rows(x, order, inverse, 2),
        "rms_norm": lambda x: rms_norm(x, None, 1e-6),
        "rms_norm with a weight": lambda x: rms_norm(x, scale.to(x.dtype), 1e-6),
        "grouped_linear": lambda x: grouped_linear(x, weight.to(x.dtype), ends),
    }


@pytest.mark.parametrize("name", primitives())
@pytest.mark.parametrize("mode", ["compiled", "vmap", "compiled vmap"])
def test_a_compiled_primitive_keeps_its_gradient_and_a_batched_one_does_or_refuses(mode: str, name: str) -> None:
    """torch has been seen to drop or change a custom backward in silence."""
    torch._dynamo.reset()
    primitive = primitives()[name]
    stack = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    exact = torch.autograd.grad(sum(primitive(x).square().sum() for x in stack.double().unbind()), stack)[0]
    call = torch.vmap(primitive) if "vmap" in mode else lambda stack: torch.stack([primitive(x) for x in stack])
    call = torch.compile(call, backend="aot_eager") if "compiled" in mode else call
    try:
        result = call(stack)
    except RuntimeError:
        assert "vmap" in mode
        return
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), stack)[0], exact, rtol=1e-5, atol=1e-5)
