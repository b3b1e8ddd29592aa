"""Pictures, drawn from rows of CSV files; one colour an initializer in all of them."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessinit.experiments.baselines import INITIALIZERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe & Ito (2008), readable by the colour-blind.
COLOURS = {
    "closed_form": "#D55E00",
    "slides": "#E69F00",
    "he_normal": "#0072B2",
    "he_uniform": "#0072B2",
    "glorot_uniform": "#009E73",
    "glorot_normal": "#009E73",
    "keras_default": "#009E73",
    "orthogonal": "#CC79A7",
    "orthogonal_gain": "#CC79A7",
    "lecun_normal": "#56B4E9",
    "torch_default": "#6E6E6E",
}
STYLES = {"relu": "-", "tanh": "--", "gelu": "-.", "silu": ":"}


def figure(rows: int, columns: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, Any]:
    """A figure that needs no display, with an array of axes (rows, columns); sizes in inches an axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return made, axes


def loss_curves(points: Sequence[dict[str, str]], path: Path, title: str = "") -> None:
    """Train loss against step: a panel a learning rate, a line an initializer and activation, the band over seeds.

    Args:
        points: rows of ``curves.csv``.
        path: of the PNG.
        title: of the picture.
    """
    curves: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for point in points:
        curve = curves.setdefault((point["initializer"], point["activation"], point["lr"]), {})
        curve.setdefault(int(point["step"]), []).append(float(point["loss"]))
    lrs = list(dict.fromkeys(lr for _, _, lr in curves))
    made, axes = figure(-(-len(lrs) // 3), min(len(lrs), 3), *((8.0, 4.8) if len(lrs) == 1 else (4.2, 3.4)))
    for (initializer, activation, lr), curve in curves.items():
        label = f"{INITIALIZERS[initializer].label}, {activation}"
        _band(axes.flat[lrs.index(lr)], curve, COLOURS[initializer], STYLES[activation], label)
    for panel, lr in zip(axes.flat, lrs, strict=False):
        panel.set(xlabel="step", ylabel="train loss", title=f"lr {lr}", yscale="log")
        panel.yaxis.set_major_formatter("{x:.1f}")
        panel.yaxis.set_minor_formatter("{x:.1f}")
    for panel in list(axes.flat)[len(lrs) :]:
        panel.remove()
    made.suptitle(title)
    axes[0, 0].legend(frameon=False, fontsize="medium" if len(lrs) == 1 else "x-small")
    made.savefig(path, dpi=150)


def _band(axes: Axes, curve: dict[int, list[float]], colour: str, style: str, label: str) -> None:
    """Mean over seeds, and the range from the lowest to the highest seed."""
    steps = np.array(sorted(curve))
    losses = [np.array(curve[step]) for step in steps]
    axes.plot(steps, [np.mean(v) for v in losses], style, color=colour, label=label, linewidth=1.6)
    axes.fill_between(
        steps, [v.min() for v in losses], [v.max() for v in losses], color=colour, alpha=0.15, linewidth=0
    )


def figure_script(
    stem: Path, compute: Callable[[], Iterable[dict[str, Any]]], draw: Callable[[DataFrame], Figure]
) -> None:
    """The command line of a script in ``paper_figures``: draws its CSV; with ``--recompute`` makes the CSV first.

    Args:
        stem: path of the CSV, the PNG and the PDF, without suffix.
        compute: yields the rows, one a seed, layer and setting; written as they come, so that a long run shows.
        draw: the figure of the table.
    """
    import argparse

    import pandas as pd

    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--recompute", action="store_true", help="run the work instead of reading the CSV")
    table = stem.with_suffix(".csv")
    if parser.parse_args().recompute:
        partial = stem.with_suffix(".csv.part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] | None = None
            for row in compute():
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
        os.replace(partial, table)
    made = draw(pd.read_csv(table))
    made.savefig(stem.with_suffix(".png"), dpi=150)
    made.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
