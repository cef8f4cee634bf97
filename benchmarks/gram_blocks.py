"""How exact the polar iteration is when its steps are grouped into blocks, with fp16 emulated on a CPU.

    python benchmarks/gram_blocks.py -o benchmarks/results/gram_blocks.json

A block of L steps forms R = X X^T once and multiplies X once by Q (Gram Newton-Schulz); blocks of one are the standard
iteration. `plain` rounds every matrix to fp16 as it is; the others keep diagonals in fp32 and add with what rounding took away: `split`
R = X X^T and W R, `split R` R alone, as `muonlab.optim.kernels` does, `split W R` that alone, `diagonal` neither. Printed is the error against fp64 of the same polynomial over that of the plain
standard iteration on the same matrix; spectra are log-spaced over the decades given.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from muonlab.optim.coefficients import Step, resolve

BLOCKS = ((1, 1, 1, 1, 1), (2, 3), (3, 2), (1, 2, 2), (3, 1, 1))
RESTS = {
    "plain": None,
    "diagonal": (False, False),
    "split W R": (False, True),
    "split R": (True, False),
    "split": (True, True),
}
"""Whether R and W R are added with their rests; None: diagonals are rounded too."""
DECADES = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -5.0, -7.0)


def fp16(x: Tensor) -> Tensor:
    return x.half().float()


def rounded(x: Tensor, split: bool) -> Tensor:
    """fp16, with the exact diagonal if `split`."""
    return fp16(x).diagonal_scatter(x.diagonal()) if split else fp16(x)


def mirrored(x: Tensor) -> Tensor:
    return x.tril() + x.tril(-1).mT


def iterate(x: Tensor, steps: Sequence[Step], blocks: Sequence[int], rests: tuple[bool, bool] | None) -> Tensor:
    """`x` [m, n] of norm 1, every product in fp32, every result that the kernels store rounded."""
    split = rests is not None
    rest_r, rest_t = rests or (False, False)
    remaining = list(steps)
    identity = product = torch.eye(len(x))
    for length in blocks:
        now, remaining = remaining[:length], remaining[length:]
        exact = x @ x.mT
        for i, (a, b, c) in enumerate(now):
            gram = rounded(exact, split)
            z = rounded(mirrored(b * gram + c * (gram @ gram)), split)
            if i + 1 < length:
                t = mirrored(a * (exact if rest_r else gram) + z @ gram)
                exact = mirrored(a * (t if rest_t else rounded(t, split)) + rounded(t, split) @ z)
            if i == 0:
                product = a * identity + z if split else fp16(a * identity + z)
            elif split:
                product = rounded(mirrored(product @ (a * identity + z)), True)
            else:
                product = fp16(mirrored(a * product + product @ z))
        # The standard iteration adds a X outside of the product.
        x = fp16(a * x + z @ x) if length == 1 and not split else fp16(product @ x)
    return x


def matrix(m: int, n: int, decades: float) -> tuple[Tensor, Tensor]:
    """A matrix [m, n] of norm 1, and what the polynomial makes of it, in fp64."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]
    s = torch.logspace(0, decades, m, dtype=torch.float64)
    s = s / s.norm()
    mapped = s
    for a, b, c in resolve("polar_express").steps:
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    return (u * s) @ v.mT, (u * mapped) @ v.mT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["128x512", "384x768"], help="m x n, m <= n")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    steps = resolve("polar_express").steps
    rows = []
    for shape in arguments.shapes:
        m, n = (int(size) for size in shape.split("x"))
        cases = {decades: matrix(m, n, decades) for decades in DECADES}
        standard: dict[float, float] = {}
        for name, rests in RESTS.items():
            for blocks in BLOCKS:
                errors = {}
                for decades, (x, exact) in cases.items():
                    result = iterate(fp16(x.float()), steps, blocks, rests).double()
                    errors[decades] = float((result - exact).norm() / exact.norm())
                standard = standard or errors
                ratios = {decades: error / standard[decades] for decades, error in errors.items()}
                rows.append(
                    {"shape": [m, n], "rests": name, "blocks": list(blocks), "errors": errors, "ratios": ratios}
                )
                cells = "  ".join(f"{ratio:6.2f}" for ratio in ratios.values())
                print(f"{shape:9} {name:9}  {blocks!s:16} {cells}  max {max(errors.values()):.4f}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"decades": DECADES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
