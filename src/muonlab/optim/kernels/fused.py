"""The whole optimizer step on a GPU as one program: tables of addresses, banks, a fixed list of launches, a CUDA graph.

A plan is made at the first step and holds while parameters, state and options stay what they are. Gradients may move from
step to step: their addresses go to the device in one small asynchronous copy, as do learning rates, decays and momenta,
and the same graph is replayed. A parameter without a gradient has address 0 and is left alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from muonlab.optim.kernels import State, Unsupported, elementwise, iteration, tables
from muonlab.optim.kernels.tables import Launch, Matrix, Slice

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_WARPS = 8
# Captures of a user's own program in which addresses may differ; one pinned table each.
_CAPTURES = 8
_STATE = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class FusedStep:
    """One update of all parameters of some groups ("muon" or "adamw").

    Args:
        groups: parameter groups of the optimizer, all on one CUDA device.
        state: parameter, names of state tensors, dtype -> state of the parameter, made on first use.

    Raises:
        Unsupported: for what it does not cover, a kernel that does not compile, or too little memory; nothing has changed.
    """

    def __init__(self, groups: list[dict[str, Any]], state: State) -> None:
        self._groups, self._make = groups, state
        self._members = [(param, group) for group in groups for param in group["params"]]
        self._device = self._members[0][0].device
        self._signature = _signature(groups)
        self._seen = [self._look(param, group) for param, group in self._members]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._uploaded: list[int] | None = None
        self._hyper_now: list[float] | None = None

        self._pointers = self._zeros(len(self._members), elementwise.POINTERS.value, dtype=torch.int64)
        self._hyper = self._zeros(len(groups), elementwise.HYPER.value)
        self._pinned = [
            torch.empty(
                len(self._members),
                elementwise.POINTERS.value,
                dtype=torch.int64,
                pin_memory=self._device.type == "cuda",
            )
            for _ in range(_CAPTURES)
        ]
        self._captured: list[list[int]] = []
        self._launches: list[Callable[[], object]] = []
        try:
            self._plan_matrices()
            self._plan_entries()
            # Compiles and tunes every kernel. All addresses are still 0, so nothing of the user's is touched.
            self._launch()
        except Unsupported:
            raise
        except Exception as error:  # a compiler's failure may be of any kind
            raise Unsupported(
                f"this case ({type(error).__name__}: {str(error).strip().splitlines()[0][:100]})"
            ) from error

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the plan still describes the groups; gradients may have other addresses, not another layout."""
        if len(groups) != len(self._groups) or any(a is not b for a, b in zip(groups, self._groups)):
            return False
        if _signature(groups) != self._signature:
            return False
        members = iter(zip(self._members, self._seen))
        for group in self._groups:
            for param in group["params"]:
                (member, _), seen = next(members, ((None, None), None))
                if member is not param or seen is None or not self._same(param, group, seen):
                    return False
        return next(members, None) is None

    def run(self) -> bool:
        """Makes the update; False, with nothing changed, where it cannot (too many captures with different addresses)."""
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not self._upload(capturing):
            return False
        if capturing or self._device.type != "cuda":
            self._launch()
            return True
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch()
            self._graph = graph
        self._graph.replay()
        return True

    def _launch(self) -> None:
        for launch in self._launches:
            launch()

    # What must stay the same, and what may change.

    def _look(self, param: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
        grad = param.grad
        layout = None if grad is None else (grad.dtype, grad.stride())
        state = None if grad is None else self._state(param, group)
        return param.data_ptr(), param.stride(), layout, state

    def _same(self, param: Tensor, group: Mapping[str, Any], seen: tuple[Any, ...]) -> bool:
        address, stride, layout, states = seen
        if param.data_ptr() != address or param.stride() != stride:
            return False
        grad = param.grad
        if grad is None:
            return True
        if layout is None or states is None or grad.dtype != layout[0] or grad.stride() != layout[1]:
            return False
        return all(own is value for own, value in zip(self._state(param, group), states))

    def _state(self, param: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The state tensors in the order of the address table."""
        names = _STATE[group["rule"]]
        state = self._make(param, names, group.get("momentum_dtype", "auto"))
        if group["rule"] == "adamw":
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            names = (*names, "step")
        return tuple(state[name] for name in names)

    def _addresses(self) -> list[int]:
        flat: list[int] = []
        for (param, _), (address, _, _, states) in zip(self._members, self._seen):
            grad = param.grad
            flat += (address, 0 if grad is None else grad.data_ptr())
            pointers = [] if states is None else [value.data_ptr() for value in states]
            flat += pointers + [0] * (elementwise.POINTERS.value - 2 - len(pointers))
        return flat

    def _upload(self, capturing: bool) -> bool:
        addresses = self._addresses()
        if capturing:
            # The copy becomes part of the user's graph and reads the pinned table at every replay: each its own.
            if addresses not in self._captured:
                if len(self._captured) == _CAPTURES:
                    return False
                self._pinned[len(self._captured)].view(-1).copy_(torch.tensor(addresses))
                self._captured.append(addresses)
            self._pointers.copy_(self._pinned[self._captured.index(addresses)], non_blocking=True)
            self._uploaded = None
        elif addresses != self._uploaded:
            self._send(self._pointers, torch.tensor(addresses))
            self._uploaded = addresses
        self._upload_hyper(capturing)
        return True

    def _upload_hyper(self, capturing: bool) -> None:
        values: list[float] = []
        live: list[tuple[int, int, Tensor]] = []
        for row, group in enumerate(self._groups):
            for column, value in enumerate(_hyper(group)):
                if isinstance(value, Tensor) and value.is_cuda:
                    live.append((row, column, value))
                    value = 0.0
                values.append(float(value))
        if values != self._hyper_now:
            if capturing:
                raise RuntimeError(
                    "a learning rate, weight decay or momentum changed during capture: use tensors for them"
                )
            self._send(self._hyper, torch.tensor(values))
            self._hyper_now = values
        for row, column, tensor in live:
            self._hyper[row, column].copy_(tensor.view(()))

    def _send(self, target: Tensor, values: Tensor) -> None:
        values = values.view(target.shape)
        if target.is_cuda:
            # The caching host allocator does not reuse this block before the copy is done.
            values = values.pin_memory()
        target.copy_(values, non_blocking=True)

    # The plan.

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _table(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self._device)

    def _plan_matrices(self) -> None:
        found: list[Matrix] = []
        indices = {id(group): i for i, group in enumerate(self._groups)}
        for owner, ((param, group), seen) in enumerate(zip(self._members, self._seen)):
            if group["rule"] == "muon":
                view = tuple(group["view"]) + ((("tiles", group["block_size"]),) if group["block_size"] else ())
                momentum = None if seen[3] is None else seen[3][0]
                part = tables.matrices_of(param, param.grad, momentum, view, owner, indices[id(group)], group)
                if part is None:
                    raise Unsupported("a view of a gradient that needs a copy")
                found += part
        if not found:
            return
        ordered = tables.in_order(found)
        budgets = [group["max_workspace_bytes"] for group in self._groups if group["rule"] == "muon"]
        budget = min((size for size in budgets if size is not None), default=tables.DEFAULT_WORKSPACE)
        slices = tables.slices_of(ordered, budget)
        chunks, starts = tables.chunks_of([matrix.rows * matrix.cols for matrix in ordered], elementwise.CHUNK)
        count = len(ordered)
        shared = {
            "chunks": chunks.to(self._device),
            "layout": self._table(tables.layout_of(ordered, slices), torch.int64),
            "starts": self._table(starts, torch.int32),
            "factors": self._table([(matrix.factor, matrix.decay) for matrix in ordered], torch.float32),
            "gains": self._table([(_gain(matrix), matrix.eps) for matrix in ordered], torch.float32),
            "partial": self._zeros(starts[-1], 3),
            "multiplier": self._zeros(count),
            **{name: self._zeros(count) for name in ("active", "late", "redo", "scale")},
        }
        entries = max(sum(m.rows * m.pitch for m in ordered[part.first : part.last]) for part in slices)
        banks: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        works: dict[tuple[int, torch.dtype], iteration.Workspace] = {}
        for part in slices:
            head = ordered[part.first]
            if head.dtype not in banks:
                banks[head.dtype] = (self._zeros(entries, dtype=head.dtype), self._zeros(entries, dtype=head.dtype))
            key = (head.short, head.dtype)
            most = max(p.last - p.first for p in slices if (ordered[p.first].short, ordered[p.first].dtype) == key)
            if key not in works:
                works[key] = iteration.Workspace.allocate(most, *key, self._device)
            self._plan_slice(part, ordered, starts, shared, banks[head.dtype], works[key])

    def _plan_slice(
        self,
        part: Slice,
        ordered: list[Matrix],
        starts: list[int],
        t: dict[str, Tensor],
        banks: tuple[Tensor, Tensor],
        work: iteration.Workspace,
    ) -> None:
        sections = []
        offset = 0
        for first, last in part.sections:
            shape = (last - first, ordered[first].rows, ordered[first].pitch)
            x, y = (bank[offset : offset + math.prod(shape)].view(shape) for bank in banks)
            sections.append(iteration.Section(x, y, ordered[first].cols, first - part.first))
            offset += math.prod(shape)
        steps = ordered[part.first].iteration.steps
        blocks = iteration.blocks_of(ordered[part.first].short, len(steps), ordered[part.first].method)
        result = banks[len(blocks) % 2]
        scale = t["scale"][part.first : part.last]
        banks[0].normal_()  # kernels are tuned on what is neither zero nor the same everywhere
        iteration.iterate(sections, work, steps, blocks, scale)
        runs = [(first, last, ordered[first].launch) for first, last in part.runs]

        def launch() -> None:
            for first, last, run in runs:
                self._before(run, first, last, starts, t, banks[0])
            iteration.iterate(sections, work, steps, blocks, scale)
            for first, last, run in runs:
                self._after(run, first, last, starts, t, result)

        self._launches.append(launch)

    def _before(
        self, run: Launch, first: int, last: int, starts: list[int], t: dict[str, Tensor], bank: Tensor
    ) -> None:
        grad, momentum = _TYPES[run.dtypes[1]], _TYPES[run.dtypes[2]]
        flags = (grad, momentum, run.nesterov, run.heavy_ball, run.skip_idle, run.flat, run.align, elementwise.CHUNK)
        elementwise.momentum_kernel[(starts[last] - starts[first],)](
            t["chunks"], self._pointers, t["layout"], self._hyper, t["multiplier"], t["partial"], bank, starts[first],
            *flags, num_warps=_WARPS,
        )  # fmt: skip
        elementwise.norm_kernel[(last - first,)](
            t["starts"], t["gains"], t["partial"], t["multiplier"], t["active"], t["late"], t["redo"], t["scale"], first,
            1024, num_warps=_WARPS,
        )  # fmt: skip
        elementwise.settle_kernel[(last - first, 32)](
            t["starts"], self._pointers, t["layout"], self._hyper, t["partial"], t["late"], t["redo"], bank, first,
            *flags, num_warps=_WARPS,
        )  # fmt: skip

    def _after(self, run: Launch, first: int, last: int, starts: list[int], t: dict[str, Tensor], bank: Tensor) -> None:
        elementwise.apply_kernel[(starts[last] - starts[first],)](
            t["chunks"], self._pointers, t["layout"], self._hyper, t["factors"], t["active"], bank, starts[first],
            _TYPES[run.dtypes[0]], run.cautious, run.skip_idle, run.flat, run.align, elementwise.CHUNK, num_warps=_WARPS,
        )  # fmt: skip

    def _plan_entries(self) -> None:
        indices = {id(group): i for i, group in enumerate(self._groups)}
        sizes = torch.zeros(len(self._members), 2, dtype=torch.int64)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for owner, ((param, group), seen) in enumerate(zip(self._members, self._seen)):
            if group["rule"] != "adamw" or seen[3] is None:
                continue
            grad = param.grad
            assert grad is not None
            if len({tensor.stride() for tensor in (param, grad, *seen[3][:2])}) > 1 or not _dense(param):
                raise Unsupported("a gradient that lies in memory in another order than its parameter")
            sizes[owner, 0], sizes[owner, 1] = param.numel(), indices[id(group)]
            even = param.numel() % 16 == 0 and all(p.data_ptr() % 16 == 0 for p in (param, grad, *seen[3][:2]))
            key = (param.dtype, grad.dtype, seen[3][0].dtype, bool(group["cautious_decay"]), 16 if even else 1)
            kinds.setdefault(key, []).append(owner)
        if not kinds:
            return
        sizes = sizes.to(self._device)
        count = len(self._members)
        adamw = torch.tensor([group["rule"] == "adamw" for _, group in self._members], device=self._device)
        self._launches.append(lambda: elementwise.count_kernel[(count,)](self._pointers, adamw, 0))
        for (param_type, grad_type, state_type, cautious, align), owners in kinds.items():
            chunks, starts = tables.chunks_of([self._members[owner][0].numel() for owner in owners], elementwise.CHUNK)
            chunks[:, 0] = torch.tensor(owners, dtype=torch.int32)[chunks[:, 0].long()]
            self._launches.append(
                _bound(
                    elementwise.adamw_kernel[(starts[-1],)],
                    (chunks.to(self._device), self._pointers, sizes, self._hyper, 0),
                    (_TYPES[param_type], _TYPES[grad_type], _TYPES[state_type], cautious, align, elementwise.CHUNK),
                )
            )


def _bound(kernel: Callable[..., object], arguments: tuple[Any, ...], flags: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: kernel(*arguments, *flags, num_warps=_WARPS)


def _hyper(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row of the table of hyper-parameters, numbers or live tensors."""
    lr = group["lr"]
    if group["rule"] == "muon":
        if group["block_size"] and group["block_lr"] is not None:
            lr = group["block_lr"]
        return lr, group["weight_decay"], group["momentum"], 0.0, 0.0, 0.0, 0.0, 0.0
    beta1, beta2 = (float(beta) for beta in group["betas"])
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    return lr, group["weight_decay"], *logs, group["eps"], 1 - beta1, 1 - beta2, 0.0


def _signature(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Every option that the plan was made for."""
    moving = (
        "params",
        "param_names",
        "reasons",
        "lr",
        "block_lr",
        "weight_decay",
        "momentum",
        "betas",
        "eps",
        "updates",
    )
    return [tuple((k, v) for k, v in group.items() if k not in moving and k[:8] != "initial_") for group in groups]


def _gain(matrix: Matrix) -> float:
    """Norm that a cast matrix should have: entries of about 1 lie in the middle of fp16's range."""
    return 2.0 ** (math.log2(matrix.rows * matrix.cols) // 2)


def _dense(tensor: Tensor) -> bool:
    """Whether the entries fill one piece of memory, in whatever order of axes."""
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True
