"""A benchmark from its arguments to its result: measured row by row, printed, written after every row, drawn at the end."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from muonlab.bench import profile, step, tables, train
from muonlab.bench.figure import Point, draw_roofline
from muonlab.bench.floor import training_work
from muonlab.bench.machine import describe, device_of, measure_rates
from muonlab.bench.peers import PEERS
from muonlab.bench.rows import ROW_S, Measure, rows
from muonlab.errors import InputError
from muonlab.training.loop import READ_EVERY
from muonlab.training.tracking import write_json

Finish = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""What is measured -> the rows of the result."""
SCHEMA = 1
STEP_S = 100.0
"""Seconds for one optimizer on one set where `run_all`, which has little time for many rows, measures it."""
BUDGET_S = 480.0
"""Seconds in which `run_all` ends on a GPU; rows that would begin later are left out and say so."""


class Session:
    """What all rows of one call share: device, threads, the measured rates, the file.

    Args:
        device, threads: where to measure; 0 threads are torch's own number.
        output: JSON file (a PNG beside it has its name), or None to print alone.
        quick: rates from small tensors, for trying it out.
        say: takes lines and tables to print.
        budget_s: no row begins later than so many seconds after the first.
    """

    def __init__(
        self,
        benchmark: str,
        device: str,
        threads: int,
        output: Path | None,
        *,
        quick: bool,
        say: Callable[[Any], object],
        budget_s: float = float("inf"),
    ) -> None:
        self.device, self.output, self.say = device_of(device), output, say
        if threads < 0:
            raise InputError(f"--threads is {threads}; it must be 0 (torch's own number) or more")
        self.threads = threads or torch.get_num_threads()
        if output is not None:
            check_writable(output)
        self.isolate = self.device.type == "cuda"
        self.end = time.monotonic() + budget_s
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            **describe(self.device, self.threads),
            "rates": None,
            "rows": [],
        }
        self.quick = quick
        self.rates: dict[str, float] = {}

    def begin(self) -> None:
        """Measure what the machine can do, and say what it is. Names are checked before."""
        spec = {"device": str(self.device), "threads": self.threads, "quick": self.quick}
        (measured,) = rows(measure_rates, [spec], isolate=self.isolate)
        if "failed" in measured:
            raise InputError(f"{self.device} cannot be measured: {measured['failed']}")
        self.rates = {name: value for name, value in measured.items() if name not in spec}
        self.result["rates"] = self.rates
        self.say(tables.heading(self.result))

    def rows(
        self, measure: Measure, specs: Sequence[dict[str, Any]], limit_s: float, finish: Finish
    ) -> list[dict[str, Any]]:
        """Measured rows, each announced and, as `finish` makes it, in the file before the next one begins."""
        found = []
        for row in rows(measure, specs, isolate=self.isolate, limit_s=limit_s, deadline=self.end):
            what = [str(row[key]) for key in ("set", "model", "peer", "program", "optimizer") if key in row]
            outcome = row.get("failed") or row.get("skipped")
            self.say(f"  {' '.join(what)}{': ' + outcome if outcome else ''}")
            new = finish(row)
            self.result["rows"] += new
            if self.output is not None:
                write_json(self.output, self.result)
            found += new
        return found

    def draw(self, points: Sequence[Point]) -> None:
        if self.output is None or not points:
            return
        picture = self.output.with_suffix(".png")
        title = f"{self.result['benchmark']} on {self.result['device']}, {self.result['date']}"
        draw_roofline(picture, points, self.rates, title)
        self.say(f"{self.output}\n{picture}")


def run_step(
    session: Session, sets: Sequence[str], names: Sequence[str], repeats: int, limit_s: float = ROW_S
) -> list[dict[str, Any]]:
    """Every named optimizer on every named set: the rows, printed and written."""
    device = str(session.device)
    found: list[dict[str, Any]] = []
    step.specs(sets, names, device, session.threads, repeats)
    session.begin()
    for one in sets:
        specs = step.specs([one], names, device, session.threads, repeats)
        new = session.rows(step.measure, specs, limit_s, lambda row: [step.with_floor(row, session.rates)])
        session.say(tables.step_table(one, new))
        found += new
    session.draw(step_points(found))
    return found


def run_train(
    session: Session,
    models: Sequence[str],
    wanted: Sequence[str],
    optimizers: Sequence[str],
    rounds: int,
    updates: int,
) -> list[dict[str, Any]]:
    """Whole updates of every named model: the rows, printed and written. On a GPU compilers find empty caches for every row, so
    that the time until the first update is that of a new machine."""
    arguments = (wanted, optimizers, str(session.device), session.threads, rounds, updates)
    train.specs(models, *arguments)
    session.begin()
    found: list[dict[str, Any]] = []
    peak = session.result["stated_peak_flops"]
    for model in models:
        new: list[dict[str, Any]] = []
        for spec in train.specs([model], *arguments):
            with empty_caches() if session.isolate else contextlib.nullcontext():
                new += session.rows(
                    train.measure, [spec], ROW_S, lambda row: train.with_utilisation(row, session.rates, peak)
                )
        session.say(tables.train_table(model, new))
        found += new
    session.draw(train_points(found))
    return found


