"""The adapter for ``keras.Model`` (Keras 3, any backend): what each variable is for, what follows it."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from hessinit.batches import at_the_end
from hessinit.layout import KERAS, Layout
from hessinit.losses import Loss
from hessinit.networks import base, keras_loss
from hessinit.networks.base import Data, Follower, Named, Parameter
from hessinit.networks.graph import (
    BATCH,
    GATED,
    LINEAR,
    MAP,
    UNITS,
    State,
    WeightGraph,
    is_activation,
    is_blank,
    is_norm,
    numpy_or,
)
from hessinit.networks.keras_autodiff import of_backend
from hessinit.rules import ACTIVATIONS

Array = npt.NDArray[np.floating[Any]]
GATES = {"LSTMCell": 4, "GRUCell": 3, "SimpleRNNCell": 1, "ConvLSTMCell": 4}
PARTS = 16  # of a batch, for models built for one batch size
_CONV = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_CONV_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_NORM_OVER = {layers.BatchNormalization: BATCH, layers.GroupNormalization: MAP}
_NORM = (*_NORM_OVER, layers.LayerNormalization, layers.RMSNormalization, layers.UnitNormalization)
_ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)
_GATED = (*_ATTENTION, layers.RNN, layers.Bidirectional)
_POOLING = ("AveragePooling", "MaxPooling", "GlobalAveragePooling", "GlobalMaxPooling", "SpatialDropout")
_SUMS = ("Add", "Subtract", "Average")
_AVERAGING = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
_KEEPING = (layers.Dropout, *(getattr(layers, f"{name}{n}D") for name in _POOLING for n in (1, 2, 3)))
_ROLES = {"gamma": base.NORM_SCALE, "scale": base.NORM_SCALE, "beta": base.NORM_OFFSET}


def accepts(model: object) -> bool:
    """Whether this adapter is the one for the model."""
    return isinstance(model, keras.Model)


def weight_layout(layer: keras.Layer, name: str) -> Layout | None:
    """The layout of a layer's own variable if it is a weight that the rule covers, else None."""
    cell = type(layer).__name__
    if name in ("kernel", "recurrent_kernel") and cell in GATES:
        return Layout("...i(go)", groups=GATES[cell])
    if isinstance(layer, layers.EinsumDense) and name == "kernel":
        return Layout(_einsum_axes(layer.equation))
    if isinstance(layer, layers.Embedding) and name == "embeddings":
        return Layout("vo")
    if isinstance(layer, (*_SEPARABLE, *_DEPTHWISE)):
        if name == "pointwise_kernel":
            return KERAS
        return Layout("...go", stride=math.prod(layer.strides)) if name in ("kernel", "depthwise_kernel") else None
    if isinstance(layer, _CONV_TRANSPOSED) and name == "kernel":
        return Layout("...oi", stride=math.prod(layer.strides), transposed=True)
    if isinstance(layer, _CONV) and name == "kernel":
        return Layout("...i(go)", groups=layer.groups, stride=math.prod(layer.strides))
    return KERAS if isinstance(layer, layers.Dense) and name == "kernel" else None


def _einsum_axes(equation: str) -> str:
    """Axes of the kernel in ``"inputs,kernel->outputs"``: summed ones are inputs, those of both sides copies."""
    left, outputs = equation.replace("...", "").replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    return "".join("o" if a not in inputs else "i" if a not in outputs else "g" for a in kernel)


