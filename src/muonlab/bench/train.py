"""Whole training updates: tokens per second, utilisation counted from active FLOPs, forward, backward and optimizer apart."""

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from muonlab.bench.plain import LR, UPDATES, PlainUpdate, check_same_loss
from muonlab.bench.timing import Stopwatch, ratio, spread, synchronize
from muonlab.diagnostics.flops import token_flops
from muonlab.errors import InputError, unknown
from muonlab.models import MODELS, ModelOptions
from muonlab.training import programs
from muonlab.training.config import RunConfig, from_dict, resolve_machine, to_plain
from muonlab.training.config import replace as replace_config

WEIGHT_DECAY, CLIP = 0.1, 1.0
PROGRAMS = ("eager", "compile", "graph")
SIDES = ("muonlab", "plain")


@dataclass(frozen=True)
class Case:
    """A model and the sequences of one update: (in a micro-batch, micro-batches) on a CPU and on CUDA."""

    model: ModelOptions
    cpu: tuple[int, int]
    cuda: tuple[int, int]


_MICRO = replace(MODELS["micro"], vocab_size=2048)
CASES: dict[str, Case] = {
    "tiny": Case(replace(_MICRO, d_model=32, n_layers=2, d_ff=64, seq_len=32, vocab_size=257), (2, 1), (2, 1)),
    "micro": Case(_MICRO, (8, 1), (32, 1)),
    "micro-moe": Case(replace(_MICRO, n_experts=8, top_k=2), (8, 1), (32, 1)),
    "dense-128": Case(MODELS["dense-128"], (4, 1), (32, 1)),
    "dense-128-4k": Case(replace(MODELS["dense-128"], vocab_size=4096), (4, 1), (32, 1)),
    "moe-79m": Case(MODELS["moe-79m"], (2, 1), (24, 4)),
    "moe-107m": Case(MODELS["moe-107m"], (2, 1), (24, 4)),
    "gpt-124m": Case(MODELS["gpt-124m"], (1, 1), (64, 1)),
    "qwen-385m": Case(MODELS["qwen-385m"], (1, 1), (8, 1)),
}


def case_of(name: str) -> Case:
    """A case by name; InputError names the nearest."""
    if name not in CASES:
        raise unknown("model of bench train", name, CASES)
    return CASES[name]


