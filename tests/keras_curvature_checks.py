"""Curvature of Keras models, on the backend that KERAS_BACKEND names. Run for each backend by ``test_keras.py``."""

import os

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)

import keras
from keras import layers, ops

from hessinit import curvature
from hessinit.networks.keras_autodiff import KerasArrays
from hessinit.objective import Objective

TORCH = keras.backend.backend() == "torch"
JAX = keras.backend.backend() == "jax"
ROUNDED = 3e-6  # Keras computes some operations of float64 models in single precision


@pytest.fixture(autouse=True)
def double_precision():
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx(before)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = layers.Dense(4, "tanh"), layers.Dropout(0.5), layers.Dense(3)

    def call(self, x, training=False):
        return self.last(self.dropout(self.first(x), training=training))


def _residual():
    x = keras.Input((5, 5, 1))
    h = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(2, 3, padding="same")(x)))
    h = layers.ReLU()(layers.add([h, layers.Conv2D(2, 3, padding="same")(h)]))
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(h)))


def _attention():
    tokens = keras.Input((3,), dtype="int32")
    h = layers.Embedding(5, 4)(tokens)
    n = layers.LayerNormalization()(h)
    h = h + layers.MultiHeadAttention(2, 2)(n, n)
    return keras.Model(tokens, layers.Dense(3)(layers.GlobalAveragePooling1D()(h)))


def _sequential(shape, *rest):
    return keras.Sequential([keras.Input(shape), *rest])


def _convolution():
    conv = layers.Conv2D(2, 2, activation="relu")
    return _sequential((5, 5, 1), conv, layers.MaxPooling2D(), layers.Flatten(), layers.Dense(3))


def _recurrent():
    return _sequential((3,), layers.Embedding(5, 2), layers.LSTM(2, dropout=0.5), layers.Dense(3))


X = np.random.default_rng(0).normal(size=(6, 4))
Y = np.arange(6) % 3
IMAGES = np.random.default_rng(1).normal(size=(4, 5, 5, 1))
TOKENS = np.random.default_rng(2).integers(0, 5, (4, 3))
MODELS = {
    "relu": (lambda: _sequential((4,), layers.Dense(5, "relu"), layers.Dense(3)), X, Y),
    "subclassed": (Subclassed, X, Y),
    "conv, max-pool": (_convolution, IMAGES, Y[:4]),
    "residual, batch norm": (_residual, IMAGES, Y[:4]),
    "lstm": (_recurrent, TOKENS, Y[:4]),
    "attention": (_attention, TOKENS, Y[:4]),
}
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(name):
    make, x, y = MODELS[name]
    model = make()
    model(x)
    return model, x, y


def close(x, y, tolerance=ROUNDED):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), np.linalg.norm(x - y) / np.linalg.norm(y)


def rows_of(variables, scalars, model_call):
    """∂(each scalar)/∂variables, by the backend's own reverse mode on the plain model."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def f(values):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                return scalars(model_call())

        found = jax.jit(jax.jacrev(f))([v.value for v in variables])
        return np.concatenate([np.asarray(j).reshape(j.shape[0], -1) for j in found], axis=1)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(persistent=True) as tape:
            s = scalars(model_call())
        found = tape.jacobian(s, [v.value for v in variables], experimental_use_pfor=False)
        return np.concatenate([np.reshape(tf.convert_to_tensor(j).numpy(), (s.shape[0], -1)) for j in found], axis=1)
    import torch

    rows = []
    for s in scalars(model_call()):
        found = torch.autograd.grad(s, [v.value for v in variables], retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]).numpy())
    return np.stack(rows)


def variables_of(model):
    """What trains, in the order of the library's flat vectors: by layer."""
    by_path = {v.path: v for v in model.trainable_variables}
    return [by_path[name] for name in Objective("test", model, (None, None), "mse", forward=len).select(None)]


class Call:
    def __init__(self, model, x):
        self.model, self.x = model, x

    def __call__(self):
        return self.model(self.x, training=False)


def gauss_newton(model, x):
    call = Call(model, x)
    jacobian = rows_of(variables_of(model), lambda z: ops.reshape(z, (-1,)), call).reshape(len(x), 3, -1)
    p = ops.convert_to_numpy(ops.softmax(ops.stop_gradient(call())))
    second = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
    return np.einsum("nca,ncd,ndb->ab", jacobian, second, jacobian) / len(x)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "relu"])
