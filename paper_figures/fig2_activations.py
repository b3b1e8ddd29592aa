"""Activations near zero and the second term of their Taylor series: the slides' Figure 2.

The slides' claim is that this term vanishes, so that the curvature effect is small. It does for linear, tanh and the
logistic sigmoid (``φ''(0) = 0``), and for ReLU on either side of its kink. For GELU, SiLU and softplus it does not, nor
for ELU on the left. Derivatives are taken on the side of zero where u is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hessinit.experiments import plots

ACTIVATIONS = {
    "linear": lambda u: u,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "softplus": F.softplus,
    "ELU": F.elu,
}
BESIDE_ZERO = 1e-6


def taylor(name: str, side: int) -> tuple[float, float, float]:
    """``φ(0)``, and ``φ'`` and ``φ''`` just left (side −1) or right (+1) of zero, in float64."""
    function = ACTIVATIONS[name]
    at, zero = torch.tensor(side * BESIDE_ZERO, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    first = torch.func.grad(function)
    return float(function(zero)), float(first(at)), float(torch.func.grad(first)(at))


def compute(points: int = 81) -> Iterator[dict[str, Any]]:
    """One row an activation and u."""
    for name, function in ACTIVATIONS.items():
        for u in np.linspace(-2, 2, points):
            value, slope, second = taylor(name, 1 if u >= 0 else -1)
            yield {
                "activation": name,
                "u": float(u),
                "phi": float(function(torch.tensor(u, dtype=torch.float64))),
                "linear_part": value + slope * u,
                "second_order_term": second * u * u / 2,
                "second_derivative": second,
            }


def draw(table: Any) -> Any:
    """A panel an activation: the function, its linear part, and the second-order term."""
    made, axes = plots.figure(2, 4, 2.9, 2.7)
    for name, panel in zip(ACTIVATIONS, axes.flat, strict=True):
        rows = table[table.activation == name]
        sides = dict.fromkeys(f"{x:.2g}" for x in rows.second_derivative.iloc[[0, -1]].round(5) + 0.0)
        panel.plot(rows.u, rows.phi, color="#0072B2", linewidth=2, label="φ(u)")
        panel.plot(rows.u, rows.linear_part, "--", color="#6E6E6E", label="φ(0) + φ'(0) u")
        panel.plot(rows.u, rows.second_order_term, ":", color="#D55E00", linewidth=2, label="φ''(0) u²/2")
        panel.set(title=f"{name}: φ''(0) = {' and '.join(sides)}", ylim=(-2, 2), xlabel="u")
    axes[0, 0].legend(frameon=False, fontsize="small", loc="upper left")
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
