"""The polar iteration on banks: Newton-Schulz steps grouped into blocks.

A block of L steps forms R = X X^T once, follows what the steps do to R, and multiplies X once by Q, the product of their
polynomials (Gram Newton-Schulz, https://dao-ailab.github.io/blog/2026/gram-newton-schulz/). A block of one step is the
standard iteration. With m <= n and symmetric products at half price, T steps in B blocks cost 3 B m^2 n + (4 T - 3 B) m^3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from muonlab.optim.coefficients import Step
from muonlab.optim.kernels import products, tables
from muonlab.optim.kernels.launching import launch
from muonlab.optim.polar import newton_schulz

# R is kept times this: its entries, of the order of 1/m, stay clear of fp16's subnormal numbers.
GAIN = 4096.0


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
    diagonal: Tensor  # [k, m]; of a whole matrix: its ratios
    rest: Tensor | None = None  # [k, m, pitch]
    is_whole: bool = False

    def part(self, first: int, count: int) -> "Symmetric":
        rest = None if self.rest is None else self.rest[first : first + count]
        return Symmetric(self.off[first : first + count], self.diagonal[first : first + count], rest)

    def rounded(self) -> "Symmetric":
        """Without the rest."""
        return Symmetric(self.off, self.diagonal)

    def whole(self, ratios: Tensor) -> "Symmetric":
        """The same memory for a matrix that shall be whole."""
        return Symmetric(self.off, ratios, is_whole=True)


@dataclass
class Workspace:
    """Symmetric matrices of one slice: R with what rounding took from it, T = W R, and three that take turns as W and Q; ratios
    [k, m] of a block's Q and of the one's before."""

    gram: Symmetric
    half: Symmetric
    turns: tuple[Symmetric, Symmetric, Symmetric]
    ratios: tuple[Tensor, Tensor]

    @classmethod
    def allocate(cls, count: int, m: int, dtype: torch.dtype, device: torch.device) -> "Workspace":
        def symmetric(rest: bool) -> Symmetric:
            off = torch.zeros(count, m, tables.pitch_of(m), dtype=dtype, device=device)
            return Symmetric(off, torch.zeros(count, m, device=device), torch.zeros_like(off) if rest else None)

        turns = (symmetric(False), symmetric(False), symmetric(False))
        ratios = (torch.ones(count, m, device=device), torch.ones(count, m, device=device))
        return cls(symmetric(True), symmetric(False), turns, ratios)

    def forget(self) -> None:
        """Makes all of it NaN."""
        for matrix in (self.gram, self.half, *self.turns):
            for part in (matrix.off, matrix.diagonal, matrix.rest):
                if part is not None:
                    part.fill_(torch.nan)
        for ratio in self.ratios:
            ratio.fill_(torch.nan)


def iterate(
    sections: Sequence[Section],
    work: Workspace,
    steps: Sequence[Step],
    blocks: Sequence[int],
    scale: Tensor,
) -> list[Section]:
    """Runs `steps` on all matrices of a slice, which share their smaller side m. The results are `x` of the sections returned,
    still to be multiplied by `scale`.

    Args:
        sections: stacks in banks; `x` is overwritten.
        work: at least as many matrices as the sections hold together.
        blocks: lengths that add up to `len(steps)`.
        scale: fp32 [matrices of the slice], what `x` has to be multiplied by to have Frobenius norm 1.
    """
    sections = list(sections)
    remaining = list(steps)
    count = sum(len(section.x) for section in sections)
    before = None
    for number, length in enumerate(blocks):
        now, remaining = remaining[:length], remaining[length:]
        ratios = work.ratios[number % 2]
        for section in sections:
            _gram(section, work.gram, scale, before, keep_rest=length > 1)
        product = _polynomial(work, count, now, ratios, before)
        for section in sections:
            _multiply(product.off[section.first : section.first + len(section.x)], section)
        sections = [section.swapped() for section in sections]
        before = ratios
    return sections


def _polynomial(work: Workspace, count: int, steps: Sequence[Step], ratios: Tensor, before: Tensor | None) -> Symmetric:
    """Q of a block of `steps`, from R: the product of what they multiply X by."""
    gram, half = work.gram.part(0, count), work.half.part(0, count)
    factor, product, spare = (turn.part(0, count) for turn in work.turns)
    # Launches alternate between ascending and descending order of the matrices; `_gram` descends.
    order = cycle((False, True))
    for i, (a, b, c) in enumerate(steps):
        # W = a I + b R + c R^2; then R <- W R W and Q <- W Q.
        last = i + 1 == len(steps)
        made = factor.whole(ratios) if len(steps) == 1 else factor
        _symmetric(gram, gram, made, next(order), c / GAIN**2, b / GAIN, a, before=before)
        if not last:
            _symmetric(factor, gram, half, next(order))
            # The last R is only squared, and that without its rest.
            _symmetric(factor, half, gram if i + 2 < len(steps) else gram.rounded(), next(order))
        if i:
            _symmetric(factor, product, spare.whole(ratios) if last else spare, next(order), before=before)
            product, spare = spare, product
        else:
            factor, product = product, factor
    return product


def tune(
    sections: Sequence[Section], work: Workspace, steps: Sequence[Step], blocks: Sequence[int], scale: Tensor
) -> float:
    """Compiles and tunes the kernels on random matrices; returns their largest error against torch in fp32.

    What a compiler got wrong on some device must not train a model in silence, nor what is read before it was written: once
    tuned, the kernels run on a workspace of NaN. (Tuning runs every candidate, and one with larger tiles may write what the one
    that is chosen leaves out.) Arguments as in `iterate`, overwritten.
    """
    generator = torch.Generator(scale.device)  # the user's own is not touched
    for _ in range(2):
        work.forget()
        generator.manual_seed(0)
        samples = []
        for section in sections:
            section.x.normal_(generator=generator)
            own = section.x[:, :, : section.cols]
            norms = torch.linalg.vector_norm(own, dim=(1, 2), dtype=torch.float32)
            scale[section.first : section.first + len(own)] = 1 / norms
            samples.append([own[i].float() / norms[i] for i in (0, -1)])
        results = iterate(sections, work, steps, blocks, scale)
    errors = []
    for section, pair in zip(results, samples):
        for index, sample in zip((0, -1), pair):
            expected = newton_schulz(sample if section.wide else sample.mT, tuple(steps))
            result = section.x[index, :, : section.cols].float() * scale[section.first + index % len(section.x)]
            errors.append((result - (expected if section.wide else expected.mT)).norm() / expected.norm())
    return float(torch.stack(errors).max())


def _gram(section: Section, out: Symmetric, scale: Tensor, before: Tensor | None, keep_rest: bool) -> None:
    k, rows, _ = section.x.shape
    m, n = min(rows, section.cols), max(rows, section.cols)
    target = out.part(section.first, k)
    launch(
        products.gram_kernel,
        lambda meta: (_triangle(m, meta["BLOCK"]), k),
        _descriptor(section.x, section.cols),
        _descriptor(target.off, m),
        _descriptor(target.off, m),
        _descriptor(target.rest if keep_rest and target.rest is not None else target.off, m),
        target.diagonal,
        target.diagonal if before is None else before[section.first :],
        scale[section.first :],
        m,
        n,
        GAIN,
        k - 1,
        WIDE=section.wide,
        FOLDED=before is not None,
        KEEP_REST=keep_rest,
    )


def _symmetric(
    a: Symmetric,
    b: Symmetric,
    out: Symmetric,
    descending: bool,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    before: Tensor | None = None,
) -> None:
    k, m, _ = a.off.shape
    same = a is b
    has_rest = b.rest is not None and not same
    launch(
        products.symmetric_kernel,
        lambda meta: (_triangle(m, meta["BLOCK"]), k),
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
        out.diagonal if before is None else before,
        m,
        alpha,
        beta,
        gamma,
        k - 1 if descending else 0,
        SAME=same,
        HAS_REST=has_rest,
        KEEP_REST=out.rest is not None,
        WHOLE=out.is_whole,
        FOLDED=out.is_whole and before is not None,
    )


def _multiply(q: Tensor, section: Section) -> None:
    """Y = Q X, or X Q^T, by the library, whose products of this kind are faster than Triton's."""
    x, y = section.x[:, :, : section.cols], section.y[:, :, : section.cols]
    q = q[:, :, : q.shape[1]]
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = False  # whatever the model does: sums in fp16 would be ten times the error
    try:
        torch.bmm(q, x, out=y) if section.wide else torch.bmm(x, q.mT, out=y)
    finally:
        matmul.allow_fp16_accumulation = allowed


def _triangle(m: int, block: int) -> int:
    tiles = -(-m // block)
    return tiles * (tiles + 1) // 2


def _descriptor(bank: Tensor, cols: int) -> TensorDescriptor:
    k, rows, pitch = bank.shape
    # The kernel's configuration replaces the block shape.
    return TensorDescriptor(bank, [k, rows, cols], [rows * pitch, pitch, 1], [1, 16, 16])
