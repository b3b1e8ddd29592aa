"""Keras's losses in terms of :mod:`hessinit.losses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from hessinit import losses
from hessinit.losses import LOGITS, PROBABILITIES, Loss
from hessinit.networks.base import Arrays, Derivatives


def translate(loss: Any, model: keras.Model, arrays: Arrays, derivatives: Derivatives) -> Loss:
    """The loss behind a name of ours or Keras's, a ``keras.Loss``, a function of ``keras.losses`` or a callable.

    Keras's own take (targets, outputs), callables of the user (outputs, targets).

    Raises:
        ValueError: an unknown name, or a loss of several values (no reduction).
        TypeError: not a loss.
    """
    if isinstance(loss, str):
        if loss in losses.NAMES:
            ends = getattr(model.layers[-1], "activation", None) if model.layers else None
            soft = loss == "cross_entropy" and ends is keras.activations.softmax
            named = {"outputs": PROBABILITIES} if soft else {}
            return losses.named(loss, arrays, **({"axis": -1} if loss in ("cross_entropy", "nll") else {}), **named)
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            raise ValueError(
                f"loss must be one of {', '.join(losses.NAMES)}, a name of Keras, or a callable; got {loss!r}"
            ) from None
    if isinstance(loss, keras.Loss):
        if loss.reduction not in ("sum_over_batch_size", "mean", "sum"):
            raise ValueError(f'loss must be a scalar: reduction "sum_over_batch_size" or "sum"; got {loss.reduction!r}')
        mean = loss.reduction != "sum"
        known = _known(loss, arrays, mean)
        return known or losses.Custom(arrays, mean, lambda z, y: loss(y, z), derivatives)
    if not callable(loss):
        raise TypeError(f"loss must be a name, a Keras loss or a callable of (outputs, targets); got {loss!r}")
    if loss in _FUNCTIONS:
        return translate(_FUNCTIONS[loss](), model, arrays, derivatives)
    if getattr(loss, "__module__", "").startswith("keras."):
        return losses.Custom(arrays, True, lambda z, y: keras.ops.mean(loss(y, z)), derivatives)
    return losses.Custom(arrays, True, loss, derivatives)


_FUNCTIONS: dict[Callable[..., Any], type[keras.Loss]] = {
    keras.losses.sparse_categorical_crossentropy: keras.losses.SparseCategoricalCrossentropy,
    keras.losses.categorical_crossentropy: keras.losses.CategoricalCrossentropy,
    keras.losses.binary_crossentropy: keras.losses.BinaryCrossentropy,
    keras.losses.mean_squared_error: keras.losses.MeanSquaredError,
    keras.losses.huber: keras.losses.Huber,
    keras.losses.poisson: keras.losses.Poisson,
}


def _known(loss: keras.Loss, arrays: Arrays, mean: bool) -> Loss | None:
    """The analytic form, where there is one: exactly these classes, on their last axis."""
    outputs = LOGITS if getattr(loss, "from_logits", True) else PROBABILITIES
    if type(loss) is keras.losses.SparseCategoricalCrossentropy:
        ignored = loss.ignore_class
        return losses.CrossEntropy(arrays, mean, ignore_index=ignored, axis=_axis(loss), outputs=outputs)
    if type(loss) is keras.losses.CategoricalCrossentropy:
        smoothing = loss.label_smoothing
        return losses.CrossEntropy(arrays, mean, label_smoothing=smoothing, axis=_axis(loss), outputs=outputs)
    if not mean:  # Keras sums over samples what it has averaged over outputs
        return None
    if type(loss) is keras.losses.BinaryCrossentropy:
        return losses.BinaryCrossEntropy(arrays, label_smoothing=loss.label_smoothing, outputs=outputs)
    if type(loss) is keras.losses.MeanSquaredError:
        return losses.SquaredError(arrays)
    if type(loss) is keras.losses.Huber:
        return losses.Huber(arrays, delta=loss._fn_kwargs.get("delta", 1.0))
    if type(loss) is keras.losses.Poisson:
        return losses.PoissonNLL(arrays, log_input=False, eps=keras.config.epsilon())
    return None


def _axis(loss: keras.Loss) -> int:
    return int(loss._fn_kwargs.get("axis", -1))
