"""Adapters, one a framework; :func:`wrap` finds the one of a model without importing the others."""

from __future__ import annotations

import sys
from typing import Any

from hessinit.networks.base import Network


def wrap(model: Any, function: str) -> Network:
    """The adapter around a model.

    Raises:
        TypeError: neither a ``torch.nn.Module`` nor a ``keras.Model``.
    """
    # A model cannot exist before its framework is imported, so a framework not yet loaded need not be. On its torch
    # backend a Keras model is a torch module too, hence Keras is asked first.
    if "keras" in sys.modules:
        from hessinit.networks import keras as keras_adapter

        if keras_adapter.accepts(model):
            return keras_adapter.KerasNetwork(model)
    if "torch" in sys.modules:
        from hessinit.networks import torch as torch_adapter

        if torch_adapter.accepts(model):
            return torch_adapter.TorchNetwork(model)
    raise TypeError(f"{function}: model must be a torch.nn.Module or a keras.Model; got {type(model).__name__}.")
