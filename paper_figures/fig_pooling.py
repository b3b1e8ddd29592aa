"""How much larger should weights before a pooling be? Train loss by the factor on their variance.

Under the closed form, weights before an average of K positions have K times the variance, before a maximum as much as
without. Here every convolution that a 2 × 2 pooling follows has 1, 2, 4 or 8 times the variance it would have without.
The factor was chosen on LeNet-5; three convolutions of 3 × 3, where the mean over the whole map after the third is left
alone, tell whether it helps elsewhere. FashionMNIST, 12,800 images in batches of 64, one epoch, three seeds; the mean
loss of the last fifth of the steps.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hessinit
from hessinit.experiments import data, models, plots
from hessinit.experiments.training import as_text, one_thread

FACTORS = (1, 2, 4, 8)
POOLINGS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}
OURS = {"average": 4, "max": 1}
ACTIVATIONS = ("relu", "tanh")
STEPS = (("sgd", 0.1), ("adam", 1e-3))


def lenet(activation: str, pooling: str) -> nn.Sequential:
    """LeNet-5 with a pooling of this kind."""
    net = models.torch_lenet(activation)
    net.pool1, net.pool2 = POOLINGS[pooling](2), POOLINGS[pooling](2)
    return net


def three_convolutions(activation: str, pooling: str) -> nn.Sequential:
    """16, 32 and 64 channels; two poolings of this kind, then the mean over the map."""
    act, pool = models.layer_of(activation), POOLINGS[pooling]
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            act1=act(),
            pool1=pool(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            act2=act(),
            pool2=pool(2),
            conv3=nn.Conv2d(32, 64, 3, padding=1),
            act3=act(),
            mean=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(64, 10),
        )
    )


NETS = {"LeNet-5": lenet, "three convolutions": three_convolutions}
NAMES = ("net", "pooling", "activation", "optimizer", "lr", "factor", "seed")


def compute(
    done: Iterable[Mapping[str, str]] = (),
    factors: Sequence[int] = FACTORS,
    steps: Iterable[tuple[str, float]] = STEPS,
    seeds: Iterable[int] = (0, 1, 2),
    samples: int = 12_800,
    dataset: str = "fashion_mnist",
) -> Iterator[dict[str, Any]]:
    """A row a run."""
    made = {tuple(row[name] for name in NAMES) for row in done}
    few = data.load(dataset).first(samples)
    x, y = torch.from_numpy(few.x_train).reshape(-1, 1, 28, 28), torch.from_numpy(few.y_train)
    for net, pooling, activation, (optimizer, lr), factor, seed in itertools.product(
        NETS, POOLINGS, ACTIVATIONS, steps, factors, seeds
    ):
        key = dict(zip(NAMES, (net, pooling, activation, optimizer, lr, factor, seed), strict=True))
        if tuple(map(as_text, key.values())) not in made:
            model = scaled(NETS[net](activation, pooling), factor / OURS[pooling], seed)
            yield {**key, "loss": train(model, x, y, optimizer, lr, seed)}


def scaled(net: nn.Sequential, factor: float, seed: int) -> nn.Sequential:
    """The closed form, with so many times its variance in each convolution that a pooling follows."""
    hessinit.init_(net, seed=seed)
    with torch.no_grad():
        for name, _ in net.named_children():
            if name.startswith("pool"):
                net.get_parameter(f"{name.replace('pool', 'conv')}.weight").mul_(factor**0.5)
    return net


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: str, lr: float, seed: int) -> float:
    """Mean loss of the last fifth of one epoch."""
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    update, losses = kinds[optimizer](model.parameters(), lr), []
    with one_thread():
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(64):
            update.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            update.step()
            losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, len(losses) // 5) :]).mean())


def draw(table: pd.DataFrame) -> Any:
    """A column a net and pooling, a row an activation: loss against the factor, a line a step, mean and range."""
    columns = list(table[["net", "pooling"]].drop_duplicates().itertuples(index=False))
    activations = list(dict.fromkeys(table.activation))
    made, axes = plots.figure(len(activations), len(columns), 3.6, 3)
    for (row, activation), (column, (net, pooling)) in itertools.product(enumerate(activations), enumerate(columns)):
        panel = axes[row, column]
        own = table[(table.net == net) & (table.pooling == pooling) & (table.activation == activation)]
        for (optimizer, lr), runs in own.groupby(["optimizer", "lr"], sort=False):
            losses = runs.groupby("factor").loss
            colour = "#0072B2" if optimizer == "sgd" else "#D55E00"
            panel.plot(losses.mean().index, losses.mean(), "o-", color=colour, label=f"{optimizer} {lr:g}")
            panel.fill_between(losses.mean().index, losses.min(), losses.max(), color=colour, alpha=0.2)
        panel.axvline(OURS[pooling], color="0.7", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", title=f"{net}, {pooling}, {activation}", xlabel="variance over that without pooling")
        factors = sorted(set(own.factor))
        panel.set_xticks(factors, [str(factor) for factor in factors])
        panel.minorticks_off()
        if column == 0:
            panel.set_ylabel("train loss")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
