"""The budget: log scales at which the optimizer's first step is as sharp as it can afford.

Let ``θ`` be the log scales of a net's weights, ``ρ(θ)`` the step sharpness, ``r(θ)`` the level of the outputs and
``T(θ)`` the trace of the approximate Hessian. Among all ways to change ``ρ`` the solver takes the one that changes the
trace most, at constant level:

    d = ∇ log T  made orthogonal to  ∇ log r,

up if ``ρ`` is below its range, down if it is above, until it is inside; and back along ``∇ log r`` where the level is
outside its band. The trace counts every direction in which the net can learn, the sharpness only the steepest. The
trace is raised by shifting scale between weights, not by growing them together (the sum of ``θ`` does not rise, or
little, where bounds leave but two to shift between): at one level that is the same for a homogeneous net, and it keeps
a deep saturating one from turning chaotic.

Along ``d``, ``log ρ`` is taken to follow ``log T`` with a ratio that starts at one and is then read from the last two
probes (a secant). Where ρ falls though the trace has risen, as in a large batch of noise, the way up goes on: the
direction of the gradient changes, and ρ rises later. Scales stay in a box; one that meets its bound is held there and
the rest go on. A step ends where the first scale meets the trust region, as the rest of the way would be guesswork; and
one on the way back into the level's band that takes the level far beyond is tried again shorter. Where layers saturate,
the level falls faster than its slope says, and what the slopes would trade for it leaves a nearly linear net
(10-64-64-1 with tanh, regression, Adam at 0.003: train loss 0.16, in place of 0.03).

Down, the way ends where a step brings less than a quarter of what is lacking: with many layers, ρ falls with the level
and then no more (200 with ReLU, SGD at 0.1: 53, 0.96, 0.69, and the same in five more probes).

A step sharper than two raises the loss, and one in proportion to the gradient makes the next one larger still. Where
the way down ends, or half of the probes have come to nothing better, the band may be opened downwards: outputs near
zero cost less.

Slopes take more passes than a probe. Where new ones would take too many, those of the point before have to do for the
rest of the way, which is short by then: mostly the target is met all the same.

A weight before a norm, which the outputs do not follow, may have closer bounds.

Nothing here knows of networks: a probe is anything with these three numbers and two gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

NO_GAIN = 2.0  # the step sharpness at which a step gains nothing
TOLERANCE = 0.1  # of log ρ: less than a batch of 256 says about the next
MAX_PROBES = 8
TRUST = 1.5  # largest change of a log scale between two probes
REACH = 3.0  # of that, by which all of them together would move the level if none made up for another
BEYOND = 0.4  # of log r past where a step should bring it: the step is too long for what slopes say
SLACK = 0.02  # of log r: the first order does not stop at an edge exactly
OVERSHOT = 0.4  # of log ρ above the lower end: a step up is for the lower end, not for what lies beyond
BACK = 2.0  # of log ρ: what the way back into the level's band may cost
INSIDE = 0.25  # of the level's band: how far beyond its edge the way back aims
STILL = 0.02  # length of a step that changes nothing if log ρ and log r change by no more
WORTH = 0.25  # of what log ρ is above its range, by which a step must lower it for another to be made
FOLLOWED = 0.05  # d log r / dθ of what the outputs follow; before a norm it is 0
TRADE = 0.5  # of a step, by which all scales together may grow where only two are left to trade
RATIO = 0.2, 3.0  # what a secant may say of d log ρ / d log T


class Probe(Protocol):
    """What the solver measures."""

    def measure(self, theta: Vector) -> tuple[float, float]:
        """Step sharpness and level at these log scales."""

    def slopes(self) -> tuple[Vector, Vector]:
        """``∇ log T`` and ``∇ log r`` at the log scales measured last."""


@dataclass(frozen=True)
class Point:
    """One probe: log scales, step sharpness, level."""

    theta: Vector
    sharpness: float
    level: float

    @property
    def finite(self) -> bool:
        """Whether ρ and r are positive numbers."""
        return all(math.isfinite(x) and x > 0 for x in (self.sharpness, self.level))


@dataclass(frozen=True)
class Solution:
    """Where the solver stopped.

    Args:
        best: the probe that comes nearest to what was asked for.
        reason: ``"met"``, or what stood in the way.
        points: all probes in order.
        bounds: smallest and largest log scales, shape (2, size).
    """

    best: Point
    reason: str
    points: tuple[Point, ...]
    bounds: Vector

    @property
    def met(self) -> bool:
        """Whether the target was."""
        return self.reason == "met"


def solve(
    probe: Probe,
    size: int,
    target: tuple[float, float],
    level: tuple[float, float],
    scales: tuple[float, float],
    normed: tuple[float, float] | None = None,
    floor: float | None = None,
    max_probes: int = MAX_PROBES,
    affords: Callable[[bool], bool] = lambda slopes: True,
) -> Solution:
    """Log scales with step sharpness ``target`` and a level inside its band, from ``θ = 0``.

    Args:
        probe: measures a net at given log scales.
        size: number of scales.
        target: lowest and highest step sharpness; equal for one number, the lowest 0 where none is too low.
        level: lowest and highest level.
        scales: smallest and largest scale, around 1.
        normed: those, if narrower, of what the outputs do not follow; None for the same.
        floor: the level down to which the band may be opened; None for its lower end.
        max_probes: at most this many are made.
        affords: whether one more may be made, with new slopes (True) or the old ones (False).

    Returns:
        The best point met, with the reason for stopping; ``θ = 0`` is always among those tried.

    Example:
        A net of two linear layers, the second of ten times the trace: ``T = 10 s_1² + s_2²``, outputs ∝ ``s_1 s_2``.
        With ``ρ = T``, twice the first ρ at the same level asks for ``10 s² + 1/s² = 22``, ``s = 1.475``:

        >>> class TwoLayers:
        ...     def measure(self, theta):
        ...         self.squares = np.array([10, 1]) * np.exp(2 * theta)
        ...         return self.squares.sum(), 0.5 * np.exp(theta.sum())
        ...     def slopes(self):
        ...         return 2 * self.squares / self.squares.sum(), np.ones(2)
        >>> solution = solve(TwoLayers(), 2, target=(22, 22), level=(0.3, 1.0), scales=(1 / 20, 3.0))
        >>> solution.reason, len(solution.points), np.exp(solution.best.theta).round(1)
        ('met', 2, array([1.5, 0.7]))
    """
    start = np.zeros(size)
    points = [Point(start, *probe.measure(start))]
    search = _Search(
        best=points[0],
        goals=(math.log(target[0]) if target[0] else -math.inf, math.log(target[1])),
        band=(math.log(level[0]), math.log(level[1])),
        lowest=math.log(level[0] if floor is None else floor),
        box=np.log(np.tile(scales, (size, 1)).T),
        normed=normed,
    )
    held = False
    while size and search.best.finite and not search.on_target(search.best) and len(points) < max_probes:
        if search.spent and not search.opens:
            break
        if search.slopes is None or (search.moved and affords(True)):  # else the old ones have to do
            search.look(probe.slopes())
        step = search.step()
        held = search.still(step)
        if search.opens and (search.spent or held or len(points) >= max_probes // 2):
            search.open()
            continue
        if held or not affords(False):
            break
        theta = search.best.theta + step
        points.append(Point(theta, *probe.measure(theta)))
        search.learn(points[-1], step, left=max_probes - len(points))
    answer = search.best if search.on_target(search.best) else min(points, key=search.distance)
    if search.on_target(answer):
        reason = "met"
    elif not search.best.finite:
        reason = _not_finite(answer)
    elif held:
        reason = _bounded(answer, _off(answer, search.goals), math.log(scales[1]))
    elif search.spent:
        reason = f"cannot be met: lowest reachable ρ is about {answer.sharpness:.2g}"
    else:
        reason = f"stopped after {len(points)} probes at ρ = {answer.sharpness:.3g}"
    return Solution(answer, reason, tuple(points), search.box)


@dataclass
class _Search:
    """Where the solver stands and what it has learned.

    Args:
        best: the point that steps start from.
        goals: lowest and highest log ρ.
        band: lowest and highest log r.
        lowest: the log r down to which the band may be opened.
        box: smallest and largest log scales, shape (2, size).
        normed: smallest and largest scale of what the outputs do not follow; None for no closer ones.
        slopes: ``∇ log T`` and ``∇ log r`` at ``best``, or at a point before it.
        moved: whether it was before it.
        ratio: ``d log ρ / d log T``.
        trust: largest change of a log scale.
        spent: whether a way down brought too little for another.
    """

    best: Point
    goals: tuple[float, float]
    band: tuple[float, float]
    lowest: float
    box: Vector
    normed: tuple[float, float] | None = None
    slopes: tuple[Vector, Vector] | None = None
    moved: bool = False
    ratio: float = 1.0
    trust: float = TRUST
    spent: bool = False

    def on_target(self, point: Point) -> bool:
        """Whether ρ and r are where they should be."""
        return point.finite and abs(_off(point, self.goals)) <= TOLERANCE and _outside(point, self.band) == 0

    def distance(self, point: Point) -> float:
        """How far a point is from that."""
        if not point.finite:
            return math.inf
        r = math.log(point.level)
        return abs(_off(point, self.goals)) + 3 * max(self.band[0] - r, r - self.band[1], 0.0)

    @property
    def opens(self) -> bool:
        """Whether the band may be opened downwards."""
        too_sharp = _off(self.best, self.goals) < 0 and self.best.sharpness > NO_GAIN
        return too_sharp and self.band[0] > self.lowest

    def open(self) -> None:
        """Opens the band downwards."""
        self.band, self.spent = (self.lowest, self.band[1]), False

    def look(self, slopes: tuple[Vector, Vector]) -> None:
        """Takes new slopes; the first ones tell what the outputs do not follow."""
        if self.slopes is None and self.normed is not None:
            normed = np.abs(slopes[1]) < FOLLOWED
            self.box[:, normed] = np.clip(self.box[:, normed], *np.log(self.normed))
        self.slopes, self.moved = slopes, False

    def step(self) -> Vector:
        """The next change of θ."""
        assert self.slopes is not None
        rho, r = math.log(self.best.sharpness), math.log(self.best.level)
        lack = (self.goals[0] - rho) / self.ratio, (self.goals[1] - rho) / self.ratio
        room = self.band[0] - r, max(sum(self.band) / 2 - r, 0.0)
        outside = _outside(self.best, self.band)
        return _step(self.best.theta, self.slopes, lack, outside, room, self.box, self.trust)

    def still(self, step: Vector) -> bool:
        """Whether a step changes nothing."""
        assert self.slopes is not None
        effects = (self.ratio * float(slope @ step) for slope in self.slopes)
        return max(float(np.linalg.norm(step)), *map(abs, effects)) < STILL

    def learn(self, point: Point, step: Vector, left: int) -> None:
        """Goes on from the point that a step led to, or again from ``best`` and knowing better; ``left`` probes."""
        assert self.slopes is not None
        off, outside = _off(self.best, self.goals), _outside(self.best, self.band)
        risen, level = (float(slope @ step) for slope in self.slopes)
        length, landed = float(np.abs(step).max()), point.finite and _outside(point, self.band) == 0
        change = math.log(point.level / self.best.level) if point.finite else 0.0
        if left > 1 and outside and math.copysign(1.0, outside) * (change - level) > BEYOND:
            self.trust = length / 4
        elif off > 0 and left and point.finite and math.log(point.sharpness) > self.goals[0] + OVERSHOT:
            steeper = _secant(self.best, point, risen, self.ratio)
            if steeper > self.ratio * (1 + TOLERANCE):
                self.ratio = steeper
            else:  # beyond what slopes can tell
                self.trust = length / 2
        elif not self._better(point, climbs=off > 0 and outside == 0 and landed and risen > TOLERANCE):
            self.trust = length / 4
        else:
            down = off < 0 and outside == 0 and landed
            self.spent = down and math.log(self.best.sharpness / point.sharpness) < -WORTH * off
            self.ratio = _secant(self.best, point, risen, self.ratio)
            self.best, self.moved, self.trust = point, True, min(2 * self.trust, TRUST)

    def _better(self, point: Point, climbs: bool) -> bool:
        """Whether to go on from a point: if it is nearer, on the way up, or back in the level's band at some cost."""
        back = _outside(self.best, self.band) != 0 and point.finite and _outside(point, self.band) == 0
        return climbs or self.distance(point) <= self.distance(self.best) + (BACK if back else TOLERANCE / 2)


