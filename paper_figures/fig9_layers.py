"""Layer curvature before and after the budget: where the curvature that a step can afford goes.

The trace of each layer's diagonal block of the approximate Hessian, measured anew by ``curvature.layer_traces`` on a
batch that the calibration did not see, and the scale that the layer was given; He's weights beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import hessinit
from hessinit import curvature
from hessinit.experiments import data, models, plots
from hessinit.experiments.training import tensors, torch_net

NETS = (("mlp", "relu"), ("mlp12", "tanh"), ("lenet", "relu"), ("resnet_bn", "relu"), ("vit", "gelu"))
STEPS = (("sgd", 0.01), ("sgd", 0.3), ("adam", 1e-4), ("adam", 3e-3))
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
SEEDS = (0, 1, 2)


def compute(
    nets: Iterable[tuple[str, str]] = NETS,
    steps: Iterable[tuple[str, float]] = STEPS,
    seeds: Iterable[int] = SEEDS,
    samples: int = 256,
    dataset: str = "fashion_mnist",
) -> Iterator[dict[str, Any]]:
    """A row a weight, net, seed and step, and one for He's weights and the closed form, which know no step."""
    loaded = data.load(dataset)
    seen, batch = (
        tensors(loaded.x_train[part], loaded.y_train[part]) for part in (slice(0, 5000), slice(-samples, None))
    )
    for problem, activation in nets:
        for seed in seeds:
            for name in ("he_normal", "closed_form"):
                net = torch_net(problem, loaded, name, activation, seed)
                yield from _rows(net, batch, {}, problem, activation, name, "", 0.0, seed)
            for kind, lr in steps:
                net = torch_net(problem, loaded, "budget", activation, seed)
                optimizer = OPTIMIZERS[kind](net.parameters(), lr=lr)
                _, report = hessinit.init_(
                    net, seen, "cross_entropy", optimizer=optimizer, seed=seed, progress=False, return_report=True
                )
                yield from _rows(net, batch, report.calibration.scales, problem, activation, "budget", kind, lr, seed)


def _rows(net: Any, batch: Any, scales: Any, *names: Any) -> Iterator[dict[str, Any]]:
    weights = [name for name, p in net.named_parameters() if p.ndim > 1 and name.endswith("weight")]
    traces = curvature.layer_traces(net, batch, "cross_entropy", params=weights, num_probes=10)
    columns = ("problem", "activation", "initializer", "optimizer", "lr", "seed")
    for place, (layer, trace) in enumerate(traces.items()):
        scale = next((value for name, value in scales.items() if name.rpartition(".")[0] == layer), 1.0)
        yield {**dict(zip(columns, names, strict=True)), "place": place, "layer": layer, "scale": scale, "trace": trace}


def draw(table: pd.DataFrame) -> Any:
    """A panel a net: geometric means over seeds by layer, a line a step."""
    nets = list(dict.fromkeys(zip(table.problem, table.activation, strict=True)))
    columns = min(3, len(nets))
    made, axes = plots.figure(-(-len(nets) // columns), columns, 4.2, 3.2)
    kinds = table[["initializer", "optimizer", "lr"]].drop_duplicates().fillna("")
    for unused in axes.flat[len(nets) :]:
        unused.set_axis_off()
    for panel, (problem, activation) in zip(axes.flat, nets, strict=False):
        own = table[(table.problem == problem) & (table.activation == activation)].fillna({"optimizer": ""})
        for kind in kinds.itertuples():
            line = own[(own.initializer == kind.initializer) & (own.optimizer == kind.optimizer) & (own.lr == kind.lr)]
            means = line.groupby("place").trace.agg(lambda v: v.clip(lower=1e-12).prod() ** (1 / len(v)))
            sgd = kind.optimizer == "sgd"
            colour = plots.COLOURS[kind.initializer] if not kind.optimizer else "#000000" if sgd else "#56B4E9"
            style = "-" if not kind.optimizer or kind.lr in (0.3, 3e-3) else "--"
            label = f"budget, {kind.optimizer} {kind.lr:g}" if kind.optimizer else kind.initializer.replace("_", " ")
            panel.plot(means.index + 1, means, style, marker="o", markersize=3, color=colour, label=label)
        panel.set(yscale="log", xlabel="layer", ylabel="layer curvature")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(f"{models.PROBLEMS[problem].title}, {activation}", fontsize="medium")
    plots.legend_above(made, 3)
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
