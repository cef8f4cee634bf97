"""The polar iteration on banks: Newton-Schulz steps grouped into blocks.

A block of L steps forms R = X X^T once, follows what the steps do to R, and multiplies X once by Q, the product of their
polynomials (Gram Newton-Schulz, https://dao-ailab.github.io/blog/2026/gram-newton-schulz/). A block of one step is the
standard iteration. With m <= n and symmetric products at half price, T steps in B blocks cost 3 B m^2 n + (4 T - 3 B) m^3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from muonlab.optim.coefficients import Step
from muonlab.optim.kernels import products
from muonlab.optim.polar import newton_schulz

# R is kept times this: its entries, of the order of 1/m, stay clear of fp16's subnormal numbers.
GAIN = 4096.0
EXACT = 512
"""Below this smaller side T = W R is added with what rounding took away, too: larger matrices average more roundings, and reach
1.05 times the error of the standard iteration without (`benchmarks/gram_blocks.py`)."""


@dataclass
class Section:
    """Matrices of one shape: `x`, `y` [k, rows, pitch] hold them and their images; they are `first`, ... of their slice."""

    x: Tensor
    y: Tensor
    cols: int
    first: int

    @property
    def wide(self) -> bool:
        return self.x.shape[1] <= self.cols

    def swapped(self) -> "Section":
        return Section(self.y, self.x, self.cols, self.first)


@dataclass
class Symmetric:
    """Symmetric matrices [k, m, m] in the parts that `products` describes."""

    off: Tensor  # [k, m, pitch]
    diagonal: Tensor  # [k, m]
    rest: Tensor | None = None  # [k, m, pitch]

    def part(self, first: int, count: int) -> "Symmetric":
        rest = None if self.rest is None else self.rest[first : first + count]
        return Symmetric(self.off[first : first + count], self.diagonal[first : first + count], rest)

    def rounded(self) -> "Symmetric":
        """Without the rest."""
        return Symmetric(self.off, self.diagonal)


@dataclass
class Workspace:
    """Symmetric matrices of one slice: R, T = W R, and three that take turns as W and Q."""

    gram: Symmetric
    half: Symmetric
    turns: tuple[Symmetric, Symmetric, Symmetric]

    @classmethod
    def allocate(cls, count: int, m: int, dtype: torch.dtype, device: torch.device) -> "Workspace":
        def symmetric(rest: bool) -> Symmetric:
            off = torch.zeros(count, m, pitch_of(m), dtype=dtype, device=device)
            return Symmetric(off, torch.zeros(count, m, device=device), torch.zeros_like(off) if rest else None)

        return cls(symmetric(True), symmetric(m < EXACT), (symmetric(False), symmetric(False), symmetric(False)))


def pitch_of(cols: int) -> int:
    """Row pitch of a bank: rows start at multiples of 16 bytes."""
    return -(-cols // 8) * 8


def blocks_of(m: int, steps: int, method: str = "auto") -> tuple[int, ...]:
    """How many steps each block takes, for matrices with smaller side `m`.

    "gram" is three steps, then one by one: the longest block whose error against fp64 stays within 1.2 times that of the
    standard fp16 iteration on all spectra from flat to 1e-7 (a longer one, or a last block of two, does not). "standard" is
    one by one. "auto" is gram except for small matrices, whose products cost little and where the error of a block is larger.
    """
    gram = method == "gram" or (method == "auto" and m >= 256)
    return (3, *[1] * (steps - 3)) if gram and steps >= 3 else (1,) * steps


def iterate(
    sections: Sequence[Section],
    work: Workspace,
    steps: Sequence[Step],
    blocks: Sequence[int],
    scale: Tensor,
) -> list[Section]:
    """Runs `steps` on all matrices of a slice, which share their smaller side m; the results are `x` of the sections returned.

    Args:
        sections: stacks in banks; `x` is overwritten.
        work: at least as many matrices as the sections hold together.
        blocks: lengths that add up to `len(steps)`.
        scale: fp32 [matrices of the slice], what `x` has to be multiplied by to have Frobenius norm 1.
    """
    sections = list(sections)
    remaining = list(steps)
    for number, length in enumerate(blocks):
        now, remaining = remaining[:length], remaining[length:]
        first = number == 0
        for section in sections:
            _gram(section, work.gram, scale if first else None, keep_rest=length > 1)
        count = sum(len(section.x) for section in sections)
        gram, half = work.gram.part(0, count), work.half.part(0, count)
        factor, product, spare = (turn.part(0, count) for turn in work.turns)
        for i, (a, b, c) in enumerate(now):
            # W = a I + b R + c R^2; then R <- W R W and Q <- W Q.
            _symmetric(gram, gram, factor, c / GAIN**2, b / GAIN, a)
            if i + 1 < length:
                _symmetric(factor, gram, half)
                # The last R is only squared, and that without its rest.
                _symmetric(factor, half, gram if i + 2 < length else gram.rounded())
            if i:
                _symmetric(factor, product, spare)
                product, spare = spare, product
            else:
                factor, product = product, factor
        for section in sections:
            _product(product.part(section.first, len(section.x)), section, scale if first else None)
        sections = [section.swapped() for section in sections]
    return sections


def tune(sections: Sequence[Section], work: Workspace, steps: Sequence[Step], blocks: Sequence[int]) -> float:
    """Compiles and tunes the kernels on random matrices; returns their largest error against torch in fp32.

    What a compiler got wrong on some device must not train a model in silence.
    """
    scale = torch.empty(sum(len(section.x) for section in sections), device=work.gram.off.device)
    samples = []
    generator = torch.Generator(scale.device).manual_seed(0)  # the user's own is not touched
    for section in sections:
        section.x.normal_(generator=generator)
        own = section.x[:, :, : section.cols]
        norms = torch.linalg.vector_norm(own, dim=(1, 2), dtype=torch.float32)
        scale[section.first : section.first + len(own)] = 1 / norms
        samples.append([own[i].float() / norms[i] for i in (0, -1)])
    errors = []
    for section, pair in zip(iterate(sections, work, steps, blocks, scale), samples):
        for index, sample in zip((0, -1), pair):
            expected = newton_schulz(sample if section.wide else sample.mT, tuple(steps))
            result = section.x[index, :, : section.cols].float()
            errors.append((result - (expected if section.wide else expected.mT)).norm() / expected.norm())
    return float(torch.stack(errors).max())


def _gram(section: Section, out: Symmetric, scale: Tensor | None, keep_rest: bool) -> None:
    k, rows, _ = section.x.shape
    m, n = min(rows, section.cols), max(rows, section.cols)
    target = out.part(section.first, k)
    products.gram_kernel[lambda meta: (_triangle(m, meta["BLOCK"]), k)](
        _descriptor(section.x, section.cols),
        _descriptor(target.off, m),
        _descriptor(target.off, m),
        _descriptor(target.rest if keep_rest and target.rest is not None else target.off, m),
        target.diagonal,
        target.diagonal if scale is None else scale[section.first :],
        m,
        n,
        GAIN,
        WIDE=section.wide,
        SCALED=scale is not None,
        KEEP_REST=keep_rest,
    )


def _symmetric(
    a: Symmetric, b: Symmetric, out: Symmetric, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0
) -> None:
    k, m, _ = a.off.shape
    same = a is b
    has_rest = b.rest is not None and not same
    products.symmetric_kernel[lambda meta: (_triangle(m, meta["BLOCK"]), k)](
        _descriptor(a.off, m),
        _descriptor(b.off, m),
        _descriptor(a.off, m),
        _descriptor(b.off, m),
        _descriptor(b.rest if has_rest and b.rest is not None else b.off, m),
        a.diagonal,
        b.diagonal,
        _descriptor(out.off, m),
        _descriptor(out.off, m),
        _descriptor(out.off if out.rest is None else out.rest, m),
        out.diagonal,
        m,
        alpha,
        beta,
        gamma,
        SAME=same,
        HAS_REST=has_rest,
        KEEP_REST=out.rest is not None,
    )


def _product(a: Symmetric, section: Section, scale: Tensor | None) -> None:
    k, rows, _ = section.x.shape
    m, n = min(rows, section.cols), max(rows, section.cols)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK"]) * triton.cdiv(section.cols, meta["BREADTH"]), k

    products.product_kernel[grid](
        _descriptor(a.off, m),
        _descriptor(section.x, section.cols),
        _descriptor(section.x, section.cols),
        _descriptor(section.y, section.cols),
        a.diagonal,
        a.diagonal if scale is None else scale[section.first :],
        m,
        n,
        WIDE=section.wide,
        SCALED=scale is not None,
    )


def _triangle(m: int, block: int) -> int:
    tiles = -(-m // block)
    return tiles * (tiles + 1) // 2


def _descriptor(bank: Tensor, cols: int) -> TensorDescriptor:
    k, rows, pitch = bank.shape
    # The kernel's configuration replaces the block shape.
    return TensorDescriptor(bank, [k, rows, cols], [rows * pitch, pitch, 1], [1, 16, 16])
