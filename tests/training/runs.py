"""Small runs for tests: two layers of 32 on pydoc, a fraction of a second for ten updates."""

from typing import Any

from muonlab.training.config import RunConfig, from_dict, merge

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"preset": "micro", "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "seq_len": 32},
    "data": {"corpus": "pydoc", "tokenizer": "bytes"},
    "optimizer": {"name": "muon", "lr": 0.02},
    "training": {
        "updates": 8,
        "micro_batch_size": 4,
        "eval_every": 4,
        "eval_tokens": 512,
        "checkpoint_every": 2,
        "threads": 1,
        "device": "cpu",
    },
}


def tiny(**changes: Any) -> RunConfig[Any]:
    """The tiny run with nested changes: `tiny(seed=2, training={"updates": 3})`."""
    return from_dict(merge(TINY, changes))


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what differs between two identical runs: clocks, memory, the folder, the command."""
    kept = {
        k: v
        for k, v in metrics.items()
        if k not in ("seconds", "updates_per_second", "tokens_per_second", "peak_memory_bytes", "directory", "versions")
    }
    rows = {
        kind: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        for kind, rows in kept["history"].items()
    }
    final = {split: {k: v for k, v in row.items() if k != "seconds"} for split, row in kept["final"].items()}
    return {**kept, "history": rows, "final": final}
