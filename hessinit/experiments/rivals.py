"""Other ways to scale the weights of a PyTorch model: by its signal, its curvature, or its residual branches.

Each function changes weights in place and nothing else: not modes, buffers or the global random state. Those that learn
their scales by gradient are in :mod:`hessinit.experiments.learned`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hessinit import curvature
from hessinit.quadrature import moments

DEAD = 1e-12  # a variance of outputs below which a layer's scale is not worth its inverse
MAX_FACTOR = 4.0  # of a weight, in balancing
LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)
TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut at two standard deviations


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The linear and convolutional layers and the packed projections of attention, in order."""
    return (module for module in model.modules() if isinstance(module, LAYERS))


@torch.no_grad()
def experts_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """The matrices (outputs, inputs) of experts that Hugging Face's models keep in one tensor."""
    for module in model.modules():
        if hasattr(module, "num_experts"):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 3:
                    yield from parameter.detach().mT if module.is_transposed else parameter.detach()


@contextlib.contextmanager
def undisturbed(model: nn.Module, training: bool = True) -> Iterator[None]:
    """A mode for all modules, and attention that has second derivatives; then all but weights is put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
            torch.default_generator.manual_seed(0)
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


@torch.no_grad()
def lsuv_(model: nn.Module, x: torch.Tensor, tol: float = 0.1, attempts: int = 10) -> None:
    """Divides each layer's weight, in the order of the forward pass, by its outputs' standard deviation on a batch.

    The first layer included; the variance is over the whole tensor of outputs. In attention the projections of query,
    key and value count as a layer each, then the output's. Draw orthogonal weights before. A layer whose outputs have
    no variance keeps its weight.

    Args:
        model: with its weights drawn.
        x: the batch.
        tol: a variance this close to one will do.
        attempts: at most, a layer; more than one only where the layer has a bias.

    References:
        Mishkin & Matas, "All you need is a good init", ICLR 2016, Algorithm 1, with its tolerance and attempts.
    """
    with undisturbed(model):
        for layer in _called(model, x):
            for weight, outputs in _parts(layer):
                for _ in range(attempts):
                    variance = float(outputs(*_call(model, x, layer)).var(correction=0))
                    if abs(variance - 1) < tol or not DEAD < variance < math.inf:
                        break
                    weight /= variance**0.5


def _called(model: nn.Module, x: torch.Tensor) -> list[nn.Module]:
    """Layers in the order of the forward pass; attention never calls the module of its output projection."""
    order: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda module, args, out: order.append(module)) for layer in layers_of(model)]
    model(x)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def _call(model: nn.Module, x: torch.Tensor, layer: nn.Module) -> tuple[Any, Any]:
    """Arguments and output of a layer in a forward pass."""
    seen: list[tuple[Any, Any]] = []
    hook = layer.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    model(x)
    hook.remove()
    return seen[-1]


def _parts(layer: Any) -> Iterator[tuple[torch.Tensor, Callable[[Any, Any], torch.Tensor]]]:
    """A layer's weights, each with its outputs as a function of the layer's arguments and output."""
    if isinstance(layer, nn.MultiheadAttention):
        packed, shift = layer.in_proj_weight, layer.in_proj_bias
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if packed is None else packed.chunk(3)
        for k, weight in enumerate(weights):
            bias = None if shift is None else shift.chunk(3)[k]
            yield weight.detach(), functools.partial(_projected, k=k, weight=weight, bias=bias)
        yield layer.out_proj.weight.detach(), lambda args, out: out[0]
    else:
        yield layer.weight.detach(), lambda args, out: out


def _projected(args: Any, out: Any, k: int, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(args[k], weight, bias)


def lsuv_package_(model: nn.Module, x: torch.Tensor, seed: int, **options: Any) -> None:
    """LSUV as its author publishes it, the PyPI package ``lsuv``, with its own orthogonal draw from a seed.

    Args:
        model: whose weights are drawn anew.
        x: the batch.
        seed: of the draw.
        options: keywords of ``lsuv.lsuv_with_singlebatch``.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        import lsuv
    except ImportError as error:
        raise ImportError("lsuv_package_: the package lsuv must be installed. Run pip install lsuv.") from error
    with undisturbed(model):
        torch.default_generator.manual_seed(seed)
        lsuv.lsuv_with_singlebatch(model, x, verbose=False, **options)


