"""The physical floor: what must be moved and multiplied, over how fast this machine moves and multiplies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muonlab.diagnostics.flops import count_parameters, token_flops
from muonlab.models import ModelOptions

Shape = tuple[int, int]


@dataclass(frozen=True)
class Work:
    """Bytes over the memory bus and floating-point operations."""

    bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Least time for both, one after the other, at rates from `machine.measure_rates`."""
        return self.bytes / rates["copy_bytes_per_second"] + self.flops / rates["matmul_flops_per_second"]


def muon_work(shapes: Sequence[Shape]) -> Work:
    """One step of Muon on matrices (m, n), m <= n, everything in fp32: gradient, momentum and parameter are read, the latter two
    written (20 bytes an entry); a five-step Gram iteration with one restart costs 6 m² n + 14 m³, symmetric products halved.
    Source: https://dao-ailab.github.io/blog/2026/gram-newton-schulz/.
    """
    entries = sum(rows * cols for rows, cols in shapes)
    flops = sum(6 * min(shape) ** 2 * max(shape) + 14 * min(shape) ** 3 for shape in shapes)
    return Work(20 * entries, flops)


def adamw_work(shapes: Sequence[Shape]) -> Work:
    """One step of AdamW in fp32: gradient, two averages and parameter are read, the latter three written; a dozen operations
    an entry, which are no products and cost nothing beside the bytes."""
    entries = sum(rows * cols for rows, cols in shapes)
    return Work(28 * entries, 0)


def training_work(options: ModelOptions, tokens: int) -> Work:
    """One update on `tokens` tokens: forward and backward of the active parameters; of the bytes only those that no cache can
    save, weights (read twice in bf16), gradients (written and read in fp32) and AdamW's 28 an entry."""
    entries = count_parameters(options).total
    return Work((2 * 2 + 2 * 4 + 28) * entries, token_flops(options).training * tokens)
