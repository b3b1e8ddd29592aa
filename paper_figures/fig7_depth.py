"""How deep plain nets train: 2 to 100 layers of width 128, ReLU and tanh, for seven initializers.

FashionMNIST, one epoch of 12,800 images in batches of 64, three seeds; mean loss of the batches of the last fifth. A
run that diverged counts as the loss of a uniform guess, ln 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hessinit.experiments import data, plots
from hessinit.experiments.baselines import INITIALIZERS
from hessinit.experiments.study import Task, rows
from hessinit.experiments.training import Run

DEPTHS = (2, 6, 12, 30, 50, 100)
ROWS = ("torch_default", "he_normal", "glorot_uniform", "orthogonal_gain", "lsuv", "closed_form", "budget")
STEPS = (("sgd", 0.01), ("sgd", 0.1), ("adam", 1e-3))
SEEDS = (0, 1, 2)
GUESS = math.log(10)


def compute(
    done: Iterable[Mapping[str, str]] = (),
    depths: Iterable[int] = DEPTHS,
    initializers: Iterable[str] = ROWS,
    steps: Iterable[tuple[str, float]] = STEPS,
    seeds: Iterable[int] = SEEDS,
    samples: int = 12_800,
    dataset: str = "fashion_mnist",
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    whole = data.load(dataset)
    few = whole.first(samples)
    tasks = (
        Task(Run(f"mlp{depth}", "torch", few.name, name, activation, optimizer, lr, 1, 64, seed), few)
        for seed in seeds
        for depth in depths
        for activation in ("relu", "tanh")
        for optimizer, lr in steps
        for name in initializers
    )
    yield from rows(tasks, done, ("last_fifth_loss", "test_accuracy", "init_seconds", "seconds", "status"), jobs)


def draw(table: pd.DataFrame) -> Any:
    """A row an activation, a column a step: mean and deviation over seeds against depth."""
    table = table.assign(
        depth=table.problem.str.removeprefix("mlp").astype(int), loss=table.last_fifth_loss.fillna(GUESS).clip(upper=3)
    )
    steps = list(table[["optimizer", "lr"]].drop_duplicates().itertuples(index=False))
    activations = list(dict.fromkeys(table.activation))
    made, axes = plots.figure(len(activations), len(steps), 4.2, 3.4)
    for panels, activation in zip(axes, activations, strict=True):
        for panel, (optimizer, lr) in zip(panels, steps, strict=True):
            own = table[(table.activation == activation) & (table.optimizer == optimizer) & (table.lr == lr)]
            for name, runs in own.groupby("initializer", sort=False):
                by_depth = runs.groupby("depth").loss
                panel.errorbar(
                    by_depth.mean().index, by_depth.mean(), by_depth.std(), marker="o", markersize=3,
                    linewidth=2.2 if name == "budget" else 1.2, color=plots.COLOURS[name],
                    label=INITIALIZERS[name].label,
                )  # fmt: skip
            panel.axhline(GUESS, color="0.7", linewidth=0.8, linestyle=":")
            panel.set(xscale="log", xlabel="layers", ylabel="train loss", ylim=(0.3, 2.6))
            panel.set_xticks(sorted(set(own.depth)), [str(depth) for depth in sorted(set(own.depth))], minor=False)
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.set_title(f"{activation}, {optimizer} {lr:g}", fontsize="medium")
    plots.legend_above(made, 4)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
