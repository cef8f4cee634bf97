"""One update: forward and backward over all micro-batches, clipping, optimizer. The only place that executes one.

Three programs run the same arithmetic: eager PyTorch; forward and backward through torch.compile; and, on CUDA, all of it
with the optimizer captured as one CUDA graph. Learning rates and momenta are tensors there that the graph reads.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from muonlab.models import ModelOutput, Transformer
from muonlab.models.ops import head_sample, head_stats
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


def update_seed(seed: int, update: int) -> int:
    """Seed of dropout, router noise and sampled labels in one update, drawn in the order of its micro-batches."""
    mixed = (seed * 0x9E3779B97F4A7C15 + update * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


class Update:
    """Makes one update of `model` by `optimizer` from a batch of `accumulation` x `micro_batch_size` sequences."""

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, config: RunConfig[Any]) -> None:
        training = config.training
        self.model, self.optimizer, self.config = model, optimizer, config
        self.program = training.program
        self.notice: str | None = None
        """Why another program than the one asked for ran, in one line."""
        self.precision = Precision(training.precision, training.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        options = config.model
        self.curvature_every: int | None = getattr(config.optimizer, "curvature_every", None)
        noisy = options.dropout > 0 or (options.n_experts > 0 and options.router_noise > 0)
        self.random = noisy or self.curvature_every is not None
        self.kinds = list(applied_lr(optimizer))
        self.calls = 0
        self._model: Callable[..., ModelOutput] = model
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        if self.program != "eager" and self.precision.device_type == "cuda":
            self._compiled = torch.compile(self._plain_micro_step, dynamic=False)
        elif self.program != "eager":
            # Inductor's passes over logits on a CPU are slower than torch's own: the head stays outside.
            self._model, self._compiled = torch.compile(model, dynamic=False), self._plain_micro_step
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.program == "graph":
            self._make_live()

    @property
    def ready(self) -> bool:
        """Whether the next call only computes: everything is compiled and captured."""
        return self.calls > {"eager": -1, "compile": 0, "graph": 2}[self.program]

    def __call__(self, update: int, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Update number `update` (0-based) on inputs, targets, document_ids [accumulation * micro_batch_size, T].

        Returns what it saw before its step, on the device and without a synchronisation, fp64 [3 + kinds]: mean
        cross-entropy in nats, objective, gradient norm before clipping, and the learning rate applied to each of `kinds`.
        A gradient that is not finite still reaches the optimizer unless the precision is fp16, whose scaler skips it:
        the loop ends the run as diverged.
        """
        config = self.config
        set_lr(self.optimizer, config.schedule.factor(update, config.training.updates))
        set_momentum(self.optimizer, config.schedule, update)
        if self.random:
            torch.manual_seed(update_seed(config.seed, update))
        if self.curvature_every is not None and update % self.curvature_every == 0:
            self._estimate_curvature(inputs, document_ids)
        self.calls += 1
        if self.program != "graph":
            return self._execute(inputs, targets, document_ids)
        return self._replay(inputs, targets, document_ids)

    def _execute(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        training = self.config.training
        sums = torch.zeros(2, device=inputs.device)  # loss, objective
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(training.accumulation):
            rows = slice(index * training.micro_batch_size, (index + 1) * training.micro_batch_size)
            ids = None if document_ids is None else document_ids[rows]
            loss, objective = self._micro_step(inputs[rows], targets[rows], ids)
            self.precision.scaler.scale(objective / training.accumulation).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss, objective.detach()]) / training.accumulation
        self.precision.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        rates = self._rates(inputs.device)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return torch.cat([sums, grad_norm.view(1), rates])

    def _micro_step(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            try:
                return self._compiled(inputs, targets, document_ids)
            except Exception as error:
                if self.calls > 1:  # it has worked before: this is no failure to compile
                    raise
                self._model, self._compiled = self.model, None
                self.notice = f"torch.compile failed ({str(error).splitlines()[0][:160]}); operations run one by one"
                self.program = "eager" if self.program == "compile" else self.program
        return self._plain_micro_step(inputs, targets, document_ids)

    def _plain_micro_step(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (detached) and objective of one micro-batch, inputs and targets [B, T]."""
        with self.precision.autocast():
            output = self._model(inputs, document_ids=document_ids)
            hidden = output.hidden.flatten(0, 1)  # [B * T, d_model]
            chunk = self.config.training.logit_chunk_bytes
            equal = weighs_tokens_equally(self.config.loss)
            stats = head_stats(hidden, self.model.head_weight, targets.flatten(), chunk, equal)
        objective = training_loss(stats, self.config.loss).mean() + output.auxiliary_loss
        return cross_entropy(stats).detach().mean(), objective

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
            return torch.stack([torch.as_tensor(rate, device=device).double() for rate in rates])
        return torch.tensor(rates, dtype=torch.float64, device=device)

    # --- the CUDA graph -----------------------------------------------------------------------------------------------

    def _make_live(self) -> None:
        """Learning rates and momenta as tensors on the device, which schedules fill and the graph reads."""
        device = self.parameters[0].device
        for group in self.optimizer.param_groups:
            names = ["lr"] + (
                ["momentum"] if self.config.schedule.momentum_warmup and group.get("rule") == "muon" else []
            )
            for name in names:
                group.setdefault(f"initial_{name}", float(group[name]))
                group[name] = torch.tensor(float(group[name]), device=device)

    def _replay(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        if self._graph is None:
            if self.calls <= 2:  # real updates that also compile everything and make the optimizer's state
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    result = self._execute(inputs, targets, document_ids)
                torch.cuda.current_stream().wait_stream(side)
                return result
            self._capture(inputs, targets, document_ids)
        if self._graph is None:  # the capture failed; `notice` says why
            return self._execute(inputs, targets, document_ids)
        self._inputs.copy_(inputs, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        if document_ids is not None and self._ids is not None:
            self._ids.copy_(document_ids, non_blocking=True)
        self._graph.replay()
        return self._result.clone()

    def _capture(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> None:
        self._inputs, self._targets = inputs.clone(), targets.clone()
        self._ids = None if document_ids is None else document_ids.clone()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                self._result = self._execute(self._inputs, self._targets, self._ids)
        except Exception as error:
            torch.cuda.synchronize()
            self.program = "eager" if self._compiled is None else "compile"
            self.notice = f"no CUDA graph ({str(error).splitlines()[0][:160]}); the update runs as {self.program}"
            self.optimizer.zero_grad(set_to_none=True)
            return
        self._graph = graph
