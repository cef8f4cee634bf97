"""One update of one stack of equal shape: gather, rule, decay, apply, scatter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonlab.optim import rules, variants
from muonlab.optim.coefficients import resolve
from muonlab.optim.polar import CPU_LOOP_ELEMENTS, polar
from muonlab.optim.scaling import scale_factor
from muonlab.optim.variants import variant_of
from muonlab.optim.views import matrices

# Large parameters are worked through in pieces of so many elements: a few of them stay in a CPU's cache; elsewhere they only bound
# the temporary memory.
_PIECE_CPU, _PIECE = 1 << 18, 1 << 26
_RULE_OPTIONS = ("momentum", "nesterov", "heavy_ball", "method", "dtype", "norm_eps")


@dataclass(frozen=True)
class Stack:
    """Matrices [k, m, n] of one parameter with their gradients and state, all sharing memory with their owners."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    """momentum_buffer [k, m, n], and what the options need: tensors like it, or smaller ones with its axes."""

    def narrow(self, start: int, length: int) -> "Stack":
        """Matrices `start` to `start + length`."""
        state = {name: value.narrow(0, start, length) for name, value in self.state.items()}
        return Stack(self.param.narrow(0, start, length), self.grad.narrow(0, start, length), state)


def flat(parts: Mapping[str, list[Tensor]]) -> list[Stack]:
    """Stacks [k, m, n], without a copy, of `parts`: name -> the stacks [..., m, n] of parameter, gradient and state tensors."""
    stacks = []
    for together in zip(*parts.values()):
        lead = together[0].ndim - 2
        if lead == 0:
            together = tuple(part[None] for part in together)
        if lead > 1:
            slices = {name: list(part.unbind(0)) for name, part in zip(parts, together)}
            stacks += flat(slices)
            continue
        state = dict(zip(parts, together))
        stacks.append(Stack(state.pop("param"), state.pop("grad"), state))
    return stacks


def tiled(stack: Stack, size: int) -> list[Stack]:
    """The tiles of all matrices of a stack; every tile of a matrix sees that matrix's `idle`."""
    idle = {"idle": stack.state["idle"].expand_as(stack.param)} if "idle" in stack.state else {}
    whole = {"param": stack.param, "grad": stack.grad, **stack.state, **idle}
    tiles = flat({name: matrices(tensor, (("tiles", size),)) for name, tensor in whole.items()})
    for tile in tiles:
        if idle:
            tile.state["idle"] = tile.state["idle"][..., :1, :1]
    return tiles


def chunks(stacks: list[Stack], limit: int) -> Iterator[list[Stack]]:
    """Lists of stacks with at most `limit` matrices together."""
    chunk: list[Stack] = []
    used = 0
    for stack in stacks:
        start = 0
        while start < len(stack.param):
            take = min(limit - used, len(stack.param) - start)
            chunk.append(stack.narrow(start, take))
            start, used = start + take, used + take
            if used == limit:
                yield chunk
                chunk, used = [], 0
    if chunk:
        yield chunk


