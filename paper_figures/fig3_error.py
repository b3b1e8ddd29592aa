"""Error of the approximate Hessian at initialization, layer by layer, over redraws: the slides' Figure 3.

Along the gradient g of each layer's weights, without biases: ``|gᵀ(H − G)g| / |g|²`` as in the slides, the same over
``|gᵀHg| / |g|²``, and the exact ``gᵀHg / |g|²`` with its sign. Over 100 redraws of

* LeNet-5 with tanh (Glorot uniform) and with ReLU (He normal), 100 images of FashionMNIST;
* ResNet-8 (He normal), 32 images;
* EfficientNetB0 of ``keras.applications`` (its own initializers, ten classes), 8 images padded to 32 × 32; the first
  convolution, one kernel of each of three stages, the last convolution and the last layer.

The nets with batch norm once with the batch's statistics, as in training, and once with the running ones, as in
evaluation: before training these are 0 and 1, so nothing is normalised. PyTorch's in float64, Keras's in float32: a
relative error below 1e-6 is rounding.
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
FLOOR = 1e-8  # smaller errors are drawn here
FILL, MEDIAN = plots.COLOURS["lecun_normal"], plots.COLOURS["closed_form"]
Net = Callable[[data.Dataset, int], tuple[Any, Any, list[str]]]


def _torch(make: Callable[[], torch.nn.Module], images: int, law: Callable[..., Any]) -> Net:
    def net(loaded: data.Dataset, seed: int) -> tuple[Any, Any, list[str]]:
        model, generator = make(), torch.Generator().manual_seed(seed)
        weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
        for name, parameter in model.named_parameters():
            if name in weights:
                law(parameter, generator=generator)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
        x = torch.from_numpy(loaded.x_train[:images]).double().reshape(-1, 1, 28, 28)
        return model.double(), (x, torch.from_numpy(loaded.y_train[:images])), weights

    return net


def _efficient_net(loaded: data.Dataset, seed: int) -> tuple[Any, Any, list[str]]:
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = keras.applications.EfficientNetB0(
        weights=None, input_shape=(32, 32, 3), classes=10, classifier_activation=None
    )
    images = np.pad(loaded.x_train[:8].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    x = np.repeat(255 * images[..., None], 3, axis=3)  # the model divides by 255
    return model, (x, loaded.y_train[:8]), [f"{layer}/kernel" for layer in EFFICIENT]


_resnet = _torch(models.torch_resnet, 32, torch.nn.init.kaiming_normal_)
NETS: dict[str, tuple[Net, bool | None]] = {  # and whether batch norm is in training
    "LeNet-5, tanh": (_torch(lambda: models.torch_lenet("tanh"), 100, torch.nn.init.xavier_uniform_), None),
    "LeNet-5, ReLU": (_torch(lambda: models.torch_lenet("relu"), 100, torch.nn.init.kaiming_normal_), None),
    "ResNet-8, training": (_resnet, True),
    "ResNet-8, evaluation": (_resnet, False),
    "EfficientNetB0, training": (_efficient_net, True),
    "EfficientNetB0, evaluation": (_efficient_net, False),
}


def compute(
    nets: Sequence[str] = tuple(NETS), redraws: int = 100, dataset: str = "fashion_mnist"
) -> Iterator[dict[str, Any]]:
    """One row a layer, redraw and net."""
    loaded = data.load(dataset)
    for net in nets:
        make, training = NETS[net]
        for seed in range(redraws):
            model, batch, weights = make(loaded, seed)
            errors = curvature.approximation_error(
                model, batch, "cross_entropy", block=False, training=training, params=weights
            )
            for layer, error in errors.items():
                yield {
                    "net": net,
                    "layer": layer,
                    "seed": seed,
                    "gradient": error.gradient,
                    "relative": error.relative,
                    "exact": error.exact,
                }


def draw(table: Any) -> Any:
    """A row a net: a histogram a layer of the error along the gradient, as in the source, and of the relative one."""
    nets = dict(list(table.groupby("net", sort=False)))
    counts = [rows.layer.nunique() for rows in nets.values()]
    made, axes = plots.figure(len(nets), 2, 4.3, 0.26 * np.mean(counts) + 0.55)
    axes[0, 0].get_gridspec().set_height_ratios([count + 1 for count in counts])
    for (net, rows), (along, relative) in zip(nets.items(), axes, strict=True):
        positive = rows.gradient[rows.gradient > 0]
        _histograms(along, rows, "gradient", positive.min(), positive.max())
        _histograms(relative, rows, "relative", FLOOR, table.relative.max())
        along.set_title(net, loc="left", fontweight="bold")
        relative.tick_params(labelleft=False)
        relative.axvline(1, color="0.3", linestyle="--", linewidth=1)
        for height, (_, own) in enumerate(rows.groupby("layer", sort=False)):
            share = (own.exact < 0).mean()
            text = f"{share:.0%}" if share else ""
            relative.text(1.01, height + 0.35, text, transform=relative.get_yaxis_transform(), va="center", fontsize=9)
    axes[0, 1].set_title("at the right: share of redraws with gᵀHg < 0", loc="right", fontsize=9)
    axes[-1, 0].set_xlabel("|gᵀ(H − G)g| / |g|²")
    axes[-1, 1].set_xlabel("|gᵀ(H − G)g| / |gᵀHg|, at least 10⁻⁸")
    return made


def _histograms(panel: Any, rows: Any, column: str, low: float, high: float) -> None:
    """A histogram a layer, the first on top, of values from low (and less) to high; a line at the median."""
    edges = np.logspace(np.floor(np.log10(low)), np.ceil(np.log10(high)), 60)
    layers = list(dict.fromkeys(rows.layer))
    for base, layer in enumerate(layers):
        values = rows[rows.layer == layer][column].clip(edges[0], edges[-1])
        counts = np.histogram(values, edges)[0]
        panel.stairs(base + 0.8 - 0.85 * counts / counts.max(), edges, baseline=base + 0.8, fill=True, color=FILL)
        panel.plot([values.median()] * 2, [base, base + 0.8], color=MEDIAN, linewidth=2)
    panel.set(xscale="log", xlim=(edges[0], edges[-1]), ylim=(len(layers), -0.2))
    panel.set_yticks([base + 0.5 for base in range(len(layers))], layers)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
