"""The problems of the comparison: a network and the data it is for. Plain nets are the same in PyTorch and Keras.

Every PyTorch network takes the rows of its dataset as they are: images as rows of pixels, texts as rows of characters.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hessinit.experiments import hugging_face
from hessinit.experiments.data import Dataset

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS = ("relu", "tanh", "gelu", "silu")


def layer_of(activation: str) -> type[nn.Module]:
    """The module of an activation, one of ``ACTIVATIONS``."""
    from torch import nn

    layers: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
    return layers[activation]


def torch_lenet(activation: str) -> nn.Sequential:
    """LeNet-5 (LeCun et al., 1998) for 28×28 images of one channel, without padding: 44,426 weights, as in the slides.

    Args:
        activation: one of ``ACTIVATIONS``.
    """
    from torch import nn

    layer = layer_of(activation)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5),
            act1=layer(),
            pool1=nn.AvgPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            act2=layer(),
            pool2=nn.AvgPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(256, 120),
            act3=layer(),
            fc2=nn.Linear(120, 84),
            act4=layer(),
            fc3=nn.Linear(84, 10),
        )
    )


def torch_resnet(width: int = 16, stride: int = 1, norm: bool = True, activation: str = "relu") -> nn.Module:
    """ResNet-8 (He et al., CVPR 2016, section 4.2) for images of one channel: three stages of one block.

    Args:
        width: channels of the first stage; the others have two and four times as many.
        stride: of the first convolution.
        norm: batch norm after every convolution; without it convolutions have biases.
        activation: one of ``ACTIVATIONS``.
    """
    import torch
    from torch import nn

    act = layer_of(activation)()

    def normed(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if norm else nn.Identity()

    class Block(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            stride = out // channels
            self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=not norm)
            self.norm1 = normed(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=not norm)
            self.norm2 = normed(out)
            self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()
            self.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.act(self.norm1(self.conv1(x)))
            return self.act(self.norm2(self.conv2(h)) + self.skip(x))  # type: ignore[no-any-return]

    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(1, width, 3, stride, 1, bias=not norm),
            norm=normed(width),
            act=act,
            stage1=Block(width, width),
            stage2=Block(width, 2 * width),
            stage3=Block(2 * width, 4 * width),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4 * width, 10),
        )
    )


def torch_transformer(
    embed: nn.Module,
    places: int,
    outputs: int,
    width: int,
    layers: int,
    activation: str,
    causal: bool,
    norm_first: bool = True,
) -> nn.Module:
    """A transformer with learned positions; four heads, feed-forward layers of twice the width, no dropout.

    Args:
        embed: from rows of the dataset to (samples, places, width).
        places: patches or characters a sample.
        outputs: classes, or characters.
        width: of the residual stream.
        layers: attention and feed-forward blocks.
        activation: relu or gelu.
        causal: a language model, with outputs at each place that depend on no later one; else their mean decides.
        norm_first: whether norms stand before layers, as they mostly do now, or after their sums, as in PyTorch.
    """
    import torch
    from torch import nn

    class Transformer(nn.Module):
        mask: torch.Tensor | None

        def __init__(self) -> None:
            super().__init__()
            self.embed = embed
            self.places = nn.Parameter(0.02 * torch.randn(places, width))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, 0.0, activation, batch_first=True, norm_first=norm_first
                )
                for _ in range(layers)
            )
            self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
            self.head = nn.Linear(width, outputs)
            hidden = torch.full((places, places), -torch.inf).triu(1) if causal else None
            self.register_buffer("mask", hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x) + self.places
            for block in self.blocks:
                h = block(h, src_mask=self.mask)
            h = self.norm(h)
            return self.head(h if causal else h.mean(1))  # type: ignore[no-any-return]

    return Transformer()


def _transpose() -> nn.Module:
    """(samples, channels, places) to (samples, places, channels)."""
    import torch
    from torch import nn

    class Transpose(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2)

    return Transpose()


def torch_vit(activation: str = "gelu") -> nn.Module:
    """A small vision transformer for rows of 28×28 pixels: 16 patches, width 48, three blocks."""
    from torch import nn

    patches = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 48, 7, 7), nn.Flatten(2), _transpose())
    return torch_transformer(patches, 16, 10, 48, 3, activation, causal=False)


def torch_mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """A plain net ``W_L φ(… φ(W_1 x))`` with biases, torch's own initial weights, and logits for output.

    Args:
        widths: ``n_0 … n_L``.
        activation: one of ``ACTIVATIONS``.
    """
    from torch import nn

    layer = layer_of(activation)
    modules: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        modules += [nn.Linear(fan_in, fan_out), layer()]
    return nn.Sequential(*modules[:-1])


def keras_mlp(widths: Sequence[int], activation: str, kernel_initializers: Sequence[Any]) -> Any:
    """The same net in Keras, with one kernel initializer a layer."""
    import keras

    net = [keras.Input((widths[0],))]
    for k, (width, initializer) in enumerate(zip(widths[1:], kernel_initializers, strict=True)):
        last = k == len(widths) - 2
        net.append(keras.layers.Dense(width, None if last else activation, kernel_initializer=initializer))
    return keras.Sequential(net)


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Args:
        title: for tables and figures.
        hidden: widths of a plain net's hidden layers; None for another kind of net, which PyTorch alone has.
        net: of (dataset, activation), for those.
        dataset: its own, by the name that :func:`hessinit.experiments.data.load` knows.
        activations: that the net can have.
        package: that it is from, which may not be installed.
    """

    title: str
    hidden: tuple[int, ...] | None = None
    net: Callable[[Dataset, str], nn.Module] | None = None
    dataset: str = "auto"
    activations: tuple[str, ...] = ACTIVATIONS
    package: str = "torch"

    def widths(self, data: Dataset) -> list[int]:
        """Of a plain net: inputs, hidden layers, outputs."""
        assert self.hidden is not None  # Keras runs are checked when the sweep is planned
        return [data.x_train.shape[1], *self.hidden, data.outputs]

    def torch(self, data: Dataset, activation: str) -> nn.Module:
        """The net, with the initial weights that torch gives it."""
        return self.net(data, activation) if self.net else torch_mlp(self.widths(data), activation)


