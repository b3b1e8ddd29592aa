"""How the published net ends for fifteen initializers, at every learning rate: SGD, momentum and Adam.

784-128-84-10 with ReLU on FashionMNIST, batches of 64, two epochs, five seeds; 6,000 train images are kept back
and choose each initializer's own best learning rate. Calibration is part of the time. Of rules that differ in the
distribution alone, one stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hessinit.experiments import data, plots
from hessinit.experiments.statistics import at_each_rate
from hessinit.experiments.study import Task, rows
from hessinit.experiments.training import Run

SEEDS = (0, 1, 2, 3, 4)
RATES = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 0.6),
    "momentum": (1e-3, 3e-3, 0.01, 0.03),
    "adam": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01),
}
ROWS = (
    *("he_normal", "he_warmup", "glorot_uniform", "torch_default", "orthogonal_gain", "slides", "lsuv", "gradinit"),
    *("metainit", "autoinit", "zero_output", "closed_form", "balanced", "budget", "budget_unpaired"),
)


def compute(
    done: Iterable[Mapping[str, str]] = (),
    initializers: Iterable[str] = ROWS,
    rates: Mapping[str, Iterable[float]] = RATES,
    seeds: Iterable[int] = SEEDS,
    dataset: str = "fashion_mnist",
    validation: int = 6000,
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    loaded = data.load(dataset)
    tasks = (
        Task(Run("mlp", "torch", loaded.name, name, "relu", optimizer, lr, 2, 64, seed, validation), loaded)
        for optimizer, lrs in rates.items()
        for seed in seeds
        for name in initializers
        for lr in lrs
    )
    yield from rows(tasks, done, jobs=jobs)


GROUPS = (  # of lines in a panel, each beside the budget and He
    ("he_warmup", "glorot_uniform", "torch_default", "orthogonal_gain", "slides", "zero_output"),
    ("lsuv", "gradinit", "metainit", "autoinit", "balanced", "closed_form", "budget_unpaired"),
)
ALWAYS = ("budget", "he_normal")


def draw(table: pd.DataFrame) -> Any:
    """A row an optimizer, a column a group of initializers; a line has the mean and the deviation over seeds."""
    rates = at_each_rate(table)
    optimizers = list(dict.fromkeys(table.optimizer))
    made, axes = plots.figure(len(optimizers), len(GROUPS), 4.6, 3.4)
    for panels, optimizer in zip(axes, optimizers, strict=True):
        for panel, group in zip(panels, GROUPS, strict=True):
            for name in (*group, *ALWAYS):
                line = rates[(rates.optimizer == optimizer) & (rates.initializer == name)].sort_values("lr")
                if len(line):
                    plots.rates(panel, line, name)
            panel.set(xscale="log", yscale="log", xlabel=f"learning rate, {optimizer}", ylabel="train loss")
            plots.plain_numbers(panel.yaxis, (1, 1.5, 2, 3, 5, 7))
            panel.sharey(panels[0])
            if optimizer == optimizers[0]:
                panel.legend(frameon=False, fontsize="small")
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
