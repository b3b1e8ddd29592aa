"""Squares of each sample's own derivatives, by one backward pass: right wherever samples are told apart."""

import copy

import cases
import numpy as np
import pytest
import torch
from torch import nn

from hessinit import curvature
from hessinit.draw import signs
from hessinit.networks.torch_autodiff import TorchDerivatives

MODELS = cases.models()
APART = {  # parameters of which squares come by sample; of the models not named here, all
    "residual": 0,  # its norms are in training mode
    "batch norm, training": 0,
    "lstm": 3,
    "gru": 3,
    "attention module, tied": 2,
    "attention function, tied": 4,
    "shared module": 2,
    "weight norm": 3,
    "weight norm by hooks": 3,
}


def squares(model, x, few=2):
    """What the derivatives say of a model: outputs and the map to squares and gradients, or None."""
    values = dict(model.named_parameters())

    def on(x):
        return lambda values: torch.func.functional_call(model, values, (x,))

    return TorchDerivatives().squares(on(x), on(x[:few]), values, list(values), len(x), few)


def one_by_one(model, x, u):
    """Squares of gradients of one sample after the other, and the whole gradient."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    whole = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(x)):
        found = torch.autograd.grad(model(x[k : k + 1]), list(model.parameters()), u[k : k + 1], allow_unused=True)
        for name, g in zip(sums, found, strict=True):
            if g is not None:
                sums[name] += g**2
                whole[name] += g
    return sums, whole


@pytest.mark.parametrize("name", [name for name in MODELS if name != "compiled"])
def test_squares_are_those_of_one_sample_after_the_other(name):
    model, (x, _) = MODELS[name].model, MODELS[name].batch
    model = copy.deepcopy(model).requires_grad_() if name == "frozen" else model
    found = squares(model, x, few=min(2, len(x) - 1))
    if APART.get(name) == 0:
        assert found is None
        return
    z, pull = found
    u = torch.randn_like(z)
    squared, gradients = pull([u])
    sums, whole = one_by_one(model, x, u)
    assert len(squared) == APART.get(name, len(sums))
    assert squared.keys() | gradients.keys() == sums.keys()
    for key, value in [*((key, sums[key]) for key in squared), *((key, whole[key]) for key in gradients)]:
        torch.testing.assert_close((squared | gradients)[key], value, rtol=1e-10, atol=1e-14)
    for again, factor in zip(pull([u, -2 * u]), (5, -1), strict=True):  # squares and gradients of both
        for key, value in again.items():
            torch.testing.assert_close(value, factor * (squared | gradients)[key], rtol=1e-10, atol=1e-14)
    for key, value in pull([u], total=True)[0].items():
        torch.testing.assert_close(value, squared[key].sum(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(8, 64, 5, padding=2, stride=2),
        nn.Conv2d(8, 64, 3, groups=2, padding="same"),
        nn.Conv2d(8, 64, 3, padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
        nn.Conv2d(8, 64, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(8, 64, 3, stride=2),
        nn.Conv3d(8, 64, 3, padding=1, padding_mode="circular"),
    ],
    ids=["1d", "2d, groups", "2d, steps", "2d, reflect", "transposed", "3d, circular"],
)
@pytest.mark.parametrize("size", [4, 20])
def test_large_and_small_convolutions(layer, size):
    """Of which the large ones go sample by sample."""
    torch.manual_seed(0)
    axes = len(layer.weight.shape) - 2
    x = torch.randn(3, 8, *[size if axes < 3 else 6 + size // 10] * axes).double()
    layer.double()
    z, pull = squares(layer, x)
    u = torch.randn_like(z)
    squared, _ = pull([u])
    sums, _ = one_by_one(layer, x, u)
    totals, _ = pull([u], total=True)
    for name in ("weight", "bias"):
        torch.testing.assert_close(squared[name], sums[name], rtol=1e-10, atol=0)
        torch.testing.assert_close(totals[name], sums[name].sum(), rtol=1e-10, atol=0)


class Product(nn.Module):
    """``x @ kernel``, as Keras's layers on torch have it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.kernel