@torch.no_grad()
def zero_output_(model: nn.Module) -> None:
    """The last layer zero, so that the first loss is that of no guess: the logarithm of the number of classes."""
    for parameter in list(layers_of(model))[-1].parameters():
        parameter.zero_()


@torch.no_grad()
def fixup_(model: nn.Module) -> None:
    """Scales the weights inside residual branches by ``L^(-1/(2m-2))`` and zeroes the ends of branches and the output.

    L branches of m layers each: one step of SGD then changes the outputs by as much for any L. Draw He normal weights
    before. Without the paper's scalar biases and multipliers (its rule 3), which are parameters that the compared nets
    do not have. In attention the branch is value and output projection: query and key multiply nothing. A branch that
    ends in a norm ends in the norm's scale: outputs that are zero would be divided by the root of its epsilon.

    Args:
        model: with blocks of :func:`hessinit.experiments.models.torch_resnet` or ``nn.TransformerEncoderLayer``.

    Raises:
        ValueError: a model without such blocks.

    References:
        Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", ICLR 2019, section 3.
    """
    branches = [branch for module in model.modules() for branch in _branches(module)]
    if not branches:
        raise ValueError(
            "fixup_: model must have residual blocks, of torch_resnet or nn.TransformerEncoderLayer; "
            f"got {type(model).__name__} without."
        )
    for inside, end in branches:
        for weight in inside:
            weight *= len(branches) ** (-1 / (2 * len(inside)))  # m - 1 layers inside
        end.zero_()
    zero_output_(model)


def _branches(module: Any) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Of a residual block, each branch: the weights inside it, and the one that ends it."""
    if isinstance(module, nn.TransformerEncoderLayer):
        yield [module.self_attn.in_proj_weight.chunk(3)[2]], module.self_attn.out_proj.weight
        yield [module.linear1.weight], module.linear2.weight
    elif all(hasattr(module, name) for name in ("conv1", "conv2", "norm2", "skip")):
        normed = isinstance(module.norm2, _BatchNorm)
        inside, last = module.conv1.weight, module.conv2.weight
        yield [inside], module.norm2.weight if normed else last


@torch.no_grad()
def autoinit_(model: nn.Module, x: torch.Tensor, generator: torch.Generator) -> None:
    """Draws each weight with variance ``1 / (fan_in E u²)``, so that every layer's outputs have mean 0 and variance 1.

    Mean and variance of the signal u are followed through the net by formula: the inputs' are those of the batch, an
    activation's come from quadrature under a normal law, pooling is over independent values. Truncated normal weights,
    as in the authors' package.

    Args:
        model: ``nn.Sequential``, nested or not, of linear and convolutional layers, batch norms, activations, pooling.
        x: the batch.
        generator: of the draw.

    Raises:
        ValueError: a module that it cannot follow; no weight has changed.

    References:
        Bingham & Miikkulainen, "AutoInit: Analytic Signal-Preserving Weight Initialization for Neural Networks",
        AAAI 2023, section 3.
    """
    chain = list(_chain(model))
    for name, module in chain:
        if not isinstance(module, (*PASSED, *WEIGHED, *ACTIVATIONS, *POOLS, _BatchNorm)):
            raise ValueError(
                "autoinit_: model must be a chain of linear, convolutional, norm, activation and pooling layers; "
                f"got {type(module).__name__} at {name or 'the top'!r}."
            )
    mean, variance = float(x.double().mean()), float(x.double().var(correction=0))
    with undisturbed(model):
        for _, module in chain:
            places = math.prod(x.shape[2:])
            x = module(x[:2])
            if isinstance(module, WEIGHED):
                fan_in = module.weight[0].numel()
                std = (fan_in * (variance + mean**2) or 1.0) ** -0.5 / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std, generator)
                if module.bias is not None:
                    module.bias.zero_()
            if isinstance(module, (*WEIGHED, _BatchNorm)):
                mean, variance = 0.0, 1.0
            elif isinstance(module, ACTIVATIONS):
                mean, variance = _through(_as_numpy(module), mean, variance)
            elif isinstance(module, POOLS):
                count = _window(module, places, math.prod(x.shape[2:]))
                if isinstance(module, MAX_POOLS):
                    top, spread = _largest(count)
                    mean, variance = mean + variance**0.5 * top, variance * spread
                else:
                    variance /= count


PASSED = (nn.Identity, nn.Flatten, nn.Unflatten)
WEIGHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh),
)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
POOLS = (*MAX_POOLS, *GLOBAL_POOLS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _chain(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(module, nn.Sequential):
        for child, one in module.named_children():
            yield from _chain(one, f"{name}.{child}" if name else child)
    else:
        yield name, module


def _as_numpy(module: nn.Module) -> Callable[[Any], Any]:
    return lambda u: module(torch.from_numpy(u)).numpy()


def _through(function: Callable[[Any], Any], mean: float, variance: float) -> tuple[float, float]:
    """Mean and variance of ``f(u)`` for normal u."""
    if variance == 0:
        return float(function(np.array([mean]))[0]), 0.0
    square = moments(lambda u: function(u + mean), variance)[0]
    above = moments(lambda u: function(u + mean) + 1, variance)[0]
    found = (above - square - 1) / 2  # E f, from E (f + 1)²
    return found, max(square - found**2, 0.0)


def _largest(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of so many standard normals, of density ``k Φ(z)^(k-1) φ(z)``."""

    def root(z: Any) -> Any:
        return (count * ndtr(z) ** (count - 1)) ** 0.5

    square = moments(lambda z: root(z) * z)[0]
    mean = (moments(lambda z: root(z) * (z + 1))[0] - square - 1) / 2
    return mean, square - mean**2


