"""Does the budget help models that other libraries build? Train loss by learning rate under Adam.

Transformers with the norm after each sum, PyTorch's default, of four and eight blocks, and small models of Hugging
Face's transformers: language models of three blocks of width 64 on 5,120 texts of 32 characters, and classifiers on
5,120 FashionMNIST images (:mod:`hessinit.experiments.hugging_face`). One epoch in batches of 64, three seeds; the mean
loss of the batches of the last fifth. The rivals are the weights that the library itself gives a model, and He's and
Glorot's in every layer that multiplies by a matrix and in experts.

That embeddings beside a tied one take its scale was found on the GPT-2, the OPT and the BERT, that branches after which
a norm stands begin at a quarter and stay there on the BERT and on PyTorch's, that biases keep zeros from norms on the
ConvNeXt, that weights before norms share a factor on the RegNet; the others confirm it. That norms which a model writes
itself are seen was found wanting on the Llama, that experts in one tensor are, on the Mixtral, and that class tokens do
not begin at zero, on the BEiT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hessinit.experiments import data, models, plots, training
from hessinit.experiments.baselines import INITIALIZERS
from hessinit.experiments.statistics import against_best
from hessinit.experiments.study import Task, rows

INITIALIZERS_ASKED = ("torch_default", "he_normal", "glorot_uniform", "budget")
LRS = {"adam": (1e-4, 1e-3, 3e-3)}
SEEDS = (0, 1, 2)
SAMPLES = 5_120
DEVELOPMENT = (
    *("gpt2", "opt", "bert", "post_norm4", "post_norm8", "convnext", "regnet"),
    *("mobilenet_v1", "mobilenet_v2", "beit"),
)
HELD_OUT = (
    *("llama", "gemma", "falcon", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "poolformer"),
    *("convnextv2", "segformer", "pvt_v2", "swin", "focalnet", "mobilevit", "bit"),
    *("dinov2", "swinv2"),
)
RESULTS = ("last_fifth_loss", "test_accuracy", "init_seconds", "seconds", "status")


def compute(
    done: Iterable[Mapping[str, str]] = (),
    problems: tuple[str, ...] = (*DEVELOPMENT, *HELD_OUT),
    lrs: tuple[float, ...] = LRS["adam"],
    seeds: tuple[int, ...] = SEEDS,
    samples: int = SAMPLES,
    jobs: int = 2,
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    yield from rows(tasks(problems, lrs, seeds, samples), done, RESULTS, jobs)


def tasks(problems: tuple[str, ...], lrs: tuple[float, ...], seeds: tuple[int, ...], samples: int) -> Iterator[Task]:
    """Of every row, a seed of all problems at a time."""
    for seed in seeds:
        for problem in problems:
            few = data.load(models.PROBLEMS[problem].dataset).first(samples)
            activation = models.PROBLEMS[problem].activations[0]
            for lr in lrs:
                for initializer in INITIALIZERS_ASKED:
                    run = training.Run(problem, "torch", few.name, initializer, activation, "adam", lr, 1, 64, seed)
                    yield Task(run, few, first={"set": "development" if problem in DEVELOPMENT else "held out"})


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """As :func:`hessinit.experiments.statistics.against_best` has it, of the budget and the rivals."""
    return against_best(table, INITIALIZERS_ASKED[:-1])


def draw(table: pd.DataFrame) -> Any:
    """A panel a problem: loss against learning rate, a line an initializer."""
    problems = list(dict.fromkeys(table.problem))
    made, axes = plots.figure(-(-len(problems) // 4), 4, 3.6, 2.7)
    panels = axes.reshape(-1)
    for unused in panels[len(problems) :]:
        unused.set_axis_off()
    for panel, problem in zip(panels, problems, strict=False):
        own = table[table.problem == problem]
        for initializer, runs in own.groupby("initializer", sort=False):
            label, bold = INITIALIZERS[initializer].label, initializer == "budget"
            plots.losses_by_rate(panel, runs, plots.COLOURS[initializer], label, "Adam", bold=bold)
        panel.set_title(f"{models.PROBLEMS[problem].title} ({own.set.iloc[0]})", fontsize="medium")
    plots.legend_above(made, 4)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
