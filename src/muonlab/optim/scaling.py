"""How large an orthogonal update is: the conventions by which implementations scale it before the learning rate."""

import math
from collections.abc import Callable

from muonlab.errors import InputError, unknown

SCALES: dict[str, Callable[[int, int], float]] = {
    "keller": lambda rows, cols: max(1.0, rows / cols) ** 0.5,
    "moonlight": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(rows / cols),
    "none": lambda rows, cols: 1.0,
}
"""name -> factor for a matrix of `rows` outputs and `cols` inputs. Sources: keller: KellerJordan/Muon and torch.optim.Muon
("original"); moonlight: https://arxiv.org/abs/2502.16982, update RMS of 0.2 as AdamW's ("match_rms_adamw"); spectral:
https://arxiv.org/abs/2310.17813, microsoft/dion; none: the polar factor itself, spectral norm 1."""


def scale_factor(scale: str, rows: int, cols: int) -> float:
    """The factor of convention `scale` for a logical matrix [rows, cols] (rows are outputs)."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if rows < 1 or cols < 1:
        raise InputError(f"a matrix needs at least one row and one column, got {rows} x {cols}")
    return SCALES[scale](rows, cols)


def update_rms(scale: str, rows: int, cols: int) -> float:
    """Root mean square of the entries of an exactly orthogonal [rows, cols] update with this convention at lr 1.

    A semi-orthogonal matrix has RMS 1 / sqrt(max(rows, cols)) exactly."""
    return scale_factor(scale, rows, cols) / math.sqrt(max(rows, cols))
