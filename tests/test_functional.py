"""Weights that no module tells: parameters of the user's own modules, and experts in one tensor."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessinit
from hessinit import inspection
from hessinit.layout import Layout


class Own(nn.Module):
    """A parameter, and what is done with it."""

    def __init__(self, shape, use, **others):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.use = nn.Parameter(torch.randn(shape, generator=generator)), use
        for name, size in others.items():
            setattr(self, name, nn.Parameter(torch.randn(size, generator=generator)))

    def forward(self, x):
        return self.use(self, x)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def routed(weight, x):
    """Each third of the rows to an expert of its own, by Hugging Face's way of one after the other."""
    out = torch.zeros(len(x), weight.shape[1])
    for k, rows in enumerate(torch.arange(len(x)).chunk(3)):
        out.index_add_(0, rows, F.linear(x[rows], weight[torch.tensor(k)]))
    return out


def gathered(weight, x):
    """As its batched way has it, a matrix for each row."""
    return torch.bmm(weight[torch.arange(len(x)) % 3], x[:, :, None])[:, :, 0]


CALLS = {
    "linear": ((8, 5), (6, 5), lambda m, x: F.linear(x, m.weight), "oi"),
    "on the right": ((5, 8), (6, 5), lambda m, x: x @ m.weight, "io"),
    "on the left": ((8, 5), (5, 6), lambda m, x: torch.matmul(m.weight, x), "oi"),
    "turned": ((8, 5), (6, 5), lambda m, x: x @ m.weight.T, "oi"),
    "turned, square": ((5, 5), (6, 5), lambda m, x: torch.mm(x, m.weight.t()), "oi"),
    "addmm": ((5, 8), (6, 5), lambda m, x: torch.addmm(torch.zeros(8), x, m.weight), "io"),
    "cast": ((8, 5), (6, 5), lambda m, x: F.linear(x.double(), m.weight.double()), "oi"),
    "in parts": ((8, 5), (6, 5), lambda m, x: torch.cat([F.linear(x, w) for w in m.weight.chunk(2)], -1), "oi"),
    "sum": ((5, 2, 4), (6, 3, 5), lambda m, x: torch.einsum("bnd, dhk -> bnhk", x, m.weight), "ioo"),
    "sum, heads": ((2, 4, 5), (6, 2, 4), lambda m, x: torch.einsum("bhd,hde->bhe", x, m.weight), "gio"),
    "sum of a list": ((8, 5), (6, 5), lambda m, x: torch.einsum("oi,bi->bo", [m.weight, x]), "oi"),
    "embedding": ((9, 8), None, lambda m, x: F.embedding(x, m.weight), "vo"),
    "experts, one by one": ((3, 8, 5), (6, 5), lambda m, x: routed(m.weight, x), "goi"),
    "experts, gathered": ((3, 8, 5), (6, 5), lambda m, x: gathered(m.weight, x), "goi"),
    "experts, side by side": ((3, 5, 8), (3, 6, 5), lambda m, x: x @ m.weight, "gio"),
}
CONVOLUTIONS = {
    "conv1d": ((8, 5, 3), (6, 5, 9), F.conv1d, {}, nn.Conv1d(5, 8, 3)),
    "conv2d": ((8, 2, 3, 3), (6, 4, 9, 9), F.conv2d, {"groups": 2, "stride": 2}, nn.Conv2d(4, 8, 3, 2, groups=2)),
    "transposed": ((4, 8, 2, 2), (6, 4, 9, 9), F.conv_transpose2d, {"stride": (2, 2)}, nn.ConvTranspose2d(4, 8, 2, 2)),
}


@pytest.mark.parametrize(("shape", "inputs", "use", "axes"), CALLS.values(), ids=CALLS)
def test_the_call_tells_the_axes(shape, inputs, use, axes):
    x = torch.arange(6) if inputs is None else numbers(*inputs)
    model, report = hessinit.init_(Own(shape, use), x, seed=0, return_report=True)
    row = report["weight"]
    assert (row.role, row.note.split(",")[0]) == ("weight", "drawn")
    assert (row.fan_in, row.fan_out) == Layout(axes).fans(shape)
    assert float(model.weight.detach().square().mean().sqrt()) == pytest.approx(row.std, rel=1e-5)


