"""Every optimizer that `bench step` steps: ours, torch's, and other implementations of Muon where they can be imported."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muonlab import Muon
from muonlab.errors import unknown
from muonlab.optim import kernels
from muonlab.optim.coefficients import resolve
from muonlab.optim.options import MuonOptions

Params = Sequence[nn.Parameter]
Make = Callable[[Params], Any]
"""Matrices with gradients -> an optimizer, or for what is none an object with `step` alone."""


class NotInstalled(Exception):
    """A peer that cannot be imported; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One contestant, called as its documents show it."""

    name: str
    rule: str
    """muon, adamw, or iteration (the orthogonalisation alone: neither momentum nor application)."""
    call: str
    """What is called, in words that can be pasted."""
    make: Make


def program_of(optimizer: Any) -> str:
    """What really runs in a step: for ours the CUDA graph or why not, else how it is shipped."""
    if not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.split(".")[0] != "muonlab":
        return "as shipped"
    plans = kernels._plans.get(optimizer)
    if plans is None:
        return "torch"
    return "graph" if plans.refused is None else f"torch ({plans.refused})"


def graph_of(optimizer: Any) -> Callable[[], object] | None:
    """Replays our captured step alone, without the host's part; None where there is none."""
    plans = kernels._plans.get(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None
    graph = None if plans is None or plans.current is None else plans.current._graph
    return None if graph is None else graph.replay


def find(name: str) -> Peer:
    """A peer by name; InputError names the nearest."""
    if name not in PEERS:
        raise unknown("peer", name, PEERS)
    return PEERS[name]


def _imported(module: str, attribute: str, install: str) -> Any:
    """`attribute` of `module`; NotInstalled where there is no such thing (other packages may have the module's name)."""
    top = module.split(".")[0]
    try:
        missing = importlib.util.find_spec(top) is None
        found = None if missing else getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise NotInstalled(f"{top} cannot be imported ({str(error).splitlines()[0]}); {install}") from None
    if found is None:
        raise NotInstalled(f"{top} is not installed; {install}")
    return found


def _dion(**options: Any) -> Make:
    def make(params: Params) -> Any:
        cls = _imported("dion", "Muon", "pip install git+https://github.com/microsoft/dion")
        return cls(list(params), lr=0.01, weight_decay=0.1, nesterov=True, adjust_lr="rms_norm", **options)

    return make


def _gram(params: Params) -> Any:
    cls = _imported("gram_newton_schulz", "Muon", "pip install gram-newton-schulz --no-build-isolation")
    return cls(list(params), lr=0.01, weight_decay=0.1)


def _emerging(params: Params) -> Any:
    module = "emerging_optimizers.orthogonalized_optimizers"
    cls = _imported(module, "Muon", "pip install emerging-optimizers")
    return cls(list(params), lr=0.01, weight_decay=0.1, nesterov=True, coefficient_type="polar_express")


def _keller(params: Params) -> Any:
    cls = _imported("muon", "SingleDeviceMuon", "pip install git+https://github.com/KellerJordan/Muon")
    return cls(list(params), lr=0.01, weight_decay=0.1)


def _nanochat(params: Params) -> Any:
    cls = _imported(
        "nanochat.optim", "MuonAdamW", "put a checkout of https://github.com/karpathy/nanochat on PYTHONPATH"
    )
    options = {"kind": "muon", "lr": 0.01, "momentum": 0.95, "ns_steps": 5, "beta2": 0.95, "weight_decay": 0.1}
    shapes = dict.fromkeys(param.shape for param in params)
    return cls([{"params": [param for param in params if param.shape == shape], **options} for shape in shapes])


class Iteration:
    """The five products alone, batched by shape: what a library of matrix products gives."""

    def __init__(self, params: Params) -> None:
        shapes: dict[tuple[int, int], int] = {}
        for param in params:
            shape = (min(param.shape), max(param.shape))
            shapes[shape] = shapes.get(shape, 0) + 1
        device = params[0].device
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.stacks = [1e-3 * torch.randn(n, *shape, device=device).to(dtype) for shape, n in shapes.items()]

    def step(self) -> None:
        for stack in self.stacks:
            x = stack
            for a, b, c in resolve("polar_express").steps:
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)


