"""Slow, dense, obvious truth in float64."""

import itertools
import math

import numpy as np
import torch
from torch import nn


def layer_curvatures(model: nn.Module, x: torch.Tensor, loss_hessian: torch.Tensor) -> dict[str, float]:
    """Trace of each weight's block of ``Jᵀ D²_z ℓ J``, mean over samples, from explicit Jacobians of each sample."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    totals = dict.fromkeys(parameters, 0.0)
    for sample in x:
        jacobians = torch.func.jacrev(lambda p, s=sample: torch.func.functional_call(model, p, (s[None],))[0])(
            parameters
        )
        for name, jacobian in jacobians.items():
            j = jacobian.flatten(1)  # (outputs, parameters)
            totals[name] += float(torch.trace(j.T @ loss_hessian @ j)) / len(x)
    return totals


def random_relu_net(widths: list[int], stds: list[float], rng: np.random.Generator) -> nn.Sequential:
    """A plain ReLU net without biases, independent normal weights."""
    modules: list[nn.Module] = []
    for (n, m), std in zip(itertools.pairwise(widths), stds, strict=True):
        linear = nn.Linear(n, m, bias=False, dtype=torch.float64)
        linear.weight.data = torch.from_numpy(rng.normal(0, std, (m, n)))
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def gaussian_moments(function, variance: float, points: int = 2_000_001) -> tuple[float, float]:
    """``E φ(u)²`` and ``E φ'(u)²`` on a plain fine grid, slopes by central differences."""
    std = math.sqrt(variance)
    u = np.linspace(-12 * std, 12 * std, points)
    density = np.exp(-(u**2) / (2 * variance)) / (std * math.sqrt(2 * math.pi))
    values = function(u)
    return float(np.trapezoid(values**2 * density, u)), float(np.trapezoid(np.gradient(values, u) ** 2 * density, u))
