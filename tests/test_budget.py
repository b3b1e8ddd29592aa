"""The solver on probes whose answers are known."""

import math

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from hessinit import budget
from hessinit.budget import MAX_PROBES, TOLERANCE

SCALES = (1 / 20, 3.0)


def solve(probe, size, target, **options):
    ends = target if isinstance(target, tuple) else (target, target)
    return budget.solve(probe, size, ends, **{"level": (0.3, 1.0), "scales": SCALES, **options})


class Homogeneous:
    """A plain ReLU net: outputs ∝ ∏ s_k, layer k's trace ∝ ∏ of the others squared, ρ a power of the trace."""

    def __init__(self, traces, sharpness=0.1, level=0.5, power=1.0, noise=0.0):
        self.traces, self.rho, self.r, self.power = np.asarray(traces, float), sharpness, level, power
        self.noise, self.rng = noise, np.random.default_rng(0)

    def shares(self, theta):
        return self.traces * np.exp(2 * (theta.sum() - theta))

    def measure(self, theta):
        self.theta = theta
        factor = math.exp(self.noise * self.rng.standard_normal())
        trace = self.shares(theta).sum() / self.traces.sum()
        return self.rho * trace**self.power * factor, self.r * math.exp(theta.sum())

    def slopes(self):
        shares = self.shares(self.theta)
        return 2 * (1 - shares / shares.sum()), np.ones(len(shares))


class Normalised(Homogeneous):
    """Every layer but the last is followed by a norm: its trace ∝ 1/s², and the outputs ∝ the last scale alone."""

    def shares(self, theta):
        shares = self.traces * np.exp(2 * (theta[-1] - theta))
        shares[-1] = self.traces[-1]
        return shares

    def measure(self, theta):
        rho, _ = super().measure(theta)
        return rho, self.r * math.exp(theta[-1])

    def slopes(self):
        shares = self.shares(self.theta)
        slope = -2 * shares / shares.sum()
        slope[-1] = 2 * shares[:-1].sum() / shares.sum()
        return slope, np.eye(len(shares))[-1]


class Saturating(Homogeneous):
    """Outputs end in a tanh: the level has a ceiling of 2."""

    def measure(self, theta):
        rho, level = super().measure(theta)
        return rho, 2 * math.tanh(level)

    def slopes(self):
        trace, level = super().slopes()
        x = self.r * math.exp(self.theta.sum())
        return trace, level * x / (math.sinh(x) * math.cosh(x))


class Plane:
    """log ρ and log r are linear in θ, so first order is all there is."""

    def __init__(self, trace, level, sharpness=0.1, start=0.5, power=1.0):
        self.trace, self.level = np.array(trace, float), np.array(level, float)
        self.rho, self.r, self.power = sharpness, start, power

    def measure(self, theta):
        return self.rho * math.exp(self.power * self.trace @ theta), self.r * math.exp(self.level @ theta)

    def slopes(self):
        return self.trace, self.level


class Told(Plane):
    """Measures what it is told to, one (ρ, r) after the other."""

    def __init__(self, *numbers, trace=(1, -1), level=(1, 1)):
        super().__init__(trace, level)
        self.numbers = list(numbers)

    def measure(self, theta):
        return self.numbers.pop(0) if len(self.numbers) > 1 else self.numbers[0]


ANY = (1e-9, 1e9)  # a range of ρ that asks for nothing


def steps(solution):
    """Between probes."""
    return np.diff([point.theta for point in solution.points], axis=0)


def inside(solution):
    thetas = np.array([point.theta for point in solution.points])
    return (thetas >= math.log(SCALES[0]) - 1e-12).all() and (thetas <= math.log(SCALES[1]) + 1e-12).all()


