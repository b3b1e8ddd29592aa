"""Random weights of a given root mean square: one law a function, the same numbers for every framework.

All laws draw from a ``numpy.random.Generator`` that is passed in, in float32 (float64 for float64 weights), so
that a seed means the same weights in PyTorch and Keras, on CPU and on accelerators, and in half precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from scipy.linalg import solve_triangular
from scipy.special import ndtr, ndtri

from hessinit.layout import Layout

Weights = npt.NDArray[np.floating[Any]]
Stack = tuple[int, int, int]
Law = Callable[[Stack, np.random.Generator, "npt.DTypeLike"], Weights]

WIDEST = 1024  # short side of a matrix up to which it comes from a QR decomposition: 0.3 s
TALL, MANY = 4, 2**20  # sides' ratio and entries from which a Cholesky factor does for QR, in a fifth of the time
TRUNCATION = 2.0  # in standard deviations of the normal before truncation


def _normal(stack: Stack, rng: np.random.Generator, dtype: Any) -> Weights:
    return rng.standard_normal(stack, dtype=dtype)


def _uniform(stack: Stack, rng: np.random.Generator, dtype: Any) -> Weights:
    return np.asarray((2 * rng.random(stack, dtype=dtype) - 1) * np.sqrt(3.0), dtype=dtype)


def _truncated_normal(stack: Stack, rng: np.random.Generator, dtype: Any) -> Weights:
    """Inverse distribution function, divided by its own standard deviation (0.8796 for two sigmas)."""
    low = ndtr(-TRUNCATION)
    density = np.exp(-(TRUNCATION**2) / 2) / np.sqrt(2 * np.pi)
    std = np.sqrt(1 - 2 * TRUNCATION * density / (1 - 2 * low))
    return np.asarray(ndtri(low + (1 - 2 * low) * rng.random(stack, dtype=dtype)) / std, dtype=dtype)


def _orthogonal(stack: Stack, rng: np.random.Generator, dtype: Any) -> Weights:
    """Semi-orthogonal rows or columns with the Frobenius norm of independent unit entries.

    Uniform (Haar) from a QR decomposition, whose time grows with the third power of the width, and of a large tall
    matrix, whose columns are almost orthogonal as drawn, from the Cholesky factor of their products; for widths above
    ``WIDEST`` three times a random permutation, random signs and a cosine transform, whose time grows with the number
    of entries times the logarithm of the width.

    References:
        F. Yu et al., "Orthogonal random features", NeurIPS 2016 (products of signs and fast transforms for uniform
        orthogonal matrices). Y. Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", Electronic
        Transactions on Numerical Analysis 2015 (the error is that of the square of the condition number, here below 9).
    """
    copies, outputs, inputs = stack
    long, short = max(outputs, inputs), min(outputs, inputs)
    if short <= WIDEST:
        drawn = rng.standard_normal((copies, long, short), dtype=dtype)
        if long >= TALL * short and long * short >= MANY:
            q = np.stack([solve_triangular(np.linalg.cholesky(x.T @ x), x.T, lower=True).T for x in drawn])
        else:
            q, r = np.linalg.qr(drawn)
            q = q * np.where(np.diagonal(r, axis1=1, axis2=2) < 0, -1, 1)[:, None, :]  # QR's own signs are not uniform
    else:
        q = np.stack([np.eye(long, short, dtype=dtype)] * copies)
        for turned in q:
            for _ in range(3):
                flips = signs(rng, (long, 1)).astype(dtype)
                turned[:] = dct(turned[rng.permutation(long)] * flips, axis=0, norm="ortho", overwrite_x=True)
    return np.asarray((q if outputs >= inputs else q.transpose(0, 2, 1)) * np.sqrt(long), dtype=dtype)


class Pairs(NamedTuple):
    """Units of opposite weights, which a following layer takes with opposite signs.

    Args:
        outputs: whether the second half of the outputs has the weights of the first with opposite signs.
        repeats: how many rows the inputs are, one after the other, in each of which the weights of the second half are
            those of the first with opposite signs; 0 for none.
    """

    outputs: bool = False
    repeats: int = 0


UNPAIRED = Pairs()

LAWS: dict[str, Law] = {
    "orthogonal": _orthogonal,
    "normal": _normal,
    "truncated_normal": _truncated_normal,
    "uniform": _uniform,
}


def check_distribution(distribution: str, function: str) -> str:
    """The name itself, if it is one of ``LAWS``; else a ValueError that lists them."""
    if distribution not in LAWS:
        raise ValueError(f"{function}: distribution must be one of {', '.join(LAWS)}; got {distribution!r}.")
    return distribution


def draw(
    shape: Sequence[int],
    layout: Layout,
    std: float,
    distribution: str,
    rng: np.random.Generator,
    dtype: npt.DTypeLike = np.float32,
    pairs: Pairs = UNPAIRED,
) -> Weights:
    """Weights of a given root mean square.

    Args:
        shape: of the weight; any axis may be zero.
        layout: its axes; the orthogonal law makes each copy's (outputs, inputs x positions) matrix orthogonal.
        std: standard deviation of the entries; for ``"orthogonal"`` the exact root mean square of each copy.
        distribution: ``"orthogonal"``, ``"normal"``, ``"truncated_normal"`` (at two standard deviations) or
            ``"uniform"``. All have mean zero and the std asked for.
        rng: decides everything.
        dtype: float32 or float64.
        pairs: which units come in pairs of opposite weights; of a single copy only.

    Example:
        >>> w = draw((128, 784), Layout("oi"), 0.05, "orthogonal", np.random.default_rng(0))
        >>> bool(np.allclose(w @ w.T, 0.05**2 * 784 * np.eye(128), atol=1e-5))
        True
    """
    stack, sorted_shape, back = layout.blocks(shape)
    if 0 in stack:
        return np.zeros(tuple(shape), dtype)
    unit = _paired(stack, LAWS[distribution], rng, dtype, pairs)
    return np.asarray(std * unit, dtype=dtype).reshape(sorted_shape).transpose(back).reshape(tuple(shape))


def _paired(stack: Stack, law: Law, rng: np.random.Generator, dtype: Any, pairs: Pairs) -> Weights:
    """Half of the weights, and the others from them."""
    copies, rows, columns = stack
    unit = law((copies, rows // 2 if pairs.outputs else rows, columns // 2 if pairs.repeats else columns), rng, dtype)
    if pairs.repeats:
        split = unit.reshape(copies, unit.shape[1], pairs.repeats, -1)
        unit = np.concatenate([split, -split], axis=3).reshape(copies, unit.shape[1], columns)
    return np.concatenate([unit, -unit], axis=1) if pairs.outputs else unit


def signs(rng: np.random.Generator, shape: Sequence[int]) -> Weights:
    """Random signs, each with probability one half."""
    return rng.integers(0, 2, tuple(shape)) * 2.0 - 1.0


def balanced_signs(rng: np.random.Generator, shape: Sequence[int], axis: int) -> Weights:
    """Random signs whose rows along an axis are orthogonal to each other in blocks.

    Each row is uniform over all signs and uncorrelated with every other, so an estimate from them is unbiased as from
    independent ones. With n entries a row and m the next power of two, every m rows hold each row of a Hadamard matrix
    of that size once, cut to n entries, with the signs of its columns and rows drawn: the sum of ``ε εᵀ`` over them is
    m times the identity, so a quadratic form that is the same for all rows has no spread.

    Args:
        rng: source of randomness.
        shape: of the signs.
        axis: along which the entries of a row lie.

    References:
        C. Bekas, E. Kokiopoulou and Y. Saad, "An estimator for the diagonal of a matrix", Applied Numerical
        Mathematics 57, 2007, section 3 (Hadamard vectors).
    """
    entries = shape[axis]
    others = [n for k, n in enumerate(shape) if k != axis % len(shape)]
    rows, bits = int(np.prod(others)), max(entries - 1, 0).bit_length()
    blocks = np.tile(np.arange(2**bits), (-(-rows // 2**bits), 1))
    chosen = rng.permuted(blocks, axis=1).ravel()[:rows, None]
    hadamard = np.ones((rows, 1), np.int8)
    for bit in range(bits):
        hadamard = np.concatenate([hadamard, hadamard * (1 - 2 * (chosen >> bit & 1)).astype(np.int8)], axis=1)
    of_rows, of_columns = (signs(rng, shape).astype(np.int8) for shape in ((rows, 1), (entries,)))
    drawn: Any = of_rows * of_columns * hadamard[:, :entries]
    return np.moveaxis(drawn.reshape(*others, entries), -1, axis)


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """The random stream of one weight: a function of the seed and of names alone, not of the order of calls."""
    digest = hashlib.blake2b("/".join(str(part) for part in (seed, *names)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
