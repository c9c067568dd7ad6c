"""What the values of masks mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tec_cache.errors import ConfigError
from tec_cache.printable import counted, have

NO_CLASS = -1
"""A pixel of which nothing is known: it is neither learned nor judged."""


class Values(NamedTuple):
    """What the values of masks mean: classes are all values but `ignore`, in their order."""

    ignore: int
    num_classes: int

    def classes(self, values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return the class of each pixel, NO_CLASS where it is ignored. Raises ConfigError for a value beyond all."""
        classes = values - (values > self.ignore)
        highest = int(classes.max(initial=0, where=values != self.ignore))
        if highest >= self.num_classes:
            value = self.values(np.array(highest))
            raise ConfigError(
                f"a mask has the value {value}; the {counted(self.num_classes, 'class')} "
                f"{have(self.num_classes)} up to {self.values(np.array(self.num_classes - 1))}, and "
                f"{self.ignore} is ignored",
                todo=f"--ignore {value} if it means that nothing is known; else name all classes with --classes FILE",
            )
        return np.where(values == self.ignore, NO_CLASS, classes).astype(np.int32)

    def values(self, classes: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Return the values that classes have in masks."""
        return classes + (classes >= self.ignore)
