"""Layer curvature against depth: the closed form beside He and Glorot, for ReLU, tanh, GELU and SiLU.

Plain nets 784-128-…-128-10 of 2 to 50 layers, orthogonal draws, 256 FashionMNIST images, cross-entropy. For each layer
``h_k``, the trace of its block of the approximate Hessian, exactly (ten backward passes, one a class).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fig_depth_training import ACTIVATIONS, COLOURS, stds

from hessinit.draw import draw as draw_weights
from hessinit.draw import stream
from hessinit.experiments import data, plots
from hessinit.layout import Layout

RULES = ("depth", "one layer", "He", "Glorot")
DEPTHS = (2, 3, 4, 6, 10, 20, 30, 50)


def layer_curvatures(x: torch.Tensor, weights: Sequence[torch.Tensor], activation: str) -> list[float]:
    """``h_k`` of each layer of a plain net: mean over samples of ‖a_{k-1}‖² ‖Rᵀ ∂z/∂u_k‖², R Rᵀ = diag(p) - p pᵀ."""
    signals, slopes = [x], []
    for weight in weights[:-1]:
        u = (signals[-1] @ weight).requires_grad_()
        a = ACTIVATIONS[activation](u)
        slopes.append(torch.autograd.grad(a.sum(), u)[0])
        signals.append(a.detach())
    p = torch.softmax(signals[-1] @ weights[-1], dim=1)
    backward = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # R: (samples, classes, classes)
    found = []
    for k in reversed(range(len(weights))):
        found.append(float((signals[k].square().sum(1) * backward.square().sum((1, 2))).mean()))
        if k > 0:
            backward = slopes[k - 1][:, :, None] * (weights[k] @ backward)
    return found[::-1]


def compute(
    depths: Sequence[int] = DEPTHS, seeds: Sequence[int] = range(5), samples: int = 256, dataset: str = "fashion_mnist"
) -> Iterator[dict[str, Any]]:
    """One row a layer, rule, depth, activation and seed."""
    x = torch.from_numpy(data.load(dataset).x_train[:samples].astype(np.float64))
    for activation, depth, rule, seed in itertools.product(ACTIVATIONS, depths, RULES, seeds):
        widths = [784, *[128] * (depth - 1), 10]
        weights = [
            torch.from_numpy(draw_weights((n, m), Layout("io"), std, "orthogonal", stream(seed, k), np.float64))
            for k, ((n, m), std) in enumerate(
                zip(itertools.pairwise(widths), stds(rule, activation, widths, 1.0), strict=True)
            )
        ]
        for layer, curvature in enumerate(layer_curvatures(x, weights, activation), 1):
            yield {
                "activation": activation,
                "depth": depth,
                "rule": rule,
                "seed": seed,
                "layer": layer,
                "curvature": curvature,
            }


def draw(table: Any) -> Any:
    """A panel an activation: geometric mean of h_k over layers and seeds, with the range over layers."""
    made, axes = plots.figure(1, len(ACTIVATIONS), 3.4, 3.2)
    for column, activation in enumerate(ACTIVATIONS):
        here = axes[0, column]
        for rule in RULES:
            chosen = table[(table.activation == activation) & (table.rule == rule)]
            logs = np.log(chosen.curvature.clip(lower=1e-30)).groupby([chosen.depth, chosen.layer]).mean()
            by_depth = logs.groupby("depth")
            here.plot(np.exp(by_depth.mean()), "o-", color=COLOURS[rule], label=rule, markersize=4)
            here.fill_between(
                by_depth.mean().index, np.exp(by_depth.min()), np.exp(by_depth.max()), color=COLOURS[rule], alpha=0.15
            )
        depths = sorted(table.depth.unique())
        here.set(xscale="log", yscale="log", ylim=(1e-6, 1e6), xlabel="layers", title=activation)
        here.set_xticks(depths, [str(d) for d in depths])
        here.minorticks_off()
    axes[0, 0].set_ylabel("layer curvature $h_k$")
    labels = {"depth": "closed form", "one layer": "closed form, one-layer gain"}
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(handles, [labels.get(n, n) for n in names], frameon=False, fontsize=8)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
