"""The initializers under comparison, each by the framework's own implementation where it has one.

A PyTorch initializer is a function of a model as its constructor left it, the activation's name and a generator; a
Keras one gives the kernel initializer of layer k. The rules of others are for linear and convolutional layers and
experts: what else a model has keeps what its constructor drew. Some methods then fit the model to data, loss or
optimizer: those of others are in :mod:`hessinit.experiments.rivals` and :mod:`hessinit.experiments.learned`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

TorchInit = Callable[["nn.Module", str, "torch.Generator"], None]
KerasInit = Callable[[int, str, int, int], Any]

SAMPLES = 256  # of the batch by which the methods of others measure a model


@dataclass(frozen=True)
class Fit:
    """What a method may use that fits a model before it is trained.

    Args:
        x: inputs of the train set.
        y: targets of the train set.
        loss: its name; None for that of a compiled Keras model.
        criterion: mean loss of outputs and targets, in PyTorch.
        optimizer: that will train the model; None for that of a compiled Keras model.
        optimizer_name: sgd, momentum, adam or adamw.
        lr: its learning rate.
        seed: decides everything random.
        options: keywords of the method.
    """

    x: Any
    y: Any
    loss: str | None
    criterion: Callable[[Any, Any], Any] | None
    optimizer: Any
    optimizer_name: str
    lr: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generator(self) -> torch.Generator:
        """A new one, from the seed."""
        import torch

        return torch.Generator().manual_seed(self.seed)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples drawn from the train set."""
        import torch

        rows = torch.randperm(len(self.x), generator=self.generator)[:SAMPLES]
        return self.x[rows], self.y[rows]


