"""The Keras side, on the backend that KERAS_BACKEND names. Run for each backend by ``test_keras.py``."""

import json
import math
import os
import random

import keras
import numpy as np
import pytest
from keras import layers, ops

import hessinit
from hessinit import rules
from hessinit.keras import HessianInit, HessianNormal, HessianOrthogonal, HessianTruncatedNormal, HessianUniform
from hessinit.networks import keras as adapter

INITIALIZERS = [HessianInit, HessianNormal, HessianUniform, HessianTruncatedNormal, HessianOrthogonal]
every = pytest.mark.parametrize("initializer", INITIALIZERS)
RELU = rules.gain("relu")


def test_backend_is_the_one_asked_for():
    assert keras.backend.backend() == os.environ["KERAS_BACKEND"]


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def rms(x):
    return float(np.sqrt(np.mean(np.square(numpy(x), dtype=np.float64))))


# layer, input shape, {weight: (fan_in, fan_out)}: counted by hand
LAYERS = {
    "Dense": (lambda i: layers.Dense(128, kernel_initializer=i), (784,), {"kernel": (784, 128)}),
    "Conv1D": (lambda i: layers.Conv1D(64, 3, kernel_initializer=i), (9, 32), {"kernel": (96, 192)}),
    "Conv2D": (lambda i: layers.Conv2D(64, (3, 5), kernel_initializer=i), (9, 9, 32), {"kernel": (480, 960)}),
    "Conv3D": (lambda i: layers.Conv3D(16, 3, kernel_initializer=i), (5, 5, 5, 8), {"kernel": (216, 432)}),
    "Conv2D groups": (
        lambda i: layers.Conv2D(64, 3, groups=4, kernel_initializer=i),
        (9, 9, 32),
        {"kernel": (72, 144)},
    ),
    "Conv2D strides": (
        lambda i: layers.Conv2D(64, 4, strides=4, kernel_initializer=i),
        (9, 9, 32),
        {"kernel": (512, 64)},
    ),
    "DepthwiseConv2D": (
        lambda i: layers.DepthwiseConv2D(3, depth_multiplier=2, depthwise_initializer=i),
        (9, 9, 64),
        {"kernel": (9, 18)},
    ),
    "SeparableConv2D": (
        lambda i: layers.SeparableConv2D(48, 3, depthwise_initializer=i, pointwise_initializer=i),
        (9, 9, 64),
        {"depthwise_kernel": (9, 9), "pointwise_kernel": (64, 48)},
    ),
    "Conv2DTranspose": (
        lambda i: layers.Conv2DTranspose(32, 4, strides=2, kernel_initializer=i),
        (5, 5, 64),
        {"kernel": (256, 512)},
    ),
    "EinsumDense": (
        lambda i: layers.EinsumDense("abc,cde->abde", (None, 4, 32), kernel_initializer=i),
        (7, 64),
        {"kernel": (64, 128)},
    ),
    "EinsumDense per head": (
        lambda i: layers.EinsumDense("abhc,hcd->abhd", (None, 4, 32), kernel_initializer=i),
        (7, 4, 64),
        {"kernel": (64, 32)},
    ),
    "LSTM": (
        lambda i: layers.LSTM(48, kernel_initializer=i, recurrent_initializer=i),
        (3, 64),
        {"kernel": (64, 48), "recurrent_kernel": (48, 48)},
    ),
    "GRU": (
        lambda i: layers.GRU(48, kernel_initializer=i, recurrent_initializer=i),
        (3, 64),
        {"kernel": (64, 48), "recurrent_kernel": (48, 48)},
    ),
    "Embedding": (lambda i: layers.Embedding(500, 16, embeddings_initializer=i), (3,), {"embeddings": (1, 16)}),
}


