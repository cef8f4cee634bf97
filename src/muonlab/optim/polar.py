"""The polar factor of a stack of matrices: U V^T of the singular value decomposition, by polynomial iterations.

Everything here is a pure function of a stack `[..., m, n]`; leading axes are independent matrices.
"""

import torch
from torch import Tensor

from muonlab.errors import InputError, unknown
from muonlab.optim.coefficients import Coefficients, Iteration, Step, resolve
from muonlab.optim.methods import DTypeName, Method, check_safe

_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Above this many elements a CPU does single products faster than a batched one.
CPU_LOOP_ELEMENTS = 1 << 14


def orthogonalize(
    x: Tensor,
    coefficients: Coefficients = "polar_express",
    ns_steps: int | None = None,
    method: Method = "auto",
    dtype: torch.dtype | DTypeName = "auto",
    *,
    eps: float = 0.0,
) -> Tensor:
    """Approximate polar factor of every matrix of a stack (its nearest semi-orthogonal matrix).

    The input is divided by its Frobenius norm in fp32 (fp64 for fp64), whatever its magnitude, and then iterated; an
    all-zero matrix gives exactly zero, a matrix with a NaN or an infinity gives NaN. The input is never changed.

    Args:
        x: `[..., m, n]`, any floating-point dtype, any strides; leading axes are independent matrices.
        coefficients: a name of `coefficients.COEFFICIENTS`, or steps of one's own (see `coefficients.resolve`).
        ns_steps: number of steps; None means the set's own.
        method: "standard" iterates on the matrix; "gram" on its small Gram matrix, with a restart every two steps (fewer
            operations if the matrix is far from square, about the same rounding error); "svd" takes the exact factor (fp32 or fp64, slow: for ablations), where singular values below the rounding error
            of the largest stay zero; "mud" is not the polar factor but `decorrelated` rows, and knows no coefficients;
            "auto" is "standard".
        dtype: dtype of the iterations. "auto": fp16 on CUDA (after the fp32 normalisation eight times more accurate than
            bf16), bf16 on a CPU that multiplies it natively, fp32 elsewhere; never less than fp64 for fp64 inputs.
        eps: lower bound of the norm that the input is divided by (0: scale-free).

    Returns:
        `[..., m, n]` in the dtype of the iterations, contiguous or transposed.

    Raises:
        InputError: fewer than two axes, a complex or integer dtype, unknown names, steps that do not fit the set; "gram" in
            bf16 (its rounding errors grow to singular values of 1.8), coefficients without a margin in half precision.

    Sources: Keller Jordan, https://kellerjordan.github.io/posts/muon/; for "gram" Dao-AILab/gram-newton-schulz.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise InputError(
            f"orthogonalize needs a real floating-point tensor [..., m, n], got {x.dtype} {tuple(x.shape)}"
        )
    iteration = resolve(coefficients, ns_steps)
    check_safe(coefficients, method, "float64" if method == "svd" else iteration_dtype(x, dtype, method))
    return polar(x, iteration, method, dtype, eps)


def polar(
    x: Tensor,
    iteration: Iteration,
    method: Method = "auto",
    dtype: torch.dtype | DTypeName = "auto",
    eps: float = 0.0,
    *,
    overwrite: bool = False,
) -> Tensor:
    """`orthogonalize` for an iteration that is already resolved: what the update rule calls; no checks.

    `overwrite`: `x` is scratch of the caller and may be changed.
    """
    if method == "svd":
        return _svd(x)
    work = iteration_dtype(x, dtype, method)
    if x.numel() == 0:
        return torch.zeros_like(x, dtype=work)
    tall = x.shape[-2] > x.shape[-1]
    x = normalize(x, eps, overwrite=overwrite)
    if method == "mud":
        return decorrelated(x.mT).mT if tall else decorrelated(x)
    if iteration.preconditioned:
        x = precondition(x.mT, work).mT if tall else precondition(x, work)
    x = x.to(work)
    iterate = gram_newton_schulz if method == "gram" else newton_schulz
    result = iterate(x.mT if tall else x, iteration.steps)
    return result.mT if tall else result


def normalize(x: Tensor, eps: float = 0.0, *, overwrite: bool = False) -> Tensor:
    """`x / max(eps, Frobenius norm)` of every matrix `[..., m, n]`, in at least fp32; zero stays exactly zero.

    With `eps == 0` it is scale-free over the whole range of the dtype, although squares of fp32 entries below 1e-19
    underflow and those above 1e19 overflow. `overwrite` allows the result to take the place of `x`.
    """
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    divide = Tensor.div_ if overwrite or work is not x else Tensor.div
    dims = (-2, -1)
    if eps > 0:
        return divide(work, torch.linalg.vector_norm(work, dim=dims, keepdim=True).clamp_(min=eps))
    if work.dtype == torch.float64 or work.device.type == "mps":  # no wider type: divide the largest entry out first
        largest = torch.maximum(work.amax(dims, keepdim=True), -work.amin(dims, keepdim=True))
        work = divide(work, torch.where(largest == 0, 1.0, largest))
        norm = torch.linalg.vector_norm(work, dim=dims, keepdim=True)
        return work.div_(torch.where(norm == 0, 1.0, norm))
    # Squares are added in fp64. The norm itself may lie outside fp32's range, its root cannot: divide by that twice.
    root = torch.linalg.vector_norm(work, dim=dims, keepdim=True, dtype=torch.float64).sqrt_().float()
    root = torch.where(root == 0, 1.0, root)
    return divide(work, root).div_(root)


def precondition(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of `x` [..., m, n], m <= n, scaled by 1 / sqrt(sum_j |X X^T|_ij): all singular values are then at most 1, most of
    them closer to 1 than after division by the Frobenius norm. Rows of zeros stay zero. `dtype`: that of the product.

    The polar factor of the scaled matrix is not that of the matrix, only near it: an approximation that `aol4` makes.
    Source: almost-orthogonal layers, https://arxiv.org/abs/2208.03160; Turbo-Muon, https://arxiv.org/abs/2512.04632.
    """
    product = x if dtype is None else x.to(dtype)
    sums = (product @ product.mT).abs_().sum(-1, keepdim=True, dtype=x.dtype)  # [..., m, 1]
    return x * torch.where(sums > 0, sums.rsqrt(), 0.0)


