"""What the library asks of a framework: the parameters of a model, what each is for, and how to write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hessinit.layout import Layout
from hessinit.losses import Loss

Array = Any  # a tensor of the framework
Named = Mapping[str, Array]
Function = Callable[[Named], Array]  # of the values of parameters
Pull = Callable[[Array], dict[str, Array]]
Bend = Callable[[Array], tuple[dict[str, Array], dict[str, Array]]]  # c → u = Jᵀc and D²(cᵀf) u


@dataclass(frozen=True, eq=False)
class OnData:
    """A function of the values of parameters on some data, whose derivatives may be compiled once for all data.

    Args:
        function: of the values.
        whole: of (data, values), the same and without a trace of the call.
        data: gives what ``whole`` takes: arrays, or structures of them; None until ``function`` has been called.
    """

    function: Function
    whole: Callable[[Any, Named], Array]
    data: Callable[[], Any]

    def __call__(self, values: Named) -> Array:
        return self.function(values)


WEIGHT, BIAS, NORM_SCALE, NORM_OFFSET, OTHER = "weight", "bias", "norm scale", "norm offset", "other"


@dataclass
class Parameter:
    """One parameter of a model and its role.

    Args:
        name: unique in the model, the framework's own.
        layer: name of the module that owns it ("model" for the model itself).
        key: names the parameter's random stream: the same in every model built alike.
        shape: as stored.
        dtype: as the framework prints it.
        role: ``"weight"``, ``"bias"``, ``"norm scale"``, ``"norm offset"`` or ``"other"``.
        layout: axes of a weight, else None.
        tied_to: name of the parameter listed earlier that is this same tensor, or None.
        frozen: whether it does not train.
        loaded: whether it came from a checkpoint, as far as the framework says.
        differentiable: whether it has values of a real floating-point type.
        left: why no call may write it (not materialised, parametrized, ...), or "".
        zero_row: index on the first axis that stays zero (an embedding's padding), or None.
        forget: of the bias of an LSTM, where its forget gate starts and stops, and the framework's own value there.
        derived: what computes a weight from this parameter and others, of which this is the first, or "". The layout is
            that of the weight.
        weight_shape: of the weight; None where that is the parameter itself.
        proportional: whether the weight is proportional to this parameter.
    """

    name: str
    layer: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    layout: Layout | None = None
    tied_to: str | None = None
    frozen: bool = False
    loaded: bool = False
    differentiable: bool = True
    left: str = ""
    zero_row: int | None = None
    forget: tuple[int, int, float] | None = None
    derived: str = ""
    weight_shape: tuple[int, ...] | None = None
    proportional: bool = True


class Data(NamedTuple):
    """What a weight takes, where that is the model's input.

    Args:
        moment: mean square of its numbers.
        numbers: in one sample.
        blank: whether all that one output takes is next to zero somewhere, as at the border of an image.
    """

    moment: float
    numbers: int
    blank: bool = False


@dataclass(frozen=True)
class Follower:
    """What follows a weight in the forward pass.

    Args:
        name: of the activation, for the report.
        function: the activation as a vectorised NumPy function, or its known name.
        depth: number of weight layers in the plain chain that the weight is part of (norm layers end a chain).
        data: where it meets its first weight here and inputs were given; else None.
        takers: by name, the weights that take the activation's outputs, with how often the row of units comes on their
            axis of inputs. Empty where something else takes them too, or where pairs of units ``u, -u`` are not linear
            after the activation.
        averaged: number of positions that average poolings after it take together; 1 for none, and for one of all that
            there are, which keeps what they share (measured, the factor gains nothing there).
        last: whether no other weight follows on the way to the model's outputs.
        begins: whether its outputs are what a residual stream, a recurrent layer or attention begins with.
        stream: which residual stream the weight writes to: equal for all whose outputs are added to each other before
            a norm, or, in one without norms, for the ends of its branches; None where nothing is added.
        branches: of a weight at the end of a branch without norms, the number of branches of its stream; else 1.
        normed: whether a norm takes its outputs.
        scale_invariant: whether norms take its outputs as they are, and nothing else does.
        shortcut: whether its outputs are added to those of a batch norm that did not come through it.
        post_norm: whether its outputs are added to those of a norm that it came through, and a norm takes the sum, as
            at the end of a post-norm transformer's branches.
        same: whether its outputs are the same for every sample, as those of a position are.
        output: whether it is also the output layer, as an embedding may be.
        mates: what is, of the weights that write to the same stream.
        blank: whether a norm takes its outputs, or what comes of them, which are zero somewhere but for biases.
        layout: of a weight that no module tells of, as the call has it that takes it; else None.
        bias: name of the parameter that this call adds, where no module tells of it either; else "".
    """

    name: str
    function: str | Callable[[Any], Any]
    depth: int | None = None
    data: Data | None = None
    takers: Mapping[str, int] = field(default_factory=dict)
    averaged: int = 1
    last: bool = False
    begins: bool = False
    stream: int | None = None
    branches: int = 1
    normed: bool = False
    scale_invariant: bool = False
    shortcut: bool = False
    post_norm: bool = False
    same: bool = False
    output: bool = False
    mates: frozenset[str] = frozenset()
    blank: bool = False
    layout: Layout | None = None
    bias: str = ""

    @property
    def beside_norm(self) -> bool:
        """Whether its outputs are added to those of a norm, which they would drown."""
        return self.shortcut or self.post_norm


def told(parameters: Iterable[Parameter], followers: Mapping[str, Follower]) -> list[Parameter]:
    """The parameters, with the roles that calls give to those of which no module tells."""
    layouts = {name: follower.layout for name, follower in followers.items() if follower.layout is not None}
    biases = {follower.bias for follower in followers.values()}
    roles = dict.fromkeys(biases, BIAS) | dict.fromkeys(layouts, WEIGHT)
    return [replace(p, role=roles[p.name], layout=layouts.get(p.name)) if p.name in roles else p for p in parameters]


def innermost(error: BaseException, names: Mapping[int, str]) -> str:
    """The name, by ``id``, of the innermost of some modules among the callers of what raised the error; "" if none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


class Arrays(Protocol):
    """The array functions of one framework, named as in NumPy; sums over an axis keep it."""

    def is_array(self, x: Any, /) -> bool: ...
    def is_floating(self, x: Array, /) -> bool: ...
    def asarray(self, x: Any, like: Array) -> Array:
        """``x`` in the dtype and on the device of ``like``."""

    def numpy(self, x: Array) -> npt.NDArray[Any]: ...
    def take(self, x: Array, rows: npt.NDArray[np.intp]) -> Array:
        """Some rows of the first axis."""

    def reshape(self, x: Array, shape: Sequence[int], /) -> Array: ...
    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array: ...
    def sum(self, x: Array, axis: int | None = None) -> Array: ...
    def dot(self, x: Array, y: Array) -> float:
        """Sum of products of entries, added up in at least float32."""

    def finite(self, x: Array) -> bool: ...
    def exp(self, x: Array, /) -> Array: ...
    def log(self, x: Array, /) -> Array: ...
    def sqrt(self, x: Array, /) -> Array: ...
    def abs(self, x: Array, /) -> Array: ...
    def clip(self, x: Array, low: float, high: float, /) -> Array: ...
    def where(self, condition: Array, x: Array, y: Array, /) -> Array: ...
    def sigmoid(self, x: Array, /) -> Array: ...
    def softplus(self, x: Array, /) -> Array: ...
    def log_softmax(self, x: Array, axis: int) -> Array: ...
    def one_hot(self, labels: Array, classes: int, axis: int, like: Array) -> Array: ...


class Derivatives(Protocol):
    """Automatic differentiation of one framework, of functions of named values.

    Names that ``tangents`` or ``rows`` lack are constants. An output that does not depend on a value has derivative
    zero, of the value's shape.
    """

    def jvp(self, f: Function, values: Named, tangents: Named) -> tuple[Array, Array]:
        """``f(values)`` and ``J tangents``: one forward pass."""

    def vjp(self, f: Function, values: Named) -> tuple[Array, Pull]:
        """``f(values)`` and the map ``u → Jᵀ u``, which may be called again and again."""

    def jvp_vjp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Array, Array, Pull]:
        """Both, from one forward pass where the framework can share it; the pull-back gives the rows."""

    def gradient(self, f: Function, values: Named) -> tuple[Array, dict[str, Array]]:
        """``f(values)``, a scalar, and its gradient."""

    def hvp(self, f: Function, values: Named, tangents: Named, rows: Sequence[str]) -> tuple[Array, dict[str, Array]]:
        """A scalar ``f(values)`` and the rows of ``D²f tangents``."""

    def bend(
        self, f: Function, along: Callable[[Array], Function], values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Array, Pull, Bend]:
        """``f(values)``, the map ``u → Jᵀu``, and the map from c to the columns of ``u = Jᵀc`` and, with them in place
        of all of u, the rows of ``D²(cᵀf) u``; to be called once, as the last.

        Args:
            f: outputs.
            along: of c, gives the function ``cᵀf``.
            values: of parameters.
            cols: names of parameters.
            rows: likewise.
        """
        z, pull = self.vjp(f, values)

        def bend(c: Array) -> tuple[dict[str, Array], dict[str, Array]]:
            pulled = pull(c)
            u = {name: pulled[name] for name in cols}
            return u, self.hvp(along(c), values, u, rows)[1]

        return z, pull, bend

    def linearize(
        self, f: Function, values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Array, Callable[[Named], Array], Pull]:
        """``f(values)``, the map ``v → J v`` from the columns and the map ``u → Jᵀu`` to the rows, for many v and u.

        By default from a new pass for each v, of a framework where nothing is gained by keeping one.
        """
        z, _, pull = self.jvp_vjp(f, values, {}, rows)
        return z, lambda v: self.jvp(f, values, v)[1], pull

    def curve(
        self, f: Function, values: Named, cols: Sequence[str], rows: Sequence[str]
    ) -> tuple[Array, Callable[[Named], dict[str, Array]]]:
        """A scalar ``f(values)`` and the map ``v → D²f v`` from the columns to the rows, for many v; likewise."""
        value, _ = self.jvp(f, values, {})
        return value, lambda v: self.hvp(f, values, v, rows)[1]

    def squares(
        self, f: Function, few: Function, values: Named, names: Sequence[str], samples: int, first: int
    ) -> tuple[Array, Squares] | None:
        """``f(values)`` and the :class:`Squares` of its samples; None, the default, if no name allows any.

        Args:
            f: outputs of a batch.
            few: outputs of its first samples.
            values: of parameters.
            names: of the parameters wanted.
            samples: in the batch.
            first: how many samples ``few`` has.
        """
        return None


