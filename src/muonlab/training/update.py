"""One update: forward and backward over all micro-batches, clipping, optimizer. The only place that executes one."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muonlab.errors import InputError
from muonlab.models.ops import head_stats
from muonlab.training.config import RunConfig
from muonlab.training.losses import cross_entropy, training_loss

PROGRAMS = {"eager": "plain PyTorch, operation by operation", "compile": "forward and backward through torch.compile"}


class Precision:
    """Arithmetic of the forward pass: fp32, bf16 autocast, or fp16 autocast with loss scaling."""

    def __init__(self, name: str, device: str) -> None:
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.device_type = torch.device(device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype)


@dataclass(frozen=True)
class UpdateResult:
    """What one update saw, before its step. Scalars on the device: reading them is what costs a synchronisation."""

    loss: Tensor
    """Mean next-token cross-entropy of the update's tokens in nats."""
    objective: Tensor
    """Mean of what was optimised: the training loss plus the auxiliary losses of a mixture."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""


def micro_batch_seed(seed: int, update: int, micro_batch: int) -> int:
    """Seed of dropout, router noise and sampled labels: a pure function of (seed, update, micro-batch)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + update * 0xBF58476D1CE4E5B9 + micro_batch * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)


class Update:
    """Makes one update of `model` by `optimizer` from a batch of `accumulation` x `micro_batch_size` sequences."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig[Any]) -> None:
        training = config.training
        if training.program not in PROGRAMS:
            raise InputError(f"training.program {training.program!r} cannot run here; known: {', '.join(PROGRAMS)}")
        self.model, self.optimizer, self.config = model, optimizer, config
        self.program = training.program
        self.precision = Precision(training.precision, training.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        options = config.model
        self.random = options.dropout > 0 or (options.n_experts > 0 and options.router_noise > 0)
        self.micro_step = torch.compile(self._micro_step) if self.program == "compile" else self._micro_step

    def _micro_step(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and objective of one micro-batch, inputs and targets [B, T]."""
        with self.precision.autocast():
            output = self.model(inputs, document_ids=document_ids)
        hidden = output.hidden.flatten(0, 1)  # [B * T, d_model]
        chunk = self.config.training.logit_chunk_bytes
        stats = head_stats(hidden, self.model.head_weight, targets.flatten(), chunk)
        objective = training_loss(stats, self.config.loss).mean() + output.auxiliary_loss
        return cross_entropy(stats).detach().mean(), objective

    def __call__(self, update: int, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> UpdateResult:
        """Update number `update` (0-based) on inputs, targets, document_ids [accumulation * micro_batch_size, T].

        A gradient that is not finite still reaches the optimizer unless the precision is fp16 (whose scaler skips it):
        the loop ends the run as diverged.
        """
        training = self.config.training
        loss = torch.zeros((), device=inputs.device)
        objective = torch.zeros((), device=inputs.device)
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(training.accumulation):
            rows = slice(index * training.micro_batch_size, (index + 1) * training.micro_batch_size)
            if self.random:
                torch.manual_seed(micro_batch_seed(self.config.seed, update, index))
            ids = None if document_ids is None else document_ids[rows]
            ce, micro_objective = self.micro_step(inputs[rows], targets[rows], ids)
            self.precision.scaler.scale(micro_objective / training.accumulation).backward()
            loss += ce / training.accumulation
            objective += micro_objective.detach() / training.accumulation
        self.precision.scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return UpdateResult(loss, objective, grad_norm)

    def _clip(self) -> Tensor:
        limit = self.config.training.clip_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
