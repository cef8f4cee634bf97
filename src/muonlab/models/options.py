"""What a model is: every choice that fixes its parameters and its forward pass, checked when it is made."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from muonlab.errors import InputError, unknown

Activation = Literal["silu", "gelu", "relu2", "swiglu", "geglu"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions, causal attention, a dense or a routed feed-forward.

    Raises `InputError` (one line) for sizes that do not fit each other.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    vocab_size: int = 0
    """Number of token ids; 0 takes the tokenizer's."""
    seq_len: int = 256
    """Longest sequence, in tokens."""
    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Query heads; each is d_model / n_heads wide."""
    n_kv_heads: int | None = None
    """Key and value heads, each shared by n_heads / n_kv_heads query heads (grouped-query attention); none: n_heads."""
    d_ff: int = 512
    """Hidden width of the feed-forward, or of one expert."""
    activation: Activation = "relu2"
    """Feed-forward non-linearity: silu, gelu, relu2 (squared ReLU), or gated: swiglu, geglu (a third matrix)."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, without weights, before the rotation."""
    fused_qkv: bool = False
    """One matrix for queries, keys and values instead of three."""
    tied_head: bool = True
    """The output head is the token embedding."""
    embedding_scale: bool = False
    """Multiply token embeddings by sqrt(d_model)."""
    dropout: float = 0.0
    """Dropout of embeddings, attention weights, hidden units, both residual branches and the head's input."""
    n_experts: int = 0
    """Experts in each feed-forward; 0 is a dense feed-forward."""
    top_k: int = 2
    """Experts that each token visits."""
    load_balancing: float = 0.01
    """Weight of the load-balancing loss (1 per layer at even load; summed over layers)."""
    router_z_loss: float = 0.0
    """Weight of the router z-loss (mean squared log-sum-exp of the router's logits; summed over layers)."""
    router_noise: float = 0.0
    """Standard deviation of the Gaussian noise on the router's logits, in training only."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square inside every RMSNorm."""
    init_std: float | None = None
    """Standard deviation of every initial matrix; none: 1 / sqrt(3 d_model), which at a width of 833 is the usual 0.02."""
    depth_init: bool = True
    """Divide the initial output projections of both residual branches by sqrt(2 n_layers)."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "d_model", "n_layers", "n_heads", "d_ff"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.vocab_size >= 0, f"vocab_size must be positive, or 0 for the tokenizer's, got {self.vocab_size}")
        _require(
            self.d_model % self.n_heads == 0,
            f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; choose d_model = n_heads * head width",
        )
        _require(
            self.head_dim % 2 == 0, f"rotary positions need an even head width, got d_model / n_heads = {self.head_dim}"
        )
        _require(
            self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
            f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}",
        )
        if self.activation not in get_args(Activation):
            raise unknown("activation", str(self.activation), get_args(Activation))
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        _require(self.n_experts >= 0, f"n_experts must be positive, or 0 for a dense model, got {self.n_experts}")
        if self.n_experts:
            _require(
                1 <= self.top_k <= self.n_experts,
                f"top_k {self.top_k} must lie between 1 and n_experts {self.n_experts}",
            )
        for name in ("load_balancing", "router_z_loss", "router_noise"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.initial_std >= 0, f"init_std must not be negative, got {self.init_std}")
        for name in ("rope_base", "norm_eps"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def initial_std(self) -> float:
        """Standard deviation of every initial matrix, resolved."""
        return 1 / math.sqrt(3 * self.d_model) if self.init_std is None else self.init_std

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate matrix."""
        return self.activation in ("swiglu", "geglu")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)
