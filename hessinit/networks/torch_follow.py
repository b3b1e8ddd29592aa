"""What follows each weight of a ``torch.nn.Module``: from module order, or from one traced forward pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from hessinit.batches import ONE_AT_A_TIME, at_the_end, fixed_draws, random_states_kept
from hessinit.networks.base import Data, Follower
from hessinit.networks.graph import (
    BATCH,
    GATED,
    LINEAR,
    MAP,
    UNITS,
    State,
    Units,
    WeightGraph,
    is_activation,
    is_blank,
    is_norm,
)
from hessinit.networks.torch_autodiff import attributes_kept, cuda_devices, modes_kept, seeded
from hessinit.networks.torch_derived import Derived
from hessinit.networks.torch_functional import Others, positions

Array = npt.NDArray[np.floating[Any]]
NORM = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

# What is followed as gates.
_GATED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_GATED_FUNCTIONS = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_ATTENTION_FUNCTIONS = {"multi_head_attention_forward", "_native_multi_head_attention"}
_GATED_FUNCTIONS |= _ATTENTION_FUNCTIONS
_NORM_FUNCTIONS = {"batch_norm": BATCH, "group_norm": MAP, "instance_norm": MAP}
_NORM_FUNCTIONS |= dict.fromkeys(("layer_norm", "rms_norm", "normalize"), UNITS)
# What leaves a weight the same matrix, in another order, size or dtype.
_OF_WEIGHT = {"t", "transpose", "permute", "view", "reshape", "contiguous", "clone", "to", "type", "float", "half"}
_OF_WEIGHT |= {"bfloat16", "double", "mul", "__mul__", "__rmul__", "div", "__truediv__", "__get__"}
_FLATTENING = {"flatten", "reshape", "view", "squeeze", "mean"}
_REORDERING = {"transpose", "permute", "movedim", "swapaxes", "swapdims", "flip", "roll", "sort", "cumsum", "softmax"}
_REORDERING |= {"__getitem__", "__get__"}
# Axes of the kernel, by module and by function.
_AVERAGING: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_LOCAL = 3  # kernel above which a pooling, whose map is not known, is taken for one of the whole map
_AVERAGING_FUNCTIONS = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3}
_CONCATENATING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__rsub__"}
_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}


def as_numpy_function(function: Callable[..., Any]) -> Callable[[Array], Array]:
    """A torch function or module of one tensor as a function of one NumPy array.

    A module is copied and put in evaluation mode first, in float64, so that the original is not touched.
    """
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).eval().double().cpu()

    def call(u: Array) -> Array:
        with torch.no_grad(), ONE_AT_A_TIME:
            before = torch.get_rng_state()
            try:  # no context manager: an interruption may close one only after those around it
                result: Array = function(torch.from_numpy(np.array(u))).numpy()
            finally:
                torch.set_rng_state(before)
        return result

    return call


def _activation_of(module: nn.Module) -> Callable[[Array], Array] | None:
    """The module as a NumPy function if it is an activation, one made of several modules included."""
    if not isinstance(module, nn.PReLU) and any(True for _ in module.parameters()):
        return None
    function = as_numpy_function(module)
    return function if is_activation(function) else None


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module is the user's own and has no weights, but scales and offsets at most."""
    own = not type(module).__module__.startswith("torch.nn.")
    return own and not any(True for _ in module.children()) and all(p.ndim < 2 for p in module.parameters())


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def module_order(model: nn.Module, names: Mapping[int, str], computed: Sequence[Derived]) -> Mapping[str, Follower]:
    """Followers inside each ``nn.Sequential`` from the order of its modules, and of what tells by itself.

    What leaves a Sequential that is only a part of the model may meet anything, so weights whose follower would lie
    there are not in the answer. Gates, attention, embeddings and the feed-forward layers of torch's transformers are
    known wherever they stand.

    Args:
        model: the model.
        names: of its weights, by ``id``.
        computed: weights that are computed from others, each named as the first of them.
    """
    own: dict[int, list[str]] = {}
    for one in computed:
        own.setdefault(id(one.module), []).append(one.originals[0])
    found: dict[str, Follower] = {}
    inner = {id(c) for m in model.modules() if isinstance(m, nn.Sequential) for c in m if isinstance(c, nn.Sequential)}
    for sequential in model.modules():
        if not isinstance(sequential, nn.Sequential) or id(sequential) in inner:
            continue
        graph = WeightGraph(whole=sequential is model)
        state = graph.start()
        for module in _leaves(sequential):
            state = _step(graph, state, module, _weights(module, names, own))
        graph.end(state)
        found.update(graph.followers())
    for module in model.modules():
        for part, follower in _inside(module):
            for name in _weights(part, names, own):
                found.setdefault(name, follower)
    return found


