"""The adapter for ``torch.nn.Module``: what each parameter is for, what follows it, how to write it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from hessinit.layout import TORCH, Layout
from hessinit.networks import base
from hessinit.networks.base import Follower, Parameter
from hessinit.networks.graph import WeightGraph, is_activation, takes_arrays

Array = npt.NDArray[np.floating[Any]]
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def accepts(model: object) -> bool:
    """Whether this adapter is the one for the model."""
    return isinstance(model, nn.Module)


def weight_layout(module: nn.Module, name: str) -> Layout | None:
    """The layout of a module's own parameter if it is a weight that the rule covers, else None."""
    if isinstance(module, (*_CONV, *_CONV_TRANSPOSED)) and name == "weight":
        transposed = isinstance(module, _CONV_TRANSPOSED)
        axes = "(gi)o..." if transposed else "(go)i..."
        return Layout(axes, groups=module.groups, stride=math.prod(module.stride), transposed=transposed)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name == "weight":
        return Layout("vo")
    if isinstance(module, nn.Bilinear) and name == "weight":
        return Layout("oii")
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_weight":
            return Layout("(go)i", groups=3)
        return TORCH if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith(("weight_ih", "weight_hh", "weight_hr")):
        kind = module.mode if isinstance(module, nn.RNNBase) else type(module).__name__
        gates = 1 if name.startswith("weight_hr") else GATES.get(kind, 1)
        return Layout("(go)i", groups=gates)
    return TORCH if isinstance(module, nn.Linear) and name == "weight" else None


