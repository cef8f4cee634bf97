"""A run's directory of plain files: written by the loop, read by everything that judges or draws."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import numpy
import tomli_w

import muonlab
from muonlab.errors import InputError
from muonlab.files import replacing

RUN_HEADER = "# muonlab run "
"""How the config.toml of a run begins; its id follows."""
ROOMS_THAT_DECIDE = ("optim", "models", "data", "training")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it: a crash leaves the old file or the new one."""
    try:
        with replacing(path) as temporary:
            write(temporary)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """`value` as JSON at `path`, atomically. Without `indent` it is one line, written ten times faster."""
    text = to_json(value) if indent is None else json.dumps(finite(value), indent=indent, allow_nan=False)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def to_json(value: Any) -> str:
    """`value` as one line of JSON. Numbers that are not finite become null: JSON has none."""
    try:
        return _encode(value)
    except ValueError:
        return _encode(finite(value))


_encode = json.JSONEncoder(allow_nan=False).encode


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@cache
def versions() -> dict[str, str]:
    """Versions of what made the numbers; `code` is a digest of the rooms that decide them."""
    import torch  # takes seconds: reading runs does without it

    root = Path(muonlab.__file__).parent
    digest = hashlib.sha256()
    for room in ROOMS_THAT_DECIDE:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return {
        "muonlab": muonlab.__version__,
        "code": digest.hexdigest()[:12],
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "argv": " ".join(["muonlab", *sys.argv[1:]]) if Path(sys.argv[0]).name == "muonlab" else "",
    }


class RunInProgress(InputError):
    """Another process is working on the run."""


class RunDirectory:
    """The files of one run. Opening it takes a lock: a second process on the same run is refused.

    `metrics.jsonl` is append-only, a JSON object a line; `resume` cuts it back to the checkpoint's update.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run directory {path}: {error.strerror}") from None
        stored_run_id(path)  # leaves a folder of something else without so much as a lock in it
        if not os.access(path, os.W_OK):
            raise InputError(f"the run directory {path} is not writable; choose another with --output")
        self._lock = filelock.FileLock(path / "run.lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunInProgress(f"another process is working on the run {path}; wait for it or stop it") from None
        except OSError as error:
            raise InputError(f"cannot lock the run directory {path}: {error.strerror}") from None
        found = stored_run_id(path)
        if found is not None and found != run_id:
            self._lock.release()
            raise InputError(f"{path} holds another run ({found}, this is {run_id}); choose another --output")
        self._rows: Any = None

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        self._lock.release()

    def write_config(self, config: dict[str, Any], run_id: str) -> None:
        text = f"{RUN_HEADER}{run_id}\n{tomli_w.dumps(without_none(config))}"
        replace_file(self.path / "config.toml", lambda file: file.write_text(text, encoding="utf-8"))

    def start(self, update: int) -> list[dict[str, Any]]:
        """The rows up to `update`, kept in the file; later ones, half a line included, are cut off."""
        rows = [row for row in read_rows(self.path) if row["update"] <= update]
        if update == 0:
            rows = []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        replace_file(self.path / "metrics.jsonl", lambda file: file.write_text(text, encoding="utf-8"))
        self._rows = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        return rows

    def append(self, row: dict[str, Any]) -> None:
        try:
            self._rows.write(to_json(row) + "\n")
            self._rows.flush()
        except OSError as error:
            raise InputError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None


def without_none(value: Any) -> Any:
    """Nested values without keys whose value is None: TOML has none, and the defaults bring them back."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def stored_run_id(path: Path) -> str | None:
    """The id of the run that `path` holds, None for a folder without one; InputError for a folder of something else."""
    try:
        first = (path / "config.toml").read_text(encoding="utf-8").split("\n", 1)[0]
    except FileNotFoundError:
        strangers = [entry.name for entry in path.iterdir() if entry.name != "run.lock"]
        if strangers:
            raise InputError(
                f"{path} is not empty and holds no run ({strangers[0]}); choose another --output"
            ) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path / 'config.toml'}: {error}") from None
    if not first.startswith(RUN_HEADER):
        raise InputError(f"{path / 'config.toml'} does not begin with '{RUN_HEADER}ID': no run, or one that was edited")
    return first.removeprefix(RUN_HEADER).strip()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a last line cut off by a crash is left out, damage elsewhere is an InputError."""
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path / 'metrics.jsonl'}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if row["kind"] in ("train", "eval") and isinstance(row["update"], int):
                yield row
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):  # no newline behind it: the write was cut off
                return
            raise InputError(
                f"{path / 'metrics.jsonl'} is damaged at line {number}; delete the run or restore it"
            ) from None


def read_run(path: str | Path) -> dict[str, Any]:
    """A run's `metrics.json`, with the history of a newer `metrics.jsonl` for a run that is not finished.

    Raises InputError with one line for a directory that holds no run or a damaged one.
    """
    path = Path(path)
    try:
        metrics: dict[str, Any] = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} holds no metrics.json: not a run, or one that never reached a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path / 'metrics.json'} is damaged; run it again or delete it") from None
    except OSError as error:
        raise InputError(f"cannot read {path / 'metrics.json'}: {error.strerror}") from None
    needed = {"status", "history", "config", "seconds", "data", "versions", "seed", "updates"}
    if not isinstance(metrics, dict) or not needed <= set(metrics):
        raise InputError(f"{path / 'metrics.json'} is not the record of a run; delete it")
    if metrics["status"] != "finished":
        metrics["history"] = history(list(read_rows(path)))
    metrics["directory"] = str(path)
    return metrics


def history(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of `metrics.jsonl` by kind."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for row in rows:
        kinds[row["kind"]].append({key: value for key, value in row.items() if key != "kind"})
    return kinds


def find_runs(root: str | Path) -> list[Path]:
    """Every run directory at or below `root`, sorted."""
    return sorted(file.parent for file in Path(root).rglob("config.toml") if _holds_run(file))


def _holds_run(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(RUN_HEADER)) == RUN_HEADER.encode()


def delete_run(path: Path) -> None:
    """Delete a run directory; InputError for a folder that is none, or one that a process is working on."""
    identity = stored_run_id(path) if path.is_dir() else None
    if identity is None:
        raise InputError(f"{path} holds no run; muonlab runs list shows them")
    RunDirectory(path, identity).close()  # refuses a run that is in progress
    shutil.rmtree(path)


def disk_bytes(path: Path) -> int:
    """Bytes of all files at or below `path`."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
