"""What users give as data: a pair, a dict, or a loader of either, whole or in parts."""

from __future__ import annotations

import contextlib
import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.random import mtrand

from hessinit.progress import track

ONE_AT_A_TIME = threading.RLock()
"""Held by a thread while it uses what all threads share: global random states, modes of kernels."""


class Batches:
    """The batches of some data, again and again.

    Args:
        data: a pair (inputs, targets), a dict, or a loader: an iterable of either that can be read more than once.
        is_array: whether something is a tensor of the framework.
        progress: whether to show a bar over a loader's batches; None where standard error is a terminal.

    Raises:
        TypeError: none of these, or an iterator, which can be read but once.
        ValueError: while iterating, a batch of no samples, or a loader without batches.
    """

    def __init__(self, data: Any, is_array: Callable[[Any], bool], progress: bool | None) -> None:
        self.data, self._is_tensor, self._progress = data, is_array, progress
        pair = isinstance(data, tuple) or (isinstance(data, list) and len(data) == 2 and not _nested(data[0]))
        self.in_memory = pair or isinstance(data, Mapping) or self._is_array(data)
        if not self.in_memory and (isinstance(data, Iterator) or not hasattr(data, "__iter__")):
            raise TypeError(
                "batch must be a pair (inputs, targets), a dict, or a loader that can be read more than once; "
                f"got {type(data).__name__}"
            )

    def _is_array(self, x: Any) -> bool:
        return isinstance(x, np.ndarray) or self._is_tensor(x)

    def __iter__(self) -> Iterator[Any]:
        count = 0
        length = None if self.in_memory else operator.length_hint(self.data) or None
        for batch in [self.data] if self.in_memory else track(self._loaded(), "batches", self._progress, length):
            count += 1
            if self.samples(batch) == 0:
                raise ValueError("batch must not be empty; got no samples")
            yield batch
        if count == 0:
            raise ValueError("batch must not be empty; got a loader that yields nothing")

    def _loaded(self) -> Iterator[Any]:
        """What the loader yields; an error of its own says where it comes from."""
        count = 0
        try:
            for batch in self.data:
                count += 1
                yield batch
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                "batch must be a loader that can be read to its end; "
                f"after {count} batches it raised {type(error).__name__}: {error}"
            ) from error

    def arrays(self, tree: Any) -> Iterator[Any]:
        """Every array of a batch."""
        if self._is_array(tree):
            yield tree
        elif isinstance(tree, (Mapping, list, tuple)):
            for part in tree.values() if isinstance(tree, Mapping) else tree:
                yield from self.arrays(part)

    def samples(self, batch: Any) -> int | None:
        """Length of the first axis of a batch's first array that has one; None where there is none."""
        return next((int(x.shape[0]) for x in self.arrays(batch) if len(x.shape)), None)

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """Samples start … stop of every array of a batch that has one entry a sample."""
        return self.choose(batch, lambda array: array[start:stop])

    def choose(self, batch: Any, rows: Callable[[Any], Any]) -> Any:
        """A batch with some rows of every array that has one entry a sample."""
        return self._choose(batch, self.samples(batch), rows)

    def _choose(self, tree: Any, samples: int | None, rows: Callable[[Any], Any]) -> Any:
        if isinstance(tree, Mapping):
            return {key: self._choose(part, samples, rows) for key, part in tree.items()}
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*(self._choose(part, samples, rows) for part in tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)([self._choose(part, samples, rows) for part in tree])
        return rows(tree) if self._is_array(tree) and len(tree.shape) and tree.shape[0] == samples else tree

    def split(self, batch: Any, size: int | None) -> Iterator[Any]:
        """A batch in parts of at most ``size`` samples; None for the whole."""
        samples = self.samples(batch) or 0
        if size is None or samples <= size:
            yield batch
        else:
            for start in range(0, samples, size):
                yield self.part(batch, start, start + size)


@contextlib.contextmanager
def at_the_end(restore: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the end, once more if an interruption comes in the middle of it."""
    try:
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()
            raise


@contextlib.contextmanager
def random_states_kept(framework: AbstractContextManager[Any]) -> Iterator[None]:
    """Puts the global random states back that loaders and models use, so a shuffled order is the same every time.

    Args:
        framework: a context that does so for the framework's own.
    """
    with ONE_AT_A_TIME:
        python, own = random.getstate(), mtrand.get_bit_generator()
        state = np.random.get_state(legacy=False)  # noqa: NPY002

        def restore() -> None:
            random.setstate(python)
            mtrand.set_bit_generator(own)
            np.random.set_state(state)  # noqa: NPY002

        with at_the_end(restore), framework:
            yield


_DRAWS = np.random.MT19937(0)  # seeded anew at every use, as that takes far less time than to save and set a state


@contextlib.contextmanager
def fixed_draws(seed: int) -> Iterator[None]:
    """Python's and NumPy's global random numbers from a seed, for a model that draws from them.

    Only inside :func:`random_states_kept`, which alone keeps the second of a pair of NumPy's normal numbers.
    """
    python, own = random.getstate(), mtrand.get_bit_generator()

    def restore() -> None:
        mtrand.set_bit_generator(own)
        random.setstate(python)

    with at_the_end(restore):
        random.seed(int(seed))
        mtrand.set_bit_generator(_DRAWS)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which is neither the model's fault nor the data's."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind in ("OutOfMemoryError", "ResourceExhaustedError")


TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch: of a pair, or of a dict with the targets among its keys.

    Raises:
        ValueError: another number of parts, or a dict without targets.
    """
    if not isinstance(batch, Mapping):
        if len(batch) != 2:
            raise ValueError(
                f"batch must be a pair (inputs, targets) or a dict; got {len(batch)} parts (pass forward= for others)"
            )
        return batch[0], batch[1]
    keys = [key for key in TARGET_KEYS if key in batch]
    if len(keys) != 1:
        raise ValueError(
            f"batch must hold its targets under one of {', '.join(TARGET_KEYS)} when it is a dict; "
            f"got keys {', '.join(map(str, batch))} (or pass forward=)"
        )
    return {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]


def _nested(x: Any) -> bool:
    return isinstance(x, (tuple, list, Mapping))