@pytest.mark.parametrize("probe", [Homogeneous, Normalised, Saturating])
@pytest.mark.parametrize("traces", [[3, 1], [40, 2, 1], [5, 1, 1, 1, 1, 1, 2]])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 2.0, 10.0])
def test_the_target_is_met_or_the_reason_said(probe, traces, factor):
    net = probe(traces)
    solution = solve(net, len(traces), net.rho * factor)
    assert inside(solution)
    assert 0.29 < solution.best.level < 1.03
    if solution.met:
        assert abs(math.log(solution.best.sharpness / (net.rho * factor))) <= TOLERANCE
    else:
        assert solution.reason.startswith(("cannot be met", "bounded by max_scale"))
        assert factor in (0.5, 0.8, 10.0)
        nearest = min(abs(math.log(p.sharpness / (net.rho * factor))) for p in solution.points)
        assert abs(math.log(solution.best.sharpness / (net.rho * factor))) == nearest


def test_most_plain_targets_take_few_probes():
    counts = [len(solve(Homogeneous([40, 2, 1]), 3, 0.1 * f).points) for f in (1.5, 2, 4, 8, 16)]
    assert max(counts) <= 5


def test_the_way_is_the_flow_of_the_trace_at_constant_level():
    net = Homogeneous([40, 2, 1])
    solution = solve(net, 3, 0.4)

    def flow(_, theta):
        net.theta = theta
        trace, level = net.slopes()
        return trace - level * (trace @ level) / (level @ level)

    def reached(_, theta):
        return net.measure(theta)[0] - solution.best.sharpness

    reached.terminal = True
    end = solve_ivp(flow, (0, 100), np.zeros(3), events=reached, rtol=1e-8).y[:, -1]
    assert np.abs(solution.best.theta - end).max() < 0.25
    assert abs(solution.best.theta.sum()) < 1e-9


def test_a_level_outside_its_band_is_brought_back():
    for level, inside in (5.0, 0.74), (0.05, 0.405):  # a quarter of the band from the edge
        net = Homogeneous([4, 2, 1], level=level)
        solution = solve(net, 3, 0.1 * (inside / level) ** (4 / 3))
        assert solution.met
        assert solution.best.level == pytest.approx(inside, rel=0.1)
    assert solve(Homogeneous([4, 2, 1], level=0.9), 3, 0.2).best.level == pytest.approx(0.9)
    # Also where it is a little outside, and the way back costs more sharpness than is missing.
    assert len(solve(Homogeneous([40, 2, 1], level=1.1), 3, 0.2, scales=(1 / 20, 8)).points) <= 4


def test_where_bounds_leave_no_way_the_level_rises_to_the_middle_of_its_band_and_falls_to_its_end():
    high, low = (solve(Homogeneous([1, 1], level=level), 2, 1e6) for level in (0.9, 0.35))
    assert high.best.level == pytest.approx(0.9)
    assert low.best.level == pytest.approx(0.3**0.5, rel=0.02)
    assert solve(Homogeneous([1, 1]), 2, 1e-6).best.level == pytest.approx(0.3, rel=0.02)


def test_a_sharpness_above_its_range_is_lowered_by_the_level_as_far_as_its_band_allows():
    solution = budget.solve(Homogeneous([4, 2, 1], sharpness=4.0, level=0.9), 3, (0.7, 2.0), (0.3, 1.0), SCALES)
    assert solution.met
    assert solution.best.theta == pytest.approx(np.full(3, solution.best.theta[0]))
    assert 0.3 < solution.best.level < 0.9


def test_where_a_step_would_do_harm_the_level_leaves_its_band():
    # Equal traces are the least at a level, and ρ goes with it: to 6, and to 1.5, at the lower end of the band.
    harmful, modest = (
        budget.solve(Homogeneous([1, 1], sharpness=rho), 2, target, (0.3, 1.0), SCALES, floor=0.05)
        for rho, target in ((10.0, (0.7, 2.0)), (2.5, (0.07, 0.2)))
    )
    assert harmful.met
    assert harmful.best.level == pytest.approx(0.1, rel=0.1)
    assert not modest.met
    assert modest.best.level == pytest.approx(0.3, rel=0.02)
    for floor, reached in ((0.05, 0.05), (None, 0.3)):
        beyond = budget.solve(Homogeneous([1, 1], sharpness=1e3), 2, (0.7, 2.0), (0.3, 1.0), SCALES, floor=floor)
        assert beyond.reason.startswith("cannot be met: lowest reachable ρ is ")
        assert beyond.best.level == pytest.approx(reached, rel=0.02)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_a_step_up_is_for_the_lower_end_of_the_range(power):
    net = Homogeneous([40, 2, 1], sharpness=0.01, power=power)
    solution = budget.solve(net, 3, (0.7, 2.0), (0.3, 1.0), SCALES)
    assert solution.met
    assert abs(math.log(solution.best.sharpness / 0.7)) < budget.OVERSHOT


