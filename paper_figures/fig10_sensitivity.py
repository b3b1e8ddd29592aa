"""Does the budget help, and does its c matter? Train loss by learning rate for six initializers and three c.

The defaults of ``hessinit.init_`` (c, the level's band, the bounds on scales) were chosen on the development problems:
plain nets, LeNet-5 and a ResNet with batch norm. The others confirm them, but for what was found elsewhere: that a
sharpness above its range is lowered by the level first, with a look at the MLP of 12 layers; units in pairs, with a
look at plain ReLU nets of 12 to 50, and none before the output layer, at all plain nets here; that weights of one
residual stream share a factor, on transformers and residual nets that are not here; that a step is tried again
shorter which takes the level far beyond where it should go, and biases for few inputs, on regressions and tables that
are not here either; and that SGD's level may be higher there, on such after a look at the regression here. The bounds
were chosen on the development problems and on tables and texts that are not here.

Every run: batches of 64, the images and epochs of ``STUDY``, ten seeds; the mean loss of the batches of the last fifth
of the last epoch. He, Glorot, orthogonal (torch's gain), torch's default and the closed form are the rivals; the budget
raises the step sharpness to c and lowers it to 2, with c = 0.7 under SGD and 0.18 under Adam, twice that in nets with
norms, and, five seeds, half and twice as much on the plain nets and LeNet-5; and once more without units in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hessinit.calibration import NO_GAIN, PROPORTIONAL, SHARPER, SIGN_LIKE
from hessinit.experiments import data, models, plots, training
from hessinit.experiments.baselines import INITIALIZERS
from hessinit.experiments.statistics import against_best
from hessinit.experiments.study import Task, rows

SEEDS = tuple(range(10))
FACTOR_SEEDS = SEEDS[:5]
RIVALS = ("torch_default", "he_normal", "glorot_uniform", "orthogonal_gain", "closed_form")
UNPAIRED = "budget_unpaired"
LRS = {"sgd": (0.01, 0.1, 0.3), "adam": (1e-4, 1e-3, 3e-3)}
C = {"sgd": PROPORTIONAL, "adam": SIGN_LIKE}
WITH_NORMS = ("charlm", "vit")
FACTORS = (0.5, 2.0)  # on c
FACTORS_ON = ("mlp", "mlp6", "lenet")
DEVELOPMENT, HELD_OUT = "development", "held out"
# set, problem, activation, train samples, epochs, learning rates of each optimizer, the smallest first
STUDY = (
    (DEVELOPMENT, "mlp", "relu", 25_600, 1, 3),
    (DEVELOPMENT, "mlp6", "relu", 25_600, 1, 3),
    (DEVELOPMENT, "lenet", "relu", 25_600, 1, 3),
    (DEVELOPMENT, "lenet", "tanh", 25_600, 1, 3),
    (DEVELOPMENT, "resnet_bn", "relu", 12_800, 1, 2),
    (HELD_OUT, "digits", "relu", 1_437, 20, 3),
    (HELD_OUT, "friedman", "relu", 4_000, 8, 3),
    (HELD_OUT, "friedman", "gelu", 4_000, 8, 3),
    (HELD_OUT, "friedman", "tanh", 4_000, 8, 3),
    (HELD_OUT, "mlp12", "relu", 25_600, 1, 3),
    (HELD_OUT, "mlp_wide", "gelu", 25_600, 1, 3),
    (HELD_OUT, "charlm", "gelu", 12_800, 1, 2),
    (HELD_OUT, "resnet", "relu", 12_800, 1, 2),
    (HELD_OUT, "vit", "gelu", 12_800, 1, 2),
)


RESULTS = ("last_fifth_loss", "test_accuracy", "init_seconds", "seconds", "status")


def compute(
    done: Iterable[Mapping[str, str]] = (), study: Any = STUDY, seeds: tuple[int, ...] = SEEDS, jobs: int = 2
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    yield from rows(tasks(study, seeds), done, RESULTS, jobs)


def tasks(study: Any, seeds: tuple[int, ...]) -> Iterator[Task]:
    """Of every row, with its set and c."""
    for group, problem, activation, samples, epochs, count in study:
        whole = data.load(models.PROBLEMS[problem].dataset)
        few = whole.first(samples)
        for optimizer, lrs in LRS.items():
            c = default(problem, optimizer)
            lines: list[tuple[str, float | None]] = [*((name, None) for name in RIVALS), ("budget", c), (UNPAIRED, c)]
            factors = [("budget", factor * c) for factor in FACTORS if problem in FACTORS_ON]
            for seed in seeds:
                for lr in lrs[:count]:
                    for initializer, asked in [*lines, *(factors if seed in FACTOR_SEEDS else [])]:
                        run = training.Run(
                            problem, "torch", few.name, initializer, activation, optimizer, lr, epochs, 64, seed
                        )
                        calibration = {} if asked is None else {"budget": (asked, NO_GAIN)}
                        last = {"c": float("nan") if asked is None else asked}
                        yield Task(run, few, calibration=calibration, first={"set": group}, last=last)


def default(problem: str, optimizer: str) -> float:
    """The budget's own c."""
    return round(C[optimizer] * (SHARPER if problem in WITH_NORMS else 1.0), 6)


def at_default(table: pd.DataFrame) -> pd.DataFrame:
    """Without the runs at other c."""
    own = [default(*names) for names in zip(table.problem, table.optimizer, strict=True)]
    return table[table.c.isna() | (table.c == own)]


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """By problem, optimizer and learning rate: the budget's mean loss, the best rival and its loss, their difference.

    ``errors`` is that difference in standard errors, over seeds paired between the two; above 2 the budget lost.
    """
    return against_best(at_default(table), RIVALS)


def draw(table: pd.DataFrame) -> Any:
    """A panel a problem and optimizer: loss against learning rate, a line an initializer, dashed for other c."""
    problems = list(dict.fromkeys(zip(table.set, table.problem, table.activation, strict=True)))
    made, axes = plots.figure(-(-len(problems) // 2), 4, 3.6, 2.7)
    panels = axes.reshape(-1, 2)  # two problems a row
    for unused in panels[len(problems) :].flat:
        unused.set_axis_off()
    for row, (group, problem, activation) in zip(panels, problems, strict=False):
        for panel, optimizer in zip(row, LRS, strict=True):
            own = table[(table.problem == problem) & (table.activation == activation) & (table.optimizer == optimizer)]
            for (initializer, c), runs in own.groupby(["initializer", "c"], dropna=False, sort=False):
                factor = c / default(problem, optimizer) if initializer == "budget" else 1.0
                style = "-." if initializer == UNPAIRED else {0.5: ":", 2.0: "--"}.get(round(factor, 3), "-")
                label = INITIALIZERS[initializer].label + (f", c × {factor:g}" if factor != 1.0 else "")
                bold = initializer == "budget" and style == "-"
                plots.losses_by_rate(panel, runs, plots.COLOURS[initializer], label, optimizer, style, bold)
            panel.set_title(f"{models.PROBLEMS[problem].title}, {activation} ({group})", fontsize="medium")
    plots.legend_above(made, 4)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
