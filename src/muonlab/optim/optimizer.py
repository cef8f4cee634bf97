"""The optimizer: torch's interface around the pure rules, with every parameter on the rule that its route says.

A step walks the parameter groups. Matrices of one shape, whatever parameter, expert, head or tile they come from, are
updated together as one stack by `step.update_matrices`; entries of all other parameters by `step.update_entries`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from muonlab.optim import rules
from muonlab.optim.routing import RoutingTable, table_of
from muonlab.optim.step import Stack, chunks, flat, matrices_at_once, update_entries, update_matrices
from muonlab.optim.views import View, matrices

# Parameters up to this many elements are stacked with others of their shape.
_SMALL = 1 << 16


class HybridOptimizer(torch.optim.Optimizer):
    """Parameter groups with a `rule` each: "muon", or a name of `rules.ELEMENTWISE`.

    All options live in `param_groups` as plain values (or live tensors), so schedulers and checkpoints see them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(list(groups), defaults)

    def routing(self) -> RoutingTable:
        """Which rule updates which parameter, with what learning rate, decay and scale: `.rows`, or print it."""
        return table_of(self)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update from the gradients in place; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            if group["rule"] == "muon":
                self._step_matrices(group, params)
            else:
                self._step_entries(group, params)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()` exactly: state keeps its own dtype (torch would cast it to that of the parameter)."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(device=param.device, copy=True)

    def _step_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        view = _view(group)
        buckets: dict[tuple[Any, ...], list[Stack]] = {}
        for param in params:
            grad = param.grad
            assert grad is not None
            state = self._state(param, ("momentum_buffer",))
            parts = zip(
                matrices(param, view), matrices(grad, view, param), matrices(state["momentum_buffer"], view, param)
            )
            for stack in parts:
                key = (stack[0].shape[-2:], stack[0].dtype, stack[0].device)
                buckets.setdefault(key, []).extend(flat(stack))
        for bucket in buckets.values():
            for chunk in chunks(bucket, matrices_at_once(group, bucket)):
                update_matrices(chunk, group)

    def _step_entries(self, group: dict[str, Any], params: list[Tensor]) -> None:
        rule = rules.ELEMENTWISE[group["rule"]]
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for i, param in enumerate(params):
            state = self._state(param, rule.state)
            if rule.counts:
                state["step"] += 1
            alone = param.numel() > _SMALL
            buckets.setdefault((param.shape, param.dtype, param.device, i if alone else -1), []).append(param)
        for bucket in buckets.values():
            update_entries(bucket, [self.state[param] for param in bucket], rule, group)

    def _state(self, param: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            # Averages of half-precision gradients would stop moving in half precision.
            dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
            for name in names:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        return state


def _view(group: Mapping[str, Any]) -> View:
    tiles: View = (("tiles", group["block_size"]),) if group["block_size"] else ()
    return tuple(group["view"]) + tiles
