"""One readable decoder-only transformer. It returns final hidden states; head and loss are `head.head_stats`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.errors import InputError
from muonlab.models.feed_forward import FeedForward
from muonlab.models.moe import ExpertStack, MixtureOfExperts, Router
from muonlab.models.ops import rms_norm
from muonlab.models.options import ModelOptions


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    hidden: Tensor  # [B, T, d_model], after the final norm (and the dropout of the head's input)
    auxiliary_loss: Tensor  # scalar, weights applied, summed over layers; 0 for a dense model
    expert_load: Tensor | None  # [n_layers, n_experts], share of the assignments, rows sum to 1; None for a dense model


class Transformer(nn.Module):
    """Token ids in, final hidden states out.

    Args:
        options: sizes and choices; `vocab_size` must be known.

    Parameters are drawn from torch's global generator (see `reset_parameters`). Activations and residual stream have
    the parameters' dtype; under autocast matmuls run in its dtype and the residual stream stays as it is.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        if options.vocab_size < 1:
            raise InputError("the model's vocab_size is 0, which stands for the tokenizer's; give a positive number")
        self.options = options
        self.embedding = nn.Embedding(options.vocab_size, options.d_model)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.n_layers))
        self.norm = RMSNorm(options.d_model, options.norm_eps)
        self.head = None if options.tied_head else nn.Linear(options.d_model, options.vocab_size, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(options.seq_len, options.head_dim), persistent=False)
        self.reset_parameters()

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """Run the model.

        Args:
            tokens: [B, T] int64, T <= seq_len.
            document_ids: [B, T] integers; attention stays inside equal ids. None: one document per sequence.
        """
        length = tokens.shape[1]
        if length > self.options.seq_len:
            raise InputError(f"a sequence of {length} tokens is longer than the model's seq_len {self.options.seq_len}")
        mask = None if document_ids is None else document_mask(document_ids)
        x = self.embedding(tokens)  # [B, T, d]
        if self.options.embedding_scale:
            x = x * math.sqrt(self.options.d_model)
        x = self.dropout(x)
        auxiliary, loads = x.new_zeros((), dtype=torch.float32), []
        for block in self.blocks:
            x, block_auxiliary, load = block(x, self.cos[:length], self.sin[:length], mask)
            if load is not None:
                auxiliary = auxiliary + block_auxiliary
                loads.append(load)
        return ModelOutput(self.dropout(self.norm(x)), auxiliary, torch.stack(loads) if loads else None)

    @property
    def head_weight(self) -> Tensor:
        """The output head [vocab_size, d_model]: the embedding's own parameter when tied."""
        return self.get_output_embeddings().weight

    def matmul_weights(self) -> dict[str, nn.Parameter]:
        """Weights by name that the forward pass reads once, in a matmul of autocast's dtype: not embedding, head and routers."""
        apart = {id(self.embedding), id(self.head), *(id(m) for m in self.modules() if isinstance(m, Router))}
        return {
            name: parameter
            for path, module in self.named_modules()
            if isinstance(module, nn.Linear | ExpertStack) and id(module) not in apart
            for name, parameter in module.named_parameters(path, recurse=False)
            if parameter.ndim > 1
        }

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (the name Hugging Face models use)."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Embedding | nn.Linear:
        """The head, or the embedding that stands in for it when tied (the name Hugging Face models use)."""
        return self.embedding if self.head is None else self.head

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew, in place: matrices N(0, initial_std²), vectors 1, biases 0.

        The output projections of both residual branches start sqrt(2 n_layers) smaller with `depth_init` (GPT-2), so that
        the residual stream's variance does not grow with depth. The rotary tables are filled too.
        """
        std = self.options.initial_std
        residual_std = std / math.sqrt(2 * self.options.n_layers) if self.options.depth_init else std
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=residual_std if {"output", "down"} & set(name.split(".")) else std)
        cos, sin = rotary_tables(self.options.seq_len, self.options.head_dim, self.options.rope_base)
        self.cos.copy_(cos)
        self.sin.copy_(sin)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(options.d_model, options.norm_eps)
        self.attention = Attention(options)
        self.feed_forward_norm = RMSNorm(options.d_model, options.norm_eps)
        self.feed_forward = MixtureOfExperts(options) if options.n_experts else FeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, T, d] -> x, and for a mixture of experts its auxiliary loss and load."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask))
        y, auxiliary, load = self.feed_forward(self.feed_forward_norm(x)), None, None
        if isinstance(self.feed_forward, MixtureOfExperts):
            y, auxiliary, load = y
        return x + self.dropout(y), auxiliary, load


class Attention(nn.Module):
    """Causal self-attention with rotary positions; n_heads / n_kv_heads query heads share a key and a value head."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        d, bias = options.d_model, options.qkv_bias
        self.widths = [d, options.kv_heads * options.head_dim, options.kv_heads * options.head_dim]  # of q, k, v
        if options.fused_qkv:
            self.qkv = nn.Linear(d, sum(self.widths), bias=bias)
            self.qkv.row_split = self.widths  # type: ignore[assignment] # three matrices to a matrix optimizer
        else:
            self.query, self.key, self.value = (nn.Linear(d, width, bias=bias) for width in self.widths)
        self.output = nn.Linear(d, d, bias=False)
        self.logit_meter: nn.Module | None = None
        """Called with queries, keys and mask in training once an optimizer has put one here (QK-clip)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]; cos and sin [T, head_dim]; mask [B, 1, T, T] bool, or None for plainly causal."""
        options = self.options
        if options.fused_qkv:
            # queries and keys are turned as one tensor: the backward pass then puts two parts together, not three
            turned, v = self.qkv(x).unflatten(-1, (-1, options.head_dim)).tensor_split([-options.kv_heads], 2)
            q, k = torch.split(self.turn(turned, cos, sin), [options.n_heads, options.kv_heads], 2)
        else:
            projections = (self.query(x), self.key(x), self.value(x))
            q, k, v = (y.unflatten(-1, (-1, options.head_dim)) for y in projections)  # [B, T, heads, head_dim]
            q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.logit_meter is not None and self.training:
            self.logit_meter(q, k, mask)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=options.dropout if self.training else 0.0,
            enable_gqa=options.kv_heads != options.n_heads,
        )
        out: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return out

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys [B, T, heads, head_dim], normalised if asked, turned by their positions' angles."""
        return rotate(rms_norm(x, None, self.options.norm_eps) if self.options.qk_norm else x, cos, sin)

    def query_key(self) -> tuple[list[Tensor], list[Tensor], int] | None:
        """Weight and bias of queries, those of keys, and the number of query heads; None where both are normalised."""
        if self.options.qk_norm:
            return None
        if self.options.fused_qkv:
            parts = [torch.split(p, self.widths) for p in self.qkv.parameters()]
            return [part[0] for part in parts], [part[1] for part in parts], self.options.n_heads
        return list(self.query.parameters()), list(self.key.parameters()), self.options.n_heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [length, head_dim] fp32, of position · base^(-2i / head_dim) (RoFormer, arXiv 2104.09864).

    Both halves of a head hold the same angles; the first half of sin is negated, as `rotate` needs it.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # [length, head_dim / 2]
    return torch.cat([angle.cos()] * 2, -1).float(), torch.cat([-angle.sin(), angle.sin()], -1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x [B, T, heads, D] by its position's angle.

    A roll by half a head swaps the halves in one pass; slicing and concatenating takes three times as long on CPU.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [T, 1, D]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def document_mask(document_ids: Tensor) -> Tensor:
    """Which key each query may see, [B, 1, T, T] bool: causal, inside its own document. document_ids: [B, T]."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()
