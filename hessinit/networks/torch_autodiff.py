"""PyTorch's arrays and derivatives, and a model as a pure function of its parameters."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from hessinit.batches import at_the_end
from hessinit.networks.base import Bend, Derivatives, Function, Named, Pull, Squares
from hessinit.networks.torch_samples import Call, Calls, near, parts, rows_apart, squares

T = TypeVar("T")


class TorchArrays:
    """:class:`hessinit.networks.base.Arrays` of ``torch``."""

    exp, log, sqrt, abs = (staticmethod(f) for f in (torch.exp, torch.log, torch.sqrt, torch.abs))
    where, sigmoid, softplus = (staticmethod(f) for f in (torch.where, torch.sigmoid, F.softplus))
    reshape = staticmethod(torch.reshape)

    def is_array(self, x: Any) -> bool:
        return isinstance(x, Tensor)

    def is_floating(self, x: Tensor) -> bool:
        return x.is_floating_point()

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, low, high)

    def asarray(self, x: Any, like: Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)

    def numpy(self, x: Tensor) -> npt.NDArray[Any]:
        x = x.detach().cpu()
        array: npt.NDArray[Any] = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
        return array

    def take(self, x: Tensor, rows: npt.NDArray[np.intp]) -> Tensor:
        return x[torch.from_numpy(rows).to(x.device)]

    def concatenate(self, arrays: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.cat(list(arrays), dim=axis)

    def sum(self, x: Tensor, axis: int | None = None) -> Tensor:
        return torch.sum(x) if axis is None else torch.sum(x, dim=axis, keepdim=True)

    def dot(self, x: Tensor, y: Tensor) -> float:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return float(torch.dot(x.detach().reshape(-1).to(wide), y.detach().reshape(-1).to(wide)))

    def finite(self, x: Tensor) -> bool:
        return bool(torch.isfinite(x.detach()).all())

    def log_softmax(self, x: Tensor, axis: int) -> Tensor:
        return torch.log_softmax(x, dim=axis)

    def one_hot(self, labels: Tensor, classes: int, axis: int, like: Tensor) -> Tensor:
        return F.one_hot(labels.long(), classes).movedim(-1, axis).to(like.dtype)


class TorchDerivatives(Derivatives):
    """:class:`hessinit.networks.base.Derivatives` of ``torch``: dual numbers forward, autograd in reverse.

    Operations without a forward-mode formula go a slower way, ``J v`` as the derivative of ``u → Jᵀu``.
    """

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Tensor, Tensor]:
        def forward() -> tuple[Tensor, Tensor]:
            with torch.no_grad(), forward_ad.dual_level():
                z, dz = forward_ad.unpack_dual(f(_duals(_detached(values), tangents)))
                return z, torch.zeros_like(z) if dz is None else dz

        return _forward_or_reverse(forward, lambda: _jvp_in_reverse(f, values, tangents, [])[:2])

    def vjp(self, f: Function, values: Named) -> tuple[Tensor, Pull]:
        with torch.enable_grad():
            leaves = _leaves(values)
            z = f(leaves)
        return z.detach(), _pull(z, leaves, lambda: f(leaves))

    def jvp_vjp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Tensor, Tensor, Pull]:
        def forward() -> tuple[Tensor, Tensor, Pull]:
            with torch.enable_grad(), forward_ad.dual_level():
                leaves, constants = _leaves_and_constants(values, rows)
                z, dz = forward_ad.unpack_dual(f(_duals({**constants, **leaves}, tangents)))
            # The pull-back runs after the dual level has ended, so the tangents cost it nothing.
            pull = _pull(z, leaves, lambda: f({**constants, **leaves}))
            return z.detach(), torch.zeros_like(z) if dz is None else dz.detach(), pull

        return _forward_or_reverse(forward, lambda: _jvp_in_reverse(f, values, tangents, rows))

    def gradient(self, f: Function, values: Named) -> tuple[Tensor, dict[str, Tensor]]:
        value, pull = self.vjp(f, values)
        return value, pull(torch.ones_like(value))

    def hvp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        value, along = _curve(f, values, list(tangents), rows, keep=False)
        return value, along(tangents)

    def bend(
        self, f: Function, along: Callable[[Tensor], Function], values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Tensor, Pull, Bend]:
        leaves = _leaves(values)
        with torch.enable_grad():
            z = f(leaves)

        def bend(c: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            with torch.enable_grad():
                try:
                    u = _derivable(z, leaves, cols, c)
                except CheckpointError:
                    u = _derivable(f(leaves), leaves, cols, c)
            bent = _second(_edges(u), leaves, rows, keep=False)({name: g.detach() for name, g in u.items()})
            return {n: u[n].detach() if n in u else torch.zeros_like(leaves[n]) for n in cols}, bent

        return z.detach(), _pull(z, leaves, lambda: f(leaves)), bend

    def linearize(
        self, f: Function, values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Tensor, Callable[[Named], Tensor], Pull]:
        leaves = _leaves(values)
        with torch.enable_grad():
            z = f(leaves)

        def forward(tangents: Named) -> Tensor:
            return self.jvp(f, values, tangents)[1]

        push: Callable[[Named], Tensor] = forward
        if not any("Convolution" in node.name() for node in _ancestors([z])):  # of slow second derivatives
            with contextlib.suppress(RuntimeError):  # where there are none at all
                push = _push(z, leaves, cols)
        return z.detach(), push, _pull(z, {name: leaves[name] for name in rows}, lambda: f(leaves))

    def curve(
        self, f: Function, values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Tensor, Callable[[Named], dict[str, Tensor]]]:
        return _curve(f, values, cols, rows, keep=True)

    def squares(
        self, f: Function, few: Function, values: Named, names: Sequence[str], samples: int, first: int
    ) -> tuple[Tensor, Squares] | None:
        leaves, constants = _leaves_and_constants(values, names)

        def record(f: Function) -> tuple[Tensor, list[Call]]:
            with torch.enable_grad(), Calls(leaves) as calls:
                z = f({**constants, **leaves})
            return z, calls.once()

        z, calls = record(f)
        its, theirs = record(few)
        if z.shape[0] != samples or not near(z[:first], its):  # samples have to do with each other
            return None
        rows = rows_apart(calls, theirs, samples, first)
        parents = [parent for node in _ancestors([z]) for parent, _ in node.next_functions]
        uses = Counter(id(getattr(parent, "variable", None)) for parent in parents)  # seen by Calls or not
        rows = {name: places for name, places in rows.items() if uses[id(leaves[name])] <= 1}
        calls = [call for call in calls if rows.keys() >= set(call.names.values())]
        if not calls:
            return None
        told = [list(call.names.values()) for call in calls]
        others = [name for name in names if not any(name in some for some in told)]
        wanted: Any = [*(call.edge for call in calls), *(leaves[name] for name in others)]

        def pull(cotangents: Iterable[Tensor], total: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            sums: list[list[Tensor]] = [[] for _ in wanted]
            for cotangent in cotangents:
                reached = torch.autograd.grad(z, wanted, cotangent, retain_graph=True, allow_unused=True)
                for k, u in enumerate(reached):
                    if u is not None:
                        new = parts(calls[k], rows[told[k][0]], u, total) if k < len(calls) else [u]
                        sums[k] = [s + n for s, n in zip(sums[k], new, strict=True)] if sums[k] else new
            squared: dict[str, Tensor] = {}
            for call, into, some in zip(calls, told, sums, strict=False):
                squared |= (
                    squares(call, rows[into[0]], some, total)
                    if some
                    else {name: torch.zeros_like(leaves[name]) for name in into}
                )
            rest = zip(others, sums[len(calls) :], strict=True)
            return squared, {name: some[0] if some else torch.zeros_like(leaves[name]) for name, some in rest}

        return z.detach(), pull


def _curve(
    f: Function, values: Named, cols: Sequence[str], rows: Sequence[str], keep: bool
) -> tuple[Tensor, Callable[[Named], dict[str, Tensor]]]:
    """A scalar ``f(values)`` and ``v → D²f v``, to be called once unless it is kept.

    H is symmetric: the rows of H v are the derivative of gᵀv, g and v on the columns. Dual numbers in the gradient
    would take half as much memory again, and more time but for convolutions.
    """
    with torch.enable_grad():
        leaves = _leaves(values)
        value = f(leaves)
        edges = _edges(_derivable(value, leaves, cols))
    return value.detach(), _second(edges, leaves, rows, keep)


def _derivable(z: Tensor, leaves: Named, names: Sequence[str], c: Tensor | None = None) -> dict[str, Tensor]:
    """``∇ cᵀz`` by name, such that it can be derived in turn; without those on which z does not depend.

    Raises:
        RuntimeError: a backward function cannot be differentiated.
    """
    if not z.requires_grad:
        return {}
    found = torch.autograd.grad(z, [leaves[name] for name in names], c, create_graph=True, allow_unused=True)
    _check_differentiable(found)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def _edges(gradient: Named) -> dict[str, GradientEdge]:
    """Where a derivative of gradients begins, without their values, which are as large as all parameters."""
    return {name: get_gradient_edge(g) for name, g in gradient.items() if g.requires_grad}


def _second(
    gradient: Mapping[str, GradientEdge], leaves: Named, rows: Sequence[str], keep: bool
) -> Callable[[Named], dict[str, Tensor]]:
    """The map from v to the rows of the derivative of ``gᵀv``, to be called once unless it is kept."""

    def along(tangents: Named) -> dict[str, Tensor]:
        if not gradient:
            return {name: torch.zeros_like(leaves[name]) for name in rows}
        into, directions = [leaves[name] for name in rows], [tangents[name] for name in gradient]
        found = torch.autograd.grad([*gradient.values()], into, directions, retain_graph=keep, allow_unused=True)
        return {n: torch.zeros_like(leaf) if h is None else h for n, leaf, h in zip(rows, into, found, strict=True)}

    return along


def _push(z: Tensor, leaves: Mapping[str, Tensor], cols: Sequence[str]) -> Callable[[Named], Tensor]:
    """The map ``v → J v`` as the derivative of ``u → uᵀJ v``, for many v.

    Raises:
        RuntimeError: a backward function cannot be differentiated.
    """
    with torch.enable_grad():
        u = torch.zeros_like(z, requires_grad=True)
        moved = [leaves[name] for name in cols if z.requires_grad]
        pulled = torch.autograd.grad(z, moved, u, create_graph=True, allow_unused=True) if moved else ()
        _check_differentiable(pulled)
    reached = {name: g for name, g in zip(cols, pulled, strict=False) if g is not None and g.requires_grad}

    def push(tangents: Named) -> Tensor:
        if not reached:
            return torch.zeros_like(z)
        directions = [tangents[name] for name in reached]
        return torch.autograd.grad(list(reached.values()), u, directions, retain_graph=True)[0]

    return push


def _jvp_in_reverse(f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Tensor, Tensor, Pull]:
    with torch.enable_grad():
        leaves = _leaves(values)
        z = f(leaves)
    dz = _push(z, leaves, list(tangents))(tangents)
    return z.detach(), dz.detach(), _pull(z, {name: leaves[name] for name in rows})


def _forward_or_reverse(forward: Callable[[], T], reverse: Callable[[], T]) -> T:
    """The answer in forward mode, or in reverse mode where an operation has no forward formula."""
    try:
        return forward()
    except RuntimeError as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode", "jvp", "ZeroTensor")):
            raise
        first = error
    try:
        return reverse()
    except RuntimeError as second:
        failed = " and ".join(str(error).splitlines()[0].rstrip(".") for error in (first, second))
        raise RuntimeError(
            f"an operation has neither a forward-mode derivative nor a second one in reverse mode ({failed}): give it "
            "one (torch.autograd.Function.jvp, or a backward that can be differentiated), or leave out the parameters "
            "before it with params="
        ) from first


def _check_differentiable(tensors: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError if a backward function that cannot be differentiated is among these tensors' ancestors.

    ``torch.autograd.grad`` would leave its share out without a word.
    """
    if any(node.name().endswith(("Error", "NotImplemented")) for node in _ancestors(tensors)):
        raise RuntimeError("a backward function cannot be differentiated")


