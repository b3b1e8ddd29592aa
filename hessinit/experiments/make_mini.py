"""Makes ``fashion_mnist_mini.npz``, the subset that ships with the package, from the full set on disk.

Of each class the first 600 train images and the first 100 test images, in the original order. Run it with
``python -m hessinit.experiments.make_mini``; the file is the same byte for byte each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hessinit.experiments.data import CLASSES, MINI, _full

PER_CLASS = {"train": 600, "test": 100}


def first_of_each_class(labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.intp]:
    """Indices of the first ``count`` samples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(CLASSES)]))


def make(path: Path = MINI) -> None:
    """Writes the subset."""
    (x_train, y_train, x_test, y_test), _ = _full()
    train = first_of_each_class(y_train, PER_CLASS["train"])
    test = first_of_each_class(y_test, PER_CLASS["test"])
    np.savez_compressed(path, x_train=x_train[train], y_train=y_train[train], x_test=x_test[test], y_test=y_test[test])


if __name__ == "__main__":
    make()
