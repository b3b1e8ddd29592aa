"""Weights that a module computes from other parameters: ``torch.nn.utils.parametrize`` and the older hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _Orthogonal, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hessinit.networks.torch_autodiff import attributes_kept

Inverse = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Derived:
    """One such weight.

    Args:
        module: that uses it.
        local: its name in the module.
        originals: full names of the parameters that it is computed from.
        kind: of the computation, for the report.
        inverse: of the weight, gives values of the originals, in order; None where there is no such thing.
        proportional: whether the weight is proportional to the first of the originals.
        source: the parametrization whose output it is; None for a hook, which leaves it in the module.
    """

    module: nn.Module
    local: str
    originals: tuple[str, ...]
    kind: str
    inverse: Inverse | None
    proportional: bool
    source: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        modules = [] if self.source is None else list(self.source.modules())
        with attributes_kept(modules), torch.no_grad():
            for module in modules:
                module.training = False  # in training mode to look at a spectral norm is to take a step of it
            return tuple(getattr(self.module, self.local).shape)


def derived(model: nn.Module) -> Iterator[Derived]:
    """Every weight of a model that is computed from other parameters."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if is_parametrized(module):
            lists: Any = module.parametrizations
            for local, chain in lists.items():
                originals = tuple(f"{dot}parametrizations.{local}.{name}" for name in chain._parameters)
                kind = ", ".join(type(one).__name__.strip("_") for one in chain)
                norm = len(chain) == 1 and isinstance(chain[0], _WeightNorm)
                yield Derived(module, local, originals, kind, _chain_inverse(chain), norm, chain)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                names = (f"{dot}{hook.name}_g", f"{dot}{hook.name}_v")
                yield Derived(module, hook.name, names, "WeightNorm", _norm_inverse(hook.dim), True)
            elif isinstance(hook, SpectralNorm):
                yield Derived(module, hook.name, (f"{dot}{hook.name}_orig",), "SpectralNorm", lambda w: (w,), False)


def _chain_inverse(chain: ParametrizationList) -> Inverse | None:
    """Of parametrizations one after the other, where each has an inverse and leaves the weight some freedom."""
    if any(isinstance(one, _Orthogonal) or not hasattr(one, "right_inverse") for one in chain):
        return None

    def inverse(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: Any = weight
        for one in reversed(list(chain)):
            found = one.right_inverse(found)  # type: ignore[operator]
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    return inverse


def _norm_inverse(dim: int) -> Inverse:
    return lambda weight: (torch.norm_except_dim(weight, 2, dim), weight)