def test_the_trace_of_a_saturating_net_is_not_raised_by_growing_all_weights():
    class Chaotic(Homogeneous):
        """Tanh holds the outputs, while traces grow with all scales."""

        def shares(self, theta):
            return self.traces * np.exp(2 * theta.sum() - 0.2 * theta)

        def measure(self, theta):
            rho, _ = super().measure(theta)
            return rho, self.r

        def slopes(self):
            shares = self.shares(self.theta)
            return 2 - 0.2 * shares / shares.sum(), np.full(len(shares), 1e-9)

    solution = solve(Chaotic([1, 2, 4, 8]), 4, 0.15)
    assert solution.best.sharpness >= 0.1
    assert solution.best.theta.sum() <= math.log(0.3**0.5 / 0.5)  # the room up to the middle of the level's band


def test_a_norm_takes_the_budget_by_shrinking_the_weights_before_it():
    solution = solve(Normalised([4, 2, 1]), 3, 0.4)
    assert solution.met
    assert (solution.best.theta[:2] < 0).all()


@pytest.mark.parametrize(("trace", "normed", "plain"), [(-1.0, 1 / 20, 1 / 100), (1.0, 4.0, 100.0)])
def test_weights_that_the_outputs_do_not_follow_may_have_closer_bounds(trace, normed, plain):
    for level, bound in ((0.0, normed), (1.0, plain)):
        way = Plane([trace, -trace], [level, level])
        answer = budget.solve(way, 2, (1e8, 1e9), (0.3, 1.0), (1 / 100, 100.0), (1 / 20, 4.0))
        assert np.exp(answer.best.theta[0]) == pytest.approx(bound)
        assert ("max_scale" in answer.reason) == (level == 1.0)  # a larger one would not help the others
        closer = budget.solve(way, 2, (1e8, 1e9), (0.3, 1.0), (1 / 2, 2.0), (1 / 20, 4.0))
        assert np.exp(closer.best.theta[0]) == pytest.approx(2**trace)


def test_the_way_back_to_the_band_ends_a_quarter_of_it_from_its_edge_and_slack_is_no_reason_to_go():
    for level, end in (5.0, 0.3**0.25), (1.03, 0.3**0.25), (0.05, 0.3**0.75), (0.29, 0.3**0.75):
        solution = solve(Plane([1, -1], [1, 1], start=level), 2, ANY)
        assert len(solution.points) == 2
        assert solution.met
        assert solution.best.level == pytest.approx(end)
    for level in (0.297, 1.0, 1.01):
        assert len(solve(Plane([1, -1], [1, 1], start=level), 2, ANY).points) == 1


def test_the_way_back_may_end_anywhere_in_a_range_of_sharpness():
    # ρ grows with the level's power 4/3, from 1 to 16; a step up for the sake of ρ would have been cut short.
    solution = solve(Homogeneous([4, 2, 1], sharpness=1.0, level=0.05), 3, (0.7, 20.0))
    assert (len(solution.points), solution.reason) == (2, "met")


def test_the_way_back_may_cost_more_sharpness_than_the_level_was_outside():
    solution = solve(Told((0.1, 1.1), (0.05, 0.74), (0.1, 0.74)), 2, 0.1)
    assert steps(solution)[1] == pytest.approx([math.log(2) / 2, -math.log(2) / 2])  # to win ρ back at that level
    assert (len(solution.points), solution.reason) == (3, "met")


def test_the_level_is_brought_back_first_and_gives_way_to_the_sharpness_only_then():
    # Up: ρ and r go together, and one step takes r into its band, however much ρ lacks.
    up = solve(Plane([1, 1], [1, 1], start=0.05), 2, 1e6, max_probes=2)
    assert up.points[1].level == pytest.approx(0.3**0.75)
    # Down: what is above both may go to the lower end of the band at once.
    down = solve(Plane([2, 2], [1, 1], start=1.5), 2, 1e-6, max_probes=2)
    assert down.points[1].level == pytest.approx(0.3)


