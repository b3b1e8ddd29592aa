"""The curvature of a network's loss: its approximate Hessian, the exact one to check it, and what is read from them.

With z the outputs and ℓ the loss, the chain rule has two terms,

    D²_w ℓ(z(w)) = D²_z ℓ • D_w z • D_w z  +  D_z ℓ • D²_w z,

the *linearization effect* and the *curvature effect*. The first alone is the **approximate Hessian** G, which the field
calls generalized Gauss–Newton matrix. Any part of it costs a forward-mode product, one with the analytic ``D²_z ℓ``,
and at most one backward pass.

Where G is exact, and where not. A block of G equals the exact Hessian's where the outputs are linear in its parameters:
always for the last layer; for the diagonal block of each layer if the activations are piecewise linear (ReLU, max
pooling), and with it for traces and diagonals. Blocks between two layers' weights are not even close, ReLU or not; and
early layers of smooth nets (tanh) have blocks with large errors, though small ones along the gradient of a wide net.
Every result says which it is, in ``.exactness``, measured on the model at hand.

References:
    M. Skorski, "Approximating Hessians for Neural Networks", 2021.
    N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict, Unpack

from hessinit.draw import stream
from hessinit.networks.base import Array
from hessinit.objective import Objective
from hessinit.operators import Exactness, Globs, Hessian, Value, Values, exactness_of
from hessinit.progress import track
from hessinit.spectrum import SpectralDensity, spectral_norm

__all__ = [
    "Exactness",
    "Hessian",
    "LayerError",
    "SpectralDensity",
    "Value",
    "Values",
    "approximation_error",
    "hessian",
    "layer_traces",
    "rayleigh",
    "step_sharpness",
]


class Options(TypedDict, total=False):
    """Keywords that every function here takes, as :func:`hessian` does."""

    params: Globs | None
    forward: Callable[[Any, Any], tuple[Any, Any]] | None
    chunk_size: int | None
    training: bool | None
    dropout: bool
    seed: int
    progress: bool | None


def hessian(
    model: Any,
    batch: Any,
    loss: Any,
    params: Globs | None = None,
    exact: bool = False,
    forward: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    chunk_size: int | None = None,
    *,
    training: bool | None = None,
    dropout: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Hessian:
    """The approximate (or exact) Hessian of a model's mean loss, as a linear operator.

    One forward pass (of a loader's first batch) checks that model, data and loss fit; the rest is computed when asked
    for. Nothing of the model changes: not its mode, buffers, gradients or attributes, nor the global random state. The
    mean is over loss terms, whatever the batches; half precision is differentiated in half precision.

    Args:
        model: ``torch.nn.Module`` or ``keras.Model``.
        batch: a pair (inputs, targets); a dict with the targets under ``labels``, ``targets`` or ``y``, whose other
            entries are keyword inputs; or a loader of either, read anew for every product, of which one batch is held.
        loss: a name (``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``, ``"poisson_nll"``, ``"huber"``),
            a loss of the framework or its name there, or a callable of (outputs, targets), a mean over samples unless
            its ``reduction`` is ``"sum"``. A softmax or sigmoid at the end of the model counts as part of the loss.
        params: names or globs of parameters; default: all that train. Tied parameters are one.
        exact: the exact Hessian in place of the approximate one. Default False.
        forward: function of (model, batch) that returns (outputs, targets), for batches of any structure; it calls
            the model in whatever way that needs (Keras: ``training=`` too).
        chunk_size: samples that go through the model at a time, to bound memory; default: whole batches.
        training: mode of the modules (batch statistics or running ones). Default: as they are set (torch), training
            (Keras, which keeps no mode).
        dropout: whether dropout acts, by one fixed mask. Default False.
        seed: of dropout's mask, of random probes and of Lanczos starts. Default 0.
        progress: show a bar on long work; default: where standard error is a terminal.

    Returns:
        A :class:`Hessian`: ``shape``, ``quadratic_form``, ``@``, ``products``, ``block``, ``diagonal``, ``trace``,
        ``traces``, ``norm``, ``eigsh``, ``spectral_density``, ``to_scipy``, ``dense``, ``exactness``.

    Raises:
        TypeError: ``model``, ``batch`` or ``loss`` of another kind.
        ValueError: names that match nothing or have no derivatives, an empty batch, outputs and targets that do not
            fit, NaN in the data, a loss that is not a scalar; with the function, argument and module.

    Example:
        A linear model under the mean squared error has the Hessian ``2 xᵀx / n``:

        >>> import torch
        >>> from hessinit import curvature
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> H = curvature.hessian(model, (x, torch.zeros(2, 1)), "mse")
        >>> H.dense()
        tensor([[10., 14.],
                [14., 20.]])
        >>> round(H.trace(), 4), str(H.exactness)
        (30.0, 'exact')
    """
    objective = Objective("hessian", model, batch, loss, forward, chunk_size, training, dropout, seed, progress)
    names = _chosen(objective, params)
    objective.check()
    return Hessian(objective, names, names, exact)


def rayleigh(model: Any, batch: Any, loss: Any, **options: Unpack[Options]) -> Values:
    """The Rayleigh quotient ``κ_k = gᵀGg / gᵀg`` of each layer along its gradient: the slides' "init hessian".

    One gradient, then one JVP a layer. For plain SGD of learning rate γ, ``γ κ`` is the layer's step sharpness.

    Args:
        model: as for :func:`hessian`.
        batch: as for :func:`hessian`.
        loss: as for :func:`hessian`.
        options: ``params``, ``forward``, ``chunk_size``, ``training``, ``dropout``, ``seed``, ``progress`` as for
            :func:`hessian`.

    Returns:
        Numbers by layer, a layer being the module that owns the parameters; nan where the gradient is zero.

    Example:
        >>> import torch
        >>> from hessinit import curvature
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.eye(2)  # the Hessian is the identity
        >>> kappa = curvature.rayleigh(model, (x, torch.ones(2, 1)), "mse")
        >>> {layer: round(k, 6) for layer, k in kappa.items()}
        {'model': 1.0}

    References:
        Skorski 2021, Figure 4.
    """
    objective, layers = _layers("rayleigh", model, batch, loss, options)
    gradient = objective.gradient([name for names in layers.values() for name in names])
    found = Values()
    for layer, names in track(layers.items(), "layers", objective.progress):
        tangent = {name: gradient[name] for name in names}
        square = _square(objective, tangent)
        found[layer] = objective.quadratic_form(tangent) / square if square else float("nan")
    found._exactness = lambda: exactness_of(objective, layers, exact=False)
    return found


def layer_traces(model: Any, batch: Any, loss: Any, num_probes: int | None = 8, **options: Unpack[Options]) -> Values:
    """The layer curvatures ``h_k``: traces of the diagonal blocks of G, all layers from one backward pass a probe.

    With ``D²_z ℓ = R Rᵀ`` and random signs ε, ``h_k = E |Jᵀ_k R ε|²``. The signs of different samples are balanced
    (:func:`hessinit.draw.balanced_signs`): what samples have in common adds nothing to the spread.

    Args:
        model: as for :func:`hessian`.
        batch: as for :func:`hessian`.
        loss: as for :func:`hessian`.
        num_probes: random vectors (default 8); None computes the traces in full, a backward pass an output entry.
        options: as for :func:`rayleigh`.

    Returns:
        Numbers by layer, with ``standard_error`` by layer if ``num_probes`` is given.
    """
    objective, layers = _layers("layer_traces", model, batch, loss, options)
    names = [name for group in layers.values() for name in group]
    return Hessian(objective, names, names, exact=False).traces(num_probes, groups=layers)


@dataclass(frozen=True)
class LayerError:
    """How far the approximate Hessian is from the exact one in one layer's diagonal block.

    Args:
        gradient: ``|gᵀ(H − G)g| / |g|²`` along the layer's gradient, as in the source's Figure 3.
        relative: that over ``|gᵀHg| / |g|²``.
        exact: ``gᵀHg / |g|²``, which may be negative, as G's cannot.
        block: ``|H_kk − G_kk|₂ / |H_kk|₂``, or None if not asked for.
    """

    gradient: float
    relative: float
    exact: float
    block: float | None


def approximation_error(
    model: Any, batch: Any, loss: Any, block: bool = True, tol: float = 1e-2, **options: Unpack[Options]
) -> dict[str, LayerError]:
    """The error of the approximate Hessian in each layer, along the gradient and as an operator.

    Args:
        model: as for :func:`hessian`.
        batch: as for :func:`hessian`.
        loss: as for :func:`hessian`.
        block: whether to measure the operator norm as well, by Lanczos: some dozens of products a layer. Default True.
        tol: relative accuracy of these norms.
        options: as for :func:`rayleigh`.

    Returns:
        A :class:`LayerError` by layer.

    Example:
        The last layer is exact, and so is every layer of a ReLU net:

        >>> import torch
        >>> from hessinit import curvature
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        >>> data = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 0])
        >>> [error.relative < 1e-12 for error in curvature.approximation_error(net, data, "cross_entropy").values()]
        [True, True]

    References:
        Skorski 2021, Figure 3.
    """
    objective, layers = _layers("approximation_error", model, batch, loss, options)
    gradient = objective.gradient([name for names in layers.values() for name in names])
    found = {}
    for layer, names in track(layers.items(), "layers", objective.progress):
        tangent = {name: gradient[name] for name in names}
        approximate = Hessian(objective, names, names, exact=False)
        exact = Hessian(objective, names, names, exact=True)
        square = _square(objective, tangent) or float("nan")
        true = exact.quadratic_form(tangent)
        off = abs(true - approximate.quadratic_form(tangent))
        norm = None
        if block:
            start = stream(objective.seed, "norm").standard_normal(exact.shape[0])
            with exact.products() as true_product, approximate.products() as product:
                norm = spectral_norm(true_product, None, start, tol)
                rest = spectral_norm(lambda v: true_product(v) - product(v), None, start, tol)
            norm = rest / norm if norm else float("nan")
        found[layer] = LayerError(off / square, off / abs(true) if true else float("nan"), true / square, norm)
    return found


def step_sharpness(model: Any, batch: Any, loss: Any, optimizer_or_lr: Any, **options: Unpack[Options]) -> Value:
    """The step sharpness ``ρ = ΔᵀGΔ / |gᵀΔ|`` of the first step Δ that an optimizer would take.

    At ρ = 1 the step ends at the minimum of the quadratic model along it; at ρ = 2 nothing is gained. For plain SGD
    ``ρ = γ κ``. One gradient and one JVP.

    Args:
        model: as for :func:`hessian`.
        batch: as for :func:`hessian`.
        loss: as for :func:`hessian`.
        optimizer_or_lr: a learning rate (plain SGD), or an optimizer of the framework, whose next update is computed by
            a private copy, its state, weight decay and parameter groups included, in float64 where the framework
            allows. Parameters that it does not hold stay.
        options: as for :func:`rayleigh`; ``params`` restricts the step to these.

    Raises:
        TypeError: neither a number nor an optimizer of the model's framework, or one whose step needs a closure.
        ValueError: a learning rate that is not positive and finite.

    Example:
        >>> import torch
        >>> from hessinit import curvature
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.eye(2), torch.ones(2, 1)  # the Hessian is the identity: the step γ = 1 is Newton's
        >>> round(curvature.step_sharpness(model, data, "mse", 1.0), 6)
        1.0
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        >>> round(curvature.step_sharpness(model, data, "mse", sgd), 6)
        0.5
    """
    objective = _objective("step_sharpness", model, batch, loss, options)
    names = _chosen(objective, options.get("params"))
    arrays = objective.network.arrays
    is_number = isinstance(optimizer_or_lr, Real) and not isinstance(optimizer_or_lr, bool)
    if is_number and not 0 < float(optimizer_or_lr) < float("inf"):
        raise ValueError(
            f"step_sharpness: optimizer_or_lr must be a positive, finite learning rate; got {optimizer_or_lr!r}."
        )
    gradient = objective.gradient(names)
    if is_number:
        step = {name: -float(optimizer_or_lr) * g for name, g in gradient.items()}
    else:
        with objective.named_errors():
            step = next(objective.network.updates(optimizer_or_lr, [gradient]))
    gain = abs(sum(arrays.dot(gradient[name], step[name]) for name in names))
    value = Value(objective.quadratic_form(step) / gain if gain else float("nan"))
    value._exactness = lambda: Hessian(objective, names, names, exact=False).exactness
    return value


def _objective(function: str, model: Any, batch: Any, loss: Any, options: Options) -> Objective:
    rest: dict[str, Any] = {key: value for key, value in options.items() if key != "params"}
    return Objective(function, model, batch, loss, **rest)


def _chosen(objective: Objective, params: Globs | None) -> list[str]:
    names = objective.select(params)
    if not names:
        raise ValueError(f"{objective.function}: model must have parameters that train; got none.")
    return names


def _layers(
    function: str, model: Any, batch: Any, loss: Any, options: Options
) -> tuple[Objective, dict[str, list[str]]]:
    """Chosen parameters by the module that owns them."""
    objective = _objective(function, model, batch, loss, options)
    layers: dict[str, list[str]] = {}
    for name in _chosen(objective, options.get("params")):
        layers.setdefault(objective.parameters[name].layer, []).append(name)
    return objective, layers


def _square(objective: Objective, named: Mapping[str, Array]) -> float:
    return sum(objective.network.arrays.dot(g, g) for g in named.values())