def _role(module: nn.Module, name: str) -> str:
    if isinstance(module, _NORM):
        return {"weight": base.NORM_SCALE, "bias": base.NORM_OFFSET}.get(name, base.OTHER)
    if weight_layout(module, name) is not None:
        return base.WEIGHT
    known = (nn.Linear, *_CONV, *_CONV_TRANSPOSED, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    return base.BIAS if isinstance(module, known) and "bias" in name and name[-2:] not in ("_k", "_v") else base.OTHER


def _why_left(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "left: not materialised (run one forward pass first)"
    if parameter.is_meta:
        return "left: on the meta device"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "left: parametrized"
    if not parameter.is_floating_point():
        return f"left: {str(parameter.dtype).removeprefix('torch.')} is not a real floating-point type"
    return ""


class TorchNetwork:
    """A ``torch.nn.Module`` as a :class:`~hessinit.networks.base.Network`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: dict[str, nn.Parameter] = {}

    def prepare(self, inputs: Any) -> None:
        lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in self.model.parameters())
        if inputs is not None and lazy:
            _trace(self.model, inputs, {})

    def parameters(self) -> Sequence[Parameter]:
        found: list[Parameter] = []
        first: dict[int, str] = {}
        for name, module, local, parameter in _owned_parameters(self.model):
            self._tensors[name] = parameter
            tied = first.setdefault(id(parameter), name)
            padding = getattr(module, "padding_idx", None)
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            found.append(
                Parameter(
                    name=name,
                    key=name,
                    shape=() if lazy else tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    role=_role(module, local),
                    layout=weight_layout(module, local),
                    tied_to=None if tied == name else tied,
                    frozen=not parameter.requires_grad,
                    left=_why_left(module, parameter),
                    zero_row=padding if isinstance(padding, int) else None,
                )
            )
        return found

    def followers(self, inputs: Any) -> Mapping[str, Follower]:
        names = {id(p): n for n, m, local, p in _owned_parameters(self.model) if weight_layout(m, local) is not None}
        if inputs is not None:
            return _trace(self.model, inputs, names)
        return _module_order(self.model, names)

    def nonlinearity(self, nonlinearity: Any) -> Any:
        return numpy_nonlinearity(nonlinearity)

    def snapshot(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().clone()

    def restore(self, name: str, saved: torch.Tensor) -> None:
        with torch.no_grad():
            self._tensors[name].copy_(saved)

    def write(self, name: str, values: Array) -> None:
        with torch.no_grad():
            self._tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def read(self, name: str) -> Array:
        tensor = self._tensors[name].detach()
        array: Array = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).numpy()
        return array

    def seed(self, generator: Any) -> int:
        if generator is None:
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"init_: generator must be a torch.Generator or None; got {generator!r}.")
        return draw_seed(generator)


def draw_seed(generator: torch.Generator | None) -> int:
    """One integer from a torch generator (None: the global one), from which NumPy draws the weights."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), generator=generator, device=device))


def as_numpy_function(function: Callable[..., Any]) -> Callable[[Array], Array]:
    """A torch function or module of one tensor as a function of one NumPy array.

    A module is copied and put in evaluation mode first, in float64, so that the original is not touched.
    """
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).eval().double().cpu()

    def call(u: Array) -> Array:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result: Array = function(torch.from_numpy(np.array(u))).numpy()
        return result

    return call


def numpy_nonlinearity(nonlinearity: Any) -> Any:
    """A torch module or function as one of NumPy arrays; names and NumPy functions are themselves."""
    if isinstance(nonlinearity, nn.Module):
        return as_numpy_function(nonlinearity)
    return nonlinearity if not callable(nonlinearity) or takes_arrays(nonlinearity) else as_numpy_function(nonlinearity)


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every parameter with its full name, the module that owns it, and its name there; tied ones each time."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{local}".lstrip("."), module, local, parameter


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _module_order(model: nn.Module, names: Mapping[int, str]) -> Mapping[str, Follower]:
    """Followers inside each ``nn.Sequential``, from the order of its modules.

    What leaves a Sequential that is only a part of the model may meet anything, so weights whose follower would lie
    there are not in the answer.
    """
    found: dict[str, Follower] = {}
    inner = {id(c) for m in model.modules() if isinstance(m, nn.Sequential) for c in m if isinstance(c, nn.Sequential)}
    for sequential in model.modules():
        if not isinstance(sequential, nn.Sequential) or id(sequential) in inner:
            continue
        graph = WeightGraph(whole=sequential is model)
        state = graph.start()
        for module in _leaves(sequential):
            weights = [names[id(p)] for p in module._parameters.values() if id(p) in names]
            if weights:
                state = graph.weights(state, weights)
                if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
                    state = graph.activation(state, "gates", "linear")
            elif any(True for _ in module.children()):
                state = graph.unknown(state)
            elif isinstance(module, _NORM):
                state = graph.norm(state)
            elif _is_activation_module(module):
                state = graph.activation(state, type(module).__name__, as_numpy_function(module))
            elif any(True for _ in module.parameters()):
                state = graph.unknown(state)
        graph.end(state)
        found.update(graph.followers())
    return found


def _is_activation_module(module: nn.Module) -> bool:
    plain = isinstance(module, nn.PReLU) or not any(True for _ in module.parameters())
    return plain and not any(True for _ in module.children()) and is_activation(as_numpy_function(module))


# Gates and attention's projections pass signals on almost linearly.
_GATED_FUNCTIONS = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_GATED_FUNCTIONS |= {"multi_head_attention_forward", "_native_multi_head_attention"}
_NORM_FUNCTIONS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"}


class _Tracer(TorchFunctionMode):
    """Watches one forward pass: which weights each tensor came through, and what is done to it next."""

    def __init__(self, graph: WeightGraph, names: Mapping[int, str]) -> None:
        super().__init__()
        self.graph, self.names = graph, names
        self.states = WeakIdKeyDictionary()
        self.inside = 0  # activations given as modules are met as wholes, see _trace

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in _flatten((args, dict(kwargs))) if isinstance(t, torch.Tensor)]
        weights = [self.names[id(t)] for t in given if id(t) in self.names]
        states = [self.states[t] for t in given if t in self.states]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if weights:
            moment = None if states else self._input_moment(given)
            state = self.graph.weights(self.graph.join(states), weights, moment)
            if name in _GATED_FUNCTIONS:
                state = self.graph.activation(state, "gates", "linear")
        elif self.inside or not states:
            return result
        else:
            state = self.graph.join(states)
            if name in _NORM_FUNCTIONS:
                state = self.graph.norm(state)
            elif state.pending and args and args[0] is given[0] and len(given) == 1:
                # torch.relu, F.gelu, clamp, ...: any function of one tensor that acts on each entry alone
                function = as_numpy_function(lambda u: func(u, *args[1:], **kwargs))
                if is_activation(function):
                    state = self.graph.activation(state, name.strip("_"), function)
        for tensor in _flatten(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.states[tensor] = state
        return result

    def _input_moment(self, given: list[torch.Tensor]) -> float | None:
        """E x² of the data that meets its first weight here; None for indices and the like."""
        data = [t for t in given if id(t) not in self.names and t.is_floating_point() and t.ndim > 0]
        return float(data[0].detach().double().square().mean()) if data else None

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside -= 1
        if isinstance(output, torch.Tensor) and (given := [t for t in _flatten(args) if t in self.states]):
            state = self.graph.join(self.states[t] for t in given)
            self.states[output] = self.graph.activation(state, type(module).__name__, as_numpy_function(module))


def _trace(model: nn.Module, inputs: Any, names: Mapping[int, str]) -> Mapping[str, Follower]:
    """Followers from one forward pass in evaluation mode; modes, buffers and random state as before."""
    graph = WeightGraph(whole=True)
    tracer = _Tracer(graph, names)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    hooks = []
    try:
        for module, _ in modes:
            module.training = False
            if _is_activation_module(module):
                hooks += [module.register_forward_pre_hook(tracer.enter), module.register_forward_hook(tracer.leave)]
        with torch.no_grad(), torch.random.fork_rng(devices), tracer:
            outputs = _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
    ends = [tracer.states[t] for t in _flatten(outputs) if isinstance(t, torch.Tensor) and t in tracer.states]
    graph.end(graph.join(ends))
    return graph.followers()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _flatten(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _flatten(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _flatten(value)
    else:
        yield tree
