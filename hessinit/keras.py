"""Keras initializers at the curvature-neutral scale, for any backend of Keras 3.

The scale is the closed form of :mod:`hessinit.rules`: standard deviation ``1 / (g (fan_in fan_out)^(1/4))``.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import keras
import numpy as np

from hessinit import rules
from hessinit.draw import draw, stream
from hessinit.layout import KERAS, Layout
from hessinit.model import init_
from hessinit.networks.keras import numpy_nonlinearity, weight_layout
from hessinit.report import Report

__all__ = [
    "HessianInit",
    "HessianNormal",
    "HessianOrthogonal",
    "HessianTruncatedNormal",
    "HessianUniform",
    "InitCallback",
]

Nonlinearity = str | Callable[[Any], Any]
register = keras.saving.register_keras_serializable(package="hessinit")


@register
class HessianInit(keras.initializers.Initializer):
    """Normal weights at the curvature-neutral scale ``σ = 1 / (g (fan_in fan_out)^(1/4))``.

    The initializer asks the layer that is being built what its axes mean, so fans are right for depthwise, grouped,
    transposed and separable convolutions, for ``EinsumDense`` and attention, and per gate for recurrent layers. Called
    outside a layer it takes the last two axes as inputs and outputs and the others as kernel positions, or ``layout``.

    Args:
        nonlinearity: the activation that follows: a name, a Keras activation or a vectorised function. Default
            ``"relu"``.
        gain: g itself, instead of ``nonlinearity``; it divides.
        depth: number of weight layers of the net, if known; see :func:`hessinit.rules.gain`.
        layout: axes of the kernel, see :class:`hessinit.layout.Layout`, for layers of your own. Default: the layer's.
        seed: integer that decides everything; None: a random one. One instance draws fresh weights at every call, and
            the sequence of draws is a function of the seed. Copies that Keras makes for the parts of one layer
            (query, key, value) differ by the part's name; a copy made from the config starts the sequence anew.

    Raises:
        TypeError: wrong type. ValueError: unknown nonlinearity, ``gain`` <= 0, a layout that does not fit.

    Example:
        >>> layer = keras.layers.Dense(128, "relu", kernel_initializer=HessianInit(seed=0))
        >>> layer.build((None, 784))
        >>> round(float(np.std(layer.get_weights()[0])), 3), round(2**0.5 / (784 * 128) ** 0.25, 3)
        (0.079, 0.079)
    """

    distribution = "normal"

    def __init__(
        self,
        nonlinearity: Nonlinearity = "relu",
        gain: float | None = None,
        depth: int | None = None,
        layout: str | None = None,
        seed: int | None = None,
    ) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer))):
            raise TypeError(f"{type(self).__name__}: seed must be an integer or None; got {seed!r}.")
        if isinstance(nonlinearity, dict):
            nonlinearity = keras.saving.deserialize_keras_object(nonlinearity)
        self.nonlinearity = nonlinearity
        self.gain = gain
        self.depth = depth
        self.layout = layout
        self.seed = None if seed is None else int(seed)
        self._g = self._checked_gain()
        self._layout = None if layout is None else Layout(layout)
        self._stream = random.getrandbits(62) if self.seed is None else self.seed
        self._calls = 0

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        dtype = keras.backend.standardize_dtype(dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(f"{type(self).__name__}: dtype must be a floating-point type; got {dtype!r}.")
        layer, name = _layer_being_built()
        layout = self._layout or (layer is not None and weight_layout(layer, name)) or KERAS
        shape = tuple(shape)
        if len(shape) < 2:
            raise ValueError(
                f"{type(self).__name__}: shape must have at least two axes; got {shape}{_of(layer, name)}. "
                "Biases start at zero."
            )
        try:
            fans = layout.fans(shape)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}{_of(layer, name)}") from error
        std = 0.0 if 0 in fans else rules.curvature_neutral_std(*fans, self._g)
        rng = stream(self._stream, self._calls, _given_name(layer), name)
        self._calls += 1
        wide = np.float64 if dtype == "float64" else np.float32
        return keras.ops.convert_to_tensor(draw(shape, layout, std, self.distribution, rng, wide), dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        nonlinearity = self.nonlinearity
        if not isinstance(nonlinearity, str):
            nonlinearity = keras.saving.serialize_keras_object(nonlinearity)
        return {
            "nonlinearity": nonlinearity,
            "gain": self.gain,
            "depth": self.depth,
            "layout": self.layout,
            "seed": self.seed,
        }

    def _checked_gain(self) -> float:
        try:
            if self.gain is not None:
                rules.curvature_neutral_std(1, 1, self.gain)
                return float(self.gain)
            return rules.gain(numpy_nonlinearity(self.nonlinearity), depth=self.depth)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{type(self).__name__}: {error}") from error


@register
class HessianNormal(HessianInit):
    """The same as :class:`HessianInit`, which is normal by default."""


@register
class HessianUniform(HessianInit):
    """Uniform weights on ``[-√3 σ, √3 σ]``; arguments as in :class:`HessianInit`."""

    distribution = "uniform"


@register
class HessianTruncatedNormal(HessianInit):
    """Normal weights cut at two standard deviations, widened so that their std is σ; as :class:`HessianInit`."""

    distribution = "truncated_normal"


@register
class HessianOrthogonal(HessianInit):
    """Orthogonal rows or columns whose root mean square is exactly σ; arguments as in :class:`HessianInit`."""

    distribution = "orthogonal"


class InitCallback(keras.callbacks.Callback):
    """Calls :func:`hessinit.init_` when ``fit`` begins, for the loss and the optimizer that the model is compiled with.

    A fit that goes on from earlier steps leaves the weights as they are.

    Args:
        batch: a pair (inputs, targets), or a loader; ``fit`` does not show its own data to callbacks.
        options: keywords of :func:`hessinit.init_`.

    After the fit has begun, ``report`` is a :class:`hessinit.Report`, or None if nothing was done.

    Example:
        >>> x, y = np.random.default_rng(0).standard_normal((64, 8)), np.arange(64) % 3
        >>> net = keras.Sequential([keras.layers.Dense(16, "relu"), keras.layers.Dense(3)])
        >>> net.compile(keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> start = InitCallback((x, y), seed=0)
        >>> history = net.fit(x, y, callbacks=[start], verbose=0)
        >>> start.report.calibration.solution.reason
        'met'
    """

    def __init__(self, batch: Any, **options: Any) -> None:
        super().__init__()
        self.batch, self.options = batch, options
        self.report: Report | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Sets the weights before the first step."""
        if int(self.model.optimizer.iterations) == 0:
            _, self.report = init_(self.model, self.batch, return_report=True, **self.options)


def _layer_being_built() -> tuple[keras.Layer | None, str]:
    """The layer whose ``add_weight`` has led to this call, and the weight's name.

    Keras hands an initializer a shape alone, and the same shape means different fans in a Dense layer, a depthwise
    convolution or an attention projection. The layer is in the caller's frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        layer = frame.f_locals.get("self")
        if frame.f_code.co_name == "add_weight" and isinstance(layer, keras.Layer):
            return layer, str(frame.f_locals.get("name"))
        frame = frame.f_back
    return None, ""


def _given_name(layer: keras.Layer | None) -> str:
    """The layer's name where somebody gave it one; Keras's own names count layers made so far in the process."""
    if layer is None:
        return ""
    automatic = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(layer).__name__).lower()
    return "" if re.sub(r"_\d+$", "", layer.name) == automatic else str(layer.name)


def _of(layer: keras.Layer | None, name: str) -> str:
    return "" if layer is None else f" for {name!r} of layer {layer.name!r}"