def newton_schulz(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The polynomial steps on normalised matrices `x` [..., m, n] with m <= n, in the dtype of `x`: a*X + (b*A + c*A^2) X, A = X X^T."""
    if x.ndim == 2:
        return _steps_one(x, steps)
    stack = x.reshape(-1, *x.shape[-2:])  # [k, m, n]
    if len(stack) == 1:
        return _steps_one(stack[0], steps).view(x.shape)
    if x.device.type == "cpu" and x.shape[-2] * x.shape[-1] >= CPU_LOOP_ELEMENTS:
        return torch.stack([_steps_one(matrix, steps) for matrix in stack]).view(x.shape)
    for a, b, c in steps:
        gram = stack @ stack.mT  # [k, m, m]
        if c:
            stack = torch.baddbmm(stack, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), stack, beta=a)
        else:
            stack = torch.baddbmm(stack, gram, stack, beta=a, alpha=b)
    return stack.view(x.shape)


def gram_newton_schulz(x: Tensor, steps: tuple[Step, ...], restart: int = 2) -> Tensor:
    """The same map as `newton_schulz` through R = X X^T [..., m, m]: Q collects the product of steps, X is multiplied by it.

    Every `restart` steps X = Q X is formed and R anew from it. Within such a part rounding errors in the null space of R grow:
    parts of two steps are as exact in fp16 as the standard iteration (within 0.015, for every registered set and spectra down to
    1e-7), parts of three are so only for matrices above some 128 rows, and eight steps in two parts of 2 and 6 end 14 off.
    """
    stack = x.reshape(-1, *x.shape[-2:])  # [k, m, n]
    for first in range(0, len(steps), restart):
        part = steps[first : first + restart]
        gram = stack @ stack.mT  # [k, m, m]
        for i, (a, b, c) in enumerate(part):
            # a*I is never added to gram or z: rounding that sum is what makes the method unstable in half precision.
            z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
            if i == 0:
                product = z.clone()
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = torch.baddbmm(product, product, z, beta=a)
            if i + 1 < len(part):
                half = torch.baddbmm(gram, gram, z, beta=a)
                gram = torch.baddbmm(half, z, half, beta=a)
        stack = product @ stack
    return stack.view(x.shape)


def decorrelated(x: Tensor) -> Tensor:
    """One pass of MUD on `x` [..., m, n], m <= n, fp32 or fp64: unit rows made nearly orthogonal by one triangular solve.

    Row-orthonormal matrices stay as they are; rows of zeros stay zero. Cheaper than an iteration where triangular solves are
    fast. Source: https://arxiv.org/abs/2603.17970, with one pass as there.
    """
    rows = _unit_rows(x)
    lower = (rows @ rows.mT).tril()
    lower.diagonal(dim1=-2, dim2=-1).add_((lower.diagonal(dim1=-2, dim2=-1) == 0).to(x.dtype))  # rows of zeros
    return _unit_rows(torch.linalg.solve_triangular(lower, rows, upper=False))


def _unit_rows(x: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., m, 1]
    return x / torch.where(norms == 0, 1.0, norms)


def _steps_one(x: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for a, b, c in steps:
        gram = x @ x.mT  # [m, m]
        if c:
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = torch.addmm(x, gram, x, beta=a, alpha=b)
    return x


def iteration_dtype(x: Tensor, dtype: torch.dtype | DTypeName = "auto", method: Method = "auto") -> torch.dtype:
    """The dtype in which `x` is iterated (see `orthogonalize`)."""
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES.values():
            raise InputError(f"iterations run in float16, bfloat16, float32 or float64, got {dtype}")
        return dtype
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise unknown("dtype", dtype, (*_DTYPES, "auto"))
        return _DTYPES[dtype]
    if x.dtype == torch.float64:
        return torch.float64
    if x.device.type == "cuda":
        return torch.float16
    if method != "gram" and x.device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # Public since torch 2.12; an older one iterates in fp32 on a CPU.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _svd(x: Tensor) -> Tensor:
    x = normalize(x)
    if x.numel() == 0:
        return x
    # The decomposition refuses non-finite input; such matrices pass through as NaN, as they do in the iterations.
    finite = torch.isfinite(x).all(-1).all(-1)[..., None, None]
    u, s, vh = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)
    keep = s > s[..., :1] * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return torch.where(finite, (u * keep[..., None, :]) @ vh, torch.nan)
