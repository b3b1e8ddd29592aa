"""JAX's derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp

from hessinit.networks.base import Function, Named, Pull

_pull_compiled = jax.jit(lambda pull, cotangent: pull(cotangent)[0])


class JaxDerivatives:
    """:class:`hessinit.networks.base.Derivatives` of ``jax``: a function that is met again is compiled."""

    def __init__(self) -> None:
        self._met: WeakKeyDictionary[Function, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()

    def _compiled(self, f: Function, key: Any, derivative: Callable[..., Any]) -> Callable[..., Any]:
        """The derivative itself at the first call for f, its compiled form from the second on."""
        met = self._met.setdefault(f, {})
        if key not in met:
            met[key] = jax.jit(derivative)  # compiled when called
            return derivative
        return met[key]

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Any, Any]:
        if not tangents:
            z = f(values)
            return z, jnp.zeros_like(z)

        def derivative(values: Named, tangents: Named) -> Any:
            return jax.jvp(lambda v: f({**values, **v}), ({n: values[n] for n in tangents},), (dict(tangents),))

        z, dz = self._compiled(f, ("jvp", *tangents), derivative)(dict(values), dict(tangents))
        return z, dz

    def vjp(self, f: Function, values: Named) -> tuple[Any, Pull]:
        z, pull = self._compiled(f, ("vjp", *values), lambda values: jax.vjp(f, values))(dict(values))
        return z, lambda cotangent: dict(_pull_compiled(pull, cotangent))

    def jvp_vjp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, Any, Pull]:
        def derivative(values: Named, tangents: Named) -> Any:
            moved = {name: values[name] for name in tangents}
            _, dz = jax.jvp(lambda v: f({**values, **v}), (moved,), (dict(tangents),))
            z, pull = jax.vjp(lambda v: f({**values, **v}), {name: values[name] for name in rows})
            return z, dz, pull

        z, dz, pull = self._compiled(f, ("jvp_vjp", *tangents, None, *rows), derivative)(dict(values), dict(tangents))
        return z, dz, lambda cotangent: dict(_pull_compiled(pull, cotangent))

    def gradient(self, f: Function, values: Named) -> tuple[Any, dict[str, Any]]:
        value, gradient = self._compiled(f, ("gradient", *values), jax.value_and_grad(f))(dict(values))
        return value, dict(gradient)

    def hvp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        def derivative(values: Named, tangents: Named) -> Any:
            def gradient(v: Named) -> Any:
                held = {**values, **v}
                return jax.value_and_grad(lambda u: f({**held, **u}))({name: held[name] for name in rows})

            (value, _), (_, product) = jax.jvp(gradient, ({n: values[n] for n in tangents},), (dict(tangents),))
            return value, product

        value, product = self._compiled(f, ("hvp", *tangents, None, *rows), derivative)(dict(values), dict(tangents))
        return value, dict(product)
