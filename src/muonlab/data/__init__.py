"""Text to batches: corpora, tokenizers, memory-mapped shards, and an order that is a pure function of (seed, update)."""

from typing import TYPE_CHECKING

from muonlab.lazy import lazily

if TYPE_CHECKING:
    from muonlab.data.build import prepare
    from muonlab.data.cache import cache_home
    from muonlab.data.corpora import CORPORA
    from muonlab.data.options import DataOptions
    from muonlab.data.order import batch, evaluation_windows
    from muonlab.data.shards import Dataset, Shard, cached_datasets

_MODULES = {
    "prepare": "muonlab.data.build",
    "cache_home": "muonlab.data.cache",
    "CORPORA": "muonlab.data.corpora",
    "DataOptions": "muonlab.data.options",
    "batch": "muonlab.data.order",
    "evaluation_windows": "muonlab.data.order",
    "Dataset": "muonlab.data.shards",
    "Shard": "muonlab.data.shards",
    "cached_datasets": "muonlab.data.shards",
}
__getattr__, __dir__ = lazily(__name__, _MODULES)

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
