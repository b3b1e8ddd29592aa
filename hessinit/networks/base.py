"""What the library asks of a framework: the parameters of a model, what each is for, and how to write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hessinit.layout import Layout

WEIGHT, BIAS, NORM_SCALE, NORM_OFFSET, OTHER = "weight", "bias", "norm scale", "norm offset", "other"


@dataclass
class Parameter:
    """One parameter of a model and its role.

    Args:
        name: unique in the model, the framework's own.
        key: names the parameter's random stream: the same in every model built alike.
        shape: as stored.
        dtype: as the framework prints it.
        role: ``"weight"``, ``"bias"``, ``"norm scale"``, ``"norm offset"`` or ``"other"``.
        layout: axes of a weight, else None.
        tied_to: name of the parameter listed earlier that is this same tensor, or None.
        frozen: whether it does not train.
        left: why no call may write it (not materialised, parametrized, ...), or "".
        zero_row: index on the first axis that stays zero (an embedding's padding), or None.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    layout: Layout | None = None
    tied_to: str | None = None
    frozen: bool = False
    left: str = ""
    zero_row: int | None = None


@dataclass(frozen=True)
class Follower:
    """What follows a weight in the forward pass.

    Args:
        name: of the activation, for the report.
        function: the activation as a vectorised NumPy function, or its known name.
        depth: number of weight layers in the plain chain that the weight is part of (norm layers end a chain).
        input_moment: mean square of the data, where it meets its first weight here and inputs were given; else None.
    """

    name: str
    function: str | Callable[[Any], Any]
    depth: int | None = None
    input_moment: float | None = None


class Network(Protocol):
    """The adapter of one framework around one model."""

    def prepare(self, inputs: Any) -> None:
        """Lets a model that makes its parameters on its first call make them."""

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter, in the model's order, tied ones once for each name."""

    def followers(self, inputs: Any) -> Mapping[str, Follower]:
        """What follows each weight, by name, as far as it is known: from module order, or from one traced forward
        pass where ``inputs`` is not None. Changes nothing in the model.
        """

    def nonlinearity(self, nonlinearity: Any) -> str | Callable[[Any], Any]:
        """A nonlinearity that a user named or gave, in this framework's terms, as a name or a NumPy function."""

    def snapshot(self, name: str) -> Any:
        """A copy of a parameter, for :meth:`restore`."""

    def restore(self, name: str, saved: Any) -> None:
        """Writes a snapshot back, bit for bit."""

    def write(self, name: str, values: npt.NDArray[np.floating[Any]]) -> None:
        """Writes values into a parameter, cast to its dtype, on its device."""

    def seed(self, generator: Any) -> int:
        """A seed from the framework's generator; from None one that follows the global random state and leaves it."""
