"""From a model, a batch and an optimizer to the scales of its weights: sets the budget's solver to work."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from hessinit import rules
from hessinit.batches import Batches, inputs_and_targets
from hessinit.budget import NO_GAIN, Point, Solution, solve
from hessinit.draw import stream
from hessinit.networks.base import Array, Arrays, Follower, Group, Named, told
from hessinit.objective import Forward, Objective
from hessinit.probe import GRADIENT, NetworkProbe, State, Step, Turn, optimizer_step, sgd_step, trained
from hessinit.quadrature import Activation

PROPORTIONAL, SIGN_LIKE = 0.7, 0.18
"""c for steps proportional to the gradient, and for those that do not shrink with it."""
SHARPER = 2.0
"""Factor on c where norms follow weights, but not at once, so that it is not the angle of a step that sets them. Each
grows with its steps, which are orthogonal to it, and that lowers the sharpness by itself (Arora et al., ICLR 2019): a
net can afford to begin sharper."""
TURN, TURN_SCALES = 0.035, (1 / 30, 4.0)
"""Angle by which a step should turn weights whose scale the next norm takes out, in radians, and the smallest and
largest scale that they get for it: smaller ones are felt where norms add an epsilon. On thirteen nets with batch, group
and layer norms 0.03 to 0.05 is mostly within 5 % of the best, under SGD at 0.01 and 0.1 and Adam at 0.001 and 0.003
alike, where the step sharpness is anything from 0.2 to 1000."""
TURNING = -1  # the key of these weights, which share their scale
NORMED_PROPORTIONAL, NORMED_SIGN_LIKE, NORMED_MOST = 1 / 10, 1 / 20, 4.0
"""Smallest scales of weights that norms follow, and the largest. Smaller, a step turns them too far (losses are 3 to
14 % higher, at small learning rates), the further as proportional steps grow with 1/s; larger, not at all (5 %)."""
SIGN_LIKE_BIASES, SIGN_LIKE_ODD_BIASES = 2.0, 4.0
"""Factor on biases for steps that do not shrink with the gradient, which make a bias no faster than a weight; and after
an odd activation, without biases an odd net, which has most to learn. Proportional steps may diverge with either."""
DEEP = 15  # layers in a row, above which both ends of the range fall as 1/depth: the steps of many layers multiply
LEVEL = 0.3, 1.0
BENT = 2.0  # times higher may it be in tables, for proportional steps: of most activations, smaller is more linear
OPENED = 6.0  # times lower may the level be where proportional steps would diverge; others turn back by themselves
MIN_SCALE, MAX_SCALE = 1 / 100, 8.0
SAMPLES = 256
FEWEST, TERMS = 32, 2048  # samples of many loss terms each (texts, images of labels) go by their terms


@dataclass(frozen=True)
class Target:
    """What is asked of a calibration.

    Args:
        loss: name, framework loss or callable.
        lr: of plain SGD; None where an optimizer is given.
        optimizer: of the framework; None where a learning rate is given.
        budget: c, or lowest and highest step sharpness; None for the default of the optimizer's kind.
        level: lowest and highest level; None for the default.
        max_scale: largest scale.
        num_samples: of the batch; None for the default.
        forward: of (model, batch), returns outputs and targets; None for the framework's way.
    """

    loss: Any
    lr: float | None = None
    optimizer: Any = None
    budget: float | tuple[float, float] | None = None
    level: tuple[float, float] | None = None
    max_scale: float = MAX_SCALE
    num_samples: int | None = None
    forward: Forward | None = None


class Beside(NamedTuple):
    """A bias that is drawn.

    Args:
        weight: of its layer, whose scale it gets.
        activation: that follows, of which its size depends; None of one that keeps zeros from a norm.
    """

    weight: str
    activation: str | Activation | None


@dataclass(frozen=True)
class Calibration:
    """What a calibration did.

    Args:
        scales: by name of the weight.
        budget: lowest and highest step sharpness asked for.
        solution: of the solver, with every probe.
        before: the net at scale one.
        after: the net at these scales.
        passes: gradient passes over the batch that it took, in their cost.
        samples: in the batch.
        bounds: by name of the weight, the smallest and largest scale allowed.
        of_biases: by name of each bias among the weights, a factor on it besides its scale.
        angle: by which a step should turn weights whose scale the next norm takes out; None where there are none.
    """

    scales: Mapping[str, float]
    budget: tuple[float, float]
    solution: Solution
    before: State
    after: State
    passes: float
    samples: int
    bounds: Mapping[str, tuple[float, float]]
    of_biases: Mapping[str, float]
    angle: float | None = None


def check(function: str, target: Target) -> None:
    """Raises for numbers that cannot be."""

    def positive(name: str, value: Any) -> None:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            kind = ValueError if number else TypeError
            raise kind(f"{function}: {name} must be a positive, finite number; got {value!r}.")

    def pair(name: str, value: Any) -> None:
        if not (isinstance(value, Sequence) and len(value) == 2):
            raise TypeError(f"{function}: {name} must be a pair (lowest, highest); got {value!r}.")
        for end in value:
            positive(name, end)
        if not value[0] < value[1]:
            raise ValueError(f"{function}: {name} must be a pair (lowest, highest); got {value!r}.")

    if target.lr is not None and target.optimizer is not None:
        raise ValueError(f"{function}: lr and optimizer must not both be given; got {target.lr!r} and an optimizer.")
    for name, value in (("lr", target.lr), ("max_scale", target.max_scale)):
        if value is not None:
            positive(name, value)
    if target.max_scale < 1:
        raise ValueError(f"{function}: max_scale must be at least 1; got {target.max_scale!r}.")
    if target.level is not None:
        pair("level", target.level)
    if isinstance(target.budget, Sequence):
        pair("budget", target.budget)
    elif target.budget is not None:
        positive("budget", target.budget)
    n = target.num_samples
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        raise ValueError(f"{function}: num_samples must be a positive integer or None; got {n!r}.")


def calibrate(
    function: str,
    model: Any,
    batch: Any,
    samples: int,
    target: Target,
    weights: Mapping[str, Any],
    others: Mapping[str, Any],
    followers: Mapping[str, Follower],
    beside: Mapping[str, Beside],
    seed: int,
    group: Group,
) -> Calibration:
    """The scales of some weights for a model's optimizer; nothing is written.

    Args:
        function: public function that was called, for errors.
        model: ``torch.nn.Module`` or ``keras.Model``.
        batch: a pair, a dict, or a list of either, whole.
        samples: in it.
        target: what is asked.
        weights: by name, at scale one: arrays of NumPy or the framework.
        others: values of other parameters that stand for the model's own.
        followers: what follows each weight of the model, as far as it is known.
        beside: the biases among the weights, by name.
        seed: of the samples taken and of random signs.
        group: processes that share the batch.
    """
    training = None if getattr(model, "training", True) else True
    objective = Objective(
        function, model, batch, target.loss, target.forward, None, training, False, seed, False, group
    )
    arrays, network = objective.network.arrays, objective.network
    objective.parameters = {p.name: p for p in told(objective.parameters.values(), followers)}

    def placed(values: Mapping[str, Any]) -> dict[str, Array]:
        like = network.values(list(values))
        return {name: arrays.asarray(value, like[name]) for name, value in values.items()}

    base, fixed = placed(weights), placed(others)
    step, gradient = _step(objective, target, base, fixed)
    tried = 0.0 if gradient is None else GRADIENT
    of_biases = {name: _of_bias(bias, step.degree) for name, bias in beside.items()}
    base |= {name: factor * base[name] for name, factor in of_biases.items()}
    shared = sharing(weights, followers)
    owners = {name: beside[name].weight if name in beside else name for name in weights}
    turning = {name: base.pop(name) for name, owner in owners.items() if shared.get(owner) == TURNING}
    places = _places([shared.get(owners[name], owners[name]) for name in base])
    probe = NetworkProbe(objective, base, fixed, places, step, None if of_biases else gradient, tried, turning)
    del gradient
    later = any(f.normed and not f.scale_invariant for f in followers.values())
    usual = _usual(step.degree, followers.values(), later)
    budget = _range(target.budget, usual)
    angle = TURN * budget[0] / usual[0] if turning else None
    if turning and not later:
        budget = 0.0, budget[1]
    level = target.level or _level(beside.values(), step.degree)
    allowed, floor = (MIN_SCALE, target.max_scale), level[0] / OPENED**step.degree
    normed = _between(NORMED_SIGN_LIKE, NORMED_PROPORTIONAL, step.degree), NORMED_MOST
    size = len(set(places))
    before = None
    if angle is not None:
        start = np.zeros(size)
        before = probe.describe(Point(start, *probe.measure(start)))
        probe.turn = Turn(angle, (TURN_SCALES[0], min(TURN_SCALES[1], target.max_scale)), budget[1])
    solution = solve(probe, size, budget, level, allowed, normed, floor, affords=probe.affords)
    before = before or probe.describe(solution.points[0])
    after = probe.describe(solution.best)
    low, high = np.exp(solution.bounds)
    scales = {name: float(np.exp(solution.best.theta[k])) for name, k in zip(base, places, strict=True)}
    bounds = {name: (float(low[k]), float(high[k])) for name, k in zip(base, places, strict=True)}
    if probe.turn is not None:
        scales |= dict.fromkeys(turning, probe.turned(solution.best))
        bounds |= dict.fromkeys(turning, probe.turn.scales)
    scales = {name: scales[name] for name in weights}  # in the order of the model
    count = int(group.sum(samples))
    return Calibration(scales, budget, solution, before, after, probe.passes, count, bounds, of_biases, angle)


def _step(objective: Objective, target: Target, base: Named, fixed: Named) -> tuple[Step, Named | None]:
    """The first step, and the gradient if it took one to find out about the optimizer's."""
    if target.optimizer is None:
        assert target.lr is not None  # checked by the caller
        return sgd_step(target.lr), None
    objective.placed, names = {**fixed, **base}, trained(objective, base)
    with objective.named_errors():
        gradient = objective.gradient(names)
        return optimizer_step(objective.network, target.optimizer, gradient, objective.values(names)), gradient


