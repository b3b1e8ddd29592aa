"""Stochastic Lanczos quadrature: the density of a symmetric matrix's eigenvalues from matrix-vector products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh_tridiagonal
from scipy.sparse import linalg

Vector = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SpectralDensity:
    """Density of eigenvalues, smoothed by a normal kernel; it integrates to one.

    Args:
        grid: eigenvalues at which the density is given, shape (points,).
        density: mean over the probes, shape (points,).
        standard_error: of that mean, shape (points,).
        width: standard deviation of the kernel.
        nodes: Ritz values of each probe, shape (probes, steps); short runs are padded with weight zero.
        weights: quadrature weights of each probe, shape (probes, steps), each row of sum one.
    """

    grid: Vector
    density: Vector
    standard_error: Vector
    width: float
    nodes: Vector
    weights: Vector

    def moment(self, power: int) -> tuple[float, float]:
        """``tr(A^power) / n`` and its standard error."""
        values = np.sum(self.weights * self.nodes**power, axis=1)
        return float(values.mean()), standard_error(values)


def standard_error(values: Any, axis: int = 0) -> Any:
    """Standard error of the mean; infinite for one value."""
    values = np.asarray(values, np.float64)
    n = values.shape[axis]
    error = values.std(axis=axis, ddof=1) / np.sqrt(n) if n > 1 else np.full(np.delete(values.shape, axis), np.inf)
    return float(error) if np.ndim(error) == 0 else error


def lanczos(product: Callable[[Vector], Vector], start: Vector, steps: int) -> tuple[Vector, Vector]:
    """Diagonal and off-diagonal of the tridiagonal matrix of a Krylov space, with full reorthogonalisation.

    Args:
        product: ``v → A v`` of a symmetric A.
        start: first vector, shape (n,), not zero.
        steps: products; fewer are made where the space is exhausted.

    Example:
        >>> diagonal, off = lanczos(lambda v: np.array([1.0, 2.0, 3.0]) * v, np.ones(3), steps=10)
        >>> len(diagonal), eigh_tridiagonal(diagonal, off)[0].round(6)
        (3, array([1., 2., 3.]))

    References:
        G. Golub, C. Van Loan, "Matrix Computations", section 10.3.
    """
    steps = min(steps, start.size)
    basis = np.zeros((steps, start.size))
    basis[0] = start / np.linalg.norm(start)
    diagonal, off = [], []
    for k in range(steps):
        w = np.asarray(product(basis[k]), np.float64)
        diagonal.append(float(w @ basis[k]))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            w = w - basis[: k + 1].T @ (basis[: k + 1] @ w)
        beta = float(np.linalg.norm(w))
        if k + 1 == steps or beta <= 1e-12 * max(1.0, abs(diagonal[0])) * max(1.0, np.sqrt(start.size)):
            break
        off.append(beta)
        basis[k + 1] = w / beta
    return np.array(diagonal), np.array(off)


def spectral_density(
    product: Callable[[Vector], Vector], starts: list[Vector], steps: int, points: int, width: float | None
) -> SpectralDensity:
    """Density of the eigenvalues of a symmetric matrix.

    Args:
        product: ``v → A v``.
        starts: one random vector a probe, of independent entries of mean zero and equal variance.
        steps: Lanczos steps a probe.
        points: of the grid.
        width: of the smoothing kernel; None for 1 % of the range of Ritz values.

    References:
        S. Ubaru, J. Chen, Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix
        Anal. Appl. 2017. B. Ghorbani, S. Krishnan, Y. Xiao, "An investigation into neural net optimization via Hessian
        eigenvalue density", ICML 2019.
    """
    nodes, weights = np.zeros((len(starts), steps)), np.zeros((len(starts), steps))
    for probe, start in enumerate(starts):
        diagonal, off = lanczos(product, start, steps)
        values, vectors = eigh_tridiagonal(diagonal, off)
        nodes[probe, : values.size], weights[probe, : values.size] = values, vectors[0] ** 2
    low, high = nodes[weights > 0].min(), nodes[weights > 0].max()
    spread = (high - low) or max(abs(high), 1.0)
    width = 0.01 * spread if width is None else width
    grid = np.linspace(low - 4 * width, high + 4 * width, points)
    kernel = np.exp(-(((grid - nodes[..., None]) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    densities = np.einsum("ps,psg->pg", weights, kernel)
    return SpectralDensity(grid, densities.mean(axis=0), standard_error(densities), width, nodes, weights)


def spectral_norm(operator: Any, symmetric: bool, start: Vector, tol: float = 0.0) -> float:
    """Largest singular value of a ``scipy.sparse.linalg.LinearOperator``, by Lanczos.

    Args:
        operator: of shape (m, n), with an adjoint unless symmetric.
        symmetric: whether it is.
        start: vector of length min(m, n).
        tol: relative accuracy; 0 for that of the arithmetic.
    """
    if min(operator.shape) <= 16:  # where Lanczos has no room
        thin = operator if operator.shape[1] <= operator.shape[0] else operator.H
        return float(np.linalg.norm(thin @ np.eye(thin.shape[1]), 2))
    if symmetric:
        values = linalg.eigsh(operator, k=1, which="LM", v0=start, tol=tol, return_eigenvectors=False)
        return float(abs(values[0]))
    return float(linalg.svds(operator, k=1, v0=start, tol=tol, return_singular_vectors=False)[0])
