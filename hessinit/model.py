"""Whole models: draw, calibrate, check, write, and put everything back on an error."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import numpy as np

from hessinit import rules
from hessinit.bases import Base, closed_form, current
from hessinit.batches import ONE_AT_A_TIME, Batches, at_the_end, inputs_and_targets, out_of_memory, random_states_kept
from hessinit.calibration import MAX_SCALE, Calibration, Target, calibrate, sharing, take
from hessinit.calibration import check as check_target
from hessinit.draw import check_distribution
from hessinit.networks import wrap
from hessinit.networks.base import BIAS, NORM_OFFSET, NORM_SCALE, WEIGHT, Follower, Group, Network, Parameter, told
from hessinit.objective import Forward
from hessinit.report import Report, Row

Model = TypeVar("Model")
Globs = str | Sequence[str]
CLOSED_FORM, CURRENT = "closed_form", "current"


class Options(TypedDict, total=False):
    """Keywords of :func:`init_`."""

    lr: float | None
    optimizer: Any
    base: str
    distribution: str
    mirrored: bool | None
    nonlinearity: Any
    generator: Any
    seed: int | None
    include: Globs | None
    exclude: Globs | None
    residual_branches: Globs | None
    forget_bias: float | None
    forward: Forward | None
    num_samples: int | None
    level: tuple[float, float] | None
    budget: float | tuple[float, float] | None
    max_scale: float
    process_group: Any
    progress: bool | None


@overload
def init_(
    model: Model,
    batch: Any = None,
    loss: Any = None,
    *,
    return_report: Literal[False] = False,
    **options: Unpack[Options],
) -> Model: ...


@overload
def init_(
    model: Model, batch: Any = None, loss: Any = None, *, return_report: Literal[True], **options: Unpack[Options]
) -> tuple[Model, Report]: ...


def init_(
    model: Any,
    batch: Any = None,
    loss: Any = None,
    *,
    lr: float | None = None,
    optimizer: Any = None,
    base: str = CLOSED_FORM,
    distribution: str = "orthogonal",
    mirrored: bool | None = None,
    nonlinearity: Any = "relu",
    generator: Any = None,
    seed: int | None = None,
    include: Globs | None = None,
    exclude: Globs | None = None,
    residual_branches: Globs | None = None,
    forget_bias: float | None = None,
    forward: Forward | None = None,
    num_samples: int | None = None,
    level: tuple[float, float] | None = None,
    budget: float | tuple[float, float] | None = None,
    max_scale: float = MAX_SCALE,
    process_group: Any = None,
    progress: bool | None = None,
    return_report: bool = False,
) -> Any:
    """Sets every weight of a model: at the closed form's scale, or where the optimizer's first step uses its budget.

    **Closed form** (no learning rate known). Each weight gets standard deviation ``1 / (g (fan_in fan_out)^(1/4))``
    (:mod:`hessinit.rules`), with the gain g of the activation that follows it and of the depth of the chain of layers
    that it belongs to; ``sqrt(K)`` times as much before an average pooling of K positions, ``1 / sqrt(L)`` of it at the
    ends of L residual branches, and a quarter of it where the outputs are added to those of a norm that they would else
    drown: a batch norm's, as a shortcut's are, or any norm's where another takes the sum, as in post-norm transformers.
    An embedding that is the output layer too, and those that are added to it, are as small as that asks for; one that
    is the same for every sample, as a position's, is a fifth of that. Biases become zero, norm layers one and zero. A
    module that gives the same for twice its input is a norm, whoever wrote it; what scales it has of its own stay. The
    activation and the depth are read from module order in ``nn.Sequential`` and from the graph of a Keras
    ``Sequential`` or functional model; for any other model from one traced forward pass if ``batch`` is given; without,
    only layers that tell by themselves are known (gates, attention, embeddings, PyTorch's transformer layers, Keras's
    layers with an activation), and for others ``nonlinearity`` is assumed. The trace also tells of parameters that a
    PyTorch module of the user's own gives to ``F.linear``, a convolution, a product or the like, that they are weights,
    and in a stack of them, as experts are, each is one. A parameter of zeros that is put beside tokens, as a class
    token may be, begins as a position's embedding does. With ``batch`` the first layer of a chain also takes the scale
    of the inputs out (:func:`hessinit.rules.input_layer_std`), and so does, where the graph or a batch tells, an
    embedding that a residual stream, a recurrent layer or attention begins with.

    **Budget** (a batch with targets, and ``lr`` or ``optimizer``). From the closed form's draw, each weight is scaled
    by a factor so that the step sharpness ``ρ = ΔᵀGΔ / |gᵀΔ|`` of the optimizer's step Δ comes to c while the outputs
    stay at a sensible level; among all ways to do so, by the one that changes the trace of G most
    (:mod:`hessinit.budget`). Where a sample is of at most 100 numbers, the first layer has random biases, scaled with
    its weights (:func:`hessinit.rules.input_bias_std`); and so has one of whose outputs a norm would take some that are
    zero but for biases, as of an image's black border or of padding, and blow up every step there. All other biases are
    zero. Weights that write to one stream, as an embedding and the ends of a transformer's blocks do (in one without
    norms, the ends of branches), share a factor, so that none drowns the others. Those whose scale the next norm takes
    out share another: all that it decides is by what angle a step turns them (:class:`hessinit.probe.Turn`), and that
    should be 0.035. Of a step sharper than two only the other weights' part counts. Branches of post-norm transformers
    keep the closed form's scale: the trace would have them shrunk, and attention grown until it saturates. A ρ between
    c and 2, where a step gains nothing, is left as it is; above, it is lowered by the level first. Δ is computed by a
    private copy of the
    optimizer, with its weight decay and parameter groups; momentum counts with the step of its steady state,
    ``lr / (1 − μ)``, a schedule or warm-up with its peak learning rate. The batch goes through the model in training
    mode, without dropout. It takes at most 30 gradient passes over the batch, mostly 7 to 25.

    Nothing but these parameters changes: not modes, buffers, gradients, the optimizer or the global random state. An
    error, or an interruption, leaves every parameter as it was. Frozen parameters, and those that Hugging Face's
    transformers has loaded from a checkpoint, are left unless ``include`` names them.

    Args:
        model: ``torch.nn.Module`` or ``keras.Model`` (built, unless ``batch`` is given).
        batch: inputs alone, of which the closed form reads the scale and the graph; or, for the budget, a pair (inputs,
            targets), a dict with the targets under ``labels``, ``targets`` or ``y``, or a loader of either.
        loss: for the budget: a name (``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``,
            ``"poisson_nll"``, ``"huber"``), a loss of the framework, or a callable of (outputs, targets). Default: that
            of a compiled Keras model.
        lr: learning rate of plain SGD, the peak one of a schedule.
        optimizer: in place of ``lr``, an optimizer of the framework; its state is neither used nor changed. Default:
            that of a compiled Keras model.
        base: ``"closed_form"`` (default), or ``"current"`` to scale the weights that are there and leave all else, as
            :func:`rescale_` does.
        distribution: ``"orthogonal"`` (default), ``"normal"``, ``"truncated_normal"`` or ``"uniform"``.
        mirrored: whether units come in pairs of opposite weights, ``u`` and ``-u``, wherever the activation makes such
            pairs linear and the next layer alone takes them (:func:`hessinit.rules.pair_gain`). The net then begins as
            a linear one, which no depth distorts. Default: with the budget, but for the units that the output layer
            takes: these are the net's features, and in pairs there are half as many.
        nonlinearity: a name, or a function of NumPy arrays or of the framework's tensors, for weights whose
            activation is not known; default ``"relu"``.
        generator: torch models: a ``torch.Generator`` that decides everything.
        seed: an integer that decides everything, for any model. With neither, the weights follow the framework's
            global random state (``torch.manual_seed``, ``keras.utils.set_random_seed``) without advancing it, so two
            calls with no other draw between them give the same weights.
        include: name glob or globs; only parameters that match one are set. Default: all.
        exclude: name glob or globs; parameters that match one are left.
        residual_branches: name glob or globs of the weights that end the branches of a residual stream, one a branch:
            each of L gets ``1 / sqrt(L)`` of the closed form's scale, so that the sum of all branches is as large as
            one. Default: those without norms that are added to what they came from, as far as the model is traced;
            ``[]`` for none. Where each branch begins with a norm, as in transformers, the sum grows slowly anyway; to
            name them helped small language models (by 2 to 6 %) and harmed a small vision transformer at large learning
            rates (by 3 to 12 %).
        forget_bias: of the forget gates of LSTM layers. Default: the framework's, 0 in PyTorch, and 1 in Keras where
            ``unit_forget_bias``. Other biases become 0.
        forward: function of (model, batch) that returns (outputs, targets), for batches of any structure.
        num_samples: samples that the budget is measured on, at random from data in memory, the first ones of a loader.
            Default 256, or fewer of texts and label images: 2048 loss terms, at least 32 samples.
        level: lowest and highest root mean square of the class-centred logits (regression: of the outputs, in standard
            deviations of the targets). Default (0.3, 1.0); for proportional steps (0.3, 2.0) where the first biases are
            random and smaller weights would make the net more linear, as with all activations but ReLU's kind. Where
            proportional steps stay sharper than 2 otherwise, as on deep regressions at large rates, it may fall to a
            sixth of the lowest.
        budget: the step sharpness to come to, or the lowest and highest one. Default: (c, 2), c = 0.7 for proportional
            steps (SGD, with or without momentum) and 0.18 for steps by the gradient's sign (Adam, AdamW, Lion), which
            do not shrink as it does; twice that where norms take sums of outputs or what follows them, as in
            transformers, and of L > 15 layers in a row, 15/L of both ends. Where norms take weights' outputs at once
            and nothing else, no sharpness is too low. Another c changes the angle of weights before norms in
            proportion.
        max_scale: largest factor on a weight, at least 1, default 8; the smallest is 1/100. Where outputs do not follow
            the weight, as before a norm, at most 4 and at least 1/30.
        process_group: torch models: a ``torch.distributed`` group whose processes all make this call, each with its
            share of the batch, and end with the same weights: the seed is the first process's, the budget is measured
            on all shares, and an error in one raises in all before anything is written. Default: the group of a model
            in ``DistributedDataParallel``; else this process is alone.
        progress: whether to show a bar over the batches of a loader. Default: where standard error is a terminal.
        return_report: whether to return ``(model, report)``. Default False.

    Returns:
        The same model; with ``return_report`` also a :class:`~hessinit.report.Report`, a row a parameter.

    Raises:
        TypeError: ``model`` of another kind, or an argument of a wrong type.
        ValueError: unknown distribution or nonlinearity, globs that match nothing, both ``generator`` and ``seed``,
            inputs that the model refuses or that are not finite, an unbuilt Keras model; for the budget a learning rate
            or loss that is missing, targets that do not fit, outputs or gradients that are not finite.

    Example:
        >>> import torch, hessinit
        >>> net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> net, report = hessinit.init_(net, seed=0, return_report=True)
        >>> row = report["0.weight"]
        >>> row.activation, round(row.gain**2, 6), round(row.std, 4), round(row.std_drawn, 4)
        ('ReLU', 0.5, 0.0795, 0.0795)

        Twice the learning rate has half the curvature:

        >>> from hessinit import curvature
        >>> x, y = torch.randn(256, 784, generator=torch.Generator().manual_seed(0)), torch.arange(256) % 10
        >>> for lr in 0.1, 0.2:
        ...     net = hessinit.init_(net, (x, y), "cross_entropy", lr=lr, seed=0)
        ...     print(f"ρ = {curvature.step_sharpness(net, (x, y), 'cross_entropy', lr):.1f}")
        ρ = 0.7
        ρ = 0.7

    References:
        M. Skorski, "Approximating Hessians for Neural Networks", 2021. M. Skorski, A. Temperoni, M. Theobald,
        "Revisiting Weight Initialization of Deep Neural Networks", ACML 2021.
    """
    function = "init_"
    if base not in (CLOSED_FORM, CURRENT):
        raise ValueError(f"{function}: base must be {CLOSED_FORM!r} or {CURRENT!r}; got {base!r}.")
    if forget_bias is not None and not (isinstance(forget_bias, Real) and math.isfinite(forget_bias)):
        raise ValueError(f"{function}: forget_bias must be a finite number or None; got {forget_bias!r}.")
    check_distribution(distribution, function)
    outer = wrap(model, function)
    group, inner = outer.group(process_group), outer.inner()
    network = wrap(inner, function)
    with group.together():
        loss, optimizer = _known(function, network, batch, loss, lr, optimizer)
        calibrated = lr is not None or optimizer is not None
        target = Target(loss, lr, optimizer, budget, level, max_scale, num_samples, forward)
        check_target(function, target)
        activation = network.nonlinearity(nonlinearity)
        rules.gain(activation)
        seed = group.first(_seed(network, generator, seed))
        wanted = None if num_samples is None else -(-num_samples // group.size)
        data, samples = _taken(function, network, batch, wanted, seed, progress) if calibrated else (batch, 0)
        inputs = _inputs(data, calibrated, forward)
        with _forward_errors(inputs):
            network.prepare(inputs, function)
        parameters = network.parameters()
        ends = _matches(parameters, residual_branches, "residual_branches")
        with random_states_kept(network.random_state()), _forward_errors(inputs):
            followers = _shared(group, network.followers(inputs))
        parameters = told(parameters, followers)
        left = _left_alone(parameters, include, exclude)
        unfit = [name for name, f in followers.items() if f.data is not None and not math.isfinite(f.data.moment)]
        if unfit:
            raise ValueError(f"{function}: batch must be finite; got NaN or infinity in the inputs of {unfit[0]}.")
        if base == CURRENT:
            start = current(network, parameters, left, followers if calibrated else {})
        else:
            start = closed_form(
                network,
                parameters,
                left,
                followers,
                ends,
                assumed=Follower(f"{getattr(nonlinearity, '__name__', nonlinearity)} (assumed)", activation),
                paired=calibrated if mirrored is None else mirrored,
                features=mirrored is None,
                biased=calibrated,
                forget_bias=forget_bias,
                distribution=distribution,
                seed=seed,
            )
        values, rows, calibration = start.values, start.rows, None
        if calibrated:
            scalable = {p.name for p in parameters if p.role == WEIGHT and p.proportional} | start.beside.keys()
            scalable -= {name for name, follower in followers.items() if follower.post_norm}
            weights = {name: value for name, value in values.items() if name in scalable and np.any(value)}
            if not weights:
                raise ValueError(f"{function}: model must have a weight to scale; got none that is set and not zero.")
            others = {name: v for name, v in values.items() if name not in weights}
            calibration = calibrate(
                function, inner, data, samples, target, weights, others, followers, start.beside, seed, group
            )
            values, rows = _scaled(start, calibration, followers)
            if base == CURRENT:
                values = {name: values[name] for name in weights}
    law = distribution if base == CLOSED_FORM else None
    blank = _without_bias(network, parameters, followers, values)
    report = Report(tuple(rows[p.name] for p in parameters), seed, law, calibration, tuple(network.buffers()), blank)
    _write(network, values)
    return (model, report) if return_report else model


def rescale_(model: Any, batch: Any, loss: Any = None, **options: Any) -> Any:
    """Scales the weights that are there, by whatever initializer, so that the optimizer's first step uses its budget.

    :func:`init_` with ``base="current"``: the budget alone. Biases, norms and every other parameter stay; so does a
    weight that is all zero. A shortcut whose outputs are added to a batch norm's begins at a quarter of what is there.

    Args:
        model: as for :func:`init_`.
        batch: as for :func:`init_`, with targets.
        loss: as for :func:`init_`.
        options: ``lr``, ``optimizer``, ``include``, ``exclude``, ``forward``, ``num_samples``, ``level``, ``budget``,
            ``max_scale``, ``process_group``, ``progress``, ``seed``, ``generator``, ``return_report``, as for
            :func:`init_`.

    Returns:
        As :func:`init_`.

    Example:
        >>> import torch, hessinit
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> before = net[0].weight.detach().clone()
        >>> data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        >>> _, report = hessinit.rescale_(net, data, "cross_entropy", lr=0.1, seed=0, return_report=True)
        >>> torch.allclose(net[0].weight, before * report["0.weight"].scale)
        True
    """
    return init_(model, batch, loss, base=CURRENT, **options)


def _known(function: str, network: Network, batch: Any, loss: Any, lr: float | None, optimizer: Any) -> tuple[Any, Any]:
    """Loss and optimizer, of a compiled Keras model its own; (None, None) where the closed form is asked for."""
    own_loss, own_optimizer = network.compiled()
    asked = lr is not None or optimizer is not None or loss is not None
    paired = isinstance(batch, (tuple, list)) and len(batch) == 2
    loader = batch is not None and not paired and not hasattr(batch, "shape") and not isinstance(batch, Mapping)
    if not asked and not paired and not loader:
        return None, None
    if batch is None:
        raise ValueError(f"{function}: batch must be given with loss, lr or optimizer; got None.")
    if lr is None and optimizer is None:
        optimizer = own_optimizer
    if lr is None and optimizer is None:
        raise ValueError(
            f"{function}: lr or optimizer must be given with a batch of inputs and targets; got neither. How much "
            "curvature is right depends on the step to be taken: pass lr= (SGD) or optimizer=, or the inputs alone for "
            "the closed form."
        )
    loss = own_loss if loss is None else loss
    if loss is None:
        raise ValueError(f"{function}: loss must be given with lr or optimizer; got None.")
    return loss, optimizer


def _taken(
    function: str, network: Network, batch: Any, num_samples: int | None, seed: int, progress: bool | None
) -> tuple[Any, int]:
    """The samples that the budget is measured on, and their number."""
    try:
        with random_states_kept(network.random_state()):
            return take(Batches(batch, network.arrays.is_array, progress), num_samples, network.arrays, seed)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: {str(error).rstrip('.')}.") from error


def _shared(group: Group, followers: Mapping[str, Follower]) -> dict[str, Follower]:
    """With the mean square of the inputs of all processes."""
    data = {name: f.data for name, f in followers.items() if f.data is not None}
    total = group.sum({name: d.moment for name, d in data.items()}) if data else {}
    blanks = group.sum({name: float(followers[name].blank) for name in data}) if data else {}
    shared = {name: d._replace(moment=total[name] / group.size) for name, d in data.items()}
    return {
        name: replace(f, data=shared[name], blank=blanks[name] > 0) if name in shared else f
        for name, f in followers.items()
    }


def _without_bias(
    network: Network, parameters: Sequence[Parameter], followers: Mapping[str, Follower], values: Mapping[str, Any]
) -> tuple[str, ...]:
    """The weights of which a norm takes zeros, as their layers have no biases, or zero ones."""
    found = {p.layer: p.name for p in parameters if p.name in followers and followers[p.name].blank}
    for p in parameters:
        if p.role == BIAS and p.layer in found:
            own = values[p.name] if p.name in values else network.arrays.numpy(network.values([p.name])[p.name])
            if np.any(own):
                del found[p.layer]
    return tuple(found.values())


def _write(network: Network, values: Mapping[str, Any]) -> None:
    """Writes all parameters or, on an error or an interruption, none."""
    saved: dict[str, Any] = {}

    def restore() -> None:
        for name, value in saved.items():
            network.restore(name, value)

    try:
        for name, value in values.items():
            saved[name] = network.snapshot(name)
            network.write(name, value)
    except BaseException:
        with at_the_end(restore):
            raise


def _scaled(
    start: Base, calibration: Calibration, followers: Mapping[str, Follower]
) -> tuple[dict[str, Any], dict[str, Row]]:
    """Values and rows after the calibration."""
    values, rows = dict(start.values), dict(start.rows)
    for name, factor in calibration.of_biases.items():  # drawn before the kind of step was known
        values[name] = values[name] * np.asarray(factor, values[name].dtype)
        rows[name] = replace(rows[name], std=rows[name].std * factor, std_drawn=rows[name].std_drawn * factor)
    shared = sharing(calibration.scales, followers)
    together = {key for key, sharers in Counter(shared.values()).items() if sharers > 1}
    for name, scale in calibration.scales.items():
        values[name] = values[name] * np.asarray(scale, values[name].dtype)
        row = rows[name]
        rows[name] = row = replace(row, scale=scale * start.begun.get(name, 1.0), std=row.std * scale)
        if row.role == WEIGHT:
            rows[name] = replace(
                row,
                note=f"{row.note}, {_share(followers[name])}" if shared.get(name) in together else row.note,
                curvature_before=calibration.before.curvature[name],
                curvature=calibration.after.curvature[name],
            )
    return values, rows


def _share(follower: Follower) -> str:
    """What a weight shares its scale with."""
    return "before a norm" if follower.stream is None else "of a stream"


@contextlib.contextmanager
def _forward_errors(inputs: Any) -> Iterator[None]:
    """Says of an error in a forward pass which argument it comes from."""
    try:
        yield
    except Exception as error:
        if inputs is None or out_of_memory(error) or str(error).startswith("init_: "):
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
        if p.left and not p.dtype.startswith("complex"):
            left[p.name] = p.left
        elif p.tied_to is not None:
            left[p.name] = f"tied to {p.tied_to}"
        elif p.name in barred:
            left[p.name] = "left: excluded"
        elif named is not None and p.name not in named:
            left[p.name] = "left: not included"
        elif p.frozen and named is None:
            left[p.name] = "left: frozen"
        elif p.loaded and named is None:
            left[p.name] = "left: loaded from a checkpoint"
        elif p.left:
            raise TypeError(
                f"init_: model must have real parameters; got {p.name!r} of {p.dtype} in {p.layer}. exclude= leaves it."
            )
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
        with ONE_AT_A_TIME:  # which another thread may hold with the global random state set to its own
            return network.seed(generator)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"init_: seed must be an integer or None; got {seed!r}.")
    return int(seed)


def _inputs(data: Any, calibrated: bool, forward: Forward | None) -> Any:
    """What the model is traced by: of a pair the first, of a loader that of its first batch, or a way to call it."""
    if not calibrated:
        return data
    first = data[0] if isinstance(data, list) and not hasattr(data[0], "shape") else data
    if forward is not None:
        return lambda model: forward(model, first)[0]
    return inputs_and_targets(first)[0]
