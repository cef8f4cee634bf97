"""The memory that training a model needs, part by part: closed forms, nothing is built or run."""

from dataclasses import asdict, dataclass
from typing import Literal

from muonlab.diagnostics.flops import count_parameters, hidden_matrices
from muonlab.errors import unknown
from muonlab.models import ModelOptions

STATE_TENSORS: dict[str, tuple[int, int]] = {
    "muon": (1, 2),
    "adamw": (2, 2),
    "lion": (1, 1),
    "sophia": (2, 2),
    "sgd": (1, 1),
}
"""fp32 entries of optimizer state for each entry of a hidden matrix, and of any other parameter."""

_MUON_WORKSPACE = 16  # bytes an entry of the matrices worked on at once: fp32 direction and copy, iterate, products
_MUON_BUDGET = 1 << 22  # bytes; how much of that is taken at once on CPU
_PIECE = 1 << 18  # entries that an elementwise rule works on at once


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes. `activations` and `workspace` are estimates, the others exact (but for a step counter per parameter)."""

    parameters: int
    gradients: int
    optimizer_state: int
    workspace: int
    """Temporaries of the optimizer; they live after the activations have gone."""
    activations: int
    """What the backward pass of one micro-batch keeps."""
    logits: int
    """The one chunk of fp32 logits that is alive."""

    @property
    def total(self) -> int:
        """Peak: what stays, and the larger of the model's and the optimizer's temporaries."""
        stays = self.parameters + self.gradients + self.optimizer_state
        return stays + max(self.workspace, self.activations + self.logits)

    def parts(self) -> dict[str, int]:
        """Name -> bytes, `total` last."""
        return {**asdict(self), "total": self.total}


def training_memory(
    options: ModelOptions,
    optimizer: str,
    *,
    micro_batch_size: int,
    seq_len: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    logit_chunk_bytes: int = 32 * 2**20,
) -> TrainingMemory:
    """Memory of training with fp32 parameters, gradients and state.

    Args:
        options: the model, its vocab_size resolved.
        optimizer: muon (with AdamW for all but hidden matrices), adamw, lion, sophia or sgd.
        micro_batch_size: sequences in one forward and backward pass.
        seq_len: tokens in a sequence; the model's own by default.
        precision: bf16 and fp16 are autocast: activations of matmuls take half, plus a low copy of the weights.
        logit_chunk_bytes: bound on the logits alive.
    """
    if optimizer not in STATE_TENSORS:
        raise unknown("optimizer", optimizer, STATE_TENSORS)
    length = options.seq_len if seq_len is None else seq_len
    tokens = micro_batch_size * length
    counts = count_parameters(options)
    on_hidden, on_others = STATE_TENSORS[optimizer]
    wide, narrow = _saved_entries(options, length)
    low = precision != "fp32"
    weight_copies = 2 * (counts.hidden + counts.head + counts.embedding * options.tied_head) if low else 0
    return TrainingMemory(
        parameters=4 * counts.total,
        gradients=4 * counts.total,
        optimizer_state=4 * (on_hidden * counts.hidden + on_others * (counts.total - counts.hidden)),
        workspace=_workspace(options, optimizer, counts.total),
        activations=tokens * (4 * wide + (2 if low else 4) * narrow) + weight_copies,
        logits=min(logit_chunk_bytes, 4 * tokens * options.vocab_size),
    )


def _saved_entries(options: ModelOptions, length: int) -> tuple[int, int]:
    """Entries that one token leaves for the backward pass: of the residual stream's dtype, of the matmuls' dtype."""
    d, kv, f = options.d_model, options.kv_heads * options.head_dim, options.d_ff
    visits = options.top_k if options.n_experts else 1
    wide = 2 * d  # the input of both norms
    narrow = 2 * d  # the output of both norms
    narrow += 2 * d + 2 * kv  # rotated queries and keys, values, attention's output
    narrow += 2 * (d + kv) * options.qk_norm
    narrow += visits * f * (4 if options.gated else 2)
    if options.n_experts:
        narrow += visits * 2 * d  # rows sorted by expert, and the experts' outputs
        wide += 3 * options.n_experts
    if options.dropout:
        narrow += visits * f + 2 * options.n_heads * length  # with dropout, attention keeps its weights
    return options.n_layers * wide + d, options.n_layers * narrow + d


def _workspace(options: ModelOptions, optimizer: str, total: int) -> int:
    elementwise = 3 * 4 * min(_PIECE, total)
    if optimizer != "muon":
        return elementwise
    at_once = (
        m * n * min(count, max(1, _MUON_BUDGET // (_MUON_WORKSPACE * m * n)))
        for (m, n), count in hidden_matrices(options).items()
    )
    return max(elementwise, _MUON_WORKSPACE * max(at_once))
