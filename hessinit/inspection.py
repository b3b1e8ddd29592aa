"""What the signals of a model are like before its first step, with the weights that it has."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from hessinit.batches import random_states_kept
from hessinit.model import init_
from hessinit.networks import wrap
from hessinit.networks.base import NORM_SCALE, OTHER, WEIGHT, Array, Named, Network, Parameter, told
from hessinit.probe import unit_squares

FADED, GROWN = 1e-3, 1e3  # signals, over that of the first layer
SAME = 1e-3  # share of a signal that differs between samples, below which they can hardly be told apart
SURE = 2.0  # first loss over that of a uniform guess; the closed form itself gives small nets up to 1.7
FAINT = 1e-3  # what stands for a weight of zero, so that a gradient shows what is before it
LISTED = 4  # names in a warning


@dataclass(frozen=True)
class Layer:
    """One weight, and the output of the layer that owns it.

    Args:
        name: of the weight, the framework's own.
        kind: class of the layer.
        shape: of the weight.
        std: root mean square of the weight; NaN where it is computed from others.
        closed_form: the std that :func:`hessinit.init_` with these inputs asks for; NaN where it leaves the weight.
        rms: root mean square of the layer's output; NaN where the pass shows none.
        variation: share of the output that differs between samples, 0 to 1; NaN where its first axis is not theirs.
        units: number of output units of the weight.
        dead: share of these that no sample moves; NaN where that is not known.
        note: of a weight that is zero, tied, computed from others or not used.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    std: float
    closed_form: float
    rms: float
    variation: float
    units: int
    dead: float
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found: ``print(inspection)``, ``inspection["fc1.weight"]``, ``warnings``, ``to_json``.

    Args:
        layers: one a weight.
        warnings: a line each; none for a healthy model.
        output_rms: root mean square of the model's first output.
        first_loss: cross-entropy of the outputs as logits, expected over labels at random; NaN where they are none.
        uniform_loss: that of a uniform guess, ``ln C``; NaN likewise.
        parameters: number of numbers in all parameters, tied ones once.
    """

    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    output_rms: float
    first_loss: float
    uniform_loss: float
    parameters: int

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_json(self) -> str:
        """All of it as one JSON object; NaN and infinity are ``null``."""
        found = asdict(self)
        for part in (found, *found["layers"]):
            part.update({k: None for k, v in part.items() if isinstance(v, float) and not math.isfinite(v)})
        return json.dumps(found, indent=2, allow_nan=False)

    def __str__(self) -> str:
        head = ["weight", "layer", "shape", "std", "closed form", "output rms", "varies", "dead", "note"]
        lines = [head, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(line[j]) for line in lines) for j in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        table.insert(1, "-" * len(table[0].rstrip()))
        last = f"{self.parameters:,} parameters, output rms {self.output_rms:.3g}"
        if not math.isnan(self.uniform_loss):
            last += f", first loss {self.first_loss:.3f} (a uniform guess has {self.uniform_loss:.3f})"
        return "\n".join(line.rstrip() for line in [*table, last, *(f"warning: {line}" for line in self.warnings)])


def inspect(model: Any, inputs: Any, *, classes: int | None = None) -> Inspection:
    """The signals of a model at its first training step, layer by layer, and what to be warned of. It sets nothing.

    The inputs go through the model in training mode without dropout, twice forward and once back, and once more where
    calls have to tell which parameters are weights. Nothing of the model changes: not weights (lazy ones are made),
    modes, buffers, gradients or the global random state. Warned of are

    * *dead* units, which no sample moves: no gradient of a random sum of the outputs reaches them. Where samples are
      much alike, as noise is after pooling, rectifiers cut off up to half of a layer's by chance; more is a warning. A
      weight or a norm's scale that is all zero, as it may well be at the end of a branch or of a net, hides none;
    * a *vanished* or *exploding* signal: the root mean square of a layer's output is below 1e-3 or above 1e3 times that
      of the first layer's (of the first layer: of the inputs'), or is not finite. Or the outputs hardly differ between
      samples, less than by 1e-3, from some layer on to the last;
    * *tied* weights, which one initializer sets for two places;
    * a *first loss* of more than 2 ln C, the mark of logits that are too large.

    Args:
        model: ``torch.nn.Module`` or ``keras.Model``.
        inputs: of some samples, two or more: an array, or of a torch model a dict of keyword arguments.
        classes: number of classes C, where the outputs are logits; 0 where they are none. Default: the last axis of
            outputs with two or three axes, if it is longer than one.

    Returns:
        An :class:`Inspection`.

    Raises:
        TypeError: ``model`` of another kind.
        ValueError: a model without weights, or inputs that it refuses; outputs that are not arrays of floating-point
            numbers, or have no axis of ``classes``.

    Example:
        >>> import torch
        >>> first, last = torch.nn.Linear(784, 128, bias=False), torch.nn.Linear(128, 10, bias=False)
        >>> generator = torch.Generator().manual_seed(0)
        >>> for layer in first, last:
        ...     _ = torch.nn.init.normal_(layer.weight, generator=generator)
        >>> net = torch.nn.Sequential(first, torch.nn.ReLU(), last)
        >>> found = inspect(net, torch.randn(64, 784, generator=generator))
        >>> print(f"{found['0.weight'].rms:.0f}, {found['2.weight'].rms:.0f}")  # expected: 28, 28 · sqrt(128 / 2) = 224
        28, 233
        >>> print(*found.warnings)
        first loss 402, where a uniform guess has 2.3: logits of rms 233 are too large
    """
    network = wrap(wrap(model, "inspect").inner(), "inspect")
    arrays = network.arrays
    with random_states_kept(network.random_state()), np.errstate(all="ignore"):
        with _forward_errors(network, inputs):
            network.prepare(inputs, "inspect")
        parameters = _parameters(network, inputs)
        weights = [p for p in parameters if p.role == WEIGHT and p.differentiable]
        if not weights:
            raise ValueError(
                f"inspect: model must have a weight that init_ knows, with values; got {type(model).__name__}."
            )
        own = [p for p in parameters if p.differentiable and p.tied_to is None]
        values = {p.name: network.snapshot(p.name) for p in own}  # copies: some layers write to theirs in a pass
        owners = _owners(network, [p.name for p in weights])
        samples = next((int(x.shape[0]) for x in _arrays(network, inputs) if len(x.shape)), 1)
        with network.pure(training=True, dropout=False, seed=0) as apply, _forward_errors(network, inputs):

            def forward(values: Named) -> list[Array]:
                made: list[Array] = apply(values, lambda: _floating(network, network.forward(inputs)))
                return made

            with _watched(network, owners, samples) as seen:
                outputs = forward(values)
            if not outputs:
                raise ValueError("inspect: model must give an array of floating-point numbers; got none.")
            dead = _dead_shares(network, own, values, forward)
            copies = {p.name: network.snapshot(p.name) for p in own}  # to be written to
            closed = apply(copies, lambda: _closed_form(network.inner(), inputs))
        layers = {}
        for p in weights:
            owner, value = owners[p.name], arrays.numpy(values[p.tied_to or p.name])
            kind, signals = type(owner).__name__.removeprefix("Parametrized"), seen.get(id(owner), [])
            layers[p.name] = _layer(p, kind, value, signals, dead.get(p.name), closed.get(p.name, math.nan))
        output = arrays.numpy(outputs[0]).astype(np.float64)
        rms, (first, uniform) = _rms(output), _losses(output, classes)
        start = next((_rms(arrays.numpy(x)) for x in _floating(network, inputs)), math.nan)
    names = {id(owner): name for name, owner in reversed(owners.items())}
    warnings = [
        *_warnings_of_units(list(layers.values())),
        *_warnings_of_signals([layers[names[key]] for key in seen], start),
        *_warnings_of_ties(parameters),
        *_warnings_of_loss(first, uniform, rms),
    ]
    count = sum(math.prod(p.shape) for p in own)
    return Inspection(tuple(layers.values()), tuple(warnings), rms, first, uniform, count)


def random_inputs(
    model: Any, shape: Sequence[int], *, batch_size: int = 64, integers: int | None = None, seed: int = 0
) -> Any:
    """Inputs for :func:`inspect` from a standard normal distribution, of the model's dtype and on its device.

    Args:
        model: as for :func:`inspect`.
        shape: of one sample.
        batch_size: number of samples.
        integers: for models of tokens: uniform integers below this number. Default: none.
        seed: of the draw.

    Returns:
        An array of the framework, ``(batch_size, *shape)``.

    Raises:
        TypeError: ``model`` of another kind.

    Example:
        >>> import torch
        >>> random_inputs(torch.nn.Linear(3, 2).double(), [3], batch_size=4).dtype
        torch.float64
    """
    network = wrap(wrap(model, "random_inputs").inner(), "random_inputs")
    rng = np.random.default_rng(seed)
    size = (batch_size, *shape)
    drawn = rng.standard_normal(size, np.float32) if integers is None else rng.integers(integers, size=size)
    like = list(network.values([p.name for p in network.parameters() if "float" in p.dtype][:1]).values())
    if not like:  # of a Keras model that is not built
        return drawn
    # Tokens are integers that go where the model is, as labels do.
    return network.arrays.asarray(drawn, like[0]) if integers is None else network.targets(drawn, like[0])


# ---- the passes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _forward_errors(network: Network, inputs: Any) -> Iterator[None]:
    """Says of an error in a pass which argument it comes from, and where it was raised."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("inspect: "):
            raise
        shapes = ", ".join(str(tuple(x.shape)) for x in _arrays(network, inputs)) or type(inputs).__name__
        place = network.where(error)
        what = f"{type(error).__name__}{f' in {place}' if place else ''}: {error}".splitlines()[0]
        raise ValueError(f"inspect: inputs must be what the model takes; got shape {shapes} and {what}") from error