def test_against_the_backends_own_jacobian(name):
    model, x, y = build(name)
    operator = curvature.hessian(model, (x, y), CROSS_ENTROPY, training=False)
    assert sorted(operator.rows) == sorted(v.path for v in model.trainable_variables)
    true = gauss_newton(model, x)
    assert np.linalg.norm(true) > 0.01
    v = np.random.default_rng(3).normal(size=operator.shape[0])
    assert operator.quadratic_form(v) > 0  # a Jacobian that is silently zero is the failure to look for
    close(operator.quadratic_form(v), v @ true @ v)
    close(operator @ v, true @ v)
    large = name in ("lstm", "attention")
    if not large or JAX:  # elsewhere as many backward passes as there are outputs
        close(ops.convert_to_numpy(operator.flatten(operator.diagonal())), np.diag(true))
    if large and not TORCH:  # compiled one by one on JAX, which takes longest for these
        return
    if not large:
        close(operator.trace(), np.trace(true))
    trace = operator.trace(num_probes=20)
    assert abs(trace - np.trace(true)) < 4 * trace.standard_error
    first, last = operator.rows[0], operator.rows[-1]
    sizes = operator.block(first).shape[0], operator.block(last).shape[0]
    close(operator.block(last, first) @ v[: sizes[0]], true[-sizes[1] :, : sizes[0]] @ v[: sizes[0]])


EXACT = ["relu", "subclassed", "residual, batch norm", *["attention"] * TORCH]


@pytest.mark.parametrize("name", EXACT)
def test_exact_hessian_against_differences_of_gradients(name):
    model, x, y = build(name)
    operator = curvature.hessian(model, (x, y), CROSS_ENTROPY, exact=True)
    v = np.random.default_rng(4).normal(size=operator.shape[0])
    product = operator @ v
    objective = Objective("test", model, (x, y), CROSS_ENTROPY)
    variables = variables_of(model)
    values = [ops.convert_to_numpy(w.value).copy() for w in variables]
    gradients, step = [], 3e-5
    for sign in (1, -1):
        start = 0
        for w, value in zip(variables, values, strict=True):
            w.assign(value + sign * step * v[start : start + value.size].reshape(value.shape))
            start += value.size
        found = objective.gradient(operator.rows)
        gradients.append(np.concatenate([ops.convert_to_numpy(found[n]).ravel() for n in operator.rows]))
    close(product, (gradients[0] - gradients[1]) / (2 * step), 2e-2)
    for w, value in zip(variables, values, strict=True):
        w.assign(value)
    close(operator @ v, product)  # constants of compiled functions follow the weights
    unit = np.random.default_rng(5).normal(size=operator.shape[0])
    close(unit @ product, v @ (operator @ unit), 1e-4)


def test_exactness():
    model, x, y = build("relu")
    operator = curvature.hessian(model, (x, y), CROSS_ENTROPY)
    kernels = [name for name in operator.rows if name.endswith("kernel")]
    assert operator.exactness == "approximate"
    assert operator.trace().exactness == "exact"
    assert operator.block(kernels[0], kernels[1]).exactness == "approximate"
    model, x, y = build("subclassed")
    kappa = curvature.rayleigh(model, (x, y), CROSS_ENTROPY)
    assert [str(e) for e in kappa.exactness.values()] == ["approximate", "exact"]
    errors = list(curvature.approximation_error(model, (x, y), CROSS_ENTROPY, block=TORCH).values())
    assert errors[0].relative > 1e-3
    assert errors[1].relative < 1e-5
    if TORCH:  # by the products that other checks make
        assert errors[0].block > 1e-3
        assert errors[1].block < 1e-5


