"""Which rule updates which parameter: decided from the module that owns it, never from its name or rank alone."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from muonlab.errors import InputError
from muonlab.optim.options import Override
from muonlab.optim.projections import linear_view, stack_view
from muonlab.optim.views import View, describe


@dataclass(frozen=True, kw_only=True)
class Route:
    """The decision for one parameter."""

    name: str
    param: nn.Parameter
    kind: str
    """hidden, embedding, head, router or vector."""
    view: View = ()
    """How a hidden parameter is seen as matrices."""
    reason: str
    """Why, in a few words; `unknown` where no rule knew the module."""
    lr: float | None = None
    """Its own learning rate, if an override gave one."""
    weight_decay: float | None = None
    """Its own weight decay, if an override gave one."""
    block_size: int | None = None
    """Its own tile size, if an override gave one."""


class RoutingTable:
    """Rows with name, shape, kind, rule, view, lr, weight_decay, scale of every parameter of an optimizer."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __str__(self) -> str:
        columns = ("name", "shape", "kind", "rule", "view", "lr", "weight_decay", "scale", "reason")
        lines = [columns, *(tuple(_cell(row[column]) for column in columns) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

    def __repr__(self) -> str:
        return str(self)


def route(model: nn.Module, overrides: Sequence[Override] = (), strict: bool = False) -> list[Route]:
    """One `Route` for every parameter of `model` that wants a gradient, in the order of `model.named_parameters()`.

    Precedence: override > embedding module, or a parameter tied between modules > output embeddings > router > fewer than two
    dimensions > linear layer, convolution, attention, recurrent layer, transformers' Conv1D, expert stack. What is none of these is an unknown: it is
    treated as a vector, and one warning names them all (`strict`: an InputError).
    """
    owners, parents = _owners(model), _parents(model)
    heads = _output_embeddings(model)
    routers = _routers(model)
    routes = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            kind, view, reason = _decide(param, owners[id(param)], heads, routers, parents)
            routes.append(Route(name=name, param=param, kind=kind, view=view, reason=reason))
    classes = {key: [type(module).__name__ for module, _ in modules] for key, modules in owners.items()}
    routes = with_overrides(routes, overrides, classes)
    _report_unknown([entry.name for entry in routes if entry.reason == "unknown"], strict)
    return routes


def with_overrides(
    routes: list[Route], overrides: Sequence[Override], classes: Mapping[int, list[str]] | None = None
) -> list[Route]:
    """`routes` with the overrides that match them; InputError for one that matches none.

    `classes`: id of a parameter -> class names of the modules that hold it; unknown for parameters without a module.
    """
    for override in overrides:
        matches = [
            fnmatchcase(entry.name, override.name)
            and (
                override.module == "*"
                or any(fnmatchcase(c, override.module) for c in (classes or {}).get(id(entry.param), []))
            )
            for entry in routes
        ]
        if not any(matches):
            raise InputError(
                f"the override for name {override.name!r}, module {override.module!r} matches no parameter"
            )
        routes = [overridden(entry, override) if hit else entry for entry, hit in zip(routes, matches)]
    return routes


def overridden(entry: Route, override: Override) -> Route:
    """`entry` with what `override` sets."""
    view = entry.view
    if override.split is not None:  # in place of the split that routing found
        view = tuple(operation for operation in view if operation[0] not in ("split", "interleaved"))
        if override.split:
            view = (*view, ("split", override.axis, tuple(override.split)))
    if override.head_dim is not None:
        view = (*view, ("heads", override.axis, override.head_dim))
    view = (*view, *override.view)
    kind = override.kind or entry.kind
    if kind == "hidden" and entry.param.ndim < 2:
        raise InputError(
            f"override {override.name!r}: {entry.name!r} has shape {tuple(entry.param.shape)}, not a matrix"
        )
    own = {name: getattr(override, name) for name in ("lr", "weight_decay", "block_size")}
    own = {name: value for name, value in own.items() if value is not None}
    reason = "override" if override.kind is not None else entry.reason
    return replace(entry, kind=kind, view=view, reason=reason, **own)


def _report_unknown(names: list[str], strict: bool) -> None:
    if not names:
        return
    listed = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    message = f"no routing rule knows the module of {listed} ({len(names)} parameters)"
    if strict:
        raise InputError(f"{message}; give an override with a kind")
    warnings.warn(f"{message}: updated like vectors; an override with a kind says otherwise", stacklevel=4)


Owner = tuple[nn.Module, str]


def _decide(
    param: Tensor, owners: list[Owner], heads: set[int], routers: set[int], parents: Mapping[int, Owner]
) -> tuple[str, View, str]:
    module, local = owners[0]
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner, _ in owners):
        return "embedding", (), "embedding" if len(owners) == 1 else "embedding, tied"
    if len(owners) > 1 and param.ndim > 1:
        return "embedding", (), "tied"
    if id(param) in heads:
        return ("head" if param.ndim > 1 else "vector"), (), "output embeddings"
    if id(param) in routers:
        return "router", (), "router"
    if param.ndim < 2:
        return "vector", (), "fewer than two dimensions"
    parent, name = parents.get(id(module), (None, ""))
    if isinstance(module, nn.Linear) and local == "weight":
        return "hidden", linear_view(module, parent, name, module.out_features), "linear"
    if isinstance(module, nn.modules.conv._ConvNd) and local == "weight":
        operation = "conv_transpose" if module.transposed else "conv"
        return "hidden", ((operation, module.groups),), "convolution"
    if isinstance(module, nn.MultiheadAttention) and local.endswith("proj_weight"):
        width = module.embed_dim
        return "hidden", (("split", 0, (width,) * 3),) if local == "in_proj_weight" else (), "attention projection"
    if isinstance(module, nn.RNNBase) and local.startswith("weight"):
        gates = param.shape[0] // module.hidden_size
        return "hidden", (("split", 0, (module.hidden_size,) * gates),) if gates > 1 else (), "recurrent"
    if _is_transposed_linear(module) and local == "weight":
        return "hidden", (("transpose",), *linear_view(module, parent, name, param.shape[1])), "linear, transposed"
    if _expert_stack(module) is not None and param.shape[0] == _expert_count(module):
        if param.ndim == 2:
            return "vector", (), "expert biases"
        return "hidden", stack_view(module, local), "expert stack"
    if "." in local:
        return "vector", (), "parametrization"
    return "vector", (), "unknown"


def _owners(model: nn.Module) -> dict[int, list[Owner]]:
    """id of a parameter -> the distinct modules that hold it, with its name there.

    Under torch's parametrizations (weight norm, spectral norm) the largest of the originals stands for the weight itself.
    """
    owners: dict[int, list[Owner]] = {}
    parents = _parents(model)
    for module in model.modules():
        own = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for local, param in own:
            owner = (module, local)
            if isinstance(module, ParametrizationList):
                parametrized, weight = parents[id(module)]
                largest = param.numel() == max(other.numel() for _, other in own)
                owner = (parents[id(parametrized)][0], weight if largest else f"{weight}.{local}")
            owners.setdefault(id(param), []).append(owner)
    return owners


def _parents(model: nn.Module) -> dict[int, Owner]:
    """id of a module -> the module that holds it, with its name there."""
    return {id(child): (module, name) for module in model.modules() for name, child in module.named_children()}


def _output_embeddings(model: nn.Module) -> set[int]:
    """ids of the parameters of output heads.

    What the model names as such; else, for a transformers model around a base model, the linear layers beside that; else the
    last linear layer with as many outputs as the largest embedding has rows.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if isinstance(head, nn.Module):
        return {id(param) for param in head.parameters()}
    if isinstance(head, Tensor):
        return {id(head)}
    base = getattr(model, "base_model", model)
    if base is not model:
        beside = [child for child in model.children() if isinstance(child, nn.Linear)]
        return {id(param) for child in beside for param in child.parameters()}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        return set()
    vocabulary = max(embeddings, key=lambda module: module.num_embeddings)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    onto = [module for module in linear if module.out_features == vocabulary.num_embeddings]
    return {id(param) for param in onto[-1].parameters()} if onto else set()


def _routers(model: nn.Module) -> set[int]:
    """ids of the matrices that choose experts: marked so, or with as many outputs as there are experts beside them."""
    routers = set()
    for parent in model.modules():
        children = list(parent.children())
        counts = {count for child in children if (count := _expert_count(child))}
        for child in children:
            marked = getattr(child, "is_router", False)
            for param in child.parameters(recurse=False):
                if marked or (param.ndim == 2 and _is_projection(child) and param.shape[0] in counts):
                    routers.add(id(param))
    return routers


def _is_projection(module: nn.Module) -> bool:
    """A linear layer, or a bare holder of one matrix that acts as such (the routers of transformers)."""
    return isinstance(module, nn.Linear) or (not list(module.children()) and _expert_stack(module) is None)


def _expert_count(module: nn.Module) -> int:
    """Number of experts of an expert stack or of a list of alike modules; 0 for anything else."""
    stack = _expert_stack(module)
    if stack is not None:
        return int(stack.shape[0])
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(child) for child in module}) == 1:
        return len(module)
    return 0


def _expert_stack(module: nn.Module) -> nn.Parameter | None:
    """A 3-D parameter of a module that says it holds experts."""
    marked = getattr(module, "is_expert_stack", False)
    count = getattr(module, "num_experts", None)
    for param in module.parameters(recurse=False):
        if param.ndim == 3 and (marked or param.shape[0] == count):
            return param
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """transformers' Conv1D, whose weight is [in, out]; recognised without importing transformers."""
    return any(cls.__name__ == "Conv1D" and "transformers" in cls.__module__ for cls in type(module).__mro__)


def table_of(optimizer: torch.optim.Optimizer) -> RoutingTable:
    """The routing table of an optimizer whose groups were made by this package."""
    return RoutingTable([row for group in optimizer.param_groups for row in _rows(group)])


def _rows(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for i, param in enumerate(group["params"]):
        yield {
            "name": group["param_names"][i] if "param_names" in group else f"parameter {i}",
            "shape": list(param.shape),
            "kind": group.get("kind"),
            "rule": group.get("rule"),
            "view": describe(group.get("view", ())) if group.get("rule") == "muon" else None,
            "lr": float(group["lr"]),
            "weight_decay": float(group.get("weight_decay", 0.0)),
            "scale": group.get("scale"),
            "reason": group["reasons"][i] if "reasons" in group else None,
        }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " x ".join(str(size) for size in value) or "scalar"
    return f"{value:g}" if isinstance(value, float) else str(value)