def specs(
    models: Sequence[str],
    wanted: Sequence[str],
    optimizers: Sequence[str],
    device: str,
    threads: int,
    rounds: int,
    updates: int,
) -> list[dict[str, Any]]:
    """What to measure. On a CPU all contestants of a model take turns in one process, because the speed of a shared machine
    drifts; on CUDA each has the device to itself."""
    cuda = device.startswith("cuda")
    for program in wanted:
        if program not in PROGRAMS:
            raise unknown("program", program, PROGRAMS)
    if "graph" in wanted and not cuda:
        raise InputError("--programs graph needs a CUDA device; here eager and compile can run")
    for optimizer in optimizers:
        if optimizer not in LR:
            raise unknown("optimizer of bench train", optimizer, LR)
    found = []
    for model in models:
        case_of(model)
        contestants = [
            {"side": side, "program": program, "optimizer": optimizer}
            for optimizer in optimizers
            for program in wanted
            for side in SIDES
            if not (side == "plain" and program == "graph")
        ]
        groups = [[one] for one in contestants] if cuda else [contestants]
        common = {"model": model, "device": device, "threads": threads, "rounds": rounds, "updates": updates}
        found += [{**common, "contestants": group} for group in groups]
    return found


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The contestants of one group: `{"sizes": ..., "contestants": [row, ...]}`; one that fails gets "failed"."""
    torch.set_num_threads(spec["threads"])
    torch.compiler.reset()
    programs.forget()
    device, case = torch.device(spec["device"]), case_of(spec["model"])
    micro, accumulation = case.cuda if device.type == "cuda" else case.cpu
    options = case.model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(options.vocab_size, (micro * accumulation, options.seq_len + 1), generator=generator)
    tokens = tokens.to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    sides = {contestant["side"] for contestant in spec["contestants"]}
    difference = check_same_loss(options, inputs[:8], targets[:8]) if "plain" in sides else None

    runners: list[Runner] = []
    failures: list[dict[str, Any]] = []
    for contestant in spec["contestants"]:
        try:
            runner = Runner(contestant, options, inputs, targets, accumulation, spec)
            runner.start()
            runners.append(runner)
        except Exception as error:
            text = (str(error).strip() or "no message").splitlines()[0][:200]
            failures.append({**contestant, "failed": f"{type(error).__name__}: {text}"})
    for turn in range(spec["rounds"]):
        for runner in runners if turn % 2 == 0 else reversed(runners):
            runner.turn(spec["updates"])
    count = micro * accumulation * options.seq_len
    return {
        "seq_len": options.seq_len,
        "vocab_size": options.vocab_size,
        "tokens_per_update": count,
        "training_flops_per_token": token_flops(options).training,
        "loss_difference_before": difference,
        "contestants": [runner.row(count, runners) for runner in runners] + failures,
    }


def config_of(
    options: ModelOptions, optimizer: str, program: str, device: str, threads: int, micro: int, accumulation: int
) -> RunConfig[Any]:
    """The run whose updates are timed."""
    values = {
        "model": to_plain(options),
        "optimizer": {"name": optimizer, "lr": LR[optimizer], "weight_decay": WEIGHT_DECAY},
        "schedule": {"warmup": 0.0},
        "training": {
            "updates": UPDATES,
            "micro_batch_size": micro,
            "accumulation": accumulation,
            "clip_norm": CLIP,
            "program": program,
            "device": device,
            "threads": threads,
        },
    }
    return resolve_machine(from_dict(values))


class Runner:
    """One contestant: makes updates and notes what they take."""

    def __init__(
        self,
        contestant: dict[str, str],
        options: ModelOptions,
        inputs: Tensor,
        targets: Tensor,
        accumulation: int,
        spec: dict[str, Any],
    ) -> None:
        self.contestant, self.options, self.inputs, self.targets = contestant, options, inputs, targets
        self.device = inputs.device
        self.micro, self.accumulation, self.spec = len(inputs) // accumulation, accumulation, spec
        self.times: list[float] = []
        self.processor: list[float] = []
        self.made = 0
        self.first: float | None = None
        self.second: float | None = None
        self.peak: int | None = None

    def start(self) -> None:
        """Compile, capture, and once more for the second run of a study."""
        ours = self.contestant["side"] == "muonlab"
        start = time.perf_counter()
        held = 0
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if ours:
            config = config_of(
                self.options,
                self.contestant["optimizer"],
                self.contestant["program"],
                self.spec["device"],
                self.spec["threads"],
                self.micro,
                self.accumulation,
            )
            self.program = programs.take(config)
            self.until_ready()
            self.first = time.perf_counter() - start
            if config.training.program != "eager":
                programs.keep(self.program)
                start = time.perf_counter()
                self.program = programs.take(
                    replace_config(config, seed=2, optimizer={"lr": 0.5 * config.optimizer.lr})
                )
                self.until_ready()
                self.second = time.perf_counter() - start
        else:
            while not self.starts_plain():
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(self.device)
        self.updates(2)
        if self.device.type == "cuda":
            self.peak = self.program.peak_memory() if ours else torch.cuda.max_memory_allocated(self.device) - held

    def starts_plain(self) -> bool:
        """Makes two updates, the second beside the optimizer's state; False, with smaller micro-batches from now on, where
        the device has too little memory (plain PyTorch holds all logits at once)."""
        start = time.perf_counter()
        self.plain = PlainUpdate(self.options, self.contestant, self.device, self.accumulation, WEIGHT_DECAY, CLIP)
        try:
            self.updates(1)
            self.first = time.perf_counter() - start
            self.updates(1)
        except torch.OutOfMemoryError:
            if self.micro == 1:
                raise
            del self.plain
            smaller = max(size for size in range(1, self.micro) if self.micro % size == 0)
            self.micro, self.accumulation = smaller, self.accumulation * self.micro // smaller
            return False
        return True

    def until_ready(self) -> None:
        update = self.program.update
        self.updates(1)
        while not update.ready:
            self.updates(1)

    def one(self) -> Tensor:
        self.made += 1
        if self.contestant["side"] == "plain":
            return self.plain(self.inputs, self.targets)
        return self.program.update(self.made - 1, self.inputs, self.targets, None)[0]

    def updates(self, count: int) -> float:
        """Seconds per update."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            loss = self.one()
        synchronize(self.device)
        seconds = (time.perf_counter() - start) / count
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of update {self.made} is {loss.item()}: nothing worth timing")
        return seconds

    def turn(self, count: int) -> None:
        start = time.process_time()
        self.times.append(self.updates(count))
        self.processor.append((time.process_time() - start) / count)

    def ran(self) -> tuple[str, str | None]:
        """The program that really ran, and why another than the one asked for."""
        if self.contestant["side"] == "plain":
            return self.contestant["program"], None
        return self.program.update.program, self.program.update.notice

    def split(self, repeats: int = 5) -> dict[str, float] | None:
        """Milliseconds of forward, backward and optimizer (clipping included), medians; from updates of their own."""
        watch = Stopwatch(self.device)
        update: Any = self.plain if self.contestant["side"] == "plain" else self.program.update
        update.on_phase = watch
        seen: list[dict[str, float]] = []
        try:
            if self.ran()[0] == "graph":
                update.recapture()
                while self.ran()[0] == "graph" and not update.captured:
                    watch.marks.clear()
                    self.one()
            for _ in range(repeats):
                if self.ran()[0] != "graph":  # the marks of a graph are written by its replay
                    watch.marks.clear()
                self.one()
                seen.append(watch.read())
        finally:
            update.on_phase = None
        return {phase: statistics.median(times[phase] for times in seen) for phase in seen[0]}

    def row(self, tokens: int, all_: "list[Runner]") -> dict[str, Any]:
        program, notice = self.ran()
        peer = next((other for other in all_ if other.is_peer_of(self)), None)
        ours = self.contestant["side"] == "muonlab"
        try:
            split, split_failed = self.split(), None
        except Exception as error:  # events inside a graph need a recent driver
            split, split_failed = None, (str(error).strip() or "no message").splitlines()[0][:160]
        return {
            **self.contestant,
            "micro_batch_size": self.micro,
            "accumulation": self.accumulation,
            "asked": self.contestant["program"],
            "program": program,
            "notice": notice,
            "seconds_per_update": spread(self.times),
            "tokens_per_second": tokens / statistics.median(self.times),
            "split_ms": split,
            "split_failed": split_failed,
            "first_update_ready_seconds": self.first,
            "second_run_ready_seconds": self.second,
            "peak_bytes": self.peak,
            "ratio_to_plain": ratio(self.times, peer.times) if ours and peer else None,
            "processor_ratio_to_plain": ratio(self.processor, peer.processor) if ours and peer else None,
        }

    def is_peer_of(self, other: "Runner") -> bool:
        """Whether this is the plain loop of the same program and optimizer."""
        same = all(self.contestant[name] == other.contestant[name] for name in ("program", "optimizer"))
        return same and self.contestant["side"] == "plain"


def with_utilisation(result: dict[str, Any], rates: dict[str, float], stated: float | None) -> list[dict[str, Any]]:
    """The contestants of one result as rows of their own, with their share of the measured and the stated rate of products."""
    if "failed" in result:
        base = {name: result[name] for name in ("model", "device", "threads")}
        return [{**base, **contestant, "failed": result["failed"]} for contestant in result["contestants"]]
    rest = {name: value for name, value in result.items() if name != "contestants"}
    rows = []
    for contestant in result["contestants"]:
        row = {**rest, **contestant}
        if "failed" not in row:
            flops = row["training_flops_per_token"] * row["tokens_per_second"]
            row["mfu_of_measured"] = flops / rates["matmul_flops_per_second"]
            row["mfu_of_stated"] = flops / stated if stated else None
        rows.append(row)
    return rows