def run_profile(
    session: Session, models: Sequence[str], wanted: Sequence[str], optimizers: Sequence[str], updates: int
) -> list[dict[str, Any]]:
    """The kernels of one update of every named model: the rows, printed and written."""
    specs = profile.specs(models, wanted, optimizers, str(session.device), session.threads, updates)
    session.begin()
    found = session.rows(profile.measure, specs, ROW_S, lambda row: [row])
    for row in found:
        session.say(tables.profile_table(row))
    session.draw(profile_points(found))
    return found


def run_all(device: str, threads: int, folder: Path, *, quick: bool, say: Callable[[Any], object]) -> list[Path]:
    """The whole table of `docs/performance.md` in one call, within eight minutes on a GPU, the most important rows first.

    Each part has a file of its own in `folder`. A part that fails leaves the others alone.
    """
    cuda = device_of(device).type == "cuda"
    written = []
    start = time.monotonic()
    known = [name for name in PEERS if name != "compiled-stack"]  # which compiles for a minute and loses
    ours = ["graph"] if cuda else ["eager"]
    sets = ["tiny"] if quick else ["moe-79m", "qwen-0.5b", "llama-1b", "gpt-124m", "nanochat-d20"]
    models = ["tiny"] if quick else ["moe-79m", "dense-128", "dense-128-4k", "gpt-124m"]
    repeats, rounds, updates = (3, 2, 1) if quick or not cuda else (30, 5, READ_EVERY)
    fewer = min(updates, 5)  # an update of plain PyTorch takes far longer
    parts: list[tuple[str, Callable[[Session], object]]] = [
        ("step", lambda s: run_step(s, sets[:3], known, repeats, STEP_S)),
        ("train", lambda s: run_train(s, models, ours, ["muon"], rounds, updates)),
        ("train_peers", lambda s: run_train(s, models, ["eager", "compile"], ["adamw"], rounds, fewer)),
        ("profile", lambda s: run_profile(s, models[:1], ours, ["muon"], 3)),
    ]
    if sets[3:]:
        parts.append(("step_more", lambda s: run_step(s, sets[3:], known, repeats, STEP_S)))
    for name, call in parts:
        left = BUDGET_S - (time.monotonic() - start)
        if left <= 0:
            say(f"{name}: not begun, the {BUDGET_S:.0f} s of this call are used up")
            continue
        output = folder / f"{name}.json"
        try:
            call(Session(name, device, threads, output, quick=quick, say=say, budget_s=left))
        except Exception as error:
            say(f"{name} failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
            continue
        written.append(output)
    return written


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Compiled code of earlier processes is not found, and that of this block not kept."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="muonlab-bench-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value


def check_writable(output: Path) -> None:
    """InputError, before anything is measured, for a place that cannot take the result."""
    if output.suffix != ".json":
        raise InputError(f"--output is {output}; the result is a JSON file, so give it a name that ends in .json")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output.parent}: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"the folder {output.parent} is not writable; choose another --output")


def step_points(found: Sequence[dict[str, Any]]) -> list[Point]:
    return [
        Point(
            f"{row['set']} {row['peer']}",
            row["floor_flops"] / row["floor_bytes"],
            row["floor_flops"] / (1e-3 * row["gradients_stay"]["alone_ms"]["median"]),
        )
        for row in found
        if row.get("gradients_stay") and row["rule"] == "muon"
    ]


def train_points(found: Sequence[dict[str, Any]]) -> list[Point]:
    points = []
    for row in found:
        if "failed" in row or "skipped" in row:
            continue
        work = training_work(train.case_of(row["model"]).model, row["tokens_per_update"])
        label = f"{row['model']} {row['side']} {row['program']} {row['optimizer']}"
        points.append(Point(label, work.intensity, work.flops / row["seconds_per_update"]["median"]))
    return points


def profile_points(found: Sequence[dict[str, Any]]) -> list[Point]:
    points = []
    for row in found:
        if "failed" in row:
            continue
        work = training_work(train.case_of(row["model"]).model, row["tokens_per_update"])
        label = f"{row['model']} {row['program']} {row['optimizer']}, under the profiler"
        points.append(Point(label, work.intensity, 1e3 * work.flops / row["wall_ms"]))
    return points
