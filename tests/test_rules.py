import itertools
import math

import numpy as np
import pytest
import torch
from reference import layer_curvatures, random_relu_net

from hessinit import rules
from hessinit.layout import Layout


@pytest.mark.parametrize(
    ("nonlinearity", "param", "square"),
    [
        ("linear", None, 1.0),
        ("relu", None, 0.5),
        ("leaky_relu", None, (1 + 0.01**2) / 2),
        ("Leaky-ReLU", 0.2, (1 + 0.2**2) / 2),
        (lambda u: 3 * u, None, 9.0),
        (np.abs, None, 1.0),
        (np.sin, None, math.sqrt((1 - math.exp(-4)) / 4)),
    ],
)
def test_gain_equals_closed_forms(nonlinearity, param, square):
    assert rules.gain(nonlinearity, param) ** 2 == pytest.approx(square, rel=1e-12)


def test_names_have_aliases_and_relu_is_the_default():
    assert rules.gain("swish") == rules.gain("SiLU")
    assert rules.gain("hard_silu") == rules.gain("Hard-Swish")
    assert rules.gain("identity") == rules.gain("linear")
    assert rules.gain() == rules.gain("relu")
    assert rules.pair_gain() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda u: np.maximum(u, 0), 1.0),
        (lambda u: np.where(u > 0, u, 0.2 * u), 1.2),
        (rules.activation("gelu"), 1.0),
        (rules.activation("softplus"), 1.0),
        (lambda u: u + np.abs(u) / 5, 2.0),  # alike but for a tenth of their difference and more
        (lambda u: u + np.abs(u) / 20, None),
        (lambda u: u, None),  # a pair would be one unit
        (np.abs, None),  # one that vanishes
        (lambda u: np.minimum(u, 0) - u, None),  # one that turns the sign
        (np.tanh, None),  # not linear
        (rules.activation("sigmoid"), None),
    ],
)
def test_pairs_pass_signals_on_by_half_the_squared_slope(function, slope, scale):
    gain = rules.pair_gain(lambda u: scale * function(u))
    assert gain == (None if slope is None else pytest.approx(scale * slope / 2**0.5))


@pytest.mark.parametrize("function", [lambda u: u.nothing, lambda u, v: u, "swosh"])
def test_what_cannot_be_called_has_no_pairs(function):
    assert rules.pair_gain(function) is None


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (((128, 784),), {}, (784, 128)),
        (((64, 3, 5, 5),), {}, (3 * 25, 64 * 25)),
        (((784, 128), "...io"), {}, (784, 128)),
        (((3, 3, 32, 1), "...go"), {}, (9, 9)),
        (((64, 8, 3, 3), "(go)i..."), {"groups": 4}, (72, 144)),
        (((256, 3, 16, 16),), {"stride": 256}, (768, 256)),
        (((64, 32, 4, 4), Layout("io...", stride=4, transposed=True)), {}, (256, 512)),
    ],
)
def test_fans_of_a_shape_and_a_layout_or_its_letters(arguments, options, expected):
    assert rules.fans(*arguments, **options) == expected


@pytest.mark.parametrize("depth", [2, 3, 6, 20, 50])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_homogeneous_activations_have_one_gain_for_all_depths(slope, depth):
    def leaky(u):
        return np.where(u > 0, u, slope * u)

    assert rules.gain(leaky, depth=depth) == pytest.approx(rules.gain(leaky), rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "elu", "selu", "softsign", "mish", "hardtanh"])
@pytest.mark.parametrize("depth", [2, 3, 20])
def test_depth_aware_gain_makes_growths_cancel(name, depth):
    """Follows the two recursions by a plain loop, with Monte Carlo moments instead of quadrature."""
    gain = rules.gain(name, depth=depth)
    rng = np.random.default_rng(0)
    z = rng.standard_normal(400_000)
    function, step = rules.ACTIVATIONS[name], 1e-5
    variance, log_growth = 1.0, 0.0
    for _ in range(depth - 1):
        u = math.sqrt(variance) * z
        p = np.mean(function(u) ** 2)
        d = np.mean(((function(u + step) - function(u - step)) / (2 * step)) ** 2)
        log_growth += math.log(p / gain**2 / variance) + math.log(d / gain**2)
        variance = p / gain**2
    assert log_growth / (depth - 1) == pytest.approx(0, abs=0.02)


