"""Weights that no module tells: of a parameter that a function takes, which of its axes are inputs and outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hessinit.layout import Layout

_CONVOLUTION = re.compile("conv(_transpose)?([123])d")
_PRODUCTS = {"matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_GROUPED = {"grouped_mm", "_grouped_mm"}  # of rows that are sorted by expert, and a matrix for each
_COPIES = {"to", "type", "float", "half", "bfloat16", "double", "clone", "contiguous", "__getitem__", "index_select"}
"""What makes another tensor of a parameter, or of some of its copies."""


class Others:
    """Parameters of which no module tells what they are, and what the calls of one pass tell.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._names = WeakIdKeyDictionary({tensor: name for name, tensor in parameters.items()})  # and of copies
        self.layouts: dict[str, Layout] = {}  # of those that are weights
        self.biases: dict[str, str] = {}  # by weight, those that are its bias

    def weight(self, function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, str] | None:
        """The tensor that a call takes as its weight, with the name of the parameter that it is.

        None where there is none, or where two of these are combined.

        Args:
            function: its name.
            args: of the call, none of which is known for a weight.
            kwargs: likewise.
        """
        calls = list(_taken(function, args, kwargs)) if self._names else []
        found = [(call, whole) for call in calls if (whole := self._whole(call.weight)) is not None]
        if len(found) != 1:
            return None
        call, whole = found[0]
        told, name, bias = _layout(whole, call), str(self._names[whole]), self._whole(call.bias)
        if told is None:
            return None
        self.layouts.setdefault(name, told)
        self.biases |= {} if bias is None else {name: str(self._names[bias])}
        return call.weight, name

    def bias(self, weights: Iterable[str], terms: Sequence[torch.Tensor]) -> bool:
        """Whether a sum adds one of these to the outputs of such weights: their bias."""
        biases = [str(self._names[whole]) for t in terms if t.ndim == 1 and (whole := self._whole(t)) is not None]
        own = self.layouts.keys() & weights
        self.biases |= dict.fromkeys(own, biases[0]) if biases else {}
        return bool(own and biases)

    def token(self, tensor: torch.Tensor) -> str:
        """The name of a parameter of zeros that lies beside others' outputs, one token or more; "" for any other."""
        whole = self._whole(tensor)
        if whole is None or whole.ndim < 2 or tensor.shape[-1] != whole.shape[-1] or torch.any(whole):
            return ""
        name = str(self._names[whole])
        self.layouts.setdefault(name, Layout("v" * (whole.ndim - 1) + "o"))
        return name

    def copied(self, function: str, given: Sequence[torch.Tensor], made: torch.Tensor) -> None:
        """Knows what a call has made again, if it is a copy with the same axes."""
        if function in _COPIES and given[0] in self._names and _axes(made) == _axes(given[0]):
            self._names[made] = self._names[given[0]]

    def _whole(self, tensor: Any) -> torch.Tensor | None:
        """Which of these a tensor is, or is a view of."""
        whole = tensor._base if isinstance(tensor, torch.Tensor) and tensor._is_view() else tensor
        return whole if isinstance(whole, torch.Tensor) and whole in self._names else None


class _Taken(NamedTuple):
    """A tensor in its place as a weight.

    Args:
        weight: the tensor.
        axes: what each is, in the letters of :class:`~hessinit.layout.Layout`.
        bias: in its place.
        groups: of channels.
        stride: product of a convolution's strides.
        transposed: whether the convolution is.
    """

    weight: Any
    axes: Sequence[str]
    bias: Any = None
    groups: int = 1
    stride: int = 1
    transposed: bool = False


def _taken(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[_Taken]:
    """The arguments of one of torch's functions that are weights if they are parameters; of a product either may be.

    Args:
        name: of the function.
        args: of the call.
        kwargs: likewise.
    """

    def argument(place: int, key: str, default: Any = None) -> Any:
        return args[place] if place < len(args) else kwargs.get(key, default)

    weight, bias = argument(1, "weight"), argument(2, "bias")
    if name == "linear":
        yield _Taken(weight, "oi", bias)
    elif name == "embedding":
        yield _Taken(weight, "vo")
    elif convolution := _CONVOLUTION.fullmatch(name):
        transposed, space = bool(convolution[1]), int(convolution[2])
        axes = [*(("(gi)", "o") if transposed else ("(go)", "i")), *("k" * space)]
        stride = positions(argument(3, "stride", 1), space)
        yield _Taken(weight, axes, bias, argument(6, "groups", 1), stride, transposed)
    elif name in _PRODUCTS:
        left, right = (argument(place, key) for place, key in zip(_PRODUCTS[name], ("", "other"), strict=True))
        for tensor, ends in ((right, "io"), (left, "oi")):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                yield _Taken(tensor, "g" * (tensor.ndim - 2) + ends)
    elif name in _GROUPED and weight is not None and weight.ndim == 3:
        yield _Taken(weight, "gio")
    elif name == "einsum" and isinstance(args[0], str):
        yield from _of_sum(args[0].replace(" ", ""), args[1] if isinstance(args[1], (list, tuple)) else args[1:])


def _of_sum(equation: str, operands: Sequence[Any]) -> Iterator[_Taken]:
    """Of two operands either one: what it shares with the other alone is summed over, and with all is in groups."""
    inputs, _, output = equation.partition("->")
    letters = {(True, False): "i", (False, True): "o", (True, True): "g"}
    of_each = inputs.split(",")
    for axes, other, tensor in zip(of_each, reversed(of_each), operands, strict=True) if len(of_each) == 2 else ():
        told = [letters.get((axis in other, axis in output), "") for axis in axes]
        if output and axes.isalpha() and all(told):
            yield _Taken(tensor, told)


def _layout(parameter: torch.Tensor, call: _Taken) -> Layout | None:
    """The layout of a parameter that a call takes as its weight, or a view of it; None where that cannot be told.

    Axes that the view lacks, as an expert's among others, are copies.
    """
    told = ["g"] * parameter.ndim
    places = _places(parameter, call.weight)
    if places is None or len(places) != len(call.axes) or (call.groups > 1 and call.weight.shape != parameter.shape):
        return None
    for place, letter in zip(places, call.axes, strict=True):
        told[place] = letter
    if not any("o" in letter for letter in told):
        return None
    return Layout("".join(told), call.groups, call.stride, call.transposed)


def _axes(tensor: torch.Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Strides, and the sizes of all axes but the first."""
    return tensor.stride(), tensor.shape[1:]


def _places(parameter: torch.Tensor, view: torch.Tensor) -> list[int] | None:
    """Of each axis of a view, the axis of the parameter that it is; known by its stride."""
    if view.shape == parameter.shape and view.stride() == parameter.stride():
        return list(range(parameter.ndim))
    strides = list(parameter.stride())
    if len({*strides}) < len(strides) or not {*view.stride()} <= {*strides}:
        return None
    places = [strides.index(stride) for stride in view.stride()]
    return places if len({*places}) == len(places) else None


def positions(kernel: int | Sequence[int], axes: int) -> int:
    """Of a kernel or strides, given as torch takes them: one number for all axes, or one each."""
    sizes = [kernel] if isinstance(kernel, int) else list(kernel)
    return math.prod(sizes if len(sizes) == axes else sizes * axes)