def _window(pool: Any, places: int, left: int) -> int:
    """The number of values that a pool takes together."""
    if isinstance(pool, GLOBAL_POOLS):
        return places // left
    size, axes = pool.kernel_size, int(type(pool).__name__[-2])
    return int(size**axes if isinstance(size, int) else math.prod(size))


def balanced_(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    loss: str,
    seed: int,
    steps: int = 10,
    num_probes: int | None = 8,
    tol: float = 0.005,
) -> None:
    """Scales the layers' weights until all have the same curvature h_k, the product of the factors being one.

    The balance that the closed form has in expectation, on the data. Where activations are homogeneous, a factor s on
    weight k divides its own h_k by s² against the others', and one step is exact; else it is repeated for as long as
    the spread falls, and the best is kept. The factors stay within 1/4 and 4. Meant for plain nets: others may have no
    such balance, as skip connections and norms undo what a factor does.

    Args:
        model: with its weights drawn.
        batch: inputs and targets.
        loss: its name.
        seed: of the probes.
        steps: at most.
        num_probes: of :func:`hessinit.curvature.layer_traces`; None for exact traces.
        tol: relative spread of the curvatures at which to stop.
    """
    drawn = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and isinstance(model.get_submodule(name.rpartition(".")[0]), LAYERS)
    }
    logs = best = np.zeros(len(drawn))
    lowest = math.inf
    for _ in range(steps):
        traces = curvature.layer_traces(
            model, batch, loss, num_probes, params=list(drawn), seed=seed, training=True, progress=False
        )
        found = np.array(list(traces.values()))
        if not (np.isfinite(found) & (found > 0)).all():
            break
        off = np.log(found) - np.log(found).mean()
        spread = float(np.abs(off).max())
        if spread >= lowest:
            break
        best, lowest = logs, spread
        if spread < tol:
            break
        logs = logs + off / 2
        # The sum of the logarithms stays at zero, as it would not by clipping them.
        logs *= min(1.0, math.log(MAX_FACTOR) / np.abs(logs).max())
        _scale(model, drawn, logs)
    _scale(model, drawn, best)


@torch.no_grad()
def _scale(model: nn.Module, drawn: dict[str, torch.Tensor], logs: Any) -> None:
    for (name, weight), log in zip(drawn.items(), logs, strict=True):
        model.get_parameter(name).copy_(weight * math.exp(log))