def test_back_in_the_band_the_trace_is_raised_though_scales_have_grown():
    # The level takes (1, 1, 0), the trace its own way as it is orthogonal; the sum of scales falls in that, to above 0.
    solution = solve(Plane([1, -1, -0.5], [1, 1, 0], start=0.05), 3, 0.2, scales=(1 / 20, 8))
    back = math.log(0.3**0.75 / 0.05) / 2
    way = math.log(2) / 2.25
    assert solution.points[1].theta == pytest.approx([back + way, back - way, -way / 2])
    assert (len(solution.points), solution.reason) == (2, "met")


@pytest.mark.parametrize("other", [0.5, 0.0])
def test_at_the_lower_end_of_the_band_sharpness_is_lowered_by_a_trade_between_weights(other):
    solution = solve(Plane([3, other], [1, 1], start=0.3), 2, 0.05)
    way = math.log(2) / (3 - other)
    assert solution.best.theta == pytest.approx([-way, way])
    assert (len(solution.points), solution.reason) == (2, "met")


def test_sharpness_is_raised_by_a_trade_also_between_weights_that_norms_follow():
    solution = solve(Plane([-0.1, -3], [1, 1]), 2, 0.2)
    way = math.log(2) / 2.9
    assert solution.points[1].theta == pytest.approx([way, -way])


def test_sharpness_is_lowered_along_the_level_no_farther_than_asked():
    solution = solve(Plane([2, 2], [1, 1], start=0.9), 2, 0.05)
    assert (len(solution.points), solution.best.level) == (2, pytest.approx(0.9 / 2**0.5))
    assert solution.best.sharpness == pytest.approx(0.05)
    # Also where the outputs hardly follow the weights: their own direction, not the trace's.
    theta = solve(Plane([0.4, 0.1], [0.3, 0.1], start=0.9), 2, 0.09).best.theta
    assert theta[0] < 0
    assert theta[1] == pytest.approx(theta[0] / 3)


def test_sharpness_is_not_lowered_by_growing_what_a_norm_follows():
    solution = solve(Plane([-1, 2], [0, 1], start=0.3), 2, 0.05)
    assert (solution.reason, len(solution.points)) == ("cannot be met: lowest reachable ρ is 0.1", 1)


def test_where_only_the_level_helps_it_gives_way_by_no_more_than_its_room():
    little = solve(Plane([1, 1], [1, 1], start=0.35), 2, 0.1 * math.exp(0.15))
    assert little.points[1].theta == pytest.approx([0.075, 0.075])
    double = solve(Plane([1, 1], [1, 1], start=0.35), 2, 0.2)
    assert double.points[1].level == pytest.approx(0.3**0.5)
    # But not where it would change more than twice as much as the trace.
    hardly = solve(Plane([0.4, 0.4], [1, 1], start=0.35), 2, 0.2)
    assert (hardly.reason, hardly.best.level) == ("cannot be met: highest reachable ρ is 0.1", 0.35)


def test_scales_do_not_grow_on_the_whole_but_by_the_room_of_the_level():
    # The level does not see the first weight; what it gains, the second gives.
    traded = solve(Plane([1, 0, 0], [0, 0, 1], start=0.35), 3, 0.2)
    assert traded.best.theta == pytest.approx([math.log(2), -math.log(2), 0])
    assert solve(Plane([1, 0], [0, 1], start=0.35), 2, 0.2).best.theta.tolist() == [0, 0]  # none to give
    # Where the level hardly follows, they grow by what would take it to the middle of its band, and then no more.
    hardly = solve(Plane([1, 1], [0.1, 0.1], start=0.35), 2, 0.2)
    assert hardly.best.theta.sum() == pytest.approx(math.log(0.3**0.5 / 0.35))
    assert hardly.reason.startswith("cannot be met: highest reachable ρ is ")