LOSSES = {
    "sparse": (CROSS_ENTROPY, None, Y),
    "sparse ignoring": (keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1), None, Y),
    "sparse, probabilities": ("sparse_categorical_crossentropy", "softmax", Y),
    "sparse, labels in a column": ("sparse_categorical_crossentropy", "softmax", Y[:, None]),
    "categorical": (keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), None, np.eye(3)[Y]),
    "categorical, probabilities": (keras.losses.categorical_crossentropy, "softmax", np.eye(3)[Y]),
    "binary": (keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2), None, np.eye(3)[Y]),
    "binary, probabilities": ("binary_crossentropy", "sigmoid", np.eye(3)[Y]),
    "mse": ("mse", None, X[:, :3]),
    "mse sum": (keras.losses.MeanSquaredError(reduction="sum"), None, X[:, :3]),
    "huber": (keras.losses.Huber(delta=0.3), None, X[:, :3]),
    "poisson": ("poisson", "exponential", np.abs(X[:, :3])),
    "log-cosh": ("log_cosh", None, X[:, :3]),
    "class of its own": (keras.losses.CategoricalFocalCrossentropy(from_logits=True), None, np.eye(3)[Y]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_keras_own_value_and_its_curvature(name):
    loss, activation, y = LOSSES[name]
    model = _sequential((4,), layers.Dense(3, activation))
    objective = Objective("test", model, (X, y), loss)
    own = keras.losses.get(loss)
    value = own(y, model(X)) if isinstance(own, keras.Loss) else ops.mean(own(ops.convert_to_tensor(y), model(X)))
    close(objective.value(), ops.convert_to_numpy(ops.stop_gradient(value)), 1e-5)
    operator = curvature.hessian(model, (X, y), loss)
    exact = curvature.hessian(model, (X, y), loss, exact=True)
    v = np.random.default_rng(0).normal(size=operator.shape[0])
    product = operator @ v
    if name != "poisson":  # of rates that are not linear in the weights the second term stays
        close(product, exact @ v, 1e-4)
        assert operator.exactness == "exact"
    if not TORCH:  # what follows is the same on every backend, and not soon compiled
        return
    close(v @ product, operator.quadratic_form(v), 1e-5)
    parts = [(X[:3], y[:3]), (X[3:], y[3:])]
    if name != "mse sum":
        close(curvature.hessian(model, parts, loss) @ v, product, 1e-5)


@pytest.mark.skipif(not (TORCH or JAX), reason="sums over samples on TensorFlow")
def test_one_probe_of_the_traces_squares_each_sample_by_itself():
    single = {"dtype": "float32"}  # in double precision Keras casts its kernels before it uses them
    net = keras.Sequential([layers.Input((20,), **single), layers.Dense(30, "tanh", **single)])
    net.add(layers.LayerNormalization(**single))
    net.add(layers.Dense(5, **single))
    batch = np.random.default_rng(0).normal(size=(256, 20)).astype("float32"), np.arange(256) % 5
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    operator = curvature.hessian(net, batch, loss)
    traces, true = operator.traces(16), operator.traces()
    for name, value in true.items():
        assert abs(traces[name] - value) < 5 * traces.standard_error[name]
        assert traces.standard_error[name] < 0.03 * value  # of sums over samples 0.1 to 0.3


def test_a_model_that_looks_at_its_data_is_derived_every_time():
    """On JAX what is met again is compiled for all data, and this cannot be."""

    class Looking(Subclassed):
        def call(self, x, training=False):
            return super().call(x if float(ops.max(x)) > 0 else -x, training)

    model = Looking()
    model(X)
    batches = [(abs(X), Y), (-abs(X), Y), (abs(X), Y)]  # all the same to this model
    operator, same = (curvature.hessian(model, data, CROSS_ENTROPY) for data in (batches, batches[0]))
    v = np.random.default_rng(0).normal(size=operator.shape[0])
    for _ in range(3):
        close(operator @ v, same @ v, 1e-5)


@pytest.mark.skipif(not JAX, reason="compiled on JAX alone")
def test_a_loader_is_compiled_for_all_batches_of_one_shape():
    class Counting(Subclassed):
        calls = 0

        def call(self, x, training=False):
            Counting.calls += 1
            return super().call(x, training)

    model = Counting()
    model(X)
    operator = curvature.hessian(model, [(X + k, Y) for k in range(5)], CROSS_ENTROPY)
    v = np.random.default_rng(0).normal(size=operator.shape[0])
    first = operator @ v
    before = Counting.calls
    close(operator @ v, first, 1e-6)
    assert Counting.calls == before + 5  # for its targets, each batch goes through the model once
    parts = [curvature.hessian(model, (X + k, Y), CROSS_ENTROPY) @ v for k in range(5)]
    close(first, sum(ops.convert_to_numpy(part) for part in parts) / 5, 1e-5)


def test_names_that_both_sides_know():
    model = _sequential((4,), layers.Dense(3, "softmax"))
    names = ("cross_entropy", "sparse_categorical_crossentropy")
    close(*(Objective("test", model, (X, Y), name).value() for name in names), 1e-6)
    logits = _sequential((4,), layers.Dense(3))
    logits.set_weights(model.get_weights())
    pair = [curvature.hessian(m, (X, Y), "cross_entropy") for m in (model, logits)]
    close(*(ops.convert_to_numpy(h.dense()) for h in pair), 1e-5)


@pytest.mark.parametrize("name", ["subclassed", "residual, batch norm", "lstm"])
def test_nothing_changes_and_dropout_is_off_or_one_mask(name):
    model, x, y = build(name)
    before = [ops.convert_to_numpy(v.value).copy() for v in model.variables]
    rates = [getattr(layer, "rate", getattr(layer, "dropout", None)) for layer in model._flatten_layers()]
    off = curvature.hessian(model, (x, y), CROSS_ENTROPY)
    on = curvature.hessian(model, (x, y), CROSS_ENTROPY, dropout=True)
    v = np.ones(off.shape[0])
    assert on.quadratic_form(v) == pytest.approx(on.quadratic_form(v), rel=1e-6)
    assert off.quadratic_form(v) == pytest.approx(off.quadratic_form(v), rel=1e-6)
    if name != "residual, batch norm":
        assert abs(on.quadratic_form(v) / off.quadratic_form(v) - 1) > 1e-3
        still = curvature.hessian(model, (x, y), CROSS_ENTROPY, training=False)
        assert off.quadratic_form(v) == pytest.approx(still.quadratic_form(v), rel=1e-5)
    else:
        evaluation = curvature.hessian(model, (x, y), CROSS_ENTROPY, training=False)
        assert abs(evaluation.quadratic_form(v) / off.quadratic_form(v) - 1) > 1e-3  # batch statistics
    curvature.step_sharpness(model, (x, y), CROSS_ENTROPY, keras.optimizers.Adam())
    with pytest.raises(ValueError, match="^hessian: labels"):
        curvature.hessian(model, (x, y + 50), CROSS_ENTROPY)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), value)
    assert rates == [getattr(layer, "rate", getattr(layer, "dropout", None)) for layer in model._flatten_layers()]


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda: keras.optimizers.Adam(1e-2),
    "AdamW": lambda: keras.optimizers.AdamW(1e-2),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-2),
    "Lion": lambda: keras.optimizers.Lion(1e-2),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}


