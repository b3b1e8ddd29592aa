"""Keras's arrays on any backend, and the derivatives of the backend in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from hessinit.networks.base import Arrays, Derivatives


class KerasArrays:
    """:class:`hessinit.networks.base.Arrays` of ``keras.ops``."""

    exp, log, sqrt, abs = (staticmethod(f) for f in (ops.exp, ops.log, ops.sqrt, ops.abs))
    where, sigmoid, softplus = (staticmethod(f) for f in (ops.where, ops.sigmoid, ops.softplus))
    reshape, clip, is_array = (staticmethod(f) for f in (ops.reshape, ops.clip, ops.is_tensor))

    def is_floating(self, x: Any) -> bool:
        return bool(keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)))

    def asarray(self, x: Any, like: Any) -> Any:
        x = x.copy() if isinstance(x, np.ndarray) else x  # JAX shares its memory and may read it later
        return ops.cast(ops.convert_to_tensor(x), like.dtype)

    def numpy(self, x: Any) -> npt.NDArray[Any]:
        array = np.asarray(ops.convert_to_numpy(x))
        return array if array.dtype.kind in "iub" or array.dtype.itemsize > 2 else array.astype(np.float32)

    def take(self, x: Any, rows: npt.NDArray[np.intp]) -> Any:
        return ops.take(x, ops.convert_to_tensor(rows), axis=0)

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return ops.concatenate(list(arrays), axis=axis)

    def sum(self, x: Any, axis: int | None = None) -> Any:
        return ops.sum(x) if axis is None else ops.sum(x, axis=axis, keepdims=True)

    def dot(self, x: Any, y: Any) -> float:
        wide = "float64" if keras.backend.standardize_dtype(x.dtype) == "float64" else "float32"
        return float(ops.convert_to_numpy(ops.sum(ops.cast(x, wide) * ops.cast(y, wide))))

    def finite(self, x: Any) -> bool:
        return bool(ops.convert_to_numpy(ops.all(ops.isfinite(x))))

    def log_softmax(self, x: Any, axis: int) -> Any:
        return ops.log_softmax(x, axis=axis)

    def one_hot(self, labels: Any, classes: int, axis: int, like: Any) -> Any:
        return ops.one_hot(ops.cast(labels, "int32"), classes, axis=axis, dtype=like.dtype)


def of_backend() -> tuple[Arrays, Derivatives]:
    """Arrays and derivatives of the backend in use.

    Raises:
        NotImplementedError: another backend than torch, JAX and TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        from hessinit.networks.torch_autodiff import TorchArrays, TorchDerivatives

        return TorchArrays(), TorchDerivatives()
    if backend == "jax":
        from hessinit.networks.jax_autodiff import JaxDerivatives

        return KerasArrays(), JaxDerivatives()
    if backend == "tensorflow":
        from hessinit.networks.tensorflow_autodiff import TensorFlowDerivatives

        return KerasArrays(), TensorFlowDerivatives()
    raise NotImplementedError(f"curvature on Keras's {backend} backend: use torch, jax or tensorflow")