def test_two_scales_that_bounds_leave_may_trade_though_all_together_grow_a_little():
    far = {"target": 0.1 * math.exp(2), "scales": (1 / 20, math.exp(0.5))}
    traded = solve(Plane([-1, 3, 1], [1.5, 1.2, 1]), 3, **far)
    assert traded.reason == "met"
    assert traded.best.theta == pytest.approx([-0.44, 0.5, 0.06])
    assert traded.best.level == pytest.approx(0.5)
    # But not where one hardly falls as the other rises.
    grown = solve(Plane([-1, 3, 1], [4, 1.2, 1]), 3, **far)
    assert grown.reason == "bounded by max_scale: ρ = 0.291"
    assert grown.best.theta.sum() == pytest.approx(0)


def test_a_level_that_goes_with_the_sum_of_scales_leaves_all_other_ways_open():
    theta = solve(Plane([1, 0, -1], [1, 1, 1.001]), 3, 0.2).best.theta
    assert theta == pytest.approx([math.log(2) / 2, 0, -math.log(2) / 2], abs=1e-3)


def test_a_step_ends_where_the_first_scale_meets_the_trust_region():
    solution = solve(Plane([1, -2], [2, 1], start=1e4), 2, ANY, scales=(1e-9, 3))
    assert solution.points[1].theta == pytest.approx([-budget.TRUST, -budget.TRUST / 2])
    assert steps(solution)[1] == pytest.approx([-budget.TRUST, -budget.TRUST / 2])  # as much again
    assert solution.best.level == pytest.approx(0.3**0.25)


@pytest.mark.parametrize("slope", [1.0, 0.2])
def test_a_step_ends_where_all_scales_together_meet_theirs(slope):
    solution = solve(Plane([1, -1] * 10, [slope] * 20, start=1e9), 20, ANY, scales=(1e-9, 3), max_probes=2)
    assert solution.points[1].level == pytest.approx(1e9 * math.exp(-budget.REACH * budget.TRUST))


def test_a_scale_at_its_bound_is_held_and_the_others_go_on():
    both = solve(Plane([1, -1], [2, 1.5], start=500), 2, ANY, scales=(math.exp(-0.5), 3))
    assert both.points[1].theta == pytest.approx([-0.5, -0.5])
    # What has been gone so far counts, for the single scale as for all together.
    slow = solve(Plane([1, -1], [2, 0.2], start=500), 2, ANY, scales=(math.exp(-2), 3))
    assert slow.points[1].theta == pytest.approx([-1.5, -0.15])
    assert slow.points[2].theta == pytest.approx([-2, -0.15 - budget.TRUST])
    many = solve(Plane([1] * 11, [6] + [1] * 10, start=1e9), 11, ANY, scales=(math.exp(-0.5), 3), max_probes=2)
    assert many.points[1].theta[0] == pytest.approx(-0.5)
    assert many.points[1].level == pytest.approx(1e9 * math.exp(-budget.REACH * budget.TRUST))


def test_a_long_way_back_asks_nothing_of_the_sharpness():
    solution = solve(Plane([1, -1], [1, 1], start=50), 2, ANY, scales=(1e-9, 3))
    assert [point.sharpness for point in solution.points] == pytest.approx([0.1, 0.1, 0.1])
    assert solution.best.level == pytest.approx(0.3**0.25)
    far = solve(Plane([1, -1], [1, 1], start=500), 2, ANY, scales=(1e-9, 3))
    assert np.abs(steps(far)[:2]) == pytest.approx(np.full((2, 2), budget.TRUST))


@pytest.mark.parametrize(("power", "gain"), [(1.8, math.log(2)), (0.25, 0.16)])
def test_two_probes_tell_how_the_sharpness_follows_the_trace(power, gain):
    # Too far or too short, the third probe of a power law is where it should be.
    solution = solve(Plane([1, -1], [1, 1], power=power), 2, (0.1 * math.exp(gain), 10.0))
    assert len(solution.points) == 3
    assert solution.best.sharpness == pytest.approx(0.1 * math.exp(gain))
    assert steps(solution)[0] == pytest.approx([gain / 2, -gain / 2])