def _off(point: Point, goals: tuple[float, float]) -> float:
    """What log ρ lacks to be in its range: 0 inside, else the way to the nearer end."""
    rho = math.log(point.sharpness)
    return max(goals[0] - rho, 0.0) + min(goals[1] - rho, 0.0)


def _outside(point: Point, band: tuple[float, float]) -> float:
    """What log r lacks to be in its band: 0 inside, else the way to well inside, as the way is of first order only."""
    r, margin = math.log(point.level), INSIDE * (band[1] - band[0])
    return 0.0 if band[0] - SLACK <= r <= band[1] + SLACK else float(np.clip(r, band[0] + margin, band[1] - margin)) - r


def _secant(before: Point, now: Point, predicted: float, ratio: float) -> float:
    """``d log ρ / d log T`` between two probes; the old one where the step says nothing of it."""
    if abs(predicted) < TOLERANCE / 2:
        return ratio
    return float(np.clip(math.log(now.sharpness / before.sharpness) / predicted, *RATIO))


def _step(
    theta: Vector,
    slopes: tuple[Vector, Vector],
    lack: tuple[float, float],
    outside: float,
    room: tuple[float, float],
    box: Vector,
    trust: float,
) -> Vector:
    """The change of θ after which log T lacks nothing and log r is not outside, in the box and the trust region.

    To first order. The level goes its steepest way, the trace, by at least and at most what it lacks, the steepest on
    which the level stays and scales do not grow on the whole. Where bounds leave it none, the level gives way as far as
    it has room: down to the lower end of its band, up to the middle, as a loss that begins high costs more than the
    curvature is worth.
    """
    trace, level = slopes
    low, high = box[0] - theta, box[1] - theta
    step = _walk(np.zeros_like(theta), level, [], outside, low, high, trust, level)
    gained = float(trace @ step)
    change = float(np.clip(gained, *lack)) - gained
    pace = float(trace @ level) / max(float(level @ level), 1e-9)
    if change < 0 and pace > 0.5 and room[0] < -SLACK:
        return _walk(step, level, [], max(change / pace, room[0] - outside), low, high, trust, level)
    if change < 0:
        high = np.where(trace < 0, np.minimum(high, step), high)  # to grow what a norm follows would only freeze it
    there = _walk(step, trace, [level], change, low, high, trust, level)
    if change > 0 and (theta + there).sum() > max(0.0, (theta + step).sum()):
        shifted = _walk(step, trace, [level, np.ones_like(level)], change, low, high, trust, level)
        way = there - step
        if float(trace @ (shifted - step)) >= TOLERANCE / 2 or way.sum() >= TRADE * np.abs(way).sum():
            return shifted  # else bounds have left too few to shift between
    change -= float(trace @ (there - step))
    if outside == 0 and abs(change) > TOLERANCE / 2:
        on = _walk(there, trace, [], change, low, high, trust, level) - there
        moved, grown = float(level @ on), float(on.sum())
        if abs(float(trace @ on)) > abs(moved) / 2:  # else it would be the level that changes
            share = (room[1] if moved > 0 else room[0]) / moved if abs(moved) > 1e-9 else 1.0
            if change > 0 and grown > 0:
                share = min(share, max(room[1] - float((theta + there).sum()), 0.0) / grown)
            there = there + on * min(1.0, share)
    return there


