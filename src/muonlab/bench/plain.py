"""The lab's transformer as one would write it in an afternoon with nothing but torch, and the usual loop around it.

The opponent of `bench train`: nn.Linear, nn.RMSNorm, scaled_dot_product_attention, one grouped matmul for all experts,
F.cross_entropy over all logits, torch's own optimizers, eager or through torch.compile. It takes muonlab's weights, and both
must agree on the loss before anything is timed: it is the same model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.models import ModelOptions, Transformer
from muonlab.models.head import head_stats

LR = {"muon": 0.01, "adamw": 1e-3}
UPDATES = 10_000


class PlainUpdate:
    """Whole updates of the plain model: `update(inputs, targets)` returns the loss. contestant: program and optimizer."""

    def __init__(
        self,
        options: ModelOptions,
        contestant: Mapping[str, str],
        device: torch.device,
        accumulation: int,
        weight_decay: float,
        clip: float,
    ) -> None:
        torch.manual_seed(1)
        self.model = Plain(options).to(device)
        self.model.load_state_dict(Transformer(options).state_dict())
        self.optimizers, self.experts = optimizers_of(self.model, contestant["optimizer"], weight_decay)
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(o, UPDATES, eta_min=0.1 * o.param_groups[0]["lr"])
            for o in self.optimizers
        ]
        compiled = contestant["program"] == "compile"
        self.objective = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.accumulation, self.clip = accumulation, clip
        self.on_phase: Callable[[str], None] | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets [sequences, T]."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=inputs.device)
        for x, y in zip(inputs.chunk(self.accumulation), targets.chunk(self.accumulation), strict=True):
            self._phase("forward")
            with autocast(x):
                loss = self.objective(x, y) / self.accumulation
            self._phase("backward")
            loss.backward()
            total += loss.detach()
        self._phase("optimizer")
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for stack, matrices in self.experts:
            assert stack.grad is not None
            for matrix, grad in zip(matrices, stack.grad, strict=True):
                matrix.grad = grad
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        self._phase("end")
        return total

    def _phase(self, name: str) -> None:
        if self.on_phase is not None:
            self.on_phase(name)


def optimizers_of(
    model: nn.Module, name: str, weight_decay: float
) -> tuple[list[torch.optim.Optimizer], list[tuple[nn.Parameter, list[nn.Parameter]]]]:
    """torch's own: AdamW for everything, or Muon for hidden matrices and AdamW for the rest.

    torch's Muon takes matrices only: of a stack it gets views, returned with the stack whose gradient is theirs.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        outside = any(word in parameter_name for word in ("embedding", "head", "router"))
        (others if parameter.ndim == 1 or outside else matrices).append(parameter)
    decayed = [p for p in others if p.ndim > 1 and p is not model.get_parameter("embedding.weight")]
    plain = [p for p in others if not any(p is q for q in decayed)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if name == "adamw":
        groups[0]["params"] = matrices + decayed
    rest = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=LR["adamw"], betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    if name == "adamw":
        return [rest], []
    stacks = [matrix for matrix in matrices if matrix.ndim > 2]
    experts = [(stack, [nn.Parameter(matrix) for matrix in stack.detach()]) for stack in stacks]
    matrices = [matrix for matrix in matrices if matrix.ndim == 2] + [one for _, parts in experts for one in parts]
    muon = torch.optim.Muon(matrices, lr=LR["muon"], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, rest], experts


def autocast(x: Tensor) -> torch.autocast:
    """bf16 on CUDA, fp32 elsewhere."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


@torch.no_grad()
def check_same_loss(options: ModelOptions, inputs: Tensor, targets: Tensor) -> float:
    """|plain - muonlab| in nats with the same weights and no dropout; RuntimeError if the models differ."""
    torch.manual_seed(0)
    model = Transformer(options).to(inputs.device).eval()
    peer = Plain(options).to(inputs.device).eval()
    peer.load_state_dict(model.state_dict())
    with autocast(inputs):
        theirs = peer(inputs, targets).item()
        output = model(inputs)
        stats = head_stats(output.hidden.flatten(0, 1), model.head_weight, targets.flatten())
    mine = float(((stats.lse - stats.target_logit).mean() + output.auxiliary_loss).item())
    if abs(mine - theirs) > (0.02 if inputs.is_cuda else 1e-4):
        raise RuntimeError(f"the two models differ: a loss of {mine:.6f} (muonlab) and {theirs:.6f} (plain)")
    return float(abs(mine - theirs))


class Plain(nn.Module):
    """The transformer of muonlab as one would write it in an afternoon; parameters have the same names."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(options.vocab_size, options.d_model)
        self.blocks = nn.ModuleList(PlainBlock(options) for _ in range(options.n_layers))
        self.norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.head = None if options.tied_head else nn.Linear(options.d_model, options.vocab_size, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        frequency = options.rope_base ** (-torch.arange(0, options.head_dim, 2) / options.head_dim)
        angle = torch.outer(torch.arange(options.seq_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [B, T, d]
        if self.options.embedding_scale:
            x = x * math.sqrt(self.options.d_model)
        x, auxiliary = self.dropout(x), 0.0
        for block in self.blocks:
            x, balance = block(x, self.cos, self.sin)
            auxiliary = auxiliary + balance
        x = self.dropout(self.norm(x))
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) + auxiliary


class PlainBlock(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.attention = PlainAttention(options)
        self.feed_forward_norm = nn.RMSNorm(options.d_model, eps=options.norm_eps)
        self.feed_forward = PlainExperts(options) if options.n_experts else PlainFeedForward(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | float]:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        y, balance = self.feed_forward(self.feed_forward_norm(x))
        return x + self.dropout(y), balance


class PlainAttention(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        d, kv = options.d_model, options.kv_heads * options.head_dim
        if options.fused_qkv:
            self.qkv = nn.Linear(d, d + 2 * kv, bias=options.qkv_bias)
        else:
            self.query, self.key, self.value = (nn.Linear(d, n, bias=options.qkv_bias) for n in (d, kv, kv))
        self.output = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        options, kv = self.options, self.options.kv_heads * self.options.head_dim
        if options.fused_qkv:
            parts = self.qkv(x).split([options.d_model, kv, kv], -1)
        else:
            parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (y.unflatten(-1, (-1, options.head_dim)).transpose(1, 2) for y in parts)  # [B, heads, T, D]
        if options.qk_norm:
            q, k = (F.rms_norm(y, y.shape[-1:], eps=options.norm_eps) for y in (q, k))
        y = F.scaled_dot_product_attention(
            turned(q, cos, sin),
            turned(k, cos, sin),
            v,
            is_causal=True,
            dropout_p=options.dropout if self.training else 0.0,
            enable_gqa=options.kv_heads != options.n_heads,
        )
        out: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return out


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, heads, T, D], cos and sin [T, D / 2]."""
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swiglu": F.silu,
    "gelu": F.gelu,
    "geglu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


class PlainFeedForward(nn.Module):
    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.act = ACTIVATIONS[options.activation]
        self.up = nn.Linear(options.d_model, options.d_ff, bias=False)
        self.gate = nn.Linear(options.d_model, options.d_ff, bias=False) if options.gated else None
        self.down = nn.Linear(options.d_ff, options.d_model, bias=False)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(self.dropout(hidden)), 0.0


class PlainExperts(nn.Module):
    """Tokens sorted by expert, one grouped matmul for all experts, results added back with their gates."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        e, d, f = options.n_experts, options.d_model, options.d_ff
        self.act = ACTIVATIONS[options.activation]
        self.router = nn.Linear(d, e, bias=False)
        self.experts = nn.ParameterDict({"up": torch.empty(e, f, d), "down": torch.empty(e, d, f)})
        if options.gated:
            self.experts["gate"] = torch.empty(e, f, d)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options, tokens = self.options, x.flatten(0, 1)  # [N, d]
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(tokens.float())
        if self.training and options.router_noise:
            logits = logits + options.router_noise * torch.randn_like(logits)
        top, chosen = logits.topk(options.top_k, -1)
        expert, order = chosen.flatten().sort()  # [N · k]
        ends = torch.searchsorted(expert, torch.arange(options.n_experts, device=x.device), right=True)
        load = ends.diff(prepend=ends.new_zeros(1)) / expert.numel()
        dtype = torch.bfloat16 if x.is_cuda else x.dtype

        # torch 2.13 multiplies groups in fp32 on CPU but cannot trace that
        grouped_mm = F.grouped_mm if x.is_cuda else torch.compiler.disable(F.grouped_mm)  # type: ignore[no-untyped-call]

        def grouped(rows: Tensor, weight: Tensor) -> Tensor:
            return grouped_mm(rows.to(dtype), weight.to(dtype).transpose(1, 2), offs=ends.int())

        source = order // options.top_k
        rows = tokens[source]
        up = grouped(rows, self.experts["up"])
        hidden = self.act(up) if not options.gated else self.act(grouped(rows, self.experts["gate"])) * up
        y = grouped(self.dropout(hidden), self.experts["down"])
        y = y * top.softmax(-1).flatten()[order, None].to(dtype)
        y = torch.zeros_like(tokens, dtype=dtype).index_add(0, source, y).view(x.shape)
        balance = options.n_experts * (load * logits.softmax(-1).mean(0)).sum()
        z = logits.logsumexp(-1).square().mean() if options.router_z_loss else 0.0
        return y, options.load_balancing * balance + options.router_z_loss * z
