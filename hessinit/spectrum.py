"""Stochastic Lanczos quadrature: the density of a symmetric matrix's eigenvalues from matrix-vector products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh_tridiagonal

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


def eigenpairs(
    product: Callable[[Vector], Vector],
    start: Vector,
    k: int = 1,
    which: str = "LM",
    tol: float = 0.0,
    ncv: int | None = None,
    maxiter: int | None = None,
) -> tuple[Vector, Vector]:
    """Some eigenvalues of a symmetric matrix with their vectors, by Lanczos with thick restarts.

    Stops after the product with which every residual ``|A x - θ x|`` is below ``tol |θ|``, as the error of θ is of
    second order in it; ARPACK looks only when its basis is full.

    Args:
        product: ``v → A v``.
        start: vector of length n, not zero; its dtype is that of the basis.
        k: how many, below n.
        which: ``"LM"`` (largest magnitude), ``"LA"`` (largest), ``"SA"`` (smallest), ``"SM"`` (smallest magnitude).
        tol: 0 for the accuracy of the dtype.
        ncv: vectors in the basis, above k + 1; None for ``max(2k + 1, 20)``.
        maxiter: restarts; None for 10 n.

    Returns:
        Eigenvalues of shape (k,), ascending, and eigenvectors of shape (n, k).

    Raises:
        RuntimeError: not converged after that many restarts.

    Example:
        >>> values, vectors = eigenpairs(lambda v: np.arange(100.0) * v, np.ones(100), k=2)
        >>> values.round(6), np.abs(vectors[:, 1]).argmax()
        (array([98., 99.]), np.int64(99))

    References:
        K. Wu, H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
        Appl. 2000.
    """
    n, dtype = start.size, start.dtype
    size, near, restarts, refill = 0, 0, 0, np.random.default_rng(0)
    room = min(max(2 * k + 1, 20) if ncv is None else ncv, n)
    tol = max(tol, float(np.finfo(dtype).eps))
    basis, projected, w = np.zeros((room, n), dtype), np.zeros((room, room)), start
    while True:
        basis[size] = w / np.linalg.norm(w)
        w = np.array(product(basis[size]), dtype)
        size += 1
        along = basis[near:size] @ w
        projected[near:size, size - 1] = projected[size - 1, near:size] = along
        w -= along @ basis[near:size]
        w -= (basis[:size] @ w) @ basis[:size]  # what rounding leaves
        off = float(np.linalg.norm(w))
        values, vectors = np.linalg.eigh(projected[:size, :size])
        order = np.argsort(_RANKS[which](values))
        residuals = off * np.abs(vectors[-1, order[:k]])
        largest = float(np.abs(values).max())
        bounds = tol * np.maximum(np.abs(values[order[:k]]), np.finfo(dtype).eps ** (2 / 3) * largest)
        if (size > k and (residuals <= bounds).all()) or size == n:
            chosen = np.sort(order[:k])
            return values[chosen], basis[:size].T @ vectors[:, chosen].astype(dtype)
        near = size - 1  # a product with the next vector has no part along those before
        if size == room:
            if restarts == (10 * n if maxiter is None else maxiter):
                raise RuntimeError(f"{int((residuals > bounds).sum())} of {k} eigenvalues have not converged after "
                                   f"{restarts} restarts: raise tol, ncv or maxiter")  # fmt: skip
            restarts += 1
            size, near = min(k + (room - k) // 2, room - 1), 0
            best = order[:size]
            basis[:size] = vectors[:, best].T.astype(dtype) @ basis
            projected[:] = 0
            projected[range(size), range(size)] = values[best]
        if off <= np.finfo(dtype).eps * largest:  # the space is exhausted: on in a new direction
            w = refill.standard_normal(n).astype(dtype)
            for _ in range(2):
                w -= (basis[:size] @ w) @ basis[:size]


_RANKS: dict[str, Callable[[Vector], Vector]] = {
    "LM": lambda x: -np.abs(x),
    "LA": lambda x: -x,
    "SA": lambda x: x,
    "SM": np.abs,
}


def spectral_norm(
    product: Callable[[Vector], Vector], adjoint: Callable[[Vector], Vector] | None, start: Vector, tol: float = 0.0
) -> float:
    """Largest singular value of a matrix, by Lanczos.

    Args:
        product: ``v → A v``.
        adjoint: ``u → Aᵀu``; None for a symmetric A.
        start: a vector v.
        tol: relative accuracy; 0 for that of the dtype.
    """
    if adjoint is None:
        return float(abs(eigenpairs(product, start, tol=tol)[0][0]))
    return float(max(eigenpairs(lambda v: adjoint(product(v)), start, tol=tol)[0][0], 0.0) ** 0.5)
