"""The laboratory's transformer, its presets and its few custom primitives. Needs torch alone."""

from muonlab.models.ops import HeadStats, head_stats
from muonlab.models.options import ModelOptions
from muonlab.models.presets import MODELS, SUMMARIES
from muonlab.models.transformer import ModelOutput, Transformer

__all__ = ["MODELS", "SUMMARIES", "HeadStats", "ModelOptions", "ModelOutput", "Transformer", "head_stats"]