@pytest.mark.parametrize("axes", [(), (5,), (2, 40)], ids=["one", "few", "many"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 12), nn.Linear(8, 12, bias=False), Product(8, 12)])
@pytest.mark.parametrize("most", [2**24, 100], ids=["at once", "in parts"])
def test_products_of_one_few_and_many_rows_a_sample(layer, axes, most, monkeypatch):
    """Few rows have their sum of squares from products of rows, many from the derivatives."""
    monkeypatch.setattr("hessinit.networks.torch_samples.MOST", most)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, *axes, 8, dtype=torch.float64)
    z, pull = squares(layer, x)
    u = torch.randn_like(z)
    squared, gradients = pull([u])
    sums, _ = one_by_one(layer, x, u)
    assert not gradients
    totals, _ = pull([u], total=True)
    for name, value in sums.items():
        torch.testing.assert_close(squared[name], value, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(totals[name], value.sum(), rtol=1e-10, atol=1e-14)


class Wrapped(nn.Module):
    """A layer between two others, so that samples and derivatives are of every kind."""

    def __init__(self, layer, *axes):
        super().__init__()
        self.before, self.layer, self.head, self.axes = nn.Linear(3, 6), layer, nn.LazyLinear(2), axes

    def forward(self, x):
        h = torch.tanh(self.before(x)).unflatten(1, self.axes) if self.axes else torch.tanh(self.before(x))
        out = self.layer(h, h) if isinstance(self.layer, nn.Bilinear) else self.layer(h)
        return self.head((out[0] if isinstance(out, tuple) else out).flatten(1))


LAYERS = {
    "bilinear": Wrapped(nn.Bilinear(6, 6, 4)),
    "prelu": Wrapped(nn.PReLU(2), 2, 3),
    "lstm, batch first": Wrapped(nn.LSTM(3, 4, batch_first=True), 2, 3),
    "gru cell": Wrapped(nn.GRUCell(6, 4)),
    "group norm": Wrapped(nn.GroupNorm(2, 2), 2, 3),
    "instance norm": Wrapped(nn.InstanceNorm1d(2, affine=True), 2, 3),
    "rms norm": Wrapped(nn.RMSNorm(3), 2, 3),
    "encoder layer": Wrapped(nn.TransformerEncoderLayer(3, 1, 5, 0.0, batch_first=True), 2, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_of_every_kind_of_layer(name):
    torch.manual_seed(0)
    x, y = torch.randn(5, 3).double(), torch.arange(5) % 2
    model = LAYERS[name].double()
    model(x)
    operator = curvature.hessian(model, (x, y), "cross_entropy")
    apart = operator.flatten(operator.diagonal())
    torch.testing.assert_close(apart, operator.dense().diagonal(), rtol=1e-9, atol=1e-15)


def test_a_function_without_a_rule_for_vmap_goes_sample_by_sample(monkeypatch):
    def vmap(function):
        raise RuntimeError("no batching rule")

    model, x = MODELS["layer and group norm"].model, MODELS["layer and group norm"].batch[0]
    u = torch.randn_like(model(x))
    expected, _ = squares(model, x)[1]([u])
    monkeypatch.setattr(torch.func, "vmap", vmap)
    found, _ = squares(model, x)[1]([u])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=0)


class Hidden(torch.autograd.Function):
    """A use of a weight that is no function of torch's."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Twice(nn.Module):
    """One weight in a function of torch's and in one of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + Hidden.apply(x, self.fc.weight)


class SequenceFirst(nn.Module):
    """Samples on the second axis inside."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).mean(0)


class Mixed(nn.Module):
    """Every sample less the mean of all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) - 0.01 * self.fc(x).mean(0, keepdim=True)


class InPlace(nn.Module):
    """A weight that is added in place."""

    def __init__(self):
        super().__init__()
        self.fc, self.added = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = self.fc(x)
        h += self.added
        return torch.tanh(h)


class Offset(nn.Module):
    """A weight that is added, and a constant of as many rows as there are samples."""

    def __init__(self):
        super().__init__()
        self.added, self.scale = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 4))
        self.register_buffer("constant", torch.randn(4, 4))

    def forward(self, x):
        return torch.tanh(x @ self.constant + self.added) @ (2 * self.scale).T


class Turned(nn.Module):
    """Weights with their axes in another order, in one way or two, at one place or two."""

    def __init__(self):
        super().__init__()
        self.first, self.kernel = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 3, 2, 6))
        self.last, self.both = nn.Parameter(torch.randn(2, 2, 3)), nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        image = torch.tanh(x @ self.first.T).view(len(x), 1, 1, 5).expand(-1, 2, 5, -1)
        z = (
            torch.tanh(torch.conv2d(image, self.kernel.permute(3, 2, 0, 1))).mean((2, 3))
            @ self.last.transpose(1, 2).flatten(1).t()
        )
        return z @ self.both.t() + z @ self.both


def test_weights_with_their_axes_in_another_order():
    torch.manual_seed(0)
    model, x = Turned().double(), torch.randn(6, 4).double()
    u = torch.randn(6, 2).double()
    squared, gradients = squares(model, x)[1]([u])
    assert (set(squared), set(gradients)) == ({"first", "kernel", "last"}, {"both"})
    sums, _ = one_by_one(model, x, u)
    for name, value in squared.items():
        torch.testing.assert_close(value, sums[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_part_of_the_parameters_of_a_call(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2))
    operator = curvature.hessian(model.double(), (torch.randn(6, 2, 4).double(), torch.arange(6) % 2), "cross_entropy")
    part, whole = operator.block(f"*{kind}").diagonal(), operator.diagonal()
    assert {name.rpartition(".")[2] for name in part} == {kind}
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=0)
        dense = operator.block(name).dense().diagonal()
        torch.testing.assert_close(value.flatten(), dense, rtol=1e-9, atol=1e-15)


