"""How many parameters a model has, of which kind, and how much arithmetic a token costs: closed forms, nothing is built."""

from dataclasses import dataclass

from muonlab.models import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters. The kinds sum to `total`; a tied head is counted once, as embedding."""

    total: int
    active: int
    """Those that one token uses: all, with `top_k` of the experts instead of `n_experts`."""
    hidden: int
    embedding: int
    head: int
    router: int
    vector: int


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token's forward pass, a multiplication and an addition each counting one."""

    hidden: int
    """Attention projections and feed-forward (the experts that the token visits)."""
    attention: int
    """Queries on keys and weights on values; only the pairs that causality allows, averaged over positions."""
    router: int
    head: int

    @property
    def forward(self) -> int:
        """All of the forward pass."""
        return self.hidden + self.attention + self.router + self.head

    @property
    def training(self) -> int:
        """Forward and backward, which costs twice the forward: each product has two gradients of its size."""
        return 3 * self.forward


def hidden_matrices(options: ModelOptions) -> dict[tuple[int, int], int]:
    """(rows, columns) -> how many hidden matrices of that shape; each expert's matrices count one by one."""
    d, kv, f = options.d_model, options.kv_heads * options.head_dim, options.d_ff
    attention = [(d + 2 * kv, d)] if options.fused_qkv else [(d, d), (kv, d), (kv, d)]
    feed_forward = ([(f, d)] * (2 if options.gated else 1) + [(d, f)]) * max(1, options.n_experts)
    counts: dict[tuple[int, int], int] = {}
    for shape in [*attention, (d, d), *feed_forward]:
        counts[shape] = counts.get(shape, 0) + options.n_layers
    return counts


def count_parameters(options: ModelOptions) -> ParameterCounts:
    """Parameters by kind; `options.vocab_size` must be the resolved one."""
    d, experts = options.d_model, options.n_experts
    hidden = sum(m * n * count for (m, n), count in hidden_matrices(options).items())
    embedding = options.vocab_size * d
    head = 0 if options.tied_head else embedding
    router = options.n_layers * experts * d
    bias = d + 2 * options.kv_heads * options.head_dim if options.qkv_bias else 0
    vector = options.n_layers * (2 * d + bias) + d
    total = hidden + embedding + head + router + vector
    idle = options.n_layers * max(0, experts - options.top_k) * _feed_forward_entries(options)
    return ParameterCounts(
        total=total,
        active=total - idle,
        hidden=hidden,
        embedding=embedding,
        head=head,
        router=router,
        vector=vector,
    )


def token_flops(options: ModelOptions, seq_len: int | None = None) -> TokenFlops:
    """Arithmetic of one token in sequences of `seq_len` (the model's own by default).

    A matrix of p entries costs 2p. Attention over the (T + 1)/2 positions that a token sees on average costs
    2 · 2 · d_model · (T + 1)/2 a layer. Norms, rotations, softmax and the loss are not counted: they are no matmuls.
    """
    length = options.seq_len if seq_len is None else seq_len
    counts = count_parameters(options)
    idle = counts.total - counts.active
    return TokenFlops(
        hidden=2 * (counts.hidden - idle),
        attention=options.n_layers * 2 * options.d_model * (length + 1),
        router=2 * counts.router,
        head=2 * options.vocab_size * options.d_model,
    )


def _feed_forward_entries(options: ModelOptions) -> int:
    return (3 if options.gated else 2) * options.d_model * options.d_ff
