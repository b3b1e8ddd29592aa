"""Gaussian moments of any activation, by adaptive Gauss-Legendre quadrature.

The closed form needs two numbers of an activation φ, its *moments* at variance v,

    p(v) = E φ(√v z)²        d(v) = E φ'(√v z)²        z ~ N(0, 1).

Plain Gauss-Hermite quadrature misses ReLU's d = 1/2 by several per cent, since a kink falls between its
nodes. Here the line is cut into panels, each panel carries the polynomial through 16 Gauss nodes, and a
panel is halved until that polynomial resolves φ. A kink ends up on a panel's edge, where no node lies and
where the derivative of the polynomial, which stands for φ', never looks across.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Activation = Callable[[Any], Any]

ORDER = 16
SPAN = 12.0  # standard deviations integrated over; the rest weighs 4e-33
REACH = 64.0  # kinks are looked for in [-REACH, REACH]
MAX_PANELS = 4096

NODES, WEIGHTS = np.polynomial.legendre.leggauss(ORDER)
_VANDERMONDE = np.polynomial.legendre.legvander(NODES, ORDER - 1)
_TO_COEFFICIENTS = np.linalg.inv(_VANDERMONDE)
_SLOPE_COEFFICIENTS = np.polynomial.legendre.legder(np.eye(ORDER))  # (ORDER - 1, ORDER)
_DERIVATIVE = _VANDERMONDE[:, :-1] @ _SLOPE_COEFFICIENTS @ _TO_COEFFICIENTS  # values at the nodes to slopes there
_EDGES = np.polynomial.legendre.legvander(np.array([-1.0, 1.0]), ORDER - 1)


def _values(activation: Activation, points: Array) -> tuple[Array, float]:
    """φ at ``points`` (panels, nodes), and the rounding unit of what it returned."""
    returned = np.asarray(activation(points.ravel()))
    if returned.shape != (points.size,):
        raise ValueError(f"it maps shape ({points.size},) to {returned.shape}")
    if not np.issubdtype(returned.dtype, np.floating):
        raise ValueError(f"it returns {returned.dtype}")
    if not np.isfinite(returned).all():
        at = float(points.ravel()[~np.isfinite(returned)][0])
        raise ValueError(f"it is not finite at {at:.4g}")
    unit = float(np.finfo(returned.dtype).eps)
    return returned.astype(np.float64).reshape(points.shape), unit


def _resolve(activation: Activation, edges: Array, scale: float = 1.0) -> tuple[Array, Array, Array, Array]:
    """Panels on which ``z ↦ φ(scale z)`` is a polynomial to rounding, and the points where it is not.

    Returns:
        Left ends, right ends, values at the nodes (panels, nodes), all sorted; and the midpoints of panels
        that stayed unresolved down to rounding: kinks or jumps inside a panel. These panels are dropped.
    """
    left, right = edges[:-1], edges[1:]
    done_left, done_right, done_values, kinks = [], [], [], []
    for _ in range(64):
        middle, half = (left + right) / 2, (right - left) / 2
        values, unit = _values(activation, scale * (middle[:, None] + half[:, None] * NODES))
        tail = np.abs((values @ _TO_COEFFICIENTS.T)[:, -2:]).max(axis=1)
        size = np.abs(values).max(axis=1)
        # Rounding: of the value, of terms as large as the argument that cancel in it, of the argument itself.
        slope = np.ptp(values, axis=1) / half
        noise = 64 * unit * (size + np.abs(middle) * (scale + slope) + 1e-3 * scale)
        resolved = tail <= np.maximum(1e-11 * size, noise)
        floor = half <= 64 * unit * np.maximum(1.0, np.abs(middle))
        kinks.append(middle[~resolved & floor])
        done_left.append(left[resolved])
        done_right.append(right[resolved])
        done_values.append(values[resolved])
        split = ~resolved & ~floor
        if not split.any():
            break
        if split.sum() > MAX_PANELS:
            raise ValueError("it is too rough to integrate")
        left, right, middle = left[split], right[split], middle[split]
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    order = np.argsort(np.concatenate(done_left))
    return (
        np.concatenate(done_left)[order],
        np.concatenate(done_right)[order],
        np.concatenate(done_values)[order],
        np.concatenate(kinks),
    )


def kinks(activation: Activation) -> Array:
    """Points in [-64, 64] where φ or its slope jumps.

    Example:
        >>> kinks(lambda u: np.clip(u, -1, 1)).round(9).tolist()
        [-1.0, 1.0]
    """
    left, right, values, inside = _resolve(activation, np.arange(-REACH, REACH + 0.5, 0.5))
    coefficients = values @ _TO_COEFFICIENTS.T
    slopes = coefficients @ _SLOPE_COEFFICIENTS.T @ _EDGES[:, :-1].T * (2 / (right - left))[:, None]
    levels = coefficients @ _EDGES.T
    _, unit = _values(activation, np.zeros((1, 1)))
    tolerance = max(1e-7, 1e4 * unit)
    joined = right[:-1] == left[1:]
    for ends in (levels, slopes):
        size = 1e-3 + np.maximum(np.abs(ends[:-1, 1]), np.abs(ends[1:, 0]))
        inside = np.concatenate([inside, right[:-1][joined & (np.abs(ends[:-1, 1] - ends[1:, 0]) > tolerance * size)]])
    return np.unique(inside.round(10))


def moments(activation: Activation, variance: float = 1.0, at: Array | None = None) -> tuple[float, float]:
    """Second moments of an activation and of its slope under a centred normal input.

    Args:
        activation: vectorised function of one real array.
        variance: v > 0 of the normal input.
        at: kinks of the activation, where known (default: :func:`kinks` finds them).

    Returns:
        ``(E φ(u)², E φ'(u)²)`` for ``u ~ N(0, variance)``. Derivatives are taken almost everywhere: a jump adds
        nothing to the second.

    Raises:
        ValueError: the activation is not finite, not real, changes shapes, or is too rough.

    Example:
        >>> [round(m, 12) for m in moments(lambda u: np.maximum(u, 0), 4.0)]
        [2.0, 0.5]
    """
    root = float(np.sqrt(variance))
    at = kinks(activation) if at is None else at
    cuts = at / root
    edges = np.unique(np.concatenate([np.arange(-SPAN, SPAN + 0.5, 0.5), cuts[np.abs(cuts) < SPAN]]))
    left, right, values, _ = _resolve(activation, edges, root)
    half = (right - left) / 2
    nodes = (left + right)[:, None] / 2 + half[:, None] * NODES
    weights = half[:, None] * WEIGHTS * np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi)
    slopes = values @ _DERIVATIVE.T / (half[:, None] * root)
    return float((weights * values**2).sum()), float((weights * slopes**2).sum())
