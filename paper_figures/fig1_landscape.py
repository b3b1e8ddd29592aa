"""Loss landscape of LeNet-5 on FashionMNIST along two random directions: the slides' Figure 1, with quadratic models.

The loss of 1,000 train images at ``w + d``, ``d = a u + b v``, for weights w as drawn (tanh, Glorot uniform, biases
zero) and after one epoch of SGD (batch 64, lr .1). The directions are normal draws, each tensor scaled to the norm of
the weights' own, whole tensors rather than filters (H. Li et al., "Visualizing the loss landscape of neural nets",
NeurIPS 2018, section 4), then made orthogonal. Beside the loss, ``ℓ + gᵀd + dᵀGd/2`` with the approximate Hessian G,
and the same with the exact one: a random direction moves all layers at once, so the blocks between layers count, where
G is not close. That is most of the curvature at the initial weights, and little of it after an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hessinit import curvature
from hessinit.draw import stream
from hessinit.experiments import data, models, plots

Direction = dict[str, torch.Tensor]
STATES = ("as drawn", "after one epoch")
CURVES = {
    "loss": ("loss", "black", "-"),
    "quadratic_model": ("quadratic model, G", plots.COLOURS["closed_form"], "--"),
    "exact_model": ("quadratic model, exact Hessian", plots.COLOURS["he_normal"], ":"),
}


def directions(weights: Direction, seed: int) -> tuple[Direction, Direction]:
    """Two orthogonal directions, each tensor of the norm of the weights' (biases that are zero do not move)."""
    u, v = ({name: torch.empty_like(w) for name, w in weights.items()} for _ in range(2))
    for which, direction in (("u", u), ("v", v)):
        for name, w in weights.items():
            draw = torch.from_numpy(stream(seed, which, name).standard_normal(tuple(w.shape)))
            direction[name] = (draw * w.norm() / draw.norm()).to(w.dtype)
    along = dot(u, v) / dot(u, u)
    return u, {name: v[name] - along * u[name] for name in v}


def dot(u: Direction, v: Direction) -> float:
    """The inner product of two directions."""
    return sum(float((u[name] * v[name]).sum()) for name in u)


def train_one_epoch(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float = 0.1) -> None:
    """Plain SGD, batches of 64 in the data's order."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for start in range(0, len(x), 64):
        optimizer.zero_grad()
        F.cross_entropy(net(x[start : start + 64]), y[start : start + 64]).backward()
        optimizer.step()


def compute(
    points: int = 41,
    radius: float = 0.5,
    samples: int = 1000,
    train_samples: int = 60_000,
    dataset: str = "fashion_mnist",
) -> Iterator[dict[str, Any]]:
    """One row a grid point and state of the net."""
    loaded = data.load(dataset)
    x, y = torch.from_numpy(loaded.x_train).reshape(-1, 1, 28, 28), torch.from_numpy(loaded.y_train)
    batch = x[:samples], y[:samples]
    net, generator = models.torch_lenet("tanh"), torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            torch.nn.init.zeros_(parameter)
    for state in STATES:
        if state == STATES[1]:
            train_one_epoch(net, x[:train_samples], y[:train_samples])
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
        u, v = directions(weights, seed=0)
        start = F.cross_entropy(net(batch[0]), batch[1])
        gradient = dict(zip(weights, torch.autograd.grad(start, list(net.parameters())), strict=True))
        slopes = np.array([dot(gradient, u), dot(gradient, v)])
        approximate, exact = (_restricted(net, batch, u, v, exact) for exact in (False, True))
        for a, b in np.stack(np.meshgrid(*[np.linspace(-radius, radius, points)] * 2), -1).reshape(-1, 2):
            moved = {n: w + float(a) * u[n] + float(b) * v[n] for n, w in weights.items()}
            with torch.no_grad():
                loss = F.cross_entropy(torch.func.functional_call(net, moved, (batch[0],)), batch[1])
            d = np.array([a, b])
            linear = start.item() + d @ slopes
            yield {
                "state": state,
                "a": float(a),
                "b": float(b),
                "loss": float(loss),
                "quadratic_model": float(linear + d @ approximate @ d / 2),
                "exact_model": float(linear + d @ exact @ d / 2),
            }


def _restricted(net: torch.nn.Module, batch: Any, u: Direction, v: Direction, exact: bool) -> np.ndarray:
    """The Hessian in the plane of u and v, 2 × 2."""
    hessian = curvature.hessian(net, batch, "cross_entropy", exact=exact)
    uv = dot(hessian @ u, v)
    return np.array([[float(hessian.quadratic_form(u)), uv], [uv, float(hessian.quadratic_form(v))]])


def draw(table: Any) -> Any:
    """A panel a state: the loss, and contours of it and of its two quadratic models at the same levels."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    made, axes = plots.figure(1, 2, 4.3, 3.7)
    for state, panel in zip(STATES, axes.flat, strict=True):
        rows = table[table.state == state]
        grids = {column: rows.pivot(index="b", columns="a", values=column) for column in CURVES}
        loss = grids["loss"]
        levels = MaxNLocator(7).tick_values(loss.values.min(), loss.values.max())
        filled = panel.contourf(loss.columns, loss.index, loss.values, levels, cmap="Greys_r", alpha=0.6)
        for column, (_, colour, style) in CURVES.items():
            panel.contour(
                loss.columns,
                loss.index,
                grids[column].values,
                levels,
                colors=colour,
                linestyles=style,
                linewidths=1 if column == "loss" else 1.8,
            )
        panel.plot(0, 0, "+", color="black", markersize=11, markeredgewidth=2)
        panel.set(title=f"LeNet-5, {state}", xlabel="a, along u", ylabel="b, along v", aspect="equal")
        panel.grid(visible=False)
        made.colorbar(filled, ax=panel, label="loss", format="%.2f", shrink=0.85)
    lines = [Line2D([], [], color=colour, linestyle=style, label=label) for label, colour, style in CURVES.values()]
    made.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
