"""JAX's derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from hessinit.networks.base import Derivatives, Function, Named, OnData, Pull

_pull_compiled = jax.jit(lambda pull, cotangent: pull(cotangent)[0])
_ARRAYS = (jax.Array, np.ndarray, np.number, bool, int, float)


class JaxDerivatives(Derivatives):
    """:class:`hessinit.networks.base.Derivatives` of ``jax``: what is met again is compiled.

    A function on data is met again with other data too. What cannot be compiled, as it looks at values, is derived as
    it is.
    """

    def __init__(self) -> None:
        self._met: WeakKeyDictionary[Callable[..., Any], set[Any]] = WeakKeyDictionary()
        self._compiled: WeakKeyDictionary[Callable[..., Any], dict[Any, Callable[..., Any] | None]]
        self._compiled = WeakKeyDictionary()

    def _again(self, f: Callable[..., Any], key: Any) -> bool:
        """Whether f was met before under this key."""
        met = self._met.setdefault(f, set())
        before = key in met
        met.add(key)
        return before

    def _derive(self, derivative: Callable[..., Any], key: Any, f: Function, *args: Any) -> Any:
        """``derivative(f, *args)``, the values first among args."""
        whole: Callable[..., Any] = f.whole if isinstance(f, OnData) else f
        data = None
        if not self._again(whole, key):
            return derivative(f, *args)
        if isinstance(f, OnData):
            if f.data() is None:
                f(args[0])
            data = f.data()
            if not all(isinstance(x, _ARRAYS) for x in jax.tree.leaves(data)):
                if not self._again(f, key):
                    return derivative(f, *args)
                whole, data = f, None
        compiled = self._compiled.setdefault(whole, {})
        if key not in compiled:
            compiled[key] = jax.jit(
                lambda data, *args: derivative(whole if data is None else lambda v: whole(data, v), *args)
            )
        ready = compiled[key]
        if ready is not None:
            try:
                return ready(data, *args)
            except Exception:  # of any kind, as Keras raises others in place of JAX's own
                compiled[key] = None
        return derivative(f, *args)

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Any, Any]:
        def derivative(f: Function, values: Named, tangents: Named) -> Any:
            return jax.jvp(lambda v: f({**values, **v}), ({n: values[n] for n in tangents},), (dict(tangents),))

        if not tangents:
            z = f(values)
            return z, jnp.zeros_like(z)
        z, dz = self._derive(derivative, ("jvp", *tangents), f, dict(values), dict(tangents))
        return z, dz

    def vjp(self, f: Function, values: Named) -> tuple[Any, Pull]:
        z, pull = self._derive(jax.vjp, ("vjp", *values), f, dict(values))
        return z, lambda cotangent: dict(_pull_compiled(pull, cotangent))

    def jvp_vjp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, Any, Pull]:
        def derivative(f: Function, values: Named, tangents: Named) -> Any:
            moved = {name: values[name] for name in tangents}
            _, dz = jax.jvp(lambda v: f({**values, **v}), (moved,), (dict(tangents),))
            z, pull = jax.vjp(lambda v: f({**values, **v}), {name: values[name] for name in rows})
            return z, dz, pull

        key = ("jvp_vjp", *tangents, None, *rows)
        z, dz, pull = self._derive(derivative, key, f, dict(values), dict(tangents))
        return z, dz, lambda cotangent: dict(_pull_compiled(pull, cotangent))

    def gradient(self, f: Function, values: Named) -> tuple[Any, dict[str, Any]]:
        value, gradient = self._derive(lambda f, v: jax.value_and_grad(f)(v), ("gradient", *values), f, dict(values))
        return value, dict(gradient)

    def hvp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        def derivative(f: Function, values: Named, tangents: Named) -> Any:
            def gradient(v: Named) -> Any:
                held = {**values, **v}
                return jax.value_and_grad(lambda u: f({**held, **u}))({name: held[name] for name in rows})

            (value, _), (_, product) = jax.jvp(gradient, ({n: values[n] for n in tangents},), (dict(tangents),))
            return value, product

        key = ("hvp", *tangents, None, *rows)
        value, product = self._derive(derivative, key, f, dict(values), dict(tangents))
        return value, dict(product)
