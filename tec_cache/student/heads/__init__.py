"""Kinds of targets: of each, what the student has for it and how its prediction is judged. A new one is one file."""

from tec_cache.student.heads.attention import AttentionHead
from tec_cache.student.heads.class_token import ClassHead
from tec_cache.student.heads.feature import FeatureHead
from tec_cache.student.heads.head import Branch, Head

HEADS: tuple[type[Head], ...] = (FeatureHead, AttentionHead, ClassHead)
"""In the order of a model's parameters."""

__all__ = ["HEADS", "AttentionHead", "Branch", "ClassHead", "FeatureHead", "Head"]