def test_a_sharpness_that_jumps_is_approached_by_halves():
    jump = solve(Told((0.01, 0.5), (1.9, 0.5)), 2, (0.02, 2.0))
    first = math.log(2) / 2
    assert [p.theta[0] for p in jump.points[:4]] == pytest.approx([0, first, first / 3, first / 6])
    assert (jump.reason, jump.best.sharpness) == ("met", 1.9)  # beyond what was asked for, and in the range
    # Until the steps are too short to tell.
    near = solve(Told((0.0178, 0.5), (1.9, 0.5)), 2, (0.02, 0.03))
    assert (near.reason, near.best.sharpness) == ("cannot be met: highest reachable ρ is 0.0178", 0.0178)


def test_the_first_point_on_target_is_the_answer_though_one_beyond_it_is_in_the_range_too():
    solution = solve(Told((0.1, 0.5), (1.9, 0.5), (0.68, 0.5)), 2, (0.7, 2.0))
    assert (solution.reason, solution.best.sharpness, len(solution.points)) == ("met", 0.68, 3)


def test_one_in_the_range_beyond_it_is_the_answer_where_the_probes_end_short_of_it():
    solution = solve(Told((0.1, 0.5), (1.9, 0.5), (0.11, 0.5)), 2, (0.7, 2.0), max_probes=3)
    assert (solution.reason, solution.best.sharpness, len(solution.points)) == ("met", 1.9, 3)
    outside = solve(Told((0.1, 0.5), (1.9, 0.25), (0.11, 0.5)), 2, (0.7, 2.0), max_probes=3)
    assert outside.reason == "stopped after 3 probes at ρ = 1.9"


@pytest.mark.parametrize("level", [0.17, 2.5])
def test_of_the_points_met_one_in_the_band_is_better_than_one_on_target(level):
    solution = solve(Told((0.1, 0.5), (0.2, level)), 2, 0.2, level=(0.3, 1.5), max_probes=3)
    assert (solution.reason, solution.best.level) == ("stopped after 3 probes at ρ = 0.1", 0.5)
    # Anywhere in the band is as good.
    nearer = solve(Told((0.1, 0.5), (0.12, 0.8)), 2, 0.2, level=(0.3, 1.5), max_probes=2)
    assert (nearer.reason, nearer.best.level) == ("stopped after 2 probes at ρ = 0.12", 0.8)


def test_a_worse_point_is_stepped_back_from_unless_it_is_only_a_little_worse():
    def second_and_third(*rho):
        return steps(solve(Told(*((x, 0.5) for x in rho)), 2, 0.05))

    wrong = second_and_third(0.1, 0.2, 0.08, 0.065, 0.055)
    step = wrong[0]
    assert wrong[1] == pytest.approx(-3 / 4 * step)  # to a quarter of the way
    assert wrong[2] == pytest.approx(step / 2)  # and from there on again, with more trust
    assert second_and_third(0.1, 0.11)[1] == pytest.approx(-3 / 4 * step)
    assert len(second_and_third(0.1, 0.104)) == 1  # noise, from which nothing more is to be had


@pytest.mark.parametrize(("level", "wrong"), [(4.0, 0.45), (0.05, 0.68)])
def test_a_step_that_takes_the_level_far_beyond_where_it_should_go_is_stepped_back_from_though_it_meets_the_target(
    level, wrong
):
    def second(r):
        return steps(solve(Told((0.2, level), (0.2, r), (0.2, 0.6)), 2, ANY))

    step = second(wrong)[0]
    assert second(wrong)[1] == pytest.approx(-3 / 4 * step)  # to a quarter of the way
    assert len(second(0.6)) == 1  # where slopes say, or nearly
    assert len(second(0.95 if level > 1 else 0.35)) == 1  # short of it: the rest is for the next step, if any
    assert len(solve(Told((0.2, level), (0.2, wrong)), 2, ANY, max_probes=2).points) == 2  # it will do if it must