class KerasNetwork:
    """A ``keras.Model`` as a :class:`~hessinit.networks.base.Network`."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._variables: dict[str, Any] = {}
        self.arrays, self.derivatives = of_backend()
        self._training = True
        self._peaks: dict[int, float] = {}

    def prepare(self, inputs: Any, function: str) -> None:
        if self.model.built and self.model.weights:
            return
        if inputs is None:
            raise ValueError(
                f"{function}: model {self.model.name!r} must be built; got a model without weights. "
                "Pass batch=, or call model.build(input_shape) first."
            )
        if callable(inputs):
            inputs(self.model)
            return
        self.model(keras.tree.map_structure(lambda x: keras.ops.convert_to_tensor(x[:64]), inputs))

    def parameters(self) -> Sequence[Parameter]:
        found: list[Parameter] = []
        first: dict[int, str] = {}
        for position, (layer, variable) in enumerate(_owned_variables(self.model)):
            tied = first.setdefault(id(variable), variable.path)
            layout = weight_layout(layer, variable.name)
            floating = keras.backend.is_float_dtype(variable.dtype)
            self._variables[variable.path] = variable
            found.append(
                Parameter(
                    name=variable.path,
                    layer=variable.path.rpartition("/")[0] or "model",
                    key=f"{position}/{variable.name}",  # Keras numbers layer names by process, not by model
                    shape=tuple(variable.shape),
                    dtype=str(variable.dtype),
                    role=_role(layer, variable.name, layout),
                    layout=layout,
                    tied_to=None if tied == variable.path else tied,
                    frozen=not variable.trainable,
                    differentiable=floating,
                    left="" if floating else f"left: {variable.dtype} is not a floating-point type",
                    forget=_forget(layer, variable.name),
                )
            )
        return found

    def buffers(self) -> Sequence[str]:
        return []  # all of it are variables

    def followers(self, inputs: Any) -> Mapping[str, Follower]:
        graph = WeightGraph(whole=True)
        symbolic = self._symbolic(inputs)
        if symbolic is None:
            return _inside(self.model)
        starts, outputs = symbolic
        ends = _follow(
            graph, starts, outputs, start=[graph.start()] * len(starts), data=None if callable(inputs) else inputs
        )
        graph.end(graph.join(ends))
        return graph.followers()

    def _symbolic(self, inputs: Any) -> tuple[list[Any], list[Any]] | None:
        """Symbolic inputs and outputs: the model's own, or those of a call on placeholders shaped like ``inputs``."""
        if getattr(self.model, "inputs", None) and getattr(self.model, "outputs", None):
            return keras.tree.flatten(self.model.inputs), keras.tree.flatten(self.model.outputs)
        if inputs is None or callable(inputs):
            return None
        placeholders = keras.tree.map_structure(
            lambda x: keras.Input(tuple(x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype)), inputs
        )
        try:
            outputs = self.model.call(placeholders)
        except Exception:  # a call that needs real tensors cannot be followed: the default nonlinearity it is
            return None
        return keras.tree.flatten(placeholders), keras.tree.flatten(outputs)

    def nonlinearity(self, nonlinearity: Any) -> Any:
        return numpy_nonlinearity(nonlinearity)

    def snapshot(self, name: str) -> Any:
        return keras.ops.copy(self._variables[name].value)

    def restore(self, name: str, saved: Any) -> None:
        self._variables[name].assign(saved)

    def originals(self, name: str, weight: Any) -> dict[str, Any]:
        raise AssertionError(f"no weight of a Keras model is derived: {name}")

    def inner(self) -> Any:
        return self.model

    def group(self, process_group: Any) -> base.Group:
        if process_group is not None:
            raise TypeError(f"init_: process_group must be None for a Keras model; got {process_group!r}.")
        return base.Alone()

    def write(self, name: str, values: Array) -> None:
        variable = self._variables[name]
        variable.assign(keras.ops.convert_to_tensor(values, dtype=variable.dtype))

    def seed(self, generator: Any) -> int:
        if generator is not None:
            raise TypeError(f"init_: generator must be None for a Keras model; got {generator!r}. Use seed=.")
        state = random.Random()
        state.setstate(random.getstate())
        return state.getrandbits(62)

    def values(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: keras.ops.convert_to_tensor(self._variables[name].value) for name in names}

    def constants(self) -> Sequence[Any]:
        return [variable.value for variable in self.model.variables]

    def random_state(self) -> contextlib.AbstractContextManager[Any]:
        return _torch_seeded(None)

    @contextlib.contextmanager
    def pure(
        self, training: bool | None, dropout: bool, seed: int
    ) -> Iterator[Callable[[Named, Callable[[], Any]], Any]]:
        def apply(values: Named, run: Callable[[], Any]) -> Any:
            # Updates, of batch statistics or of the state that dropout draws from, end with the scope.
            scope = keras.StatelessScope([(self._variables[name], value) for name, value in values.items()])
            with scope, _torch_seeded(seed):
                return run()

        saved = [(layer, dict(layer.__dict__)) for layer in self.model._flatten_layers()]
        self._training = True if training is None else training

        def restore() -> None:
            for layer, attributes in saved:
                layer.__dict__.update({rate: attributes[rate] for rate in _RATES if rate in attributes})

        with at_the_end(restore), _kernels():
            for layer, attributes in saved if not dropout else []:
                layer.__dict__.update({rate: 0.0 for rate in _RATES if isinstance(attributes.get(rate), float)})
            yield apply

    def forward(self, inputs: Any) -> Any:
        return self.model(inputs, training=self._training)

    def targets(self, y: Any, z: Any) -> Any:
        y = keras.ops.convert_to_tensor(y)
        ours, theirs = tuple(y.shape), tuple(z.shape)
        # As Keras does: (N,) and (N, 1) are the same.
        return keras.ops.reshape(y, z.shape) if theirs == (*ours, 1) or ours == (*theirs, 1) else y

    def loss(self, loss: Any) -> Loss:
        return keras_loss.translate(loss, self.model, self.arrays, self.derivatives)

    def updates(
        self, optimizer: Any, gradients: Sequence[Named], values: Named | None = None, fresh: bool = False
    ) -> Iterator[dict[str, Any]]:
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # the scale of a loss is not that of a step
        if not isinstance(optimizer, keras.Optimizer):
            raise TypeError(f"optimizer must be a learning rate or a keras.Optimizer; got {optimizer!r}")
        own = {name: self._variables[name] for name in gradients[0]}
        placed = {id(own[name]): value for name, value in (values or {}).items() if name in own}
        variables = optimizer._trainable_variables if optimizer.built else list(own.values())
        # Copies; in float64 where the backend has it, so that nothing is rounded off, but for fresh ones, which then
        # take half as much memory.
        wide = "float32" if fresh and all(v.dtype != "float64" for v in own.values()) else _widest_float()
        starts = [np.array(keras.ops.convert_to_numpy(placed.get(id(v), v.value)), wide) for v in variables]
        copies = [keras.Variable(x, dtype=wide, name=v.name) for x, v in zip(starts, variables, strict=True)]
        config = optimizer.get_config()
        if fresh:
            if id(optimizer) not in self._peaks:  # a schedule is asked many times for it
                self._peaks[id(optimizer)] = _peak(optimizer)
            config["learning_rate"] = self._peaks[id(optimizer)]
        private = type(optimizer).from_config(config)
        private.build(copies)
        for new, old in (
            zip(private.variables, optimizer.variables, strict=True) if optimizer.built and not fresh else []
        ):
            new.assign(old.value)
        zero = keras.ops.zeros_like
        for gradient in gradients:
            held = {id(own[name]): g for name, g in gradient.items()}
            before = [keras.ops.copy(new.value) for new in copies]
            private.apply([keras.ops.cast(held.get(id(v), zero(v.value)), wide) for v in variables], copies)
            moved = {id(v): new.value - old for v, new, old in zip(variables, copies, before, strict=True)}
            yield {
                n: keras.ops.cast(moved[id(v)], v.dtype) if id(v) in moved else zero(v.value) for n, v in own.items()
            }

    def compiled(self) -> tuple[Any, Any]:
        return getattr(self.model, "loss", None), getattr(self.model, "optimizer", None)

    def where(self, error: BaseException) -> str:
        layers = self.model._flatten_layers()
        return base.innermost(error, {id(layer): f"{layer.name} ({type(layer).__name__})" for layer in layers})