@pytest.mark.parametrize(
    ("name", "steps"), [(name, steps) for name in OPTIMIZERS for steps in (0, 2) if steps or TORCH or name == "Adam"]
)
def test_step_sharpness_is_that_of_the_step_the_optimizer_takes(name, steps):
    model, x, y = build("relu")
    optimizer = OPTIMIZERS[name]()
    objective = Objective("test", model, (x, y), CROSS_ENTROPY)
    names = objective.select(None)

    def step():
        gradient = objective.gradient(names)
        optimizer.apply([gradient[n] for n in names], model.trainable_variables)

    for _ in range(steps):
        step()
    state = [ops.convert_to_numpy(v.value).copy() for v in optimizer.variables]
    rho = curvature.step_sharpness(model, (x, y), CROSS_ENTROPY, optimizer)
    assert len(optimizer.variables) == len(state)
    for variable, value in zip(optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), value)
    true = gauss_newton(model, x)
    gradient = objective.gradient(names)
    g = np.concatenate([ops.convert_to_numpy(gradient[n]).ravel() for n in names])
    before = np.concatenate([ops.convert_to_numpy(v.value).ravel() for v in model.trainable_variables])
    step()
    delta = np.concatenate([ops.convert_to_numpy(v.value).ravel() for v in model.trainable_variables]) - before
    close(rho, delta @ true @ delta / abs(g @ delta), 1e-4)


def test_a_vector_may_be_written_again_once_it_was_handed_over():
    model, x, y = build("relu")
    operator = curvature.hessian(model, (x, y), CROSS_ENTROPY)
    v = np.random.default_rng(0).normal(size=operator.shape[0])
    expected = ops.convert_to_numpy(operator @ v)
    product = operator @ v
    v[:] = 0
    close(ops.convert_to_numpy(product), expected)
    large = np.ones(2**22)  # of which a framework would rather not make a copy
    handed = KerasArrays().asarray(large, ops.ones(1))
    large[:] = 0
    assert float(ops.min(handed)) == 1


def test_names_frozen_variables_and_models_not_yet_built():
    model = Subclassed()
    kappa = curvature.rayleigh(model, (X, Y), CROSS_ENTROPY, params="*/kernel")
    assert list(kappa) == [v.path.rpartition("/")[0] for v in model.trainable_variables if v.path.endswith("kernel")]
    model.first.trainable = False
    assert curvature.hessian(model, (X, Y), CROSS_ENTROPY).shape == (15, 15)
    with pytest.raises(ValueError, match="params must be names or globs of parameters; got 'dense_99"):
        curvature.hessian(model, (X, Y), CROSS_ENTROPY, params="dense_99/*")
    with pytest.raises(TypeError, match="optimizer must be a learning rate or a keras.Optimizer"):
        curvature.step_sharpness(model, (X, Y), CROSS_ENTROPY, "adam")
    with pytest.raises(ValueError, match="loss must be one of cross_entropy"):
        curvature.hessian(model, (X, Y), "no such loss")
    with pytest.raises(ValueError, match="loss must be a scalar"):
        curvature.hessian(model, (X, Y), keras.losses.MeanSquaredError(reduction=None))
    bad = X.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="batch must be finite"):
        curvature.hessian(model, (bad, Y), CROSS_ENTROPY)
    inputs = keras.Input((4,), name="features")
    two = keras.Model({"features": inputs}, layers.Dense(3)(inputs))
    expected = curvature.hessian(two, ({"features": X}, Y), CROSS_ENTROPY)
    close(curvature.hessian(two, {"features": X, "labels": Y}, CROSS_ENTROPY).trace(), expected.trace())
    given = curvature.hessian(
        two, [X, {"t": Y}], CROSS_ENTROPY, forward=lambda m, b: (m({"features": b[0]}), b[1]["t"])
    )
    close(given.trace(), expected.trace())
