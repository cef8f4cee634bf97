"""How a polar factor may be computed, and which combinations can be trusted."""

from typing import TYPE_CHECKING, Literal

from muonlab.errors import InputError, unknown
from muonlab.optim.coefficients import Coefficients, margin

if TYPE_CHECKING:  # options are checked without waiting for torch
    import torch

Method = Literal["auto", "standard", "gram", "svd", "mud"]
METHODS: tuple[Method, ...] = ("auto", "standard", "gram", "svd", "mud")
DTypeName = Literal["auto", "float16", "bfloat16", "float32", "float64"]

# Rounding the entries of a matrix to bf16 can raise its largest singular value by this much.
_HALF_MARGIN = 1 + 2**-8


def check_safe(coefficients: Coefficients, method: str, dtype: "torch.dtype | str") -> None:
    """InputError for an unknown method and for combinations whose result cannot be trusted; "auto" may be half precision."""
    name = str(dtype).removeprefix("torch.")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method == "gram" and name == "bfloat16":
        raise InputError(
            "method 'gram' in bfloat16 is not accurate enough (singular values up to 1.8); use float16 or float32"
        )
    half = name in ("bfloat16", "float16", "auto")
    if half and margin(coefficients) < _HALF_MARGIN:
        raise InputError(
            f"coefficients {coefficients!r} diverge above {margin(coefficients):.4f}, which rounding in half precision "
            "reaches; use a safety factor of at least 1.005, or float32"
        )