class CompiledStack:
    """What a careful user writes: matrices of one shape stacked, one compiled function for the update, copied back."""

    def __init__(self, params: Params) -> None:
        shapes = dict.fromkeys(param.shape for param in params)
        self.groups = [[param for param in params if param.shape == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.update = torch.compile(_stacked_update, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            values = torch.stack(list(group))
            self.update(torch.stack([param.grad for param in group if param.grad is not None]), values, buffer)
            torch._foreach_copy_(list[Tensor](group), list(values.unbind(0)))


def _stacked_update(grads: Tensor, values: Tensor, buffer: Tensor) -> None:
    buffer.lerp_(grads, 0.05)
    direction = grads.lerp(buffer, 0.95)
    tall = direction.shape[-2] > direction.shape[-1]
    x = direction.mT if tall else direction
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).to(torch.float16 if x.is_cuda else torch.float32)
    for a, b, c in resolve("polar_express").steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    values.mul_(1 - 0.001).sub_((x.mT if tall else x) * 0.01)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="muonlab",
            rule="muon",
            call="muonlab.Muon(params, lr=0.01, weight_decay=0.1)",
            make=lambda params: Muon(list(params), lr=0.01, weight_decay=0.1),
        ),
        Peer(
            name="muonlab-model",  # with the coefficients that Muon(model) takes
            rule="muon",
            call=f"muonlab.Muon(params, lr=0.01, weight_decay=0.1, coefficients={MuonOptions.coefficients!r})",
            make=lambda params: Muon(list(params), lr=0.01, weight_decay=0.1, coefficients=MuonOptions.coefficients),
        ),
        Peer(
            name="torch-muon",
            rule="muon",
            call="torch.optim.Muon(params, lr=0.01, weight_decay=0.1)",
            make=lambda params: torch.optim.Muon(list(params), lr=0.01, weight_decay=0.1),
        ),
        Peer(
            name="torch-adamw",
            rule="adamw",
            call="torch.optim.AdamW(params, lr=0.001, weight_decay=0.1, fused=True)",
            make=lambda params: torch.optim.AdamW(list(params), lr=0.001, weight_decay=0.1, fused=True),
        ),
        Peer(
            name="dion",
            rule="muon",
            call="dion.Muon(params, lr=0.01, weight_decay=0.1, nesterov=True, adjust_lr='rms_norm')",
            make=_dion(),
        ),
        Peer(
            name="dion-triton",
            rule="muon",
            call="dion.Muon(params, lr=0.01, weight_decay=0.1, nesterov=True, adjust_lr='rms_norm', use_triton=True)",
            make=_dion(use_triton=True),
        ),
        Peer(
            name="gram-newton-schulz",
            rule="muon",
            call="gram_newton_schulz.Muon(params, lr=0.01, weight_decay=0.1)",
            make=_gram,
        ),
        Peer(
            name="emerging",
            rule="muon",
            call="emerging_optimizers.orthogonalized_optimizers.Muon(params, lr=0.01, weight_decay=0.1, nesterov=True, "
            "coefficient_type='polar_express')",
            make=_emerging,
        ),
        Peer(
            name="keller",
            rule="muon",
            call="muon.SingleDeviceMuon(params, lr=0.01, weight_decay=0.1)",
            make=_keller,
        ),
        Peer(
            name="nanochat",
            rule="muon",
            call="nanochat.optim.MuonAdamW(one group of kind muon for each shape, lr=0.01, weight_decay=0.1)",
            make=_nanochat,
        ),
        Peer(
            name="compiled-stack",
            rule="muon",
            call="torch.stack, one function through torch.compile, copied back",
            make=CompiledStack,
        ),
        Peer(
            name="iteration",
            rule="iteration",
            call="torch.baddbmm on stacks of one shape, the products of the iteration alone",
            make=Iteration,
        ),
    )
}
