"""What each axis of a weight does, and the fans that follow from it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_TOKEN = re.compile(r"\(g[io]\)|\.\.\.|[iokgv]")


class Fans(NamedTuple):
    """Effective fans: connections into one output unit, and out of one input unit."""

    fan_in: float
    fan_out: float


class Axis(NamedTuple):
    """One axis of a weight, or one factor of an axis that packs two."""

    letter: str
    size: int


@dataclass(frozen=True)
class Layout:
    """The axes of a weight, one letter each.

    ======  ==========================================================================================
    letter  meaning
    ======  ==========================================================================================
    ``i``   input units
    ``o``   output units
    ``k``   kernel positions
    ``g``   independent copies, drawn and counted apart: channel groups, packed projections, gates
    ``v``   entries looked up one at a time (an embedding's vocabulary): one connection
    ``…``   ``...``, all remaining axes, as kernel positions
    ======  ==========================================================================================

    ``(go)`` and ``(gi)`` are axes of length ``groups`` times the rest, the group outermost.

    Args:
        axes: for example ``"oi..."`` (torch), ``"...io"`` (Keras), ``"(go)i"`` (gates stacked in one matrix).
        groups: number of copies packed in a ``(go)`` or ``(gi)`` axis; default 1.
        stride: product of a convolution's strides; default 1.
        transposed: whether the weight is that of a transposed convolution; default False.

    Strides count: of the kernel positions an input unit of a convolution of stride s meets only one in s, so
    fan_out is divided by s; a transposed convolution is the mirror image, and its fan_in is. Thus a patch
    embedding (kernel = stride) has the fans of the dense layer that it is.

    Raises:
        ValueError: unknown letter, a letter missing, or a group or stride that is not a positive integer.

    Example:
        >>> Layout("(go)i...", groups=8).fans((64, 4, 3, 3))  # torch's Conv2d(32, 64, 3, groups=8)
        Fans(fan_in=36, fan_out=72)
        >>> Layout("oi...", stride=16 * 16).fans((256, 3, 16, 16))  # a ViT's patch embedding
        Fans(fan_in=768, fan_out=256)
    """

    axes: str
    groups: int = 1
    stride: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        tokens = _TOKEN.findall(self.axes) if isinstance(self.axes, str) else []
        if not tokens or "".join(tokens) != self.axes or tokens.count("...") > 1:
            raise ValueError(
                f"Layout: axes must be made of i, o, k, g, v, (gi), (go) and at most one '...'; got {self.axes!r}. "
                "torch's own order is 'oi...', that of Keras '...io'."
            )
        for name in ("groups", "stride"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Layout: {name} must be a positive integer; got {value!r}.")

    @property
    def looked_up(self) -> bool:
        """Whether one entry at a time is taken, as of an embedding."""
        return "v" in self.axes

    def expand(self, shape: Sequence[int]) -> list[Axis]:
        """The axes of a weight of this shape, packed ones as two.

        Raises:
            ValueError: the shape has another number of axes, or a packed axis is no multiple of ``groups``.
        """
        tokens = _TOKEN.findall(self.axes)
        rest = len(shape) - len(tokens) + ("..." in tokens)
        if rest < 0 or (rest > 0 and "..." not in tokens):
            raise ValueError(f"layout: axes must fit the shape; got {self.axes!r} for shape {tuple(shape)}.")
        letters = [t for token in tokens for t in (["k"] * rest if token == "..." else [token])]
        expanded = []
        for token, size in zip(letters, shape, strict=True):
            if len(token) == 1:
                expanded.append(Axis(token, int(size)))
                continue
            if size % self.groups:
                raise ValueError(
                    f"layout: axis {token} must be a multiple of groups={self.groups}; "
                    f"got {size} in shape {tuple(shape)}."
                )
            expanded += [Axis("g", self.groups), Axis(token[2], int(size) // self.groups)]
        return expanded

    def fans(self, shape: Sequence[int]) -> Fans:
        """Effective fans of a weight of this shape."""
        size = dict.fromkeys("iokgv", 1)
        for axis in self.expand(shape):
            size[axis.letter] *= axis.size
        fan_in, fan_out = size["i"] * size["k"], size["o"] * size["k"]
        if self.transposed:
            return Fans(_divide(fan_in, self.stride), fan_out)
        return Fans(fan_in, _divide(fan_out, self.stride))

    def blocks(self, shape: Sequence[int]) -> tuple[tuple[int, int, int], tuple[int, ...], tuple[int, ...]]:
        """How to lay a stack of matrices (copies, outputs, inputs) into a weight of this shape.

        Returns:
            The stack's shape (G, O, I); the shape to reshape it to; and the order in which to transpose that,
            after which a reshape to ``shape`` gives the weight. Kernel positions count as inputs.
        """
        axes = self.expand(shape)
        order = sorted(range(len(axes)), key=lambda j: "goivk".index(axes[j].letter))
        stack = tuple(math.prod(a.size for a in axes if a.letter in letters) for letters in ("g", "o", "ivk"))
        sorted_shape = tuple(axes[j].size for j in order)
        back = tuple(order.index(j) for j in range(len(axes)))
        return (stack[0], stack[1], stack[2]), sorted_shape, back


def _divide(fan: int, stride: int) -> float:
    return fan // stride if fan % stride == 0 else fan / stride


TORCH = Layout("oi...")
KERAS = Layout("...io")
