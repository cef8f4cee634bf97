"""What a user can set: one frozen dataclass per optimizer, plain standard library, validated as it is made.

Learning rates and decays exist per kind of parameter for every optimizer, so that none is compared with fewer knobs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from muonlab.errors import InputError, unknown
from muonlab.optim.coefficients import resolve
from muonlab.optim.scaling import SCALES


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options that every optimizer has."""

    lr: float = 1e-3
    """Learning rate of hidden matrices, and of every kind below that is not set."""
    embedding_lr: float | None = None
    """Learning rate of embeddings (and of a head tied to one); not set: `lr`."""
    head_lr: float | None = None
    """Learning rate of the output head; not set: `lr`."""
    vector_lr: float | None = None
    """Learning rate of norms, biases, scalars and routers; not set: `lr`."""
    weight_decay: float = 0.1
    """Decoupled weight decay of hidden matrices and routers (times the learning rate)."""
    embedding_weight_decay: float = 0.0
    """Weight decay of embeddings: none, because rows of rare tokens would shrink between their few updates."""
    head_weight_decay: float | None = None
    """Weight decay of the output head; not set: `weight_decay`."""
    vector_weight_decay: float = 0.0
    """Weight decay of norms, biases and scalars: none, as is usual."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "head_lr", "vector_lr"):
            _not_negative(name, getattr(self, name))
        for name in ("weight_decay", "embedding_weight_decay", "head_weight_decay", "vector_weight_decay"):
            _not_negative(name, getattr(self, name))

    def lr_of(self, kind: str) -> float:
        """The learning rate of a kind of parameter."""
        own = {"embedding": self.embedding_lr, "head": self.head_lr, "vector": self.vector_lr, "router": self.vector_lr}
        rate = own.get(kind)
        return self.lr if rate is None else rate

    def weight_decay_of(self, kind: str) -> float:
        """The weight decay of a kind of parameter."""
        head = self.weight_decay if self.head_weight_decay is None else self.head_weight_decay
        own = {"embedding": self.embedding_weight_decay, "head": head, "vector": self.vector_weight_decay}
        return own.get(kind, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(OptimizerOptions):
    """AdamW for every parameter."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Averaging of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the averaged square."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _betas(self.betas)
        _not_negative("eps", self.eps)


@dataclass(frozen=True, kw_only=True)
class LionOptions(OptimizerOptions):
    """Lion for every parameter; its learning rate is usually 3 to 10 times lower than AdamW's."""

    lr: float = 3e-4
    """Learning rate of hidden matrices, and of every kind below that is not set."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Interpolation of the update, averaging of the momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _betas(self.betas)


@dataclass(frozen=True, kw_only=True)
class SophiaGOptions(OptimizerOptions):
    """Sophia-G for every parameter: momentum over a Gauss-Newton-Bartlett estimate of the curvature, clipped."""

    lr: float = 6e-4
    """Learning rate of hidden matrices, and of every kind below that is not set."""
    betas: tuple[float, float] = (0.965, 0.99)
    """Averaging of the gradient and of the curvature."""
    rho: float = 0.04
    """Curvature is multiplied by this: higher values clip fewer entries."""
    eps: float = 1e-15
    """Added to the scaled curvature."""
    curvature_every: int = 10
    """Updates between two estimates of the curvature (the training loop makes them)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _betas(self.betas)
        _positive("rho", self.rho)
        _not_negative("eps", self.eps)
        if self.curvature_every < 1:
            raise InputError(f"curvature_every must be at least 1, got {self.curvature_every}")


@dataclass(frozen=True, kw_only=True)
class SGDOptions(OptimizerOptions):
    """SGD with heavy-ball momentum for every parameter."""

    lr: float = 0.1
    """Learning rate of hidden matrices, and of every kind below that is not set."""
    momentum: float = 0.9
    """Heavy-ball momentum; 0 for none."""
    nesterov: bool = False
    """Look ahead by one step of momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class MuonOptions(OptimizerOptions):
    """Muon for hidden matrices, AdamW or Lion for everything else."""

    momentum: float = 0.95
    """Momentum of the hidden matrices."""
    nesterov: bool = True
    """Look ahead by one step of momentum."""
    coefficients: str | tuple[tuple[float, ...], ...] = "polar_express"
    """Polynomials of the orthogonalisation: a registered name ("polar_express@1.05" sets the safety factor) or steps (a, b, c)."""
    ns_steps: int | None = None
    """Number of steps of the orthogonalisation; not set: that of the coefficients (5 for most)."""
    method: Literal["auto", "standard", "svd"] = "auto"
    """How the orthogonalisation is computed."""
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Precision of the orthogonalisation; auto: fp16 on CUDA, bf16 on a CPU with such instructions, else fp32."""
    scale: str = "moonlight"
    """Size of the update: moonlight (as AdamW's, so that learning rate and decay carry over), keller, spectral or none."""
    block_size: int | None = None
    """Orthogonalise tiles of this size instead of whole matrices."""
    min_dim: int = 8
    """Hidden matrices with fewer rows or columns than this are updated as vectors are."""
    fallback: Literal["adamw", "lion"] = "adamw"
    """Rule for everything that is not a hidden matrix."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of the fallback."""
    eps: float = 1e-8
    """Epsilon of the fallback (AdamW)."""
    max_workspace_bytes: int | None = None
    """Bound on temporary memory of one step; not set: a cache-sized chunk on CPU, a quarter of the matrices elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("momentum", self.momentum)
        resolve(self.coefficients, self.ns_steps)
        if self.scale not in SCALES:
            raise unknown("scale", self.scale, SCALES)
        for name in ("block_size", "max_workspace_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fallback not in ("adamw", "lion"):
            raise unknown("fallback", self.fallback, ("adamw", "lion"))
        _betas(self.betas)
        _not_negative("eps", self.eps)


@dataclass(frozen=True, kw_only=True)
class ClassOptions(OptimizerOptions):
    """Any `torch.optim.Optimizer` by import path, with the same parameter groups as the others."""

    class_path: str = "torch.optim.Adam"
    """Import path of the class, "package.module.Name"; it must take parameter groups with lr and weight_decay."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "." not in self.class_path:
            raise InputError(f"class_path must be package.module.Name, got {self.class_path!r}")


def _not_negative(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < float("inf"):
        raise InputError(f"{name} must be a number >= 0, got {value}")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InputError(f"{name} must be a number > 0, got {value}")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name} must lie in [0, 1), got {value}")


def _betas(betas: tuple[float, float]) -> None:
    if len(betas) != 2:
        raise InputError(f"betas must be two numbers, got {betas}")
    for beta in betas:
        _fraction("betas", beta)
