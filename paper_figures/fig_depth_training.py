"""Which gain for a deep net? Train loss after 600 steps for five rules, by activation, depth, inputs and optimizer.

Plain nets on FashionMNIST, orthogonal draws for every rule, so that only the scale differs:

* one layer: g of one layer, whatever the depth;
* depth: ``gain(activation, depth=L)``, what ``hessinit.init_(model)`` uses;
* depth, half: the same recursion started from q_1 = 1/2 instead of 1;
* depth + inputs: what ``hessinit.init_(model, batch)`` uses, the first layer scaled to the inputs;
* He, Glorot: their scales.

The rule was chosen on width 128 at depths 3, 6, 20, 50 and confirmed on nets that taper from 256 to 32, at depths 4, 10
and 30, with other learning rates and seeds ("held out" in the table).

All nets of one activation and depth that share an optimizer train at once, as one stack of matrices, on the same
batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hessinit import rules
from hessinit.draw import draw as draw_weights
from hessinit.draw import stream
from hessinit.experiments import data, plots
from hessinit.layout import Layout

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}
RULES = ("one layer", "depth", "depth, half", "depth + inputs", "He", "Glorot")
COLOURS = dict(zip(RULES, ("#56B4E9", "#D55E00", "#E69F00", "#000000", "#0072B2", "#009E73"), strict=True))
# set, inputs, depths, optimizer, learning rates, seeds
STUDY = (
    ("chosen on", "raw", (3, 6, 20, 50), "sgd", (0.01, 0.1), (0, 1, 2)),
    ("chosen on", "standardised", (3, 6, 20, 50), "sgd", (0.01, 0.1), (0, 1, 2)),
    ("chosen on", "raw", (3, 6, 20, 50), "adam", (1e-3,), (0, 1, 2)),
    ("held out", "raw", (4, 10, 30), "sgd", (0.03,), (10, 11, 12)),
    ("held out", "standardised", (4, 10, 30), "sgd", (0.03,), (10, 11, 12)),
)


def widths_of(group: str, depth: int) -> list[int]:
    """Of all layers: hidden ones 128 wide, or tapering from 256 to 32 in the held-out nets."""
    hidden = [128] * (depth - 1) if group == "chosen on" else np.geomspace(256, 32, depth - 1).round().astype(int)
    return [784, *map(int, hidden), 10]


def stds(rule: str, activation: str, widths: Sequence[int], second_moment: float) -> list[float]:
    """Standard deviation of each layer under a rule."""
    pairs, depth = list(itertools.pairwise(widths)), len(widths) - 1
    if rule == "He":
        return [(2 / n) ** 0.5 for n, _ in pairs]
    if rule == "Glorot":
        return [(2 / (n + m)) ** 0.5 for n, m in pairs]
    if rule == "depth, half":
        gain = gain_from(activation, depth, 0.5)
    else:
        gain = rules.gain(activation, depth=None if rule == "one layer" else depth)
    values = [rules.curvature_neutral_std(n, m, gain) for n, m in pairs]
    if rule == "depth + inputs":
        values[0] = rules.input_layer_std(widths[0], second_moment)
    return values


def gain_from(activation: str, depth: int, first_variance: float) -> float:
    """The depth-aware gain of a recursion that starts elsewhere: that of the activation rescaled, u = √q v."""
    root = first_variance**0.5
    function = rules.activation(activation)
    return rules.gain(lambda v: function(root * v) / root, depth=depth)


def train(
    x: torch.Tensor,
    y: torch.Tensor,
    activation: str,
    widths: Sequence[int],
    nets: Sequence[tuple[Sequence[float], float, int]],
    optimizer: str,
    steps: int,
    batch_size: int = 64,
) -> list[float]:
    """Mean loss of the last fifth of the steps, of every net (stds, learning rate, seed); NaN where it diverged."""
    count, act = len(nets), ACTIVATIONS[activation]
    parameters, rates = [], []
    lr = torch.tensor([lr for _, lr, _ in nets])
    for k, (n, m) in enumerate(itertools.pairwise(widths)):
        weights = [draw_weights((n, m), Layout("io"), s[k], "orthogonal", stream(seed, k)) for s, _, seed in nets]
        stacked = torch.from_numpy(np.stack(weights))  # (nets, n, m)
        if k == 0:  # inputs are shared, so the first layers of all nets are one matrix (n, nets * m)
            stacked = stacked.permute(1, 0, 2).reshape(n, count * m)
        parameters += [stacked.requires_grad_(), torch.zeros(count, 1, m, requires_grad=True)]
        rates += [lr.repeat_interleave(m) if k == 0 else lr[:, None, None], lr[:, None, None]]
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters] if optimizer == "adam" else []
    order = torch.Generator().manual_seed(7)
    batches: Iterator[torch.Tensor] = iter(())
    losses = []
    for step in range(1, steps + 1):
        batch = next(batches, None)
        if batch is None or len(batch) < batch_size:
            batches = iter(torch.randperm(len(x), generator=order).split(batch_size))
            batch = next(batches)
        h = (x[batch] @ parameters[0]).view(batch_size, count, widths[1]).transpose(0, 1) + parameters[1]
        for weight, bias in zip(parameters[2::2], parameters[3::2], strict=True):
            h = torch.baddbmm(bias, act(h), weight)
        loss = F.cross_entropy(h.reshape(count * batch_size, -1), y[batch].repeat(count), reduction="none")
        per_net = loss.view(count, batch_size).mean(1)
        losses.append(per_net.detach())
        gradients = torch.autograd.grad(per_net.sum(), parameters)
        with torch.no_grad():
            for j, (p, g, rate) in enumerate(zip(parameters, gradients, rates, strict=True)):
                if optimizer == "adam":
                    first, second = state[j]
                    first.lerp_(g, 0.1)
                    second.lerp_(g * g, 0.001)
                    g = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                p.sub_(rate * g)
    return torch.stack(losses[-(steps // 5) :]).mean(0).tolist()


def compute(study: Sequence[Any] = STUDY, steps: int = 600, dataset: str = "fashion_mnist") -> Iterator[dict[str, Any]]:
    """One row a net."""
    loaded = data.load(dataset)
    y = torch.from_numpy(loaded.y_train)
    for group, inputs, depths, optimizer, lrs, seeds in study:
        x = torch.from_numpy(loaded.x_train)
        x = x / x.square().mean().sqrt() if inputs == "standardised" else x
        second_moment = float(x.double().square().mean())
        for depth, activation in itertools.product(depths, ACTIVATIONS):
            widths = widths_of(group, depth)
            keys = list(itertools.product(RULES, lrs, seeds))
            nets = [(stds(rule, activation, widths, second_moment), lr, seed) for rule, lr, seed in keys]
            results = train(x, y, activation, widths, nets, optimizer, steps)
            for (rule, lr, seed), loss in zip(keys, results, strict=True):
                yield {
                    "set": group,
                    "inputs": inputs,
                    "activation": activation,
                    "depth": depth,
                    "optimizer": optimizer,
                    "lr": lr,
                    "rule": rule,
                    "seed": seed,
                    "loss": loss,
                }


def draw(table: Any) -> Any:
    """A panel for each activation (column) and setting (row): loss against depth, a line a rule, mean and range."""
    settings = table[["set", "inputs", "optimizer", "lr"]].drop_duplicates().values.tolist()
    made, axes = plots.figure(len(settings), len(ACTIVATIONS), 3.4, 2.7)
    for (row, setting), (column, activation) in itertools.product(enumerate(settings), enumerate(ACTIVATIONS)):
        here = axes[row, column]
        group, inputs, optimizer, lr = setting
        chosen = table[
            (table["set"] == group)
            & (table.inputs == inputs)
            & (table.optimizer == optimizer)
            & (table.lr == lr)
            & (table.activation == activation)
        ]
        for rule in RULES:
            losses = chosen[chosen.rule == rule].fillna(np.inf).groupby("depth").loss
            mean = losses.mean().clip(upper=2.6)  # chance is ln 10 = 2.30; diverged nets stand on the top edge
            here.plot(mean.index, mean, "o-", color=COLOURS[rule], label=rule, markersize=4)
            here.fill_between(
                mean.index, losses.min().clip(upper=2.6), losses.max().clip(upper=2.6), color=COLOURS[rule], alpha=0.15
            )
        here.set(xscale="log", ylim=(0.35, 2.65), xlabel="layers", title=f"{activation}, {inputs}, {optimizer} {lr:g}")
        depths = sorted(chosen.depth.unique())
        here.set_xticks(depths, [str(d) for d in depths])
        here.minorticks_off()
    for row, setting in enumerate(settings):
        axes[row, 0].set_ylabel(f"train loss ({setting[0]})")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