def sharing(weights: Container[str], followers: Mapping[str, Follower]) -> dict[str, int]:
    """Of each of these weights that shares its scale with others, with which: those of a stream, or those that turn.

    With one each, the trace is raised by shrinking the first writers of a stream, before norms that make up for it,
    until the later ones drown them: a GPT of three blocks on Python's own source, under Adam at 1e-4, ends at a loss of
    2.99 in place of 2.44 (Glorot's weights: 2.89). Weights whose scale the next norm takes out are turned by a step,
    all by about as much (:class:`hessinit.probe.Turn`). The same angle for each is no better.
    """
    turning = {name: TURNING for name, f in followers.items() if f.scale_invariant and name in weights}
    return {**turning, **{n: f.stream for n, f in followers.items() if f.stream is not None and n in weights}}


def _places(keys: Iterable[Any]) -> list[int]:
    """The place of each weight's log scale, one for all of a key."""
    places: dict[Any, int] = {}
    return [places.setdefault(key, len(places)) for key in keys]


def _usual(degree: float, followers: Collection[Follower], later: bool) -> tuple[float, float]:
    """Lowest and highest step sharpness by default, for steps that scale with a power of the gradient.

    Args:
        degree: that power.
        followers: what follows each weight.
        later: whether norms take what comes of weights' outputs, but not at once.
    """
    share = min(1.0, DEEP / max((f.depth or 1 for f in followers), default=1))
    return (SHARPER if later else 1.0) * _between(SIGN_LIKE, PROPORTIONAL, degree) * share, NO_GAIN * share


