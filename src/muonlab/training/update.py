"""One update: forward and backward over all micro-batches, clipping, optimizer. The only place that executes one.

Three programs run the same arithmetic: eager PyTorch; forward and backward through torch.compile; and, on CUDA, all of it
with the optimizer captured as one CUDA graph. Learning rates, momenta and weight decays are tensors there that the graph
reads. `programs` keeps what was compiled and captured for the next run of the same shapes.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from muonlab.models import ModelOutput, Transformer
from muonlab.models.head import head_sample, head_stats
from muonlab.optim import kernels
from muonlab.optim.kernels.capture import capture
from muonlab.optim.optimizer import HybridOptimizer
from muonlab.optim.schedules import applied_lr, set_lr, set_momentum
from muonlab.training.config import RunConfig
from muonlab.training.losses import cross_entropy, training_loss, weighs_tokens_equally

PROGRAMS = {
    "eager": "plain PyTorch, operation by operation",
    "compile": "forward and backward through torch.compile",
    "graph": "forward, backward, clipping and optimizer as one CUDA graph",
}
SCALARS = ("loss", "objective", "grad_norm")
"""What every update reports, followed by the learning rate of each kind of parameter."""
LIVE = ("lr", "block_lr", "momentum", "weight_decay")
"""Group options that a captured update reads from the device, so that schedules and the next run change them in place."""


class Precision:
    """Arithmetic of the forward pass: fp32, bf16 autocast, or fp16 autocast with loss scaling."""

    def __init__(self, name: str, device: str) -> None:
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.device_type = torch.device(device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype is None:
            return contextlib.nullcontext()
        # Inside a captured program the cache of casts would outlive the weights that it was made from.
        return torch.autocast(self.device_type, self.dtype, cache_enabled=False)


def seed_draws(device: torch.device, seed: int) -> None:
    """Seeds what operations on `device` draw from; torch.manual_seed seeds every device, which takes as long as a small update."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def update_seed(seed: int, update: int) -> int:
    """Seed of dropout, router noise and sampled labels in one update, drawn in the order of its micro-batches."""
    mixed = (seed * 0x9E3779B97F4A7C15 + update * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


class MicroStep:
    """Loss of one micro-batch, compiled unless the program is eager. It reads nothing that differs between runs of one shape.

    Under autocast every micro-batch casts every weight. Where there are several, weights that only matmuls read are cast once
    per update, and each backward pass leaves their gradients in half precision, as matmuls make them, for one sum in the weight's
    own dtype: the numbers are autocast's.
    """

    def __init__(self, model: Transformer, config: RunConfig[Any]) -> None:
        training = config.training
        self.model, self.loss, self.chunk = model, config.loss, training.logit_chunk_bytes
        self.precision = Precision(training.precision, training.device)
        self.worked = False
        """Whether it has made gradients: everything is compiled."""
        self.notice: str | None = None
        self._weights: Mapping[str, Tensor] = {}
        if self.precision.dtype is not None and training.accumulation > 1:
            self._weights = model.matmul_weights()
        self._cast = {name: weight.detach().to(self.precision.dtype) for name, weight in self._weights.items()}
        self._forward: Callable[..., ModelOutput] = self._run_model
        self._whole: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.compiled = training.program != "eager"
        if self.compiled and self.precision.device_type == "cuda":
            self._whole = torch.compile(self._plain, dynamic=False)
        elif self.compiled:
            # Inductor's passes over logits on a CPU are slower than torch's own: the head stays outside.
            self._forward = torch.compile(self._run_model, dynamic=False)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the micro-batches of an update: casts the weights as they are now; what an update that failed left is gone."""
        if not self._weights:
            return
        for name, weight in self._weights.items():
            self._cast[name].grad = None
            self._cast[name].requires_grad_(weight.requires_grad)
        torch._foreach_copy_(list(self._cast.values()), list(self._weights.values()))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """After a backward pass: moves its gradients of cast weights to the weights' own."""
        for name, weight in self._weights.items():
            found, self._cast[name].grad = self._cast[name].grad, None
            if found is None:
                continue
            if weight.grad is None:
                weight.grad = found.to(weight.dtype)
            else:
                weight.grad += found

    def __call__(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (detached) and objective of one micro-batch, inputs and targets [B, T]."""
        run = self._whole or self._plain
        if self.worked or not self.compiled:
            return run(inputs, targets, document_ids)
        import torch._dynamo.config

        # Programs of other shapes count as compilations of the same code: after eight of them it would run uncompiled in silence.
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            return run(inputs, targets, document_ids)

    def falls_back(self, error: Exception) -> bool:
        """Goes on without torch.compile if `error` is its failure to compile; False if it has worked before."""
        if self.worked or not self.compiled:
            return False
        self._forward, self._whole, self.compiled = self._run_model, None, False
        self.begin()
        self.notice = f"torch.compile failed ({first_line(error)}); operations run one by one"
        return True

    def _plain(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        with self.precision.autocast():
            output = self._forward(inputs, document_ids)
            hidden = output.hidden.flatten(0, 1)  # [B * T, d_model]
            equal = weighs_tokens_equally(self.loss)
            stats = head_stats(hidden, self.model.head_weight, targets.flatten(), self.chunk, equal)
        objective = training_loss(stats, self.loss).mean() + output.auxiliary_loss
        return cross_entropy(stats).detach().mean(), objective

    def _run_model(self, inputs: Tensor, document_ids: Tensor | None) -> ModelOutput:
        output: ModelOutput = functional_call(self.model, self._cast, (inputs, document_ids), tie_weights=False)
        return output


class Captured(NamedTuple):
    """An update as a CUDA graph, with the tensors that it reads and writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None
    result: Tensor


class Update:
    """Makes one update of `model` by `optimizer` from a batch of `accumulation` x `micro_batch_size` sequences.

    `earlier`, an update of the same program, hands over what it has compiled, and what it has captured if the optimizer
    is the same object.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        config: RunConfig[Any],
        earlier: "Update | None" = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.micro_step: MicroStep = MicroStep(model, config) if earlier is None else earlier.micro_step
        self.precision = self.micro_step.precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        options = config.model
        self.curvature_every: int | None = getattr(config.optimizer, "curvature_every", None)
        noisy = options.dropout > 0 or (options.n_experts > 0 and options.router_noise > 0)
        self.random = noisy or self.curvature_every is not None
        self.kinds = list(applied_lr(optimizer))
        self.calls = 0
        self.on_phase: Callable[[str], None] | None = None
        """Called as forward, backward, optimizer and end begin, for a benchmark's clock; a graph holds what it then does."""
        self._wants_graph = config.training.program == "graph"
        self._captured: Captured | None = None
        self._not_captured: str | None = None
        """Why no CUDA graph can be made, in a few words."""
        if earlier is not None and earlier.optimizer is optimizer:
            self._captured, self._not_captured = earlier._captured, earlier._not_captured
        if any(group.get("block_size") and group.get("block_period") for group in optimizer.param_groups):
            self._not_captured = "block_period takes turns between two programs"
        if self._wants_graph:
            self._make_live()

    @property
    def program(self) -> str:
        """What really runs, also after something could not be compiled or captured."""
        if self._wants_graph and self._not_captured is None:
            return "graph"
        return "compile" if self.micro_step.compiled else "eager"

    @property
    def notice(self) -> str | None:
        """Why another program than the one asked for runs, in one line."""
        lost = self._not_captured if self._wants_graph else None
        graph = None if lost is None else f"no CUDA graph ({lost}); the update runs as {self.program}"
        refusal = kernels.refusal(self.optimizer)
        step = None if refusal is None else f"the optimizer steps through torch: its fast step does not cover {refusal}"
        return "; ".join(line for line in (self.micro_step.notice, graph, step) if line) or None

    @property
    def ready(self) -> bool:
        """Whether the next call only computes: everything is compiled and captured."""
        if self.program == "graph":
            return self._captured is not None
        return self.program == "eager" or self.micro_step.worked

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds this update, and with it the places of parameters and optimizer state."""
        return self._captured is not None

    def recapture(self) -> None:
        """Forget the CUDA graph, because tensors that it reads were replaced: the third call from now makes a new one."""
        self._captured, self.calls = None, 0

    def __call__(self, update: int, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Update number `update` (0-based) on inputs, targets, document_ids [accumulation * micro_batch_size, T].

        Returns what it saw before its step, on the device and without a synchronisation, fp64 [3 + kinds]: mean
        cross-entropy in nats, objective, gradient norm before clipping, and the learning rate applied to each of `kinds`.
        A gradient that is not finite still reaches the optimizer unless the precision is fp16, whose scaler skips it:
        the loop ends the run as diverged.
        """
        config = self.config
        # What is compiled and captured is made for one layout.
        inputs, targets = inputs.contiguous(), targets.contiguous()
        document_ids = None if document_ids is None else document_ids.contiguous()
        set_lr(self.optimizer, config.schedule.factor(update, config.training.updates))
        set_momentum(self.optimizer, config.schedule, update)
        if self.random:
            seed_draws(self.parameters[0].device, update_seed(config.seed, update))
        if self.curvature_every is not None and update % self.curvature_every == 0:
            self._estimate_curvature(inputs, document_ids)
        self.calls += 1
        if self.program == "graph":
            return self._replay(inputs, targets, document_ids)
        return self._execute(inputs, targets, document_ids)

    def _execute(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        training = self.config.training
        sums = torch.zeros(2, device=inputs.device)  # loss, objective
        self.optimizer.zero_grad(set_to_none=True)
        self._phase("forward")
        self.micro_step.begin()
        for index in range(training.accumulation):
            rows = slice(index * training.micro_batch_size, (index + 1) * training.micro_batch_size)
            ids = None if document_ids is None else document_ids[rows]
            sums += self._add_gradients(inputs[rows], targets[rows], ids) / training.accumulation
        self._phase("optimizer")
        self.precision.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        rates = self._rates(inputs.device)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self._phase("end")
        return torch.cat([sums, grad_norm.view(1), rates])

    def _add_gradients(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Forward and backward pass of one micro-batch; its loss and objective [2]."""
        try:
            self._phase("forward")
            loss, objective = self.micro_step(inputs, targets, document_ids)
            self._phase("backward")
            scaled = self.precision.scaler.scale(objective / self.config.training.accumulation)
            scaled.backward()  # type: ignore[no-untyped-call]
            self.micro_step.add_gradients()
        except Exception as error:
            if not self.micro_step.falls_back(error):
                raise
            self.optimizer.zero_grad(set_to_none=True)  # this was the first micro-batch of all
            return self._add_gradients(inputs, targets, document_ids)
        self.micro_step.worked = True
        return torch.stack([loss, objective.detach()])

    def _phase(self, name: str) -> None:
        if self.on_phase is not None:
            self.on_phase(name)

    def _estimate_curvature(self, inputs: Tensor, document_ids: Tensor | None) -> None:
        """Sophia-G's extra pass over the update's inputs, on labels that the model itself draws."""
        training = self.config.training

        def closure() -> None:
            for index in range(training.accumulation):
                rows = slice(index * training.micro_batch_size, (index + 1) * training.micro_batch_size)
                ids = None if document_ids is None else document_ids[rows]
                with self.precision.autocast():
                    hidden = self.model(inputs[rows], document_ids=ids).hidden.flatten(0, 1)
                    head, chunk = self.model.head_weight, training.logit_chunk_bytes
                    stats = head_stats(hidden, head, head_sample(hidden, head, chunk), chunk, equal_weights=True)
                loss = cross_entropy(stats).mean() / training.accumulation
                loss.backward()  # type: ignore[no-untyped-call]

        self.optimizer.update_curvature(closure, inputs.numel())  # type: ignore[attr-defined]

    def _clip(self) -> Tensor:
        limit = self.config.training.clip_norm
        if limit:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _rates(self, device: torch.device) -> Tensor:
        """The learning rate in force for each kind, read from the groups that the step is about to use."""
        first = {group["kind"]: group["lr"] for group in reversed(self.optimizer.param_groups)}
        rates = [first[kind] for kind in self.kinds]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack([torch.as_tensor(rate, device=device) for rate in rates]).double()
        return torch.tensor(rates, dtype=torch.float64, device=device)

    # --- the CUDA graph -----------------------------------------------------------------------------------------------

    def _make_live(self) -> None:
        """The LIVE options as tensors on the device, which schedules fill and the graph reads; lr alone for torch's own."""
        device = self.parameters[0].device
        for group in self.optimizer.param_groups:
            for name in LIVE if isinstance(self.optimizer, HybridOptimizer) else LIVE[:1]:
                value = group.get(name)
                if value is not None and not isinstance(value, Tensor):
                    group.setdefault(f"initial_{name}", float(value))
                    group[name] = torch.tensor(float(value), device=device)

    def _replay(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        if self._captured is None:
            if self.calls <= 2:  # real updates that also compile everything and make the optimizer's state
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    result = self._execute(inputs, targets, document_ids)
                torch.cuda.current_stream().wait_stream(side)
                return result
            self._capture(inputs, targets, document_ids)
        if self._captured is None:  # the capture failed; `notice` says why
            return self._execute(inputs, targets, document_ids)
        captured = self._captured
        batch, places = [inputs, targets], [captured.inputs, captured.targets]
        if document_ids is not None and captured.document_ids is not None:
            batch.append(document_ids)
            places.append(captured.document_ids)
        torch._foreach_copy_(places, batch, non_blocking=True)
        captured.graph.replay()
        return captured.result.clone()

    def _capture(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> None:
        ids = None if document_ids is None else document_ids.clone()
        static = (inputs.clone(), targets.clone(), ids)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with capture(graph):
                result = self._execute(*static)
        except Exception as error:
            torch.cuda.synchronize()
            self._not_captured = first_line(error)
            self.optimizer.zero_grad(set_to_none=True)
            return
        self._captured = Captured(graph, *static, result)


def first_line(error: Exception) -> str:
    """What an error says, in at most 160 characters; torch.compile keeps what went wrong inside of its own."""
    error = getattr(error, "inner_exception", None) or error
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