def _parameters(network: Network, inputs: Any) -> list[Parameter]:
    """Of the model, with the roles that calls tell where no module does."""
    parameters = list(network.parameters())
    if not any(p.role == OTHER for p in parameters):
        return parameters
    copies = {p.name: network.snapshot(p.name) for p in parameters if p.differentiable and p.tied_to is None}
    with network.pure(training=True, dropout=False, seed=0) as apply, _forward_errors(network, inputs):
        followers = apply(copies, lambda: wrap(network.inner(), "inspect").followers(inputs))
    return told(parameters, followers)


def _arrays(network: Network, tree: Any) -> Iterator[Array]:
    if isinstance(tree, np.ndarray) or network.arrays.is_array(tree):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _arrays(network, part)


def _floating(network: Network, tree: Any) -> list[Array]:
    arrays = network.arrays
    return [x for x in _arrays(network, tree) if not isinstance(x, np.ndarray) and arrays.is_floating(x)]


def _owners(network: Network, names: Sequence[str]) -> dict[str, Any]:
    """The module or layer of each weight."""
    model = network.inner()
    if hasattr(model, "_flatten_layers"):  # a Keras model, which on the torch backend is a module too
        found = {v.path: layer for layer in model._flatten_layers() for v in layer._trainable_variables}
        found |= {v.path: layer for layer in model._flatten_layers() for v in layer._non_trainable_variables}
        return {name: found[name] for name in names}
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: modules[name.rpartition(".")[0].partition("parametrizations")[0].rstrip(".")] for name in names}