@contextlib.contextmanager
def _torch_seeded(seed: int | None) -> Iterator[None]:
    """On the torch backend, of which dropout uses the global random state: seeded if asked for, and put back."""
    if keras.backend.backend() != "torch":
        yield
        return
    from hessinit.networks.torch_autodiff import seeded

    with seeded(seed, cuda=()):
        yield


def _widest_float() -> str:
    if keras.backend.backend() == "jax":
        import jax

        return str(jax.numpy.asarray(0.0).dtype)
    return "float64"


def _peak(optimizer: Any) -> float:
    """The learning rate, or the largest one of its schedule's first million steps."""
    rate = optimizer._learning_rate
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(optimizer.learning_rate)
    steps = np.unique(np.geomspace(1, 1e6, 200).astype(np.int32)) - 1
    if keras.backend.backend() == "jax":
        import jax

        rate = jax.jit(rate)  # else each call compiles it anew
    return max(float(keras.ops.convert_to_numpy(rate(keras.ops.convert_to_tensor(step)))) for step in steps)


def _kernels() -> contextlib.AbstractContextManager[Any]:
    """Kernels of the backend that have derivatives of second order."""
    if keras.backend.backend() == "torch":
        from hessinit.networks.torch_autodiff import differentiable_kernels

        return differentiable_kernels(recurrent=False, compiled=False)
    if keras.backend.backend() == "tensorflow":
        from hessinit.networks.tensorflow_autodiff import differentiable_moments

        return differentiable_moments()
    return contextlib.nullcontext()


_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")  # of the layers that are noise in training


def as_numpy_function(function: Callable[..., Any]) -> Callable[[Any], Any] | str:
    """A Keras activation function, layer or operation as a NumPy function, or as a name of ``rules.ACTIVATIONS``."""
    name = getattr(function, "__name__", "").replace("_", "")
    if name in ACTIVATIONS and function is getattr(keras.activations, function.__name__, None):
        return name
    call = function.call if isinstance(function, keras.Operation) else function
    return lambda u: keras.ops.convert_to_numpy(call(keras.ops.convert_to_tensor(u)))