def _inside(module: nn.Module) -> Iterator[tuple[nn.Module, Follower]]:
    """The module itself, or parts of it, of which it alone decides what follows."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield module, LINEAR
    if isinstance(module, _GATED):
        yield module, GATED
    if isinstance(module, nn.MultiheadAttention):
        yield module.out_proj, GATED
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        function = as_numpy_function(module.activation)
        if is_activation(function):
            name = getattr(module.activation, "__name__", type(module.activation).__name__)
            yield module.linear1, Follower(name, function)
        yield module.linear2, replace(LINEAR, post_norm=not module.norm_first)


def _weights(module: nn.Module, names: Mapping[int, str], computed: Mapping[int, list[str]]) -> list[str]:
    """Names of a module's own weights, and of those that it computes."""
    return [names[id(p)] for p in module._parameters.values() if id(p) in names] + computed.get(id(module), [])


def _step(graph: WeightGraph, state: State, module: nn.Module, weights: list[str]) -> State:
    """One module of a Sequential, with the names of its weights."""
    if weights:
        return graph.weights(state, weights, gates=isinstance(module, _GATED))
    if isinstance(module, NORM):
        return graph.norm(state)
    for kind, axes in _AVERAGING.items():
        if isinstance(module, kind):
            kernel: Any = module.kernel_size
            together = positions(kernel, axes)
            return graph.averaged(state, together) if together <= _LOCAL**axes else state
    function = _activation_of(module)
    if function is not None:
        return graph.activation(state, type(module).__name__, function)
    composed = any(True for _ in module.children()) or any(True for _ in module.parameters())
    return graph.unknown(state) if composed else state


