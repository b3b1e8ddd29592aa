"""Many runs and redraws: planned, made, and kept in CSV files that are whole at any moment."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hessinit.experiments import models
from hessinit.experiments.baselines import DEFAULT_ROWS, INITIALIZERS
from hessinit.experiments.data import Dataset
from hessinit.experiments.kappa import Redraw, measure
from hessinit.experiments.parallel import each
from hessinit.experiments.training import Result, Run, as_text, train

KEYS = [field.name for field in fields(Run)]
COLUMNS = [*KEYS, *(field.name for field in fields(Result) if field.name != "curve")]
CURVE_COLUMNS = [*KEYS, "step", "loss"]
REDRAW_KEYS = [field.name for field in fields(Redraw)]
KAPPA_COLUMNS = [*REDRAW_KEYS, "layer", "kappa"]
FRAMEWORKS = ("torch", "keras")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")

Kappas = list[list[float]]


@dataclass(frozen=True)
class Plan:
    """A grid of runs: every initializer row at every learning rate and seed; and redraws of every row.

    Args:
        rows: pairs (initializer, activation).
        lrs: learning rates.
        seeds: seeds 0 … seeds - 1.
        epochs: passes over the train set.
        batch_size: samples a step.
        problem: a key of ``models.PROBLEMS``.
        optimizer: one of ``OPTIMIZERS``.
        framework: one of ``FRAMEWORKS``.
        validation: train samples kept back from every run, the same ones.
        redraws: of the initial weights of each row, for κ; 0 for none. A row that is fitted has no weights without the
            run's data and step, and no κ.

    Raises:
        ValueError: an unknown name, a learning rate or a count that is not positive, negative redraws, an activation
            that the problem does not have, or an initializer or problem that the framework does not have.
    """

    rows: Sequence[tuple[str, str]] = DEFAULT_ROWS
    lrs: Sequence[float] = (0.01,)
    seeds: int = 3
    epochs: int = 2
    batch_size: int = 64
    problem: str = "mlp"
    optimizer: str = "sgd"
    framework: str = "torch"
    validation: int = 0
    redraws: int = 100

    def __post_init__(self) -> None:
        _one_of("problem", self.problem, models.PROBLEMS)
        package = models.PROBLEMS[self.problem].package
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"compare: problem {self.problem} must have the package {package}; it is not installed.")
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("framework", self.framework, FRAMEWORKS)
        for initializer, activation in self.rows:
            _one_of("initializers", initializer, INITIALIZERS)
            _one_of("activation", activation, models.PROBLEMS[self.problem].activations)
            if getattr(INITIALIZERS[initializer], self.framework) is None:
                have = [name for name, one in INITIALIZERS.items() if getattr(one, self.framework) is not None]
                raise ValueError(
                    f"compare: initializers must be of {self.framework}: {', '.join(have)}; got {initializer!r}."
                )
        if self.framework == "keras" and models.PROBLEMS[self.problem].hidden is None:
            plain = [name for name, one in models.PROBLEMS.items() if one.hidden is not None]
            raise ValueError(f"compare: problem must be of keras: {', '.join(plain)}; got {self.problem!r}.")
        for lr in self.lrs:
            if not (math.isfinite(lr) and lr > 0):
                raise ValueError(f"compare: lr must be finite and greater than 0; got {lr!r}.")
        for name in ("seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"compare: {name.replace('_', '-')} must be at least 1; got {getattr(self, name)!r}.")
        for name in ("validation", "redraws"):
            if getattr(self, name) < 0:
                raise ValueError(f"compare: {name} must be at least 0; got {getattr(self, name)!r}.")

    def runs(self, dataset: str) -> Iterator[Run]:
        """Every run; seeds vary slowest, so that all rows are there after one seed."""
        for seed, lr, (initializer, activation) in itertools.product(range(self.seeds), self.lrs, self.rows):
            yield Run(
                self.problem,
                self.framework,
                dataset,
                initializer,
                activation,
                self.optimizer,
                lr,
                self.epochs,
                self.batch_size,
                seed,
                self.validation,
            )

    def draws(self, dataset: str) -> Iterator[Redraw]:
        """Every redraw, row by row."""
        rows = [row for row in self.rows if INITIALIZERS[row[0]].fit is None]
        for (initializer, activation), seed in itertools.product(rows, range(self.redraws)):
            yield Redraw(self.problem, self.framework, dataset, initializer, activation, seed)


def rows_of(initializers: str | None, activation: str | None, framework: str) -> Sequence[tuple[str, str]]:
    """Rows from comma-separated names; without names the default rows, of which a framework runs those it has."""
    if initializers is None:
        allowed = None if activation is None else activation.split(",")
        default = "keras_default" if framework == "keras" else "torch_default"
        rows = [(default if name == "torch_default" else name, act) for name, act in DEFAULT_ROWS]
        return [row for row in rows if allowed is None or row[1] in allowed]
    return list(itertools.product(initializers.split(","), (activation or "relu").split(",")))


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"compare: {name} must be one of {', '.join(allowed)}; got {value!r}.")


class Store:
    """``runs.csv`` (a row a run), ``curves.csv`` and ``curvature.csv`` of one folder.

    The first two grow; a row that an interruption cut short, and the points of a curve without a row, are dropped when
    the folder is opened. The third is replaced as a whole.

    Raises:
        ValueError: the folder cannot be made or written, or holds other files of these names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / ".writable", "")
            (folder / ".writable").unlink()
        except OSError as error:
            raise ValueError(
                f"compare: out must be a folder that can be written; got {str(folder)!r} ({error.strerror})."
            ) from error
        self.rows = self._load("runs.csv", COLUMNS)
        done = {_key(row) for row in self.rows}
        self.points = self._load("curves.csv", CURVE_COLUMNS, lambda point: _key(point) in done)
        self.kappas = self._load("curvature.csv", KAPPA_COLUMNS)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of these runs that are not here yet."""
        done = {_key(row) for row in self.rows}
        return [run for run in runs if _key(asdict(run)) not in done]

    def rows_for(self, runs: Iterable[Run]) -> list[dict[str, str]]:
        """The rows of these runs, in their order, as written."""
        by_key = {_key(row): row for row in self.rows}
        return [by_key[key] for key in (_key(asdict(run)) for run in runs) if key in by_key]

    def points_for(self, runs: Iterable[Run]) -> list[dict[str, str]]:
        """The points of the curves of these runs."""
        keys = {_key(asdict(run)) for run in runs}
        return [point for point in self.points if _key(point) in keys]

    def add(self, run: Run, result: Result) -> None:
        """Writes one run: its curve first, so that a row in ``runs.csv`` always has one."""
        key = {name: str(value) for name, value in asdict(run).items()}
        points = [{**key, "step": str(step), "loss": f"{loss:.6g}"} for step, loss in result.curve]
        self._append("curves.csv", CURVE_COLUMNS, self.points, points)
        row = {**key, **{name: as_text(value) for name, value in result.row().items()}}
        self._append("runs.csv", COLUMNS, self.rows, [row])

    def missing_draws(self, draws: Iterable[Redraw]) -> list[Redraw]:
        """Those of these redraws that are not here yet."""
        done = {_key(row, REDRAW_KEYS) for row in self.kappas}
        return [draw for draw in draws if _key(asdict(draw), REDRAW_KEYS) not in done]

    def kappas_for(self, draws: Iterable[Redraw]) -> list[dict[str, str]]:
        """The rows of ``curvature.csv`` of these redraws, one a layer."""
        keys = {_key(asdict(draw), REDRAW_KEYS) for draw in draws}
        return [row for row in self.kappas if _key(row, REDRAW_KEYS) in keys]

    def add_kappas(self, draws: Iterable[Redraw], kappas: Kappas) -> None:
        """Writes κ of some redraws, a row a layer; layers are named as in the slides."""
        for draw, values in zip(draws, kappas, strict=True):
            key = {name: str(value) for name, value in asdict(draw).items()}
            self.kappas += [{**key, "layer": f"dense{k}", "kappa": as_text(v)} for k, v in enumerate(values, 1)]
        _replace(self.folder / "curvature.csv", _csv(KAPPA_COLUMNS, self.kappas))

    def _append(
        self, name: str, columns: Sequence[str], held: list[dict[str, str]], rows: list[dict[str, str]]
    ) -> None:
        path = self.folder / name
        text = _csv(columns, rows, header=not path.exists())
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text)
        held += rows

    def _load(
        self, name: str, columns: Sequence[str], wanted: Callable[[dict[str, str]], bool] = lambda row: True
    ) -> list[dict[str, str]]:
        path = self.folder / name
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        if list(reader.fieldnames or []) != list(columns) and not _csv(columns, []).startswith(text):
            raise ValueError(
                f"compare: out must be a folder of this command; got {str(path)!r} with other columns. "
                "Name another folder."
            )
        rows = list(filter(wanted, reader))
        whole = _csv(columns, rows)
        if whole != text:
            _replace(path, whole)
        return rows


def _key(row: dict[str, Any], names: Sequence[str] = KEYS) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in names)


def _csv(columns: Sequence[str], rows: Iterable[dict[str, str]], header: bool = True) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _replace(path: Path, content: str) -> None:
    """Writes a file so that at any moment the old or the new one is whole."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def sweep(
    plan: Plan, data: Dataset, store: Store, jobs: int = 1, on_run: Callable[[Run, Result], object] | None = None
) -> list[Run]:
    """Trains the runs of a plan that are not in the store yet, and stores each as it ends.

    Args:
        plan: what to train.
        data: on what.
        store: where results are kept; runs found there are not trained again.
        jobs: processes, through joblib.
        on_run: called after each run.

    Returns:
        All runs of the plan.
    """
    runs = list(plan.runs(data.name))
    for run, result in each(train, store.missing(runs), jobs, data):
        store.add(run, result)
        if on_run is not None:
            on_run(run, result)
    return runs