def numpy_nonlinearity(nonlinearity: Any) -> Any:
    """A Keras layer or function as one of NumPy arrays; names and NumPy functions are themselves."""
    return numpy_or(as_numpy_function, nonlinearity)


def _acts(function: Callable[[Any], Any] | str) -> bool:
    return function != "linear" and (isinstance(function, str) or is_activation(function))


def _owned_variables(model: keras.Model) -> Iterator[tuple[keras.Layer, Any]]:
    """Every weight with the layer that owns it, in the model's order of layers."""
    for layer in model._flatten_layers():
        for variable in [*layer._trainable_variables, *layer._non_trainable_variables]:
            yield layer, variable


def _forget(layer: Any, name: str) -> tuple[int, int, float] | None:
    if isinstance(layer, layers.LSTMCell) and name == "bias":
        return layer.units, 2 * layer.units, float(layer.unit_forget_bias)
    return None


def _role(layer: keras.Layer, name: str, layout: Layout | None) -> str:
    if layout is not None:
        return base.WEIGHT
    if isinstance(layer, _NORM):
        return _ROLES.get(name, base.OTHER)
    known = (layers.Dense, layers.EinsumDense, *_CONV, *_CONV_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE)
    is_bias = name == "bias" and (isinstance(layer, known) or type(layer).__name__ in GATES)
    return base.BIAS if is_bias else base.OTHER


def _follow(graph: WeightGraph, inputs: list[Any], outputs: list[Any], start: list[State], data: Any) -> list[State]:
    """States of symbolic outputs, given those of the inputs; operations are met in the order of computation."""
    states = {id(tensor): state for tensor, state in zip(inputs, start, strict=True)}
    stack = list(outputs)
    while stack:
        tensor = stack[-1]
        if id(tensor) in states:
            stack.pop()
            continue
        operation, node_index, _ = tensor._keras_history
        node = operation._inbound_nodes[node_index]
        missing = [t for t in node.input_tensors if id(t) not in states]
        if missing:
            stack += missing
            continue
        given = [states[id(t)] for t in node.input_tensors]
        met = partial(_data, inputs, node.input_tensors, given, data, operation)
        results = _step(graph, operation, node.input_tensors, given, met)
        for k, output in enumerate(node.output_tensors):
            states[id(output)] = results[k] if len(results) > 1 else results[0]
    return [states[id(tensor)] for tensor in outputs]


def _step(
    graph: WeightGraph, operation: Any, tensors: list[Any], given: list[State], data: Callable[[], Data | None]
) -> list[State]:
    """One operation or layer: the states of its outputs, one for all of them where they are alike."""
    state = graph.join(given, concatenated=type(operation).__name__ in ("Concatenate", "Stack"))
    if isinstance(operation, keras.Model) and getattr(operation, "inputs", None):
        inputs, outputs = (keras.tree.flatten(t) for t in (operation.inputs, operation.outputs))
        return _follow(graph, inputs, outputs, start=given, data=None)
    if type(operation).__name__ == "Multiply" and len(given) == 2:
        one, two = zip(tensors, given, strict=True)
        return [graph.product(one, two)]
    if type(operation).__name__ in _SUMS and len(given) > 1:
        most = max(len(t.shape) for t in tensors)
        same = [s for s, t in zip(given, tensors, strict=True) if len(t.shape) < most or t.shape[0] == 1]
        return [graph.added(given, same if len(same) < len(given) else ())]
    if not isinstance(operation, keras.Layer):
        return [_activate(graph, state, operation, tensors)]
    weights = [v.path for layer, v in _owned_variables(operation) if weight_layout(layer, v.name) is not None]
    if isinstance(operation, _GATED):
        writers = [operation._output_dense.kernel.path] if isinstance(operation, _ATTENTION) else []
        return [graph.weights(state, weights, data(), None, writers, gates=True)]
    if isinstance(operation, _NORM) or (not weights and _is_norm(operation, tensors)):
        over = next((over for kind, over in _NORM_OVER.items() if isinstance(operation, kind)), UNITS)
        return [graph.norm(state, over)]
    if isinstance(operation, _AVERAGING) and not _takes_all(operation, tensors[0]):
        state = graph.averaged(state, math.prod(operation.pool_size))
    if operation._layers:  # something composed by a user
        return [graph.unknown(state)]
    if weights:
        state = graph.weights(state, weights, data(), _units(operation))
        tensors = [None]  # between a layer's kernel and its own activation there is no symbolic tensor
    return [_activate(graph, state, operation, tensors)]


