import math

import numpy as np
import pytest
from scipy import stats

from hessinit.draw import LAWS, TRUNCATION, balanced_signs, check_distribution, draw, stream
from hessinit.layout import Layout

N = 200  # a law test sees N x N entries

CDF = {
    "normal": stats.norm(0, 1).cdf,
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)).cdf,
    "truncated_normal": (lambda t: stats.truncnorm(-TRUNCATION, TRUNCATION, scale=1 / t.std()).cdf)(
        stats.truncnorm(-TRUNCATION, TRUNCATION)
    ),
}


def sample(distribution, std, seed=0, dtype=np.float32):
    return draw((N, N), Layout("oi"), std, distribution, np.random.default_rng(seed), dtype)


@pytest.mark.parametrize("distribution", sorted(CDF))
def test_law_is_the_stated_one(distribution):
    w = sample(distribution, 0.3).ravel() / 0.3
    assert stats.kstest(w, CDF[distribution]).pvalue > 1e-3
    assert stats.kstest(w * 1.1, CDF[distribution]).pvalue < 1e-6  # the twin: a std 10 % off is rejected


@pytest.mark.parametrize("distribution", sorted(LAWS))
def test_std_is_the_one_asked_for(distribution):
    w = sample(distribution, 0.3).astype(np.float64)
    kurtosis = np.mean(w**4) / np.mean(w**2) ** 2
    error = 0.3 * math.sqrt((kurtosis - 1) / 4 / w.size)  # standard error of a root mean square
    rms = math.sqrt(np.mean(w**2))
    assert abs(rms - 0.3) < 4 * error
    assert abs(1.1 * rms - 0.3) > 4 * error
    assert abs(w.mean()) < 4 * 0.3 / N
    if distribution == "orthogonal":
        assert rms == pytest.approx(0.3, rel=1e-6)


def test_truncated_normal_stays_within_its_bounds():
    w = sample("truncated_normal", 1.0)
    bound = TRUNCATION / stats.truncnorm(-TRUNCATION, TRUNCATION).std()
    assert 0.99 * bound < np.abs(w).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((64, 32), Layout("oi")),
        ((32, 64), Layout("oi")),
        ((8, 4, 3, 3), Layout("oi...")),
        ((3, 3, 4, 8), Layout("...io")),
        ((12, 5), Layout("(go)i", groups=3)),
        ((3, 3, 6, 2), Layout("...go")),
        ((5, 2, 3), Layout("igo")),
    ],
)
def test_orthogonal_blocks_are_semi_orthogonal(shape, layout):
    std = 0.5
    w = draw(shape, layout, std, "orthogonal", np.random.default_rng(0), np.float64)
    (g, o, i), sorted_shape, back = layout.blocks(shape)
    unpacked = w.reshape([a.size for a in layout.expand(shape)])
    blocks = unpacked.transpose(np.argsort(back)).reshape(g, o, i)
    assert sorted_shape == unpacked.transpose(np.argsort(back)).shape
    for block in blocks:
        gram = block @ block.T if o <= i else block.T @ block
        assert gram == pytest.approx(std**2 * max(o, i) * np.eye(min(o, i)), abs=1e-12)
    if g > 1:
        assert not np.allclose(blocks[0], blocks[1])


@pytest.mark.parametrize(("shape", "layout"), [((60, 90), Layout("oi")), ((90, 60), Layout("io"))])
def test_wide_orthogonal_matrices_are_like_uniform_ones(shape, layout, monkeypatch):
    """Entries of Haar matrices are normal in the limit; rows of a square one turn any vector into a uniform one."""
    monkeypatch.setattr("hessinit.draw.WIDEST", 32)
    draws = np.stack([draw(shape, layout, 1.0, "orthogonal", np.random.default_rng(k), np.float64) for k in range(200)])
    w = draws[0] if shape[0] < shape[1] else draws[0].T
    np.testing.assert_allclose(w @ w.T, 90 * np.eye(60), atol=1e-10)
    spread = draws.std(axis=0)
    assert abs(draws.mean(axis=0)).max() < 5 / 200**0.5  # of every entry
    assert 0.75 < spread.min() < spread.max() < 1.25
    assert abs(np.mean(draws**4) - 3 * 90 / 92) < 0.03  # of a coordinate on the sphere in 90 dimensions
    between = np.einsum("kij,kil->jl", draws, draws) / draws.shape[0] / draws.shape[1]
    assert abs(between - np.diag(np.diagonal(between))).max() < 5 / (200 * 60) ** 0.5  # of every pair of columns