class _Signal(NamedTuple):
    """Of one call of a layer: mean square of the output, its mean variance over samples, how many numbers it has."""

    square: float
    variance: float
    size: int


@contextlib.contextmanager
def _watched(network: Network, owners: Mapping[str, Any], samples: int) -> Iterator[dict[int, list[_Signal]]]:
    """The outputs of layers, by ``id`` of the layer, in the order in which they are first met."""
    seen: dict[int, list[_Signal]] = {}

    def see(owner: Any, output: Any) -> None:
        for array in _floating(network, output)[:1]:
            try:
                values = network.arrays.numpy(array).astype(np.float64)
            except Exception:  # a layer in a compiled loop of Keras's: there are no numbers to look at
                return
            sampled = samples > 1 and values.ndim > 0 and len(values) % samples == 0
            variance = float(values.var(axis=0).mean()) if sampled else math.nan
            seen.setdefault(id(owner), []).append(_Signal(_rms(values) ** 2, variance, values.size))

    with contextlib.ExitStack() as stack:
        for owner in {id(owner): owner for owner in owners.values()}.values():
            if hasattr(owner, "_flatten_layers"):
                stack.callback(owner.__dict__.pop, "call")
                owner.__dict__["call"] = _seen_by(see, owner, owner.call)
            else:
                hook = owner.register_forward_hook(lambda module, args, output: see(module, output))
                stack.callback(hook.remove)
        yield seen


