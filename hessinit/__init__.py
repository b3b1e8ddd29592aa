"""Initial weights of neural networks from the curvature of their loss.

Importing the package imports neither PyTorch nor Keras; names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessinit import curvature
    from hessinit.keras import (
        HessianInit,
        HessianNormal,
        HessianOrthogonal,
        HessianTruncatedNormal,
        HessianUniform,
    )
    from hessinit.model import init_, rescale_
    from hessinit.report import Report

__version__ = "0.1.0"

_HOME = {
    "init_": "hessinit.model",
    "rescale_": "hessinit.model",
    "Report": "hessinit.report",
    "HessianInit": "hessinit.keras",
    "HessianNormal": "hessinit.keras",
    "HessianOrthogonal": "hessinit.keras",
    "HessianTruncatedNormal": "hessinit.keras",
    "HessianUniform": "hessinit.keras",
}

__all__ = [
    "HessianInit",
    "HessianNormal",
    "HessianOrthogonal",
    "HessianTruncatedNormal",
    "HessianUniform",
    "Report",
    "curvature",
    "init_",
    "rescale_",
]


def __getattr__(name: str) -> Any:
    if name == "curvature":
        return importlib.import_module("hessinit.curvature")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, "curvature"])