def test_slopes_that_cannot_be_afforded_are_those_of_the_point_before():
    class Turning(Told):
        """Its slopes change at every probe."""

        def __init__(self, *numbers):
            super().__init__(*numbers)
            self.asked = 0

        def slopes(self):
            self.asked += 1
            return self.trace * self.asked, self.level

    def ways(afforded, *rho):
        probe = Turning(*((x, 0.5) for x in rho))
        found = budget.solve(
            probe, 2, (0.8, 0.8), (0.3, 1.0), (1 / 100, 100.0), affords=lambda slopes: afforded(slopes, probe.asked)
        )
        return probe.asked, found

    asked, solution = ways(lambda slopes, asked: not slopes or asked < 1, 0.1, 0.3, 0.8)
    assert (asked, solution.reason) == (1, "met")
    assert steps(solution)[1] == pytest.approx(math.log(0.8 / 0.3) / math.log(0.3 / 0.1) * steps(solution)[0])
    assert ways(lambda slopes, asked: True, 0.1, 0.3, 0.8)[0] == 2
    asked, solution = ways(lambda slopes, asked: asked < 2, 0.1, 0.2, 0.3, 0.8)
    assert (asked, solution.reason) == (2, "stopped after 2 probes at ρ = 0.2")


def test_that_bounds_leave_no_way_is_said_also_where_no_other_probe_can_be_afforded():
    way = Plane([1, -1], [0.1, 0.1])
    free = budget.solve(way, 2, (1e8, 1e9), (0.3, 1.0), (1 / 8, 8.0))
    last = len(free.points)
    told = iter([True] * (2 * last - 3) + [False] * 9)
    spare = budget.solve(way, 2, (1e8, 1e9), (0.3, 1.0), (1 / 8, 8.0), affords=lambda slopes: next(told))
    assert (len(spare.points), spare.reason) == (last, free.reason)
    assert spare.reason.startswith("bounded by max_scale")


def test_the_best_point_is_the_nearest_also_where_a_later_one_was_gone_on_from():
    class Flat(Told):
        def slopes(self):
            return (self.trace, self.level) if len(self.numbers) == 2 else (0 * self.trace, self.level)

    solution = solve(Flat((0.1, 0.5), (0.096, 0.5), (0.096, 0.5)), 2, 0.2)
    assert solution.reason.startswith("cannot be met: highest reachable ρ is ")
    assert (len(solution.points), solution.best.sharpness) == (2, 0.1)


def test_what_cannot_be_met_is_said():
    # Equal traces are the least at a level, which then falls to the end of its band, and the trace with it.
    for target, is_ in ((0.04, "is"), (0.01, "is about")):
        solution = solve(Homogeneous([1, 1]), 2, target)
        assert solution.reason == f"cannot be met: lowest reachable ρ {is_} 0.06"
        assert solution.best.level == pytest.approx(0.3)
    # One layer has no say in its own curvature.
    alone = solve(Homogeneous([3.0]), 1, 0.2, scales=(1 / 20, 1.5))
    assert alone.reason == "cannot be met: highest reachable ρ is 0.1"
    assert solve(Homogeneous([4, 2, 1]), 3, 1e6).reason.startswith("bounded by max_scale: ρ = ")
    assert solve(Normalised([4, 2, 1]), 3, 1e-3).reason.startswith("cannot be met: lowest reachable ρ is ")
    loud = solve(Homogeneous([1.0], level=5.0), 1, (1e-3, 10.0), scales=(0.5, 2.0))
    assert loud.reason == "cannot be met: nearest reachable level is 2.5"


@pytest.mark.parametrize(("third", "probes"), [(0.4, 3), (0.2, 4)])
def test_the_way_down_ends_where_a_step_brings_less_than_a_quarter_of_what_is_lacking(third, probes):
    slow = Told((1.0, 0.35), (0.5, 0.3), (third, 0.3), (0.19, 0.3), trace=(1, 0.5))
    solution = budget.solve(slow, 2, (0.001, 0.1), (0.3, 1.0), SCALES, max_probes=4)
    assert [point.sharpness for point in solution.points] == [1.0, 0.5, third, 0.19][:probes]
    back = Told((1.0, 0.2), (1.0, 0.35), (0.1, 0.3))  # but for steps that were to bring back the level
    assert budget.solve(back, 2, (0.001, 0.1), (0.3, 1.0), SCALES).met


