"""How exact the polar iteration of the GPU kernels is, with fp16 emulated on a CPU: the evidence for which steps
`muonlab.optim.kernels.tables.blocks_of` groups into blocks, and for which coefficients are `sturdy`.

    OMP_NUM_THREADS=1 python benchmarks/gram_blocks.py -o benchmarks/results/gram_blocks.json

A block of L steps forms R = X X^T once, follows R through the steps (W = a I + b R + c R^2, T = W R, R <- W T), and multiplies X
once by Q, the product of the W; blocks of one are the standard iteration. Ways to do that:

    rests    which of R and T are added, where the diagonal of W multiplies them, with what rounding took away
    Q        "exact"  its diagonal in fp32
             "half"   all of it in fp16
             "ratio"  all of it in fp16; the ratios of exact to rounded diagonal are multiplied into the next R and the next Q

Printed is the error against fp64 of the same polynomial over that of the plain standard iteration in fp16 on the same matrix, a
column for each number of decades that the singular values span, log-spaced; * marks what the kernels choose. The kernels scale
R and X by powers of two so that nothing is subnormal; here nothing is scaled, which changed no ratio by more than 0.01 at 512 x
1024 and 896 x 1792.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonlab.optim.coefficients import COEFFICIENTS, Iteration, Step, resolve
from muonlab.optim.kernels.tables import blocks_of

SHAPES = (
    *("64x256", "128x512", "256x512", "384x768", "384x1536", "512x1024", "640x1280", "768x1536"),
    *("896x896", "896x1792", "896x4864", "1024x2048"),
)
NAMES = (
    *(name for name, entry in COEFFICIENTS.items() if entry.default_steps == 5),
    "deepseek",
    "keller/3",
    "keller/4",
)
"""Of coefficients, and after a stroke how many steps if not the default number."""
DETAILED = "polar_express"
"""The default set, which is iterated in every way; the others as the kernels do and in blocks of three, with T's rest and without."""
DECADES = (0.0, -0.15, -0.3, -0.4, -0.5, -0.6, -0.75, -1.0, -1.25, -1.5, -2.0, -3.0, -5.0, -7.0)
FEW_DECADES = (0.0, -0.3, -0.5, -0.75, -1.0, -1.5, -3.0, -7.0)
"""For m of 1000 and more."""
RANKS = (0, 1, 5, 20, 100, 383)
DIRECTIONS = (
    (3.22e-3, 8.02e-4, 8.97e-5, 3.33e-5, 8.10e-6, 1.71e-6),
    (5.33e-3, 2.26e-3, 8.50e-4, 6.82e-5, 1.43e-5, 3.14e-6),
    (3.20e-3, 5.90e-4, 1.20e-4, 2.77e-5, 6.43e-6, 1.29e-6),
)
"""Singular values at `RANKS` of directions of three experts of moe-79m (384 x 1536) in its second, fourth and eighth update; power
laws in between, the last rank that of the matrix."""
TILE = 128


Span = float | tuple[float, ...]
"""Decades, or a direction."""


class Way(NamedTuple):
    blocks: tuple[int, ...]
    rests: str  # "", "R", "RT"
    q: str


def fp16(x: Tensor) -> Tensor:
    return x.half().float()


def stored(x: Tensor) -> Tensor:
    """A symmetric matrix in fp16, but its diagonal in fp32."""
    return fp16(x).diagonal_scatter(x.diagonal())


def mirrored(x: Tensor) -> Tensor:
    """A symmetric product as the kernels compute it: tiles of the lower triangle. Factors that are rounded don't quite commute, so
    the order in which they are multiplied is the kernels', too."""
    tile = torch.arange(len(x)) // TILE
    return torch.where(tile[:, None] >= tile, x, x.mT)


def iterate(x: Tensor, steps: Sequence[Step], way: Way) -> Tensor:
    """`x` [m, n] of norm 1, every product in fp32, every result that the kernels store rounded."""
    remaining = list(steps)
    identity = torch.eye(len(x))
    ratios = torch.ones(len(x))
    for length in way.blocks:
        now, remaining = remaining[:length], remaining[length:]
        exact = mirrored(ratios[:, None] * (x @ x.mT) * ratios)
        product = identity
        for i, (a, b, c) in enumerate(now):
            gram = stored(exact)
            factor = a * identity + mirrored(b * gram + c * (gram @ gram))
            w = stored(factor)
            if i + 1 < length:
                diagonal = w.diagonal()[:, None]
                half = mirrored(w @ gram + diagonal * (exact - gram if "R" in way.rests else 0.0))
                t = stored(half)
                exact = mirrored(w @ t + diagonal * (half - t if "T" in way.rests else 0.0))
            product = mirrored(w @ stored(product)) if i else factor
        if way.q == "exact":
            x = fp16(stored(product) @ x)
        elif way.q == "half":
            x = fp16(fp16(product) @ x)
        else:
            product = product * ratios
            ratios = product.diagonal() / fp16(product).diagonal()
            x = fp16(fp16(product) @ x)
    return x


