"""Losses as functions of a network's outputs: their value, their Hessian ``D²_z ℓ`` and its square root R.

Everything is a *total* over loss terms, with the number of terms beside it, so that the mean over any split of the data
is the same. With ``z`` the outputs and ``u`` a tensor of their shape:

* softmax cross-entropy, ``p = softmax(z)``, target weights t of sum τ: ``D² = τ (diag(p) − p pᵀ)``,
  ``R ε = √τ (√p ε − p (√pᵀ ε))``;
* losses that act on each output alone: ``D² = diag(ℓ'')``, ``R ε = √ℓ'' ε``;
* any other twice-differentiable function: ``D² u`` by automatic differentiation on the outputs alone.

Where the last softmax or sigmoid is part of the network (log-probabilities under NLL, probabilities in Keras), ``D²``
is that of the same loss seen from the logits, so the approximate Hessian does not depend on which side of the border
the softmax stands: for log-probabilities ``diag(p) − p pᵀ``, for probabilities ``diag(1/p) − 1 1ᵀ``.

Array functions come from outside (:class:`hessinit.networks.base.Arrays`), so the formulas are written once.

References:
    N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002, sections 3.1 and 4.
    J. Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = Any
Shape = tuple[int, ...]
LOGITS, LOG_PROBABILITIES, PROBABILITIES = "logits", "log-probabilities", "probabilities"
TINY = 1e-7  # probabilities are kept this far from 0, as Keras does


@dataclass(frozen=True)
class Loss:
    """A loss of outputs and targets.

    Args:
        arrays: the framework's array functions.
        mean: whether the loss is the mean over its terms (default), or their sum.
    """

    arrays: Any
    mean: bool = True
    analytic_root: ClassVar[bool] = True

    def check(self, z: Array, y: Array) -> None:
        """Raises ValueError unless the targets fit the outputs."""
        raise NotImplementedError

    def _check_finite(self, y: Array) -> None:
        if self.arrays.is_floating(y) and not self.arrays.finite(y):
            raise ValueError("targets must be finite; got NaN or infinity")

    def count(self, shape: Shape, y: Array) -> float:
        """What the mean divides the total by, for outputs of a shape: the number of terms, or their weights."""
        raise NotImplementedError

    def total(self, z: Array, y: Array) -> Array:
        """Sum over the terms; differentiable in z."""
        raise NotImplementedError

    def product(self, z: Array, y: Array, u: Array) -> Array:
        """``D²_z ℓ u`` of the total."""
        raise NotImplementedError

    def root(self, z: Array, y: Array, signs: Array) -> Array:
        """``R ε`` with ``R Rᵀ = D²_z ℓ`` of the total; only where ``analytic_root``."""
        raise NotImplementedError

    def columns(self, z: Array, y: Array) -> Iterator[tuple[float, Array]]:
        """Pairs (sign, r) with ``D²_z ℓ = Σ sign · r rᵀ``: one an output entry, each of the shape of z."""
        size = int(np.prod(z.shape))
        for k in range(size):
            unit = np.zeros(size)
            unit[k] = 1
            yield 1.0, self.root(z, y, self.arrays.asarray(unit.reshape(z.shape), z))

    def class_axis(self, shape: Shape, y: Array) -> int:
        """Along which the outputs of one loss term lie; the last where each output has a term."""
        return len(shape) - 1

    def natural(self, z: Array, y: Array) -> Array:
        """The outputs as the loss sees them before the last softmax or sigmoid, up to what the loss ignores."""
        return z

    def level(self, z: Array, y: Array) -> tuple[Array, float]:
        """Square of the level times a number, differentiable in z, and that number: both add up over the data.

        The level is the root mean square of the class-centred logits under cross-entropy, of the outputs over the
        targets' standard deviation in a regression, and of the outputs themselves under any other loss.
        """
        natural = self.natural(z, y)
        return self.arrays.sum(natural * natural), float(np.prod(z.shape)) * self._unit(y) ** 2

    def _unit(self, y: Array) -> float:
        """What outputs are measured in."""
        return 1.0


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``−Σ_c t_c log p_c``, a term a sample and position.

    Args:
        weight: of each class, shape (C,), or None.
        label_smoothing: share of the target spread evenly over the classes.
        ignore_index: label whose terms do not count, or None.
        axis: of the classes in the outputs; None for axis 1, or the last where the labels fit only that.
        outputs: ``"logits"``, ``"log-probabilities"`` or ``"probabilities"``.
    """

    weight: Array | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    axis: int | None = 1
    outputs: str = LOGITS

    def _axis(self, z: Array, y: Array) -> int:
        return self.class_axis(tuple(z.shape), y)

    def class_axis(self, shape: Shape, y: Array) -> int:
        last = len(shape) - 1
        if self.axis is None:
            return last if tuple(y.shape) == shape[:-1] != shape[:1] + shape[2:] else min(1, last)
        return last if self.axis == -1 else min(self.axis, last)

    def _labels(self, z: Array, y: Array) -> Array:
        """Integer labels without the axis of classes that Keras allows them."""
        if len(y.shape) == len(z.shape) and y.shape[self._axis(z, y)] == 1 != z.shape[self._axis(z, y)]:
            return self.arrays.reshape(y, [n for a, n in enumerate(y.shape) if a != self._axis(z, y)])
        return y

    def _soft(self, shape: Shape, y: Array) -> bool:
        return tuple(y.shape) == shape and bool(self.arrays.is_floating(y))

    def check(self, z: Array, y: Array) -> None:
        shape, axis = tuple(z.shape), self._axis(z, y)
        if not shape:
            raise ValueError("the outputs are a scalar: cross-entropy needs an axis of classes")
        if self.weight is not None and tuple(self.weight.shape) != (shape[axis],):
            raise ValueError(f"class weights of shape {tuple(self.weight.shape)} do not fit {shape[axis]} classes")
        if self._soft(shape, y):
            self._check_finite(y)
            return
        expected = shape[:axis] + shape[axis + 1 :]
        labels = self._labels(z, y)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"targets of shape {tuple(y.shape)} do not fit outputs of shape {shape} with classes on axis {axis}: "
                f"labels of shape {expected} or probabilities of shape {shape} do"
            )
        if self.arrays.is_floating(y) and self.axis != -1:  # Keras takes whole numbers of any type
            raise ValueError(f"labels must be integers; got {y.dtype}")
        values = self.arrays.numpy(labels)
        if self.ignore_index is not None:
            values = values[values != self.ignore_index]
        if values.size and not (values.min() >= 0 and values.max() < shape[axis]):
            raise ValueError(
                f"labels must be in 0 … {shape[axis] - 1}; got {values.min()} … {values.max()}, "
                f"outputs of shape {shape} having {shape[axis]} classes on axis {axis}"
            )

    def _targets(self, z: Array, y: Array) -> Array:
        """Weights t of the terms' log-probabilities, of the shape of z."""
        a, axis = self.arrays, self._axis(z, y)
        classes = z.shape[axis]
        weight = 1.0
        if self.weight is not None:
            weight = a.reshape(a.asarray(self.weight, z), [classes if k == axis else 1 for k in range(len(z.shape))])
        smooth = self.label_smoothing
        if self._soft(tuple(z.shape), y):
            return (a.asarray(y, z) * (1 - smooth) + smooth / classes) * weight
        valid, labels = self._valid(z, y)
        hot = a.one_hot(labels, classes, axis, z) * weight
        if smooth:
            hot = hot * (1 - smooth) + smooth / classes * weight
        return hot * valid

    def _valid(self, z: Array, y: Array) -> tuple[Array, Array]:
        """Which terms count (with the axis of classes kept), and labels that are classes everywhere."""
        a, axis = self.arrays, self._axis(z, y)
        labels = self._labels(z, y)
        if self.ignore_index is None:
            return 1.0, labels
        valid = labels != self.ignore_index
        shape = [1 if k == axis else n for k, n in enumerate(z.shape)]
        return a.asarray(a.reshape(valid, shape), z), a.where(valid, labels, labels * 0)

    def count(self, shape: Shape, y: Array) -> float:
        a, classes = self.arrays, shape[self.class_axis(shape, y)]
        if self._soft(shape, y) or (self.weight is None and self.ignore_index is None):
            return float(np.prod(shape) / classes)
        labels = a.numpy(y)
        valid = np.ones(labels.shape, bool) if self.ignore_index is None else labels != self.ignore_index
        weights = np.ones(classes) if self.weight is None else a.numpy(self.weight).astype(np.float64)
        return float(weights[labels[valid].astype(int)].sum())

    def _log_p(self, z: Array, y: Array) -> Array:
        a, axis = self.arrays, self._axis(z, y)
        if self.outputs == LOGITS:
            return a.log_softmax(z, axis)
        if self.outputs == LOG_PROBABILITIES:
            return z
        return a.log(a.clip(z / a.sum(z, axis), TINY, 1 - TINY))

    def _p_and_tau(self, z: Array, y: Array) -> tuple[Array, Array]:
        """Probabilities, and the sums of the target weights."""
        return self.arrays.exp(self._log_p(z, y)), self.arrays.sum(self._targets(z, y), self._axis(z, y))

    def total(self, z: Array, y: Array) -> Array:
        return -self.arrays.sum(self._targets(z, y) * self._log_p(z, y))

    def product(self, z: Array, y: Array, u: Array) -> Array:
        a, axis = self.arrays, self._axis(z, y)
        p, tau = self._p_and_tau(z, y)
        if self.outputs == PROBABILITIES:
            return tau * (u / p - a.sum(u, axis))
        return tau * p * (u - a.sum(p * u, axis))

    def root(self, z: Array, y: Array, signs: Array) -> Array:
        a, axis = self.arrays, self._axis(z, y)
        p, tau = self._p_and_tau(z, y)
        along = a.sum(a.sqrt(p) * signs, axis)
        rooted = signs / a.sqrt(p) - along if self.outputs == PROBABILITIES else a.sqrt(p) * signs - p * along
        return a.sqrt(tau) * rooted

    def natural(self, z: Array, y: Array) -> Array:
        if self.outputs == LOGITS:
            return z
        log_p = self._log_p(z, y)
        return log_p - self.arrays.sum(log_p, self._axis(z, y)) / z.shape[self._axis(z, y)]

    def level(self, z: Array, y: Array) -> tuple[Array, float]:
        axis, natural = self._axis(z, y), self.natural(z, y)
        centred = natural - self.arrays.sum(natural, axis) / z.shape[axis]
        return self.arrays.sum(centred * centred), float(np.prod(z.shape))