def _ancestors(tensors: Sequence[Tensor | None]) -> Iterator[Node]:
    """The backward functions that led to some tensors."""
    nodes = [t.grad_fn for t in tensors if t is not None]
    met = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in met:
            continue
        met.add(node)
        yield node
        nodes += [parent for parent, _ in node.next_functions]


def _detached(values: Named) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _leaves(values: Named) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _leaves_and_constants(values: Named, rows: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return _leaves({n: values[n] for n in rows}), _detached({n: v for n, v in values.items() if n not in rows})


def _duals(values: Named, tangents: Named) -> dict[str, Tensor]:
    return {n: forward_ad.make_dual(v, tangents[n]) if n in tangents else v for n, v in values.items()}


def _pull(z: Tensor, leaves: Mapping[str, Tensor], again: Callable[[], Tensor] | None = None) -> Pull:
    """The map ``u → Jᵀu``; ``again`` computes z anew, for checkpoints whose recomputation meets other tensors."""

    def pull(cotangent: Tensor) -> dict[str, Tensor]:
        if not z.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        try:
            found = torch.autograd.grad(z, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True)
        except CheckpointError:
            if again is None:
                raise
            with torch.enable_grad():
                return _pull(again(), leaves)(cotangent)
        return {
            n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)
        }

    return pull


