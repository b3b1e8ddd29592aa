"""How each problem ends for every initializer, at every learning rate, after one epoch: SGD and Adam.

Plain nets, LeNet-5, ResNets with and without norm, a small ViT, a character model, digits and a regression. The last
tenth of the train samples is kept back and chooses each initializer's own best learning rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from hessinit.experiments import data, models, plots
from hessinit.experiments.baselines import INITIALIZERS as ALL
from hessinit.experiments.statistics import PROBLEM, at_best_rate, at_each_rate, robustness
from hessinit.experiments.study import Task, rows
from hessinit.experiments.training import Run

SEEDS = (0, 1, 2)
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3), "adam": (3e-4, 1e-3, 3e-3)}
INITIALIZERS = (
    "torch_default", "he_normal", "glorot_uniform", "orthogonal_gain", "he_warmup", "lsuv", "closed_form", "budget",
)  # fmt: skip
# problem, activation, train samples, epochs, initializers of its own; GradInit where its 390 steps are affordable
STUDY = (
    ("mlp6", "relu", 25_600, 1, ("autoinit", "gradinit")),
    ("mlp30", "tanh", 12_800, 1, ("autoinit",)),
    ("lenet", "tanh", 12_800, 1, ("autoinit",)),
    ("lenet", "relu", 12_800, 1, ("autoinit",)),
    ("resnet_bn", "relu", 8_000, 1, ()),
    ("resnet", "relu", 8_000, 1, ("fixup",)),
    ("vit", "gelu", 8_000, 1, ("fixup",)),
    ("charlm", "gelu", 8_000, 1, ("fixup",)),
    ("digits", "relu", 1_437, 20, ("autoinit", "gradinit")),
    ("friedman", "relu", 4_000, 8, ("autoinit", "gradinit")),
)


def compute(
    done: Iterable[Mapping[str, str]] = (),
    study: Sequence[tuple[str, str, int, int, tuple[str, ...]]] = STUDY,
    initializers: Sequence[str] = INITIALIZERS,
    rates: Mapping[str, Iterable[float]] = RATES,
    seeds: Iterable[int] = SEEDS,
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    tasks, loaded = [], {name: data.load(name) for name in {models.PROBLEMS[row[0]].dataset for row in study}}
    for seed in seeds:
        for problem, activation, samples, epochs, own in study:
            whole = loaded[models.PROBLEMS[problem].dataset]
            few = whole.first(samples)
            validation = len(few.x_train) // 10
            for name, (optimizer, lrs) in itertools.product((*initializers, *own), rates.items()):
                setting = (problem, "torch", few.name, name, activation, optimizer)
                tasks += [Task(Run(*setting, lr, epochs, 64, seed, validation), few) for lr in lrs]
    yield from rows(tasks, done, jobs=jobs)


def draw(table: pd.DataFrame) -> Any:
    """Two panels a problem: mean and deviation of the loss over seeds against the learning rate."""
    lines = at_each_rate(table)
    problems = list(dict.fromkeys(zip(table.problem, table.activation, strict=True)))
    optimizers = list(dict.fromkeys(table.optimizer))
    made, axes = plots.figure(-(-len(problems) // 2), 2 * len(optimizers), 3.6, 2.8)
    panels = axes.reshape(-1, len(optimizers))
    for unused in panels[len(problems) :].flat:
        unused.set_axis_off()
    for row, (problem, activation) in zip(panels, problems, strict=False):
        for panel, optimizer in zip(row, optimizers, strict=True):
            own = lines[(lines.problem == problem) & (lines.activation == activation) & (lines.optimizer == optimizer)]
            for name, line in own.groupby("initializer", sort=False):
                plots.rates(panel, line.sort_values("lr"), str(name))
            panel.set(xscale="log", yscale="log", xlabel=f"learning rate, {optimizer}", ylabel="train loss")
            plots.plain_numbers(panel.yaxis)
            lrs = sorted(set(own.lr))
            panel.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
            panel.set_xticks([], minor=True)
            panel.set_title(f"{models.PROBLEMS[problem].title}, {activation}", fontsize="medium")
    plots.legend_above(made, 4)
    return made


def readme_rows(table: pd.DataFrame) -> list[list[str]]:
    """The README's table: the budget and the best of all others, each at its own best learning rate.

    The other is chosen after the fact, by the losses compared. Bold or italic: ahead or behind by more than two
    standard errors of the paired difference. Then, of both, the mean at the worst rate over that at the best.
    """
    level = float(2 * student.cdf(2, table.seed.nunique() - 1) - 1)
    found: dict[tuple[str, str], list[str]] = {}
    for (problem, activation, _), runs in table.groupby(PROBLEM, sort=False):
        best = at_best_rate(runs).set_index("initializer")
        rival = best["mean"].drop("budget").idxmin()
        row = at_best_rate(runs, baseline=str(rival), level=level).set_index("initializer").loc["budget"]
        mark = "**" if row.high < 0 else "*" if row.low > 0 else ""
        cells = found.setdefault((problem, activation), [f"{models.PROBLEMS[problem].title}, {activation}"])
        spread = robustness(runs).set_index("initializer").worst_over_best
        cells += [
            f"{mark}{row['mean']:.3f}{mark} ± {row.sd:.3f} ({row.lr:g})",
            f"{best['mean'][rival]:.3f} ± {best.sd[rival]:.3f} ({best.lr[rival]:g}), {ALL[str(rival)].label}",
            f"{row.difference:+.3f}",
            " / ".join(f"{x:.2f}" if x < math.inf else "–" for x in spread[["budget", rival]]),
        ]
    return list(found.values())


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
