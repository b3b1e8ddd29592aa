"""The initializers under comparison, each by the framework's own implementation where it has one.

A PyTorch initializer is a function of a model as its constructor left it, the activation's name and a generator; a
Keras one gives the kernel initializer of layer k. The rules of others are for linear and convolutional layers: what
else a model has keeps what its constructor drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

TorchInit = Callable[["nn.Module", str, "torch.Generator"], None]
KerasInit = Callable[[int, str, int, int], Any]


@dataclass(frozen=True)
class Initializer:
    """One row of the comparison.

    Args:
        label: for tables and figures.
        source: where it is from.
        torch: initialises a PyTorch model in place; None where the framework has no such thing.
        keras: kernel initializer of a Keras layer from (layer index k, activation, depth, seed); None likewise.
        fits_step: whether :func:`hessinit.init_` then fits the model to its loss and optimizer.
        options: keywords of it.
    """

    label: str
    source: str
    torch: TorchInit | None
    keras: KerasInit | None
    fits_step: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The linear and convolutional layers and the packed projections of attention, in order."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    return (m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd, nn.MultiheadAttention)))


def _each_layer(fill: Callable[[torch.Tensor, int, str, torch.Generator], object]) -> TorchInit:
    """Weights by ``fill(weight, k, activation, generator)``, biases zero."""

    def initialise(model: nn.Module, activation: str, generator: torch.Generator) -> None:
        from torch import nn

        for k, layer in enumerate(layers_of(model)):
            for parameter in layer.parameters(recurse=False):
                if parameter.ndim > 1:
                    fill(parameter, k, activation, generator)
                else:
                    nn.init.zeros_(parameter)

    return initialise


def _torch_default(model: nn.Module, activation: str, generator: torch.Generator) -> None:
    """Leaves what the constructor drew."""


def _closed_form(model: nn.Module, activation: str, generator: torch.Generator) -> None:
    import hessinit

    hessinit.init_(model, generator=generator)


def _torch_init(name: str, **keywords: Any) -> TorchInit:
    def fill(weight: torch.Tensor, k: int, activation: str, generator: torch.Generator) -> None:
        from torch import nn

        getattr(nn.init, name)(weight, generator=generator, **keywords)

    return _each_layer(fill)


def _lecun(weight: torch.Tensor, k: int, activation: str, generator: torch.Generator) -> None:
    from torch import nn

    nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)


def _slides(weight: torch.Tensor, k: int, activation: str, generator: torch.Generator) -> None:
    from torch import nn

    if k == 0:
        nn.init.xavier_uniform_(weight, generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=0.3, a=-0.6, b=0.6, generator=generator)


def _orthogonal_gain(weight: torch.Tensor, k: int, activation: str, generator: torch.Generator) -> None:
    from torch import nn

    gain = nn.init.calculate_gain("tanh" if activation == "tanh" else "relu")
    nn.init.orthogonal_(weight, gain, generator=generator)


def _keras_init(name: str, **keywords: Any) -> KerasInit:
    def make(k: int, activation: str, depth: int, seed: int) -> Any:
        import keras

        return getattr(keras.initializers, name)(seed=seed + k, **keywords)

    return make


def _keras_slides(k: int, activation: str, depth: int, seed: int) -> Any:
    import keras

    if k == 0:
        return keras.initializers.GlorotUniform(seed=seed)
    return keras.initializers.TruncatedNormal(stddev=0.3, seed=seed + k)


def _keras_orthogonal_gain(k: int, activation: str, depth: int, seed: int) -> Any:
    import keras

    return keras.initializers.Orthogonal(gain=5 / 3 if activation == "tanh" else 2**0.5, seed=seed + k)


def _keras_closed_form(k: int, activation: str, depth: int, seed: int) -> Any:
    from hessinit.keras import HessianOrthogonal

    return HessianOrthogonal(activation, depth=depth, seed=seed + k)


HE = "He et al., ICCV 2015"
GLOROT = "Glorot & Bengio, AISTATS 2010"
SAXE = "Saxe, McClelland, Ganguli, ICLR 2014"

INITIALIZERS: dict[str, Initializer] = {
    "torch_default": Initializer("torch default", "nn.Linear", _torch_default, None),
    "keras_default": Initializer(
        "Keras default", "Dense", _torch_init("xavier_uniform_"), _keras_init("GlorotUniform")
    ),
    "he_normal": Initializer(
        "He normal", HE, _torch_init("kaiming_normal_", nonlinearity="relu"), _keras_init("HeNormal")
    ),
    "he_uniform": Initializer(
        "He uniform", HE, _torch_init("kaiming_uniform_", nonlinearity="relu"), _keras_init("HeUniform")
    ),
    "glorot_normal": Initializer("Glorot normal", GLOROT, _torch_init("xavier_normal_"), _keras_init("GlorotNormal")),
    "glorot_uniform": Initializer(
        "Glorot uniform", GLOROT, _torch_init("xavier_uniform_"), _keras_init("GlorotUniform")
    ),
    "lecun_normal": Initializer("LeCun normal", "LeCun et al., 1998", _each_layer(_lecun), _keras_init("LecunNormal")),
    "orthogonal": Initializer("orthogonal", SAXE, _torch_init("orthogonal_"), _keras_init("Orthogonal")),
    "orthogonal_gain": Initializer(
        "orthogonal, torch's gain", SAXE, _each_layer(_orthogonal_gain), _keras_orthogonal_gain
    ),
    "slides": Initializer("slides' 0.3", "Skorski, 2021", _each_layer(_slides), _keras_slides),
    "closed_form": Initializer("closed form", "this package", _closed_form, _keras_closed_form),
    "budget": Initializer("budget", "this package", _closed_form, _keras_closed_form, fits_step=True),
    "budget_unpaired": Initializer(
        "budget, no pairs",
        "this package",
        _closed_form,
        _keras_closed_form,
        fits_step=True,
        options={"mirrored": False},
    ),
}

# The five rows of the slides' Figure 4 (the last one truly ReLU), torch's default, the closed form and the budget.
DEFAULT_ROWS = (
    ("slides", "relu"),
    ("he_normal", "relu"),
    ("glorot_uniform", "tanh"),
    ("orthogonal", "tanh"),
    ("orthogonal", "relu"),
    ("torch_default", "relu"),
    ("closed_form", "relu"),
    ("closed_form", "tanh"),
    ("budget", "relu"),
    ("budget", "tanh"),
)