_DROPOUT = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


class _Differentiable(TorchFunctionMode):
    """Operations as ones that have right second derivatives, and dropout of every form as the identity.

    Args:
        dropout: whether dropout acts.
    """

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.dropout = dropout

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._weight_norm:  # the fused kernel has no forward mode, and a wrong second derivative
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if not self.dropout and func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if not self.dropout and func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {**dict(zip(_AFTER_MASK, args[4:], strict=False)), **kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


_AFTER_MASK = ("dropout_p", "is_causal")


_cuda = torch.backends.cuda
_SWITCHES: list[tuple[Callable[[], bool], Callable[[bool], Any], bool]] = [  # get, set, the state wanted
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp, False),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp, False),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp, False),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp, True),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
]
_RECURRENT_SWITCHES = [  # torch.backends' own contexts set more than these
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False),
]


@contextlib.contextmanager
def differentiable_kernels(recurrent: bool, compiled: bool) -> Iterator[None]:
    """Kernels that have derivatives of second order, for models with these modules; global switches are put back."""
    switches = [*_SWITCHES, *(_RECURRENT_SWITCHES if recurrent else [])]
    before = [get() for get, _, _ in switches]

    def restore() -> None:
        for (_, put, _), value in zip(switches, before, strict=True):
            put(value)

    with at_the_end(restore), torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        for _, put, wanted in switches:
            put(wanted)
        yield


