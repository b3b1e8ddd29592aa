"""The slides' Figure 4, whole: κ over redraws and train loss, for the slides' five rows, torch's default and ours.

784-128-84-10 on FashionMNIST, SGD at 0.01, batches of 64, two epochs, ten seeds, 100 redraws. The row of ReLU and
orthogonal weights is truly ReLU; the original had tanh there by mistake. Runs, curves and redraws are in the folder
``compare``, in PyTorch and in Keras; drawn is PyTorch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from hessinit.experiments import data, plots
from hessinit.experiments.sweep import Plan, Store, redraw, sweep

FOLDER = Path(__file__).with_name("compare")
PLAN = Plan(seeds=10)


def compute(
    plan: Plan = PLAN,
    dataset: str = "fashion_mnist",
    folder: Path = FOLDER,
    keras: str | None = "jax",
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """A row a run, of PyTorch and, on the backend named, of Keras. What the folder has is not run again."""
    loaded, store = data.load(dataset), Store(folder)
    sweep(plan, loaded, store, jobs)
    redraw(plan, loaded, store, jobs)
    if keras is not None:  # which picks its backend at import
        code = "from hessinit.experiments.cli import main; main()"
        options = ("--framework", "keras", "--seeds", str(plan.seeds), "--dataset", dataset, "--jobs", str(jobs))
        command = [sys.executable, "-c", code, "compare", *options, "--out", str(folder)]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": keras}, check=True)
        (folder / "curves.png").unlink()
    yield from Store(folder).rows


def draw(table: pd.DataFrame) -> Any:
    """A row an initializer and activation: densities of κ, a line a layer; train loss, the band over seeds."""
    store, name = Store(FOLDER), "fashion_mnist"
    title = "784-128-84-10 on FashionMNIST, SGD 0.01"
    return plots.comparison(store.points_for(PLAN.runs(name)), store.kappas_for(PLAN.draws(name)), title)


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
