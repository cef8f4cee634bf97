"""One readable decoder-only transformer. It returns final hidden states; loss and head are `ops.head_stats`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.errors import InputError
from muonlab.models.feed_forward import FeedForward
from muonlab.models.options import ModelOptions


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    hidden: Tensor  # [B, T, d_model], after the final norm (and the dropout of the head's input)
    auxiliary_loss: Tensor  # scalar, weights applied, summed over layers; 0 for a dense model
    expert_load: Tensor | None  # [n_layers, n_experts], share of the assignments; rows sum to 1; None for a dense model


class Transformer(nn.Module):
    """Token ids in, final hidden states out.

    Args:
        options: sizes and choices; `vocab_size` must be known.

    Parameters are drawn from torch's global generator (see `reset_parameters`).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        if options.vocab_size < 1:
            raise InputError(
                "the model needs a vocab_size of at least 1; 0 stands for the tokenizer's and must be resolved"
            )
        self.options = options
        self.embedding = nn.Embedding(options.vocab_size, options.d_model)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.n_layers))
        self.norm = RMSNorm(options.d_model, options.norm_eps)
        self.head = None if options.tied_head else nn.Linear(options.d_model, options.vocab_size, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        cos, sin = rotary_tables(options.seq_len, options.head_dim, options.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """Args: tokens [B, T] int64, T <= seq_len; document_ids [B, T]: attention stays inside equal ids."""
        length = tokens.shape[1]
        if length > self.options.seq_len:
            raise InputError(f"a sequence of {length} tokens is longer than the model's seq_len {self.options.seq_len}")
        mask = None if document_ids is None else document_mask(document_ids)
        rotation = (self.cos[:length], self.sin[:length])
        x = self.embedding(tokens)  # [B, T, d]
        if self.options.embedding_scale:
            x = x * math.sqrt(self.options.d_model)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, mask)
        return ModelOutput(self.dropout(self.norm(x)), x.new_zeros((), dtype=torch.float32), None)

    @property
    def head_weight(self) -> Tensor:
        """The output head [vocab_size, d_model]: the embedding's own parameter when tied."""
        return self.get_output_embeddings().weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (the name Hugging Face models use)."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Embedding | nn.Linear:
        """The head, or the embedding that stands in for it when tied."""
        return self.embedding if self.head is None else self.head

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, in place: N(0, init_std²), norms 1, biases 0, residual outputs scaled for depth."""
        std = self.options.init_std
        residual_std = std / math.sqrt(2 * self.options.n_layers) if self.options.depth_init else std
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=residual_std if name.rpartition(".")[0].endswith(("output", "down")) else std)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(options.d_model, options.norm_eps)
        self.attention = Attention(options)
        self.feed_forward_norm = RMSNorm(options.d_model, options.norm_eps)
        self.feed_forward = FeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, mask))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        d, kv, bias = options.d_model, options.kv_heads * options.head_dim, options.qkv_bias
        if options.fused_qkv:
            self.qkv = nn.Linear(d, d + 2 * kv, bias=bias)
        else:
            self.query = nn.Linear(d, d, bias=bias)
            self.key = nn.Linear(d, kv, bias=bias)
            self.value = nn.Linear(d, kv, bias=bias)
        self.output = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        options = self.options
        if options.fused_qkv:
            q, k, v = self.qkv(x).split(
                [options.n_heads * options.head_dim] + 2 * [options.kv_heads * options.head_dim], -1
            )
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        q, k, v = (y.unflatten(-1, (-1, options.head_dim)) for y in (q, k, v))  # [B, T, heads, head_dim]
        if options.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], eps=options.norm_eps) for y in (q, k))
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=options.dropout if self.training else 0.0,
            enable_gqa=options.kv_heads != options.n_heads,
        )
        return self.output(y.transpose(1, 2).flatten(2))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight."""


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · base^(-2i / head_dim), each [length, head_dim / 2] fp32 (RoFormer, arXiv 2104.09864)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x [B, T, heads, D] by the angle of their position."""
    cos, sin = (table[:, None].to(x.dtype) for table in rotation)  # [T, 1, D/2]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def document_mask(document_ids: Tensor) -> Tensor:
    """Which key each query may see, [B, 1, T, T] bool: causal, inside its own document. document_ids: [B, T]."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()
