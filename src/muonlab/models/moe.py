"""A mixture of experts: each token visits its top-k experts; no loop over experts, no shape that depends on data.

The assignments are sorted by expert once; the experts are grouped matmuls over the sorted rows. How fast that is beside a plain
PyTorch loop: `muonlab bench train --models micro-moe`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from muonlab.models.feed_forward import activate, activate_and_drop
from muonlab.models.ops import at_least_fp32, gather_rows, grouped_linear, without_autocast
from muonlab.models.options import ModelOptions


class Routing(NamedTuple):
    """Which experts a batch of tokens visits, and what that costs."""

    gates: Tensor  # [N, top_k], sum to 1 over the experts a token visits
    experts: Tensor  # [N, top_k] int64
    load: Tensor  # [n_experts], share of the N · top_k assignments, sums to 1
    load_balancing: Tensor  # scalar, see `load_balancing_loss`
    z_loss: Tensor  # scalar, see `router_z_loss`


class MixtureOfExperts(nn.Module):
    """Σ over a token's top-k experts of gate · expert(x); the gates are the softmax of its top-k router logits."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.router = Router(options.d_model, options.n_experts, bias=False)
        self.experts = ExpertStack(options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., d] -> y [..., d], the weighted auxiliary loss (scalar), the experts' load [n_experts]."""
        tokens = x.flatten(0, -2)  # [N, d]
        routing = self.route(tokens)
        assignments = routing.experts.flatten()  # [N · k]
        # a radix sort makes one pass for each byte of its keys
        order = assignments.to(torch.uint8 if self.options.n_experts <= 256 else torch.int16).argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        ends = _counts(assignments, self.options.n_experts).cumsum(0, dtype=torch.int32)

        y = self.experts(gather_rows(tokens, order, inverse, self.options.top_k), ends)  # [N · k, d], sorted by expert
        y = gather_rows(y, inverse, order).view(*routing.gates.shape, -1)  # [N, k, d]
        y = (y * routing.gates[..., None].to(y.dtype)).sum(1)
        auxiliary = self.options.load_balancing * routing.load_balancing + self.options.router_z_loss * routing.z_loss
        return y.view(x.shape), auxiliary, routing.load

    def route(self, tokens: Tensor) -> Routing:
        """Choose experts for tokens [N, d], in fp32 at least; in training the logits carry Gaussian noise if asked."""
        with without_autocast(tokens):
            logits = self.router(at_least_fp32(tokens))  # [N, n_experts]
        if self.training and self.options.router_noise:
            logits = logits + self.options.router_noise * torch.randn_like(logits)
        top, experts = largest(logits, self.options.top_k)
        load = _counts(experts.flatten(), self.options.n_experts).to(logits.dtype) / experts.numel()
        return Routing(top.softmax(-1), experts, load, load_balancing_loss(logits, load), router_z_loss(logits))


class Router(nn.Linear):
    """One logit per expert. The marker lets optimizers treat it apart from hidden matrices."""

    is_router = True


class ExpertStack(nn.Module):
    """The feed-forwards of all experts as stacks of matrices [n_experts, out, in], applied as x @ W[e].T.

    The marker tells optimizers that the 3-D parameters are stacks of independent matrices.
    """

    is_expert_stack = True

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        e, d, f = options.n_experts, options.d_model, options.d_ff
        self.activation = options.activation
        self.up = nn.Parameter(torch.empty(e, f, d))
        self.gate = nn.Parameter(torch.empty(e, f, d)) if options.gated else None
        self.down = nn.Parameter(torch.empty(e, d, f))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [n, d], rows sorted by expert; expert e's rows end before ends[e] (int32)."""
        up = grouped_linear(x, self.up, ends)
        if self.gate is None:
            hidden = activate_and_drop(up, self.activation, self.dropout)
        else:
            hidden = self.dropout(activate(grouped_linear(x, self.gate, ends), self.activation) * up)
        return grouped_linear(hidden, self.down, ends)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row of x [N, E] in descending order, and where they are [N, count]. x: finite.

    Maxima one after another, which a compiler fuses into what surrounds them; torch.topk on a GPU sorts in two kernels.
    """
    if not x.is_cuda and not torch.compiler.is_compiling():
        return x.topk(count, dim=-1)
    rest, where = x.detach(), []
    for _ in range(count):
        where.append(rest.argmax(-1, keepdim=True))
        rest = rest.scatter(-1, where[-1], -torch.inf)
    experts = torch.cat(where, -1)
    # Not a gather, whose backward pass scatters: torch 2.13 compiles that, beside other losses of x, to a gradient of nearly zero.
    chosen = experts[..., None] == torch.arange(x.shape[-1], device=x.device)  # [N, count, E]
    return (x[:, None, :] * chosen).sum(-1), experts


def load_balancing_loss(logits: Tensor, load: Tensor) -> Tensor:
    """n_experts · Σ_e load_e · mean probability_e: 1 at even load, n_experts when one expert takes all.

    Switch Transformers (arXiv 2101.03961, eq. 4), with the load counted over all top-k assignments so that it sums to
    1 for every k. The gradient flows through the probabilities alone. logits: [N, n_experts]; load: [n_experts].
    """
    return logits.shape[-1] * (load * logits.softmax(-1).mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """mean over tokens of log-sum-exp(logits)² (ST-MoE, arXiv 2202.08906, eq. 5). logits: [N, n_experts]."""
    return logits.logsumexp(-1).square().mean()


def _counts(experts: Tensor, n_experts: int) -> Tensor:
    # bincount would ask the device for its largest entry
    return (experts[:, None] == torch.arange(n_experts, device=experts.device)).sum(0)
