"""In-place initializers of single tensors, in the manner of ``torch.nn.init``.

The scale is the closed form of :mod:`hessinit.rules`: standard deviation ``1 / (g (fan_in fan_out)^(1/4))``. Unlike in
``torch.nn.init`` the gain g *divides*: g² = 1/2 for ReLU where torch's squared gain is 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessinit import rules
from hessinit.draw import draw, stream
from hessinit.layout import Layout
from hessinit.model import init_
from hessinit.networks.torch import draw_seed, numpy_nonlinearity
from hessinit.report import Report

__all__ = [
    "Layout",
    "calculate_gain",
    "hessian_normal_",
    "hessian_orthogonal_",
    "hessian_truncated_normal_",
    "hessian_uniform_",
    "lightning_callback",
]

Nonlinearity = str | Callable[[Any], Any]


def calculate_gain(nonlinearity: Nonlinearity, param: float | None = None, *, depth: int | None = None) -> float:
    """The gain g of the closed form for any activation; it divides (torch's multiplies).

    Args:
        nonlinearity: a name ("relu", "gelu", ...), a torch module or function, or a vectorised NumPy function.
        param: negative slope of ``"leaky_relu"``, default 0.01.
        depth: number of weight layers of the net, if known; see :func:`hessinit.rules.gain`.

    Returns:
        g > 0.

    Raises:
        ValueError: unknown name, or an activation without a finite gain.

    Example:
        >>> round(calculate_gain("relu") ** 2, 9), round(calculate_gain(nn.ReLU()) ** 2, 9)
        (0.5, 0.5)
    """
    return rules.gain(numpy_nonlinearity(nonlinearity), param, depth=depth)


def _fill_(
    function: str,
    distribution: str,
    tensor: Tensor,
    nonlinearity: Nonlinearity,
    gain: float | None,
    layout: str | Layout,
    generator: torch.Generator | None,
    depth: int | None,
) -> Tensor:
    """What the four public functions share."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: tensor must be a torch.Tensor; got {type(tensor).__name__}.")
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        raise ValueError(f"{function}: tensor must be materialised; got a lazy one. Run one forward pass first.")
    where = f"a tensor of shape {tuple(tensor.shape)}"
    if not tensor.is_floating_point():
        raise TypeError(f"{function}: tensor must be of a real floating-point dtype; got {tensor.dtype} in {where}.")
    if tensor.ndim < 2:
        raise ValueError(f"{function}: tensor must have at least two axes; got {where}. Biases start at zero.")
    try:
        axes = layout if isinstance(layout, Layout) else Layout(layout)
        fans = axes.fans(tensor.shape)
        g = rules.gain(numpy_nonlinearity(nonlinearity), depth=depth) if gain is None else gain
        std = 0.0 if 0 in fans else rules.curvature_neutral_std(*fans, g)
    except ValueError as error:
        raise ValueError(f"{function}: {error} (for {where})") from error
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    wide = np.float64 if tensor.dtype == torch.float64 else np.float32
    values = draw(tensor.shape, axes, std, distribution, stream(draw_seed(generator)), wide)
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(values))
    return tensor


def hessian_normal_(
    tensor: Tensor,
    nonlinearity: Nonlinearity = "relu",
    gain: float | None = None,
    layout: str | Layout = "oi...",
    generator: torch.Generator | None = None,
    *,
    depth: int | None = None,
) -> Tensor:
    """Fills a weight from ``N(0, σ²)`` at the curvature-neutral scale ``σ = 1 / (g (fan_in fan_out)^(1/4))``.

    Args:
        tensor: weight of at least two axes; a meta or zero-size tensor is returned untouched.
        nonlinearity: the activation that follows: a name, a torch module or function, a NumPy function. Default "relu".
        gain: g itself, instead of ``nonlinearity``; it divides.
        layout: the axes, see :class:`hessinit.layout.Layout`. Default ``"oi..."``, the order of Linear and Conv1-3d;
            ``Layout("(gi)o...", groups, stride, transposed=True)`` for a transposed convolution.
        generator: decides everything; None: torch's global one, which advances by one draw.
        depth: number of weight layers of the net, if known; see :func:`hessinit.rules.gain`.

    Returns:
        The same tensor, same dtype and device. Half precision is drawn in float32, then cast.

    Raises:
        TypeError: not a real floating-point tensor. ValueError: fewer than two axes, a layout that does not fit, an
            unknown nonlinearity, ``gain`` <= 0.

    Example:
        >>> w = hessian_normal_(torch.empty(1024, 256), generator=torch.Generator().manual_seed(0))
        >>> round(w.std().item() / (2**0.5 / (1024 * 256) ** 0.25), 2)
        1.0
    """
    return _fill_("hessian_normal_", "normal", tensor, nonlinearity, gain, layout, generator, depth)


