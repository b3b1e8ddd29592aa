"""The layers' Rayleigh quotients at initialization, over redraws: the left column of the slides' Figure 4.

``κ = gᵀGg / gᵀg`` of the weights of each layer, without biases, on the first 100 train images. The authors' notebook
has the exact Hessian in place of G: the same for ReLU, for tanh up to a tenth less in the first layer.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hessinit import curvature
from hessinit.experiments import baselines, models
from hessinit.experiments.data import Dataset
from hessinit.experiments.training import one_thread, tensors, torch_net

IMAGES = 100
FIRST_SEED = 1_000_000  # of redraws, so that no training run starts from one; weights follow from it as in training


@dataclass(frozen=True)
class Redraw:
    """Initial weights of a net. Two equal ones give equal results on one machine."""

    problem: str
    framework: str
    dataset: str
    initializer: str
    activation: str
    seed: int


def measure(redraws: Sequence[Redraw], data: Dataset) -> list[list[float]]:
    """κ of each layer for redraws that differ in the seed alone: a gradient and a JVP a layer each."""
    kappas = {"torch": _torch_kappas, "keras": _keras_kappas}[redraws[0].framework]
    return [[float(kappa) for kappa in values.values()] for values in kappas(redraws, data)]


def medians(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], list[float]]:
    """The median κ of each layer by (initializer, activation), from rows of ``curvature.csv``.

    Redraws with a zero gradient have no κ and are left out.
    """
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        layers = groups.setdefault((row["initializer"], row["activation"]), {})
        layers.setdefault(row["layer"], []).append(float(row["kappa"]))
    return {
        key: [statistics.median([v for v in values if math.isfinite(v)] or [math.nan]) for values in layers.values()]
        for key, layers in groups.items()
    }


def as_text(kappas: Sequence[float]) -> str:
    """Two digits a layer.

    Example:
        >>> as_text([6.612, 0.4649, 0.0996, 151.3])
        '6.6/.46/.10/151'
    """
    return "/".join(f"{k:.0f}" if k >= 9.95 else f"{k:#.2g}".lstrip("0") for k in kappas)


def _torch_kappas(redraws: Sequence[Redraw], data: Dataset) -> Iterator[curvature.Values]:
    batch = tensors(data.x_train[:IMAGES], data.y_train[:IMAGES])
    with one_thread():
        for redraw in redraws:
            model = torch_net(redraw.problem, data, redraw.initializer, redraw.activation, FIRST_SEED + redraw.seed)
            yield curvature.rayleigh(model, batch, data.loss, params="*weight", progress=False)


def _keras_kappas(redraws: Sequence[Redraw], data: Dataset) -> Iterator[curvature.Values]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    one = redraws[0]
    make = baselines.INITIALIZERS[one.initializer].keras
    assert make is not None  # checked when the sweep is planned
    sizes = models.PROBLEMS[one.problem].widths(data)
    depth = len(sizes) - 1
    model = models.keras_mlp(sizes, one.activation, ["zeros"] * depth)
    batch = data.x_train[:IMAGES], data.y_train[:IMAGES]
    with one_thread():
        for redraw in redraws:
            for k, layer in enumerate(model.layers):  # what building the model anew would draw
                initializer = make(k, one.activation, depth, 1000 * (FIRST_SEED + redraw.seed))
                layer.kernel.assign(initializer(layer.kernel.shape, layer.kernel.dtype))
            yield curvature.rayleigh(model, batch, data.loss, params="*/kernel", progress=False)