def _range(budget: float | tuple[float, float] | None, usual: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest step sharpness."""
    if budget is None:
        return usual
    return (budget[0], budget[1]) if isinstance(budget, Sequence) else (budget, budget)


def _between(sign_like: float, proportional: float, degree: float) -> float:
    """What holds for steps in proportion to the gradient's power ``degree``, of what does for 0 and for 1."""
    return sign_like + (proportional - sign_like) * degree


def _level(beside: Iterable[Beside], degree: float) -> tuple[float, float]:
    """Lowest and highest level."""
    bent = any(bias.activation is not None and not rules.is_homogeneous(bias.activation) for bias in beside)
    return LEVEL[0], LEVEL[1] * (BENT**degree if bent else 1.0)


def _of_bias(bias: Beside, degree: float) -> float:
    """The factor on a bias."""
    if bias.activation is None:
        return 1.0
    return _between(SIGN_LIKE_ODD_BIASES if rules.is_odd(bias.activation) else SIGN_LIKE_BIASES, 1.0, degree)


def take(batches: Batches, num_samples: int | None, arrays: Arrays, seed: int) -> tuple[Any, int]:
    """At most so many samples: of data in memory a random choice, of a loader the first ones; and their number."""
    got: list[Any] = []
    count = 0
    for batch in batches:
        wanted = num_samples or _default_samples(batch, batches)
        samples = batches.samples(batch) or 1
        if batches.in_memory and samples > wanted:
            rows = np.sort(stream(seed, "samples").choice(samples, wanted, replace=False))
            return batches.choose(batch, partial(_rows, arrays, rows)), wanted
        got.append(batches.part(batch, 0, wanted - count))
        count += min(samples, wanted - count)
        if count >= wanted:
            break
    return (got[0] if len(got) == 1 else got), count


def _rows(arrays: Arrays, rows: Any, x: Array) -> Array:
    return x[rows] if isinstance(x, np.ndarray) else arrays.take(x, rows)


def _default_samples(batch: Any, batches: Batches) -> int:
    try:
        _, targets = inputs_and_targets(batch)
        labels = next(batches.arrays(targets))
    except (ValueError, TypeError, StopIteration):
        return SAMPLES
    integers = "int" in str(labels.dtype)
    per_sample = int(np.prod(labels.shape[1:])) if integers else 1
    return int(np.clip(TERMS // max(per_sample, 1), FEWEST, SAMPLES))
