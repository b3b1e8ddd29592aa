"""Statistics of tables whose answers are known by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from hessinit.experiments.statistics import area_under, at_best_rate, at_each_rate, robustness, steps_to

LRS = (0.01, 0.1, 1.0)


def table(**losses):
    """Rows of initializers, each losses by learning rate and seed; validation losses are a tenth more."""
    return pd.DataFrame(
        [
            ("mlp", "relu", "sgd", name, lr, seed, loss, loss * 1.1)
            for name, by_rate in losses.items()
            for lr, seeds in zip(LRS, by_rate, strict=True)
            for seed, loss in enumerate(seeds)
        ],
        columns=[
            *("problem", "activation", "optimizer", "initializer", "lr", "seed", "last_fifth_loss", "validation_loss")
        ],
    )


RUNS = table(
    he_normal=[(0.9, 1.1), (0.5, 0.7), (0.6, 0.8)],
    budget=[(0.5, 0.6), (0.4, 0.5), (0.41, 0.52)],
    slides=[(0.6, 0.7), (0.45, 0.55), (0.5, math.nan)],
)


def row(found, initializer, **where):
    for column, value in {"initializer": initializer, **where}.items():
        found = found[found[column] == value]
    (only,) = found.to_dict("records")
    return only


def test_differences_are_paired_by_seed():
    found = row(at_each_rate(RUNS), "budget", lr=0.1)
    assert (found["mean"], found["sd"]) == pytest.approx((0.45, math.sqrt(0.005)))
    differences = np.array([0.4 - 0.5, 0.5 - 0.7])
    assert found["difference"] == pytest.approx(-0.15)
    half = 12.7062 * differences.std(ddof=1) / math.sqrt(2)  # Student's t, one degree of freedom
    assert (found["low"], found["high"]) == pytest.approx((-0.15 - half, -0.15 + half), rel=1e-4)
    itself = row(at_each_rate(RUNS), "he_normal", lr=0.1)
    assert (itself["difference"], itself["low"], itself["high"]) == (0, 0, 0)


def test_the_order_of_rows_does_not_matter():
    shuffled = RUNS.sample(frac=1, random_state=0)
    for name in ("budget", "slides"):
        for lr in LRS[:2]:
            assert row(at_each_rate(shuffled), name, lr=lr) == pytest.approx(row(at_each_rate(RUNS), name, lr=lr))


def test_a_diverged_run_makes_its_rate_infinitely_bad():
    found = row(at_each_rate(RUNS), "slides", lr=1.0)
    assert (found["mean"], found["validation"], found["diverged"]) == (math.inf, math.inf, 1)
    assert math.isnan(found["difference"])


def test_the_best_rate_is_that_of_the_validation_loss_and_each_has_its_own():
    runs = RUNS.copy()
    runs.loc[(runs.initializer == "budget") & (runs.lr == 0.01), "validation_loss"] = (
        0.1  # though its train loss is not
    )
    found = at_best_rate(runs)
    assert row(found, "he_normal")["lr"] == 0.1
    best = row(found, "budget")
    assert best["lr"] == 0.01
    assert best["mean"] == pytest.approx(0.55)
    assert best["difference"] == pytest.approx(0.55 - 0.6)


def test_the_range_of_good_rates_ends_where_the_line_crosses_the_bound():
    found = robustness(RUNS)
    he = row(found, "he_normal")
    assert he["worst_over_best"] == pytest.approx(1.0 / 0.6)
    low = math.log(0.63 / 0.6) / math.log(1.0 / 0.6)  # of the decade below 0.1
    high = math.log(0.63 / 0.6) / math.log(0.7 / 0.6)
    assert he["width"] == pytest.approx(10 ** (low + high))
    assert not he["low_end"]
    assert not he["high_end"]
    budget = row(found, "budget")
    assert budget["high_end"]
    assert budget["width"] == pytest.approx(10 ** (1 + math.log(1.05) / math.log(0.55 / 0.45)))
    slides = row(found, "slides")
    assert slides["worst_over_best"] == math.inf
    assert slides["width"] < 10


def test_a_rate_with_one_seed_has_no_interval():
    rates = at_each_rate(RUNS[RUNS.seed == 0])
    assert rates.low.isna().all()
    assert rates.difference.notna().any()


def test_a_difference_with_a_run_that_diverged_is_none():
    runs = RUNS.copy()
    runs.loc[runs.index[0], "last_fifth_loss"] = math.nan
    rates = at_each_rate(runs)
    assert rates.difference.isna().sum() > at_each_rate(RUNS).difference.isna().sum()
    assert math.isinf(rates["mean"][0])


def test_curves():
    curve = ((20, 2.0), (40, 1.0), (45, 0.5))
    assert area_under(curve) == pytest.approx((20 * 2 + 20 * 1 + 5 * 0.5) / 45)
    assert steps_to(curve, 1.0) == 40
    assert steps_to(curve, 0.1) == math.inf
    assert math.isnan(area_under(()))
