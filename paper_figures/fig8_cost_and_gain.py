"""What an initialization costs and what it gains: from the runs of fig5_learning_rates.

The time of building and initialising the net, calibration included, as a share of the whole run; against the mean loss
over all steps of training, relative to He's at the same learning rate: geometric mean over the learning rates at which
no run of either diverged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hessinit.experiments import plots
from hessinit.experiments.baselines import INITIALIZERS
from hessinit.experiments.statistics import at_each_rate

RUNS = Path(__file__).with_name("fig5_learning_rates.csv")
BASELINE = "he_normal"


def compute(runs: Path = RUNS) -> Iterator[dict[str, Any]]:
    """A row an optimizer and initializer."""
    table = pd.read_csv(runs)
    areas = at_each_rate(table, "area", BASELINE)
    theirs = areas[areas.initializer == BASELINE].set_index(["optimizer", "lr"])["mean"]
    for (optimizer, name), group in areas.groupby(["optimizer", "initializer"], sort=False):
        logs = np.log(group["mean"].to_numpy(float)) - np.log(theirs.loc[optimizer].reindex(group.lr).to_numpy(float))
        own = table[(table.optimizer == optimizer) & (table.initializer == name)]
        yield {
            "optimizer": optimizer,
            "initializer": name,
            "init_seconds": float(own.init_seconds.median()),
            "share": float((own.init_seconds / own.seconds).median()),
            "area_over_he": float(np.exp(logs[np.isfinite(logs)].mean())),
            "rates": int(np.isfinite(logs).sum()),
        }


def draw(table: pd.DataFrame) -> Any:
    """A panel an optimizer."""
    optimizers = list(dict.fromkeys(table.optimizer))
    made, axes = plots.figure(1, len(optimizers), 4, 4)
    for panel, optimizer in zip(axes[0], optimizers, strict=True):
        for row in table[table.optimizer == optimizer].itertuples():
            marker = "D" if row.initializer in plots.DASHED else "o"
            colour, label = plots.COLOURS[row.initializer], INITIALIZERS[row.initializer].label
            panel.plot(row.init_seconds, row.area_over_he, marker, color=colour, label=label)
        panel.axhline(1, color="0.7", linewidth=0.8)
        panel.set(xscale="log", xlabel="seconds to initialise", ylabel=f"mean loss / He's, {optimizer}")
    plots.legend_above(made, 5)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
