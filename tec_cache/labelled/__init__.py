"""Labelled photos for tuning: any photo by itself, in an order and with an augmentation that a seed decides.

Photos are decoded and augmented in processes, because timm's transforms draw from Python's, numpy's and torch's global
generators, of which a process has one each.
"""

from tec_cache.labelled.batch import LabelledBatch
from tec_cache.labelled.index import LabelledIndex, PhotoIndex, index_photos
from tec_cache.labelled.left_out import LeftOut
from tec_cache.labelled.order import photo_order
from tec_cache.labelled.reader import EvaluationReader, PhotoReader
from tec_cache.labelled.transforms import evaluation_transform, probe_transform, train_transform

__all__ = [
    "EvaluationReader",
    "LabelledBatch",
    "LabelledIndex",
    "LeftOut",
    "PhotoIndex",
    "PhotoReader",
    "evaluation_transform",
    "index_photos",
    "photo_order",
    "probe_transform",
    "train_transform",
]