def plain(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """The standard iteration with every matrix rounded to fp16 as it is, a X added outside of the product."""
    for a, b, c in steps:
        gram = fp16(mirrored(x @ x.mT))
        x = fp16(a * x + fp16(mirrored(b * gram + c * (gram @ gram))) @ x)
    return x


def iteration_of(name: str) -> Iteration:
    coefficients, _, steps = name.partition("/")
    return resolve(coefficients, int(steps) if steps else None)


def chosen(m: int, n: int, name: str) -> Way:
    """What the kernels do."""
    blocks = blocks_of(m, n, iteration_of(name))
    return Way(blocks, "" if max(blocks) == 1 else "R", "ratio")


def ways(m: int, n: int, name: str) -> list[Way]:
    own = chosen(m, n, name)
    found = [own]
    if max(own.blocks) > 1:
        every = {own.blocks, (3, 1, 1), (3, 2)} if sum(own.blocks) == 5 else {own.blocks}
        found = [Way(blocks, rests, "ratio") for blocks in sorted(every, reverse=True) for rests in ("R", "RT")]
    if name == DETAILED:
        found = [Way((1, 1, 1, 1, 1), "", q) for q in ("exact", "half", "ratio")]
        for blocks in ((2, 1, 1, 1), (3, 1, 1), (3, 2)):
            found += [Way(blocks, rests, "ratio") for rests in ("", "R", "RT")]
            found += [Way(blocks, "RT", q) for q in ("exact", "half")]
        found += [Way(blocks, "RT", "ratio") for blocks in ((1, 2, 2), (2, 3))]
    return found


def power_laws(values: Sequence[float], m: int) -> Tensor:
    """Singular values of a direction, [m] fp64."""
    rank = torch.arange(m, dtype=torch.float64).add(1).log()
    known = torch.tensor([*RANKS[:-1], m - 1], dtype=torch.float64).add(1).log()
    logs = torch.tensor(values, dtype=torch.float64).log()
    at = torch.searchsorted(known, rank, right=True).clamp(1, len(known) - 1)
    return (logs[at - 1] + (logs[at] - logs[at - 1]) * (rank - known[at - 1]) / (known[at] - known[at - 1])).exp()


def spectra(m: int, n: int, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Factors U [m, m], V [n, m] and singular values of matrices of norm 1, in fp64."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]
    for span in spans:
        s = torch.logspace(0, span, m, dtype=torch.float64) if isinstance(span, float) else power_laws(span, m)
        yield u, v, s / s.norm()


def measure(m: int, n: int, names: Sequence[str], spans: Sequence[Span]) -> list[dict[str, Any]]:
    """A row for each set of coefficients and way; errors of the plain iteration once for each set."""
    errors: dict[tuple[str, Way | None], list[float]] = {}
    for u, v, s in spectra(m, n, spans):
        x = fp16(((u * s) @ v.mT).float())
        for name in names:
            steps = iteration_of(name).steps
            mapped = s
            for a, b, c in steps:
                mapped = a * mapped + b * mapped**3 + c * mapped**5
            exact = (u * mapped) @ v.mT
            for way in (None, *ways(m, n, name)):
                result = iterate(x, steps, way) if way else plain(x, steps)
                errors.setdefault((name, way), []).append(float((result - exact).norm() / exact.norm()))
    rows: list[dict[str, Any]] = []
    for (name, way), found in errors.items():
        row: dict[str, Any] = {"shape": [m, n], "coefficients": name}
        if way is None:
            rows.append(row | {"plain errors": [float(f"{error:.4g}") for error in found]})
            continue
        ratios = [round(error / base, 3) for error, base in zip(found, errors[name, None])]
        own = way == chosen(m, n, name)
        rows.append(row | way._asdict() | {"chosen": own, "worst": max(ratios), "ratios": ratios})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="m x n, m <= n")
    parser.add_argument("--coefficients", nargs="+", default=NAMES, help="names, name/steps")
    parser.add_argument("--directions", action="store_true", help="spectra of real directions, not log-spaced ones")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spans: dict[str, Sequence[Span]] = {}
    for shape in arguments.shapes:
        m, n = (int(size) for size in shape.split("x"))
        spans[shape] = DIRECTIONS if arguments.directions else DECADES if m < 1000 else FEW_DECADES
        titles = (f"{span:6.2f}" if isinstance(span, float) else f"{i:6}" for i, span in enumerate(spans[shape], 1))
        print(f"\n{shape:58}", "".join(titles), "  worst")
        for row in measure(m, n, arguments.coefficients, spans[shape]):
            rows.append(row)
            if "worst" in row:
                title = f"{row['coefficients']:18} {row['blocks']!s:30} {row['rests']:2} {row['q']:5}"
                cells = "".join(f"{ratio:6.2f}" for ratio in row["ratios"])
                print(f"{title} {'*' if row['chosen'] else ' '}{cells} {row['worst']:7.2f}", flush=True)
    print("\nworst of what the kernels choose:")
    kept = [row for row in rows if row.get("chosen")]
    for row in sorted(kept, key=lambda row: -row["worst"])[:10]:
        m, n = row["shape"]
        print(f"{row['worst']:.3f}  {m}x{n} {row['coefficients']} {row['blocks']} {row['rests']}")
    if arguments.output:
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.output.write_text(f'{{"decades": {json.dumps(spans)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