@pytest.mark.parametrize(("shape", "inputs", "function", "keywords", "module"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_have_the_fans_of_their_modules(shape, inputs, function, keywords, module):
    model = Own(shape, lambda m, x: function(x, m.weight, **keywords))
    row, theirs = (
        hessinit.init_(m, numbers(*inputs), seed=0, return_report=True)[1]["weight"] for m in (model, module)
    )
    assert (row.fan_in, row.fan_out, row.std) == (theirs.fan_in, theirs.fan_out, theirs.std)


def linear(inputs, outputs, added=False):
    def use(m, x):
        return F.linear(x, m.weight) + m.bias if added else F.linear(x, m.weight, bias=m.bias)

    return Own((outputs, inputs), use, bias=outputs)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("budget", [False, True])
def test_a_users_linear_layer_gets_what_torchs_gets(added, budget):
    nets = [
        nn.Sequential(layer(20, 30), nn.GELU(), layer(30, 40), nn.GELU(), layer(40, 3))
        for layer in (nn.Linear, lambda i, o: linear(i, o, added))
    ]
    x, y = numbers(64, 20), torch.arange(64) % 3
    known = {"batch": (x, y), "loss": "cross_entropy", "lr": 0.1} if budget else {"batch": x}
    reports = [hessinit.init_(net, **known, seed=0, return_report=True)[1] for net in nets]
    for (name, theirs), (_, ours) in zip(*(net.named_parameters() for net in nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert nets[1][0].bias.abs().max() > 0 if budget else nets[1][0].bias.abs().max() == 0
    if budget:
        theirs, ours = (report.calibration.after for report in reports)
        assert ours.units == theirs.units != {}


def test_each_expert_is_drawn_apart():
    model = hessinit.init_(Own((3, 8, 5), lambda m, x: routed(m.weight, x)), numbers(6, 5), seed=0)
    w = model.weight.detach()
    for expert in w:
        torch.testing.assert_close(expert.T @ expert, torch.eye(5) * expert.square().sum() / 5)
    assert (w[0] - w[1]).abs().max() > 0.1


LEFT = {
    "added": ((6, 5), lambda m, x: m.head(x + m.weight)),  # as positions are
    "multiplied": ((6, 5), lambda m, x: m.head(x * m.weight)),
    "data of another weight": ((6, 5), lambda m, x: m.head(m.weight) + x.sum()),  # as learned queries are
    "one of two factors": ((5, 2), lambda m, x: m.head(F.linear(x, m.weight @ m.other))),
    "one of three factors": ((5, 5), lambda m, x: m.head(torch.einsum("bi,ij,bj->bi", x, m.weight, x))),
    "every second row": ((10, 5), lambda m, x: m.head(F.linear(x, m.weight[::2]))),
    "scaled": ((5, 5), lambda m, x: m.head(F.linear(x, m.weight * 0.1))),
    "a vector": ((5,), lambda m, x: m.head(x) + (x @ m.weight)[:, None]),
    "not used": ((5, 5), lambda m, x: m.head(x)),
}


@pytest.mark.parametrize(("shape", "use"), LEFT.values(), ids=LEFT)
def test_what_is_no_weight_of_its_own_is_left(shape, use):
    model = Own(shape, use, other=(2, 5))
    model.head = nn.Linear(5, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, report = hessinit.init_(model, numbers(6, 5), seed=0, return_report=True)
    for name in ("weight", "other"):
        assert torch.equal(getattr(model, name), before[name])
    assert report["weight"].note == report["other"].note == "left: no rule for it"


def test_without_a_batch_it_is_left():
    model = nn.Sequential(linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    before = model[0].weight.detach().clone()
    _, report = hessinit.init_(model, seed=0, return_report=True)
    assert torch.equal(model[0].weight, before)
    assert report["0.weight"].note == "left: no rule for it"


def test_names_and_frozen_ones_are_heeded():
    for setting in ("exclude", "frozen"):
        model = nn.Sequential(linear(20, 30), nn.ReLU(), linear(30, 3))
        model[0].weight.requires_grad_(setting != "frozen")
        before = model[0].weight.detach().clone()
        options = {"exclude": "0.weight"} if setting == "exclude" else {}
        _, report = hessinit.init_(model, numbers(64, 20), seed=0, return_report=True, **options)
        assert torch.equal(model[0].weight, before)
        assert setting in report["0.weight"].note
        assert report["2.weight"].touched


def test_of_a_tied_one_the_first_name_counts():
    model = nn.Sequential(linear(20, 20), nn.Tanh(), linear(20, 20))
    model[2].weight = model[0].weight
    _, report = hessinit.init_(model, numbers(64, 20), seed=0, return_report=True)
    assert report["0.weight"].touched
    assert report["2.weight"].note == "tied to 0.weight"
    assert model[0].weight is model[2].weight


def test_an_embedding_that_is_the_output_layer_too_is_as_small_as_torchs():
    class Words(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.hidden, self.own = nn.Linear(16, 16), own
            table = nn.Embedding(50, 16)
            self.embed = nn.ParameterDict({"weight": table.weight}) if own else table

        def forward(self, tokens):
            table = self.embed["weight"] if self.own else self.embed.weight
            x = F.embedding(tokens, table) if self.own else self.embed(tokens)
            return F.linear(x + F.gelu(self.hidden(x)), table)

    tokens = torch.arange(40).reshape(8, 5)
    ours, theirs = (
        hessinit.init_(Words(own), tokens, seed=0, return_report=True)[1]["embed.weight"] for own in (True, False)
    )
    assert (ours.std, ours.note, ours.fan_in) == (theirs.std, theirs.note, theirs.fan_in)


class Tokens(nn.Module):
    """Patches of an image, with a token beside them that alone is read."""

    def __init__(self, token):
        super().__init__()
        self.token, self.patches = nn.Parameter(token), nn.Linear(16, 32)
        settings = {"dropout": 0.0, "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-12}
        self.block = nn.TransformerEncoderLayer(32, 4, 64, **settings)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.block(torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1))[:, 0])


def test_a_class_token_of_zeros_begins_as_a_position_does():
    batch, reports = (numbers(64, 9, 16), torch.arange(64) % 3), []
    for exclude in (None, "token"):
        model = Tokens(torch.zeros(1, 1, 32))
        adam = torch.optim.Adam(model.parameters(), 1e-3)
        options = {"optimizer": adam, "seed": 0, "exclude": exclude, "return_report": True}
        reports.append(hessinit.init_(model, batch, "cross_entropy", **options)[1])
    drawn, left = reports
    row, patches = drawn["token"], drawn["patches.weight"]
    assert row.note == "scaled to the inputs, the same for all samples, of a stream"
    assert row.scale == patches.scale  # of one stream
    assert row.std / row.scale == pytest.approx(0.2 * 0.5**0.5)
    # At zero, next to which the norm blows up every step, it makes the step much too sharp
    assert left.calibration.before.sharpness > 20 * drawn.calibration.before.sharpness


def test_a_token_that_is_not_zero_stays():
    model = hessinit.init_(Tokens(torch.full((1, 1, 32), 0.3)), numbers(8, 9, 16), seed=0)
    assert torch.equal(model.token, torch.full((1, 1, 32), 0.3))


def test_it_is_rescaled():
    model, y = nn.Sequential(linear(20, 30), nn.ReLU(), linear(30, 3)), torch.arange(64) % 3
    before = model[0].weight.detach().clone()
    _, report = hessinit.rescale_(model, (numbers(64, 20), y), "cross_entropy", lr=0.1, seed=0, return_report=True)
    assert report["0.weight"].scale != 1
    np.testing.assert_allclose(model[0].weight.detach(), before * report["0.weight"].scale, rtol=1e-5)


def test_it_is_inspected():
    model = nn.Sequential(linear(20, 30), nn.ReLU(), linear(30, 3))
    hessinit.init_(model, numbers(64, 20), seed=0)
    found = inspection.inspect(model, numbers(64, 20))
    assert [layer.name for layer in found.layers] == ["0.weight", "2.weight"]
    assert all(layer.std == pytest.approx(layer.closed_form, rel=1e-4) for layer in found.layers)
