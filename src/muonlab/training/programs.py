"""Programs that outlive their run: a study of a hundred runs with the same shapes compiles and captures once.

A program is a model, its optimizer and its update. What a run leaves behind is kept, and the next run of the same shapes gets
it with the parameters that a new model would have, bit for bit, and an optimizer that has seen nothing. Whatever a
schedule or the next run may change is read at every update (`CHANGING`, `LIVE_OPTIONS`); all else is part of the key.
"""

import gc
import json
import threading
from typing import Any

import torch
from torch import nn

from muonlab.models import Transformer
from muonlab.optim.optimizer import HybridOptimizer
from muonlab.optim.registry import build_optimizer
from muonlab.training.config import RunConfig
from muonlab.training.update import Update

KEPT = 4
"""Most programs kept in a process."""
FREE = 0.75
"""On an accelerator programs are kept only while this share of its memory is free for the next one."""

CHANGING = ("updates", "eval_every", "eval_tokens", "eval_splits", "checkpoint_every", "divergence_bound")
"""Training options that are no part of a program: the loop reads them."""
LIVE_OPTIONS = (
    *("lr", "embedding_lr", "head_lr", "vector_lr", "momentum"),
    *("weight_decay", "embedding_weight_decay", "head_weight_decay", "vector_weight_decay"),
)
"""Optimizer options that a captured update reads from tensors."""

_kept: dict[str, "Program"] = {}  # the least recently used first
_lock = threading.Lock()


class Program:
    """A model initialised from the seed of `config` (with every `auto` resolved), its optimizer and its update."""

    def __init__(self, config: RunConfig[Any]) -> None:
        self.key = program_key(config)
        self.device = torch.device(config.training.device)
        self._others = allocated(self.device)  # bytes of whoever else is on the device
        self._own = self._peak = 0
        self.model = new_model(config).to(self.device)
        optimizer = build_optimizer(self.model, config.optimizer)
        self._start(config, optimizer, optimizer, None)

    def restart(self, config: RunConfig[Any]) -> None:
        """Ready for another run with the same key, as if newly made; tensors that a CUDA graph reads stay where they are."""
        self._others = allocated(self.device) - self._own
        with torch.no_grad():
            for old, new in zip(tensors(self.model), tensors(new_model(config)), strict=True):
                old.copy_(new)
        fresh = build_optimizer(self.model, config.optimizer)
        optimizer = fresh
        if self.update.captured and optimizer_key(config) == self._optimizer_key is not None:
            optimizer = self.update.optimizer
            reset_in_place(optimizer, fresh)
        else:
            self.model.zero_grad(set_to_none=True)
        self._start(config, optimizer, fresh, self.update)

    def _start(
        self,
        config: RunConfig[Any],
        optimizer: torch.optim.Optimizer,
        described: torch.optim.Optimizer,
        earlier: Update | None,
    ) -> None:
        self.config, self.optimizer = config, optimizer
        self.routing: list[dict[str, Any]] = [dict(row) for row in described.routing().rows]  # type: ignore[attr-defined]
        self._optimizer_key = optimizer_key(config)
        self.update = Update(self.model, optimizer, config, earlier)
        if self.update.precision.scaler.is_enabled():
            self.update.precision.scaler = torch.amp.GradScaler(self.device.type)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory(self) -> int:
        """Largest memory of this program on its CUDA device so far in bytes; a replayed graph shows what its capture took."""
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device) - self._others)
        return self._peak

    def rest(self) -> None:
        """Note what it holds before others use the device."""
        if self.device.type == "cuda":
            self.peak_memory()
            self._own = allocated(self.device) - self._others


def take(config: RunConfig[Any]) -> Program:
    """The program of this run, kept or new, for the caller alone until it gives it back with `keep`."""
    key = program_key(config)
    with _lock:
        program = _kept.pop(key, None)
        if program is None:
            _make_room(torch.device(config.training.device))
    if program is None:
        return Program(config)
    program.restart(config)
    return program


def keep(program: Program, *, sound: bool = True) -> None:
    """Give a program back after its run; `sound` is False where its optimizer may hold what is not finite."""
    if program.config.training.program == "eager":
        return  # nothing of it took time to make
    if not sound:
        program.update.recapture()
    program.rest()
    with _lock:
        _kept[program.key] = program


def forget() -> None:
    """Free every kept program."""
    with _lock:
        _kept.clear()
    gc.collect()


def _make_room(device: torch.device) -> None:
    while _kept and (len(_kept) >= KEPT or crowded(device)):
        del _kept[next(iter(_kept))]
        gc.collect()  # compiled functions hold on to their owners


def crowded(device: torch.device) -> bool:
    """Whether less than the share FREE of a CUDA device's memory is free."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free < FREE * total


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a CUDA device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def program_key(config: RunConfig[Any]) -> str:
    """What two runs must have in common to share compiled code: shapes, loss, precision, device, program, threads."""
    values = config.to_dict()
    training = {name: value for name, value in values["training"].items() if name not in CHANGING}
    masked = values["data"]["document_mask"]  # decides whether a batch has document ids
    return json.dumps([values["model"], values["loss"], training, masked], sort_keys=True)


def optimizer_key(config: RunConfig[Any]) -> str | None:
    """What two runs must have in common besides to share a captured update: the optimizer, without what it reads live.
    None for optimizers by import path: how their state begins is not known.
    """
    options = config.to_dict()["optimizer"]
    if options["name"] == "class":
        return None
    options = {name: value for name, value in options.items() if name not in LIVE_OPTIONS}
    if options.get("block_lr") is not None:
        options["block_lr"] = "live"
    return json.dumps(options, sort_keys=True)


def new_model(config: RunConfig[Any]) -> Transformer:
    """A model on the CPU whose parameters the seed decides."""
    torch.manual_seed(config.seed)
    return Transformer(config.model)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


def reset_in_place(optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> None:
    """Give `optimizer` the options of `fresh`, a new one for the same parameters that differs in LIVE options alone, and the
    state of an optimizer that has made no update: zeros. Live tensors and state tensors stay the same tensors.
    """
    assert isinstance(optimizer, HybridOptimizer)
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        for name in [name for name in group if name not in new]:
            del group[name]  # what schedules and a captured update noted down
        for name, value in new.items():
            if isinstance(group.get(name), torch.Tensor):
                group[name].fill_(value)
                group[f"initial_{name}"] = float(value)
            elif name != "params":
                group[name] = value
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
