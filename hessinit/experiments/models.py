"""The networks of the comparison, the same in PyTorch and Keras."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

HIDDEN = {"mlp": (128, 84)}  # the slides' case study: 784-128-84-10 on FashionMNIST
ACTIVATIONS = ("relu", "tanh", "gelu", "silu")


def _layer(activation: str) -> type[nn.Module]:
    from torch import nn

    layers: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
    return layers[activation]


def torch_lenet(activation: str) -> nn.Sequential:
    """LeNet-5 (LeCun et al., 1998) for 28×28 images of one channel, without padding: 44,426 weights, as in the slides.

    Args:
        activation: one of ``ACTIVATIONS``.
    """
    from torch import nn

    layer = _layer(activation)
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


def torch_resnet(width: int = 16) -> nn.Module:
    """ResNet-8 (He et al., CVPR 2016, section 4.2) for images of one channel: three stages of one block, batch norm.

    Args:
        width: channels of the first stage; the others have two and four times as many.
    """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            stride = out // channels
            self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(out)
            self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.relu(self.norm1(self.conv1(x)))
            return torch.relu(self.norm2(self.conv2(h)) + self.skip(x))

    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(1, width, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(width),
            act=nn.ReLU(),
            stage1=Block(width, width),
            stage2=Block(width, 2 * width),
            stage3=Block(2 * width, 4 * width),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4 * width, 10),
        )
    )


def torch_mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """A plain net ``W_L φ(… φ(W_1 x))`` with biases, torch's own initial weights, and logits for output.

    Args:
        widths: ``n_0 … n_L``.
        activation: one of ``ACTIVATIONS``.
    """
    from torch import nn

    layer = _layer(activation)
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