class Squares(Protocol):
    """A map from some u, each with a row a sample, to squares of each sample's own derivatives."""

    def __call__(self, cotangents: Iterable[Array], total: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
        """``Σ_u Σ_s (J_sᵀ u_s)²`` of the names that allow it and ``Jᵀ Σ u`` of the others, a backward pass for each u.

        Args:
            cotangents: the u.
            total: whether of each parameter's squares the sum is enough.
        """


class Group(Protocol):
    """Processes that each hold a share of the data and act as one."""

    rank: int
    size: int

    def together(self) -> AbstractContextManager[None]:
        """A context that ends for all processes, or raises in all of them."""

    def sum(self, sums: Any) -> Any:
        """Sums over processes of numbers, arrays, or dicts of them."""

    def first(self, value: Any) -> Any:
        """The first process's value."""


class Alone:
    """The :class:`Group` of one process."""

    rank, size = 0, 1

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sum(self, sums: Any) -> Any:
        return sums

    def first(self, value: Any) -> Any:
        return value


class Network(Protocol):
    """The adapter of one framework around one model."""

    arrays: Arrays
    derivatives: Derivatives

    def prepare(self, inputs: Any, function: str) -> None:
        """Lets a model that makes its parameters on its first call make them; ``function`` is named in errors."""

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter, in the model's order, tied ones once for each name."""

    def buffers(self) -> Sequence[str]:
        """Names of the state of a model that is no parameter."""

    def followers(self, inputs: Any) -> Mapping[str, Follower]:
        """What follows each weight, by name, as far as it is known: from module order, or from one traced forward
        pass where ``inputs``, or a function that gives the model's outputs, is not None. Changes nothing in the model.
        """

    def nonlinearity(self, nonlinearity: Any) -> str | Callable[[Any], Any]:
        """A nonlinearity that a user named or gave, in this framework's terms, as a name or a NumPy function."""

    def originals(self, name: str, weight: npt.NDArray[np.floating[Any]]) -> Mapping[str, Any]:
        """Values of the parameters that make the derived weight of this name equal to an array, as arrays."""

    def snapshot(self, name: str) -> Any:
        """A copy of a parameter, for :meth:`restore`."""

    def restore(self, name: str, saved: Any) -> None:
        """Writes a snapshot back, bit for bit."""

    def inner(self) -> Any:
        """The model inside wrappers that only make it run elsewhere or faster."""

    def group(self, process_group: Any) -> Group:
        """The processes that act as one; from None those that the model is replicated over, or this one alone."""

    def write(self, name: str, values: npt.NDArray[np.floating[Any]]) -> None:
        """Writes values into a parameter, cast to its dtype, on its device."""

    def seed(self, generator: Any) -> int:
        """A seed from the framework's generator; from None one that follows the global random state and leaves it."""

    def values(self, names: Sequence[str]) -> dict[str, Array]:
        """The parameters themselves, not to be written to."""

    def constants(self) -> Sequence[Any]:
        """Arrays that a compiled function may hold as constants; it is of use while they are the same objects."""

    def random_state(self) -> AbstractContextManager[Any]:
        """A context that puts the framework's global random state back."""

    def pure(
        self, training: bool | None, dropout: bool, seed: int
    ) -> AbstractContextManager[Callable[[Named, Callable[[], Any]], Any]]:
        """A context that gives a function of (values, run): ``run()`` with these values for parameters.

        Inside, the model makes the same random choices at every call, its kernels are ones with derivatives of second
        order, and whatever it does to its buffers and attributes is undone at the end.

        Args:
            training: the mode of all its modules; None for the framework's usual one.
            dropout: whether dropout acts, by one mask that the seed decides.
            seed: of the model's random choices.
        """

    def forward(self, inputs: Any) -> Any:
        """The model's outputs, in the mode that :meth:`pure` was given."""

    def targets(self, y: Any, z: Array) -> Array:
        """Targets as an array on the device of the outputs z."""

    def loss(self, loss: Any) -> Loss:
        """A loss in any of the framework's forms, by name, or any callable."""

    def updates(
        self, optimizer: Any, gradients: Sequence[Named], values: Named | None = None, fresh: bool = False
    ) -> Iterator[dict[str, Array]]:
        """What an optimizer's next steps would add to the parameters, given these gradients, by a private copy of it.

        One step after the other, as they are asked for.

        Args:
            optimizer: of the framework. Parameters that it does not hold stay.
            gradients: by name, a step each.
            values: where the parameters stand; default: where they are.
            fresh: as if it had made no step yet, and at the largest learning rate of its schedule.
        """

    def compiled(self) -> tuple[Any, Any]:
        """The loss and the optimizer that the model itself carries; None where it has none."""

    def where(self, error: BaseException) -> str:
        """The name of the innermost module that an error was raised in, or ""."""
