"""The laboratory's transformer, its presets and its few custom primitives. Needs torch alone."""

from typing import TYPE_CHECKING

from muonlab.lazy import lazily

if TYPE_CHECKING:
    from muonlab.models.head import HeadStats, head_stats
    from muonlab.models.options import ModelOptions
    from muonlab.models.presets import MODELS, SUMMARIES
    from muonlab.models.transformer import ModelOutput, Transformer

_MODULES = {
    "HeadStats": "muonlab.models.head",
    "head_stats": "muonlab.models.head",
    "ModelOptions": "muonlab.models.options",
    "MODELS": "muonlab.models.presets",
    "SUMMARIES": "muonlab.models.presets",
    "ModelOutput": "muonlab.models.transformer",
    "Transformer": "muonlab.models.transformer",
}
__getattr__, __dir__ = lazily(__name__, _MODULES)

__all__ = ["MODELS", "SUMMARIES", "HeadStats", "ModelOptions", "ModelOutput", "Transformer", "head_stats"]
