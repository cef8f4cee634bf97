"""The whole optimizer step on a GPU as one program: tables of addresses, banks, a fixed list of launches, a CUDA graph.

A plan is made at the first step and holds while parameters, state and options stay what they are. Gradients may move from
step to step: their addresses go to the device in one small asynchronous copy, as do learning rates, decays and momenta,
and the same graph is replayed. A parameter without a gradient has address 0 and is left alone.
"""

import math
import operator
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from muonlab.optim.coefficients import Step
from muonlab.optim.kernels import _CAPTURES, State, Unsupported, elementwise, iteration, tables
from muonlab.optim.kernels.capture import capture
from muonlab.optim.kernels.launching import compile_together, launch
from muonlab.optim.kernels.places import Places, Signature, look
from muonlab.optim.kernels.tables import Launch, Matrix, Slice

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_WARPS = 8
# Priorities of streams, the lowest first where programs of several launches wait. Products go before passes over memory, whose
# programs would otherwise all begin before a product that became ready a moment later; launches of small matrices, many and
# short, go before both.
_PASS, _PRODUCT, _SMALL = 0, -1, -2
_Work = tuple[int, Callable[[], object]]  # priority, what launches
# Rounding gives errors of about 0.002 and 0.02 on random matrices, up to ten times as much on small square ones.
_TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.5}