def test_orthogonal_is_uniform_over_rotations():
    """Traces of Haar orthogonal matrices have mean 0 and variance 1; QR without the sign fix has a negative mean."""
    rng = np.random.default_rng(0)
    traces = [np.trace(draw((8, 8), Layout("oi"), 8**-0.5, "orthogonal", rng)) for _ in range(2000)]
    assert abs(np.mean(traces)) < 4 / math.sqrt(2000)
    raw = [np.trace(np.linalg.qr(rng.standard_normal((8, 8)))[0]) for _ in range(2000)]
    assert abs(np.mean(raw)) > 4 / math.sqrt(2000)


@pytest.mark.parametrize(("shape", "axis"), [((6,), 0), ((7, 1), -1), ((5, 3), 1), ((2, 10, 9), 1), ((3, 4, 5), -1)])
def test_balanced_signs_are_signs_and_uncorrelated(shape, axis):
    """In every entry alone and in every pair, over many draws; independent ones would have the same second moments."""
    draws = np.stack([balanced_signs(np.random.default_rng(k), shape, axis).ravel() for k in range(4000)]).astype(float)
    assert set(np.unique(draws)) == {-1.0, 1.0}
    assert abs(draws.mean(axis=0)).max() < 5 / 4000**0.5
    assert abs(draws.T @ draws / 4000 - np.eye(draws.shape[1])).max() < 5 / 4000**0.5


@pytest.mark.parametrize(("entries", "block"), [(1, 1), (2, 2), (10, 16), (96, 128)])
def test_balanced_signs_have_orthogonal_columns_in_every_block(entries, block):
    drawn = balanced_signs(np.random.default_rng(0), (2, 2 * block, entries), 2).reshape(4, block, entries)
    for rows in drawn.astype(int):
        assert np.array_equal(rows.T @ rows, block * np.eye(entries))


@pytest.mark.parametrize("distribution", sorted(LAWS))
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shape_dtype_and_seed(distribution, shape, dtype):
    one, two, other = (draw(shape, Layout("oi"), 1.0, distribution, np.random.default_rng(s), dtype) for s in (1, 1, 2))
    assert one.shape == shape
    assert one.dtype == dtype
    assert np.array_equal(one, two)
    assert one.size == 0 or not np.array_equal(one, other)


def test_streams_differ_by_seed_and_by_name():
    draws = {stream(*key).integers(2**62) for key in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (10, "a")]}
    assert len(draws) == 6
    assert stream(3, "a").integers(2**62) == stream(3, "a").integers(2**62)


def test_unknown_distribution_is_named():
    with pytest.raises(ValueError, match="f: distribution must be one of orthogonal, normal.*; got 'cauchy'"):
        check_distribution("cauchy", "f")


@pytest.mark.parametrize("shape", [(2600, 404), (404, 2600), (1024, 1024), (4000, 128)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_tall_matrices_are_the_factor_that_qr_gives(shape, dtype):
    """The orthogonal factor with a positive diagonal in the other is unique, whatever computes it."""
    found = draw(shape, Layout("oi"), 1.0, "orthogonal", np.random.default_rng(3), dtype)
    long, short = max(shape), min(shape)
    numbers = np.random.default_rng(3).standard_normal((1, long, short), dtype=dtype)[0]
    q, r = np.linalg.qr(numbers.astype(np.float64))
    expected = q * np.sign(np.diagonal(r)) * long**0.5
    tolerance = 1e-10 if dtype is np.float64 else 2e-4  # for the last columns of a square one
    assert found.dtype == dtype
    assert np.abs(found - (expected if shape[0] >= shape[1] else expected.T)).max() < tolerance * long**0.5