@every
@pytest.mark.parametrize("case", LAYERS)
def test_layers_get_the_scale_of_their_own_fans(case, initializer):
    make, shape, expected = LAYERS[case]
    layer = make(initializer(seed=0))
    layer.build((None, *shape))
    found = {weight.name: weight for weight in layer.weights}
    for name, fans in expected.items():
        weight = found[name]
        std = rules.curvature_neutral_std(*fans, RELU)
        assert rms(weight) == pytest.approx(std, rel=4 / math.sqrt(math.prod(weight.shape)))


@every
def test_attention_projections_have_their_own_fans_and_draws(initializer):
    attention = layers.MultiHeadAttention(4, 16, output_shape=48, kernel_initializer=initializer(seed=0))
    attention.build((None, 7, 96), (None, 7, 96))
    kernels = {w.path.split("/")[-2]: w for w in attention.weights if w.name == "kernel"}
    for name in ("query", "key", "value"):
        assert rms(kernels[name]) == pytest.approx(rules.curvature_neutral_std(96, 64, RELU), rel=0.06)
    assert rms(kernels["attention_output"]) == pytest.approx(rules.curvature_neutral_std(64, 48, RELU), rel=0.08)
    assert not np.allclose(numpy(kernels["query"]), numpy(kernels["key"]))
    again = layers.MultiHeadAttention(4, 16, output_shape=48, kernel_initializer=initializer(seed=0))
    again.build((None, 7, 96), (None, 7, 96))
    for one, two in zip(attention.weights, again.weights, strict=True):
        assert np.array_equal(numpy(one), numpy(two))


def test_recurrent_gates_are_drawn_apart():
    layer = layers.LSTM(8, recurrent_initializer=HessianOrthogonal(gain=1.0, seed=0))
    layer.build((None, 3, 5))
    kernel = numpy(next(w for w in layer.weights if w.name == "recurrent_kernel"))
    for gate in np.split(kernel, 4, axis=1):
        assert gate.T @ gate == pytest.approx(np.eye(8), abs=1e-5)


@every
def test_one_instance_gives_each_layer_its_own_weights_reproducibly(initializer):
    def build(seed):
        shared = initializer(seed=seed)
        net = keras.Sequential([keras.Input((6,)), *(layers.Dense(6, kernel_initializer=shared) for _ in range(3))])
        return [numpy(layer.kernel) for layer in net.layers]

    one, two, other, free = build(3), build(3), build(4), build(None)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[1], one[2])
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(free[0], build(None)[0])


def test_without_seed_set_random_seed_decides():
    draws = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        draws.append(numpy(HessianInit()((4, 5))))
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


@every
@pytest.mark.parametrize(
    "arguments",
    [{}, {"nonlinearity": "tanh", "depth": 20, "seed": 3}, {"gain": 1.5}, {"layout": "oi"}],
    ids=str,
)
def test_config_round_trips(initializer, arguments):
    one = initializer(**arguments)
    config = one.get_config()
    json.dumps(config)
    assert set(config) == {"nonlinearity", "gain", "depth", "layout", "seed"}
    two = keras.initializers.deserialize(keras.initializers.serialize(one))
    assert type(two) is initializer
    assert two.get_config() == config
    assert one.clone().get_config() == config
    if one.seed is not None:
        assert np.array_equal(numpy(one((4, 5))), numpy(two((4, 5))))


@keras.saving.register_keras_serializable(package="checks")
def bent(u):
    return ops.where(u > 0, u, 0.3 * u)


def test_a_function_as_nonlinearity_is_integrated_and_saved():
    one = HessianInit(bent)
    assert one._g**2 == pytest.approx((1 + 0.3**2) / 2, rel=1e-5)
    two = HessianInit.from_config(json.loads(json.dumps(one.get_config())))
    assert two._g == one._g
    assert HessianInit(keras.activations.gelu)._g == rules.gain("gelu")
    assert HessianInit(keras.activations.leaky_relu)._g ** 2 == pytest.approx((1 + 0.2**2) / 2, rel=1e-5)


