"""What a user can set: one frozen dataclass per optimizer, plain standard library, validated as it is made.

Learning rates and decays exist per kind of parameter for every optimizer, so that none is compared with fewer knobs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from muonlab.errors import InputError, unknown
from muonlab.optim.coefficients import resolve
from muonlab.optim.methods import DTypeName, Method, check_safe
from muonlab.optim.scaling import SCALES

KINDS = ("hidden", "embedding", "head", "router", "vector")
DECAY_FORMS = ("lr", "independent", "lr_squared", "l2")


@dataclass(frozen=True, kw_only=True)
class Override:
    """A treatment of one's own for the parameters that match; what is not set stays as routing decided.

    Several may match one parameter: they apply in order, later ones over earlier ones.
    """

    name: str = "*"
    """Pattern for the full name of the parameter, such as "*.attn.qkv.weight" (shell wildcards)."""
    module: str = "*"
    """Pattern for the class name of the module that owns it, such as "Conv2d"."""
    kind: Literal["hidden", "embedding", "head", "router", "vector"] | None = None
    """Treat it as this kind; "hidden" means Muon."""
    lr: float | None = None
    """Its own learning rate."""
    weight_decay: float | None = None
    """Its own weight decay."""
    split: tuple[int, ...] | None = None
    """Sizes of fused projections along `axis`: each is a matrix of its own; () for one whole matrix."""
    head_dim: int | None = None
    """Rows (or columns, see `axis`) of an attention head: each head is a matrix of its own, after `split`."""
    axis: Literal[0, 1] = 0
    """0: split and head_dim count outputs (rows), as for query, key and value; 1: inputs, as for the output projection."""
    view: tuple[tuple[str | int | tuple[int, ...], ...], ...] = ()
    """Further operations of `views.OPERATIONS`, after split and heads."""
    block_size: int | None = None
    """Its own tile size; 0 for whole matrices."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        _not_negative("lr", self.lr)
        _not_negative("weight_decay", self.weight_decay)
        if self.head_dim is not None and self.block_size and self.block_size > self.head_dim:
            raise InputError(
                f"override {self.name!r}: block_size {self.block_size} is larger than head_dim {self.head_dim}: "
                "heads are already smaller matrices; leave one of them out"
            )


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
    decay_form: Literal["lr", "independent", "lr_squared", "l2"] = "lr"
    """What weight decay is multiplied by: the learning rate (decoupled, as AdamW), nothing, or its square (PaLM); l2 adds
    the weights times it to the gradient."""
    cautious_decay: bool = False
    """Decay only entries that the update moves towards zero or not at all."""
    skip_nonfinite: bool = False
    """An update whose gradients hold a NaN or an infinity changes nothing (decided on the device)."""
    overrides: tuple[Override, ...] = ()
    """Treatments of one's own for some parameters, by name pattern or module class."""
    strict: bool = False
    """Refuse parameters of modules that routing does not know, in place of a warning."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "head_lr", "vector_lr"):
            _not_negative(name, getattr(self, name))
        for name in ("weight_decay", "embedding_weight_decay", "head_weight_decay", "vector_weight_decay"):
            _not_negative(name, getattr(self, name))
        _choice("decay_form", self.decay_form, DECAY_FORMS)

    def lr_of(self, kind: str) -> float:
        """The learning rate of a kind of parameter."""
        rate = self._own_lr(kind)
        return self.lr if rate is None else rate

    def sets_lr_of(self, kind: str) -> bool:
        """True if the kind has a learning rate of its own, not `lr`."""
        return self._own_lr(kind) is not None

    def _own_lr(self, kind: str) -> float | None:
        own = {"embedding": self.embedding_lr, "head": self.head_lr, "vector": self.vector_lr, "router": self.vector_lr}
        return own.get(kind)

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
    method: Method = "auto"
    """How the orthogonalisation is computed: standard, gram (far from square, not in bf16), svd (exact, slow), or mud
    (decorrelated rows by a triangular solve, in place of it)."""
    dtype: DTypeName = "auto"
    """Precision of the orthogonalisation; auto: fp16 on CUDA, bf16 on a CPU with such instructions, else fp32."""
    scale: str = "moonlight"
    """Size of the update: moonlight (as AdamW's, so that learning rate and decay carry over), keller, spectral or none."""
    block_size: int | None = None
    """Orthogonalise tiles of this size instead of whole matrices."""
    block_period: int = 0
    """With block_size: every so many updates the whole matrix is orthogonalised, the first update included; 0: never."""
    block_lr: float | None = None
    """With block_size: learning rate of updates on tiles; not set: `lr`."""
    min_dim: int = 8
    """Hidden matrices with fewer rows or columns than this are updated as vectors are."""
    fallback: Literal["adamw", "lion"] = "adamw"
    """Rule for everything that is not a hidden matrix."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of the fallback."""
    eps: float = 1e-8
    """Epsilon of the fallback (AdamW)."""
    width_scaling: bool = False
    """Multiply the fallback's learning rates by (d_model / 768) ** -0.5, d_model being the width of the embedding."""
    heavy_ball: bool = False
    """Momentum adds gradients up instead of averaging them: the same directions while momentum is constant."""
    momentum_dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    """Storage of the momentum; auto: as the parameter, fp32 for half-precision ones; int8 has a scale a row."""
    scaled_decay: bool = False
    """Weight decay is multiplied by the scale of the update too."""
    norm_eps: float = 0.0
    """Lower bound of the norm that a matrix is divided by; 0: any magnitude is the same."""
    equilibrate_rows: bool = False
    """Bring all rows to the same norm before the orthogonalisation (MuonEq)."""
    sign_momentum: bool = False
    """Orthogonalise the signs of the momentum (AdaMuon, with normuon_axis="entries")."""
    renormalize: bool = False
    """Give the update the Frobenius norm of an exactly orthogonal matrix (Muon+)."""
    normuon_beta: float | None = None
    """Averaging of squares that the update is divided by the root of; not set: off. 0.95 is usual."""
    normuon_axis: Literal["rows", "long", "entries", "norm", "sum"] = "rows"
    """What has a square of its own: every row (NorMuon), whichever of rows and columns are more, every entry (AdaMuon), or
    the gradient of a whole matrix, averaged (norm: NAMO) or added up (sum: AdaGO)."""
    nuclear_scale: bool = False
    """Multiply the update by the nuclear norm of the momentum (PolarGrad), usually with scale="none"."""
    cautious_update: bool = False
    """Leave out entries of the update that disagree in sign with the gradient (C-Muon)."""
    mars_gamma: float | None = None
    """Correct gradients by their change since the last update (MARS); 0.025 is usual; not set: off."""
    laprop_beta: float | None = None
    """Divide gradients by the root of their averaged squares before the momentum (LaProp); not set: off. 0.99 is usual."""
    row_fraction: float | None = None
    """Orthogonalise only this share of rows at a time, those with most momentum, which is added up, without Nesterov (Dion2)."""
    fixed_norm: bool = False
    """Updates are `lr` times as long as the matrix, whose Frobenius norm never changes (MuonHyperball)."""
    stiefel: bool = False
    """Orthogonalise matrices again after every update (SPEL), usually with scale="none"."""
    qk_clip: float | None = None
    """Scale back query and key weights of heads whose attention logits exceed this (MuonClip); not set: off. 100 is usual."""
    idle: Literal["skip", "fade", "move"] = "skip"
    """Matrices whose whole gradient is zero, such as experts without a token: leave them as they are, let their old momentum
    move them ever less, or at full speed."""
    max_workspace_bytes: int | None = None
    """Temporary memory of one step, about; not set: a cache-sized chunk on CPU, a quarter of the matrices elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("momentum", self.momentum)
        resolve(self.coefficients, self.ns_steps)
        check_safe(self.coefficients, self.method, self.dtype)
        if self.scale not in SCALES:
            raise unknown("scale", self.scale, SCALES)
        for name, choices in _CHOICES.items():
            _choice(name, getattr(self, name), choices)
        for name in ("block_size", "max_workspace_bytes", "min_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for override in self.overrides:
            heads = override.head_dim if override.block_size is None else None
            if heads is not None and self.block_size is not None and self.block_size > heads:
                raise InputError(
                    f"block_size {self.block_size} is larger than head_dim {heads} of the override for {override.name!r}: heads "
                    "are already smaller matrices; give that override block_size=0"
                )
        if (self.block_period or self.block_lr is not None) and self.block_size is None:
            raise InputError("block_period and block_lr have no effect without block_size")
        if self.block_period < 0:
            raise InputError(f"block_period must be at least 0, got {self.block_period}")
        _not_negative("block_lr", self.block_lr)
        if self.block_period and self.momentum_dtype == "int8":
            raise InputError(
                "block_period changes the rows that int8 momentum has scales for: use momentum_dtype bfloat16"
            )
        _betas(self.betas)
        _not_negative("eps", self.eps)
        _not_negative("norm_eps", self.norm_eps)
        for name in ("normuon_beta", "laprop_beta"):
            if getattr(self, name) is not None:
                _fraction(name, getattr(self, name))
        _not_negative("mars_gamma", self.mars_gamma)
        if self.qk_clip is not None:
            _positive("qk_clip", self.qk_clip)
        if self.row_fraction is not None:
            if not 0 < self.row_fraction <= 1:
                raise InputError(f"row_fraction must lie in (0, 1], got {self.row_fraction}")
            for name in ("sign_momentum", "equilibrate_rows", "nuclear_scale"):
                if getattr(self, name):
                    raise InputError(f"row_fraction chooses rows of the momentum as it is: not with {name}")
            if self.normuon_axis == "norm":
                raise InputError(
                    "row_fraction leaves momentum behind, whose norm says nothing: not with normuon_axis='norm'"
                )

    @classmethod
    def of(cls, convention: str, **given: Any) -> Self:
        """The options that reproduce another implementation's arithmetic and defaults, with those given over them."""
        from muonlab.optim.conventions import CONVENTIONS  # conventions are written in terms of options

        if convention not in CONVENTIONS:
            raise unknown("convention", convention, CONVENTIONS)
        return cls(**{**CONVENTIONS[convention], **given})


_CHOICES: dict[str, tuple[str, ...]] = {
    "fallback": ("adamw", "lion"),
    "idle": ("skip", "fade", "move"),
    "momentum_dtype": ("auto", "bfloat16", "float32", "int8"),
    "normuon_axis": ("rows", "long", "entries", "norm", "sum"),
}


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
        for name, neutral in (("decay_form", "lr"), ("cautious_decay", False), ("skip_nonfinite", False)):
            if getattr(self, name) != neutral:
                raise InputError(f"{self.class_path} makes its own updates: {name} has no effect on it")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(name, value, choices)


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
