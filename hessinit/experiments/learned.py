"""Scales of a PyTorch model's weights that are learned by gradient descent before training: GradInit and MetaInit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from hessinit.experiments.rivals import undisturbed

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradinit_(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Loss,
    *,
    lr: float,
    adam: bool,
    generator: torch.Generator,
    steps: int = 390,
    batch_size: int = 128,
    scale_lr: float = 1e-2,
    gamma: float | None = None,
    min_scale: float = 0.01,
) -> None:
    """Scales each parameter tensor so that one step of the optimizer leaves as little loss as possible.

    The step is ``θ - η A(g)``, with ``A(g) = g`` for SGD and ``sign(g)`` for Adam, from the gradient g of a batch S;
    the loss is that of a batch S̃ half of which is in S. Where the norm of g, ℓ² for SGD and ℓ¹ for Adam, is above γ, it
    is lowered instead. Adam descends both, with moments of its own for each, as in the authors' code. The scales kept
    are the last with a norm of at most γ, if any had one. Batch norm uses each batch's statistics.

    Args:
        model: with its weights drawn.
        x: inputs of the train set.
        y: targets of the train set.
        loss: mean loss of outputs and targets.
        lr: η, the learning rate of the optimizer that training will use.
        adam: whether that is of Adam's kind.
        generator: of the batches.
        steps: of the scales.
        batch_size: of S and of S̃.
        scale_lr: Adam's learning rate for the scales.
        gamma: γ; default one for SGD and none for Adam, as in the authors' scripts for images and for translation.
        min_scale: lower bound of the scales.

    References:
        Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
        Training", NeurIPS 2021, Algorithm 1. Settings: github.com/zhuchen03/gradinit. There the step for SGD is that of
        the normalised gradient, with η = 0.1 for any learning rate, and g is held fixed in the derivative.
    """
    gamma = (math.inf if adam else 1.0) if gamma is None else gamma
    trained = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    scales = {name: weight.new_ones(()).requires_grad_() for name, weight in trained.items() if weight.any()}
    minimise, project = (torch.optim.Adam(scales.values(), scale_lr) for _ in range(2))
    kept: list[float] | None = None

    def loss_at(parameters: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, dict(zip(trained, parameters, strict=True)), (x[rows],)), y[rows])

    with undisturbed(model):
        for _ in range(steps):
            drawn = torch.randperm(len(x), generator=generator)
            half = min(batch_size, len(x)) // 2
            first, second = drawn[: 2 * half], torch.cat([drawn[:half], drawn[-half:]])
            parameters = [scales[name] * weight if name in scales else weight for name, weight in trained.items()]
            gradient = _grad(loss_at(parameters, first), parameters)
            norm = torch.cat([g.flatten() for g in gradient]).norm(1 if adam else 2)
            if not norm.isfinite():
                break
            if norm > gamma:
                optimizer, objective = project, norm
            else:
                kept = [scale.item() for scale in scales.values()]
                moved = [p - lr * (g.sign() if adam else g) for p, g in zip(parameters, gradient, strict=True)]
                optimizer, objective = minimise, loss_at(moved, second)
            for scale, slope in zip(scales.values(), _grad(objective, list(scales.values()), False), strict=True):
                scale.grad = slope
            optimizer.step()
            with torch.no_grad():
                for scale in scales.values():
                    scale.clamp_(min=min_scale)
    with torch.no_grad():
        for name, found in zip(scales, kept or [scale.item() for scale in scales.values()], strict=True):
            model.get_parameter(name).mul_(found)


def metainit_(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Loss,
    *,
    generator: torch.Generator,
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    eps: float = 1e-5,
) -> None:
    """Moves the norm of each weight to where the gradient changes least along itself: a low gradient quotient.

    Signed gradient descent with momentum on the norms of matrices and kernels. It sees no data, as in the paper: inputs
    are standard normal with the shape of the train set's, labels uniform, targets of a regression standard normal;
    characters are uniform too. The model is in evaluation mode.

    Args:
        model: with its weights drawn.
        x: inputs of the train set, for their shape, and the largest character.
        y: targets of the train set, for their shape, and the largest label.
        loss: mean loss of outputs and targets.
        generator: of the batches.
        steps: of the norms.
        batch_size: random samples a step.
        lr: of the norms.
        momentum: of the signs.
        eps: of the quotient.

    References:
        Dauphin & Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019, section 3 and
        the code in its appendix. One deliberate difference: a norm stays above a thousandth of what it was.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in parameters if p.ndim > 1 and p.any()]
    floors = [1e-3 * float(weight.detach().norm()) for weight in weights]
    speeds = [0.0] * len(weights)
    with undisturbed(model, training=False):
        for _ in range(steps):
            outputs = model(_random_like(x, batch_size, generator))
            quotient = gradient_quotient(loss(outputs, _random_like(y, batch_size, generator)), parameters, eps)
            slopes = _grad(quotient, weights, False)
            if not quotient.isfinite():
                break
            with torch.no_grad():
                for k, (weight, slope) in enumerate(zip(weights, slopes, strict=True)):
                    norm = float(weight.norm())
                    speeds[k] = momentum * speeds[k] - lr * float((weight * slope).sum().sign())
                    weight.mul_(max(norm + speeds[k], floors[k]) / norm)


def gradient_quotient(loss: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float = 1e-5) -> torch.Tensor:
    """The mean over parameters of ``|(g - Hg) / (g ± ε) - 1|``, near ``|Hg / g|``: how a step changes the gradient.

    Args:
        loss: a scalar with a graph.
        parameters: that it depends on.
        eps: ε, with the sign of g.
    """
    gradient = _grad(loss, parameters)
    product = _grad(torch.stack([g.square().sum() for g in gradient]).sum() / 2, parameters)
    terms = [
        ((g - hg) / (g + torch.where(g >= 0, eps, -eps)) - 1).abs().sum()
        for g, hg in zip(gradient, product, strict=True)
    ]
    return torch.stack(terms).sum() / sum(p.numel() for p in parameters)


def _random_like(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    shape = (count, *rows.shape[1:])
    if rows.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=rows.dtype)
    return torch.randint(int(rows.max()) + 1, shape, generator=generator)


def _grad(
    value: torch.Tensor, parameters: Sequence[torch.Tensor], create_graph: bool = True
) -> tuple[torch.Tensor, ...]:
    """Zeros where the value does not depend on a parameter."""
    return torch.autograd.grad(
        value, list(parameters), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
