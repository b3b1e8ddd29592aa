"""Whole models: draw, check, write, and put everything back on an error."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np

from hessinit import rules
from hessinit.draw import check_distribution, draw, stream
from hessinit.layout import Fans
from hessinit.networks import wrap
from hessinit.networks.base import BIAS, NORM_OFFSET, NORM_SCALE, WEIGHT, Follower, Network, Parameter
from hessinit.report import Report, Row

Model = TypeVar("Model")
Globs = str | Sequence[str]


@overload
def init_(
    model: Model,
    batch: Any = None,
    *,
    distribution: str = "orthogonal",
    nonlinearity: Any = "relu",
    generator: Any = None,
    seed: int | None = None,
    include: Globs | None = None,
    exclude: Globs | None = None,
    return_report: Literal[False] = False,
) -> Model: ...


@overload
def init_(
    model: Model,
    batch: Any = None,
    *,
    distribution: str = "orthogonal",
    nonlinearity: Any = "relu",
    generator: Any = None,
    seed: int | None = None,
    include: Globs | None = None,
    exclude: Globs | None = None,
    return_report: Literal[True],
) -> tuple[Model, Report]: ...


def init_(
    model: Any,
    batch: Any = None,
    *,
    distribution: str = "orthogonal",
    nonlinearity: Any = "relu",
    generator: Any = None,
    seed: int | None = None,
    include: Globs | None = None,
    exclude: Globs | None = None,
    return_report: bool = False,
) -> Any:
    """Sets every weight of a model to the closed form's curvature-neutral scale.

    Each weight gets standard deviation ``1 / (g (fan_in fan_out)^(1/4))`` (:mod:`hessinit.rules`), with the gain g of
    the activation that follows it and of the depth of the chain of layers that it belongs to. Biases become zero, norm
    layers one and zero. The activation and the depth are read from module order in ``nn.Sequential`` and from the graph
    of a Keras ``Sequential`` or functional model; for any other model from one traced forward pass if ``batch`` is
    given, and else ``nonlinearity`` is assumed. With ``batch`` the first layer of a chain also takes the scale of the
    inputs out (:func:`hessinit.rules.input_layer_std`).

    Nothing but these parameters changes: not modes, buffers, gradients or the global random state. An error, or an
    interruption, leaves every parameter as it was. Frozen parameters are left unless ``include`` names them.

    Args:
        model: ``torch.nn.Module`` or ``keras.Model`` (built, unless ``batch`` is given).
        batch: inputs, or a pair of inputs and targets, of which the closed form reads the inputs; a dict for keyword
            inputs. Any number of samples; one forward pass is made. Default: none.
        distribution: ``"orthogonal"`` (default), ``"normal"``, ``"truncated_normal"`` or ``"uniform"``.
        nonlinearity: a name, or a function of NumPy arrays or of the framework's tensors, for weights whose
            activation is not known; default ``"relu"``.
        generator: torch models: a ``torch.Generator`` that decides everything.
        seed: an integer that decides everything, for any model. With neither, the weights follow the framework's
            global random state (``torch.manual_seed``, ``keras.utils.set_random_seed``) without advancing it, so two
            calls with no other draw between them give the same weights.
        include: name glob or globs; only parameters that match one are set. Default: all.
        exclude: name glob or globs; parameters that match one are left.
        return_report: whether to return ``(model, report)``. Default False.

    Returns:
        The same model; with ``return_report`` also a :class:`~hessinit.report.Report`, a row a parameter.

    Raises:
        TypeError: ``model`` of another kind, or an argument of a wrong type.
        ValueError: unknown distribution or nonlinearity, globs that match nothing, both ``generator`` and ``seed``,
            inputs that the model refuses or that are not finite, an unbuilt Keras model.

    Example:
        >>> import torch, hessinit
        >>> net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> net, report = hessinit.init_(net, seed=0, return_report=True)
        >>> row = report["0.weight"]
        >>> row.activation, round(row.gain**2, 6), round(row.std, 4), round(row.std_drawn, 4)
        ('ReLU', 0.5, 0.0795, 0.0795)

    References:
        M. Skorski, "Approximating Hessians for Neural Networks", 2021. M. Skorski, A. Temperoni, M. Theobald,
        "Revisiting Weight Initialization of Deep Neural Networks", ACML 2021.
    """
    check_distribution(distribution, "init_")
    network = wrap(model, "init_")
    function = network.nonlinearity(nonlinearity)
    rules.gain(function)
    inputs = _inputs(batch)
    with _forward_errors(inputs):
        network.prepare(inputs, "init_")
    parameters = network.parameters()
    left = _left_alone(parameters, include, exclude)
    seed = _seed(network, generator, seed)
    with _forward_errors(inputs):
        followers = network.followers(inputs)
    if any(not math.isfinite(f.input_moment or 0) for f in followers.values()):
        raise ValueError("init_: batch must be finite; got NaN or infinity in the inputs.")
    assumed = Follower(f"{getattr(nonlinearity, '__name__', nonlinearity)} (assumed)", function)
    rows: dict[str, Row] = {}
    saved: dict[str, Any] = {}
    try:
        for parameter in parameters:
            name = parameter.name
            if name in left:
                rows[name] = _row(parameter, touched=False, note=left[name])
                continue
            saved[name] = network.snapshot(name)
            rows[name] = _set(network, parameter, followers.get(name, assumed), distribution, seed)
    except BaseException:  # an interruption too must leave no weight half-written
        for name, values in saved.items():
            network.restore(name, values)
        raise
    report = Report(tuple(rows[p.name] for p in parameters), seed, distribution)
    return (model, report) if return_report else model


def _set(network: Network, parameter: Parameter, follower: Follower, distribution: str, seed: int) -> Row:
    """Draws and writes one parameter."""
    if parameter.role in (BIAS, NORM_OFFSET, NORM_SCALE):
        value = 1.0 if parameter.role == NORM_SCALE else 0.0
        network.write(parameter.name, np.full(parameter.shape, value, np.float32))
        return _row(parameter, touched=True, note=f"set to {value:g}")
    assert parameter.layout is not None  # of every weight that is chosen, see _left_alone
    fans = parameter.layout.fans(parameter.shape)
    gain = rules.gain(follower.function, depth=follower.depth)
    std, note = _std(fans, gain, follower)
    wide = np.float64 if parameter.dtype == "float64" else np.float32
    values = draw(parameter.shape, parameter.layout, std, distribution, stream(seed, parameter.key), wide)
    std_drawn = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else math.nan
    if parameter.zero_row is not None:
        values[parameter.zero_row] = 0
        note += f", row {parameter.zero_row} (padding) zero"
    network.write(parameter.name, values)
    return _row(
        parameter,
        touched=True,
        note=note,
        fan_in=fans.fan_in,
        fan_out=fans.fan_out,
        activation=follower.name,
        depth=follower.depth,
        gain=gain,
        std=std,
        std_drawn=std_drawn,
    )


def _std(fans: Fans, gain: float, follower: Follower) -> tuple[float, str]:
    """The std asked for, and which rule it comes from."""
    if 0 in fans:
        return 0.0, "empty"
    if follower.input_moment and (follower.depth or 1) > 1:
        return rules.input_layer_std(fans.fan_in, follower.input_moment), "scaled to the inputs"
    return rules.curvature_neutral_std(fans.fan_in, fans.fan_out, gain), "drawn"


def _row(parameter: Parameter, touched: bool, note: str, **numbers: Any) -> Row:
    p = parameter
    return Row(name=p.name, shape=p.shape, dtype=p.dtype, role=p.role, touched=touched, note=note, **numbers)


@contextlib.contextmanager
def _forward_errors(inputs: Any) -> Iterator[None]:
    """Says of an error in a forward pass which argument it comes from."""
    try:
        yield
    except Exception as error:
        if inputs is None:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"init_: batch must be inputs that the model accepts; its forward pass failed ({what})."
        ) from error


def _left_alone(parameters: Sequence[Parameter], include: Globs | None, exclude: Globs | None) -> Mapping[str, str]:
    """The parameters that stay as they are, with the reason."""
    named = _matches(parameters, include, "include")
    barred = _matches(parameters, exclude, "exclude") or set()
    left = {}
    for p in parameters:
        if p.left:
            left[p.name] = p.left
        elif p.tied_to is not None:
            left[p.name] = f"tied to {p.tied_to}"
        elif p.name in barred:
            left[p.name] = "left: excluded"
        elif named is not None and p.name not in named:
            left[p.name] = "left: not included"
        elif p.frozen and named is None:
            left[p.name] = "left: frozen"
        elif p.role not in (WEIGHT, BIAS, NORM_SCALE, NORM_OFFSET):
            left[p.name] = "left: no rule for it"
    return left


def _matches(parameters: Sequence[Parameter], globs: Globs | None, argument: str) -> set[str] | None:
    if globs is None:
        return None
    found: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else list(globs):
        if not isinstance(glob, str):
            raise TypeError(f"init_: {argument} must be name globs; got {glob!r}.")
        hits = {p.name for p in parameters if fnmatch.fnmatchcase(p.name, glob)}
        if not hits:
            names = ", ".join(p.name for p in parameters[:8]) + (", …" if len(parameters) > 8 else "")
            raise ValueError(f"init_: {argument} must match a parameter; {glob!r} matches none of {names}.")
        found |= hits
    return found


def _seed(network: Network, generator: Any, seed: int | None) -> int:
    if generator is not None and seed is not None:
        raise ValueError(f"init_: generator and seed must not both be given; got {generator!r} and {seed!r}.")
    if seed is None:
        return network.seed(generator)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"init_: seed must be an integer or None; got {seed!r}.")
    return int(seed)


def _inputs(batch: Any) -> Any:
    """The inputs of a batch: of a pair (inputs, targets) the first, else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