def cuda_devices(model: nn.Module) -> set[torch.device]:
    """Of a model's parameters; the random state of the CPU needs no naming."""
    return {p.device for p in model.parameters() if p.device.type == "cuda"}


@lru_cache(maxsize=8)
def _random_state(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


@contextlib.contextmanager
def seeded(seed: int | None, cuda: Collection[torch.device]) -> Iterator[None]:
    """The global random state from a seed, or as it is for None; put back at the end."""
    cpu, on_cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in cuda}

    def restore() -> None:
        torch.set_rng_state(cpu)
        for device, state in on_cuda.items():
            torch.cuda.set_rng_state(state, device)

    with at_the_end(restore):
        if seed is not None:
            torch.set_rng_state(_random_state(seed))  # torch.manual_seed takes as long as a small model's forward pass
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Puts back a thread's modes, any of which an interruption between two lines of torch's own contexts leaves on."""
    grad, functions, level = torch.is_grad_enabled(), torch._C._len_torch_function_stack(), forward_ad._current_level

    def restore() -> None:
        torch.set_grad_enabled(grad)
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while forward_ad._current_level > level:
            forward_ad.exit_dual_level()

    with at_the_end(restore):
        yield


@contextlib.contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts back what modules hold under each name: parameters, buffers, submodules, hooks, modes, other attributes."""
    held = [
        place
        for m in modules
        for place in (m.__dict__, m._parameters, m._buffers, m._modules, m._forward_pre_hooks, m._forward_hooks)
    ]
    saved: list[tuple[dict[Any, Any], dict[Any, Any]]] = [(place, dict(place)) for place in held]

    def restore() -> None:
        for place, before in saved:
            place.clear()
            place.update(before)

    with at_the_end(restore):
        yield


@contextlib.contextmanager
def pure(
    model: nn.Module, tensors: Mapping[str, Tensor], training: bool | None, dropout: bool, seed: int
) -> Iterator[Callable[[Named, Callable[[], Any]], Any]]:
    """See :meth:`hessinit.networks.base.Network.pure`.

    Args:
        model: the model.
        tensors: its parameters by name; of tied ones the first name counts.
        training: mode of all modules, or None.
        dropout: whether dropout acts.
        seed: of the model's random choices.
    """
    modules = list(model.modules())
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    places = [(m, local, names.get(id(p)), p) for m in modules for local, p in m._parameters.items() if p is not None]
    buffers = [(m, local, b) for m in modules for local, b in m._buffers.items() if b is not None]
    recurrent = [m for m in modules if isinstance(m, nn.RNNBase)]
    compiled = any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in modules)
    cuda = cuda_devices(model)

    def apply(values: Named, run: Callable[[], Any]) -> Any:
        copies = {id(b): b.detach().clone() for _, _, b in buffers}
        for module, local, name, parameter in places:
            # A plain tensor in a parameter's place, as in torch.func.functional_call
            value = None if name is None else values.get(name)
            slots: dict[str, Any] = module._parameters
            slots[local] = parameter.detach() if value is None else value
        for module, local, buffer in buffers:
            module._buffers[local] = copies[id(buffer)]
        for module in recurrent:
            module.__dict__["_flat_weights"] = [module._parameters.get(n) for n in module._flat_weights_names]
        with seeded(seed, cuda), _Differentiable(dropout):
            return run()

    with attributes_kept(modules), modes_kept():
        for module in modules if training is not None else []:
            module.__dict__["training"] = training
        with differentiable_kernels(bool(recurrent), compiled):
            yield apply