@dataclass(frozen=True)
class Initializer:
    """One row of the comparison.

    Args:
        label: for tables and figures.
        source: where it is from.
        torch: initialises a PyTorch model in place; None where the framework has no such thing.
        keras: kernel initializer of a Keras layer from (layer index k, activation, depth, seed); None likewise.
        fit: then fits the model, in place; None for nothing of the kind.
        options: keywords of the fit.
        warmup: share of the steps over which the learning rate rises linearly to its value.
    """

    label: str
    source: str
    torch: TorchInit | None
    keras: KerasInit | None
    fit: Callable[[Any, Fit], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0


def _each_layer(fill: Callable[[torch.Tensor, int, str, torch.Generator], object]) -> TorchInit:
    """Weights by ``fill(weight, k, activation, generator)``, biases zero."""

    def initialise(model: nn.Module, activation: str, generator: torch.Generator) -> None:
        from torch import nn

        from hessinit.experiments.rivals import experts_of, layers_of

        for k, layer in enumerate(layers_of(model)):
            for parameter in layer.parameters(recurse=False):
                if parameter.ndim > 1:
                    fill(parameter, k, activation, generator)
                else:
                    nn.init.zeros_(parameter)
        for matrix in experts_of(model):
            fill(matrix, 1, activation, generator)

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


def _budget(model: Any, fit: Fit) -> None:
    import hessinit

    hessinit.init_(
        model, (fit.x, fit.y), fit.loss, optimizer=fit.optimizer, seed=fit.seed, progress=False, **fit.options
    )


def _lsuv(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import rivals

    rivals.lsuv_(model, fit.batch()[0], **fit.options)


def _lsuv_package(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import rivals

    rivals.lsuv_package_(model, fit.batch()[0], fit.seed, **fit.options)


def _autoinit(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import rivals

    rivals.autoinit_(model, fit.batch()[0], fit.generator, **fit.options)


def _balanced(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import rivals

    assert fit.loss is not None  # PyTorch's alone
    rivals.balanced_(model, fit.batch(), fit.loss, fit.seed, **fit.options)


def _gradinit(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import learned

    assert fit.criterion is not None
    adam = fit.optimizer_name.startswith("adam")
    learned.gradinit_(model, fit.x, fit.y, fit.criterion, lr=fit.lr, adam=adam, generator=fit.generator, **fit.options)


def _metainit(model: nn.Module, fit: Fit) -> None:
    from hessinit.experiments import learned

    assert fit.criterion is not None
    learned.metainit_(model, fit.x, fit.y, fit.criterion, generator=fit.generator, **fit.options)


def _then(draw: TorchInit, change: str) -> TorchInit:
    """A draw, then a function of ``hessinit.experiments.rivals`` that needs no data."""

    def initialise(model: nn.Module, activation: str, generator: torch.Generator) -> None:
        from hessinit.experiments import rivals

        draw(model, activation, generator)
        getattr(rivals, change)(model)

    return initialise


HE = "He et al., ICCV 2015"
GLOROT = "Glorot & Bengio, AISTATS 2010"
SAXE = "Saxe, McClelland, Ganguli, ICLR 2014"

MISHKIN = "Mishkin & Matas, ICLR 2016"

_he = _torch_init("kaiming_normal_", nonlinearity="relu")
_orthogonal = _torch_init("orthogonal_")

INITIALIZERS: dict[str, Initializer] = {
    "torch_default": Initializer("torch default", "nn.Linear", _torch_default, None),
    "keras_default": Initializer(
        "Keras default", "Dense", _torch_init("xavier_uniform_"), _keras_init("GlorotUniform")
    ),
    "he_normal": Initializer("He normal", HE, _he, _keras_init("HeNormal")),
    "he_uniform": Initializer(
        "He uniform", HE, _torch_init("kaiming_uniform_", nonlinearity="relu"), _keras_init("HeUniform")
    ),
    "glorot_normal": Initializer("Glorot normal", GLOROT, _torch_init("xavier_normal_"), _keras_init("GlorotNormal")),
    "glorot_uniform": Initializer(
        "Glorot uniform", GLOROT, _torch_init("xavier_uniform_"), _keras_init("GlorotUniform")
    ),
    "lecun_normal": Initializer("LeCun normal", "LeCun et al., 1998", _each_layer(_lecun), _keras_init("LecunNormal")),
    "orthogonal": Initializer("orthogonal", SAXE, _orthogonal, _keras_init("Orthogonal")),
    "orthogonal_gain": Initializer(
        "orthogonal, torch's gain", SAXE, _each_layer(_orthogonal_gain), _keras_orthogonal_gain
    ),
    "slides": Initializer("slides' 0.3", "Skorski, 2021", _each_layer(_slides), _keras_slides),
    "he_warmup": Initializer("He normal, warm-up", "Goyal et al., 2017", _he, _keras_init("HeNormal"), warmup=0.1),
    "zero_output": Initializer("He, zero output", "folklore", _then(_he, "zero_output_"), None),
    "lsuv": Initializer("LSUV", MISHKIN, _orthogonal, None, _lsuv),
    "lsuv_package": Initializer("LSUV, lsuv package", MISHKIN, _orthogonal, None, _lsuv_package),
    "gradinit": Initializer("GradInit", "Zhu et al., NeurIPS 2021", _he, None, _gradinit),
    "metainit": Initializer("MetaInit", "Dauphin & Schoenholz, NeurIPS 2019", _he, None, _metainit),
    "autoinit": Initializer("AutoInit", "Bingham & Miikkulainen, AAAI 2023", _he, None, _autoinit),
    "fixup": Initializer("Fixup", "Zhang, Dauphin, Ma, ICLR 2019", _then(_he, "fixup_"), None),
    "balanced": Initializer("closed form, balanced", "this package", _closed_form, None, _balanced),
    "closed_form": Initializer("closed form", "this package", _closed_form, _keras_closed_form),
    "budget": Initializer("budget", "this package", _closed_form, _keras_closed_form, _budget),
    "budget_unpaired": Initializer(
        "budget, no pairs",
        "this package",
        _closed_form,
        _keras_closed_form,
        _budget,
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
