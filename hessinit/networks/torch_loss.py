"""PyTorch's losses in terms of :mod:`hessinit.losses`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from hessinit import losses
from hessinit.losses import Loss
from hessinit.networks.torch_autodiff import TorchArrays, TorchDerivatives

_ARRAYS = TorchArrays()
_FUNCTIONS: dict[Callable[..., Any], tuple[type[Loss], dict[str, Any]]] = {
    F.cross_entropy: (losses.CrossEntropy, {}),
    F.nll_loss: (losses.CrossEntropy, {"outputs": losses.LOG_PROBABILITIES}),
    F.mse_loss: (losses.SquaredError, {}),
    F.binary_cross_entropy_with_logits: (losses.BinaryCrossEntropy, {}),
    F.binary_cross_entropy: (losses.BinaryCrossEntropy, {"outputs": losses.PROBABILITIES}),
    F.poisson_nll_loss: (losses.PoissonNLL, {}),
    F.huber_loss: (losses.Huber, {}),
}
_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.BCELoss: F.binary_cross_entropy,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
}


def translate(loss: Any) -> Loss:
    """The loss behind a module, a function of ``torch.nn.functional`` (also under ``functools.partial``) or a callable.

    Raises:
        ValueError: a loss of several values (``reduction="none"``).
        TypeError: not a loss.
    """
    if isinstance(loss, nn.Module) and type(loss) in _MODULES:
        function = _MODULES[type(loss)]
        names = inspect.signature(function).parameters
        options = {n: getattr(loss, n) for n in names if hasattr(loss, n) and n not in ("input", "target")}
        return _translate(loss, function, options)
    if isinstance(loss, partial) and not loss.args:
        return _translate(loss, loss.func, loss.keywords)
    if callable(loss):
        return _translate(loss, loss, {})
    raise TypeError(f"loss must be a name, a torch loss or a callable of (outputs, targets); got {loss!r}")


def _translate(loss: Any, function: Callable[..., Any], options: Mapping[str, Any]) -> Loss:
    reduction = getattr(loss, "reduction", options.get("reduction", "mean"))
    if reduction not in ("mean", "sum"):
        raise ValueError(f'loss must be a scalar: reduction "mean" or "sum"; got {reduction!r} in {loss!r}')
    mean = reduction == "mean"
    given = {k: v for k, v in options.items() if k not in ("reduction", "size_average", "reduce")}
    if function is F.smooth_l1_loss and given.get("beta", 1.0) > 0:
        return losses.Huber(_ARRAYS, mean, delta=given.get("beta", 1.0), factor=1 / given.get("beta", 1.0))
    if function not in _FUNCTIONS:
        return losses.Custom(_ARRAYS, mean, loss, TorchDerivatives())
    kind, fixed = _FUNCTIONS[function]
    if kind is losses.CrossEntropy:
        given = {"ignore_index": -100, **given}
    if given.pop("full", False) or not set(given) <= set(kind.__dataclass_fields__):
        return losses.Custom(_ARRAYS, mean, loss, TorchDerivatives())
    return kind(_ARRAYS, mean, **given, **fixed)