def test_models_save_load_and_clone(tmp_path):
    net = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(6, "gelu", kernel_initializer=HessianOrthogonal("gelu", seed=1)),
            layers.Dense(3, kernel_initializer=HessianInit(seed=2)),
        ]
    )
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    x = np.ones((2, 8), "float32")
    assert numpy(loaded(x)) == pytest.approx(numpy(net(x)), rel=1e-6)
    assert isinstance(loaded.layers[0].kernel_initializer, HessianOrthogonal)
    cloned = keras.models.clone_model(net)
    for one, two in zip(net.weights, cloned.weights, strict=True):
        assert np.array_equal(numpy(one), numpy(two))  # each layer has a seed of its own


# JAX has float64 only in its x64 mode
DTYPES = ["float32", "bfloat16", "float16"] + (["float64"] if keras.backend.backend() != "jax" else [])


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(initializer, dtype):
    w = initializer(seed=0)((32, 48), dtype)
    assert keras.backend.standardize_dtype(w.dtype) == dtype
    if dtype != "float64":
        cast = ops.cast(initializer(seed=0)((32, 48), "float32"), dtype)
        assert np.array_equal(numpy(w), numpy(cast))


def test_zero_size_shapes():
    assert tuple(HessianInit()((0, 5)).shape) == (0, 5)


@every
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i("swosh"), ValueError, "got 'swosh'"),
        (lambda i: i(gain=-1), ValueError, "gain must be a finite positive number; got -1"),
        (lambda i: i(depth=0), ValueError, "depth must be a positive integer or None; got 0"),
        (lambda i: i(seed="a"), TypeError, "seed must be an integer or None; got 'a'"),
        (lambda i: i(seed=True), TypeError, "seed must be"),
        (lambda i: i(3), TypeError, "nonlinearity must be a name or a function of one array; got 3"),
        (lambda i: i(layout="xy"), ValueError, "axes must be made of"),
        (lambda i: i()((3,)), ValueError, r"shape must have at least two axes; got \(3,\)"),
        (lambda i: i()((3, 4), "int32"), TypeError, "dtype must be a floating-point type; got 'int32'"),
        (lambda i: i(layout="oikk")((3, 4)), ValueError, "axes must fit the shape"),
        (
            lambda i: layers.Dense(3, bias_initializer=i(), name="head").build((None, 4)),
            ValueError,
            "for 'bias' of layer 'head'",
        ),
    ],
)
def test_bad_input_is_named(initializer, call, error, message):
    with pytest.raises(error, match=message) as raised:
        call(initializer)
    assert initializer.__name__ in str(raised.value) or "Layout" in str(raised.value)


