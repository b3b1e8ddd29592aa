"""What an initialization costs, in seconds and in gradients of its probe batch: over width, depth, batch and nets.

Plain ReLU nets on FashionMNIST for SGD at 0.1: 784-w-w-10, nets of width 128, and 784-128-84-10 with batches of other
sizes; then other nets. One thread. A repetition runs all initializers one after the other; each time is divided by that
of the plain gradient (model, loss, ``torch.autograd.grad``) of the budget's probe batch, measured just before. GradInit
and MetaInit take the steps and batches of their authors, 390 of 128 samples and 500 of 64, whatever the probe batch,
and are left out where they would only repeat themselves or take minutes. Memory is the peak of what torch's allocator
hands out, as in fig_cost; of the two that take steps, of five of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from cost import CrossEntropy, peak_memory

from hessinit import init_
from hessinit.experiments import data, models, plots
from hessinit.experiments.baselines import INITIALIZERS, Fit
from hessinit.experiments.training import tensors

STEPS = ("gradinit", "metainit")
ALL = ("he_normal", "closed_form", "lsuv", "budget", *STEPS)
NETS = ("lenet", "resnet_bn", "vit", "charlm")
# panel, values, initializers; the value is the width, the depth, the samples of the probe batch or the net
STUDY = (
    ("width", (64, 128, 256, 512, 1024), ALL),
    ("layers", (2, 6, 12, 30), ALL),
    ("samples", (64, 256, 1024, 4096), ALL[:4]),
    ("net", NETS, ALL[:4]),
)
LR = 0.1


def net(panel: str, value: Any) -> tuple[Callable[[], torch.nn.Module], str, str]:
    """What builds a net, its activation, and the name of its data."""
    if panel == "net":
        problem, activation = models.PROBLEMS[value], "gelu" if value in ("vit", "charlm") else "relu"
        dataset = "fashion_mnist" if problem.dataset == "auto" else problem.dataset
        return lambda: problem.torch(data.load(dataset), activation), activation, dataset
    hidden = {"width": (value, value), "layers": (128,) * (value - 1), "samples": (128, 84)}[panel]
    return lambda: models.torch_mlp((784, *hidden, 10), "relu"), "relu", "fashion_mnist"


def compute(
    study: Iterable[tuple[str, Iterable[Any], Iterable[str]]] = STUDY,
    repetitions: int = 5,
    dataset: str | None = None,
    steps: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row an initializer, repetition and net; of the two that take steps, the first three repetitions."""
    for panel, value, names in ((panel, value, names) for panel, values, names in study for value in values):
        yield from repeat(panel, value, names, repetitions, dataset, steps)


def repeat(
    panel: str, value: Any, names: Iterable[str], repetitions: int, dataset: str | None, steps: int | None
) -> Iterator[dict[str, Any]]:
    """The rows of one net, interleaved."""
    build, activation, own = net(panel, value)
    loaded = data.load(dataset or own)
    x, y = tensors(loaded.x_train, loaded.y_train)
    criterion = CrossEntropy()

    def initialise(name: str, options: dict[str, Any], own: torch.nn.Module | None = None) -> Any:
        rule, model = INITIALIZERS[name], copy.deepcopy(plain) if own is None else own
        optimizer = torch.optim.SGD(model.parameters(), LR)
        with torch.random.fork_rng(devices=[]):
            rule.torch(model, activation, torch.Generator().manual_seed(0))
            if rule.fit is not None:
                rule.fit(model, Fit(x, y, "cross_entropy", criterion, optimizer, "sgd", LR, 0, options))

    probe = {"num_samples": value} if panel == "samples" else {}
    few = {} if steps is None else {"steps": steps}
    options = {"budget": probe, **dict.fromkeys(STEPS, few)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = build()
    _, report = init_(
        copy.deepcopy(plain), (x, y), "cross_entropy", lr=LR, seed=0, progress=False, return_report=True, **probe
    )
    samples = report.calibration.samples
    inputs, targets = x[:samples], y[:samples]
    parameters = list(plain.parameters())

    def gradient() -> Any:
        return torch.autograd.grad(criterion(plain(inputs), targets), parameters)

    def seconds(work: Callable[[], Any], times: int = 1) -> float:
        found = []
        for _ in range(times):
            start = perf_counter()
            work()
            found.append(perf_counter() - start)
        return float(np.median(found))

    gradient()
    peaks = {"budget": peak_memory(partial(initialise, "budget", probe))}
    peaks |= {name: peak_memory(partial(initialise, name, {"steps": 5})) for name in STEPS if name in names}
    for repetition in range(repetitions):
        for name in names:
            if name in STEPS and repetition > 2:
                continue
            unit = seconds(gradient, 5)
            took = seconds(partial(initialise, name, options.get(name, {}), copy.deepcopy(plain)))
            yield {
                "panel": panel,
                "value": value,
                "parameters": sum(p.numel() for p in parameters),
                "initializer": name,
                "samples": samples,
                "passes": report.calibration.passes if name == "budget" else float("nan"),
                "peak_mib": peaks.get(name, float("nan")),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "repetition": repetition,
                "seconds": took,
                "gradients": took / unit,
            }


def draw(table: pd.DataFrame) -> Any:
    """A row: seconds, then gradients of the probe batch; a column a panel of the study."""
    panels = list(dict.fromkeys(table.panel))
    made, axes = plots.figure(2, len(panels), 3.8, 3.2)
    for column, panel in zip(axes.T, panels, strict=True):
        own = table[table.panel == panel]
        values = list(dict.fromkeys(own.value.astype(str)))
        places = range(len(values)) if panel == "net" else [float(value) for value in values]
        for axis, unit in zip(column, ("seconds", "gradients"), strict=True):
            for name, rows in own.groupby("initializer", sort=False):
                median = rows.assign(value=rows.value.astype(str)).groupby("value")[unit].median().reindex(values)
                axis.plot(places, median, "o-", color=plots.COLOURS[name], label=INITIALIZERS[name].label, markersize=4)
            axis.set(yscale="log", ylabel={"seconds": "seconds", "gradients": "time / gradient"}[unit], xlabel=panel)
            if panel != "net":
                axis.set_xscale("log")
            axis.set_xticks(list(places), [models.PROBLEMS[v].title if panel == "net" else v for v in values])
            axis.set_xticks([], minor=True)
            axis.tick_params(axis="x", labelrotation=20 if panel == "net" else 0, labelsize="small")
    plots.legend_above(made, 6)
    return made


COLUMNS = (("width", "128"), ("width", "1024"), ("layers", "30"), *(("net", name) for name in NETS))  # of the README


def readme_rows(table: pd.DataFrame) -> list[list[str]]:
    """An initializer a row: seconds, and in brackets gradients of the probe batch; medians."""
    medians = table.assign(value=table.value.astype(str)).groupby(["initializer", "panel", "value"])
    medians = medians[["seconds", "gradients"]].median()
    found = []
    for name in dict.fromkeys(table.initializer):
        cells = [medians.loc[key] if (key := (name, *column)) in medians.index else None for column in COLUMNS]
        numbers = ["–" if cell is None else f"{cell.seconds:.2g} ({_short(cell.gradients)})" for cell in cells]
        found.append([INITIALIZERS[name].label, *numbers])
    return found


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 1 else f"{number:.1g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
