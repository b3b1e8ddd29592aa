"""Loss landscape of LeNet-5 on FashionMNIST along two random directions: the slides' Figure 1, and its quadratic model.

The loss of 1,000 train images at ``w + a u + b v``, for weights w as drawn (tanh, Glorot uniform) and after one epoch
of SGD (batch 64, lr .1). The directions are normal, each tensor scaled to the norm of the weights' own (H. Li et al.,
"Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4, per tensor), then made orthogonal. Beside the
loss, ``ℓ + gᵀd + dᵀGd/2`` with the approximate Hessian G.
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

STATES = ("as drawn", "after one epoch")


def directions(weights: dict[str, torch.Tensor], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two orthogonal directions, each tensor of the norm of the weights' (biases of norm zero do not move)."""
    u, v = (
        {
            name: torch.from_numpy(stream(seed, which, name).standard_normal(tuple(w.shape)).astype(np.float32))
            for name, w in weights.items()
        }
        for which in ("u", "v")
    )
    for direction in (u, v):
        for name, w in weights.items():
            direction[name] *= w.norm() / direction[name].norm()
    along = sum(float((u[n] * v[n]).sum()) for n in u) / sum(float(t.square().sum()) for t in u.values())
    return u, {name: v[name] - along * u[name] for name in v}


def train_one_epoch(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, lr: float = 0.1) -> None:
    """Plain SGD, batches of 64 in the data's order."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for start in range(0, len(x), 64):
        optimizer.zero_grad()
        F.cross_entropy(net(x[start : start + 64]), y[start : start + 64]).backward()
        optimizer.step()


def compute(
    points: int = 41, samples: int = 1000, train_samples: int = 60_000, dataset: str = "fashion_mnist"
) -> Iterator[dict[str, Any]]:
    """One row a grid point and state of the net."""
    loaded = data.load(dataset)
    x, y = torch.from_numpy(loaded.x_train).reshape(-1, 1, 28, 28), torch.from_numpy(loaded.y_train)
    generator = torch.Generator().manual_seed(0)
    net = models.torch_lenet("tanh")
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            torch.nn.init.zeros_(parameter)
    batch = x[:samples], y[:samples]
    for state in STATES:
        if state == STATES[1]:
            train_one_epoch(net, x[:train_samples], y[:train_samples])
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
        u, v = directions(weights, seed=0)
        hessian = curvature.hessian(net, batch, "cross_entropy")
        gradient = hessian.objective.gradient(hessian.rows)
        slope_u, slope_v = (sum(float((gradient[n] * d[n]).sum()) for n in d) for d in (u, v))
        product = hessian @ u
        uv = sum(float((product[n] * v[n]).sum()) for n in v)
        uu, vv = float(hessian.quadratic_form(u)), float(hessian.quadratic_form(v))
        start = hessian.objective.value()
        for a in np.linspace(-1, 1, points):
            for b in np.linspace(-1, 1, points):
                moved = {n: w + float(a) * u[n] + float(b) * v[n] for n, w in weights.items()}
                with torch.no_grad():
                    loss = F.cross_entropy(torch.func.functional_call(net, moved, (batch[0],)), batch[1])
                model = start + a * slope_u + b * slope_v + (a * a * uu + 2 * a * b * uv + b * b * vv) / 2
                yield {
                    "state": state,
                    "a": float(a),
                    "b": float(b),
                    "quadratic_model": float(model),
                    "loss": float(loss),
                }


def draw(table: Any) -> Any:
    """Filled contours of the loss with black lines, and its quadratic model's at the same levels in white."""
    made, axes = plots.figure(1, 2, 4.8, 4.2)
    near = table[(table.a.abs() < 0.6) & (table.b.abs() < 0.6)]
    for state, panel in zip(STATES, axes.flat, strict=True):
        rows = near[near.state == state]
        loss, model = (rows.pivot(index="b", columns="a", values=c) for c in ("loss", "quadratic_model"))
        levels = np.linspace(loss.values.min(), loss.values.max(), 13)
        filled = panel.contourf(loss.columns, loss.index, loss.values, levels, cmap="viridis", extend="both")
        panel.contour(loss.columns, loss.index, loss.values, levels[1:-1:2], colors="black", linewidths=0.9)
        panel.contour(
            loss.columns, loss.index, model.values, levels[1:-1:2], colors="white", linewidths=1.4, linestyles="--"
        )
        panel.plot(0, 0, "+", color="#D55E00", markersize=12, markeredgewidth=2)
        panel.set(title=f"LeNet-5, {state}", xlabel="a, along u", ylabel="b, along v")
        panel.grid(visible=False)
        made.colorbar(filled, ax=panel, label="loss", format="%.2f")
    made.suptitle("Loss (black) and its quadratic model from G (white, dashed), same levels")
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