@dataclass(frozen=True)
class Elementwise(Loss):
    """A loss whose terms are the outputs' entries, each with its target of the same shape."""

    def value(self, z: Array, y: Array) -> Array:
        """ℓ, entry by entry."""
        raise NotImplementedError

    def second(self, z: Array, y: Array) -> Array:
        """ℓ'' ≥ 0, entry by entry."""
        raise NotImplementedError

    def check(self, z: Array, y: Array) -> None:
        if tuple(y.shape) != tuple(z.shape):
            raise ValueError(f"targets of shape {tuple(y.shape)} do not fit outputs of shape {tuple(z.shape)}")
        self._check_finite(y)

    def count(self, shape: Shape, y: Array) -> float:
        return float(np.prod(shape))

    def total(self, z: Array, y: Array) -> Array:
        return self.arrays.sum(self.value(z, self.arrays.asarray(y, z)))

    def product(self, z: Array, y: Array, u: Array) -> Array:
        return self.second(z, self.arrays.asarray(y, z)) * u

    def root(self, z: Array, y: Array, signs: Array) -> Array:
        return self.arrays.sqrt(self.second(z, self.arrays.asarray(y, z))) * signs


class Regression(Elementwise):
    """A loss of real targets, whose outputs are measured in the targets' standard deviation."""

    def _unit(self, y: Array) -> float:
        values = self.arrays.numpy(y).astype(np.float64)
        return float(np.sqrt(values.var(axis=0).mean()) or np.sqrt(np.mean(values**2)) or 1.0)


