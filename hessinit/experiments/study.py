"""Tables of many training runs, a row a run: made in parallel, and gone on with where they were stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hessinit.experiments.data import Dataset
from hessinit.experiments.parallel import each
from hessinit.experiments.statistics import area_under, steps_to
from hessinit.experiments.training import Result, Run, as_text, train

NAMES = ("problem", "activation", "optimizer", "lr", "initializer", "seed")
RESULTS = (
    *("train_loss", "validation_loss", "last_fifth_loss", "test_accuracy"),
    *("area", "steps_to", "init_seconds", "seconds", "status"),
)


@dataclass(frozen=True)
class Task:
    """One row of a table.

    Args:
        run: what is trained.
        data: on what.
        target: loss for ``steps_to``.
        calibration: keywords of the fit, of an initializer that has one.
        first: columns before those of the run.
        last: columns after them.
    """

    run: Run
    data: Dataset
    target: float = 0.4
    calibration: Mapping[str, Any] = field(default_factory=dict)
    first: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, Any]:
        """What tells this row from every other."""
        return {**self.first, **{name: getattr(self.run, name) for name in NAMES}, **self.last}


def rows(
    tasks: Iterable[Task],
    done: Iterable[Mapping[str, Any]] = (),
    results: Sequence[str] = RESULTS,
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """Makes the rows that are not done yet, as they end.

    Args:
        tasks: of all rows.
        done: rows made before, as texts.
        results: columns, of a :class:`~hessinit.experiments.training.Result`; ``area``, the mean loss of all steps, and
            ``steps_to``, the first step at which the curve is below the task's target.
        jobs: processes.
    """
    made = {tuple(row[name] for name in row if name not in results) for row in done}
    left = [task for task in tasks if tuple(map(as_text, task.names.values())) not in made]
    for _, row in each(_row, left, jobs, results):
        yield row


def _row(task: Task, results: Sequence[str]) -> dict[str, Any]:
    result = train(task.run, task.data, **task.calibration)
    return {**task.names, **{name: _column(result, name, task.target) for name in results}}


def _column(result: Result, name: str, target: float) -> Any:
    if name == "area":
        return area_under(result.curve)
    return steps_to(result.curve, target) if name == "steps_to" else getattr(result, name)