def hessian_uniform_(
    tensor: Tensor,
    nonlinearity: Nonlinearity = "relu",
    gain: float | None = None,
    layout: str | Layout = "oi...",
    generator: torch.Generator | None = None,
    *,
    depth: int | None = None,
) -> Tensor:
    """Fills a weight from the uniform law on ``[-√3 σ, √3 σ]``. Arguments as in :func:`hessian_normal_`.

    Example:
        >>> w = hessian_uniform_(torch.empty(64, 64), gain=1.0, generator=torch.Generator().manual_seed(0))
        >>> w.abs().max().item() <= 3**0.5 / 8
        True
    """
    return _fill_("hessian_uniform_", "uniform", tensor, nonlinearity, gain, layout, generator, depth)


def hessian_truncated_normal_(
    tensor: Tensor,
    nonlinearity: Nonlinearity = "relu",
    gain: float | None = None,
    layout: str | Layout = "oi...",
    generator: torch.Generator | None = None,
    *,
    depth: int | None = None,
) -> Tensor:
    """Fills a weight from a normal law cut at two of its standard deviations, widened so that its std is σ.

    Arguments as in :func:`hessian_normal_`. The largest entry is at most ``2 σ / 0.8796``.

    Example:
        >>> w = hessian_truncated_normal_(torch.empty(256, 256), gain=1.0, generator=torch.Generator().manual_seed(0))
        >>> round(w.std().item() * 16, 2), w.abs().max().item() * 16 <= 2 / 0.8796
        (1.0, True)
    """
    return _fill_("hessian_truncated_normal_", "truncated_normal", tensor, nonlinearity, gain, layout, generator, depth)


def hessian_orthogonal_(
    tensor: Tensor,
    nonlinearity: Nonlinearity = "relu",
    gain: float | None = None,
    layout: str | Layout = "oi...",
    generator: torch.Generator | None = None,
    *,
    depth: int | None = None,
) -> Tensor:
    """Fills a weight with orthogonal rows or columns whose root mean square is exactly σ.

    The matrix is (outputs, inputs x kernel positions), one for each group. Arguments as in :func:`hessian_normal_`.

    Example:
        >>> w = hessian_orthogonal_(torch.empty(64, 64), generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(w @ w.T, 2 * torch.eye(64), atol=1e-5)
        True
    """
    return _fill_("hessian_orthogonal_", "orthogonal", tensor, nonlinearity, gain, layout, generator, depth)


def lightning_callback(loss: Any, **options: Any) -> Any:
    """A callback for a Lightning ``Trainer`` that calls :func:`hessinit.init_` before the first step.

    The module is set for its optimizer on the first batches of the train loader, of all processes. A fit that goes on
    from a checkpoint leaves the weights as they are.

    Args:
        loss: as for :func:`hessinit.init_`.
        options: its other keywords; ``forward`` for batches that are no pair (inputs, targets).

    Returns:
        A ``lightning.pytorch.Callback``; once the fit has begun, ``callback.report`` is a :class:`hessinit.Report`.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        ValueError: when the fit begins, of several optimizers; call ``init_`` beforehand.
    """
    try:
        from lightning import pytorch as lightning
    except ImportError:
        import pytorch_lightning as lightning

    class InitCallback(lightning.Callback):  # type: ignore[misc]
        report: Report | None = None

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if trainer.global_step > 0:
                return
            if (count := len(trainer.optimizers)) != 1:
                raise ValueError(
                    f"lightning_callback: optimizers of the trainer must be one; got {count}. Call init_ beforehand."
                )
            group = {"process_group": torch.distributed.group.WORLD} if trainer.world_size > 1 else {}
            call = {"optimizer": trainer.optimizers[0], **group, **options}
            _, self.report = init_(pl_module, trainer.train_dataloader, loss, return_report=True, **call)

    return InitCallback()
