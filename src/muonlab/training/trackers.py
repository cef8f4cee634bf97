"""Sends a run's rows to an experiment tracker as they are written; the run's own files stay the record."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from muonlab.errors import InputError, unknown

TRACKERS = {
    "tensorboard": "event files beside the run, for tensorboard --logdir",
    "trackio": "a local dashboard, trackio show",
    "wandb": "Weights & Biases; WANDB_MODE=offline needs no account",
}
"""Names and one-line summaries; each needs its own extra, muonlab[NAME]."""

Row = dict[str, Any]


@contextlib.contextmanager
def tracker(name: str, project: str, config: dict[str, Any], upload: bool = False) -> Iterator[Callable[[Row], None]]:
    """A function that sends rows of metrics.jsonl (with their run's `directory`) to the tracker `name`.

    The tracker's own trouble (no network, a full quota) is one line on stderr and ends the sending, never the run. With
    `upload` the finished model goes to wandb as an artifact. InputError for an unknown or missing tracker.
    """
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise InputError(f"the tracker {name} is not installed; pip install 'muonlab[{name}]'") from None
    if upload and name != "wandb":
        raise InputError(f"checkpoints are uploaded to wandb, not to {name}; leave --upload-checkpoints out")
    session = _Session(name, library, project, config)
    try:
        yield session.send
    finally:
        session.close(upload)


def scalars(row: Row) -> dict[str, float]:
    """A row's numbers by name: train/loss, lr/hidden, tune/cross_entropy, ..."""
    if row["kind"] == "eval":
        names = ("cross_entropy", "bits_per_byte", "perplexity", "accuracy")
        found = {f"{row['split']}/{key}": row[key] for key in names}
    else:
        found = {f"train/{key}": row[key] for key in ("loss", "objective", "grad_norm")}
        found |= {f"lr/{kind}": rate for kind, rate in row["lr"].items()}
    return {key: value for key, value in found.items() if value is not None}


class _Session:
    """The tracker's run, begun with the first row: only then is it known where the run lies."""

    def __init__(self, name: str, library: Any, project: str, config: dict[str, Any]) -> None:
        self.name, self.library, self.project, self.config = name, library, project, config
        self.run: Any = None
        self.directory: Path | None = None
        self.broken = False

    def send(self, row: Row) -> None:
        if self.broken:
            return
        with self._forgiving():
            if self.run is None:
                self.directory = Path(row["directory"])
                if self.name == "tensorboard":
                    self.run = self.library.SummaryWriter(str(self.directory / "tensorboard"))
                else:
                    own = {"dir": str(self.directory)} if self.name == "wandb" else {}
                    options = {"project": self.project, "name": self.directory.name, "config": self.config, **own}
                    self.run = self.library.init(**options)
            if self.name == "tensorboard":
                for key, value in scalars(row).items():
                    self.run.add_scalar(key, value, row["update"])
            else:
                self.library.log(scalars(row), step=row["update"])

    def close(self, upload: bool) -> None:
        if self.run is None or self.broken:
            return
        with self._forgiving():
            if self.name == "tensorboard":
                self.run.close()
                return
            if upload and self.directory is not None and (self.directory / "model.safetensors").exists():
                artifact = self.library.Artifact(self.directory.name, type="model")
                artifact.add_file(str(self.directory / "model.safetensors"))
                self.run.log_artifact(artifact)
            self.library.finish()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.broken = True
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"muonlab: {self.name} takes no more rows ({text}); the run goes on", file=sys.stderr)
