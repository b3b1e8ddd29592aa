"""What was done to each parameter of a model, and why."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path


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


@dataclass(frozen=True)
class Report:
    """What :func:`hessinit.init_` did: ``report.rows``, ``print(report)``, ``report["fc1.weight"]``, ``to_csv``."""

    rows: tuple[Row, ...]
    seed: int
    distribution: str

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
        head = ("parameter", "shape", "role", "fans", "activation", "depth", "gain", "std", "drawn", "note")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[j]) for line in lines) for j in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        touched = sum(row.touched for row in self.rows)
        table.insert(1, "-" * len(table[0]))
        table.append(
            f"{touched} of {len(self.rows)} parameters set; distribution {self.distribution}, seed {self.seed}"
        )
        return "\n".join(line.rstrip() for line in table)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.4g}"

    shape = "x".join(str(size) for size in row.shape) or "-"
    fans = "" if math.isnan(row.fan_in) else f"{row.fan_in:g}, {row.fan_out:g}"
    depth = "" if row.depth is None else str(row.depth)
    numbers = (number(row.gain), number(row.std), number(row.std_drawn))
    return (row.name, shape, row.role, fans, row.activation, depth, *numbers, row.note)