def matrices_at_once(bucket: list[Stack], max_workspace_bytes: int | None) -> int:
    """How many matrices of this shape are worked on at once."""
    param = bucket[0].param
    # fp32 direction, two half-precision iterates, two Gram matrices and the stacked copies: about 16 bytes an entry.
    bytes_each = 16 * param.shape[-2] * param.shape[-1]
    budget = max_workspace_bytes
    if budget is None and param.device.type == "cpu":
        # A CPU multiplies large matrices one by one and should do so without copying them into a stack.
        return 1 if param.shape[-2] * param.shape[-1] >= CPU_LOOP_ELEMENTS else max(1, (1 << 20) // bytes_each)
    if budget is None:
        # A quarter of the fp32 bytes of the matrices, but enough to fill a device.
        budget = max(1 << 26, sum(stack.param.numel() for stack in bucket))
    return max(1, budget // bytes_each)


def update_matrices(
    chunk: list[Stack], group: Mapping[str, Any], lr: float | Tensor, keep: Tensor | None = None
) -> None:
    """Momentum, orthogonalisation, scale, decay and application for one stack of equal shape: the seam for faster kernels.

    `lr` is the group's, or its `block_lr`. `keep`, a boolean on the device: False leaves parameters and state as they were.
    """
    params = _gather([stack.param for stack in chunk])
    grads = _gather([stack.grad for stack in chunk])
    state = {name: _gather([stack.state[name] for stack in chunk]) for name in chunk[0].state}

    hyper = {name: group[name] for name in _RULE_OPTIONS}
    hyper["iteration"] = iteration = resolve(group["coefficients"], group["ns_steps"])
    variant = variant_of(group)
    factor = 1.0 if group.get("fixed_norm") else scale_factor(group["scale"], *params.shape[-2:])
    step_size, shrink = lr * factor, decay_of(group, lr) * (factor if group["scaled_decay"] else 1.0)
    active = _active(grads) if group["idle"] == "skip" else None
    if active is not None:
        step_size, shrink = step_size * active, shrink * active
        if variant.rests_at_weight_zero and not {"momentum_scale", "fixed_norm", "stiefel"} & {*state, *group}:
            # Weight 0 in every average, step 0, decay 0: exactly nothing happens to an idle matrix, without a copy.
            hyper["momentum"] = 1 - active * (1 - hyper["momentum"])
            if variant.normuon_beta is not None:
                variant = variant._replace(normuon_beta=1 - active * (1 - variant.normuon_beta))
        else:
            keep = active > 0 if keep is None else keep & (active > 0)
    elif group["idle"] == "fade":
        step_size = step_size * hyper["momentum"] ** state.pop("idle")

    before = [value.clone() for value in (params, *state.values())] if keep is not None else []
    if group.get("decay_form") == "l2":
        grads = variants.widened(grads) + params * group["weight_decay"]
    update = rules.muon(grads, state, variant=variant, **hyper)
    if group.get("fixed_norm"):
        norm = variants.frobenius(variants.widened(params))
        update = variants.with_norm(update.to(norm.dtype), norm)
    rules.apply_update_(params, update, step_size=step_size, shrink=shrink, cautious=group["cautious_decay"])
    if group.get("fixed_norm"):
        params.copy_(variants.with_norm(variants.widened(params), norm))
    if group.get("stiefel"):
        params.copy_(polar(params, iteration, group["method"], group["dtype"]))

    for value, old in zip((params, *state.values()), before):
        value.copy_(torch.where(keep, value, old))  # type: ignore[arg-type]  # `before` is empty without `keep`
    if len(chunk) > 1:
        _scatter(params, [stack.param for stack in chunk])
        for name, value in state.items():
            _scatter(value, [stack.state[name] for stack in chunk])


def decay_of(group: Mapping[str, Any], lr: float | Tensor) -> float | Tensor:
    """The share of every parameter that one update takes away (see `OptimizerOptions.decay_form`)."""
    decay: float | Tensor = group["weight_decay"]
    match group.get("decay_form"):
        case "independent":
            return decay
        case "lr_squared":
            return lr * lr * decay
        case "l2":
            return 0.0
    return lr * decay


def _active(grads: Tensor) -> Tensor | None:
    """1 for matrices with any gradient, 0 for idle ones, [k, 1, 1]; None if a CPU can tell that none is idle."""
    active = grads.any(-1).any(-1)
    if grads.device.type == "cpu" and not torch.compiler.is_compiling() and bool(active.all()):
        return None
    return active.to(torch.float64 if grads.dtype == torch.float64 else torch.float32)[:, None, None]


def _gather(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _scatter(stack: Tensor, targets: list[Tensor]) -> None:
    torch._foreach_copy_(targets, list(torch.split(stack, [len(target) for target in targets])))


def update_entries(
    params: list[Tensor],
    states: list[dict[str, Any]],
    rule: rules.Rule,
    group: Mapping[str, Any],
    keep: Tensor | None = None,
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
        before = [value.clone() for value in (param, *state)] if keep is not None else []
        if group.get("decay_form") == "l2":
            grad = variants.widened(grad) + param * group["weight_decay"]
        update = rule.update(grad, dict(zip(rule.state, state)), **hyper)
        rules.apply_update_(param, update, step_size=lr, shrink=decay_of(group, lr), cautious=group["cautious_decay"])
        for value, old in zip((param, *state), before):
            value.copy_(torch.where(keep, value, old))  # type: ignore[arg-type]  # `before` is empty without `keep`
        if stacked:
            for stack, column in zip((param, *state), (params, *columns[2:])):
                torch._foreach_copy_(column, list(stack.unbind(0)))


def fits_torchs_adamw(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether torch's fused CPU kernel computes this update: one pass over memory where the rule makes about eight."""
    if group["rule"] != "adamw" or group["cautious_decay"] or "decay_form" in group or param.device.type != "cpu":
        return False
    if isinstance(group["lr"], Tensor) or torch.compiler.is_compiling():
        return False
    same = param.grad is not None and param.grad.dtype == param.dtype in (torch.float32, torch.float64)
    own = (param, state["exp_avg"], state["exp_avg_sq"])
    return same and all(tensor.dtype == param.dtype and tensor.is_contiguous() for tensor in own)


def update_by_torchs_adamw(params: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any]) -> None:
    """AdamW for parameters that `fits_torchs_adamw`; it counts the update in their state."""
    adamw(
        params,
        [param.grad.contiguous() for param in params if param.grad is not None],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _pieces(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Flat pieces that share memory with `tensors`, small enough for a cache; the tensors themselves if they lie otherwise."""
    if all(tensor.is_contiguous() for tensor in tensors):
        size = _PIECE_CPU if tensors[0].device.type == "cpu" else _PIECE
        return [list(piece) for piece in zip(*(torch.split(tensor.view(-1), size) for tensor in tensors))]
    return [tensors]
