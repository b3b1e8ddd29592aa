"""What the budget measures of a network: step sharpness, level and trace, and their slopes in the log scales.

With weights ``w_k = e^{θ_k} w_k⁰``, z the outputs on a batch and ``c = R ε`` for fixed random signs ε and
``D²_z ℓ = R Rᵀ``,

    T = |u|²,  u = Jᵀ c                      the trace of the approximate Hessian, in expectation over ε
    ∂ log T / ∂θ_k = 2 w_k · (D²(cᵀz) u)_k / T       one Hessian-vector product of a scalar, c held
    ∂ log r / ∂θ_k = w_k · (∇r)_k / r                one more backward pass

c is held because its own change with the outputs is a matter of their level, which the budget keeps. What the report
says of a point is noted when it is probed, so that it costs little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hessinit.batches import out_of_memory
from hessinit.budget import Point, Vector
from hessinit.draw import signs
from hessinit.networks.base import Array, Arrays, Bend, Derivatives, Function, Named, Network, Parameter, Pull
from hessinit.objective import Chunk, Objective

GRADIENT, FORWARD = 1.0, 1 / 3  # in gradient passes; a JVP counts as a gradient
SLOPES = 25 / 6  # measured: 4.1 to 4.6 in PyTorch, 3.8 to 4.6 in JAX, 4.8 to 5.0 in TensorFlow
MAX_PASSES = 30.0
GROWS = 0.02  # of the first step, by which the second is longer or shorter with momentum, but not with weight decay
EVEN = 1.01  # ratio of the growths of parameters, up to which they are one

Update = Callable[[Named, Named], dict[str, Array]]  # of (gradient, values)


@dataclass(frozen=True)
class Step:
    """The first step of an optimizer, and what it becomes.

    Args:
        update: of (gradient, values), the first step.
        growth: by parameter, the step of the long run over the first one if the gradient stayed the same: 1/(1 − μ) for
            SGD with momentum μ, 1 for Adam.
        degree: how the step scales with the gradient: 1 if proportional, 0 if by its sign alone.
    """

    update: Update
    growth: Mapping[str, float]
    degree: float


def sgd_step(lr: float) -> Step:
    """Of plain gradient descent."""
    return Step(lambda gradient, values: {name: -lr * g for name, g in gradient.items()}, {}, 1.0)


def optimizer_step(network: Network, optimizer: Any, gradient: Named, values: Named) -> Step:
    """Of any optimizer, found out by trying it: three steps on one gradient, one on its double.

    The long run is the limit of a geometric series through the three steps (Aitken's extrapolation), which is exact for
    heavy-ball and Nesterov momentum.
    """
    dot = network.arrays.dot

    def gains(gradients: Sequence[Named]) -> list[dict[str, float]]:
        steps = network.updates(optimizer, gradients, values, fresh=True)
        return [{name: dot(step[name], gradient[name]) for name in gradient} for step in steps]

    one, two, three = gains([gradient] * 3)
    growth = {name: _limit(first, two[name], three[name]) / first if first else 1.0 for name, first in one.items()}
    (twice,) = gains([{name: 2 * g for name, g in gradient.items()}])
    once, doubled = sum(one.values()), sum(twice.values())
    degree = float(np.clip(np.log2(doubled / once), 0, 1)) if once and doubled / once > 0 else 1.0

    def update(gradient: Named, values: Named) -> dict[str, Array]:
        return next(network.updates(optimizer, [gradient], values, fresh=True))

    return Step(update, growth, degree)


def _limit(one: float, two: float, three: float) -> float:
    first, second = two - one, three - two
    ratio = second / first if abs(first) > GROWS * abs(one) else 0.0
    return three + second * ratio / (1 - ratio) if 0 <= ratio < 0.9999 else three


@dataclass(frozen=True)
class Turn:
    """How far the step of the long run should turn weights whose scale the next norm takes out.

    Their outputs do not change with their scale s, their gradient falls as 1/s, so s decides one thing alone: the angle
    of a step, ``|Δ| / |w| ∝ s^-(1 + degree)`` (van Laarhoven, arXiv:1706.05350).

    Args:
        angle: in radians, the geometric mean over the weights.
        scales: smallest and largest scale, which all of them share.
        most: step sharpness above which only that of the other weights counts: a step too far makes these weights
            longer, and the next one turns them less (Arora et al., ICLR 2019).
    """

    angle: float
    scales: tuple[float, float]
    most: float


@dataclass(frozen=True)
class State:
    """A network at some scales.

    Args:
        loss: mean over the batch.
        sharpness: ρ of the step of the long run.
        level: r.
        predicted: change of the loss by the first step, by the quadratic model ``gᵀΔ + ΔᵀGΔ/2``.
        actual: change of the loss by the first step.
        curvature: by parameter, the trace of its block of the approximate Hessian (one random probe).
        units: by weight, the share of output units that no sample moves, and of those that move less than a thousandth
            of the layer's median: dead and saturated ones.
    """

    loss: float
    sharpness: float
    level: float
    predicted: float
    actual: float
    curvature: Mapping[str, float]
    units: Mapping[str, tuple[float, float]]


@dataclass
class _Seen:
    """What was noted at some scales: numbers of :class:`State`, the last two None until they are known.

    Args:
        scale: of the weights that turn.
    """

    scale: float
    sharpness: float
    loss: float
    predicted: float
    actual: float
    curvature: Mapping[str, float] | None = None
    units: Mapping[str, tuple[float, float]] | None = None


class NetworkProbe:
    """A :class:`hessinit.budget.Probe` of a model on a batch; the model itself is not written to.

    Args:
        objective: the loss on the batch.
        base: the weights to be scaled, at scale one.
        placed: other values that stand for the model's own.
        places: of each weight to be scaled, the place of its log scale in θ, which several may share.
        turning: weights whose scale the next norm takes out, at scale one; they have none in θ, and ``turn`` sets it.
        step: of the optimizer.
        gradient: at scale one, where it is known; the first probe is there.
        passes: gradient passes spent before.
    """

    def __init__(
        self,
        objective: Objective,
        base: Named,
        placed: Named,
        places: Sequence[int],
        step: Step,
        gradient: Named | None = None,
        passes: float = 0.0,
        turning: Named | None = None,
    ) -> None:
        self.objective, self.base, self.places, self.turning = objective, dict(base), list(places), dict(turning or {})
        self.others = {**placed, **self.turning}
        self.step, self.trained = step, trained(objective, [*base, *self.turning])
        self.turn: Turn | None = None
        self.arrays = objective.network.arrays
        self.derivatives = OrDifferences(objective.network.derivatives, self.arrays)
        self.passes = passes
        self._probe = 2 * GRADIENT + FORWARD  # passes of the next one
        self._seen: dict[bytes, _Seen] = {}
        self._known = gradient

    def affords(self, slopes: bool) -> bool:
        """Whether another probe, after slopes or not, and the report leave ``passes`` within ``MAX_PASSES``."""
        return self.passes + slopes * SLOPES + self._probe + GRADIENT <= MAX_PASSES

    def measure(self, theta: Vector) -> tuple[float, float]:
        """Step sharpness, as far as it counts, and level at these log scales: mostly less than three passes."""
        self._place(theta)
        gradient, values = self._gradient(theta), self._values()
        step = self.step.update(gradient, values)
        # What a step at another scale does, one of another length does at this scale, and the gradient is at hand here.
        scale = self._turning_scale(step, values)
        eased = scale ** -(1 + self.step.degree)
        step |= {name: eased * step[name] for name in self.turning if eased != 1}
        gains = {name: self.arrays.dot(gradient[name], step[name]) for name in self.trained}
        del gradient
        growth = {name: self.step.growth.get(name, 1.0) for name in step}
        gain = sum(growth[name] * gains[name] for name in gains)
        self.passes += FORWARD
        after = self.objective.value(at={**values, **{name: values[name] + d for name, d in step.items()}})
        least, most = min(growth.values()), max(growth.values())
        uneven = not 0 < most <= EVEN * least
        self._probe = (3 if uneven else 2) * GRADIENT + FORWARD
        first = self._along(step)[0] if uneven else None
        # Each part of the step goes as its grown one comes, so that there are never two of the whole.
        grown = {name: step.pop(name) if by == 1.0 else by * step.pop(name) for name, by in growth.items()}
        form, level, loss = self._along(grown)
        predicted = sum(gains.values()) + (form / most**2 if first is None else first) / 2
        sharpness = form / abs(gain) if gain else float("nan")
        self._noted = self._seen[theta.tobytes()] = _Seen(scale, sharpness, loss, predicted, after - loss)
        if self.turn is None or not sharpness > self.turn.most:
            return sharpness, level
        gain = sum(growth[name] * gains[name] for name in gains if name not in self.turning)
        grown |= {name: 0 * grown[name] for name in self.turning}
        self._probe += GRADIENT
        return max(self._along(grown)[0] / abs(gain) if gain else 0.0, self.turn.most), level

    def slopes(self) -> tuple[Vector, Vector]:
        """``∇ log T`` and ``∇ log r`` at the log scales measured last: between four and five passes."""
        self.passes += SLOPES
        loss, names = self.objective.loss, list(self.base)
        rng = self.objective.probe_stream(0)

        def work(chunk: Chunk) -> tuple[Array, Any]:
            values = self._values()
            z, pull, bend = self.derivatives.bend(chunk.outputs, chunk.along, values, self.trained, names)
            square, slope = self.derivatives.gradient(
                lambda v: loss.level(v["z"], chunk.targets)[0], {"z": z}
            )  # in z alone
            risen = pull(slope["z"])
            level_slope = np.array([self.arrays.dot(values[n], risen[n]) / 2 for n in names])
            del risen
            u, bent = bend(self._rooted(chunk, z, rng))
            return z, self._traces(u) | {
                "trace slope": np.array([2 * self.arrays.dot(values[n], bent[n]) for n in names]),
                "level": float(self.arrays.numpy(square)),
                "level slope": level_slope,
            }

        found = self.objective.over_data(work)
        self._note(self._noted, found)
        trace, level = (
            np.bincount(self.places, found[f"{name} slope"]).astype(np.float64) for name in ("trace", "level")
        )
        return _ratio(trace, sum(found["curvature"].values())), _ratio(level, found["level"])

    def describe(self, point: Point) -> State:
        """Everything the report says of a point that was measured: one pass, none where its slopes were asked for."""
        seen = self._seen[point.theta.tobytes()]
        if seen.curvature is None:
            self._place(point.theta)
            self.passes += GRADIENT
            rng = self.objective.probe_stream(0)

            def work(chunk: Chunk) -> tuple[Array, dict[str, Any]]:
                z, pull = self.derivatives.vjp(chunk.outputs, self._values())
                return z, self._traces(pull(self._rooted(chunk, z, rng)))

            self._note(seen, self.objective.over_data(work))
        assert seen.curvature is not None
        assert seen.units is not None
        curvature = {n: t / seen.scale**2 if n in self.turning else t for n, t in seen.curvature.items()}
        return State(seen.loss, seen.sharpness, point.level, seen.predicted, seen.actual, curvature, seen.units)

    def turned(self, point: Point) -> float:
        """The scale of the weights that turn, at a point that was measured."""
        return self._seen[point.theta.tobytes()].scale

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _place(self, theta: Vector) -> None:
        scales = zip(self.base.items(), np.exp(theta[self.places]), strict=True)
        scaled = {name: w if scale == 1 else w * float(scale) for (name, w), scale in scales}
        self.objective.placed = {**self.others, **scaled}

    def _turning_scale(self, step: Named, values: Named) -> float:
        """At which the step turns the weights as far as it should; 1 where it turns none."""
        if self.turn is None:
            return 1.0
        dot, growth = self.arrays.dot, self.step.growth
        squares = [(growth.get(n, 1.0) ** 2 * dot(step[n], step[n]), dot(values[n], values[n])) for n in self.turning]
        logs = [np.log(moved / size) / 2 for moved, size in squares if 0 < moved < np.inf and size > 0]
        if not logs:
            return 1.0
        scale = (np.exp(np.mean(logs)) / self.turn.angle) ** (1 / (1 + self.step.degree))
        return float(np.clip(scale, *self.turn.scales))

    def _values(self) -> dict[str, Array]:
        return self.objective.values(self.trained)

    def _gradient(self, theta: Vector) -> Named:
        known, self._known = self._known, None
        if known is not None and not theta.any():
            return known
        self.passes += GRADIENT
        return self.objective.gradient(self.trained)

    def _along(self, step: Named) -> tuple[float, float, float]:
        """``ΔᵀGΔ``, the level and the loss: one forward-mode pass."""
        self.passes += GRADIENT
        loss = self.objective.loss

        def work(chunk: Chunk) -> tuple[Array, Any]:
            z, dz = self.derivatives.jvp(chunk.outputs, self._values(), step)
            form = self.arrays.dot(dz, loss.product(z, chunk.targets, dz))
            square, number = loss.level(z, chunk.targets)
            total = loss.total(z, chunk.targets)
            return z, np.array([form, float(self.arrays.numpy(square)), number, float(self.arrays.numpy(total))])

        form, square, number, value = self.objective.over_data(work)
        return float(form), float(np.sqrt(square / number)), float(value)

    def _traces(self, pulled: Named) -> dict[str, Any]:
        """A chunk's traces by parameter, and the squares that tell of its units."""
        parameters = self.objective.parameters
        weights = [name for name in (*self.base, *self.turning) if parameters[name].layout is not None]
        return {
            "curvature": {name: self.arrays.dot(pulled[name], pulled[name]) for name in self.trained},
            "units": {n: unit_squares(self.arrays, parameters[n], pulled[n]) for n in weights},
        }

    @staticmethod
    def _note(seen: _Seen, found: Mapping[str, Any]) -> None:
        seen.curvature = found["curvature"]
        seen.units = {name: _silent(squares) for name, squares in found["units"].items()}

    def _rooted(self, chunk: Chunk, z: Array, rng: np.random.Generator) -> Array:
        """``R ε``. Where a loss has no root, ``D²_z ℓ ε`` of the length that its root would give on the whole."""
        loss, y = self.objective.loss, chunk.targets
        epsilon = self.arrays.asarray(signs(rng, z.shape), z)
        if loss.analytic_root:
            return loss.root(z, y, epsilon)
        product = loss.product(z, y, epsilon)
        return product * (abs(self.arrays.dot(epsilon, product)) / (self.arrays.dot(product, product) or 1.0)) ** 0.5


def trained(objective: Objective, weights: Iterable[str]) -> list[str]:
    """Names of all parameters that train, and of these weights."""
    return list(dict.fromkeys([*objective.select(None), *weights]))


def unit_squares(arrays: Arrays, parameter: Parameter, pulled: Array) -> Vector:
    """Squares of what moves each output unit of a weight, from what was pulled back to it."""
    assert parameter.layout is not None  # of every weight
    if parameter.derived:  # what scales the units of a weight one by one
        return np.asarray(np.square(arrays.numpy(pulled), dtype=np.float64).ravel())
    stack, sorted_shape, back = parameter.layout.blocks(parameter.shape)
    split = arrays.numpy(pulled).reshape([sorted_shape[axis] for axis in back])
    arranged = split.transpose(np.argsort(back)).reshape(stack)
    return np.asarray(np.square(arranged, dtype=np.float64).sum(axis=2).ravel())


def _ratio(x: Vector, y: float) -> Vector:
    return x / y if y > 0 else np.zeros_like(x)


def _silent(squares: Vector) -> tuple[float, float]:
    """Shares of units that are dead (nothing at all) and saturated (less than a thousandth of the median)."""
    dead = squares == 0
    living = squares[~dead]
    saturated = living < 1e-6 * np.median(living) if living.size else living
    return float(dead.mean()), float(saturated.sum() / squares.size)


class OrDifferences:
    """Derivatives, by central differences where the framework has none (a custom backward that cannot be derived)."""

    def __init__(self, derivatives: Derivatives, arrays: Arrays) -> None:
        self.vjp, self.gradient = derivatives.vjp, derivatives.gradient
        self._exact, self._arrays = derivatives, arrays

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Array, Array]:
        """``f(values)`` and ``J tangents``."""
        try:
            return self._exact.jvp(f, values, tangents)
        except _MISSING as error:
            if out_of_memory(error):
                raise
        up, down, h = self._moved(values, tangents)  # an error from here is one of its own, not a second one
        plus, minus = (self._exact.vjp(f, moved)[0] for moved in (up, down))
        return self._exact.vjp(f, values)[0], (plus - minus) / (2 * h)

    def bend(
        self, f: Function, along: Callable[[Array], Function], values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Array, Pull, Bend]:
        """``f(values)``, ``u → Jᵀu`` and :class:`hessinit.networks.base.Bend`."""
        z, pull, exact = self._exact.bend(f, along, values, cols, rows)

        def bend(c: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            try:
                return exact(c)
            except _MISSING as error:
                if out_of_memory(error):
                    raise
            pulled = pull(c)
            u = {name: pulled[name] for name in cols}
            up, down, h = self._moved(values, u)
            plus, minus = (self._exact.gradient(along(c), moved)[1] for moved in (up, down))
            return u, {n: (plus[n] - minus[n]) / (2 * h) for n in rows}

        return z, pull, bend

    def _moved(self, values: Named, tangents: Named) -> tuple[dict[str, Array], dict[str, Array], float]:
        """Values a small way along tangents, up and down, and the way."""
        size, reach = (
            max((float(np.abs(self._arrays.numpy(named[n])).max(initial=0)) for n in tangents), default=0.0) or 1.0
            for named in (values, tangents)
        )
        h = 1e-3 * size / reach
        up = {n: v + h * tangents[n] if n in tangents else v for n, v in values.items()}
        down = {n: v - h * tangents[n] if n in tangents else v for n, v in values.items()}
        return up, down, h


_MISSING = (RuntimeError, LookupError, NotImplementedError, TypeError)
