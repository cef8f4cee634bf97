"""One update of one stack of equal shape: gather, rule, decay, apply, scatter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonlab.optim import rules
from muonlab.optim.coefficients import resolve
from muonlab.optim.scaling import scale_factor

# Large parameters are worked through in pieces of this many elements: a few of them stay in a cache.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Stack:
    """Matrices [k, m, n] of one parameter with their gradients and momentum, all sharing memory with their owners."""

    param: Tensor
    grad: Tensor
    momentum: Tensor


def flat(parts: tuple[Tensor, Tensor, Tensor]) -> list[Stack]:
    """Stacks [..., m, n] as stacks [k, m, n], without a copy."""
    if parts[0].ndim == 2:
        return [Stack(*(part.unsqueeze(0) for part in parts))]
    if parts[0].ndim == 3:
        return [Stack(*parts)]
    return [stack for inner in zip(*(part.unbind(0) for part in parts)) for stack in flat(inner)]


def chunks(stacks: list[Stack], limit: int) -> Iterable[list[Stack]]:
    """Lists of stacks with at most `limit` matrices together."""
    chunk: list[Stack] = []
    used = 0
    for stack in stacks:
        start = 0
        while start < len(stack.param):
            take = min(limit - used, len(stack.param) - start)
            chunk.append(Stack(*(part.narrow(0, start, take) for part in vars(stack).values())))
            start, used = start + take, used + take
            if used == limit:
                yield chunk
                chunk, used = [], 0
    if chunk:
        yield chunk


def matrices_at_once(group: Mapping[str, Any], bucket: list[Stack]) -> int:
    """How many matrices of this shape are worked on at once."""
    _, m, n = bucket[0].param.shape
    budget = group["max_workspace_bytes"]
    if budget is None:
        total = sum(stack.param.numel() for stack in bucket)
        budget = 1 << 22 if bucket[0].param.device.type == "cpu" else max(1 << 26, total)
    # fp32 direction and its normalised copy, half-precision iterate twice, two Gram matrices: about 16 bytes an entry.
    return max(1, int(budget // (16 * m * n)))


def update_matrices(chunk: list[Stack], group: Mapping[str, Any]) -> None:
    """Momentum, orthogonalisation, scale, decay and application for one stack of equal shape: the seam for faster kernels."""
    momentum = _gather([stack.momentum for stack in chunk])
    update = rules.muon(
        _gather([stack.grad for stack in chunk]),
        {"momentum_buffer": momentum},
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        iteration=resolve(group["coefficients"], group["ns_steps"]),
        method=group["method"],
        dtype=group["dtype"],
    )
    params = _gather([stack.param for stack in chunk])
    lr = group["lr"]
    factor = scale_factor(group["scale"], *params.shape[-2:])
    rules.apply_update_(params, update, step_size=lr * factor, shrink=lr * group["weight_decay"])
    if len(chunk) > 1:
        _scatter(momentum, [stack.momentum for stack in chunk])
        _scatter(params, [stack.param for stack in chunk])


def _gather(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _scatter(stack: Tensor, targets: list[Tensor]) -> None:
    torch._foreach_copy_(targets, list(torch.split(stack, [len(target) for target in targets])))


def update_entries(
    params: list[Tensor], states: list[dict[str, Any]], rule: rules.Rule, group: Mapping[str, Any]
) -> None:
    """One elementwise rule for parameters of one shape, stacked, or for one large parameter piece by piece."""
    hyper = rule.hyper(group)
    grads = [param.grad for param in params if param.grad is not None]
    columns = [params, grads, *([state[name] for state in states] for name in rule.state)]
    stacked = len(params) > 1
    if rule.counts:
        steps = torch.stack([state["step"] for state in states])
        hyper["step"] = steps.view(-1, *[1] * params[0].ndim) if stacked else steps[0]
    pieces = [[torch.stack(column) for column in columns]] if stacked else _pieces([column[0] for column in columns])
    lr = group["lr"]
    for param, grad, *state in pieces:
        update = rule.update(grad, dict(zip(rule.state, state)), **hyper)
        rules.apply_update_(param, update, step_size=lr, shrink=lr * group["weight_decay"])
        if stacked:
            for stack, column in zip((param, *state), (params, *columns[2:])):
                torch._foreach_copy_(column, list(stack.unbind(0)))


def _pieces(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Flat pieces that share memory with `tensors`, small enough for a cache; the tensors themselves if they lie otherwise."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [list(piece) for piece in zip(*(torch.split(tensor.view(-1), _PIECE) for tensor in tensors))]
    return [tensors]