@dataclass(frozen=True)
class SquaredError(Regression):
    """``(z − y)²``."""

    def value(self, z: Array, y: Array) -> Array:
        return (z - y) * (z - y)

    def second(self, z: Array, y: Array) -> Array:
        return z * 0 + 2


@dataclass(frozen=True)
class BinaryCrossEntropy(Elementwise):
    """``−[π y log σ(z) + (1 − y) log(1 − σ(z))]``; from probabilities with z in place of σ(z).

    Args:
        weight: of each entry, broadcast to the outputs, or None.
        pos_weight: π, broadcast likewise, or None for 1.
        label_smoothing: s; the targets become ``y (1 − s) + s/2``.
        outputs: ``"logits"`` or ``"probabilities"``.
    """

    weight: Array | None = None
    pos_weight: Array | None = None
    label_smoothing: float = 0.0
    outputs: str = LOGITS

    def _parts(self, z: Array, y: Array) -> tuple[Array, Array]:
        """Weights of ``−log σ`` and of ``−log(1 − σ)``."""
        a, s = self.arrays, self.label_smoothing
        y = y * (1 - s) + s / 2
        positive, negative = y, 1 - y
        if self.pos_weight is not None:
            positive = positive * a.asarray(self.pos_weight, z)
        if self.weight is not None:
            positive, negative = positive * a.asarray(self.weight, z), negative * a.asarray(self.weight, z)
        return positive, negative

    def value(self, z: Array, y: Array) -> Array:
        a = self.arrays
        positive, negative = self._parts(z, y)
        if self.outputs == LOGITS:
            return positive * a.softplus(-z) + negative * a.softplus(z)
        p = a.clip(z, TINY, 1 - TINY)
        return -positive * a.log(p) - negative * a.log(1 - p)

    def second(self, z: Array, y: Array) -> Array:
        a = self.arrays
        positive, negative = self._parts(z, y)
        if self.outputs == LOGITS:
            return a.sigmoid(z) * a.sigmoid(-z) * (positive + negative)
        p = a.clip(z, TINY, 1 - TINY)
        return (positive + negative) / (p * (1 - p))

    def natural(self, z: Array, y: Array) -> Array:
        if self.outputs == LOGITS:
            return z
        p = self.arrays.clip(z, TINY, 1 - TINY)
        return self.arrays.log(p) - self.arrays.log(1 - p)