def redraw(
    plan: Plan,
    data: Dataset,
    store: Store,
    jobs: int = 1,
    on_draws: Callable[[list[Redraw]], object] | None = None,
) -> list[Redraw]:
    """Measures κ of the redraws of a plan that are not in the store yet, and stores those of a row at a time.

    Args:
        plan: what to draw.
        data: on what.
        store: where results are kept; redraws found there are not measured again.
        jobs: processes, through joblib.
        on_draws: called after each row.

    Returns:
        All redraws of the plan.
    """
    draws = list(plan.draws(data.name))
    groups = itertools.groupby(store.missing_draws(draws), lambda draw: (draw.initializer, draw.activation))
    for group, kappas in each(measure, [list(group) for _, group in groups], jobs, data):
        store.add_kappas(group, kappas)
        if on_draws is not None:
            on_draws(group)
    return draws


@dataclass(frozen=True)
class Summary:
    """One line of the final table: an initializer at one learning rate, over seeds.

    Means with the sample standard deviation (NaN for one seed); a diverged run counts as it is.
    """

    initializer: str
    activation: str
    lr: float
    seeds: int
    train_loss: tuple[float, float]
    last_fifth_loss: tuple[float, float]
    test_accuracy: tuple[float, float]
    seconds: float
    diverged: int


def summaries(rows: Sequence[dict[str, str]]) -> list[Summary]:
    """Rows of ``runs.csv`` by initializer, activation and learning rate, in the order met."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["initializer"], row["activation"], row["lr"]), []).append(row)

    def spread(group: list[dict[str, str]], column: str) -> tuple[float, float]:
        import numpy as np

        values = np.array([float(row[column]) for row in group])
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan

    return [
        Summary(
            initializer,
            activation,
            float(lr),
            len(group),
            spread(group, "train_loss"),
            spread(group, "last_fifth_loss"),
            spread(group, "test_accuracy"),
            spread(group, "seconds")[0],
            sum(row["status"] != "ok" for row in group),
        )
        for (initializer, activation, lr), group in groups.items()
    ]
