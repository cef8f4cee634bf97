"""One run from its first update to its last: data, schedule, updates, evaluation, checkpoints, divergence, clean stop."""

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from muonlab.data import Dataset, batch
from muonlab.errors import InputError
from muonlab.training import checkpoint, programs
from muonlab.training.config import RunConfig, optimizer_name, run_id
from muonlab.training.evaluation import Evaluator
from muonlab.training.resolve import resolve
from muonlab.training.tracking import (
    RunDirectory,
    history,
    read_run,
    stored_run_id,
    versions,
    write_json,
)
from muonlab.training.update import SCALARS

READ_EVERY = 20
"""Updates between two looks at what an accelerator has computed."""

Event = Callable[[dict[str, Any]], None]
"""Called with every row of metrics.jsonl as it is written, with a `directory` besides."""


def run(
    config: RunConfig[Any],
    root: str | Path = "runs",
    *,
    directory: str | Path | None = None,
    fallback: bool = False,
    allow_version_change: bool = False,
    progress: bool = False,
    on_event: Event | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train one run and return its `metrics.json` with its `directory`.

    The directory is `root/name-runid` unless given. Running a run again resumes it at its last checkpoint, bit for bit,
    or finds it finished. Status is finished, diverged, or interrupted: `should_stop` is asked after each update, and
    `with interruptible() as stop: run(..., should_stop=stop.is_set)` makes Ctrl-C a clean stop.
    Raises InputError for bad input, a directory of another run, another process on the same one, or a full disk.
    """
    config, dataset = resolve(config, fallback=fallback, progress=progress)
    if config.training.device.startswith("cuda:"):
        torch.cuda.set_device(config.training.device)  # kernels are launched on the current one
    identity = run_id(config, dataset.checksum)
    path = Path(directory) if directory is not None else Path(root) / f"{config.name}-{identity}"
    files = RunDirectory(path, identity)
    threads = torch.get_num_threads()
    try:
        done = finished(path, identity)
        if done is not None:
            return done
        torch.set_num_threads(config.training.threads)
        program = programs.take(config)
        loop = Loop(config, dataset, identity, files, on_event, program)
        metrics = loop.train(should_stop or (lambda: False), allow_version_change)
        programs.keep(program, sound=metrics["status"] != "diverged")
        return metrics
    except torch.OutOfMemoryError:
        programs.forget()
        raise
    finally:
        torch.set_num_threads(threads)
        files.close()


def finished(path: Path, identity: str) -> dict[str, Any] | None:
    """The metrics of the run `identity` at `path` when nothing is left to do there."""
    if not (path / "metrics.json").exists() or stored_run_id(path) != identity:
        return None
    metrics = read_run(path)
    return metrics if metrics["status"] in ("finished", "diverged") else None


class Loop:
    """The state of one run in progress."""

    def __init__(
        self,
        config: RunConfig[Any],
        dataset: Dataset,
        identity: str,
        files: RunDirectory,
        on_event: Event | None,
        program: programs.Program,
    ) -> None:
        self.config, self.dataset, self.identity, self.files, self.on_event = config, dataset, identity, files, on_event
        training = config.training
        self.sequences = training.accumulation * training.micro_batch_size
        self.device = torch.device(training.device)
        self.program = program
        self.model, self.optimizer, self.update = program.model, program.optimizer, program.update
        self.routing = program.routing
        self.evaluators = [
            Evaluator(dataset, split, config.model.seq_len, training.eval_tokens, training.micro_batch_size, self.chunk)
            for split in training.eval_splits
        ]
        self.made = 0  # updates made
        self.timed = 0  # those of them whose time counts as training
        self.seconds = {"training": 0.0, "compilation": 0.0, "evaluation": 0.0, "other": 0.0}
        self.pending: list[torch.Tensor] = []
        self.rows: list[dict[str, Any]] = []

    @property
    def chunk(self) -> int:
        return self.config.training.logit_chunk_bytes

    def train(self, should_stop: Callable[[], bool], allow_version_change: bool) -> dict[str, Any]:
        self.resume(allow_version_change)
        self.files.write_config(self.config.to_dict(), self.identity)
        self.rows = self.files.start(self.made)
        status, message = "finished", None
        if not self.rows:
            self.evaluate()
        self.write_metrics("running", None)
        training = self.config.training
        while self.made < training.updates:
            message = self.one_update()
            if message is not None:
                status = "diverged"
                break
            last = self.made == training.updates
            stop = not last and should_stop()
            evaluates = last or self.made % training.eval_every == 0
            saves = not last and (stop or self.made % training.checkpoint_every == 0)
            if evaluates or saves:
                message = self.read_pending(time.perf_counter())
                if message is not None:
                    status = "diverged"
                    break
            if evaluates:
                self.evaluate()
            if saves:
                self.save()
            if stop:
                status, message = "interrupted", f"stopped after update {self.made}; run it again to go on"
                break
        if status == "finished":
            checkpoint.save_weights(self.files.path, self.model)
        metrics = self.write_metrics(status, message)
        if status != "interrupted":
            (self.files.path / checkpoint.NAME).unlink(missing_ok=True)
        return {**metrics, "directory": str(self.files.path)}

    def one_update(self) -> str | None:
        """Make update number `self.made` and keep what it saw; say why the run has diverged if it has.

        On an accelerator the host runs ahead: what updates saw is read a few at a time.
        """
        start = time.perf_counter()
        clock = "training" if self.update.ready else "compilation"
        inputs, targets, ids = batch(
            self.dataset.train, self.config.model.seq_len, self.sequences, self.config.seed, self.made
        )
        result = self.update(
            self.made, self.to_device(inputs), self.to_device(targets), None if ids is None else self.to_device(ids)
        )
        self.pending.append(result)
        self.made += 1
        self.timed += clock == "training"
        if clock == "compilation" or self.device.type == "cpu" or len(self.pending) == READ_EVERY:
            return self.read_pending(start, clock)
        self.seconds["training"] += time.perf_counter() - start
        return None

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def read_pending(self, start: float, clock: str = "training") -> str | None:
        """Wait for the updates that were not read yet, count the time since `start`, and record them."""
        if not self.pending:
            return None
        values = torch.stack(self.pending).tolist()  # waits for the device, so the clock is true
        self.seconds[clock] += time.perf_counter() - start
        first = self.made - len(self.pending)
        self.pending = []
        past = self.rows[-1]["seconds"] if self.rows else 0.0
        for index, row in enumerate(values, 1):
            loss, objective, grad_norm = row[: len(SCALARS)]
            update = first + index
            self.record(
                {
                    "kind": "train",
                    "update": update,
                    "tokens": update * self.config.tokens_per_update,
                    "loss": loss,
                    "objective": objective,
                    "lr": dict(zip(self.update.kinds, row[len(SCALARS) :], strict=True)),
                    "grad_norm": grad_norm,
                    "seconds": past + (self.seconds["training"] - past) * index / len(values),
                }
            )
            bound = self.config.training.divergence_bound
            if not math.isfinite(loss) or loss > bound:
                self.made = update
                return f"loss {loss:.4g} at update {update} (bound {bound:g} nats)"
            if not math.isfinite(grad_norm) and self.config.training.precision != "fp16":
                self.made = update
                return f"gradient norm {grad_norm} at update {update}"
        return None

    def evaluate(self) -> None:
        start = time.perf_counter()
        for evaluator in self.evaluators:
            values = evaluator(self.model, self.update.precision)
            clock = {"update": self.made, "tokens": self.made * self.config.tokens_per_update}
            self.record({"kind": "eval", **clock, "seconds": self.seconds["training"], **values})
        self.seconds["evaluation"] += time.perf_counter() - start

    def record(self, row: dict[str, Any]) -> None:
        self.files.append(row)
        self.rows.append(row)
        if self.on_event is not None:
            self.on_event({"directory": str(self.files.path), **row})

    def save(self) -> None:
        start = time.perf_counter()
        state = {
            "run_id": self.identity,
            "code": versions()["code"],
            "update": self.made,
            "seconds": dict(self.seconds),
            "timed": self.timed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.update.precision.scaler.state_dict(),
        }
        checkpoint.save(self.files.path, state)
        self.write_metrics("running", None)
        self.seconds["other"] += time.perf_counter() - start

    def resume(self, allow_version_change: bool) -> None:
        state = checkpoint.load(self.files.path, self.config.training.device)
        if state is None:
            return
        if state["run_id"] != self.identity:
            raise InputError(
                f"{self.files.path / checkpoint.NAME} belongs to run {state['run_id']}, not {self.identity}"
            )
        if state["code"] != versions()["code"] and not allow_version_change:
            raise InputError(
                f"{self.files.path} was begun by another version of the code ({state['code']}, this is "
                f"{versions()['code']}); delete it, or resume with --allow-version-change"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update.precision.scaler.load_state_dict(state["scaler"])
        self.update.recapture()
        self.made, self.timed, self.seconds = state["update"], state["timed"], dict(state["seconds"])

    def write_metrics(self, status: str, message: str | None) -> dict[str, Any]:
        config, dataset = self.config, self.dataset
        past = history(self.rows)
        chosen_split = config.training.eval_splits[0]
        evaluations = [row for row in past["eval"] if row["split"] == chosen_split]
        best = min(evaluations, key=lambda row: row["cross_entropy"], default=None)
        final = {row["split"]: row for row in past["eval"]}  # the last row of each split
        tokens = self.made * config.tokens_per_update
        speed = self.timed / self.seconds["training"] if self.seconds["training"] else 0.0
        metrics = {
            "schema": 1,
            "run_id": self.identity,
            "name": config.name,
            "optimizer": optimizer_name(config.optimizer),
            "status": status,
            "message": message,
            "seed": config.seed,
            "config": config.to_dict(),
            "routing": self.routing,
            "versions": versions(),
            "data": {**dataset.describe(), "epochs": tokens / max(1, len(dataset.train.tokens))},
            "program": self.update.program,
            "program_notice": self.update.notice,
            "device": device_name(self.device),
            "threads": config.training.threads,
            "parameters": self.parameter_counts(),
            "history": past,
            "updates": self.made,
            "tokens": tokens,
            "seconds": {**self.seconds, "wall": sum(self.seconds.values())},
            "updates_per_second": speed,
            "tokens_per_second": speed * config.tokens_per_update,
            "peak_memory_bytes": self.program.peak_memory() if self.device.type == "cuda" else resident_memory(),
            "final": final,
            "best": {"update": best["update"], "cross_entropy": best["cross_entropy"]} if best else None,
            "updates_to_best": best["update"] if best else None,
        }
        write_json(self.files.path / "metrics.json", metrics, indent=None)
        return metrics

    def parameter_counts(self) -> dict[str, int]:
        counts = {"total": sum(p.numel() for p in self.model.parameters())}
        for row in self.routing:
            counts[row["kind"]] = counts.get(row["kind"], 0) + math.prod(row["shape"])
        return counts


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resident_memory() -> int:
    """Largest resident memory of this process so far in bytes; it may have made other runs before."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
