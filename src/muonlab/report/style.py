"""How things look and read in every figure, table and page: one colour and marker per optimizer, one way to write a number."""

import math
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette without its yellow (too faint on white): told apart with every common colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B4B8A", "#6B6B6B")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
KNOWN = {"muon": 0, "adamw": 1, "lion": 2, "sophia": 3, "adam": 4, "sgd": 5}

INK, MUTED, RULE = "#1c1e21", "#5f6368", "#d7dade"
VALUE_NAMES = {"auxiliary": "embedding and head lr ×", "weight_decay": "weight decay"}
VERDICT_COLORS = {"better": "#00694b", "worse": "#a33c00", "not distinguishable": "#5f6368"}


def slots(optimizers: Sequence[str]) -> dict[str, int]:
    """A place in the palette per optimizer: fixed for the well-known, the next free one for the rest."""
    taken = {name: KNOWN[name] for name in optimizers if name in KNOWN}
    result: dict[str, int] = {}
    for name in optimizers:
        if name not in taken or name in result:
            free = [i for i in range(len(PALETTE)) if i not in {*taken.values(), *result.values()}]
            result.setdefault(name, free[0] if free else len(result) % len(PALETTE))
        else:
            result[name] = taken[name]
    return result


def colors(optimizers: Sequence[str]) -> dict[str, str]:
    return {name: PALETTE[slot] for name, slot in slots(optimizers).items()}


def pale(color: str) -> str:
    """A colour halfway to white."""
    return "#" + "".join(f"{(int(color[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def clipped(text: str, length: int) -> str:
    """A long name without its middle: what tells names of one study apart is often at the end."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def short(value: Any, digits: int = 4) -> str:
    """A value for a table cell: numbers to `digits` significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(short(item, digits) for item in value) or "–"
    return str(value)


def label(value: Any) -> str:
    """A value of an axis as cells are named by it: 0.03125, 1024, full."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else short(value)


def loss(value: Any) -> str:
    """Nats to four decimals: the noise between seeds is of the order of 0.001."""
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def signed(value: Any) -> str:
    """A difference in nats, with a true minus sign."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:+.4f}".replace("-", "−")


def duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: Any) -> str:
    """1,234 · 56.8 k · 12.3 M"""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g} {letter}"
    return f"{value:,.0f}"


def values_text(values: dict[str, Any]) -> str:
    """Settings of a trial in one line."""
    return ", ".join(f"{VALUE_NAMES.get(key, key)} {short(value, 3)}" for key, value in values.items())
