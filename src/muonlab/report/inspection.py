"""What a model is before it is trained: parameters, arithmetic, who updates what, and the memory that training needs."""

from typing import Any

import torch

from muonlab.diagnostics.flops import count_parameters, token_flops
from muonlab.diagnostics.memory import STATE_TENSORS, training_memory
from muonlab.models import Transformer
from muonlab.optim.registry import build_optimizer
from muonlab.report.tables import size
from muonlab.training.config import RunConfig, resolve_machine, with_vocabulary


def inspection(config: RunConfig[Any], name: str) -> str:
    """The page of `muonlab inspect`. Nothing is allocated: the model is built without storage."""
    config = with_vocabulary(config)
    training = resolve_machine(config).training
    with torch.device("meta"):
        model = Transformer(config.model)
    optimizer = build_optimizer(model, config.optimizer)
    sections = [
        parameters(config, name),
        arithmetic(config),
        f"routing\n{optimizer.routing()}",  # type: ignore[attr-defined]
        memory(config, training.precision, training.logit_chunk_bytes),
    ]
    return "\n\n".join(sections)


def parameters(config: RunConfig[Any], name: str) -> str:
    counts = count_parameters(config.model)
    lines = [f"{name}: {counts.total:,} parameters, {counts.active:,} active for one token"]
    for kind in ("hidden", "embedding", "head", "router", "vector"):
        if number := getattr(counts, kind):
            lines.append(f"  {kind:10s} {number:>14,}  {number / counts.total:6.1%}")
    return "\n".join(lines)


def arithmetic(config: RunConfig[Any]) -> str:
    flops = token_flops(config.model)
    lines = [f"FLOPs per token, sequences of {config.model.seq_len} (a multiplication and an addition count one each)"]
    for part in ("hidden", "attention", "router", "head", "forward", "training"):
        note = "  forward and backward" if part == "training" else ""
        if number := getattr(flops, part):
            lines.append(f"  {part:10s} {number:>14,}{note}")
    update = flops.training * config.tokens_per_update
    lines.append(f"  one update of {config.tokens_per_update:,} tokens: {update / 1e12:.4g} TFLOP")
    return "\n".join(lines)


def memory(config: RunConfig[Any], precision: str, logit_chunk_bytes: int) -> str:
    batch = config.training.micro_batch_size
    columns = {
        optimizer: training_memory(
            config.model,
            optimizer,
            micro_batch_size=batch,
            precision=precision,  # type: ignore[arg-type]
            logit_chunk_bytes=logit_chunk_bytes,
        ).parts()
        for optimizer in STATE_TENSORS
    }
    lines = [f"memory of training, micro-batches of {batch} x {config.model.seq_len} tokens, {precision} forward"]
    lines.append("  " + " " * 16 + "".join(f"{optimizer:>10s}" for optimizer in columns))
    for part in next(iter(columns.values())):
        lines.append(
            f"  {part.replace('_', ' '):16s}" + "".join(f"{size(parts[part]):>10s}" for parts in columns.values())
        )
    return "\n".join(lines)
