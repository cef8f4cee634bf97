"""Text to batches: corpora, tokenizers, memory-mapped shards, and an order that is a pure function of (seed, update)."""

from muonlab.data.build import prepare
from muonlab.data.cache import cache_home
from muonlab.data.corpora import CORPORA
from muonlab.data.options import DataOptions
from muonlab.data.order import batch, evaluation_windows
from muonlab.data.shards import Dataset, Shard, cached_datasets

__all__ = [
    "CORPORA",
    "DataOptions",
    "Dataset",
    "Shard",
    "batch",
    "cache_home",
    "cached_datasets",
    "evaluation_windows",
    "prepare",
]