def test_layout_for_layers_of_ones_own():
    class Mine(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(name="w", shape=(16, 400), initializer=HessianInit(layout="oi", seed=0))
            self.built = True

        def call(self, x):
            return x @ ops.transpose(self.w)

    layer = Mine()
    layer.build((None, 400))
    assert rms(layer.w) == pytest.approx(rules.curvature_neutral_std(400, 16, RELU), rel=0.06)


def mlp(activation="relu"):
    return keras.Sequential(
        [keras.Input((20,)), layers.Dense(16, activation), layers.Dense(12), layers.LeakyReLU(0.1), layers.Dense(5)]
    )


def weights(model):
    return [numpy(w) for w in model.weights]


def test_init_sets_a_sequential_model():
    net = mlp()
    returned, report = hessinit.init_(net, seed=0, return_report=True)
    assert returned is net
    rows = [row for row in report if row.role == "weight"]
    assert [(row.activation, row.depth) for row in rows] == [("relu", 3), ("LeakyReLU", 3), ("LeakyReLU", 3)]
    assert rows[1].gain ** 2 == pytest.approx((1 + 0.1**2) / 2, rel=1e-5)
    for row, layer in zip(rows, [layer for layer in net.layers if layer.weights], strict=True):
        assert row.std == rules.curvature_neutral_std(*layer.kernel.shape, row.gain)
        assert rms(layer.kernel) == pytest.approx(row.std, rel=1e-5)
        assert (numpy(layer.bias) == 0).all()
    assert [row.name for row in report] == [w.path for w in net.weights]


def functional():
    i = keras.Input((16, 16, 8))
    x = layers.Conv2D(16, 3, strides=2, activation="tanh", groups=4)(i)
    x = layers.BatchNormalization()(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2)(x)
    x = ops.relu(x)
    x = layers.SeparableConv2D(8, 3)(x)
    x = layers.Conv2DTranspose(4, 4, strides=2)(x)
    x = layers.Reshape((-1, 4))(x)
    x = x + layers.MultiHeadAttention(2, 3)(x, x)
    x = layers.LSTM(5, return_sequences=True)(x)
    x = layers.Bidirectional(layers.GRU(5))(x)
    x = keras.Sequential([layers.Dense(9, "gelu"), layers.Dense(6)])(x)
    return keras.Model(i, layers.Dense(3)(layers.Activation("silu")(x)))


def test_init_sets_a_functional_model():
    net = functional()
    _, report = hessinit.init_(net, seed=0, return_report=True)
    left = {row.name.split("/")[-1] for row in report if not row.touched}
    assert left == {"moving_mean", "moving_variance"}
    found = [(row.activation, row.fan_in, row.fan_out) for row in report if row.role == "weight"]
    assert found[:2] == [("tanh", 18, 9), ("Relu", 9, 18)]
    assert found[2:5] == [("linear", 9, 9), ("linear", 32, 8), ("linear", 32, 64)]
    assert [activation for activation, *_ in found[5:9]] == ["gates"] * 4
    dense = {row.activation for row in report if "dense" in row.name and row.role == "weight"}
    assert dense == {"gelu", "silu"}
    ones = [row for row in report if row.role == "norm scale"]
    assert [row.note for row in ones] == ["set to 1"]


def test_products_are_told_from_activations():
    i = keras.Input((6,))
    u = layers.Dense(6)(i)
    u = ops.sigmoid(u) * u  # an activation written out
    u = layers.Multiply()([layers.Dense(6)(u), layers.Dense(6, "sigmoid")(u)])  # a gated linear unit
    net = keras.Model(i, layers.Dense(2)(layers.Dense(6, "sigmoid")(u)))
    _, report = hessinit.init_(net, return_report=True)
    found = sorted((row.activation, round(row.gain, 4)) for row in report if row.role == "weight")
    silu, sigmoid = (round(rules.gain(name, depth=4), 4) for name in ("silu", "sigmoid"))
    assert found == [("gates", 1), ("linear", 1), ("product", silu), ("sigmoid", sigmoid), ("sigmoid", sigmoid)]


def test_weights_that_write_to_one_residual_stream_are_found():
    i = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, name="embed")(i)
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 4)(h, h)
    h = layers.Dense(16, "gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(8, name="down")(h)])
    net = keras.Model(i, layers.Dense(20)(layers.LayerNormalization()(x)))
    followers = adapter.KerasNetwork(net).followers(None)
    streams = {name.split("/")[-2]: f.stream for name, f in followers.items() if f.stream is not None}
    assert sorted(streams) == ["attention_output", "down", "embed"]
    assert len(set(streams.values())) == 1
    assert len(followers) == 8


@pytest.mark.parametrize("kind", ["LSTM", "GlobalAveragePooling1D"])
def test_an_embedding_that_gates_take_is_as_large_as_a_first_layer_makes_its_outputs(kind):
    i = keras.Input((6,), dtype="int32")
    h = getattr(layers, kind)(*[8] * (kind == "LSTM"))(layers.Embedding(20, 16, name="embed")(i))
    _, report = hessinit.init_(keras.Model(i, layers.Dense(2)(h)), seed=0, return_report=True)
    (row,) = (row for row in report if "embed" in row.name)
    expected = rules.INPUT_VARIANCE**0.5 if kind == "LSTM" else rules.curvature_neutral_std(1, 16, 1.0)
    assert row.std_drawn == pytest.approx(expected, rel=1e-5)


def test_the_branches_of_a_stream_without_norms_are_counted():
    i = keras.Input((8,))
    x = layers.Dense(8, name="stem")(i)
    for k in range(3):
        h = layers.Dense(8, "relu", name=f"up{k}")(x)
        x = layers.Add()([x, layers.Dense(8, name=f"down{k}")(h)])
    followers = adapter.KerasNetwork(keras.Model(i, layers.Dense(2, name="head")(x))).followers(None)
    found = {name.split("/")[-2]: follower.branches for name, follower in followers.items()}
    assert {name for name, branches in found.items() if branches == 3} == {"down0", "down1", "down2"}
    assert {branches for name, branches in found.items() if "down" not in name} == {1}


@pytest.mark.parametrize(("norm", "found"), [("BatchNormalization", ["skip"]), ("LayerNormalization", [])])
def test_a_shortcut_beside_a_batch_norm_is_found(norm, found):
    i = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(i)
    x = layers.ReLU()(getattr(layers, norm)()(x))
    h = layers.Conv2D(8, 3, padding="same", strides=2, name="conv")(x)
    h = getattr(layers, norm)()(h)
    x = layers.ReLU()(layers.Add()([h, layers.Conv2D(8, 1, strides=2, name="skip")(x)]))
    h = getattr(layers, norm)()(layers.Conv2D(8, 3, padding="same", name="next")(x))
    x = layers.ReLU()(layers.Add()([h, x]))
    net = keras.Model(i, layers.Dense(2, name="head")(layers.Flatten()(x)))
    followers = adapter.KerasNetwork(net).followers(None)
    assert [name.split("/")[-2] for name, follower in followers.items() if follower.shortcut] == found


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_with_its_embedding_for_output_layer_and_norms_before_or_after(norm_first):
    embed = layers.ReversibleEmbedding(20, 8, name="embed")
    i = keras.Input((6,), dtype="int32")
    places = layers.Embedding(6, 8, name="places")(keras.ops.cumsum(keras.ops.ones_like(i), 1) - 1)
    x = layers.Add()([embed(i), places])
    for k in range(2):
        for branch in "attention", "down":
            h = layers.LayerNormalization()(x) if norm_first else x
            if branch == "attention":
                h = layers.MultiHeadAttention(2, 4, name=f"attention{k}")(h, h)
            else:
                h = layers.Dense(8, name=f"down{k}")(layers.Dense(16, "relu", name=f"up{k}")(h))
            x = layers.Add()([x, h])
            x = x if norm_first else layers.LayerNormalization()(x)
    x = layers.LayerNormalization()(x) if norm_first else x
    model = keras.Model(i, embed(x, reverse=True))
    _, report = hessinit.init_(model, np.arange(12, dtype="int32").reshape(2, 6), seed=0, return_report=True)
    for name in "embed", "places":
        row = report[f"{name}/embeddings"]
        assert "drawn for the output layer" in row.note
        assert row.std_drawn == pytest.approx(rules.curvature_neutral_std(8, 20, 1.0), rel=1e-5)
    ends = [row.name.split("/")[0] for row in report if "beside a norm" in row.note]
    assert ends == ([] if norm_first else ["down0", "attention1", "down1"])


class OwnNorm(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * keras.ops.rsqrt(keras.ops.mean(x * x, axis=-1, keepdims=True) + 1e-6) * self.scale


class OwnGate(OwnNorm):
    def call(self, x):
        return x * keras.ops.sigmoid(keras.ops.mean(x, axis=-1, keepdims=True)) * self.scale


@pytest.mark.parametrize(
    ("kind", "is_norm"), [(OwnNorm, True), (layers.UnitNormalization, True), (OwnGate, False), (layers.Dropout, False)]
)
def test_a_norm_of_the_users_own_is_one(kind, is_norm):
    i = keras.Input((6,))
    x = kind(0.5)(layers.Dense(8, name="one")(i)) if kind is layers.Dropout else kind()(layers.Dense(8, name="one")(i))
    model = keras.Model(i, layers.Dense(2, name="two")(layers.ReLU()(x)))
    one, two = adapter.KerasNetwork(model).followers(None).values()
    assert (one.normed, two.depth) == (is_norm, 1 if is_norm else 2)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("first", "norm", "is_blank"),
    [
        (lambda: layers.Dense(8, name="first"), layers.LayerNormalization, True),
        (lambda: layers.Dense(8, "relu", name="first"), OwnNorm, True),
        (lambda: layers.Conv1D(8, 2, 2, name="first"), layers.RMSNormalization, True),
        (lambda: layers.Conv1D(8, 5, name="first"), layers.LayerNormalization, False),
        (lambda: layers.Dense(8, name="first"), layers.BatchNormalization, False),
        (lambda: layers.Dense(8, name="first"), layers.ReLU, False),
    ],
)
def test_a_first_layer_of_which_a_norm_takes_zeros_is_known(first, norm, is_blank, zeros):
    x = np.random.default_rng(0).normal(size=(4, 6, 32)).astype("float32")
    if zeros:
        x[:, 4:] = 0
    model = keras.Sequential([keras.Input((6, 32)), first(), norm(), layers.Flatten(), layers.Dense(3, name="last")])
    model.layers[0].bias.assign(np.ones(8))
    found = adapter.KerasNetwork(model).followers(x)
    assert [follower.blank for follower in found.values()] == [is_blank and zeros, False]


def test_weights_whose_scale_norms_take_out_are_known():
    i = keras.Input((8,))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(8, name="one")(i)))
    x = layers.ReLU()(layers.LayerNormalization()(layers.Dense(8, name="two")(x)))
    x = layers.LayerNormalization()(layers.Dense(8, "tanh", name="bent")(x))
    a, b = layers.Dense(4, name="left")(x), layers.Dense(4, name="right")(x)
    x = layers.BatchNormalization()(layers.Concatenate()([a, b]))
    u = layers.Dense(8, name="open")(x)
    x = layers.Multiply()([u, layers.LayerNormalization()(u)])
    model = keras.Model(i, layers.Dense(3, name="last")(x))
    found = adapter.KerasNetwork(model).followers(None)
    names = {name.split("/")[0] for name, follower in found.items() if follower.scale_invariant}
    assert names == {"one", "two", "left", "right"}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = layers.Dense(7), layers.Dense(3)

    def call(self, x):
        return self.two(ops.tanh(self.one(x)))


