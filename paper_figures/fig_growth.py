"""How time and memory grow with parameters, classes, layers and samples, and the exponent of each.

Plain ReLU nets with random inputs and labels in float32 on one thread, one thing growing at a time: 784-w-w-w-w-10 from
10,000 to 100 million parameters, so that the largest layer's share of them, which a derivative needs more than once,
does not grow too, and 784-128-C with up to 50,000 classes, both with 64 samples, 784-256-…-256-10 with up to 200 layers
and 512 samples, so that arithmetic takes the time and not memory, in whose caches few layers fit and many do not, and
784-512-512-10 with up to 8,192 samples. Each operation runs under torch's profiler first, then three times, or once if
it took over ten seconds. The exponent is the slope of a straight line through log time, or log memory, over the upper
half of the sizes, as below it the time is Python's. Memory is the peak of what torch's allocator hands out, as in
fig_cost; resident is the largest resident size of a process of its own that does all operations on one net.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from cost import CrossEntropy, layers, peak_memory

from hessinit import curvature, init_
from hessinit.experiments import plots
from hessinit.experiments.models import torch_mlp

SIZES: dict[str, tuple[int, ...]] = {
    "parameters": (12, 40, 100, 300, 700, 1500, 3000, 5700),  # widths, see size
    "classes": (10, 100, 1000, 10_000, 50_000),
    "layers": (10, 20, 50, 100, 200),
    "samples": (32, 128, 512, 2048, 8192),
}
SLOW = 10.0  # seconds
COLOURS = {
    "gradient": plots.COLOURS["torch_default"],
    "quadratic form": plots.COLOURS["he_normal"],
    "product": plots.COLOURS["closed_form"],
    "exact product": plots.COLOURS["glorot_normal"],
    "layers' traces": plots.COLOURS["orthogonal"],
    "closed form": plots.COLOURS["lsuv"],
    "closed form, normal": plots.COLOURS["slides"],
    "budget": plots.COLOURS["budget"],
}


def net(panel: str, value: int) -> tuple[tuple[int, ...], int]:
    """Widths of a net, and the samples it is given."""
    if panel == "parameters":
        return (784, *(value,) * 4, 10), 64
    if panel == "classes":
        return (784, 128, value), 64
    if panel == "layers":
        return (784, *(256,) * (value - 1), 10), 512
    return (784, 512, 512, 10), value


def works(widths: tuple[int, ...], samples: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The operations, by name."""
    torch.manual_seed(0)
    model = torch_mlp(widths, "relu")
    init_(model, distribution="normal", seed=0)  # torch's own leaves no signal after many layers
    x, y = torch.randn(samples, widths[0]), torch.randint(widths[-1], (samples,))
    criterion, parameters = CrossEntropy(), list(model.parameters())
    yield "gradient", lambda: torch.autograd.grad(criterion(model(x), y), parameters)

    approximate = curvature.hessian(model, (x, y), "cross_entropy")
    exact = curvature.hessian(model, (x, y), "cross_entropy", exact=True)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    groups = layers(model)
    yield "quadratic form", lambda: approximate.quadratic_form(v)
    yield "product", lambda: approximate @ v
    yield "exact product", lambda: exact @ v
    yield "layers' traces", lambda: approximate.traces(1, groups=groups)

    fresh = copy.deepcopy(model)
    yield "closed form", lambda: init_(fresh, seed=0)
    yield "closed form, normal", lambda: init_(fresh, distribution="normal", seed=0)
    yield "budget", lambda: init_(fresh, (x, y), "cross_entropy", lr=0.1, num_samples=samples, seed=0, progress=False)


def measure(panel: str, value: int, operations: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one net."""
    torch.set_num_threads(1)
    widths, samples = net(panel, value)
    size = sum(n * m + m for n, m in itertools.pairwise(widths)) if panel == "parameters" else value
    rows = []
    for operation, run in works(widths, samples):
        if operations is not None and operation not in operations:
            continue
        start = perf_counter()
        peak = peak_memory(run)
        repetitions, times = 3 if perf_counter() - start < SLOW else 1, []
        for _ in range(repetitions):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        rows += [
            {"operation": operation, "peak_mib": peak, "repetition": k, "seconds": seconds}
            for k, seconds in enumerate(times)
        ]
    unit = 2**10 if sys.platform == "linux" else 2**20  # of what the system counts in, in a MiB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    setting = {"panel": panel, "size": size, "widths": "-".join(map(str, widths)) if len(widths) < 9 else ""}
    return [{**setting, "resident_mib": resident, "torch": torch.__version__, **row} for row in rows]


def compute(
    sizes: Mapping[str, Iterable[int]] = SIZES, operations: Iterable[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A row an operation, size and repetition."""
    for panel, value in ((panel, value) for panel, values in sizes.items() for value in values):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield from pool.apply(measure, (panel, value, operations))


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Of time and memory, by panel and operation: slopes over the upper half of the sizes."""
    found = []
    for (panel, operation), rows in table.groupby(["panel", "operation"], sort=False):
        medians = rows.groupby("size")[["seconds", "peak_mib"]].median()
        upper = medians.iloc[(len(medians) - 1) // 2 :]
        log = np.log(upper.index.to_numpy(float))
        slopes = (
            [np.polyfit(log, np.log(np.maximum(upper[of], 1e-9)), 1)[0] for of in upper] if len(upper) > 1 else [0, 0]
        )
        found.append((panel, operation, *slopes))
    return pd.DataFrame(found, columns=["panel", "operation", "time", "memory"]).set_index(["panel", "operation"])


def draw(table: pd.DataFrame) -> Any:
    """A column a panel: seconds above, memory below."""
    panels, slopes = list(dict.fromkeys(table.panel)), exponents(table)
    made, axes = plots.figure(2, len(panels), 3.8, 3.4)
    for column, panel in zip(np.reshape(axes, (2, -1)).T, panels, strict=True):
        own = table[table.panel == panel]
        for axis, of, label in zip(column, ("seconds", "peak_mib"), ("seconds", "peak memory, MiB"), strict=True):
            for operation, rows in own.groupby("operation", sort=False):
                medians = rows.groupby("size")[of].median()
                if of == "seconds" or medians.min() > 0:
                    axis.plot(medians.index, medians, "o-", color=COLOURS[operation], label=operation, markersize=3)
            axis.set(xscale="log", yscale="log", xlabel=panel, ylabel=label)
        steepest = slopes.loc[panel].time.max()
        column[0].set_title(f"exponents up to {steepest:.2f}", fontsize="medium")
    plots.legend_above(made, 4)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
