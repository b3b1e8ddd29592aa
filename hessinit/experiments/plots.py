"""Pictures, drawn from rows of CSV files; one colour an initializer in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessinit.experiments.baselines import INITIALIZERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """Train loss against step, one line an initializer, activation and learning rate, with the band over seeds.

    Args:
        points: rows of ``curves.csv``.
        path: of the PNG.
        title: of the picture.
    """
    curves: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for point in points:
        curve = curves.setdefault((point["initializer"], point["activation"], point["lr"]), {})
        curve.setdefault(int(point["step"]), []).append(float(point["loss"]))
    made, axes = figure(1, 1, 8.0, 4.8)
    several = len({lr for _, _, lr in curves}) > 1
    for (initializer, activation, lr), curve in curves.items():
        label = f"{INITIALIZERS[initializer].label}, {activation}" + (f", lr {lr}" if several else "")
        _band(axes[0, 0], curve, COLOURS[initializer], STYLES[activation], label)
    axes[0, 0].set(xlabel="step", ylabel="train loss", title=title, yscale="log")
    axes[0, 0].yaxis.set_minor_formatter("{x:.1f}")
    axes[0, 0].legend(frameon=False)
    made.savefig(path, dpi=150)


def _band(axes: Axes, curve: dict[int, list[float]], colour: str, style: str, label: str) -> None:
    """Mean over seeds, and the range from the lowest to the highest seed."""
    steps = np.array(sorted(curve))
    losses = [np.array(curve[step]) for step in steps]
    axes.plot(steps, [np.mean(v) for v in losses], style, color=colour, label=label, linewidth=1.6)
    axes.fill_between(
        steps, [v.min() for v in losses], [v.max() for v in losses], color=colour, alpha=0.15, linewidth=0
    )
