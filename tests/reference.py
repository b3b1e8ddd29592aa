"""Slow, dense, obvious truth in float64."""

import itertools
import math
from unittest import mock

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


def weight_norm(v, g, dim):
    """By its formula: the second derivative of torch's fused kernel is wrong on the CPU."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def dense_truth(model, batch, torch_loss, names=None, output_hessian=None):
    """(G, H, gradient) of a torch model's loss by reverse mode alone, one row at a time, in the order of ``names``.

    ``output_hessian``: D² of the loss in the flat outputs, where it is not that of the loss itself.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = {n: p for n, p in model.named_parameters() if names is None or n in names}
    parameters = {n: p for n, p in parameters.items() if p.requires_grad}
    x, y = batch
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch("torch._weight_norm", weight_norm),
        mock.patch("torch.nn.utils.weight_norm._weight_norm", weight_norm),
    ):
        z = model(x)
        flat = z.reshape(-1)
        jacobian = torch.stack([_flat_grad(entry, parameters, keep=True) for entry in flat])
        leaf = z.detach().clone().requires_grad_()
        second = torch.autograd.functional.hessian(lambda u: torch_loss(u.reshape(z.shape), y), leaf.reshape(-1))
        second = second if output_hessian is None else output_hessian
        gradient = torch.autograd.grad(
            torch_loss(z, y), list(parameters.values()), create_graph=True, allow_unused=True
        )
        flat_gradient = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(gradient, parameters.values(), strict=True)
            ]
        )
        hessian = torch.stack([_flat_grad(entry, parameters, keep=True) for entry in flat_gradient])
    return jacobian.T @ second @ jacobian, hessian, flat_gradient.detach()


def _flat_grad(scalar, parameters, keep):
    import torch

    if not scalar.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters.values()), dtype=scalar.dtype)
    grads = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=keep, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, parameters.values(), strict=True)]
    )
