"""What was done to each parameter of a model, and why."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hessinit.calibration import Calibration


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
        scale: factor of the budget on the draw; NaN without one.
        curvature_before: trace of the parameter's block of the approximate Hessian at scale one (one random probe).
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
    """What :func:`hessinit.init_` did: ``report.rows``, ``print(report)``, ``report["fc1.weight"]``, ``to_csv``.

    Args:
        rows: one a parameter.
        seed: that decided the draw.
        distribution: of the draw.
        calibration: of the budget, with every probe; None for the closed form.
    """

    rows: tuple[Row, ...]
    seed: int
    distribution: str
    calibration: Calibration | None = None

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

    def __str__(self) -> str:
        head = ["parameter", "shape", "role", "fans", "activation", "depth", "gain", "std", "drawn", "note"]
        lines = [head, *(_cells(row) for row in self.rows)]
        if self.calibration is not None:
            extra = [["scale", "curvature"], *(_calibrated_cells(row) for row in self.rows)]
            lines = [[*line[:-1], *more, line[-1]] for line, more in zip(lines, extra, strict=True)]
        widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        touched = sum(row.touched for row in self.rows)
        table.insert(1, "-" * len(table[0]))
        table.append(
            f"{touched} of {len(self.rows)} parameters set; distribution {self.distribution}, seed {self.seed}"
        )
        if self.calibration is not None:
            table += _summary(self.calibration)
        return "\n".join(line.rstrip() for line in table)


def _summary(calibration: Calibration) -> list[str]:
    """What the budget came to, and what to be warned of."""
    before, after, (low, high) = calibration.before, calibration.after, calibration.budget
    asked = f"{low:g}" if low == high else f"{low:.3g} to {high:g}"
    lines = [
        f"step sharpness {before.sharpness:.3g} → {after.sharpness:.3g} (asked for {asked}: "
        f"{calibration.solution.reason}), level {before.level:.3g} → {after.level:.3g}, "
        f"loss {before.loss:.3g} → {after.loss:.3g}",
        f"first step: loss {after.predicted:+.3g} by the quadratic model, {after.actual:+.3g} in fact; "
        f"{len(calibration.solution.points)} probes, {calibration.passes:.0f} gradient passes of "
        f"{calibration.samples} samples",
    ]
    for kind, shares in (("dead", 0), ("saturated", 1)):
        found = {name: units[shares] for name, units in after.units.items() if units[shares] > 0}
        if found:
            lines.append(f"{kind} units: " + ", ".join(f"{share:.0%} of {name}" for name, share in found.items()))
    return lines


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _calibrated_cells(row: Row) -> list[str]:
    change = "" if math.isnan(row.curvature) else f"{row.curvature_before:.3g} → {row.curvature:.3g}"
    return ["" if math.isnan(row.scale) else f"{row.scale:.3g}", change]


def _cells(row: Row) -> list[str]:
    shape = "x".join(str(size) for size in row.shape) or "-"
    fans = "" if math.isnan(row.fan_in) else f"{row.fan_in:g}, {row.fan_out:g}"
    depth = "" if row.depth is None else str(row.depth)
    numbers = (_number(row.gain), _number(row.std), _number(row.std_drawn))
    return [row.name, shape, row.role, fans, row.activation, depth, *numbers, row.note]