def _walk(
    step: Vector,
    slope: Vector,
    fixed: list[Vector],
    change: float,
    low: Vector,
    high: Vector,
    trust: float,
    level: Vector,
) -> Vector:
    """``step`` and from there the steepest way, orthogonal to what is fixed, until ``slope`` has gained ``change``.

    A coordinate that meets its bound is held, and the rest of the way is the steepest in those still free. Where one
    meets the trust region, or all of them together, the way ends: in a deep net small changes multiply.
    """
    start, free = step, np.ones(len(step), bool)
    while free.any() and abs(change) > 1e-9:
        normals = np.where(free, np.reshape(fixed, (-1, len(step))), 0.0)
        d = np.where(free, slope, 0.0)
        d = d - normals.T @ np.linalg.lstsq(normals.T, d, rcond=1e-3)[0] if fixed else d
        speed = float(d @ d)
        if speed < 1e-6:
            break
        direction = math.copysign(1.0, change) * d
        moving = free & (np.abs(direction) > 1e-9)
        pace = np.where(moving, np.abs(direction), 1.0)
        reach = np.where(moving, np.where(direction > 0, high - step, step - low) / pace, np.inf)
        trusted = float(np.where(moving, (trust - np.sign(direction) * (step - start)) / pace, np.inf).min())
        carried = float(np.abs(level * direction).sum())
        left = REACH * trust - float(np.abs(level * (step - start)).sum())
        trusted = min(trusted, max(left, 0.0) / carried if carried > 1e-9 else np.inf)
        length = min(abs(change) / speed, float(reach.min()), trusted)
        step = step + length * direction
        change -= math.copysign(length * speed, change)
        if length == trusted:
            break
        free &= reach > length * (1 + 1e-9)
    return step


def _not_finite(point: Point) -> str:
    if point.level == 0:
        return "the outputs do not depend on the inputs: level 0"
    return f"not finite at ρ = {point.sharpness:.3g}, level {point.level:.3g}"


def _bounded(point: Point, off: float, largest: float) -> str:
    if abs(off) <= TOLERANCE:
        return f"cannot be met: nearest reachable level is {point.level:.3g}"
    if off < 0:
        return f"cannot be met: lowest reachable ρ is {point.sharpness:.3g}"
    if np.isclose(point.theta, largest, atol=1e-3).any():
        return f"bounded by max_scale: ρ = {point.sharpness:.3g}"
    return f"cannot be met: highest reachable ρ is {point.sharpness:.3g}"
