"""Kinds of targets: of each, what the decoder has for it and how its prediction is judged. A new one is one file."""

from tec_cache.student.heads.attention import AttentionHead
from tec_cache.student.heads.feature import FeatureHead
from tec_cache.student.heads.head import Head

HEADS: tuple[type[Head], ...] = (FeatureHead, AttentionHead)
"""In the order of a model's parameters."""

__all__ = ["HEADS", "AttentionHead", "FeatureHead", "Head"]
