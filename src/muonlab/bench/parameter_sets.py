"""Named sets of hidden matrices, as public models have them: what `bench step` steps."""

from collections.abc import Iterable

from muonlab.bench.floor import Shape
from muonlab.errors import unknown


def _layers(count: int, shapes: Iterable[Shape]) -> list[Shape]:
    return list(shapes) * count


SETS: dict[str, list[Shape]] = {
    # 6 layers of 384: 8 experts with two matrices, a fused QKV, an output projection, a router
    "moe-79m": _layers(6, [(1536, 384)] * 8 + [(384, 1536)] * 8 + [(1152, 384), (384, 384), (8, 384)]),
    # Qwen2-0.5B: 24 layers of 896, two key-value heads of 64, a gated feed-forward of 4864
    "qwen-0.5b": _layers(24, [(896, 896)] * 2 + [(128, 896)] * 2 + [(4864, 896)] * 2 + [(896, 4864)]),
    # 12 layers of 768: query, key, value and output apart
    "gpt-124m": _layers(12, [(768, 768)] * 4 + [(3072, 768), (768, 3072)]),
    # depth 20, width 1280: query, key, value and output apart
    "nanochat-d20": _layers(20, [(1280, 1280)] * 4 + [(5120, 1280), (1280, 5120)]),
    # Llama 3.2 1B: 16 layers of 2048, eight key-value heads of 64, a gated feed-forward of 8192
    "llama-1b": _layers(16, [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)]),
    # for trying the benchmark itself
    "tiny": _layers(2, [(64, 64)] * 4 + [(128, 64), (64, 128)]),
}


def shapes_of(name: str) -> list[Shape]:
    """The matrices of a set; InputError names the nearest."""
    if name not in SETS:
        raise unknown("parameter set", name, SETS)
    return SETS[name]


def entries_of(name: str) -> int:
    """Parameters in a set."""
    return sum(rows * cols for rows, cols in shapes_of(name))