def test_init_follows_a_subclassed_model_through_its_inputs():
    x = np.random.default_rng(0).normal(size=(64, 40)).astype("float32")
    net = Subclassed()
    with pytest.raises(ValueError, match="model 'subclassed.*' must be built"):
        hessinit.init_(net)
    _, report = hessinit.init_(net, x, seed=0, return_report=True)
    assert [(r.activation, r.depth) for r in report if r.role == "weight"] == [("Tanh", 2)] * 2
    assert rms(net.one(x)) ** 2 == pytest.approx(rules.INPUT_VARIANCE, rel=0.3)
    _, report = hessinit.init_(net, return_report=True)
    assert {r.activation for r in report if r.role == "weight"} == {"relu (assumed)"}
    for nonlinearity in (keras.activations.gelu, layers.Activation("gelu"), rules.ACTIVATIONS["gelu"]):
        _, report = hessinit.init_(net, nonlinearity=nonlinearity, return_report=True)
        assert report.rows[0].gain == pytest.approx(rules.gain("gelu"), rel=1e-5)


class Telling(keras.Model):
    """Of layers that tell by themselves what follows their weights, but for the last."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = layers.Embedding(20, 8), layers.MultiHeadAttention(2, 4)
        self.lstm, self.wide, self.head = layers.LSTM(8), layers.Dense(16, "gelu"), layers.Dense(3)

    def call(self, x):
        x = self.embed(x)
        return self.head(self.wide(self.lstm(self.attention(x, x))))


def test_layers_of_a_subclassed_model_tell_what_follows_their_weights():
    net, ids = Telling(), np.arange(12).reshape(3, 4)
    _, traced = hessinit.init_(net, ids, seed=0, return_report=True)
    _, report = hessinit.init_(net, seed=0, return_report=True)
    found = {row.name: (row.activation, row.std) for row in report if row.role == "weight"}
    assert [name for name, (activation, _) in found.items() if "assumed" in activation] == [net.head.kernel.path]
    assert {activation for activation, _ in found.values()} == {"linear", "gates", "gelu", "relu (assumed)"}
    assert all(found[r.name] == (r.activation, r.std) for r in traced if r.role == "weight" and r.depth == 1)


def test_inputs_are_measured_where_they_meet_the_first_weight():
    x = np.random.default_rng(0).uniform(0, 255, (300, 50)).astype("float32")
    net = keras.Sequential([keras.Input((50,)), layers.Rescaling(1 / 255), layers.Dense(200, "relu"), layers.Dense(3)])
    hessinit.init_(net, x, seed=0)
    first = net.layers[1]
    pre_activation = (x / 255) @ numpy(first.kernel)
    assert np.mean(pre_activation**2) == pytest.approx(rules.INPUT_VARIANCE, rel=0.1)


PAIRED = [
    layers.Dense(8, "relu"),
    layers.Dense(6),
    layers.ReLU(negative_slope=0.2),
    layers.Dropout(0.5),
    layers.Dense(3),
]
IMAGES = [
    layers.Conv2D(6, 3, activation="relu"),
    layers.AveragePooling2D(2),
    layers.Conv2D(4, 2),
    layers.Activation("silu"),
    layers.Flatten(),
    layers.Dense(3),
]


@pytest.mark.parametrize(("shape", "body"), [((5,), PAIRED), ((8, 8, 2), IMAGES)])
def test_mirrored_units_make_a_net_that_begins_linear(shape, body):
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    net = keras.Sequential([keras.Input(shape), *(type(layer).from_config(layer.get_config()) for layer in body)])
    for mirrored in (True, False):
        _, report = hessinit.init_(net, x, seed=0, mirrored=mirrored, return_report=True)
        assert (np.abs(numpy(net(x)) + numpy(net(-x))).max() < 1e-5) == mirrored
        assert all(("mirrored" in row.note) == mirrored for row in report if row.role == "weight")


def test_before_an_average_kernels_have_as_many_times_the_variance():
    i = keras.Input((16, 16, 2))
    first, second = layers.Conv2D(3, 3), layers.Conv2D(4, 3, activation="tanh")
    third, last = layers.Dense(5), layers.Dense(2)
    h = layers.AveragePooling2D((2, 1))(layers.Activation("tanh")(first(i)))
    h = layers.AveragePooling2D(2)(layers.MaxPooling2D(2)(second(h)))
    h = layers.AveragePooling2D((1, 3))(layers.ReLU()(third(h)))  # of all positions
    net = keras.Model(i, last(layers.Flatten()(h)))
    _, report = hessinit.init_(net, return_report=True)
    for layer, factor in ((first, 2), (second, 4), (third, 1), (last, 1)):
        row = report[layer.kernel.path]
        assert row.std == pytest.approx(rules.curvature_neutral_std(row.fan_in, row.fan_out, row.gain, factor))


def test_units_that_are_taken_twice_or_reshaped_are_not_mirrored():
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    for between in (
        lambda u: layers.Add()([layers.Dense(6)(u), u]),
        lambda u: layers.Dense(6)(layers.LayerNormalization()(u)),
        lambda u: layers.Dense(6)(layers.Reshape((6,))(layers.Permute((2, 1))(layers.Reshape((2, 3))(u)))),
    ):
        i = keras.Input((6,))
        first = layers.Dense(6, "relu")
        net = keras.Model(i, layers.Dense(2)(layers.Activation("tanh")(between(first(i)))))
        _, report = hessinit.init_(net, x, seed=0, mirrored=True, return_report=True)
        assert "mirrored" not in report[first.kernel.path].note


def test_same_seed_same_weights_in_models_built_alike_whatever_the_global_state():
    one = weights(hessinit.init_(mlp(), seed=0))
    keras.utils.set_random_seed(9)
    two = weights(hessinit.init_(mlp(), seed=0))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], weights(hessinit.init_(mlp(), seed=1))[0])
    # one seed, one set of weights on every backend
    assert float(np.abs(one[0]).sum()) == pytest.approx(85.9202, abs=5e-4)


def test_nothing_but_the_parameters_changes():
    net = functional()
    net.layers[2].trainable = False
    moving = [numpy(w) for w in net.non_trainable_weights]
    state = random.getstate(), np.random.get_state()[1].copy()
    trainable = [w.trainable for w in net.weights]
    hessinit.init_(net, np.ones((2, 16, 16, 8), "float32"))
    assert state[0] == random.getstate()
    assert np.array_equal(state[1], np.random.get_state()[1])
    assert trainable == [w.trainable for w in net.weights]
    assert all(np.array_equal(a, numpy(b)) for a, b in zip(moving, net.non_trainable_weights, strict=True))


def test_include_exclude_and_frozen():
    net = mlp()
    before = weights(net)
    net.layers[0].trainable = False
    _, report = hessinit.init_(net, exclude="*bias", seed=0, return_report=True)
    changed = [not np.array_equal(a, numpy(b)) for a, b in zip(before, net.weights, strict=True)]
    assert changed == [False, False, True, False, True, False]
    assert [row.note for row in report][:2] == ["left: frozen", "left: excluded"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_restores_every_variable(monkeypatch, error):
    net = mlp()
    before = weights(net)
    write = adapter.KerasNetwork.write

    def failing(self, name, values):
        write(self, name, values * np.float32("nan") if "dense" in name and values.shape == (12, 5) else values)
        if values.shape == (12, 5):
            raise error("stop")

    monkeypatch.setattr(adapter.KerasNetwork, "write", failing)
    with pytest.raises(error):
        hessinit.init_(net, seed=0)
    assert all(np.array_equal(a, numpy(b)) for a, b in zip(before, net.weights, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hessinit.init_(mlp(), generator=3), TypeError, "generator must be None for a Keras model; got 3"),
        (lambda: hessinit.init_(mlp(), distribution="x"), ValueError, "distribution must be one of"),
        (lambda: hessinit.init_(mlp(), include="nope"), ValueError, "include must match a parameter"),
        (lambda: hessinit.init_(mlp(), np.full((2, 20), np.nan, "float32")), ValueError, "batch must be finite"),
        (lambda: hessinit.init_(mlp(), np.zeros((2, 7), "float32")), ValueError, "batch must be inputs that the model"),
    ],
)
def test_bad_models_and_batches_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_net_trains_from_it():
    """The same net on 2,560 of the shipped images, 40 steps: better from HessianInit than from Keras's default."""
    from hessinit.experiments import data, training

    loaded = data.load("fashion_mnist_mini").first(2560)
    keys = {"activation": "relu", "optimizer": "sgd", "lr": 0.01, "epochs": 1, "batch_size": 64, "seed": 0}
    losses = {
        name: training.train(training.Run("mlp", "keras", loaded.name, name, **keys), loaded).train_loss
        for name in ("closed_form", "keras_default")
    }
    assert losses["closed_form"] < losses["keras_default"] < math.log(10)


@pytest.mark.parametrize(("own", "asked", "expected"), [(True, None, 1.0), (False, None, 0.0), (True, 2.0, 2.0)])
def test_the_bias_of_forget_gates_is_the_layers_own_or_the_one_asked_for(own, asked, expected):
    net = keras.Sequential([keras.Input((4, 3)), layers.LSTM(5, unit_forget_bias=own), layers.Dense(2)])
    hessinit.init_(net, seed=0, forget_bias=asked)
    bias = numpy(net.layers[0].cell.bias)
    assert bias.tolist() == [0.0] * 5 + [expected] * 5 + [0.0] * 10
