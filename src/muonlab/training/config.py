"""What determines a run: one frozen value, read from names, TOML and flags, hashed to the run id."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from muonlab.data import DataOptions
from muonlab.errors import InputError, unknown
from muonlab.models import MODELS, ModelOptions
from muonlab.optim.registry import OPTIMIZERS
from muonlab.optim.schedules import Schedule

FORBID: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The training objective, a formula per token over the head's statistics; evaluation is always cross-entropy."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary, 0 to 1 (seed 000 uses 0.1)."""
    focal_gamma: float = 0.0
    """Exponent of the focal loss (1 - p)^gamma x cross-entropy; 0 is plain cross-entropy (seed 000 uses 2)."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function, as PaLM's 1e-4."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"loss.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
        for name in ("focal_gamma", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"loss.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Sizes, clock and program of one run. The only clock is the update: one step of the optimizer."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    updates: int = 200
    """Optimizer updates; every schedule is a function of the update."""
    micro_batch_size: int = 16
    """Sequences in one forward and backward pass."""
    accumulation: int = 1
    """Micro-batches in one update."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass: auto is bf16 on CUDA and fp32 elsewhere; fp16 scales the loss."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    threads: int = 0
    """CPU threads; 0 takes torch's own default. Part of the run's identity: sums depend on it."""
    program: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How an update is executed: auto is one CUDA graph where that is possible and eager elsewhere."""
    eval_every: int = 50
    """Updates between evaluations; there is always one before the first update and one after the last."""
    eval_tokens: int = 65_536
    """Tokens of the fixed evaluation set, per split."""
    eval_splits: tuple[Literal["tune", "report"], ...] = ("tune",)
    """Held-out splits to evaluate; choices are made on tune, judgements on report."""
    checkpoint_every: int = 100
    """Updates between checkpoints; what was done since the last one is what a crash costs."""
    divergence_bound: float = 20.0
    """A training loss above this many nats, or one that is not finite, ends the run as diverged."""
    logit_chunk_bytes: int = 0
    """Largest tensor of logits in bytes; 0 chooses by device."""

    def __post_init__(self) -> None:
        for name in ("updates", "micro_batch_size", "accumulation", "eval_every", "eval_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("clip_norm", "threads", "logit_chunk_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"training.{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.divergence_bound > 0:
            raise InputError(f"training.divergence_bound is {self.divergence_bound}; it must be above 0")
        if not self.eval_splits:
            raise InputError("training.eval_splits is empty; name tune, report or both")


O_ = TypeVar("O_")


class RunConfig(BaseModel, Generic[O_]):
    """One run. `RunConfig[MuonOptions]` is the concrete type that flags and TOML are validated against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "run"
    """Label in tables and file names; not part of the identity."""
    seed: int = Field(default=1, ge=0, lt=2**62)
    """Decides initial weights, batch order, dropout and router noise."""
    model: ModelOptions
    data: DataOptions
    optimizer: O_
    schedule: Schedule
    loss: LossOptions
    training: TrainingOptions

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, the optimizer with its registered name: JSON- and TOML-able, and read by `from_dict`."""
        plain = self.model_dump(mode="json")
        plain["optimizer"] = {"name": optimizer_name(self.optimizer), **plain["optimizer"]}
        return plain

    @property
    def tokens_per_update(self) -> int:
        return self.training.accumulation * self.training.micro_batch_size * self.model.seq_len


def from_dict(values: Mapping[str, Any], where: str = "configuration") -> RunConfig[Any]:
    """The run that nested plain `values` describe. Missing tables take their defaults.

    `model` may be a preset's name or a table with a `preset` and overrides; `optimizer` a name or a table with a `name`;
    `data` a corpus's name or a table. Raises InputError with one line that names the key.
    """
    values = as_tables(values)
    model = dict(values.pop("model", {"preset": "micro"}))
    preset = model.pop("preset", None)
    if preset is not None:
        if preset not in MODELS:
            raise unknown("model", preset, MODELS)
        model = {**to_plain(MODELS[preset]), **model}
    optimizer = dict(values.pop("optimizer", {}))
    optimizer_key = optimizer.pop("name", "muon")
    if optimizer_key not in OPTIMIZERS:
        raise unknown("optimizer", optimizer_key, OPTIMIZERS)
    data = values.pop("data", {})
    values.setdefault("name", f"{preset or 'model'}-{optimizer_key}")
    tables = {"schedule": {}, "loss": {}, "training": {}, **values}
    kind: Any = RunConfig[OPTIMIZERS[optimizer_key].options]  # type: ignore[misc]
    try:
        config: RunConfig[Any] = kind.model_validate({**tables, "model": model, "data": data, "optimizer": optimizer})
    except ValidationError as error:
        raise one_line(error, kind, where) from None
    return config


def as_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with each name in the place of a table as the table that it stands for, so that others merge into it."""
    keys = {"model": "preset", "optimizer": "name", "data": "corpus"}
    return {k: {keys[k]: v} if k in keys and isinstance(v, str) else v for k, v in values.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """The nested values of a TOML file; InputError names the file, and the line for a syntax error."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no configuration file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the nested values of `over` laid on top."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one: {"optimizer.lr": 0.02, ...}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def replace(config: RunConfig[Any], **changes: Any) -> RunConfig[Any]:
    """`config` with nested changes, validated: `replace(c, seed=2, optimizer={"lr": 0.01})`."""
    return from_dict(merge(config.to_dict(), changes))


def resolve_machine(config: RunConfig[Any]) -> RunConfig[Any]:
    """Every `auto` replaced by what this machine gives: device, precision, threads, program, logit_chunk_bytes."""
    training = config.training
    device, precision, threads = training.device, training.precision, training.threads
    kind = device.split(":")[0]
    if device != "auto" and kind not in ("cpu", "cuda", "mps"):
        raise InputError(f"training.device is {device!r}; known: auto, cpu, cuda, cuda:N, mps")
    if kind != "cpu" or not threads:
        import torch  # takes seconds: what is settled without it does not wait for it

        if device == "auto":
            kind = device = "cuda" if torch.cuda.is_available() else "cpu"
        if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]:
            raise InputError(f"training.device is {device!r} but torch sees no such device here; use cpu or auto")
        index = device.partition(":")[2]
        if kind == "cuda" and index and not (index.isdigit() and int(index) < torch.cuda.device_count()):
            raise InputError(f"training.device is {device!r} but torch sees {torch.cuda.device_count()} CUDA device(s)")
        if precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            precision = "bf16"
        threads = threads or torch.get_num_threads()
    if precision == "auto":
        precision = "fp32"
    if precision == "fp16" and kind != "cuda":
        raise InputError("training.precision fp16 scales the loss on CUDA only; use fp32 or bf16 on this device")
    program = choose_program(training.program, device, precision)
    chunk = training.logit_chunk_bytes or {"cpu": 32 << 20, "mps": 512 << 20}.get(kind) or _share_of_memory(device)
    return replace(
        config,
        training={
            "device": device,
            "precision": precision,
            "threads": threads,
            "program": program,
            "logit_chunk_bytes": chunk,
        },
    )


def _share_of_memory(device: str) -> int:
    """A power of two of bytes, a 32nd to a 16th of a CUDA device's: coarse, because it is part of a run's identity."""
    import torch

    return 1 << (int(torch.cuda.get_device_properties(device).total_memory) // 32).bit_length()


def choose_program(wanted: str, device: str, precision: str) -> str:
    """What `auto` means here; InputError for a program that this device does not have."""
    captured = device.startswith("cuda") and precision != "fp16"
    if wanted == "auto":
        return "graph" if captured else "eager"
    if wanted == "graph" and not captured:
        raise InputError(
            "training.program graph needs CUDA and bf16 or fp32 (fp16's loss scale decides on the host); use auto"
        )
    return wanted


def with_vocabulary(config: RunConfig[Any]) -> RunConfig[Any]:
    """A model whose vocabulary the tokenizer will decide, with the size that it is to have; no data is read."""
    if config.model.vocab_size:
        return config
    return replace(config, model={"vocab_size": 257 if config.data.tokenizer == "bytes" else config.data.vocab_size})


def run_id(config: RunConfig[Any], data_checksum: str) -> str:
    """Twelve hex digits over everything that determines a run's numbers: resolved configuration, data and seed."""
    values = config.to_dict()
    values.pop("name")
    text = json.dumps([values, data_checksum], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_plain(options: Any) -> dict[str, Any]:
    """A dataclass of options as plain nested values."""
    kind: Any = type(options)
    plain: dict[str, Any] = _adapter(kind).dump_python(options, mode="json")
    return plain


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes a millisecond to make


def optimizer_name(options: Any) -> str:
    """The registered name of an optimizer's options."""
    return next(name for name, entry in OPTIMIZERS.items() if entry.options is type(options))


def field_names(kind: Any) -> list[str]:
    """Field names of a pydantic model or a dataclass of options; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return list(getattr(kind, "__dataclass_fields__", {}))


def one_line(error: ValidationError, kind: Any, where: str) -> InputError:
    """pydantic's first complaint as one line; a misspelt key names the nearest valid one."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        for part in path[:-1]:
            kind = kind.model_fields[part].annotation if issubclass(kind, BaseModel) else None
        complaint = unknown("key", ".".join(path), [".".join([*path[:-1], name]) for name in field_names(kind)])
        return InputError(f"{where}: {complaint}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    shown = repr(first.get("input"))
    return InputError(f"{where}: {'.'.join(path)} is {shown[:80]}; {first['msg'][0].lower()}{first['msg'][1:]}")
