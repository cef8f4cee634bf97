"""How smoothly a run trained, read off its losses."""

import math
import statistics
from collections.abc import Sequence


def spikes(losses: Sequence[float], window: int = 20, height: float = 6.0) -> int:
    """Number of times the training loss jumps above its recent course.

    A spike starts where a loss exceeds the median of the `window` before it by more than `height` times their median
    absolute deviation (at least 0.1 nats), and lasts until it is back; a loss that is not finite is one.
    """
    count, inside = 0, False
    past: list[float] = []
    for loss in losses:
        jump = not math.isfinite(loss)
        if not jump and len(past) >= window // 2:
            middle = statistics.median(past)
            if loss - middle > 0.1:  # rarely: most updates need no second median
                jump = loss - middle > height * statistics.median(abs(value - middle) for value in past)
        count += jump and not inside
        inside = jump
        if not jump:
            past = [*past[-window + 1 :], loss]
    return count


def plateaus(losses: Sequence[float], tolerance: float = 0.005, length: int = 3) -> int:
    """Number of stretches of at least `length` evaluations that improve on what was best before by less than
    `tolerance` nats in all and are left again by a further improvement: a pause, not the end of the curve."""
    count, quiet = 0, 0
    best = math.inf
    for loss in losses:
        if loss < best - tolerance:
            count += quiet >= length
            quiet, best = 0, loss
        else:
            quiet += 1
    return count
