"""The budget on Keras models; run on every backend by ``test_keras.py``."""

import keras
import numpy as np
import pytest
from keras import layers, ops, optimizers

import hessinit
from hessinit.keras import InitCallback


def classes(samples=96):
    rng = np.random.default_rng(0)
    return rng.standard_normal((samples, 12)).astype("float32"), (np.arange(samples) % 4).astype("int32")


def compiled(optimizer, ends=None):
    model = keras.Sequential([keras.Input((12,)), layers.Dense(16, "tanh"), layers.Dense(4, ends)])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=ends is None))
    return model


@pytest.mark.parametrize(
    ("make", "least", "ends"),
    [
        (lambda: optimizers.SGD(1.0), 0.7, None),
        (lambda: optimizers.SGD(1.0), 0.7, "softmax"),
        (lambda: optimizers.Adam(3e-2), 0.18, None),
    ],
)
def test_a_compiled_model_brings_its_loss_and_optimizer(make, least, ends):
    model = compiled(make(), ends)
    _, report = hessinit.init_(model, classes(), seed=0, return_report=True)
    done = report.calibration
    assert done.solution.met, done.solution.reason
    assert done.budget[0] == pytest.approx(least, abs=0.01)
    assert least * 0.9 <= done.after.sharpness <= 2.2
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 0
    assert model.evaluate(*classes(), verbose=0) == pytest.approx(done.after.loss, rel=1e-3)


def test_momentum_and_schedules_count_with_the_step_they_come_to():
    plain, momentum, schedule = (
        hessinit.init_(compiled(optimizer), classes(), seed=0).get_weights()
        for optimizer in (
            optimizers.SGD(0.1),
            optimizers.SGD(0.01, momentum=0.9),
            optimizers.SGD(optimizers.schedules.CosineDecay(0.01, 99, warmup_target=0.1, warmup_steps=9)),
        )
    )
    for other in (momentum, schedule):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_batch_that_is_not_finite_leaves_every_weight():
    model = compiled(optimizers.SGD(0.1))
    before = model.get_weights()
    x, y = classes()
    with pytest.raises(ValueError, match="^init_: batch must be finite"):
        hessinit.init_(model, (x * np.nan, y))
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rescale_keeps_what_is_no_weight():
    model = compiled(optimizers.SGD(0.1))
    before = model.get_weights()
    _, report = hessinit.rescale_(model, classes(), seed=0, return_report=True)
    for variable, old in zip(model.weights, before, strict=True):
        scale = report[variable.path].scale if len(old.shape) > 1 else 1.0
        np.testing.assert_allclose(ops.convert_to_numpy(variable), old * scale, rtol=1e-5)


def test_regression_is_measured_in_deviations_of_the_targets():
    x, _ = classes()
    model = keras.Sequential([keras.Input((12,)), layers.Dense(16, "tanh"), layers.Dense(1)])
    y = 100 * x[:, :1]
    for targets, lr in ((y, 1e-4), (y / 100, 1.0)):  # the same problem in other units has the step in theirs
        model.compile(optimizers.SGD(lr), "mse")
        _, report = hessinit.init_(model, (x, targets), seed=0, max_scale=100.0, return_report=True)
        assert 0.29 < report.calibration.after.level < 1.1


def test_a_first_layer_of_few_inputs_has_biases_and_no_other():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    net = keras.Sequential([keras.Input((6,)), *(layers.Dense(n, "tanh") for n in (16, 16)), layers.Dense(1)])
    _, report = hessinit.init_(net, (x, x[:, :1] ** 2), "mse", lr=0.003, seed=0, return_report=True)
    first, *others = (np.asarray(keras.ops.convert_to_numpy(layer.bias)) for layer in net.layers)
    row, weight = (report[v.path] for v in (net.layers[0].bias, net.layers[0].kernel))
    assert row.scale == weight.scale != 1
    assert np.sqrt(np.mean(first**2)) == pytest.approx(row.scale * (0.5 / 6) ** 0.5, rel=1e-4)
    assert not any(bias.any() for bias in others)


def test_zeros_meet_a_norm_with_biases_and_what_norms_take_shares_a_scale():
    x = np.random.default_rng(0).normal(size=(64, 6, 32)).astype("float32")
    x[:, 4:] = 0
    hidden = layers.Dense(8, name="first"), layers.LayerNormalization(), layers.ReLU(), layers.Dense(8, name="second")
    net = keras.Sequential([keras.Input((6, 32)), *hidden, layers.LayerNormalization(), layers.Flatten()])
    net.add(layers.Dense(3, name="last"))
    loss, y = keras.losses.SparseCategoricalCrossentropy(from_logits=True), np.arange(64) % 3
    _, report = hessinit.init_(net, (x, y), loss, lr=0.01, seed=0, return_report=True)
    first, second, last = (report[layer.kernel.path] for layer in net.layers if isinstance(layer, layers.Dense))
    bias = report[net.layers[0].bias.path]
    assert bias.scale == first.scale == second.scale != last.scale
    assert bias.std == pytest.approx(first.std * np.sqrt(np.mean(x**2)), rel=1e-4)
    assert [row.note.endswith("before a norm") for row in (first, second, last)] == [True, True, False]


def test_the_callback_sets_a_model_that_fit_builds_and_only_before_its_first_step():
    x, y = classes()
    model = keras.Sequential([layers.Dense(16, "tanh"), layers.Dense(4)])
    model.compile(optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    start = InitCallback((x, y), seed=0)
    model.fit(x, y, callbacks=[start], verbose=0, shuffle=False)
    same = compiled(optimizers.SGD(0.1))
    _, report = hessinit.init_(same, (x, y), seed=0, return_report=True)
    assert [row.std for row in start.report] == pytest.approx([row.std for row in report], rel=1e-4, nan_ok=True)
    same.fit(x, y, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    again = InitCallback((x, y), seed=0)
    model.fit(x, y, callbacks=[again], verbose=0)
    assert again.report is None


def test_the_scale_that_a_norm_takes_out_is_set_by_the_step_alone():
    ends = []
    for factor in (1.0, 3.0):
        model = keras.Sequential(
            [
                keras.Input((12,)),
                layers.Dense(16, name="before"),
                layers.BatchNormalization(epsilon=1e-9, name="norm"),
                layers.Activation("relu", name="relu"),
                layers.Dense(4, name="head"),
            ]
        )
        hessinit.init_(model, seed=0)
        model.get_layer("before").kernel.assign(factor * model.get_layer("before").kernel)
        model.compile(optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        hessinit.rescale_(model, classes(), seed=0)
        ends.append([ops.convert_to_numpy(w) for w in model.trainable_weights])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-6)
