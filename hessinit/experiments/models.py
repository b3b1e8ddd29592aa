"""The networks of the comparison, the same in PyTorch and Keras."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

HIDDEN = {"mlp": (128, 84)}  # the slides' case study: 784-128-84-10 on FashionMNIST
ACTIVATIONS = ("relu", "tanh", "gelu", "silu")


def torch_mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    """A plain net ``W_L φ(… φ(W_1 x))`` with biases, torch's own initial weights, and logits for output.

    Args:
        widths: ``n_0 … n_L``.
        activation: one of ``ACTIVATIONS``.
    """
    from torch import nn

    layer = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}[activation]
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