def test_what_cannot_be_told_apart_is_left_to_gradients():
    torch.manual_seed(0)
    x, long = torch.randn(4, 4).double(), torch.randn(5, 6, 4).double()
    assert squares(Twice().double(), x) is None
    assert squares(SequenceFirst().double(), long) is None
    assert squares(Mixed().double(), x) is None
    inside, u = InPlace().double(), torch.randn(4, 3).double()
    pull = squares(inside, x)[1]
    for _ in range(2):  # nothing is called again that would change what the first pass has kept
        squared, gradients = pull([u])
        assert (set(squared), set(gradients)) == ({"fc.weight", "fc.bias"}, {"added"})
        torch.testing.assert_close(squared["fc.weight"], one_by_one(inside, x, u)[0]["fc.weight"])
    model = Offset().double()
    squared, gradients = squares(model, x)[1]([u])
    assert (list(squared), list(gradients)) == (["added"], ["scale"])
    torch.testing.assert_close(squared["added"], one_by_one(model, x, u)[0]["added"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_of_half_precision_are_in_single(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype), torch.randn(6, 4).to(dtype)
    z, pull = squares(model, x)
    u = 1e-3 * torch.randn_like(z)  # of squares that half precision has not
    squared, _ = pull([u])
    sums, _ = one_by_one(model.double(), x.double(), u.double())
    for name, s in squared.items():
        assert s.dtype == torch.float32
        torch.testing.assert_close(s.double(), sums[name], rtol=0.1, atol=0.02 * float(sums[name].max()))


def test_one_probe_says_as_much_of_the_traces_as_many_of_sums_would():
    """Products of different samples, of 256, are out: less than a twentieth of the variance is left."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    batch = torch.randn(256, 20), torch.arange(256) % 5

    def spread(apart):
        with pytest.MonkeyPatch.context() as patch:
            if not apart:
                patch.setattr(TorchDerivatives, "squares", lambda *args: None)
            traces = curvature.hessian(net, batch, "cross_entropy").traces(64)
        true = curvature.hessian(net, batch, "cross_entropy").traces()
        for name, value in true.items():
            assert abs(traces[name] - value) < 4 * traces.standard_error[name]
        return np.array([traces.standard_error[name] / true[name] for name in true])

    assert (spread(True) ** 2 < spread(False) ** 2 / 20).all()


def test_signs_of_samples_that_are_alike_leave_no_spread(monkeypatch):
    """Exact where all samples are one; where they have much in common, less than half the variance."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).double()
    x, y = 1 + 0.3 * torch.randn(256, 20).double(), torch.arange(256) % 10
    same = curvature.hessian(net, (x[:1].expand(32, -1), y[:32]), "cross_entropy")
    for name, value in same.traces().items():
        assert same.traces(1)[name] == pytest.approx(value, rel=1e-9)

    def variances():
        operator = curvature.hessian(net, (x, y), "cross_entropy")
        of_traces, of_diagonal = operator.traces(32).standard_error, operator.diagonal(32).standard_error
        return [e**2 for e in of_traces.values()], sum(float((e**2).sum()) for e in of_diagonal.values())

    (traces, diagonal), independent = variances(), lambda rng, shape, axis: signs(rng, shape)
    monkeypatch.setattr("hessinit.objective.balanced_signs", independent)
    others, other = variances()
    assert np.less(traces, np.divide(others, 2)).all()
    assert diagonal < other / 3


def test_passes_are_shared_only_where_memory_is_that_of_one_chunk():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))

    def passes(work, batch=(x, y), **options):
        operator = curvature.hessian(net, batch, "cross_entropy", **options)
        calls.clear()
        work(operator)
        return len(calls)

    many = torch.randn(43, 12)
    for exact in (False, True):
        assert passes(lambda h: h @ many, exact=exact) == 1
        assert passes(lambda h: h @ many, exact=exact, chunk_size=4) == 12 * 2
        assert passes(lambda h: h @ many, exact=exact, batch=[(x, y)]) == 12
        assert passes(lambda h: h.norm(num_probes=12), exact=exact) == 1
        assert passes(lambda h: h.eigsh(1), exact=exact) == 2  # and the gradient
    assert passes(lambda h: h.traces(12)) == 2  # and one of two samples
    assert passes(lambda h: h.diagonal()) == 2


def test_products_follow_the_model_from_one_call_to_the_next():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    operator = curvature.hessian(net, (torch.randn(8, 4).double(), torch.arange(8) % 3), "cross_entropy", exact=True)
    v = np.ones(43)
    with operator.products() as product:
        inside = product(v), product(v)
    np.testing.assert_array_equal(*inside)
    np.testing.assert_allclose(inside[0], operator @ v, rtol=1e-12)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with operator.products() as product:
        np.testing.assert_allclose(product(v), operator @ v, rtol=1e-12)
    assert np.abs(inside[0] - operator @ v).max() > 1e-3
    with operator.products() as product:  # of vectors by name, of tensors, of blocks, as @ has them
        named, block = operator.unflatten(torch.ones(43).double()), torch.ones(43, 2).double()
        np.testing.assert_allclose(operator.flatten(product(named)), operator @ v, rtol=1e-12)
        torch.testing.assert_close(product(block), operator @ block)
        with pytest.raises(ValueError, match=r"v must be of shape \(43,\)"):
            product(np.ones(44))
    with pytest.raises(KeyError, match="^'mine'$"), operator.products():  # an error of the user's own stays
        raise KeyError("mine")
