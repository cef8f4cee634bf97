"""What a configuration means here: the data it names, and every `auto` decided. Needs torch only where it asks torch."""

from typing import Any

from muonlab.data import Dataset, prepare
from muonlab.data.order import window_count
from muonlab.errors import InputError
from muonlab.training.config import RunConfig, replace, resolve_machine


def resolve(
    config: RunConfig[Any], *, fallback: bool = False, progress: bool = True, dataset: Dataset | None = None
) -> tuple[RunConfig[Any], Dataset]:
    """The concrete run: data prepared, the model's vocabulary the tokenizer's, every `auto` decided.

    `dataset` is that of the configuration's data where it is open already.
    With `fallback`, the default corpus is replaced by `pydoc` where nothing can be downloaded, and the notice kept.
    """
    config = resolve_machine(config)
    dataset = dataset or prepare(config.data, progress=progress, fallback=fallback)
    if config.model.vocab_size not in (0, dataset.vocab_size) and config.model.vocab_size < dataset.vocab_size:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {dataset.vocab_size}; use 0 to follow it"
        )
    for split in ("train", *config.training.eval_splits):
        windows = window_count(dataset.split(split), config.model.seq_len)  # an InputError now, not in mid-run
        sequences = config.training.accumulation * config.training.micro_batch_size
        if split == "train" and sequences > windows:
            raise InputError(
                f"an update of {sequences} sequences is more than an epoch of this text ({windows} windows)"
            )
    vocab_size = config.model.vocab_size or dataset.vocab_size
    return replace(config, model={"vocab_size": vocab_size}, data={"corpus": dataset.corpus}), dataset