@pytest.mark.parametrize("layers", [2, 400])
def test_a_short_step_of_many_layers_is_a_step(layers):
    net = Homogeneous(np.ones(layers), sharpness=0.11 * math.exp(0.01))
    assert solve(net, layers, 0.1).met
    assert len(solve(net, layers, 0.1).points) == 2


class Deep(Homogeneous):
    """With biases, whose traces are the squares of all scales that come after them."""

    def shares(self, theta):
        later = np.append(theta[::-1].cumsum()[::-1], 0.0)[1:]
        return super().shares(theta) + 0.1 * np.exp(2 * later)

    def slopes(self):  # of the weights alone, as biases have no scale
        return super().slopes()


def test_where_sharpness_falls_as_the_trace_rises_the_way_up_goes_on():
    """As in large batches of noise, where it rises only when the direction of the gradient has changed."""

    class Dipping(Homogeneous):
        def measure(self, theta):
            trace, level = super().measure(theta)
            grown = math.log(trace / self.rho)
            return self.rho * math.exp(max(-0.3 * grown, 1.5 * (grown - 2.5) - 0.75)), level

    solution = solve(Dipping([1, 2, 4], sharpness=0.2), 3, target=(0.7, 2))
    first, second, *_ = solution.points
    assert second.sharpness < 0.6 * first.sharpness
    assert (solution.reason, len(solution.points)) == ("met", 3)


@pytest.mark.parametrize("layers", [3, 10, 50])
def test_many_layers_move_less_each_and_what_goes_too_far_is_taken_back(layers):
    net = Deep(np.geomspace(1, 1.5, layers), sharpness=0.2)
    solution = solve(net, layers, (0.7, 2.0))
    moved = np.abs(solution.points[1].theta).sum()
    assert 0 < moved <= 1.01 * budget.TRUST * budget.REACH
    assert solution.met
    assert 0.6 < solution.best.sharpness < 0.7 * math.exp(budget.OVERSHOT) * 1.1


def test_a_point_beyond_what_was_asked_for_will_do_when_probes_run_out():
    class Jump(Homogeneous):
        def measure(self, theta):
            rho, level = super().measure(theta)
            return (1.5 if rho > 0.3 else 0.1), level

    solution = solve(Jump([40, 2, 1]), 3, (0.7, 2.0))
    assert len(solution.points) == MAX_PROBES
    assert (solution.reason, solution.best.sharpness) == ("met", 1.5)


def test_no_more_probes_than_allowed_and_each_is_kept():
    net = Homogeneous([4, 2, 1], power=0.1)
    solution = solve(net, 3, 1e3, scales=(1e-9, 1e9), max_probes=4)
    assert len(solution.points) == 4
    assert solution.reason.startswith("stopped after 4 probes at ρ = ")
    assert len(solve(Homogeneous([4, 2, 1]), 3, 1e9, scales=(1e-30, 1e30)).points) <= MAX_PROBES


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_noise_in_the_sharpness_does_not_mislead(power):
    met = 0
    for seed in range(40):
        net = Homogeneous([40, 2, 1], power=power, noise=0.03)
        net.rng = np.random.default_rng(seed)
        met += solve(net, 3, 0.4).met
    assert met >= 38


def test_a_probe_that_is_not_finite_is_stepped_back_from():
    class Cliff(Homogeneous):
        def measure(self, theta):
            rho, level = super().measure(theta)
            return (math.inf if rho > 0.5 else rho), level

    net = Cliff([40, 2, 1], power=3.0)
    solution = solve(net, 3, 0.4)
    assert math.isfinite(solution.best.sharpness)
    assert any(not point.finite for point in solution.points)
    assert solution.met


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((math.nan, 0.5), "not finite at ρ = nan, level 0.5"),
        ((0.5, math.inf), "not finite at ρ = 0.5, level inf"),
        ((0.5, 0.0), "the outputs do not depend on the inputs: level 0"),
    ],
)
def test_a_start_without_numbers_is_the_end(numbers, reason):
    class Broken(Homogeneous):
        def measure(self, theta):
            return numbers

    solution = solve(Broken([1, 1]), 2, 0.5)
    assert (solution.reason, len(solution.points)) == (reason, 1)
    assert (solution.best.theta == 0).all()
