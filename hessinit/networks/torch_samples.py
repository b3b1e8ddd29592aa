"""Squares of each sample's own derivatives, for all samples in one backward pass.

``Σ_s g_s²`` over samples s is not the square of ``Σ_s g_s``, which is all that a backward pass gives. But where a
parameter enters the model in one call of a function, such as ``F.linear(x, weight)``, what reaches the call's output in
the backward pass has a row a sample, and ``g_s`` is the derivative of that call alone.

Which calls those are, and which of their arguments have a row a sample, is found out by comparing a forward pass of the
whole batch with one of its first samples: the rows must be the same, all else too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_functorch: Any = torch._C._functorch  # whose stubs lack the switch below
MOST = 2**24  # entries of derivatives of single samples at a time
LARGE = 2**20  # multiplications in a sample's convolution, above which one after the other is faster than vmap
NEAR = {torch.float64: 1e-5, torch.float32: 1e-4}  # of rows computed among others; 2e-2 in half precision


Turn = Callable[[Tensor], Tensor]
# From what reaches the output of one sample, and that sample's rows, to the derivatives of the parameters.
OfSample = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Call:
    """One call of a function that takes parameters.

    Args:
        function: of torch.
        arguments: positional and by keyword, flat.
        structure: of the arguments.
        names: of parameters, by their place among the arguments.
        back: of parameters that came in another shape or order of axes, by name: puts a tensor like that into theirs.
        edge: of the output, as it was when it came.
        output: shape.
    """

    function: Callable[..., Tensor]
    arguments: Sequence[Any]
    structure: Any
    names: Mapping[int, str]
    back: Mapping[str, Turn]
    edge: GradientEdge
    output: torch.Size


class Calls(TorchFunctionMode):
    """Records the calls that take some tensors.

    Args:
        leaves: by name.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._turned: dict[int, tuple[Tensor, Turn]] = {}  # parameters in another shape, kept alive, and the way back
        self._uses: Counter[str] = Counter()
        self._calls: list[Call] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        flat, structure = tree_flatten((tuple(args), dict(kwargs or {})))
        before = _versions(flat)
        made = func(*args, **(kwargs or {}))
        names = {k: self._names[id(x)] for k, x in enumerate(flat) if id(x) in self._names}
        outputs = [x for x in tree_flatten(made)[0] if isinstance(x, Tensor) and id(x) not in self._names]
        if not names or not outputs:  # to the device where it is, and the like, is no use
            return made
        if 0 in names and (func in _TURNS or func in _RESHAPES):
            turned, undo = flat[0], _way_back(func, flat[0], args[1:], kwargs or {})
            earlier = self._turned[id(turned)][1] if id(turned) in self._turned else None
            self._names[id(made)] = names[0]
            self._turned[id(made)] = (made, (lambda x: earlier(undo(x))) if earlier else undo)
            return made
        self._uses.update(names.values())
        in_place = _versions(flat) != before  # which must not be called again
        if isinstance(made, Tensor) and made.grad_fn is not None and not in_place:
            held = [x.detach() if isinstance(x, Tensor) else x for x in flat]
            back = {name: self._turned[id(flat[k])][1] for k, name in names.items() if id(flat[k]) in self._turned}
            self._calls.append(Call(func, held, structure, names, back, get_gradient_edge(made), made.shape))
        return made

    def once(self) -> list[Call]:
        """Calls of which every parameter enters in no other."""
        return [call for call in self._calls if all(self._uses[name] == 1 for name in call.names.values())]


def _versions(arguments: Sequence[Any]) -> list[int]:
    """Of the tensors among some arguments: how often each was written in place."""
    return [x._version for x in arguments if isinstance(x, Tensor) and not x.is_inference()]


