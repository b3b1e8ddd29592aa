"""How much the learning rate matters to each initializer: from the runs of fig5_learning_rates.

Left: the worst mean train loss of the grid over the best; right: the factor between the ends of the range of learning
rates in which the mean loss is within 5 % of the initializer's own best (an arrow where the grid ends first).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hessinit.experiments import plots
from hessinit.experiments.baselines import INITIALIZERS
from hessinit.experiments.statistics import ROW, at_best_rate, robustness

RUNS = Path(__file__).with_name("fig5_learning_rates.csv")


def compute(runs: Path = RUNS) -> Iterator[dict[str, Any]]:
    """A row an optimizer and initializer: at its own best learning rate, and over all of the grid."""
    table = pd.read_csv(runs)
    for row in at_best_rate(table).merge(robustness(table), on=ROW).to_dict("records"):
        yield {str(key): value for key, value in row.items()}


def draw(table: pd.DataFrame) -> Any:
    """A row an optimizer; initializers in the order of their width."""
    optimizers = list(dict.fromkeys(table.optimizer))
    made, axes = plots.figure(len(optimizers), 2, 5.2, 0.4 + 0.24 * table.initializer.nunique())
    for (left, right), optimizer in zip(axes, optimizers, strict=True):
        own = table[table.optimizer == optimizer].sort_values("width")
        places = np.arange(len(own))
        colours = [plots.COLOURS[name] for name in own.initializer]
        for panel, column in ((left, "worst_over_best"), (right, "width")):
            values = own[column].where(np.isfinite(own[column]))
            panel.barh(places, values - 1, left=1, color=colours, height=0.7)
            panel.set(xscale="log", yticks=places, ylim=(-0.6, len(own) - 0.4))
            panel.grid(axis="y", alpha=0)
        left.set_yticklabels([INITIALIZERS[name].label for name in own.initializer])
        right.tick_params(labelleft=False)
        for place, (_, row) in zip(places, own.iterrows(), strict=True):
            if not np.isfinite(row.worst_over_best):
                left.text(1.02, place, "diverged", va="center", fontsize="small")
            if row.low_end or row.high_end:
                right.text(row.width * 1.04, place, "→", va="center", fontsize="small")
        left.set_xlabel(f"worst / best train loss, {optimizer}")
        right.set_xlabel(f"width of the range within 5 %, {optimizer}")
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter("{x:g}")
        left.tick_params(axis="x", which="minor", labelsize="small")
    return made


def readme_rows(table: pd.DataFrame) -> list[list[str]]:
    """The README's table: an initializer a row, SGD and Adam side by side."""
    found = []
    for name in dict.fromkeys(table.initializer):
        cells = [INITIALIZERS[name].label]
        for optimizer in ("sgd", "adam"):
            (row,) = table[(table.initializer == name) & (table.optimizer == optimizer)].to_dict("records")
            bound = "≥ " if row["low_end"] or row["high_end"] else ""
            worst = f"{row['worst_over_best']:.2f}" if np.isfinite(row["worst_over_best"]) else "diverged"
            cells += [
                f"{row['lr']:g}",
                f"{row['mean']:.3f} ± {row['sd']:.3f}",
                "–" if name == "he_normal" else f"{row['difference']:+.3f} ({row['low']:+.3f} … {row['high']:+.3f})",
                worst,
                f"{bound}{row['width']:.0f}",
            ]
        found.append(cells)
    return found


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
