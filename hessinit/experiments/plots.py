"""Pictures, drawn from rows of CSV files; one colour an initializer in all of them."""

from __future__ import annotations

import csv
import inspect
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessinit.experiments.baselines import INITIALIZERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe & Ito (2008), readable by the colour-blind; then, one after another, the colour farthest in CIE Lab from those
# before it, for normal sight and in simulations of three deficiencies (Machado et al., 2009).
COLOURS = {
    "budget": "#000000",
    "budget_unpaired": "#6E6E6E",
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
    "he_warmup": "#E11E3C",
    "zero_output": "#9678FF",
    "lsuv": "#5A2D00",
    "lsuv_package": "#5A2D00",
    "gradinit": "#9600F0",
    "metainit": "#0F1E87",
    "autoinit": "#C3B469",
    "fixup": "#4B2D5A",
    "balanced": "#96003C",
}
DASHED = {"he_uniform", "glorot_normal", "orthogonal_gain", "budget_unpaired"}  # of the colour of another
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


def plain_numbers(axis: Axis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Labels of a logarithmic axis as numbers, at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_above(made: Figure, columns: int) -> None:
    """One legend above all panels, of every label that one of them has."""
    named: dict[str, Any] = {}
    for panel in made.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    made.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns, frameon=False)


def rates(axes: Axes, line: DataFrame, name: str) -> None:
    """One initializer against the learning rate: mean and deviation over seeds; where a run diverged, a gap.

    Args:
        axes: where to draw.
        line: rows of :func:`hessinit.experiments.statistics.at_each_rate`, in the order of learning rates.
        name: of the initializer.
    """
    means = line["mean"].where(np.isfinite(line["mean"]))
    wide = 2.2 if name == "budget" else 1.2
    style = "--" if name in DASHED else "-"
    label, colour = INITIALIZERS[name].label, COLOURS[name]
    axes.errorbar(
        line.lr, means, line.sd, fmt=style, marker="o", markersize=3, linewidth=wide, color=colour, label=label
    )


def comparison(points: Sequence[dict[str, str]], kappas: Sequence[dict[str, str]], title: str = "") -> Figure:
    """The slides' Figure 4: a row an initializer and activation; the densities of κ, and the train loss.

    Args:
        points: rows of ``curves.csv``. A column a learning rate has the mean and the band over seeds, with the means of
            the other initializers in grey.
        kappas: rows of ``curvature.csv``, whose column comes first; without any there is none.
        title: of the picture.
    """
    curves: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for point in points:
        by_lr = curves.setdefault((point["initializer"], point["activation"]), {})
        by_lr.setdefault(point["lr"], {}).setdefault(int(point["step"]), []).append(float(point["loss"]))
    lrs = list(dict.fromkeys(point["lr"] for point in points))
    first = 1 if kappas else 0
    made, axes = figure(len(curves), first + len(lrs), 4.2, 1.5)
    for panel, top in ((panel, axes[0, column]) for row in axes[1:] for column, panel in enumerate(row)):
        panel.sharex(top)
    for (initializer, activation), row in zip(curves, axes, strict=True):
        label, colour = f"{INITIALIZERS[initializer].label}, {activation}", COLOURS[initializer]
        if kappas:
            own = [
                kappa for kappa in kappas if (kappa["initializer"], kappa["activation"]) == (initializer, activation)
            ]
            _densities(row[0], own, colour)
            if not own:
                row[0].text(0.5, 0.5, "fitted to data", transform=row[0].transAxes, ha="center", color="0.5")
            row[0].set(xscale="log", ylabel="density", ylim=(0, None))
        for panel, lr in zip(row[first:], lrs, strict=True):
            for other in curves.values():
                _mean(panel, other[lr], color="0.85", linewidth=0.8)
            _band(panel, curves[initializer, activation][lr], colour, STYLES[activation], label)
            panel.set(yscale="log", ylabel="train loss")
            plain_numbers(panel.yaxis)
        row[0].set_title(label, loc="left", fontweight="bold", fontsize="medium")
    for panel in axes[:-1].flat:
        panel.tick_params(labelbottom=False)
    for column, panel in enumerate(axes[-1]):
        panel.set_xlabel("step" if column >= first else "κ of the initial weights")
    for panel, lr in zip(axes[0, first:], lrs, strict=True):
        panel.set_title(f"lr {lr}", loc="right", fontsize="medium")
    if kappas:
        axes[0, 0].legend(frameon=False, fontsize="small")
    made.suptitle(title)
    return made


