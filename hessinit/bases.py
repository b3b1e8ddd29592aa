"""The base that a calibration scales: values of the closed form, or those that are there, with the report's rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from hessinit import rules
from hessinit.calibration import Beside
from hessinit.draw import UNPAIRED, Pairs, draw, stream
from hessinit.layout import Fans, Layout
from hessinit.networks.base import BIAS, NORM_SCALE, WEIGHT, Data, Follower, Network, Parameter
from hessinit.report import Row


class Base(NamedTuple):
    """What a model starts from.

    Args:
        values: by name, of every parameter that is set.
        rows: by name, of every parameter.
        beside: the biases that are random, by name.
        begun: by name, the scale that a weight begins with, where that is not 1.
    """

    values: dict[str, Any]
    rows: dict[str, Row]
    beside: Mapping[str, Beside]
    begun: Mapping[str, float]


def current(
    network: Network, parameters: Sequence[Parameter], left: Mapping[str, str], followers: Mapping[str, Follower]
) -> Base:
    """The present weights, those beside norms at their part; every other parameter stays.

    Args:
        network: the model.
        parameters: all of it.
        left: of those that stay, by name, why.
        followers: what follows each weight, as far as it is known.
    """
    values: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    begun = {name: rules.BESIDE_NORM for name, follower in followers.items() if follower.beside_norm}
    for p in parameters:
        if p.name in left or p.role != WEIGHT or p.derived:
            note = f"left: parametrized by {p.derived}" if p.derived else "left: not a weight"
            rows[p.name] = _row(p, touched=False, note=left.get(p.name, note))
            continue
        present, by = np.array(network.arrays.numpy(network.values([p.name])[p.name])), begun.get(p.name, 1.0)
        values[p.name] = present * np.asarray(by, present.dtype)
        assert p.layout is not None  # of every weight
        fans = p.layout.fans(p.shape)
        std = _rms(present)
        note = "left: zero" if std == 0 else "rescaled" if by == 1 else "rescaled, beside a norm"
        numbers = {"fan_in": fans.fan_in, "fan_out": fans.fan_out, "std": by * std, "std_drawn": std}
        rows[p.name] = _row(p, touched=std > 0, note=note, **numbers)
    return Base(values, rows, {}, begun)


def closed_form(
    network: Network,
    parameters: Sequence[Parameter],
    left: Mapping[str, str],
    followers: Mapping[str, Follower],
    ends: set[str] | None,
    *,
    assumed: Follower,
    paired: bool,
    features: bool,
    biased: bool,
    forget_bias: float | None,
    distribution: str,
    seed: int,
) -> Base:
    """Random weights at the closed form's scale, biases zero, norms one and zero.

    Args:
        network: the model.
        parameters: all of it.
        left: of those that stay, by name, why.
        followers: what follows each weight, by name, as far as known.
        ends: weights that end residual branches; None for those that the followers tell.
        assumed: what follows the other weights.
        paired: whether units come in pairs of opposite weights, where that is linear.
        features: whether those that the output layer takes do not.
        biased: whether the biases of the first layer are random where inputs are few.
        forget_bias: of LSTM layers; None for the framework's.
        distribution: of weights.
        seed: decides all.

    Raises:
        ValueError: an activation that has no gain.
    """
    values: dict[str, Any] = {}
    rows: dict[str, Row] = {}
    mirrors = _mirrors(followers, parameters, left, features) if paired else {}
    beside = _beside(followers, parameters, left) if biased else {}
    outputs = _as_outputs(parameters, followers)
    of_weight = {name for name, bias in beside.items() if bias.activation is None}
    named = Counter(p.role for p in parameters if p.name in (ends or ()))[WEIGHT]
    for p in sorted(parameters, key=lambda p: p.name in of_weight):  # after it
        if p.name in left:
            rows[p.name] = _row(p, touched=False, note=left[p.name])
        elif p.name in beside:
            weight = beside[p.name].weight
            pairs = mirrors.get(weight, UNPAIRED)
            std = _bias_std(followers[weight], rows[weight].std if p.name in of_weight else None)
            values[p.name], rows[p.name] = _bias(p, std, pairs, distribution, seed)
        elif p.role != WEIGHT:
            values[p.name], rows[p.name] = _constant(p, forget_bias)
        else:
            follower = followers.get(p.name, assumed)
            beside_it = {n: fans for mate in sorted(follower.mates) for n, fans in outputs.get(mate, {}).items()}
            role = Role(
                follower,
                mirrors.get(p.name, UNPAIRED),
                follower.branches if ends is None else named if p.name in ends else 1,
                outputs.get(p.name, {}),
                beside_it,
            )
            values[p.name], rows[p.name] = _drawn(p, role, distribution, seed)
    _write_through(network, parameters, rows, values)
    return Base(values, rows, beside, {})


def _mirrors(
    followers: Mapping[str, Follower], parameters: Sequence[Parameter], left: Mapping[str, str], features: bool
) -> dict[str, Pairs]:
    """The weights whose outputs, and those whose inputs, come in pairs: where both sides are ours to draw.

    With ``features``, what the output layer takes does not: in pairs there would be half as many features.
    """
    drawn = {p.name for p in parameters if p.role == WEIGHT and p.name not in left}
    ends = {name for name, follower in followers.items() if follower.last and features}
    found: dict[str, Pairs] = {}
    for name, follower in followers.items():
        if follower.takers and name in drawn and drawn.issuperset(follower.takers) and ends.isdisjoint(follower.takers):
            found[name] = found.get(name, UNPAIRED)._replace(outputs=True)
            for taker, repeats in follower.takers.items():
                found[taker] = found.get(taker, UNPAIRED)._replace(repeats=repeats)
    return found


def _beside(
    followers: Mapping[str, Follower], parameters: Sequence[Parameter], left: Mapping[str, str]
) -> dict[str, Beside]:
    """The biases to be drawn, by name: of a chain's first layer, of few inputs or where a norm would take zeros."""
    in_layers: dict[str, list[Parameter]] = {}
    for p in parameters:
        in_layers.setdefault(p.layer, []).append(p)
    found = {}
    for own in in_layers.values():
        named = {p.role: p.name for p in own if p.name not in left and not p.derived}
        if len(own) == 2 and named.keys() == {WEIGHT, BIAS}:
            follower = followers.get(named[WEIGHT])
            data = _first_data(follower)
            if follower is not None and data is not None and rules.input_bias_std(data.numbers):
                found[named[BIAS]] = Beside(named[WEIGHT], follower.function)
            elif follower is not None and follower.blank:
                found[named[BIAS]] = Beside(named[WEIGHT], None)
    return found