def _seen_by(see: Callable[[Any, Any], None], layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def seen_call(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        see(layer, output)
        return output

    return seen_call


def _dead_shares(
    network: Network, own: Sequence[Parameter], values: Named, forward: Callable[[Named], list[Array]]
) -> dict[str, float]:
    """Of each weight, the share of output units that no gradient of a random sum of the outputs reaches."""
    arrays, rng = network.arrays, np.random.default_rng(0)
    opened = dict(values)
    for p in own:
        if p.role in (WEIGHT, NORM_SCALE, OTHER) and not np.any(arrays.numpy(values[p.name])):
            opened[p.name] = arrays.asarray(FAINT * rng.standard_normal(p.shape), values[p.name])

    def total(moved: Named) -> Array:
        rng = np.random.default_rng(1)
        sums = [arrays.sum(z * arrays.asarray(rng.standard_normal(z.shape), z)) for z in forward({**opened, **moved})]
        return sum(sums[1:], start=sums[0])

    weights = {p.name: p for p in own if p.role == WEIGHT}
    _, gradient = network.derivatives.gradient(total, {name: opened[name] for name in weights})
    return {name: float(np.mean(unit_squares(arrays, p, gradient[name]) == 0)) for name, p in weights.items()}


def _closed_form(model: Any, inputs: Any) -> dict[str, float]:
    """The std that :func:`hessinit.init_` asks for, by weight; it writes to the model."""
    try:
        _, report = init_(model, inputs, include="*", distribution="normal", seed=0, return_report=True)
    except Exception:  # a model that it refuses, or cannot trace, has no closed form beside its own weights
        return {}
    return {row.name: row.std for row in report}


# ---- what they say ---------------------------------------------------------------------------------------------------


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if np.size(values) else math.nan


def _layer(
    p: Parameter, kind: str, value: Any, signals: Sequence[_Signal], dead: float | None, closed_form: float
) -> Layer:
    size = sum(signal.size for signal in signals)
    square = sum(signal.square * signal.size for signal in signals) / size if size else math.nan
    variance = sum(signal.variance * signal.size for signal in signals) / size if size else math.nan
    notes = [f"tied to {p.tied_to}"] if p.tied_to is not None else []
    notes += [f"computed through {p.derived}"] if p.derived else []
    if not signals and dead == 1:  # the weight takes no part in the pass
        dead, notes = None, [*notes, "not used"]
    std = math.nan if p.derived else _rms(value)
    assert p.layout is not None  # of every weight
    copies, units, _ = p.layout.blocks(p.weight_shape or p.shape)[0]
    return Layer(
        name=p.name,
        kind=kind,
        shape=p.weight_shape or p.shape,
        std=std,
        closed_form=closed_form,
        rms=math.sqrt(square),
        variation=math.sqrt(variance / square) if square else variance,
        units=copies * units,
        dead=math.nan if dead is None else dead,
        note=", ".join([*notes, "zero"] if std == 0 else notes),
    )


def _losses(z: Any, classes: int | None) -> tuple[float, float]:
    """Cross-entropy of logits z, expected over uniformly random labels, and ``ln C``; NaN where they are no logits."""
    axis = _class_axis(z.shape, classes)
    if axis is None:
        return math.nan, math.nan
    loss = special.logsumexp(z, axis=axis) - z.mean(axis=axis)
    return float(loss.mean()), math.log(z.shape[axis])


def _class_axis(shape: tuple[int, ...], classes: int | None) -> int | None:
    if classes is None:
        return -1 if len(shape) in (2, 3) and shape[-1] > 1 else None
    if classes == 0:
        return None
    for axis in (-1, 1):
        if classes > 1 and len(shape) > 1 and shape[axis] == classes:
            return axis
    raise ValueError(
        f"inspect: classes must be 0, or the length, above 1, of the outputs' last or second axis; got {classes!r} for "
        f"outputs of shape {shape}."
    )


# ---- warnings --------------------------------------------------------------------------------------------------------


def _warnings_of_units(layers: Sequence[Layer]) -> list[str]:
    some = [f"{layer.dead:.0%} of {layer.name}" for layer in layers if _by_chance(layer.units) < layer.dead < 1]
    cut = [layer.name for layer in layers if layer.dead == 1]
    lines = [f"dead units, which no sample moves: {_listed(some)}"] if some else []
    if cut:
        lines.append(f"no gradient reaches {_listed(cut)}: its units are dead, those after it are, or it is cut off")
    return lines


def _by_chance(units: int) -> float:
    """The most units, as a share, that rectifiers cut off where samples are alike: half of them, and three sigma."""
    return 0.5 + 1.5 / math.sqrt(units)


def _warnings_of_signals(layers: Sequence[Layer], start: float) -> list[str]:
    """Of layers in the order of the pass, from inputs of this root mean square (NaN for integers)."""
    for layer in layers:
        if not math.isfinite(layer.rms):
            return [f"signal not finite from {layer.name} on"]
    layers = [layer for layer in layers if layer.std != 0]  # a weight of zero is meant so
    if not layers:
        return []
    first, lines = layers[0], []
    for what, low, high in (("vanished", 0.0, FADED), ("exploding", GROWN, math.inf)):
        for before, where, after in ((first.rms, first.name, layers[1:]), (start, "the inputs", [first])):
            found = [f"{x.name} ({x.rms:.2g})" for x in after if low * before <= x.rms < high * before]
            if found:
                lines.append(f"{what} signal, against rms {before:.2g} of {where}: {_listed(found)}")
    alike = list(itertools.takewhile(lambda layer: layer.variation < SAME, reversed(layers)))
    if alike:
        names = _listed([layer.name for layer in reversed(alike)])
        lines.append(f"vanished signal, less than {SAME:.1%} of it differs between samples: {names}")
    return lines


def _warnings_of_ties(parameters: Sequence[Parameter]) -> list[str]:
    tied = [f"{p.name} is {p.tied_to}" for p in parameters if p.tied_to is not None]
    return [f"tied weights: {_listed(tied)}"] if tied else []


def _warnings_of_loss(first: float, uniform: float, rms: float) -> list[str]:
    if not first > SURE * uniform:
        return []
    return [f"first loss {first:.3g}, where a uniform guess has {uniform:.3g}: logits of rms {rms:.3g} are too large"]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _cells(layer: Layer) -> list[str]:
    def number(value: float, spec: str) -> str:
        return "" if math.isnan(value) else format(value, spec)

    shape = "x".join(map(str, layer.shape))
    numbers = [number(value, ".4g") for value in (layer.std, layer.closed_form, layer.rms)]
    shares = [number(value, ".0%") for value in (layer.variation, layer.dead)]
    return [layer.name, layer.kind, shape, *numbers, *shares, layer.note]
