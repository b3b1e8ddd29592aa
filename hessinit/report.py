"""What was done to each parameter of a model, and why."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from hessinit.calibration import Calibration
from hessinit.networks.base import WEIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # names in a line
VANISHED = 1e-6  # share of the curvature, below which a weight hardly matters to the outputs


@dataclass(frozen=True)
class Row:
    """One parameter.

    Args:
        name: the framework's own.
        shape: as stored.
        dtype: as stored.
        role: weight, bias, norm scale, norm offset or other.
        fan_in: effective number of connections into an output unit; NaN where there is none.
        fan_out: effective number of connections out of an input unit.
        activation: what follows the weight, or is assumed to.
        depth: layers in the weight's chain, or None where it is not known.
        gain: g of the closed form.
        std: standard deviation asked for.
        std_drawn: root mean square of what was drawn, before a cast to a narrower dtype.
        touched: whether the parameter was written.
        note: how it was set, or why it was left.
        scale: factor of the budget on the draw, or on what was there; NaN without one.
        curvature_before: of a scaled weight, the trace of its block of the approximate Hessian where the budget began
            (one random probe).
        curvature: that at the scale chosen.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    touched: bool
    note: str
    fan_in: float = math.nan
    fan_out: float = math.nan
    activation: str = ""
    depth: int | None = None
    gain: float = math.nan
    std: float = math.nan
    std_drawn: float = math.nan
    scale: float = math.nan
    curvature_before: float = math.nan
    curvature: float = math.nan


