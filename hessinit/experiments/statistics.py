"""What a table of runs says of each initializer: at every learning rate, at its own best one, and over all of them.

Tables have a row a run, with the columns of ``runs.csv``. The best learning rate of an initializer is the one of the
least validation loss, so that neither the losses compared nor the test set choose it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student

Array = npt.NDArray[np.float64]
PROBLEM = ["problem", "activation", "optimizer"]
ROW = [*PROBLEM, "initializer"]


def at_each_rate(
    runs: pd.DataFrame, column: str = "last_fifth_loss", baseline: str = "he_normal", level: float = 0.95
) -> pd.DataFrame:
    """By problem, activation, optimizer, initializer and learning rate: mean, spread, difference to a baseline.

    Args:
        runs: the table; a loss of a run that diverged is missing and makes its mean infinite.
        column: what is compared.
        baseline: the initializer at the same learning rate that each is compared with, seed by seed.
        level: of the confidence interval, by Student's t over the seeds.

    Returns:
        Columns ``seeds, diverged, mean, sd, validation`` (mean validation loss), ``difference`` (its mean over seeds),
        ``low`` and ``high`` (its confidence interval); NaN where there is nothing to pair.
    """
    paired = _paired(runs, [*PROBLEM, "lr", "seed"], column, baseline)
    groups = paired.assign(lost=paired[column].isna()).groupby([*ROW, "lr"], sort=False)
    found = groups.agg(
        seeds=("seed", "size"),
        diverged=("lost", "sum"),
        mean=(column, "mean"),
        sd=(column, "std"),
        validation=("validation_loss", "mean"),
    )
    found.loc[found.diverged > 0, ["mean", "validation"]] = math.inf
    return found.join(_differences(groups, level)).reset_index()


def _paired(runs: pd.DataFrame, on: list[str], column: str, baseline: str) -> pd.DataFrame:
    """Runs, with their ``difference`` to the baseline's that agree with them."""
    theirs = runs.loc[runs.initializer == baseline, [*on, column]]
    paired = runs.merge(theirs, how="left", on=on, suffixes=("", "_baseline"), validate="m:1")
    return paired.assign(difference=paired[column] - paired[f"{column}_baseline"])


def _differences(groups: Any, level: float) -> pd.DataFrame:
    """Of each group: mean ``difference``, ``low`` and ``high``; NaN where one of them is."""
    numbers = groups.difference.agg(["count", "size", "mean", "std"])
    whole = numbers[numbers["count"] == numbers["size"]]
    half = student.ppf((1 + level) / 2, whole["size"] - 1) * whole["std"] / np.sqrt(whole["size"])
    found = {"difference": whole["mean"], "low": whole["mean"] - half, "high": whole["mean"] + half}
    return pd.DataFrame(found).reindex(numbers.index)


def at_best_rate(
    runs: pd.DataFrame, column: str = "last_fifth_loss", baseline: str = "he_normal", level: float = 0.95
) -> pd.DataFrame:
    """Each initializer at its own best learning rate, and the difference to the baseline at *its* own.

    Returns:
        A row an initializer: ``lr, mean, sd, diverged``, ``difference, low, high`` as for :func:`at_each_rate`. A row
        that diverged at every learning rate is left out.
    """
    rates = at_each_rate(runs, column, baseline, level)
    rates = rates[np.isfinite(rates.validation)]
    best = rates.loc[rates.groupby(ROW, sort=False).validation.idxmin()].drop(columns=["difference", "low", "high"])
    chosen = runs.merge(best[[*ROW, "lr"]], on=[*ROW, "lr"])
    groups = _paired(chosen, [*PROBLEM, "seed"], column, baseline).groupby(ROW, sort=False)
    return best.merge(_differences(groups, level).reset_index(), on=ROW, how="left").drop(columns="validation")


def robustness(runs: pd.DataFrame, column: str = "last_fifth_loss", within: float = 0.05) -> pd.DataFrame:
    """How much the learning rate matters to each initializer, over the grid that all of them share.

    Returns:
        A row an initializer: ``worst_over_best`` (means over seeds; infinite where a run diverged), and ``width``, the
        factor between the ends of the range of learning rates around the best in which the mean loss is within 5 % of
        the best, straight lines between the logarithms; ``low_end`` and ``high_end`` say whether that range goes on at
        the ends of the grid, so that the width is a lower bound.
    """
    found = []
    for key, group in at_each_rate(runs, column).groupby(ROW, sort=False):
        group = group.sort_values("lr")
        lrs, means = np.log(group.lr.to_numpy(float)), group["mean"].to_numpy(float)
        best = int(means.argmin())
        bound = means[best] * (1 + within)
        low, low_end = _reach(lrs[best::-1], means[best::-1], bound)
        high, high_end = _reach(lrs[best:], means[best:], bound)
        found.append(
            dict(zip(ROW, key, strict=True))
            | {
                "worst_over_best": float(means.max() / means[best]),
                "width": math.exp(high - low),
                "low_end": low_end,
                "high_end": high_end,
            }
        )
    return pd.DataFrame(found)


def _reach(lrs: Array, means: Array, bound: float) -> tuple[float, bool]:
    """How far one gets from the first of these log rates below the bound, and whether that is the last of them."""
    for k in range(1, len(lrs)):
        if means[k] > bound:
            if math.isinf(means[k]):
                return float(lrs[k - 1]), False
            logs = np.log([means[k - 1], means[k]])
            share = (math.log(bound) - logs[0]) / (logs[1] - logs[0])
            return float(lrs[k - 1] + share * (lrs[k] - lrs[k - 1])), False
    return float(lrs[-1]), True


def area_under(curve: Iterable[tuple[int, float]]) -> float:
    """Mean loss over all steps, of a curve's points (step, mean loss since the last point).

    Example:
        >>> area_under([(20, 2.0), (40, 1.0), (50, 0.5)])
        1.3
    """
    last, total = 0, 0.0
    for step, loss in curve:
        total += (step - last) * loss
        last = step
    return total / last if last else math.nan


def steps_to(curve: Iterable[tuple[int, float]], loss: float) -> float:
    """The first step at which a curve is at or below a loss; infinite if at none.

    Example:
        >>> steps_to([(20, 2.0), (40, 1.0)], 1.5), steps_to([(20, 2.0)], 1.5)
        (40, inf)
    """
    return next((step for step, value in curve if value <= loss), math.inf)


def against_best(runs: pd.DataFrame, rivals: Iterable[str], name: str = "budget") -> pd.DataFrame:
    """By problem, optimizer and learning rate: an initializer's mean loss, the best rival's, and their difference.

    Args:
        runs: a table with the columns ``set, problem, activation, optimizer, lr, initializer, seed, last_fifth_loss``.
        rivals: of which the best is taken after the fact; one that diverged is none.
        name: the initializer.

    Returns:
        Columns ``budget`` (or another ``name``), ``best``, ``rival`` (its loss) and ``errors``: the difference in
        standard errors, over seeds paired between the two; above 2 the initializer lost.
    """
    keys = ["set", *PROBLEM, "lr"]
    found = []
    for key, group in runs.groupby(keys, sort=False):
        losses = group.pivot(index="seed", columns="initializer", values="last_fifth_loss")
        means = losses[[rival for rival in rivals if rival in losses]].mean(skipna=False)
        best = str(means.idxmin())
        difference = losses[name] - losses[best]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        found.append((*key, losses[name].mean(skipna=False), best, means[best], difference.mean() / error))
    return pd.DataFrame(found, columns=[*keys, name, "best", "rival", "errors"])
