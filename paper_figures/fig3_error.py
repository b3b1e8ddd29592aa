"""Error of the approximate Hessian at initialization, layer by layer, over redraws: the slides' Figure 3.

``|gᵀ(H − G)g| / |g|²`` along each layer's gradient, and the same over ``|gᵀHg| / |g|²``, of the weights without biases.
LeNet-5 (tanh with Glorot uniform weights, ReLU with He normal, 100 images) and ResNet-8 (He normal, 32 images) on
FashionMNIST, in float64; EfficientNetB0 of ``keras.applications`` (its own initializers, ten classes, 8 images padded
to 32 × 32, float32; the first convolution, one of each of three stages, and the last two layers). The nets with batch
norm once with the batch's statistics, as in training, and once with the running ones, as in evaluation: before training
these are 0 and 1, so nothing is normalised.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
import numpy as np
import torch

from hessinit import curvature
from hessinit.experiments import data, models, plots

EFFICIENT = ("stem_conv", "block2a_expand_conv", "block4a_dwconv", "block6a_project_conv", "top_conv", "predictions")
ROUNDING = 1e-17  # below it errors are drawn at it
Net = Callable[[data.Dataset, int], tuple[Any, Any, bool | None, Sequence[str]]]


def _torch(make: Callable[[], torch.nn.Module], images: int, law: str, training: bool | None) -> Net:
    def net(loaded: data.Dataset, seed: int) -> tuple[Any, Any, bool | None, Sequence[str]]:
        model, generator = make(), torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                getattr(torch.nn.init, law)(parameter, generator=generator)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
        x = torch.from_numpy(loaded.x_train[:images]).double().reshape(-1, 1, 28, 28)
        weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
        return model.double(), (x, torch.from_numpy(loaded.y_train[:images])), training, weights

    return net


def _efficient_net(training: bool) -> Net:
    def net(loaded: data.Dataset, seed: int) -> tuple[Any, Any, bool | None, Sequence[str]]:
        import keras

        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        shape = (32, 32, 3)
        model = keras.applications.EfficientNetB0(
            weights=None, input_shape=shape, classes=10, classifier_activation=None
        )
        images = np.pad(loaded.x_train[:8].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
        x = np.repeat(255 * images[..., None], 3, axis=3)  # the model divides by 255
        return model, (x, loaded.y_train[:8]), training, [f"{layer}/kernel" for layer in EFFICIENT]

    return net


NETS: dict[str, Net] = {
    "LeNet-5, tanh": _torch(lambda: models.torch_lenet("tanh"), 100, "xavier_uniform_", None),
    "LeNet-5, ReLU": _torch(lambda: models.torch_lenet("relu"), 100, "kaiming_normal_", None),
    "ResNet-8, training": _torch(models.torch_resnet, 32, "kaiming_normal_", True),
    "ResNet-8, evaluation": _torch(models.torch_resnet, 32, "kaiming_normal_", False),
    "EfficientNetB0, training": _efficient_net(True),
    "EfficientNetB0, evaluation": _efficient_net(False),
}


def compute(
    nets: Sequence[str] = tuple(NETS), redraws: int = 100, dataset: str = "fashion_mnist"
) -> Iterator[dict[str, Any]]:
    """One row a layer, redraw and net."""
    loaded = data.load(dataset)
    for net in nets:
        for seed in range(redraws):
            model, batch, training, params = NETS[net](loaded, seed)
            errors = curvature.approximation_error(
                model, batch, "cross_entropy", block=False, training=training, params=params
            )
            for layer, error in errors.items():
                yield {"net": net, "layer": layer, "seed": seed, "gradient": error.gradient, "relative": error.relative}


def draw(table: Any) -> Any:
    """A row a net: histograms of the error along the gradient, as in the source, and of the relative one, by layer."""
    from matplotlib.ticker import LogLocator

    nets = list(dict.fromkeys(table.net))
    made, axes = plots.figure(len(nets), 2, 5.0, 2.6)
    for net, row in zip(nets, axes, strict=True):
        rows = table[table.net == net]
        layers = list(dict.fromkeys(rows.layer))
        for panel, column in zip(row, ("gradient", "relative"), strict=True):
            values = [rows[rows.layer == layer][column].clip(lower=ROUNDING) for layer in layers]
            boxes = panel.boxplot(
                values, orientation="horizontal", widths=0.65, patch_artist=True, whis=(5, 95), sym=""
            )
            for box, median in zip(boxes["boxes"], boxes["medians"], strict=True):
                box.set(facecolor="#56B4E9", edgecolor="#0072B2")
                median.set(color="#D55E00", linewidth=2)
            panel.set(xscale="log", yticklabels=layers, xlim=(ROUNDING, 1e6 if column == "gradient" else 1e3))
            panel.xaxis.set_major_locator(LogLocator(numticks=8))
            panel.invert_yaxis()
        row[0].set_title(net, loc="left", fontweight="bold", fontsize="medium")
        row[1].axvline(1, color="0.4", linestyle="--")
        row[1].set_yticklabels([])
    axes[-1, 0].set_xlabel("|gᵀ(H − G)g| / |g|²")
    axes[-1, 1].set_xlabel("the same over |gᵀHg| / |g|²")
    return made


if __name__ == "__main__":
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