@dataclass(frozen=True)
class Report:
    """What :func:`hessinit.init_` did: ``print(report)``, ``report["fc1.weight"]``, ``to_csv``, ``plot``, ``warnings``.

    Args:
        rows: one a parameter.
        seed: that decided the draw.
        distribution: of the draw; None where the weights there were scaled.
        calibration: of the budget, with every probe; None for the closed form.
        buffers: names of the model's other state (running statistics, masks), which is not set.
        blank: weights of which a norm takes zeros, for want of biases.
    """

    rows: tuple[Row, ...]
    seed: int
    distribution: str | None
    calibration: Calibration | None = None
    buffers: tuple[str, ...] = ()
    blank: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_csv(self, path: str | Path) -> None:
        """Writes one line a parameter."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    @property
    def warnings(self) -> list[str]:
        """What a budget has met that a user should know of, a line each."""
        return [] if self.calibration is None else _warnings(self.calibration, self.blank)

    def plot(self, path: str | Path | None = None) -> Figure:
        """A picture of a budget: std of each weight, its layer curvature, and ρ and level by probe; before and after.

        Args:
            path: of a file to write it to, in the format of its suffix. Default: none is written.

        Returns:
            A ``matplotlib.figure.Figure``, which notebooks show after ``%matplotlib inline``.

        Raises:
            ImportError: without matplotlib.
            ValueError: of a report of the closed form, which changes nothing.
        """
        if self.calibration is None:
            raise ValueError("plot: report must be of a budget; got one of the closed form.")
        made = _plot(self.calibration, [row for row in self.rows if row.role == WEIGHT and not math.isnan(row.scale)])
        if path is not None:
            made.savefig(path)
        return made

    def __str__(self) -> str:
        head = ["parameter", "shape", "role", "fans", "activation", "depth", "gain", "std", "drawn", "note"]
        lines = [head, *(_cells(row) for row in self.rows)]
        if self.calibration is not None:
            scaled = [row for row in self.rows if not math.isnan(row.curvature)]
            before, after = sum(row.curvature_before for row in scaled), sum(row.curvature for row in scaled)
            extra = [["scale", "curvature", "share"], *(_calibrated_cells(row, before, after) for row in self.rows)]
            lines = [[*line[:-1], *more, line[-1]] for line, more in zip(lines, extra, strict=True)]
        widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        touched = sum(row.touched for row in self.rows)
        table.insert(1, "-" * len(table[0]))
        drawn = "" if self.distribution is None else f" distribution {self.distribution},"
        table.append(f"{touched} of {len(self.rows)} parameters set;{drawn} seed {self.seed}")
        if self.buffers:
            named = ", ".join(self.buffers[:SHOWN]) + (", …" if len(self.buffers) > SHOWN else "")
            table.append(f"{len(self.buffers)} buffers left as they are: {named}")
        if self.calibration is not None:
            table += [*_summary(self.calibration), *(f"warning: {line}" for line in self.warnings)]
        return "\n".join(line.rstrip() for line in table)


def _summary(calibration: Calibration) -> list[str]:
    """What the budget came to, and what it cost."""
    before, after, (low, high) = calibration.before, calibration.after, calibration.budget
    asked = f"{low:g}" if low == high else f"{low:.3g} to {high:g}" if low else f"at most {high:g}"
    if calibration.angle is not None:
        asked += f", and of weights before norms to turn by {calibration.angle:.2g}"
    return [
        f"step sharpness {before.sharpness:.3g} → {after.sharpness:.3g} (asked for {asked}: "
        f"{calibration.solution.reason}), level {before.level:.3g} → {after.level:.3g}, "
        f"loss {before.loss:.3g} → {after.loss:.3g}",
        f"first step: loss {after.predicted:+.3g} by the quadratic model, {after.actual:+.3g} in fact; "
        f"{len(calibration.solution.points)} probes, {calibration.passes:.0f} gradient passes of "
        f"{calibration.samples} samples",
    ]


def _warnings(calibration: Calibration, blank: Sequence[str]) -> list[str]:
    after, solution, scales = calibration.after, calibration.solution, calibration.scales
    lines = []
    if not solution.met:
        lines.append(f"the budget was not met: {solution.reason}")
    for end, what in enumerate(("smallest", "largest")):
        edges = {name: calibration.bounds[name][end] for name in scales}
        held = [f"{edge:g} of {n}" for n, edge in edges.items() if math.isclose(scales[n], edge, rel_tol=1e-3)]
        if held:
            lines.append(f"at the {what} scale: {', '.join(held)}")
    for kind, shares in (("dead", 0), ("saturated", 1)):
        found = {name: units[shares] for name, units in after.units.items() if units[shares] > 0}
        if found:
            lines.append(f"{kind} units: " + ", ".join(f"{share:.0%} of {name}" for name, share in found.items()))
    whole = sum(value for value in after.curvature.values() if not math.isnan(value))
    faint = [name for name in scales if after.curvature[name] < VANISHED * whole]
    if faint:
        lines.append(f"vanished signal, less than {VANISHED:g} of all curvature: {', '.join(faint)}")
    if blank:
        names = ", ".join(blank)
        lines.append(f"a norm takes zeros of {names}, which a small step blows up: biases would keep it from that")
    return lines


def _plot(calibration: Calibration, rows: Sequence[Row]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(12, 1.8 + 0.22 * len(rows)), layout="constrained")
    FigureCanvasAgg(made)
    std, curvature, probes = made.subplots(1, 3)
    places = range(len(rows))
    pairs = (
        (std, "std of the weights", [row.std / row.scale for row in rows], [row.std for row in rows]),
        (curvature, "layer curvature", [row.curvature_before for row in rows], [row.curvature for row in rows]),
    )
    for axes, title, before, after in pairs:
        axes.hlines(places, before, after, color="0.7")
        axes.plot(before, places, "o", color="0.5", markerfacecolor="white", label="before")
        axes.plot(after, places, "o", color="#D55E00", label="after")
        axes.set(xscale="log", title=title)
        axes.set_yticks(places, [row.name for row in rows] if axes is std else [])
        axes.invert_yaxis()
    std.legend(frameon=False)
    points = calibration.solution.points
    steps = range(1, len(points) + 1)
    low, high = calibration.budget
    probes.axhspan(0.98 * (low or min(p.sharpness for p in points)), 1.02 * high, color="#0072B2", alpha=0.12)
    probes.plot(steps, [p.sharpness for p in points], "o-", color="#0072B2", label="step sharpness ρ (band: asked for)")
    probes.plot(steps, [p.level for p in points], "s--", color="#009E73", label="level r")
    probes.set(yscale="log", xlabel="probe", title=calibration.solution.reason)
    probes.set_xticks(steps)
    probes.legend(frameon=False)
    return made


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _calibrated_cells(row: Row, before: float, after: float) -> list[str]:
    """Scale, curvature, and its share of the whole before and after."""
    scale = "" if math.isnan(row.scale) else f"{row.scale:.3g}"
    if math.isnan(row.curvature):
        return [scale, "", ""]
    change = f"{row.curvature_before:.3g} → {row.curvature:.3g}"
    share = f"{row.curvature_before / (before or 1.0):.0%} → {row.curvature / (after or 1.0):.0%}"
    return [scale, change, share]


def _cells(row: Row) -> list[str]:
    shape = "x".join(str(size) for size in row.shape) or "-"
    fans = "" if math.isnan(row.fan_in) else f"{row.fan_in:g}, {row.fan_out:g}"
    depth = "" if row.depth is None else str(row.depth)
    numbers = (_number(row.gain), _number(row.std), _number(row.std_drawn))
    return [row.name, shape, row.role, fans, row.activation, depth, *numbers, row.note]