def _densities(axes: Axes, kappas: Sequence[dict[str, str]], colour: str) -> None:
    """Kernel densities of log10 κ, a line a layer; a bar where all redraws are alike."""
    from scipy.stats import gaussian_kde

    layers: dict[str, list[float]] = {}
    for row in kappas:
        layers.setdefault(row["layer"], []).append(float(row["kappa"]))
    for (layer, values), style in zip(layers.items(), itertools.cycle(("-", "--", ":", "-."))):
        logs = np.log10([v for v in values if 0 < v < np.inf])
        if len(logs) == 0:
            continue
        if np.ptp(logs) < 1e-6:
            axes.axvline(10 ** logs[0], color=colour, linestyle=style, label=layer)
            continue
        kernels = gaussian_kde(logs)
        tail = 3 * np.sqrt(kernels.covariance[0, 0])
        grid = np.linspace(logs.min() - tail, logs.max() + tail, 200)
        density = kernels(grid)
        axes.plot(10**grid, density, style, color=colour, label=layer)
        axes.fill_between(10**grid, density, color=colour, alpha=0.15, linewidth=0)


def _band(axes: Axes, curve: dict[int, list[float]], colour: str, style: str, label: str) -> None:
    """Mean over seeds, and the range from the lowest to the highest seed."""
    _mean(axes, curve, linestyle=style, color=colour, label=label, linewidth=1.6)
    losses = [curve[step] for step in sorted(curve)]
    axes.fill_between(
        sorted(curve), [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.15, linewidth=0
    )


def _mean(axes: Axes, curve: dict[int, list[float]], **style: Any) -> None:
    axes.plot(sorted(curve), [np.mean(curve[step]) for step in sorted(curve)], **style)


def figure_script(
    stem: Path, compute: Callable[..., Iterable[dict[str, Any]]], draw: Callable[[DataFrame], Figure]
) -> None:
    """The command line of a script in ``paper_figures``: draws its CSV; with ``--recompute`` makes the CSV first.

    Args:
        stem: path of the CSV, the PNG and the PDF, without suffix.
        compute: yields the rows, one a seed, layer and setting; written as they come, so that a long run shows. If it
            takes ``done``, it gets the rows that a run before this one, which was stopped, left.
        draw: the figure of the table.
    """
    import argparse

    import pandas as pd

    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--recompute", action="store_true", help="run the work instead of reading the CSV")
    table, partial = stem.with_suffix(".csv"), stem.with_suffix(".csv.part")
    if parser.parse_args().recompute:
        resumes = "done" in inspect.signature(compute).parameters and partial.exists()
        done = _whole_rows(partial) if resumes else []
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] | None = None
            for row in itertools.chain(done, compute(done=done) if resumes else compute()):
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
                file.flush()
        os.replace(partial, table)
    made = draw(pd.read_csv(table))
    made.savefig(stem.with_suffix(".png"), dpi=150)
    made.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Of a table whose last line may have been cut short."""
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def losses_by_rate(
    axes: Axes, runs: DataFrame, colour: str, label: str, optimizer: str, style: str = "-", bold: bool = False
) -> None:
    """The mean loss of the last fifth against the learning rate, with its standard deviation over seeds.

    Args:
        axes: to draw on.
        runs: table of one initializer, with columns ``lr`` and ``last_fifth_loss``.
        colour: of the line.
        label: for the legend.
        optimizer: for the axis.
        style: of the line.
        bold: whether the line is thick.
    """
    by_rate = runs.groupby("lr").last_fifth_loss
    means, width = by_rate.mean(), 2.2 if bold else 1.2
    axes.errorbar(
        means.index,
        means,
        by_rate.std(),
        fmt=style,
        marker="o",
        markersize=3,
        linewidth=width,
        color=colour,
        label=label,
    )
    axes.set(xscale="log", yscale="log", xlabel=f"learning rate, {optimizer}", ylabel="train loss")
    plain_numbers(axes.yaxis)