def _images(net: Callable[[str], nn.Module]) -> Callable[[Dataset, str], nn.Module]:
    """For rows of pixels, a net for images."""

    def build(data: Dataset, activation: str) -> nn.Module:
        from torch import nn

        return nn.Sequential(OrderedDict(image=nn.Unflatten(1, (1, 28, 28)), net=net(activation)))

    return build


def _character_model(layers: int, norm_first: bool) -> Callable[[Dataset, str], nn.Module]:
    def build(data: Dataset, activation: str) -> nn.Module:
        from torch import nn

        embed, places = nn.Embedding(data.outputs, 64), data.x_train.shape[1]
        return torch_transformer(embed, places, data.outputs, 64, layers, activation, True, norm_first)

    return build


def _hugging_face(kind: str, data: Dataset, activation: str) -> nn.Module:
    return hugging_face.model(kind, data)  # which has this activation


TRANSFORMER = ("gelu", "relu")
PROBLEMS = {
    "mlp": Problem("784-128-84-10", (128, 84)),  # the slides' case study
    **{f"mlp{n}": Problem(f"MLP of {n} layers, width 128", (128,) * (n - 1)) for n in (2, 6, 12, 30, 50, 100)},
    "mlp_wide": Problem("784-512-512-10", (512, 512)),
    "lenet": Problem("LeNet-5", net=_images(torch_lenet)),
    "resnet_bn": Problem("ResNet-8, batch norm", net=_images(lambda activation: torch_resnet(16, 2, True, activation))),
    "resnet": Problem("ResNet-8, no norm", net=_images(lambda activation: torch_resnet(16, 2, False, activation))),
    "vit": Problem("small ViT", net=lambda data, activation: torch_vit(activation), activations=TRANSFORMER),
    "charlm": Problem("character model", None, _character_model(2, True), "topics", TRANSFORMER),
    **{
        f"post_norm{n}": Problem(f"post-norm, {n} blocks", None, _character_model(n, False), "topics", TRANSFORMER)
        for n in (4, 8)
    },
    **{
        name: Problem(kind.title, None, partial(_hugging_face, name), dataset, (kind.activation,), hugging_face.PACKAGE)
        for dataset, kinds in (("topics", hugging_face.TEXTS), ("auto", hugging_face.IMAGES))
        for name, kind in kinds.items()
    },
    "digits": Problem("64-64-32-10", (64, 32), dataset="digits"),
    "friedman": Problem("10-64-64-1, regression", (64, 64), dataset="friedman"),
}
