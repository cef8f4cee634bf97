"""Checkpoints: everything a run needs to go on bit for bit, replaced atomically."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from muonlab.errors import InputError
from muonlab.training.tracking import replace_file

NAME = "checkpoint.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """`state` as `checkpoint.pt` in the run directory `path`; the old one stays until the new one is whole."""
    replace_file(path / NAME, lambda temporary: _save(state, temporary))


def _save(state: dict[str, Any], file: Path) -> None:
    _write(torch.save, state, file)


def _write(save: Callable[..., Any], *arguments: Any) -> None:
    try:
        save(*arguments)
    except (RuntimeError, SafetensorError) as error:  # what their writers make of a full disk
        raise OSError(0, f"writing failed ({str(error).splitlines()[0]}); is the disk full?") from None


def load(path: Path, device: str) -> dict[str, Any] | None:
    """The state in the run directory `path`, None where there is none, InputError for a damaged file."""
    file = path / NAME
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} is damaged ({reason[:120]}); delete it to start this run again") from None
    return state


def save_weights(path: Path, model: nn.Module) -> None:
    """The model's weights as `model.safetensors` in the run directory `path`; tied tensors are stored once."""
    replace_file(path / "model.safetensors", lambda temporary: _write(save_model, model, str(temporary)))