def _way_back(func: Callable[..., Tensor], x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Turn:
    """What undoes a change of shape or of the order of axes."""
    if func in _RESHAPES:
        shape = x.shape
        return lambda made: made.reshape(shape)
    told = func(torch.empty([2 + k for k in range(x.ndim)], device="meta"), *args, **kwargs).shape  # axis k as 2 + k
    order = [told.index(2 + k) for k in range(x.ndim)]
    return lambda made: made.permute(order)


def rows_apart(calls: Sequence[Call], few: Sequence[Call], samples: int, first: int) -> dict[str, Sequence[int]]:
    """By name of a parameter, which arguments of its call have a row a sample.

    Args:
        calls: of a batch.
        few: of its first samples.
        samples: in the batch.
        first: how many these are.
    """
    found: dict[str, Sequence[int]] = {}
    if len(calls) != len(few):
        return found
    for whole, part in zip(calls, few, strict=True):
        rows: list[int] | None = []
        if (whole.function, whole.names) != (part.function, part.names) or len(whole.arguments) != len(part.arguments):
            return {}
        for k, (x, y) in enumerate(zip(whole.arguments, part.arguments, strict=True)):
            if not isinstance(x, Tensor) or k in whole.names or rows is None:
                continue
            if x.shape == y.shape and near(x, y):
                continue
            apart = x.ndim == y.ndim > 0 and (x.shape[0], y.shape[0]) == (samples, first)
            rows = [*rows, k] if apart and near(x[:first], y) else None
        if rows and whole.output == (samples, *part.output[1:]):
            found |= dict.fromkeys(whole.names.values(), rows)
    return found


def near(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return bool(torch.equal(x, y))
    return bool((x - y).abs().max() <= NEAR.get(x.dtype, 2e-2) * y.abs().max()) if x.numel() else True


def parts(call: Call, rows: Sequence[int], reached: Tensor, total: bool = False) -> list[Tensor]:
    """What of ``Σ_s g_s²`` of a call's parameters has to be computed for each backward pass; several passes add up.

    Args:
        call: whose parameters enter nowhere else.
        rows: its arguments with a row a sample.
        reached: what the backward pass brings to its output.
        total: whether the sums of the squares are enough.
    """
    wide = reached.dtype if reached.dtype == torch.float64 else torch.float32
    if _is_product(call, rows):
        if reached.ndim == 2:
            return [_lengths(reached, wide) if total else reached.to(wide).square()]
        return _of_products(call, reached.flatten(1, -2).to(wide), total)
    parameters = [call.arguments[place] for place in call.names]
    batched = [reached, *(call.arguments[k] for k in rows)]
    entries = max(sum(p.numel() for p in parameters), 1)
    sums = [torch.zeros_like(p, dtype=wide) for p in parameters]

    def one_by_one(derivatives: OfSample) -> None:
        for row in zip(*batched, strict=True):
            for squared, g in zip(sums, derivatives(*row), strict=True):
                squared.addcmul_(g.to(wide), g.to(wide))

    def together(derivatives: OfSample) -> None:
        for some in zip(*(x.split(max(1, MOST // entries)) for x in batched), strict=True):
            for squared, g in zip(sums, torch.func.vmap(derivatives)(*some), strict=True):
                squared.add_(g.to(wide).square().sum(0))

    node: Any = call.edge.node
    if node.name() == "ConvolutionBackward0" and rows == [0] and call.names.keys() <= {1, 2}:
        batched[1] = node._saved_input.detach()  # padded, where that is apart
        if total and _is_unrolled(node, reached):
            return _of_unrolled(node, call.names, reached.to(wide), batched[1].to(wide))
        of_many = of_one = _of_convolution(node, call.names)
        if entries * math.prod(reached.shape[2:]) > LARGE:
            one_by_one(of_one)
            return sums
    else:
        of_many, of_one = _of_function(call, rows, parameters), _of_any_function(call, rows, parameters)
    falls_back = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)  # which would be slower, with a warning
    try:
        together(of_many)
    except RuntimeError:  # of a function that has no rule for vmap
        for squared in sums:
            squared.zero_()
        one_by_one(of_one)
    finally:
        _functorch._set_vmap_fallback_enabled(falls_back)
    return sums


def squares(call: Call, rows: Sequence[int], sums: Sequence[Tensor], total: bool = False) -> dict[str, Tensor]:
    """``Σ_s g_s²`` of a call's parameters, by name, in at least single precision, from the sums of its parts.

    Or their sums, for parts of sums.
    """
    if _is_product(call, rows) and len(call.output) == 2:
        into, x, wide = sums[0], call.arguments[0], sums[0].dtype
        if total:
            sums = [into if place == 2 else into @ _lengths(x, wide) for place in call.names]
        else:
            x, turned = x.to(wide).square(), call.function is F.linear
            sums = [into.sum(0) if place == 2 else into.T @ x if turned else x.T @ into for place in call.names]
    if total:
        return dict(zip(call.names.values(), (s.sum() for s in sums), strict=True))
    named = zip(call.names.values(), sums, strict=True)
    return {name: call.back[name](s) if name in call.back else s for name, s in named}


def _lengths(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of each row's length."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    return lengths.square()


def _is_product(call: Call, rows: Sequence[int]) -> bool:
    """Of rows of numbers and a matrix of parameters: with one row a sample, ``Σ_s g_s²`` is a product of squares."""
    if call.function not in _MATRICES or rows != [0] or not call.names.keys() <= {1, 2}:
        return False
    x, weight = call.arguments[:2]
    return bool(len(call.output) == x.ndim > 1 and weight.ndim == 2)


def _of_products(call: Call, reached: Tensor, total: bool) -> list[Tensor]:
    """Of many rows a sample, ``g_s = U_sᵀ X_s``, whose squares have the sum of ``U_s U_sᵀ ⊙ X_s X_sᵀ``."""
    x = call.arguments[0].flatten(1, -2).to(reached.dtype)
    (_, rows, inputs), outputs = x.shape, reached.shape[2]
    of_rows = total and _are_few(rows, inputs, outputs)
    most = max(1, MOST // max(1, rows * rows if of_rows else inputs * outputs))
    left, right = (reached, x) if call.function is F.linear else (x, reached)

    def weight() -> Tensor:
        some = zip(left.split(most), right.split(most), strict=True)
        if of_rows:
            return _sum_by_rows(some)
        squared = left.new_zeros(left.shape[2], right.shape[2])
        for u, v in some:
            squared += (u.mT @ v).square().sum(0)
        return squared

    return [weight() if place == 1 else reached.sum(1).square().sum(0) for place in call.names]


def _are_few(rows: int, inputs: int, outputs: int) -> bool:
    """Whether products of rows are less to compute than derivatives."""
    return rows * (inputs + outputs) < inputs * outputs


def _sum_by_rows(some: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """``Σ_s |U_sᵀ X_s|²``, of some samples after the other."""
    return torch.stack([torch.sum((u @ u.mT) * (x @ x.mT)) for u, x in some]).sum()


def _is_unrolled(node: Any, reached: Tensor) -> bool:
    """Of a convolution with few positions, whose sum of squares is least to compute as that of the product it is."""
    weight = node._saved_weight
    plain = weight.ndim == 4 and node._saved_groups == 1 and not node._saved_transposed
    return plain and _are_few(math.prod(reached.shape[2:]), weight[0].numel(), len(weight))


def _of_unrolled(node: Any, names: Mapping[int, str], reached: Tensor, x: Tensor) -> list[Tensor]:
    """The sums of squares of a convolution's parameters, a row a position."""
    kernel, u = node._saved_weight.shape[2:], reached.flatten(2).mT
    steps = node._saved_dilation, node._saved_padding, node._saved_stride
    most = max(1, MOST // max(1, u.shape[1] * max(u.shape[1], node._saved_weight[0].numel())))

    def weight() -> Tensor:
        unrolled = (F.unfold(images, kernel, *steps).mT for images in torch.split(x, most))
        return _sum_by_rows(zip(torch.split(u, most), unrolled, strict=True))

    return [weight() if place == 1 else u.sum(1).square().sum(0) for place in names]


def _of_convolution(node: Any, names: Mapping[int, str]) -> OfSample:
    """As torch's backward pass does it, without the forward pass that the others need."""
    weight, bias = node._saved_weight.detach(), node._saved_bias_sym_sizes_opt
    steps = node._saved_stride, node._saved_padding, node._saved_dilation
    rest = node._saved_transposed, node._saved_output_padding, node._saved_groups
    wanted = [False, 1 in names, 2 in names]

    def derivatives(reached: Tensor, x: Tensor) -> list[Tensor]:
        found = torch.ops.aten.convolution_backward(reached[None], x[None], weight, bias, *steps, *rest, wanted)
        return [found[place] for place in names]

    return derivatives


def _once_more(call: Call, rows: Sequence[int], parameters: Sequence[Tensor], sample: Sequence[Tensor]) -> Tensor:
    """The call with other parameters, of one sample."""
    given = dict(zip(call.names, parameters, strict=True)) | dict(zip(rows, (x[None] for x in sample), strict=True))
    args, kwargs = tree_unflatten([given.get(k, x) for k, x in enumerate(call.arguments)], call.structure)
    return call.function(*args, **kwargs)


def _of_function(call: Call, rows: Sequence[int], parameters: Sequence[Tensor]) -> OfSample:
    """For vmap."""

    def derivatives(reached: Tensor, *sample: Tensor) -> Sequence[Tensor]:
        pull = torch.func.vjp(lambda *given: _once_more(call, rows, given, sample), *parameters)[1]
        pulled: Sequence[Tensor] = pull(reached[None])
        return pulled

    return derivatives


def _of_any_function(call: Call, rows: Sequence[int], parameters: Sequence[Tensor]) -> OfSample:
    """For one sample at a time."""
    leaves = [p.detach().requires_grad_() for p in parameters]

    def derivatives(reached: Tensor, *sample: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            made = _once_more(call, rows, leaves, sample)
        return torch.autograd.grad(made, leaves, reached[None])

    return derivatives


_TURNS = {
    *(torch.permute, torch.transpose, torch.swapaxes, torch.movedim, torch.t),
    *(Tensor.permute, Tensor.transpose, Tensor.swapaxes, Tensor.movedim, Tensor.t),
    *(getattr(Tensor.T, "__get__"), getattr(Tensor.mT, "__get__")),  # noqa: B009 - which mypy does not know
}
_RESHAPES = {
    *(torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze),
    *(Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze),
    *(Tensor.view, Tensor.view_as, Tensor.reshape_as, Tensor.contiguous),
}
_MATRICES = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
