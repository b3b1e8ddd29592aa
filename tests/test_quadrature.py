import numpy as np
import pytest
from reference import gaussian_moments
from scipy import special

from hessinit.quadrature import kinks, moments
from hessinit.rules import ACTIVATIONS


@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_moments_agree_with_a_fine_grid(name, variance):
    p, d = moments(ACTIVATIONS[name], variance)
    expected = gaussian_moments(ACTIVATIONS[name], variance)
    assert (p, d) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("function", "variance", "p", "d"),
    [
        (lambda u: np.maximum(u, 0), 1.0, 0.5, 0.5),
        (lambda u: np.where(u > 0, u, 0.2 * u), 4.0, 4 * 0.52, 0.52),
        (np.abs, 1e-8, 1e-8, 1.0),
        (lambda u: np.exp(np.minimum(u, 40)), 1.0, np.e**2, np.e**2),
        (lambda u: u**2, 1.0, 3.0, 4.0),
        (np.sin, 1.0, (1 - np.exp(-2)) / 2, (1 + np.exp(-2)) / 2),
        (special.erf, 1.0, 2 / np.pi * np.arcsin(2 / 3), 4 / np.pi / np.sqrt(5)),
        (lambda u: np.clip(u, -1, 1), 1.0, 0.5160585509617133, special.erf(1 / np.sqrt(2))),
    ],
)
def test_moments_equal_closed_forms(function, variance, p, d):
    assert moments(function, variance) == pytest.approx((p, d), rel=1e-10)


def test_gauss_hermite_misses_what_panels_do_not():
    z, w = np.polynomial.hermite_e.hermegauss(20)
    hermite = float((w / w.sum() * (z > 0.1)).sum())  # E φ'(u)² of a ReLU shifted by 0.1
    shifted = moments(lambda u: np.maximum(u - 0.1, 0))[1]
    truth = float(special.ndtr(-0.1))
    assert shifted == pytest.approx(truth, rel=1e-9)
    assert abs(hermite / truth - 1) > 0.05


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (np.tanh, []),
        (lambda u: np.maximum(u, 0), [0]),
        (lambda u: np.clip(u, 0, 6), [0, 6]),
        (lambda u: np.maximum(u - 1 / 3, 0), [1 / 3]),
        (lambda u: np.where(np.abs(u) > 0.5, u, 0.0), [-0.5, 0.5]),
    ],
)
def test_kinks_are_found(function, expected):
    found = kinks(function)
    assert all(np.abs(found - e).min() < 1e-9 for e in expected)
    assert all(min(abs(f - e) for e in expected) < 1e-6 for f in found)


def test_single_precision_functions_are_integrated_to_single_precision():
    single = moments(lambda u: np.tanh(u.astype(np.float32)))
    assert single == pytest.approx(moments(np.tanh), rel=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda u: u[:3], "maps shape"),
        (lambda u: u > 0, "returns bool"),
        (np.cosh, "not finite"),
        (lambda u: np.where(u > 3, np.nan, u), "not finite at"),
        (lambda u: np.sin(1e6 * u), "too rough"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_functions_that_cannot_be_integrated_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        kinks(lambda u: function(16 * u))
