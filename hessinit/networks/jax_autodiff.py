"""JAX's derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from hessinit.networks.base import Derivatives, Function, Named, OnData, Pull, Squares

MOST = 2**24  # entries of derivatives of single samples at a time
NEAR = 1e-4  # outputs of some samples alone and among others, up to rounding
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

    def squares(
        self, f: Function, few: Function, values: Named, names: Sequence[str], samples: int, first: int
    ) -> tuple[Any, Squares] | None:
        """Of all names or none: each sample goes through the model by itself, many at a time by ``jax.vmap``."""
        assert isinstance(f, OnData)
        assert isinstance(few, OnData)
        z, its, (batch, _), (part, _) = f(values), few(values), f.data(), few.data()
        leaves, structure = jax.tree.flatten(batch)
        if len(z) != samples or not all(isinstance(x, _ARRAYS) for x in leaves) or not _near(z[:first], its):
            return None
        rows = [
            np.ndim(x) > 0 and (len(x), len(y)) == (samples, first)
            for x, y in zip(leaves, jax.tree.leaves(part), strict=True)
        ]
        ready = self._compiled.setdefault(f.whole, {})
        key = ("squares", *names, None, *rows, structure)
        if key not in ready:
            ready[key] = jax.jit(_of_blocks(f.whole, structure, rows, names))
        compiled: Any = ready[key]
        compiled.eval_shape(values, leaves, z)  # raises if the model looks at its data

        def pull(cotangents: Iterable[Any], total: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
            sums = {name: jnp.zeros(values[name].shape, _wide(values[name])) for name in names}
            for cotangent in cotangents:
                sums = jax.tree.map(jnp.add, sums, compiled(values, leaves, cotangent))
            return {name: s.sum() for name, s in sums.items()} if total else sums, {}

        return z, pull


def _of_blocks(
    whole: Callable[[Any, Named], Any], structure: Any, rows: Sequence[bool], names: Sequence[str]
) -> Callable[[Named, Sequence[Any], Any], dict[str, Any]]:
    """The function of (values, leaves of a batch, cotangent with a row a sample) that gives ``Σ_s g_s²`` by name.

    Args:
        whole: outputs, of (batch and targets, values).
        structure: of a batch.
        rows: which leaves have a row a sample.
        names: of parameters.
    """

    def of_blocks(values: Named, leaves: Sequence[Any], cotangent: Any) -> dict[str, Any]:
        samples, moved = len(cotangent), {name: values[name] for name in names}
        block = min(samples, max(1, MOST // max(1, sum(value.size for value in moved.values()))))
        blocks = -(-samples // block)

        def square(sample: Sequence[Any], cotangent: Any) -> dict[str, Any]:
            given = iter(sample)
            batch = jax.tree.unflatten(
                structure, [next(given)[None] if r else x for x, r in zip(leaves, rows, strict=True)]
            )
            _, pull = jax.vjp(lambda v: whole((batch, None), {**values, **v})[0], moved)
            return {name: jnp.square(g.astype(_wide(g))) for name, g in pull(cotangent)[0].items()}

        def cut(x: Any, fill: Any) -> Any:
            filled = jnp.concatenate([x, jnp.repeat(fill, blocks * block - samples, axis=0)])
            return filled.reshape(blocks, block, *x.shape[1:])

        def add(sums: Any, some: Any) -> tuple[Any, None]:
            return {name: sums[name] + s.sum(0) for name, s in jax.vmap(square)(*some).items()}, None

        given = [jnp.asarray(x) for x, row in zip(leaves, rows, strict=True) if row]
        some = [cut(x, x[:1]) for x in given], cut(cotangent, 0 * cotangent[:1])  # the last block is filled up by zeros
        zeros = {name: jnp.zeros(value.shape, _wide(value)) for name, value in moved.items()}
        sums: dict[str, Any] = jax.lax.scan(add, zeros, some)[0]
        return sums

    return of_blocks


def _near(x: Any, y: Any) -> bool:
    return x.shape == y.shape and bool(jnp.abs(x - y).max() <= NEAR * jnp.abs(y).max())


def _wide(x: Any) -> Any:
    """The type of squares: at least single precision."""
    return jnp.promote_types(x.dtype, jnp.float32)
