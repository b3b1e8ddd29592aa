"""Activations near zero and the second term of their Taylor series, ``φ''(0) u²/2``: the slides' Figure 2.

The slides claim that this term vanishes for popular activations, so that the curvature effect is small. It does for
linear, tanh and sigmoid, and for ReLU on either side of its kink. It does not for GELU, SiLU and softplus, nor for ELU
left of zero. The series is taken on the side of zero where u is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hessinit import rules
from hessinit.experiments import plots

ACTIVATIONS = {
    "linear": "linear",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu": "ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "softplus": "softplus",
    "elu": "ELU",
}
CURVES = {
    "phi": ("φ(u)", plots.COLOURS["he_normal"], "-"),
    "linear_part": ("φ(0) + φ'(0) u", plots.COLOURS["torch_default"], "--"),
    "second_order_term": ("φ''(0) u²/2", plots.COLOURS["closed_form"], ":"),
}


def taylor(name: str, side: int) -> npt.NDArray[np.float64]:
    """``φ(0), φ'(0), φ''(0)/2`` from the left (side −1) or right (+1): of a polynomial through points there."""
    u = side * np.linspace(0, 0.3, 31)
    series = np.polynomial.Polynomial.fit(u, rules.activation(name)(u), 8).convert().coef
    return np.round(np.pad(series, (0, 2))[:3], 6) + 0.0  # accurate to 1e-8; the sum makes −0 zero


def compute(points: int = 81) -> Iterator[dict[str, Any]]:
    """One row an activation and u."""
    for name, label in ACTIVATIONS.items():
        for u in np.linspace(-2, 2, points):
            value, slope, coefficient = taylor(name, 1 if u >= 0 else -1)
            yield {
                "activation": label,
                "u": float(u),
                "phi": float(rules.activation(name)(u)),
                "linear_part": float(value + slope * u),
                "second_order_term": float(coefficient * u**2),
                "coefficient": float(coefficient),
            }


def draw(table: Any) -> Any:
    """A panel an activation: the function, its linear part and its second term, with the coefficient of that."""
    from matplotlib.lines import Line2D

    made, axes = plots.figure(2, 4, 2.15, 2.3)
    for label, panel in zip(ACTIVATIONS.values(), axes.flat, strict=True):
        rows = table[table.activation == label]
        for column, (_, colour, style) in CURVES.items():
            panel.plot(rows.u, rows[column], style, color=colour, linewidth=2)
        left, right = (f"{rows.coefficient.iloc[end]:.3g}" for end in (0, -1))
        text = f"½φ''(0) = {left}" if left == right else f"½φ''(0) = {left} | {right}"
        slopes = rows.linear_part.diff()
        text += "" if np.isclose(slopes.iloc[1], slopes.iloc[-1]) else ", a kink"
        colour = CURVES["second_order_term"][1] if rows.coefficient.any() else "black"
        panel.text(0.98, 0.04, text, transform=panel.transAxes, ha="right", color=colour)
        panel.set(ylim=(-2, 2), xticks=(-2, -1, 0, 1, 2), yticks=(-2, -1, 0, 1, 2))
        panel.set_title(label, fontweight="bold")
    for panel in axes[:, 1:].flat:
        panel.tick_params(labelleft=False)
    for panel in axes[0]:
        panel.tick_params(labelbottom=False)
    for panel in axes[1]:
        panel.set_xlabel("u")
    lines = [
        Line2D([], [], color=colour, linestyle=style, linewidth=2, label=label)
        for label, colour, style in CURVES.values()
    ]
    made.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