def _is_norm(layer: keras.Layer, tensors: list[Any]) -> bool:
    """Whether a layer of the user's own, with no others in it, is a norm."""
    if type(layer).__module__.split(".")[0] == "keras" or layer._layers or len(tensors) != 1:
        return False
    shape, function = [2 if n is None else n for n in tensors[0].shape], as_numpy_function(layer)
    return not isinstance(function, str) and is_norm(function, np.random.default_rng(0).standard_normal(shape))


def _inside(model: keras.Model) -> Mapping[str, Follower]:
    """What layers tell of their own weights, wherever they stand."""
    found: dict[str, Follower] = {}
    for layer in model._flatten_layers():
        function = getattr(layer, "activation", None)
        if isinstance(layer, _GATED) or type(layer).__name__ in GATES:
            follower = GATED
        elif isinstance(layer, layers.Embedding):
            follower = LINEAR
        elif function is not None and not layer._layers and _acts(numpy_function := as_numpy_function(function)):
            follower = Follower(getattr(function, "__name__", type(function).__name__), numpy_function)
        else:
            continue
        for owner, variable in _owned_variables(layer):
            if weight_layout(owner, variable.name) is not None:
                found.setdefault(variable.path, follower)
    return found


def _takes_all(pooling: keras.Layer, tensor: Any) -> bool:
    """Whether a pooling leaves one position."""
    shape = pooling.compute_output_shape(tensor.shape)
    return all(n == 1 for n in (shape[1:-1] if pooling.data_format == "channels_last" else shape[2:]))


def _units(layer: keras.Layer) -> tuple[int, int, int] | None:
    """Units that a layer's kernel takes and gives, and the axis of the outputs, if it takes all of them to all."""
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    plain = isinstance(layer, layers.Dense) or (isinstance(layer, _CONV) and layer.groups == 1 and last)
    return (*layer.kernel.shape[-2:], -1) if plain else None


def _carried(graph: WeightGraph, state: State, operation: Any, tensor: Any) -> State:
    """The state after an operation that may reorder units."""
    if state.units is None or isinstance(operation, _KEEPING):
        return state
    if isinstance(operation, layers.Flatten) and operation.data_format == "channels_last":
        repeats = math.prod(tensor.shape[1:-1])
        return state._replace(units=state.units._replace(repeats=repeats * state.units.repeats))
    return graph.mixed(state)


def _activate(graph: WeightGraph, state: State, operation: Any, tensors: list[Any]) -> State:
    """The state after an operation that may be an activation, or a layer that may end in one."""
    weighted = tensors[0] is None
    function = getattr(operation, "activation", None if weighted else operation)
    if not state.pending or len(tensors) != 1 or function is None:
        return state if weighted else _carried(graph, state, operation, tensors[0])
    numpy_function = as_numpy_function(function)
    if not _acts(numpy_function):
        return state if weighted else _carried(graph, state, operation, tensors[0])
    name = getattr(function, "__name__", None) or type(operation).__name__
    return graph.activation(state, name, numpy_function, tensors[0])


def _data(inputs: list[Any], tensors: list[Any], given: list[State], data: Any, operation: Any) -> Data | None:
    """What the data has become where no weight has met it yet; None without data or for indices."""
    if data is None or any(s.pending or s.layers for s in given) or not keras.backend.is_float_dtype(tensors[0].dtype):
        return None
    function, arrays = keras.Function(inputs, tensors[0]), keras.tree.flatten(data)
    samples, size = arrays[0].shape[0], inputs[0].shape[0]
    if size is None:
        parts = [arrays]
    else:  # Keras builds a Sequential for the size of the first batch it meets, and in parts of that size we go
        starts = range(0, samples, size)[:PARTS]
        parts = [[keras.ops.take(x, np.arange(i, i + size) % samples, axis=0) for x in arrays] for i in starts]
    values = np.concatenate([keras.ops.convert_to_numpy(function(part)) for part in parts])[:samples]
    blank = _units(operation) is not None and is_blank(_largest(operation, values))
    return Data(float(np.mean(np.square(values, dtype=np.float64))), values.size // max(len(values), 1), blank)


def _largest(layer: keras.Layer, values: Any) -> Any:
    """The largest output at each place, without bias."""
    u, of_zeros = (keras.ops.convert_to_numpy(layer(x)) for x in (values, np.zeros_like(values[:1])))
    return np.abs(u - of_zeros).max(-1)