class FusedStep:
    """One update of all parameters of some groups ("muon" or "adamw").

    Args:
        groups: parameter groups of the optimizer, all on one CUDA device.
        states: the optimizer's `state`.
        make: parameter, names of state tensors, dtype -> state of the parameter, made on first use.

    Raises:
        Unsupported: for what it does not cover, a kernel that does not compile, or too little memory; nothing has changed.
    """

    def __init__(self, groups: list[dict[str, Any]], states: Mapping[Tensor, Any], make: State) -> None:
        self._groups, self._states = groups, states
        self._params = [list(group["params"]) for group in groups]
        self._signatures = [Signature(group) for group in groups]
        self._members = [look(param, group, make) for group in groups for param in group["params"]]
        self._places = Places(self._members, states)
        self._device = self._members[0].param.device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients_now: list[int] | None = None
        self._hyper_now: list[float] | None = None
        self._live: tuple[int, ...] = ()
        self._live_tables: dict[tuple[int, ...], Tensor] = {}
        # Launches of a lane follow each other; lanes run beside each other. They must not refer to the plan: a cycle would
        # leave its graph to the garbage collector, which may run while another graph is captured and spoil that.
        self._lanes: list[list[_Work]] = [[] for _ in range(tables.LANES)]

        # Addresses, and behind them the hyper-parameters: what may be new at a step goes to the device in one copy.
        # The host fills its side through memory views: a tensor takes Python's numbers several times slower.
        addresses = list(chain.from_iterable(member.addresses() for member in self._members))
        count, width = len(addresses), elementwise.HYPER.value
        shape = (len(self._members), elementwise.POINTERS.value)
        host = array("q", addresses + [0] * (len(groups) * width // 2))
        self._host = torch.frombuffer(host, dtype=torch.int64)
        self._host_gradients = memoryview(host)[elementwise.GRAD.value : count : elementwise.POINTERS.value]
        self._host_hyper = memoryview(host)[count:].cast("B").cast("f")
        self._moving = self._zeros(len(self._host), dtype=torch.int64)
        self._pointers = self._moving[:count].view(shape)
        self._hyper = self._moving[count:].view(torch.float32).view(len(groups), width)
        cuda = self._device.type == "cuda"
        self._spare = [torch.empty(shape, dtype=torch.int64, pin_memory=cuda) for _ in range(_CAPTURES)]
        self._captured: list[tuple[list[int], Tensor]] = []
        self._processors = 1
        if cuda:
            self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        with self._on_device(), _refusing():
            tunings = self._plan_matrices()
            self._plan_entries()
            # All addresses are still 0, so nothing of the user's is touched.
            launches = [each for _, each in chain(*self._lanes)]
            compile_together(launches)
            for each in (*tunings, *launches):
                each()

    def gradients(self, groups: list[dict[str, Any]], states: Mapping[Tensor, Any]) -> list[int] | None:
        """Addresses of all gradients (0: none); None where anything is not as it was planned for.

        Runs at every step, so it compares what is cheap to compare: identities, addresses, strides.
        """
        if states is not self._states or len(groups) != len(self._groups):
            return None
        for group, own, params, signature in zip(groups, self._groups, self._params, self._signatures):
            if group is not own or len(group["params"]) != len(params):
                return None
            if not (all(map(operator.is_, group["params"], params)) and signature.fits(group)):
                return None
        return self._places.gradients()

    def run(self, gradients: list[int], keep: Tensor | None = None) -> bool:
        """Makes the update; False, with nothing changed, where a user's capture cannot hold it.

        `keep`, a boolean on the device: False leaves everything as it is, as if no parameter had a gradient.

        Raises Unsupported, with nothing changed, where its graph cannot be captured.
        """
        with self._on_device():
            return self._run(gradients, keep)

    def _on_device(self) -> AbstractContextManager[object]:
        """The device of the plan as the current one: kernels are launched there."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _run(self, gradients: list[int], keep: Tensor | None) -> bool:
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        values, live = self._hyper_values()
        entries = tuple(index for index, _ in live)
        if capturing and (values != self._hyper_now or entries != self._live or not self._upload_captured(gradients)):
            return False
        if entries != self._live:
            self._live, self._hyper_now = entries, None  # what is a number again is not on the device yet
            if entries not in self._live_tables:
                # Kept with the plan: a user's capture that reads one may be replayed at any time.
                self._live_tables[entries] = self._table(entries, torch.int64)
        if not capturing:
            self._upload(gradients, values)
        if live:
            now = torch.stack([tensor.detach().view(()).to(self._device, torch.float32) for _, tensor in live])
            self._hyper.view(-1).index_copy_(0, self._live_tables[entries], now)
        if keep is not None:
            self._pointers[:, elementwise.GRAD.value].mul_(keep)
            self._gradients_now = None
        if capturing or self._device.type != "cuda":
            self._launch()
            return True
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with _refusing(), capture(graph):
                self._launch()
            self._graph = graph
        self._graph.replay()
        return True

    def _launch(self) -> None:
        if self._device.type != "cuda":
            for _, each in chain(*self._lanes):
                each()
            return
        here = torch.cuda.current_stream(self._device)
        begin = first = here.record_event()
        ends = []
        for number, (lane, streams) in enumerate(zip(self._lanes, _streams(self._device))):
            # Heavy lanes begin when the first momentum is done: two passes at once would only halve each other's rate.
            done = first if number < tables.HEAVY else begin
            for priority, each in lane:
                stream = streams[priority]
                stream.wait_event(done)
                with torch.cuda.stream(stream):
                    each()
                done = stream.record_event()
                first = done if first is begin else first
            ends.append(done)
        for done in ends:  # not before: one of the lanes' streams may be this one
            here.wait_event(done)

    # What may change from step to step.

    def _upload(self, gradients: list[int], values: list[float]) -> None:
        # A replay of a user's capture, which nobody here sees, leaves its own addresses on the device.
        if not self._captured and gradients == self._gradients_now and values == self._hyper_now:
            return
        self._host_gradients[:] = array("q", gradients)
        self._host_hyper[:] = array("f", values)
        if self._device.type == "cuda":
            # Pinned anew: torch keeps what a copy still reads apart, however far the host is ahead.
            self._moving.copy_(self._host.pin_memory(), non_blocking=True)
        else:
            self._moving.copy_(self._host)
        self._gradients_now, self._hyper_now = gradients, values

    def _upload_captured(self, gradients: list[int]) -> bool:
        # The copy becomes part of the user's graph and reads pinned memory at every replay: a table for each capture that
        # has addresses of its own. Plain numbers of the groups stay those of the last step outside of a capture.
        table = next((table for known, table in self._captured if known == gradients), None)
        if table is None:
            if not self._spare:
                return False
            table = self._spare.pop()
            self._host_gradients[:] = array("q", gradients)
            table.copy_(self._host[: table.numel()].view(table.shape))
            self._captured.append((gradients, table))
        self._pointers.copy_(table, non_blocking=True)
        self._gradients_now = None
        return True

    def _hyper_values(self) -> tuple[list[float], list[tuple[int, Tensor]]]:
        """All hyper-parameters, and where in that list those are that live on the device."""
        values: list[Any] = list(chain.from_iterable(map(_hyper, self._groups)))
        if set(map(type, values)) == {float}:
            return values, []
        live = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_cuda]
        for i, _ in live:
            values[i] = 0.0
        return list(map(float, values)), live

    # The plan.

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _table(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self._device)

    def _plan_matrices(self) -> list[Callable[[], object]]:
        """Fills the lanes; returns what tunes and checks their products."""
        found: list[Matrix] = []
        for owner, member in enumerate(self._members):
            group = member.group
            if group["rule"] == "muon":
                view = tuple(group["view"]) + ((("tiles", group["block_size"]),) if group["block_size"] else ())
                momentum = member.kept[0][2] if member.kept else None
                views = tables.matrices_of(
                    member.param, member.param.grad, momentum, view, owner, _index(self._groups, group), group
                )
                if views is None:
                    raise Unsupported("a view of a gradient that needs a copy")
                found += views
        if not found:
            return []
        ordered = tables.in_order(found)
        budgets = [group["max_workspace_bytes"] for group in self._groups if group["rule"] == "muon"]
        budget = min((size for size in budgets if size is not None), default=tables.DEFAULT_WORKSPACE)
        lanes = tables.lanes_of(ordered, budget, self._processors)
        slices = sorted(chain(*lanes), key=lambda part: part.first)
        chunks, starts = tables.chunks_of([matrix.rows * matrix.cols for matrix in ordered], elementwise.CHUNK)
        count = len(ordered)
        shared = {
            "pointers": self._pointers,
            "hyper": self._hyper,
            "chunks": chunks.to(self._device),
            "layout": self._table(tables.layout_of(ordered, slices), torch.int64),
            "starts": self._table(starts, torch.int32),
            "factors": self._table([(matrix.factor, matrix.decay) for matrix in ordered], torch.float32),
            "gains": self._table([(_gain(matrix), matrix.eps) for matrix in ordered], torch.float32),
            "partial": self._zeros(starts[-1], 3),
            "multiplier": self._zeros(count),
            **{name: self._zeros(count) for name in ("active", "late", "redo", "scale")},
        }
        tunings: list[Callable[[], object]] = []
        for number, (launches, parts) in enumerate(zip(self._lanes, lanes)):
            priorities = (_PASS, _PRODUCT, _PASS) if number < tables.HEAVY else (_SMALL,) * 3
            # What the slices of a lane share, because they take turns.
            sizes: dict[torch.dtype, int] = {}
            counts: dict[tuple[int, torch.dtype], int] = {}
            for part in parts:
                inside = ordered[part.first : part.last]
                dtype, key = inside[0].dtype, _workspace(inside[0])
                sizes[dtype] = max(sizes.get(dtype, 0), sum(matrix.rows * matrix.pitch for matrix in inside))
                counts[key] = max(counts.get(key, 0), len(inside))
            banks = {k: (self._zeros(size, dtype=k), self._zeros(size, dtype=k)) for k, size in sizes.items()}
            works = {k: iteration.Workspace.allocate(most, *k, self._device) for k, most in counts.items()}
            for part in parts:
                head = ordered[part.first]
                tune, *own = self._plan_slice(part, ordered, starts, shared, banks[head.dtype], works[_workspace(head)])
                tunings.append(tune)
                launches += zip(priorities, own)
        return tunings

    def _plan_slice(
        self,
        part: Slice,
        ordered: list[Matrix],
        starts: list[int],
        t: dict[str, Tensor],
        banks: tuple[Tensor, Tensor],
        work: iteration.Workspace,
    ) -> list[Callable[[], object]]:
        """What tunes the products of a slice, and its launches: momentum, iterations, application."""
        sections = []
        offset = 0
        for first, last in part.sections:
            shape = (last - first, ordered[first].rows, ordered[first].pitch)
            x, y = (bank[offset : offset + math.prod(shape)].view(shape) for bank in banks)
            sections.append(iteration.Section(x, y, ordered[first].cols, first - part.first))
            offset += math.prod(shape)
        steps = ordered[part.first].iteration.steps
        blocks = ordered[part.first].blocks
        result = banks[len(blocks) % 2]
        scale = t["scale"][part.first : part.last]
        runs = [(ordered[first].launch, first, starts[first], last, starts[last]) for first, last in part.runs]

        def before() -> None:
            for run in runs:
                _before(*run, t, banks[0])

        def after() -> None:
            for run in runs:
                _after(*run, t, result)

        return [
            lambda: _tune(sections, work, steps, blocks, scale),
            before,
            lambda: iteration.iterate(sections, work, steps, blocks, scale),
            after,
        ]

    def _plan_entries(self) -> None:
        sizes = torch.zeros(len(self._members), 2, dtype=torch.int64)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for owner, (param, _, stride, _, kept, group, _) in enumerate(self._members):
            grad = param.grad
            if group["rule"] != "adamw" or grad is None:
                continue
            tensors = (param, grad, kept[0][2], kept[1][2])
            if any(tensor.stride() != stride for tensor in tensors) or not tables.dense(param):
                raise Unsupported("a gradient that lies in memory in another order than its parameter")
            if any(tensor.device != self._device for tensor in (*tensors, kept[2][2])):
                raise Unsupported("state on another device than its parameter")
            sizes[owner] = torch.tensor([param.numel(), _index(self._groups, group)])
            even = param.numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
            key = (param.dtype, grad.dtype, kept[0][2].dtype, bool(group["cautious_decay"]), 16 if even else 1)
            kinds.setdefault(key, []).append(owner)
        if not kinds:
            return
        sizes = sizes.to(self._device)
        count = len(self._members)
        counts = torch.tensor([member.group["rule"] == "adamw" for member in self._members]).to(self._device)
        launches = self._lanes[-1]
        launches.append((_PASS, _bound(elementwise.count_kernel, (count,), (self._pointers, counts, 0))))
        for (param_type, grad_type, state_type, cautious, align), owners in kinds.items():
            chunks, starts = tables.chunks_of([self._members[i].param.numel() for i in owners], elementwise.CHUNK)
            chunks[:, 0] = torch.tensor(owners, dtype=torch.int32)[chunks[:, 0].long()]
            types = _TYPES[param_type], _TYPES[grad_type], _TYPES[state_type]
            arguments = (chunks.to(self._device), self._pointers, sizes, self._hyper, 0)
            flags = (*types, cautious, align, elementwise.CHUNK)
            launches.append((_PASS, _bound(elementwise.adamw_kernel, (starts[-1],), (*arguments, *flags))))


@contextmanager
def _refusing() -> Iterator[None]:
    """Makes Unsupported of whatever goes wrong: a compiler's failure may be of any kind, and memory may be short."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:100]}"
        raise Unsupported(f"this case ({reason})") from error


@cache
def _streams(device: torch.device) -> list[dict[int, Any]]:
    """For each lane a stream of each priority, the same for all plans, and with them cuBLAS's workspaces: steps of two optimizers
    must not run beside each other."""

    def stream(priority: int) -> Any:
        return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    return [{p: stream(p) for p in (_PASS, _PRODUCT, _SMALL)} for _ in range(tables.LANES)]


def _index(groups: list[dict[str, Any]], group: dict[str, Any]) -> int:
    return next(i for i, other in enumerate(groups) if other is group)


def _bound(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: launch(kernel, grid, *arguments, num_warps=_WARPS)


def _tune(
    sections: list[iteration.Section],
    work: iteration.Workspace,
    steps: tuple[Step, ...],
    blocks: tuple[int, ...],
    scale: Tensor,
) -> None:
    error = iteration.tune(sections, work, steps, blocks, scale)
    if not error < _TOLERANCE[work.gram.off.dtype]:
        raise Unsupported(f"this GPU, whose kernels do not agree with torch (error {error:.2g})")


def _before(run: Launch, first: int, start: int, last: int, end: int, t: dict[str, Tensor], bank: Tensor) -> None:
    """Momentum, norm and cast of the matrices `first` to `last`, whose chunks are `start` to `end`."""
    grad, momentum = _TYPES[run.dtypes[1]], _TYPES[run.dtypes[2]]
    flags = (grad, momentum, run.nesterov, run.heavy_ball, run.skip_idle, run.flat, run.align, elementwise.CHUNK)
    launch(
        elementwise.momentum_kernel, (end - start,),
        t["chunks"], t["pointers"], t["layout"], t["hyper"], t["multiplier"], t["partial"], bank, start, *flags,
        num_warps=_WARPS,
    )  # fmt: skip
    launch(
        elementwise.norm_kernel, (last - first,),
        t["starts"], t["gains"], t["partial"], t["multiplier"], t["active"], t["late"], t["redo"], t["scale"], first,
        1024, num_warps=_WARPS,
    )  # fmt: skip
    launch(
        elementwise.settle_kernel, (last - first, 32),
        t["starts"], t["pointers"], t["layout"], t["hyper"], t["partial"], t["late"], t["redo"], bank, first, *flags,
        num_warps=_WARPS,
    )  # fmt: skip


def _after(run: Launch, first: int, start: int, last: int, end: int, t: dict[str, Tensor], bank: Tensor) -> None:
    """Decay and application of the same matrices."""
    launch(
        elementwise.apply_kernel, (end - start,),
        t["chunks"], t["pointers"], t["layout"], t["hyper"], t["factors"], t["active"], t["scale"], bank, start,
        _TYPES[run.dtypes[0]], run.cautious, run.skip_idle, run.flat, run.align, elementwise.CHUNK, num_warps=_WARPS,
    )  # fmt: skip


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


def _workspace(matrix: Matrix) -> tuple[int, torch.dtype]:
    """What slices with one workspace have in common."""
    return matrix.short, matrix.dtype


def _gain(matrix: Matrix) -> float:
    """Norm that a cast matrix should have: entries of about 1 lie in the middle of fp16's range.

    Bounded, because the iteration brings every singular value up to about this, and it may be 8 times as large before a matrix
    is cast again.
    """
    return float(min(2.0 ** (math.log2(matrix.rows * matrix.cols) // 2), 2048.0))
