"""The optimizer: torch's interface around the rules, with every parameter on the rule that its route says.

A step walks the parameter groups. Matrices of one shape, whatever parameter, expert, head or tile they come from, are
updated together as one stack by `step.update_matrices`; entries of all other parameters by `step.update_entries`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from muonlab.errors import InputError
from muonlab.optim import kernels, rules
from muonlab.optim.groups import plan
from muonlab.optim.options import OptimizerOptions
from muonlab.optim.qk_clip import MeteredAttention, clip_attention_, metered
from muonlab.optim.routing import RoutingTable, table_of
from muonlab.optim.step import (
    Stack,
    chunks,
    fits_torchs_adamw,
    flat,
    matrices_at_once,
    tiled,
    update_by_torchs_adamw,
    update_entries,
    update_matrices,
)
from muonlab.optim.variants import variant_of
from muonlab.optim.views import matrices

# Parameters up to so many elements are stacked with others of their shape; a CPU gains less from that.
_SMALL_CPU, _SMALL = 1 << 11, 1 << 16
_STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


class HybridOptimizer(torch.optim.Optimizer):
    """Parameter groups with a `rule` each: "muon", or a name of `rules.ELEMENTWISE`.

    All options live in `param_groups` as plain values (or live tensors), so schedulers and checkpoints see them.

    Args:
        params: a module (routed by `routing.route`), or parameters, named parameters or groups of them.
        options: the optimizer's options; a group may override any of its fields.
        hidden_rule, rule: the rules of hidden matrices and of everything else.
        lr: a live tensor to use in place of `options.lr`; fill it to change the learning rate.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        options: OptimizerOptions,
        hidden_rule: str,
        rule: str,
        lr: Tensor | None = None,
    ) -> None:
        self._options, self._rules = options, (hidden_rule, rule)
        groups = plan(params, options, hidden_rule, rule, lr)
        super().__init__(groups, {"lr": options.lr if lr is None else lr, "weight_decay": options.weight_decay})
        self._attention: list[MeteredAttention] = []
        self._qk_clip: float | None = getattr(options, "qk_clip", None)
        if self._qk_clip is not None:
            if not isinstance(params, nn.Module):
                raise InputError("qk_clip has to find the attention: give the optimizer the model, not its parameters")
            self._attention = metered(params)

    def routing(self) -> RoutingTable:
        """Which rule updates which parameter, with what learning rate, decay and scale: `.rows`, or print it."""
        return table_of(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters later, as torch does: matrices and vectors of one group may become several groups.

        Overrides are for the parameters that the optimizer was made with."""
        if "rule" in param_group:
            super().add_param_group(param_group)
            return
        groups = plan([param_group], replace(self._options, overrides=()), *self._rules)
        known = {id(param) for param in self._params()}
        for name, param in (pair for group in groups for pair in group["params"]):
            if id(param) in known:
                raise InputError(f"{name} {list(param.shape)} of the added group belongs to the optimizer already")
        for group in groups:
            super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients in place; parameters without a gradient are left alone.

        Raises InputError, before anything is changed, for a sparse gradient, and for a gradient or state that a parameter has
        outgrown: torch would read and write past the end of it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        keep = None if kernels.replay(self) else self._step()
        if self._qk_clip is not None:
            clip_attention_(self._attention, self._qk_clip, keep)
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps `step` in: its hooks and a profiler's range, entered only where there are hooks or a profiler that
        Python knows of. With cold caches an empty range takes 0.06 ms, while the device waits."""
        wrapped: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: HybridOptimizer, *args: Any, **kwargs: Any) -> Any:
            return (wrapped if _watched(self) else func)(self, *args, **kwargs)

        return step

    @torch.no_grad()
    def _step(self) -> Tensor | None:
        """The update where no plan for all of it holds; what says whether it counts, a boolean on the device, if asked for."""
        groups = self.param_groups
        work = [(group, [param for param in group["params"] if param.grad is not None]) for group in groups]
        self._refuse_unfit(work)
        keep = _all_finite(work) if any(group["skip_nonfinite"] for group in groups) else None
        for group, params in kernels.step(self, work, self._state, keep):
            if params and group["rule"] == "muon":
                self._step_matrices(group, params, keep)
            elif params:
                self._step_entries(group, params, keep)
        return keep

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()` exactly: state keeps its own dtype (torch would cast it to that of the parameter), a live
        tensor of a group stays the same tensor and takes the saved value.

        Raises InputError, before anything is changed, for the state of another model.
        """
        self._refuse_foreign(state_dict)
        before = list(self.param_groups)
        super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before):
            for name, value in old.items():
                if name not in group:
                    group[name] = value  # saved by a version that did not have this option
                elif isinstance(value, Tensor):
                    value.copy_(group[name]) if isinstance(group[name], Tensor) else value.fill_(group[name])
                    group[name] = value
        for index, param in zip(_saved_indices(state_dict), self._params()):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(device=param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only its own three attributes when an optimizer is pickled or deep-copied.
        own = ("_options", "_rules", "_attention", "_qk_clip")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _refuse_unfit(self, work: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        for group, params in work:
            names = _state_names(group)
            for param in params:
                grad, shape, state = param.grad, param.shape, self.state.get(param, {})
                if grad is not None and grad.layout != torch.strided:
                    raise InputError(
                        f"the gradient of {_name(group, param)} is sparse; build its module with sparse=False"
                    )
                if grad is not None and grad.shape != shape:
                    shapes = f"shape {tuple(grad.shape)}, the parameter {tuple(shape)}"
                    raise InputError(f"the gradient of {_name(group, param)} has {shapes}: compute it anew")
                for name in names:
                    if name in state and state[name].shape != shape:
                        shapes = f"shape {tuple(state[name].shape)}, the parameter {tuple(shape)}"
                        advice = "delete its state, optimizer.state.pop(parameter), or load the state that matches"
                        raise InputError(f"{name} of {_name(group, param)} has {shapes}: {advice}")

    def _refuse_foreign(self, state_dict: dict[str, Any]) -> None:
        saved, here = state_dict["param_groups"], self.param_groups
        names = [name for group in saved for name in group.get("param_names", ())]
        own = [name for group in here for name in group.get("param_names", ())]
        for theirs, ours in zip(names, own):
            if theirs != ours:
                raise InputError(f"the state is of another model: it has {theirs!r} where this optimizer has {ours!r}")
        sizes, lengths = [len(group["params"]) for group in saved], [len(group["params"]) for group in here]
        if sizes != lengths:
            raise InputError(f"the state is of another model: groups of {sizes} parameters, here {lengths}")
        for index, param, i in zip(_saved_indices(state_dict), self._params(), range(len(self._params()))):
            state = state_dict["state"].get(index, {})
            value = state.get("momentum_buffer", state.get("exp_avg", param))
            if value.shape != param.shape:
                name = own[i] if own else f"parameter {i}"
                shapes = f"{tuple(value.shape)} where this optimizer has {tuple(param.shape)}"
                raise InputError(f"the state is of another model: {name} has shape {shapes}")

    def _step_matrices(self, group: dict[str, Any], params: list[Tensor], keep: Tensor | None) -> None:
        tiles = group["block_size"]
        if tiles and group["block_period"]:
            tiles = tiles if group["updates"] % group["block_period"] else None
            group["updates"] += 1
        lr = group["lr"] if not tiles or group["block_lr"] is None else group["block_lr"]
        buckets: dict[tuple[Any, ...], list[Stack]] = {}
        for param in params:
            for stack in self._stacks(param, tiles, group, keep):
                key = (stack.param.shape[-2:], stack.param.dtype, stack.param.device)
                buckets.setdefault(key, []).append(stack)
        for bucket in buckets.values():
            for chunk in chunks(bucket, matrices_at_once(bucket, group["max_workspace_bytes"])):
                update_matrices(chunk, group, lr, keep)

    def _stacks(self, param: Tensor, tiles: int | None, group: Mapping[str, Any], keep: Tensor | None) -> list[Stack]:
        """The matrices of one parameter with gradient and state, as stacks [k, m, n]."""
        variant, view, names = variant_of(group), tuple(group["view"]), _state_names(group)
        state = self._state(param, names, group["momentum_dtype"])
        grad = param.grad
        assert grad is not None
        tensors = {"param": param, "grad": grad, **{name: state[name] for name in names}}
        stacks = flat({name: matrices(tensor, view, param) for name, tensor in tensors.items()})
        if group["idle"] == "fade":
            self._count_idle(param, stacks, keep)
        if tiles:
            stacks = [tile for stack in stacks for tile in tiled(stack, tiles)]
        if group["momentum_dtype"] == "int8":
            self._slices(param, stacks, "momentum_scale", lambda stack: (*stack.shape[:-1], 1))
        # The averages of tiles and of whole matrices that take turns are not the same, as their learning rates are not.
        suffix = "_of_tiles" if tiles and group["block_period"] else ""
        self._slices(param, stacks, "second_moment", variant.second_moment_shape, suffix)
        return stacks

    def _count_idle(self, param: Tensor, stacks: list[Stack], keep: Tensor | None) -> None:
        """Sets `idle` [k, 1, 1] of whole matrices to the number of updates since their last gradient."""
        self._slices(param, stacks, "idle", lambda stack: (len(stack), 1, 1))
        for stack in stacks:
            idle = stack.state["idle"]
            now = (idle + 1) * ~stack.grad.any(-1).any(-1)[:, None, None]
            idle.copy_(now if keep is None else torch.where(keep, now, idle))

    def _slices(
        self,
        param: Tensor,
        stacks: list[Stack],
        name: str,
        shape_of: Callable[[Tensor], tuple[int, ...] | None],
        suffix: str = "",
    ) -> None:
        """Small state that follows the matrices of a view is one flat fp32 tensor a parameter, cut up here."""
        shapes = [shape_of(stack.param) for stack in stacks]
        if None in shapes:
            return
        sizes = [math.prod(shape) for shape in shapes if shape is not None]
        state = self.state[param]
        if name + suffix not in state:
            state[name + suffix] = torch.zeros(sum(sizes), dtype=torch.float32, device=param.device)
        for stack, piece, shape in zip(stacks, torch.split(state[name + suffix], sizes), shapes):
            stack.state[name] = piece.view(shape)  # type: ignore[arg-type]  # no shape is None

    def _step_entries(self, group: dict[str, Any], params: list[Tensor], keep: Tensor | None) -> None:
        rule = rules.ELEMENTWISE[group["rule"]]
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        fused: list[Tensor] = []
        for i, param in enumerate(params):
            state = self._state(param, rule.state)
            if rule.counts:
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=param.device))
            if keep is None and fits_torchs_adamw(param, state, group):
                fused.append(param)
                continue
            if rule.counts:
                state["step"] += 1 if keep is None else keep.to(state["step"].device)
            alone = param.numel() > (_SMALL_CPU if param.device.type == "cpu" else _SMALL)
            buckets.setdefault((param.shape, param.dtype, param.device, i if alone else -1), []).append(param)
        if fused:
            update_by_torchs_adamw(fused, [self.state[param] for param in fused], group)
        for bucket in buckets.values():
            update_entries(bucket, [self.state[param] for param in bucket], rule, group, keep)

    def _state(self, param: Tensor, names: tuple[str, ...], dtype: str = "auto") -> dict[str, Any]:
        """The state of a parameter with tensors `names` like it; `dtype` is that of the momentum."""
        state: dict[str, Any] = self.state[param]
        for name in names:
            if name not in state:
                # Averages of half-precision gradients would stop moving in half precision.
                half = param.dtype in (torch.float16, torch.bfloat16)
                work = _STATE_DTYPES.get(dtype) if name == "momentum_buffer" else None
                work = work or (torch.float32 if half else param.dtype)
                state[name] = torch.zeros_like(param, dtype=work, memory_format=torch.preserve_format)
        return state


def _state_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """State tensors like the parameter that the rule of a group needs."""
    if group["rule"] == "muon":
        return ("momentum_buffer", *variant_of(group).state)
    return rules.ELEMENTWISE[group["rule"]].state


def _name(group: Mapping[str, Any], param: Tensor) -> str:
    index = next(i for i, other in enumerate(group["params"]) if other is param)
    return repr(group["param_names"][index]) if "param_names" in group else f"parameter {index}"


def _watched(optimizer: HybridOptimizer) -> bool:
    """Whether anything asked to know of steps."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )


def _all_finite(work: list[tuple[dict[str, Any], list[Tensor]]]) -> Tensor:
    """True if every entry of every gradient is finite, as a tensor: no host sync."""
    grads = [param.grad for _, params in work for param in params if param.grad is not None]
    if not grads:
        return torch.tensor(True)
    norms = torch._foreach_norm(grads, ord=float("inf"))
    return torch.isfinite(torch.stack([norm.float().to(norms[0].device) for norm in norms])).all()


def _saved_indices(state_dict: dict[str, Any]) -> list[int]:
    return [index for group in state_dict["param_groups"] for index in group["params"]]
