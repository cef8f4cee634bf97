"""What a plan was made for, and whether all of it is still the same: parameters, state, layouts of gradients, options."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonlab.optim.kernels import State, Unsupported, elementwise

_data_ptr, _shape, _stride, _contiguous = Tensor.data_ptr, Tensor.size, Tensor.stride, Tensor.is_contiguous
_get: Callable[[Any, Any], Any] = dict.get
_STATE = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
# What the device reads at every step, and names: no part of a plan.
_MOVING = ("params", "param_names", "reasons", "lr", "block_lr", "weight_decay", "momentum", "betas", "eps", "updates")


class Member(NamedTuple):
    """A parameter as it was when the plan was made."""

    param: Tensor
    address: int
    stride: tuple[int, ...]
    layout: tuple[torch.dtype, int | tuple[tuple[int, ...], tuple[int, ...]]] | None
    """Of the gradient: dtype, and how many entries if contiguous, else shape and strides; None if there was none."""
    kept: tuple[tuple[dict[str, Any], str, Tensor], ...]
    """State tensors in the order of the address table, each with the dictionary that holds it."""
    group: dict[str, Any]
    places: tuple[int, ...]

    def addresses(self) -> list[int]:
        """A row of the address table, without the gradient."""
        return [self.address, 0, *self.places, *[0] * (elementwise.POINTERS.value - 2 - len(self.places))]


def look(param: Tensor, group: dict[str, Any], make: State) -> Member:
    """A parameter as it is now; with a gradient its state is made."""
    grad = param.grad
    if grad is None:
        return Member(param, param.data_ptr(), param.stride(), None, (), group, ())
    names = _STATE[group["rule"]]
    state = make(param, names, group.get("momentum_dtype", "auto"))
    if any(state[name].shape != param.shape for name in names):
        raise Unsupported("state of another shape than its parameter")
    if group["rule"] == "adamw":
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        names = (*names, "step")
    kept = tuple((state, name, state[name]) for name in names)
    layout = (grad.dtype, grad.numel() if grad.is_contiguous() else (grad.shape, grad.stride()))
    return Member(param, param.data_ptr(), param.stride(), layout, kept, group, tuple(t.data_ptr() for _, _, t in kept))


class Places:
    """Where everything was when the plan was made, in lists that are compared as fast as Python can."""

    def __init__(self, members: list[Member], states: Mapping[Tensor, Any]) -> None:
        owners = [member for member in members if member.kept]
        self._all, self._owners = states, [member.param for member in owners]
        self._held = [member.kept[0][0] for member in owners]
        self._keys, self._entries = list(states), list(states.values())
        self._params = [member.param for member in members]
        self._addresses = [member.address for member in members]
        self._shapes = list(map(_shape, self._params))
        self._contiguous = list(map(_contiguous, self._params))
        gapped = [member for member in members if not member.param.is_contiguous()]
        self._gapped, self._strides = [member.param for member in gapped], [member.stride for member in gapped]
        self._grad_dtypes, self._grad_layouts = zip(*(member.layout or (None, None) for member in members))
        kept = [entry for member in members for entry in member.kept]
        self._states, self._names, self._values = ([entry[i] for entry in kept] for i in range(3))

    def gradients(self) -> list[int] | None:
        """Addresses of all gradients (0: none); None where anything else is not as it was.

        Any tensor may have got other memory or another shape in place. Contiguous tensors are not asked for their strides,
        which follow from the shape, nor a gradient for its shape, which is its parameter's: its entries, in order, are counted
        because one that is left from before its parameter's shape changed may have fewer.
        """
        params = self._params
        if list(map(_data_ptr, params)) != self._addresses or list(map(_shape, params)) != self._shapes:
            return None
        if list(map(_contiguous, params)) != self._contiguous or list(map(_stride, self._gapped)) != self._strides:
            return None
        if not self._entries_stayed() and not all(map(operator.is_, map(self._all.get, self._owners), self._held)):
            return None
        if not all(map(operator.is_, map(_get, self._states, self._names), self._values)):
            return None
        found = []
        try:
            for param, dtype, layout in zip(params, self._grad_dtypes, self._grad_layouts):
                grad = param.grad
                if grad is None:
                    found.append(0)
                    continue
                now = grad.numel() if grad.is_contiguous() else (grad.shape, grad.stride())
                if grad.dtype is not dtype or now != layout:
                    return None
                found.append(grad.data_ptr())
        except RuntimeError:  # a sparse gradient has no layout
            return None
        return found

    def _entries_stayed(self) -> bool:
        """Whether the whole state has the same entries in the same order; looking each up would hash its tensor in Python."""
        return (
            len(self._all) == len(self._keys)
            and all(map(operator.is_, self._all, self._keys))
            and all(map(operator.is_, self._all.values(), self._entries))
        )


class Signature:
    """The options of a group that a plan was made for."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._values = _options(group)
        self._pick = operator.itemgetter(*(name for name, _ in self._values))
        self._picked = self._pick(group)
        self._size = len(group)

    def fits(self, group: Mapping[str, Any]) -> bool:
        if len(group) != self._size:  # an option more or less; one that a scheduler keeps there is none
            if _options(group) != self._values:
                return False
            self._size = len(group)
        try:
            return bool(self._pick(group) == self._picked)
        except KeyError:
            return False


def _options(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Every option that a plan depends on."""
    return tuple((k, v) for k, v in group.items() if k not in _MOVING and k[:8] != "initial_")