def test_two_layers_have_the_one_layer_gain_and_depth_moves_it():
    assert rules.gain("tanh", depth=1) == rules.gain("tanh")
    assert rules.gain("tanh", depth=2) == pytest.approx(rules.gain("tanh"))
    squares = [rules.gain("tanh", depth=depth) ** 2 for depth in (2, 3, 6, 20, 50, 1000)]
    assert squares == sorted(squares)
    assert squares[-1] < 1  # the edge of chaos, from below


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rules.gain("swosh"), ValueError, "nonlinearity must be one of .*relu.*; got 'swosh'"),
        (lambda: rules.gain(3), TypeError, "nonlinearity must be a name or a function of one array; got 3"),
        (lambda: rules.gain("relu", 0.1), ValueError, "param must be None"),
        (lambda: rules.gain("relu", depth=0), ValueError, "depth must be a positive integer or None; got 0"),
        (lambda: rules.gain("relu", depth=2.5), ValueError, "depth must be"),
        (lambda: rules.gain(lambda u: 0 * u + 1), ValueError, "does not vary"),
        (lambda: rules.gain(lambda u: u.sum()), ValueError, "maps shape"),
        (lambda: rules.gain(lambda u, v: u), ValueError, "must have a finite gain; got <function.*missing 1 required"),
        (lambda: rules.curvature_neutral_std(0, 1, 1), ValueError, "fan_in must be a finite positive number; got 0"),
        (lambda: rules.curvature_neutral_std(1, -1, 1), ValueError, "fan_out must be"),
        (lambda: rules.curvature_neutral_std(1, 1, math.nan), ValueError, "gain must be a finite"),
        (lambda: rules.layer_curvatures([3, 2], [1.0, 1.0]), ValueError, r"one entry a layer \(1\); got 2"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_std_is_hes_where_fans_are_equal_and_symmetric_in_them():
    assert rules.curvature_neutral_std(128, 128, rules.gain("relu")) == pytest.approx(math.sqrt(2 / 128))
    assert rules.curvature_neutral_std(50, 200, 1.0) == rules.curvature_neutral_std(200, 50, 1.0) == 0.1


def test_a_bias_weighs_as_much_as_one_of_few_inputs():
    n, moment = 50, 3.0
    weight = rules.input_layer_std(n, moment)
    assert rules.input_bias_std(n) == pytest.approx(weight * moment**0.5)
    assert rules.input_bias_std(n, 4) == pytest.approx(2 * rules.input_bias_std(n))
    assert rules.input_bias_std(rules.FEW_INPUTS) > 0 == rules.input_bias_std(rules.FEW_INPUTS + 1)


def test_input_layer_std_gives_the_stated_variance():
    x = np.random.default_rng(0).normal(3.0, 2.0, (500, 400))
    std = rules.input_layer_std(400, float(np.mean(x**2)))
    u = x @ np.random.default_rng(1).normal(0, std, (400, 2000))
    assert u.var() == pytest.approx(rules.INPUT_VARIANCE, rel=0.1)


WIDTHS, NETS = [12, 40, 8, 24, 5], 400
STDS = [rules.curvature_neutral_std(n, m, rules.gain("relu")) for n, m in itertools.pairwise(WIDTHS)]


@pytest.fixture(scope="module")
def measured():
    """Layer curvatures of random ReLU nets on one input, mean squared error (D²ℓ = 2/C I): (nets, layers)."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(1, WIDTHS[0])))
    loss_hessian = 2 / WIDTHS[-1] * torch.eye(WIDTHS[-1], dtype=torch.float64)
    nets = [random_relu_net(WIDTHS, STDS, rng) for _ in range(NETS)]
    return np.array([list(layer_curvatures(net, x, loss_hessian).values()) for net in nets]), float(x.square().mean())


def _deviations(measured, expected):
    """In standard errors, of each layer."""
    return (measured.mean(0) - expected) / (measured.std(0, ddof=1) / math.sqrt(len(measured)))


def test_formula_predicts_the_measured_layer_curvature(measured):
    curvatures, second_moment = measured
    expected = rules.layer_curvatures(WIDTHS, STDS, "relu", second_moment=second_moment, loss_trace=2.0)
    assert np.abs(_deviations(curvatures, expected)).max() < 4


@pytest.mark.parametrize("fault", ["hidden width squared", "std of the layer itself", "fan_in alone"])
def test_the_same_sample_rejects_wrong_exponents(measured, fault):
    """The twin: each fault is one exponent of the formula changed by a half, one or two."""
    curvatures, second_moment = measured
    expected = rules.layer_curvatures(WIDTHS, STDS, "relu", second_moment=second_moment, loss_trace=2.0)
    wrong = {
        "hidden width squared": expected * WIDTHS[2] ** 0.5,
        "std of the layer itself": expected * np.array(STDS) ** 2,
        "fan_in alone": rules.layer_curvatures(
            WIDTHS, [math.sqrt(2 / n) for n in WIDTHS[:-1]], "relu", second_moment=second_moment, loss_trace=2.0
        ),
    }[fault]
    assert np.abs(_deviations(curvatures, wrong)).max() > 4


def test_curvature_times_variance_is_equal_over_layers_of_a_homogeneous_net():
    stds = [0.3, 0.1, 0.7, 0.2]
    h = rules.layer_curvatures(WIDTHS, stds, "relu")
    assert h * np.array(stds) ** 2 == pytest.approx((h * np.array(stds) ** 2)[0])


def test_layer_curvature_of_two_relu_layers_by_hand():
    # Half of the squares forward and half of the slopes backward: 2 · σ_2² · 8 / 2 and 4 · σ_1² · 8 / 2.
    assert rules.layer_curvatures([4, 8, 3], [0.5, 0.1], loss_trace=2.0) == pytest.approx([4 * 2 * 0.01 * 4, 2 * 4])
    assert rules.layer_curvatures([4, 8, 3], [0.5, 0.1]) == pytest.approx([4 * 0.01 * 4, 4])
    assert rules.layer_curvatures([4, 8, 3], [0.5, 0.1], "linear", second_moment=3.0) == pytest.approx([0.96, 24])


def _drift(name, square):
    """How the predicted curvature (log, mean over layers) changes from 3 to 20 layers; ``square(depth)``: σ² n.

    First pre-activations have unit variance, the premise of the gain.
    """

    def level(depth):
        stds = [math.sqrt(square(depth) / 128)] * depth
        h = rules.layer_curvatures([128] * (depth + 1), stds, name, second_moment=1 / square(depth))
        return np.log(h * square(depth)).mean()  # ‖x‖² is 1 / square(depth) too

    return abs(level(20) - level(3))


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "elu"])
def test_curvature_stays_level_with_depth_where_it_does_not_under_he_and_glorot(name):
    ours = _drift(name, lambda depth: 1 / rules.gain(name, depth=depth) ** 2)
    one_layer = _drift(name, lambda depth: 1 / rules.gain(name) ** 2)
    glorot, he = _drift(name, lambda depth: 1.0), _drift(name, lambda depth: 2.0)
    assert ours < 0.5
    assert ours < one_layer
    assert min(he, glorot) > 2 * ours
