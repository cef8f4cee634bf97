"""The dense feed-forward and its non-linearities."""

import torch.nn.functional as F
from torch import Tensor, nn

from muonlab.models.ops import silu_dropout
from muonlab.models.options import Activation, ModelOptions


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) when gated."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.activation: Activation = options.activation
        self.up = nn.Linear(options.d_model, options.d_ff, bias=False)
        self.gate = nn.Linear(options.d_model, options.d_ff, bias=False) if options.gated else None
        self.down = nn.Linear(options.d_ff, options.d_model, bias=False)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> [..., d_model]."""
        up = self.up(x)
        if self.gate is None:
            hidden = activate_and_drop(up, self.activation, self.dropout)
        else:
            hidden = self.dropout(activate(self.gate(x), self.activation) * up)
        y: Tensor = self.down(hidden)
        return y


def activate_and_drop(x: Tensor, activation: Activation, dropout: nn.Dropout) -> Tensor:
    """dropout(activate(x))."""
    if activation == "silu" and dropout.training and 0 < dropout.p < 1:
        return silu_dropout(x, dropout.p)
    y: Tensor = dropout(activate(x, activation))
    return y


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The non-linearity; of the gate, for a gated one (Shazeer, arXiv 2002.05202; ReLU²: So et al., arXiv 2109.08668)."""
    match activation:
        case "silu" | "swiglu":
            return F.silu(x)
        case "gelu" | "geglu":
            return F.gelu(x)
        case "relu2":
            return F.relu(x).square()