class Role(NamedTuple):
    """What a weight is for.

    Args:
        follower: what comes after it.
        pairs: which of its units come in pairs.
        branches: the number of residual branches, of which it ends one.
        outputs: fans of the output layers, by name, that it is too.
        mates: fans of those that an embedding is with which it writes to one stream.
    """

    follower: Follower
    pairs: Pairs
    branches: int
    outputs: Mapping[str, Fans]
    mates: Mapping[str, Fans]


def _as_outputs(parameters: Sequence[Parameter], followers: Mapping[str, Follower]) -> dict[str, dict[str, Fans]]:
    """Of each weight that is also an output layer, its fans there, by the name it has there."""
    found: dict[str, dict[str, Fans]] = {}
    for p in parameters:
        if p.role == WEIGHT and p.layout is not None and p.tied_to is not None:
            found.setdefault(p.tied_to, {})[p.name] = p.layout.fans(p.shape)
    for p in parameters:  # an embedding that the model itself takes for its output layer
        output = p.layout is not None and p.layout.looked_up and p.name in followers and followers[p.name].output
        if output and p.name not in found:
            found[p.name] = {"the output layer": Layout("oi").fans(p.shape)}
    return found


def _drawn(p: Parameter, role: Role, distribution: str, seed: int) -> tuple[Any, Row]:
    """The closed form's values of one weight."""
    assert p.layout is not None  # of every weight that is not left
    follower, pairs = role.follower, role.pairs
    shape = p.weight_shape or p.shape
    fans = p.layout.fans(shape)
    gain = rules.pair_gain(follower.function) if pairs != UNPAIRED else None
    try:
        gain = rules.gain(follower.function, depth=follower.depth) if gain is None else gain
    except ValueError as error:
        raise ValueError(f"init_: {p.layer} is followed by {follower.name}, which has no gain. {error}") from error
    std, note = _std(p.layout, fans, gain, follower)
    for name, theirs in {**role.outputs, **(role.mates if p.layout.looked_up else {})}.items():
        # The smaller scale suits both: an embedding's would make an output layer's loss huge, or drown a small one.
        if rules.curvature_neutral_std(*theirs, gain) < std:
            fans, std, note = theirs, rules.curvature_neutral_std(*theirs, gain), f"drawn for {name}"
    if follower.averaged > 1:
        note += f", for a mean of {follower.averaged}"
    if pairs != UNPAIRED:
        note += ", mirrored"
    if role.branches > 1:
        std, note = std / math.sqrt(role.branches), f"{note}, one of {role.branches} branches"
    if p.layout.looked_up and follower.same:
        std, note = std * rules.SAME, f"{note}, the same for all samples"
    if role.mates and not p.layout.looked_up:
        factor = min(rules.beside_small_embedding(*theirs) for theirs in role.mates.values())
        std, note = factor * std, f"{note}, beside a small embedding"
    if follower.beside_norm:
        std, note = std * rules.BESIDE_NORM, f"{note}, beside a norm"
    values = draw(shape, p.layout, std, distribution, stream(seed, p.key), _wide(p), pairs)
    std_drawn = _rms(values)
    if p.zero_row is not None:
        values[p.zero_row] = 0
        note += f", row {p.zero_row} (padding) zero"
    if p.derived:
        note += f" through {p.derived}"
    row = _row(
        p,
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
    return values, row


def _std(layout: Layout, fans: Fans, gain: float, follower: Follower) -> tuple[float, str]:
    """The std asked for, and which rule it comes from."""
    if 0 in fans:
        return 0.0, "empty"
    if layout.looked_up and follower.begins:
        return rules.input_layer_std(fans.fan_in, 1.0), "scaled to the inputs"
    data = _first_data(follower)
    if data is not None:
        return rules.input_layer_std(fans.fan_in, data.moment, follower.averaged), "scaled to the inputs"
    return rules.curvature_neutral_std(fans.fan_in, fans.fan_out, gain, follower.averaged), "drawn"


def _bias_std(follower: Follower, of_weight: float | None) -> float:
    """The std of the bias of a first layer, where it goes by the weight's, of which that is given."""
    assert follower.data is not None  # as _beside has seen
    if of_weight is None:
        return rules.input_bias_std(follower.data.numbers, follower.averaged)
    return of_weight * math.sqrt(follower.data.moment or 1.0)


def _bias(p: Parameter, std: float, pairs: Pairs, distribution: str, seed: int) -> tuple[Any, Row]:
    """The values of the bias of a first layer."""
    values = draw(p.shape, Layout("o"), std, distribution, stream(seed, p.key), _wide(p), Pairs(pairs.outputs))
    return values, _row(p, touched=True, note="drawn as of one more input", std=std, std_drawn=_rms(values))


def _first_data(follower: Follower | None) -> Data | None:
    """What the first weight of a chain takes, where that is known and not all zero."""
    data = follower.data if follower is not None and (follower.depth or 1) > 1 else None
    return data if data is not None and data.moment > 0 else None


def _constant(p: Parameter, forget_bias: float | None) -> tuple[Any, Row]:
    """The value of a bias or of a norm's parameter."""
    value = 1.0 if p.role == NORM_SCALE else 0.0
    values, note = np.full(p.shape, value, np.float32), f"set to {value:g}"
    if p.forget is not None:
        start, stop, own = p.forget
        forget = own if forget_bias is None else float(forget_bias)
        values[start:stop] = forget
        note += f", forget gate {forget:g}" if forget else ""
    return values, _row(p, touched=True, note=note)


def _write_through(
    network: Network, parameters: Sequence[Parameter], rows: dict[str, Row], values: dict[str, Any]
) -> None:
    """In place of derived weights, the values of what they are computed from."""
    for p in parameters:
        if p.derived and p.name in values:
            parts = network.originals(p.name, values[p.name])
            values |= parts
            rows |= {n: replace(rows[n], touched=True, note=f"set with {p.name}") for n in parts if n != p.name}


def _row(parameter: Parameter, touched: bool, note: str, **numbers: Any) -> Row:
    p = parameter
    return Row(name=p.name, shape=p.shape, dtype=p.dtype, role=p.role, touched=touched, note=note, **numbers)


def _wide(p: Parameter) -> type[np.floating[Any]]:
    """The type to draw in, whatever narrower one the values are stored in."""
    return np.float64 if p.dtype == "float64" else np.float32


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else math.nan