class _Tracer(TorchFunctionMode):
    """Watches one forward pass: which weights each tensor came through, and what is done to it next."""

    def __init__(
        self,
        graph: WeightGraph,
        names: Mapping[int, str],
        computed: Sequence[Derived],
        others: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.graph, self.names = graph, names
        self.by_hooks = [one for one in computed if one.source is None]
        self.computed = WeakIdKeyDictionary()  # names of weights that parametrizations have computed
        self.others = Others(others)
        self.states = WeakIdKeyDictionary()  # of every tensor that came through a weight
        self.inside = 0  # modules that are activations or norms, met as wholes
        self.normalises = False  # whether the module of the user's own that runs now is a norm

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in _flatten((args, dict(kwargs))) if isinstance(t, torch.Tensor)]
        name = getattr(func, "__name__", "")
        weights = [known for t in given if (known := self._name(t))]
        told = None if weights else self.others.weight(name, args, kwargs)
        if told is not None:
            self.computed[told[0]] = told[1]
            weights = [told[1]]
        if name in _CONCATENATING and not weights:
            self._tokens(given)
        states = [self.states[t] for t in given if t in self.states]
        result = func(*args, **kwargs)
        made = [t for t in _flatten(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not made or name.endswith("_like") or name.startswith("new_"):
            return result  # a shape, a mask, noise: nothing of the signal
        self.others.copied(name, given, made[0])
        if weights and len(given) == 1 and name in _OF_WEIGHT:
            self.computed[result] = weights[0]
            return result
        alone = len(given) == 1  # besides a bias
        if weights:
            data = None if states else self._data(given, _is_blank(func, args, kwargs, result))
            ends = [n for n in weights if "out_proj" in n] if name in _ATTENTION_FUNCTIONS else []
            gates = name in _GATED_FUNCTIONS
            before, writers = self.graph.join(states), ends if gates else None
            state = self.graph.weights(before, weights, data, _units(name, given), writers, gates)
        elif self.inside or not states:
            return result
        else:
            state = self.graph.join(states, concatenated=name in _CONCATENATING)
            if name in _NORM_FUNCTIONS:
                state = self.graph.norm(state, _NORM_FUNCTIONS[name])
            elif name in _PRODUCTS and len(states) == 2:
                state = self.graph.product(*((t, self.states[t]) for t in given))
            elif name in _SUMS and len(states) > 1:
                same = [self.states[t] for t in given if t in self.states and _is_same(t, made[0])]
                state = self.graph.added(states, same)
            elif name in _SUMS and self.others.bias(state.pending, given):
                alone = True
            elif name in _AVERAGING_FUNCTIONS:
                axes = _AVERAGING_FUNCTIONS[name]
                kernel = kwargs["kernel_size"] if "kernel_size" in kwargs else args[1]
                if math.prod(made[0].shape[-axes:]) > 1:
                    state = self.graph.averaged(state, positions(kernel, axes))
            elif state.pending and args and args[0] is given[0] and len(given) == 1:
                # torch.relu, F.gelu, clamp, ...: any function of one tensor that acts on each entry alone
                function = as_numpy_function(lambda u: func(u, *args[1:], **kwargs))
                if is_activation(function):
                    state = self.graph.activation(state, name.strip("_"), function, given[0])
        if state.units is not None and not weights:
            whole = len(made) == 1 and (alone or name in _NORM_FUNCTIONS)
            units = _carried(state.units, given[0], made[0], name) if whole else None
            state = self.graph.mixed(state) if units is None else state._replace(units=units)
        for tensor in made:
            self.states[tensor] = state
        return result

    def _name(self, tensor: torch.Tensor) -> str:
        """Of a weight; "" for any other tensor."""
        if id(tensor) in self.names or tensor in self.computed:
            return self.names.get(id(tensor)) or str(self.computed[tensor])
        return next((d.originals[0] for d in self.by_hooks if d.module.__dict__.get(d.local) is tensor), "")

    def _tokens(self, given: Sequence[torch.Tensor]) -> None:
        """Follows parameters of zeros, as a class token may be, that are put beside what came through weights."""
        if any(t in self.states for t in given):
            for tensor in given:
                if tensor not in self.states and (name := self.others.token(tensor)):
                    self.states[tensor] = self.graph.token(name)

    def has_computed(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.computed[output] = name

    def _data(self, given: list[torch.Tensor], blank: bool) -> Data | None:
        """What meets its first weight here; None for indices and the like."""
        x = next((t for t in given if not self._name(t) and t.is_floating_point() and t.ndim > 0), None)
        if x is None:
            return None
        norm = float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64))
        return Data(norm**2 / max(x.numel(), 1), x.numel() // max(len(x), 1), blank)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def leave(self, function: Callable[[Array], Array], module: nn.Module, args: Any, output: Any) -> None:
        self.inside -= 1
        if self.inside == 0 and isinstance(output, torch.Tensor) and args and args[0] in self.states:
            state = self.states[args[0]]
            self.states[output] = self.graph.activation(state, type(module).__name__, function, args[0])

    def enter_own(self, module: nn.Module, args: Any) -> None:
        """Tries out whether a user's module is a norm."""
        x = args[0] if len(args) == 1 else None
        if self.inside or not isinstance(x, torch.Tensor) or x not in self.states:
            return
        if x.layout != torch.strided or x.is_nested:  # NumPy has no such arrays
            return
        self.inside = 1

        def function(u: Array) -> Array:
            y: torch.Tensor = module.forward(torch.from_numpy(u).to(x))
            return y.double().numpy(force=True)

        self.normalises = is_norm(function, x.double().numpy(force=True))
        self.inside = int(self.normalises)

    def leave_own(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.normalises:
            self.inside, self.normalises = 0, False
            self.states[output] = self.graph.norm(self.states[args[0]])


def _is_blank(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor) -> bool:
    """Whether the outputs of a layer are next to those for zeros somewhere."""
    units = _units(getattr(func, "__name__", ""), args[:2])
    if units is None or result.layout != torch.strided or result.is_nested or result.numel() == 0:
        return False
    without_bias = result - func(torch.zeros_like(args[0]), *args[1:], **kwargs)
    return is_blank(without_bias.abs().amax(units[2]).float().numpy(force=True))


def _is_same(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a part of a sum is the same for every sample, of two or more."""
    if part.ndim < whole.ndim or len(part) < len(whole):
        return True
    return len(part) > 1 and torch.equal(part[0], part[1]) and torch.equal(part, part[:1].expand_as(part))


def _units(name: str, given: Sequence[torch.Tensor]) -> tuple[int, int, int] | None:
    """Units that a function of (data, weight, bias) takes and gives, and their axis, if it takes all of them to all."""
    if name not in ("linear", "conv1d", "conv2d", "conv3d") or len(given) < 2:
        return None
    data, weight = given[:2]
    axis = -1 if name == "linear" else 1 - weight.ndim
    if weight.ndim < 2 or data.shape[axis] != weight.shape[1]:  # the latter of a convolution in groups
        return None
    return weight.shape[1], weight.shape[0], axis


def _carried(units: Units, before: torch.Tensor, after: torch.Tensor, name: str) -> Units | None:
    """The units in the output of a function of their tensor alone; None where they may have lost their order."""
    if name in _REORDERING:
        return None
    shape, axis = before.shape, units.axis % before.ndim
    if after.ndim == before.ndim and after.shape[axis] == shape[axis]:
        return units
    flat = (*shape[:axis], math.prod(shape[axis:]))
    if name in _FLATTENING and after.shape in (flat, shape[: axis + 1]):
        return units._replace(size=after.shape[-1], axis=-1)
    return None


def trace(
    model: nn.Module,
    inputs: Any,
    names: Mapping[int, str],
    computed: Sequence[Derived] = (),
    others: Mapping[str, torch.Tensor] | None = None,
) -> Mapping[str, Follower]:
    """Followers from one forward pass in evaluation mode; modes, attributes, buffers and random states as before.

    What lazy modules make of themselves stays, drawn from the global random state; other draws are the same every time.

    Args:
        model: the model.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments, or a function of the model.
        names: of its weights, by ``id``.
        computed: weights that are computed from others, each named as the first of them.
        others: parameters of which no module tells what they are, by name.
    """
    graph = WeightGraph(whole=True)
    tracer = _Tracer(graph, names, computed, others or {})
    modules = list(model.modules())
    settled = [m for m in modules if not any(map(is_lazy, _own_tensors(m)))]
    seed = 0 if len(settled) == len(modules) else None
    modes = [(module, module.training) for module in modules]
    functions = [(module, _activation_of(module)) for module, _ in modes]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    sources = [(one.source, one.originals[0]) for one in computed if one.source is not None]
    hooks: list[RemovableHandle] = []

    def restore() -> None:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)

    draws = random_states_kept(seeded(seed, cuda_devices(model)))
    with attributes_kept(settled), at_the_end(restore), modes_kept(), torch.no_grad(), draws, fixed_draws(0), tracer:
        for source, name in sources:
            hooks.append(source.register_forward_hook(partial(tracer.has_computed, name)))
        for module, function in functions:
            module.training = False
            if function is not None:
                hooks.append(module.register_forward_pre_hook(tracer.enter))
                hooks.append(module.register_forward_hook(partial(tracer.leave, function)))
            elif _may_be_norm(module):
                hooks.append(module.register_forward_pre_hook(tracer.enter_own))
                hooks.append(module.register_forward_hook(tracer.leave_own))
        outputs = call(model, inputs)
    ends = [tracer.states[t] for t in _flatten(outputs) if isinstance(t, torch.Tensor) and t in tracer.states]
    graph.end(graph.join(ends))
    return {
        name: replace(follower, layout=tracer.others.layouts.get(name), bias=tracer.others.biases.get(name, ""))
        for name, follower in graph.followers().items()
    }


def _own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for a tensor, positional arguments, a dict of keyword ones, or by a function of the model."""
    if callable(inputs) and not isinstance(inputs, torch.Tensor):
        return inputs(model)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _flatten(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _flatten(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _flatten(value)
    else:
        yield tree
