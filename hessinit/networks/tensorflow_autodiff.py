"""TensorFlow's derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from hessinit.batches import at_the_end
from hessinit.networks.base import Derivatives, Function, Named, Pull


class TensorFlowDerivatives(Derivatives):
    """:class:`hessinit.networks.base.Derivatives` of ``tensorflow``."""

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Any, Any]:
        held = _tensors(values)
        with tf.autodiff.ForwardAccumulator([held[n] for n in tangents], list(tangents.values())) as accumulator:
            z = f(held)
        return z, _or_zeros(accumulator.jvp(z), z)

    def vjp(self, f: Function, values: Named) -> tuple[Any, Pull]:
        held = _tensors(values)
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(held)
            z = f(held)
        return z, _pull(tape, z, held)

    def jvp_vjp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, Any, Pull]:
        held = _tensors(values)
        sources = {name: held[name] for name in rows}
        with (
            tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape,
            tf.autodiff.ForwardAccumulator([held[n] for n in tangents], list(tangents.values())) as accumulator,
        ):
            tape.watch(sources)
            z = f(held)
        return z, _or_zeros(accumulator.jvp(z), z), _pull(tape, z, sources)

    def gradient(self, f: Function, values: Named) -> tuple[Any, dict[str, Any]]:
        value, pull = self.vjp(f, values)
        return value, pull(tf.ones_like(value))

    def hvp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        held = _tensors(values)
        sources = {name: held[name] for name in rows}
        with tf.autodiff.ForwardAccumulator([held[n] for n in tangents], list(tangents.values())) as accumulator:
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(sources)
                value = f(held)
            gradients = _pull(tape, value, sources)(tf.ones_like(value))
        return value, {name: _or_zeros(accumulator.jvp(g), g) for name, g in gradients.items()}


@contextlib.contextmanager
def differentiable_moments() -> Iterator[None]:
    """Batch and layer statistics with right second derivatives.

    ``tf.nn.moments``, which Keras's norm layers call, stops the gradient of the mean inside the variance: the first
    derivative is right, as deviations sum to zero, and the second lacks a term.
    """

    def moments(x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None) -> Any:
        mean = tf.reduce_mean(x, axis=axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axis=axes, keepdims=keepdims)
        return (mean if keepdims else tf.squeeze(mean, axis=axes)), variance

    original = tf.nn.moments
    with at_the_end(lambda: setattr(tf.nn, "moments", original)):
        tf.nn.moments = moments
        yield


def _tensors(values: Named) -> dict[str, Any]:
    """New tensors, so that a tape or accumulator follows these and no others."""
    return {name: tf.identity(tf.convert_to_tensor(value)) for name, value in values.items()}


def _or_zeros(x: Any, like: Any) -> Any:
    return tf.zeros_like(like) if x is None else tf.convert_to_tensor(x)


def _pull(tape: Any, z: Any, sources: Mapping[str, Any]) -> Pull:
    def pull(cotangent: Any) -> dict[str, Any]:
        found = tape.gradient(z, dict(sources), output_gradients=cotangent)
        # Of an embedding the tape gives indexed slices.
        return {name: _or_zeros(found[name], source) for name, source in sources.items()}

    return pull