@dataclass(frozen=True)
class PoissonNLL(Elementwise):
    """``exp(z) − y z`` for log-rates z; ``z − y log(z + ε)`` for rates.

    Args:
        log_input: whether the outputs are log-rates.
        eps: ε.
    """

    log_input: bool = True
    eps: float = 1e-8

    def value(self, z: Array, y: Array) -> Array:
        a = self.arrays
        return a.exp(z) - y * z if self.log_input else z - y * a.log(z + self.eps)

    def second(self, z: Array, y: Array) -> Array:
        return self.arrays.exp(z) if self.log_input else y / ((z + self.eps) * (z + self.eps))


@dataclass(frozen=True)
class Huber(Regression):
    """``(z − y)²/2`` up to δ and ``δ(|z − y| − δ/2)`` beyond, times a factor (1/δ for torch's smooth L1).

    Args:
        delta: δ.
        factor: of the whole.
    """

    delta: float = 1.0
    factor: float = 1.0

    def value(self, z: Array, y: Array) -> Array:
        a, delta = self.arrays, self.delta
        d = a.abs(z - y)
        return self.factor * a.where(d <= delta, d * d / 2, delta * (d - delta / 2))

    def second(self, z: Array, y: Array) -> Array:
        return self.arrays.where(self.arrays.abs(z - y) <= self.delta, z * 0 + self.factor, z * 0)


@dataclass(frozen=True)
class Custom(Loss):
    """Any twice-differentiable scalar function of (outputs, targets).

    Its Hessian in the outputs comes from automatic differentiation. A mean over samples is assumed, so that batches
    count by their numbers of samples; with ``mean=False`` their values are added.

    Args:
        function: of (outputs, targets).
        derivatives: the framework's (:class:`hessinit.networks.base.Derivatives`).
    """

    function: Callable[[Array, Array], Array] = lambda z, y: z
    derivatives: Any = None
    analytic_root: ClassVar[bool] = False

    def check(self, z: Array, y: Array) -> None:
        """Any targets may do."""

    def count(self, shape: Shape, y: Array) -> float:
        return float(shape[0]) if shape else 1.0

    def total(self, z: Array, y: Array) -> Array:
        value = self.function(z, y)
        shape = tuple(getattr(value, "shape", ()))
        if int(np.prod(shape)) != 1:
            raise ValueError(f"loss must be a scalar; got one of shape {shape} (take its mean)")
        return self.arrays.reshape(value, ()) * (self.count(tuple(z.shape), y) if self.mean else 1.0)

    def product(self, z: Array, y: Array, u: Array) -> Array:
        return self.derivatives.hvp(lambda v: self.total(v["z"], y), {"z": z}, {"z": u}, ["z"])[1]["z"]

    def columns(self, z: Array, y: Array) -> Iterator[tuple[float, Array]]:
        """From the dense Hessian of the total, so z is best one sample's."""
        products = [
            self.product(z, y, self.arrays.asarray(e.reshape(z.shape), z)) for e in np.eye(int(np.prod(z.shape)))
        ]
        dense = np.stack([self.arrays.numpy(product).astype(np.float64).ravel() for product in products])
        values, vectors = np.linalg.eigh((dense + dense.T) / 2)
        for value, vector in zip(values, vectors.T, strict=True):
            if value:
                scaled = vector * abs(value) ** 0.5
                yield float(np.sign(value)), self.arrays.asarray(scaled.reshape(z.shape), z)


# Losses by name; every framework's own names and classes are translated to these by its adapter.
NAMES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": lambda arrays, **keywords: CrossEntropy(
        arrays, **{"ignore_index": -100, "axis": None, **keywords}
    ),
    "mse": SquaredError,
    "bce_with_logits": BinaryCrossEntropy,
    "nll": lambda arrays, **keywords: CrossEntropy(
        arrays, outputs=LOG_PROBABILITIES, ignore_index=-100, axis=None, **keywords
    ),
    "poisson_nll": PoissonNLL,
    "huber": Huber,
}


def named(name: str, arrays: Any, **keywords: Any) -> Loss:
    """The loss of a name in ``NAMES``, a mean over terms.

    Raises:
        ValueError: unknown name.
    """
    key = name.lower().replace("-", "_")
    if key not in NAMES:
        raise ValueError(f"loss must be one of {', '.join(NAMES)}, or a callable; got {name!r}")
    return NAMES[key](arrays, **keywords)
