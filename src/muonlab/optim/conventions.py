"""How other implementations of Muon compute, as options of this one; and learning rates that mean the same in two of them."""

from typing import Any

from muonlab.errors import unknown
from muonlab.optim.coefficients import named, with_safety
from muonlab.optim.scaling import update_rms

_KELLER: dict[str, Any] = {
    "coefficients": "keller",
    "scale": "keller",
    "dtype": "bfloat16",
    "idle": "move",
}
_EXPRESS = named("polar_express_1.02").steps
# dion and nanochat divide by 1.01 times the norm: the same as a safety factor of the first step alone.
_EXPRESS_101 = with_safety(_EXPRESS[:1], 1.01) + _EXPRESS[1:]

CONVENTIONS: dict[str, dict[str, Any]] = {
    "torch": {**_KELLER, "lr": 1e-3, "weight_decay": 0.1, "norm_eps": 1e-7},
    "keller": {**_KELLER, "lr": 0.02, "weight_decay": 0.0, "eps": 1e-10},
    "moonlight": {**_KELLER, "lr": 1e-3, "weight_decay": 0.1, "heavy_ball": True, "scale": "moonlight"},
    "exp9": {**_KELLER, "lr": 0.02, "weight_decay": 0.0, "dtype": "float16"},
    "dion": {
        "lr": 0.01,
        "weight_decay": 0.01,
        "heavy_ball": True,
        "nesterov": False,
        "coefficients": _EXPRESS_101,
        "dtype": "bfloat16",
        "scale": "spectral",
        "idle": "move",
    },
    "nanochat": {
        "lr": 0.02,
        "weight_decay": 0.2,
        "coefficients": _EXPRESS_101,
        "dtype": "bfloat16",
        "scale": "keller",
        "cautious_decay": True,
        "scaled_decay": True,
        "equilibrate_rows": True,
        "renormalize": True,
        "normuon_beta": 0.9,
        "normuon_axis": "long",
        "idle": "move",
        "betas": (0.8, 0.95),
        "eps": 1e-10,
    },
}
"""Names and options. Sources: torch: torch.optim.Muon; keller: KellerJordan/Muon muon.py; moonlight: MoonshotAI/Moonlight
examples/toy_train.py; exp9: Open-Superintelligence-Lab/blueberry-llm; dion: microsoft/dion dion/muon.py; nanochat:
karpathy/nanochat nanochat/optim.py."""

# Root mean square of the singular values that a set really gives to the momentum of a matrix, relative to 1: measured on
# Gaussian matrices with an aspect of 4. keller's undershoot is the only one that matters.
_GAIN = {"keller": 0.868}


def convert_lr(lr: float, from_: str, to: str, shape: tuple[int, int], *, coefficients_too: bool = False) -> float:
    """The learning rate that moves a matrix of `shape` (rows are outputs) as far in convention `to` as `lr` in `from_`.

    Args:
        lr: learning rate in `from_`.
        from_, to: names of `CONVENTIONS`, or of `scaling.SCALES`.
        shape: (rows, cols) of the matrix.
        coefficients_too: also make up for the smaller singular values that `keller` coefficients leave (13 %).

    Returns:
        The learning rate. It depends on the shape wherever the two scales do, so one factor for a whole model exists only
        if all its matrices have the same shape.
    """
    rms = {name: _update_rms(name, shape, coefficients_too) for name in (from_, to)}
    return lr * rms[from_] / rms[to]


def _update_rms(name: str, shape: tuple[int, int], coefficients_too: bool) -> float:
    from muonlab.optim.scaling import SCALES

    if name in CONVENTIONS:
        options = CONVENTIONS[name]
        gain = _GAIN.get(str(options["coefficients"]), 1.0) if coefficients_too else 1.0
        return gain * update_rms(options["scale"], *shape)
    if name in SCALES:
        return update_rms(name, *shape)
    raise unknown("convention", name, [*CONVENTIONS, *SCALES])
