"""``init_`` on PyTorch models."""

import copy
import csv
import itertools
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessinit
from hessinit import rules
from hessinit.networks import torch as adapter


def mlp(activation=nn.ReLU, widths=(20, 16, 12, 5)):
    modules = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), activation())]
    return nn.Sequential(*modules[:-1])


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Functional(nn.Module):
    """Everything that only a traced forward can see."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.fc1, self.fc2, self.out = nn.Linear(8 * 4 * 4, 30), nn.Linear(30, 30), nn.Linear(30, 4)
        self.swish, self.drop = Swish(), nn.Dropout(0.5)

    def forward(self, x):
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 1)
        x = torch.relu_(self.norm(self.conv2(x)))
        x = self.drop(self.swish(self.fc1(x.flatten(1))))
        x = F.leaky_relu(self.fc2(x), 0.2) + x
        return self.out(x)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_returns_the_model_with_every_weight_at_the_neutral_scale():
    net = mlp()
    returned, report = hessinit.init_(net, seed=0, return_report=True)
    assert returned is net
    for module in net:
        if isinstance(module, nn.Linear):
            std = rules.curvature_neutral_std(module.in_features, module.out_features, rules.gain("relu"))
            assert module.weight.square().mean().sqrt().item() == pytest.approx(std, rel=1e-5)
            assert (module.bias == 0).all()
    assert hessinit.init_(net, seed=0) is net
    assert [row.name for row in report] == list(dict(net.named_parameters()))
    assert all(row.touched for row in report)


@pytest.mark.parametrize("distribution", ["orthogonal", "normal", "truncated_normal", "uniform"])
def test_distributions_have_the_scale_asked_for(distribution):
    net = hessinit.init_(mlp(widths=(300, 200, 10)), distribution=distribution, seed=0)
    w = net[0].weight
    assert w.std().item() == pytest.approx(rules.curvature_neutral_std(300, 200, 0.5**0.5), rel=0.02)
    gram = w @ w.T / w.square().sum() * 200
    assert torch.allclose(gram, torch.eye(200), atol=1e-4) == (distribution == "orthogonal")


def test_activation_and_depth_come_from_module_order():
    net = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(6, 5), nn.Dropout(), Swish()),
        nn.Linear(5, 5),
        nn.PReLU(init=0.5),
        nn.Linear(5, 5),
        nn.Linear(5, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 3),
        nn.LogSoftmax(-1),
    )
    _, report = hessinit.init_(net, return_report=True)
    found = {row.name: (row.activation, row.depth) for row in report if row.role == "weight"}
    assert found == {
        "1.0.weight": ("Swish", 4),
        "2.weight": ("PReLU", 4),
        "4.weight": ("linear", 4),
        "5.weight": ("Tanh", 4),
        "8.weight": ("linear", 1),
    }
    assert report["1.0.weight"].gain == pytest.approx(rules.gain("silu", depth=4))
    assert report["2.weight"].gain ** 2 == pytest.approx((1 + 0.25) / 2)
    assert report["4.weight"].gain == pytest.approx(1)
    assert report["3.weight"].note == "left: no rule for it"  # PReLU's slope


def test_the_output_layer_shares_the_gain_of_its_chain():
    _, report = hessinit.init_(mlp(nn.Tanh), return_report=True)
    gains = {row.gain for row in report if row.role == "weight"}
    assert gains == {rules.gain("tanh", depth=3)}


def test_a_traced_forward_sees_functions_modules_norms_and_branches():
    net = Functional()
    _, report = hessinit.init_(net, torch.randn(7, 3, 14, 14), return_report=True)
    found = {row.name: (row.activation, row.depth) for row in report if row.role == "weight"}
    assert found == {
        "conv1.weight": ("tanh", 2),
        "conv2.weight": ("relu", 2),
        "fc1.weight": ("Swish", 3),
        "fc2.weight": ("leaky_relu", 3),
        "out.weight": ("leaky_relu", 3),
    }
    assert report["fc2.weight"].gain ** 2 == pytest.approx((1 + 0.2**2) / 2)
    assert (report["conv2.weight"].fan_in, report["conv2.weight"].fan_out) == (18, 18)
    assert report["conv1.weight"].fan_out == 8 * 9 / 4


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.swish, self.value, self.gate, self.squeeze = (nn.Linear(6, 6) for _ in range(4))
        self.gate_activation = nn.Sequential(nn.Sigmoid(), nn.Identity())
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        u = self.swish(x)
        u = torch.sigmoid(u) * u  # an activation written out
        u = self.value(u) * self.gate_activation(self.gate(u))  # a gated linear unit
        return self.out(torch.sigmoid(self.squeeze(u)))  # an activation


def test_products_are_told_from_activations():
    _, report = hessinit.init_(Gated(), torch.randn(3, 6), return_report=True)
    found = {row.name.split(".")[0]: row.activation for row in report if row.role == "weight"}
    assert found == {"swish": "product", "value": "linear", "gate": "gates", "squeeze": "sigmoid", "out": "sigmoid"}
    assert report["swish.weight"].gain == pytest.approx(rules.gain("silu", depth=4))
    assert report["gate.weight"].gain == pytest.approx(1)
    assert report["squeeze.weight"].gain == pytest.approx(rules.gain("sigmoid", depth=4))


def test_masks_shapes_and_noise_are_no_activations():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x.to(self.out.weight.dtype))
            x = torch.tanh(x * (torch.rand_like(x) > 0.3))  # dropout written out
            x = self.second(x)
            x = F.gelu(x * torch.rand_like(x) + x.new_ones(x.shape))
            return self.out(x.masked_fill(x > 3, 0.0))

    _, report = hessinit.init_(Masked(), torch.randn(5, 6), return_report=True)
    found = {row.name: (row.activation, row.depth) for row in report if row.role == "weight"}
    assert found == {"first.weight": ("tanh", 3), "second.weight": ("gelu", 3), "out.weight": ("gelu", 3)}


def test_without_inputs_the_default_nonlinearity_is_assumed_and_said():
    _, report = hessinit.init_(Functional(), nonlinearity="gelu", return_report=True)
    assert {row.activation for row in report if row.role == "weight"} == {"gelu (assumed)"}
    assert report["fc1.weight"].gain == rules.gain("gelu")
    for nonlinearity in (nn.GELU(), F.gelu, rules.ACTIVATIONS["gelu"]):
        _, report = hessinit.init_(Functional(), nonlinearity=nonlinearity, return_report=True)
        assert report["fc1.weight"].gain == pytest.approx(rules.gain("gelu"))


@pytest.mark.parametrize("scale", [0.1, 1.0, 255.0])
def test_known_inputs_are_brought_to_the_stated_variance(scale):
    torch.manual_seed(0)
    x = scale * torch.randn(500, 100)
    net = hessinit.init_(mlp(nn.Tanh, (100, 400, 400, 5)), x, seed=0)
    assert net[0](x).var().item() == pytest.approx(rules.INPUT_VARIANCE, rel=0.05)
    assert net[2].weight.std().item() == pytest.approx(
        rules.curvature_neutral_std(400, 400, rules.gain("tanh", depth=3)), rel=1e-2
    )


def test_zero_inputs_and_normalised_first_layers_keep_the_closed_form():
    plain = hessinit.init_(mlp(), seed=0)
    assert same(state(plain), state(hessinit.init_(mlp(), torch.zeros(3, 20), seed=0)))
    net = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    other = copy.deepcopy(net)
    x = 100 * torch.randn(8, 20)
    assert torch.equal(hessinit.init_(net, seed=0)[0].weight, hessinit.init_(other, x, seed=0)[0].weight)


def test_seed_generator_and_global_state():
    one = state(hessinit.init_(mlp(), seed=3))
    torch.manual_seed(99)
    assert same(one, state(hessinit.init_(mlp(), seed=3)))
    assert not same(one, state(hessinit.init_(mlp(), seed=4)))
    drawn = state(hessinit.init_(mlp(), generator=torch.Generator().manual_seed(1)))
    assert same(drawn, state(hessinit.init_(mlp(), generator=torch.Generator().manual_seed(1))))
    net = mlp()
    torch.manual_seed(5)
    five = state(hessinit.init_(net))
    torch.manual_seed(6)
    assert not same(five, state(hessinit.init_(net)))
    torch.manual_seed(5)
    assert same(five, state(hessinit.init_(net)))


def test_weights_of_a_layer_do_not_depend_on_the_others():
    big, small = mlp(widths=(20, 16, 12, 5)), mlp(widths=(20, 16, 5))
    assert torch.equal(hessinit.init_(big, seed=0)[0].weight, hessinit.init_(small, seed=0)[0].weight)
    assert torch.equal(hessinit.init_(mlp(), seed=0)[4].weight, hessinit.init_(mlp(), seed=0, exclude="0.*")[4].weight)


def test_equal_layers_get_different_weights():
    layer = nn.Linear(6, 6)
    net = hessinit.init_(nn.Sequential(*(copy.deepcopy(layer) for _ in range(3))), seed=0)
    assert not torch.equal(net[0].weight, net[1].weight)


def test_nothing_but_the_parameters_changes():
    net = Functional().train()
    net.norm.eval()
    net(torch.randn(4, 3, 14, 14)).sum().backward()
    net.fc1.weight.requires_grad_(False)
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    modes = [m.training for m in net.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    identities = [id(p) for p in net.parameters()]
    frozen = net.fc1.weight.clone()
    _, report = hessinit.init_(net, torch.randn(7, 3, 14, 14, generator=torch.Generator()), return_report=True)
    assert modes == [m.training for m in net.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    assert all(torch.equal(grads[n], p.grad) for n, p in net.named_parameters())
    assert all(torch.equal(buffers[n], b) for n, b in net.named_buffers())
    assert torch.equal(random[0], torch.get_rng_state())
    assert np.array_equal(random[1], np.random.get_state()[1])
    assert identities == [id(p) for p in net.parameters()]
    assert torch.equal(frozen, net.fc1.weight)
    assert report["fc1.weight"].note == "left: frozen"


def test_a_forward_that_writes_its_buffers_leaves_them_as_they_were():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.fc(x)

    net = hessinit.init_(Counts(), torch.randn(2, 3))
    assert net.calls == 0


def test_include_exclude_and_frozen():
    net = mlp()
    net[2].weight.requires_grad_(False)
    before = state(net)
    _, report = hessinit.init_(net, include=["2.*", "4.weight"], exclude="*.bias", seed=0, return_report=True)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"2.weight", "4.weight"}  # a frozen weight that include names is set
    assert not net[2].weight.requires_grad
    assert report["0.weight"].note == "left: not included"
    assert report["2.bias"].note == "left: excluded"


def test_tied_weights_are_set_once_and_stay_tied():
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    _, report = hessinit.init_(net, seed=0, return_report=True)
    assert net[2].weight is net[0].weight
    assert report["2.weight"].note == "tied to 0.weight"
    assert not report["2.weight"].touched


def test_embeddings_attention_and_recurrent_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16, padding_idx=3)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
            self.lstm = nn.LSTM(16, 8, num_layers=2, bidirectional=True)
            self.head = nn.Linear(16, 7)

        def forward(self, ids):
            return self.head(self.lstm(self.block(self.embed(ids)))[0])

    net = Net()
    _, report = hessinit.init_(net, torch.randint(0, 50, (4, 9)), seed=0, return_report=True)
    assert all(row.touched for row in report)
    assert (net.embed.weight[3] == 0).all()
    assert (report["embed.weight"].fan_in, report["embed.weight"].fan_out) == (1, 16)
    packed = report["block.self_attn.in_proj_weight"]
    assert (packed.fan_in, packed.fan_out, packed.activation) == (16, 16, "gates")
    assert report["block.linear1.weight"].activation == "gelu"
    gates = report["lstm.weight_ih_l0"]
    assert gates.gain == pytest.approx(1)
    assert (gates.shape, gates.fan_in, gates.fan_out) == ((32, 16), 16, 8)
    recurrent = net.lstm.weight_hh_l0.view(4, 8, 8)
    assert torch.allclose(recurrent @ recurrent.mT, torch.eye(8).expand(4, 8, 8), atol=1e-5)
    _, alone = hessinit.init_(net, seed=0, return_report=True)  # without a batch these layers tell by themselves
    weights = [row for row in report if row.role == "weight" and row.name != "head.weight"]
    assert len(weights) == 1 + 4 + 8
    assert [alone[row.name].activation for row in weights] == [row.activation for row in weights]
    weights = [row for row in weights if row.name != "embed.weight"]  # of which only a batch tells what it begins
    assert [alone[row.name].std for row in weights] == pytest.approx([row.std for row in weights])
    assert alone["head.weight"].activation == "relu (assumed)"


class Words(nn.Module):
    """An embedding that a recurrent layer takes, or an average, or an activation."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.embed = kind, nn.EmbeddingBag(50, 16) if kind == "bag" else nn.Embedding(50, 16)
        self.next = {"lstm": nn.LSTM(16, 8), "gru": nn.GRU(16, 8)}.get(kind, nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        if isinstance(self.next, nn.RNNBase):
            return self.head(self.next(x)[0])
        return self.head(torch.relu(self.next(x.mean(1) if self.kind == "mean" else x)))


@pytest.mark.parametrize("kind", ["lstm", "gru", "mean", "bag", "dense"])
def test_an_embedding_that_gates_take_is_as_large_as_a_first_layer_makes_its_outputs(kind):
    _, report = hessinit.init_(Words(kind), torch.randint(0, 50, (4, 9)), seed=0, return_report=True)
    gated = kind in ("lstm", "gru")
    expected = rules.INPUT_VARIANCE**0.5 if gated else rules.curvature_neutral_std(1, 16, 1.0)
    assert report["embed.weight"].std_drawn == pytest.approx(expected, rel=1e-5)
    assert (report["embed.weight"].note == "scaled to the inputs") == gated


class Residual(nn.Module):
    """A small GPT: one block of torch's, one written out, an output layer that may be tied to the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embed, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 20)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.block(self.embed(ids) + self.places(torch.arange(ids.shape[1])))
        h = self.norm(x)
        x = x + self.down(self.up(h) * torch.sigmoid(self.gate(h)))
        return self.head(self.last(x))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_write_to_one_residual_stream_share_a_scale(tied):
    ids = torch.randint(0, 20, (64, 6), generator=torch.Generator().manual_seed(0))
    net, report = hessinit.init_(Residual(tied), (ids, ids), "cross_entropy", lr=0.1, seed=0, return_report=True)
    stream = {row.name: row.scale for row in report if "of a stream" in row.note}
    writers = {
        "embed.weight",
        "places.weight",
        "block.self_attn.out_proj.weight",
        "block.linear2.weight",
        "down.weight",
    }
    assert set(stream) == writers - ({"embed.weight"} if tied else set())
    assert len(set(stream.values())) == 1
    embedding = rules.curvature_neutral_std(8, 20, 1.0) if tied else rules.INPUT_VARIANCE**0.5
    for name, part in ("embed.weight", 1), ("places.weight", rules.SAME):  # neither drowns the other
        assert report[name].std_drawn == pytest.approx(part * embedding, rel=1e-5)
    ends = "block.self_attn.out_proj.weight", "block.linear2.weight", "down.weight"
    for row in (report[name] for name in ends):
        whole = rules.curvature_neutral_std(row.fan_in, row.fan_out, row.gain)
        part = rules.beside_small_embedding(8, 20) if tied else 1
        assert row.std_drawn == pytest.approx(part * whole, rel=1e-5)
    others = [row.scale for row in report if row.name not in stream and not np.isnan(row.scale)]
    assert len(set(others)) == len(others) == 5
    assert net.down.weight.square().mean().sqrt().item() == pytest.approx(report["down.weight"].std)
    assert not any("branches" in row.note for row in report)  # a norm begins each, so that their sum grows slowly


class BeforeNorms(nn.Module):
    """Layers before norms: two as they are, one used twice, one bent first, one that something else takes too."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.twice, self.bent, self.open = (nn.Linear(8, 8) for _ in range(5))
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))
        self.batch = nn.BatchNorm1d(8)

    def forward(self, x):
        x = torch.relu(self.batch(self.one(x)))
        x = torch.relu(self.norms[0](self.two(x)))
        x = torch.relu(self.norms[1](self.twice(torch.relu(self.norms[2](self.twice(x))))))
        x = self.norms[3](torch.tanh(self.bent(x)))
        u = self.open(x)
        return self.head(self.norms[5](self.lstm((torch.relu(self.norms[4](u)) * u)[:, None])[0][:, 0]))


def test_weights_whose_scale_norms_take_out_share_one():
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    net = BeforeNorms()
    followers = adapter.TorchNetwork(net).followers(x)
    expected = {"one.weight", "two.weight", "twice.weight"}
    assert {name for name, f in followers.items() if f.scale_invariant} == expected
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    _, report = hessinit.init_(net, (x, y), "cross_entropy", optimizer=optimizer, seed=0, return_report=True)
    shared = {row.name: row.scale for row in report if "before a norm" in row.note}
    assert len(set(shared.values())) == 1
    assert set(shared) == expected
    assert shared["one.weight"] < 1
    others = [row.scale for row in report if row.name not in shared and not np.isnan(row.scale)]
    assert len(set(others)) == len(others)


def test_nothing_shares_a_scale_where_norms_or_no_sums_follow():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.three, self.head, self.wide = nn.Linear(8, 8), nn.Linear(16, 3), nn.Linear(6, 3)

        def forward(self, data):
            x = torch.relu(self.norm(self.one(data)) + 1)
            x = x + torch.relu(self.norm(self.two(x)))
            return self.head(torch.cat([x, self.three(x) * 2], 1)) + self.wide(data)

    followers = adapter.TorchNetwork(Net()).followers(torch.randn(4, 6))
    assert len(followers) == 5
    assert {(follower.stream, follower.branches) for follower in followers.values()} == {(None, 1)}


def test_branches_side_by_side_and_shared_ones_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.skip, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.embed(x)
            x = x + torch.tanh(self.one(x)) + self.two(x)
            for _ in range(2):
                x = x - self.two(x)
            return self.head(self.skip(x) + x.relu())

    found = adapter.TorchNetwork(Net()).followers(torch.randn(4, 6))
    assert {name.split(".")[0]: follower.branches for name, follower in found.items()} == {
        **{"embed": 1, "one": 5, "two": 5},
        **{"skip": 5, "head": 1},
    }
    assert [found[f"{name}.weight"].stream for name in ("embed", "one", "two", "skip")] == [None, 0, 0, 0]


def test_a_shortcut_beside_a_batch_norm_gets_a_quarter_of_the_closed_form():
    class Block(nn.Module):
        def __init__(self, norm, shortcut):
            super().__init__()
            self.one, self.two, self.skip = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), shortcut()
            self.first, self.second = norm(), norm()

        def forward(self, x):
            return torch.relu(self.second(self.two(torch.relu(self.first(self.one(x))))) + self.skip(x))

    def conv():
        return nn.Conv2d(4, 8, 1, 2)

    def stds(norm, shortcut=conv, block=Block):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block(norm, shortcut), nn.Flatten(), nn.Linear(128, 2)
        )
        _, report = hessinit.init_(net, torch.randn(4, 3, 10, 10), return_report=True)
        return {row.name: row.std for row in report if "beside a norm" in row.note}, report

    beside, report = stds(lambda: nn.BatchNorm2d(8))
    assert beside == {
        "2.skip.weight": rules.BESIDE_NORM * rules.curvature_neutral_std(4, 2, report["2.skip.weight"].gain)
    }
    assert report["2.skip.weight"].std_drawn == pytest.approx(beside["2.skip.weight"], rel=1e-5)
    assert stds(lambda: nn.GroupNorm(2, 8))[0] == {}
    assert stds(lambda: nn.BatchNorm2d(8), lambda: nn.Sequential(conv(), nn.BatchNorm2d(8)))[0] == {}

    class Behind(Block):
        """The branch without a norm comes through the one with it."""

        def forward(self, x):
            x = self.first(self.one(x))
            return x + self.two(torch.relu(x))

    class Itself(Block):
        """A batch norm is added to what it takes."""

        def forward(self, x):
            x = self.one(x)
            return x + self.first(x)

    for block in Behind, Itself:
        assert stds(lambda: nn.BatchNorm2d(8), block=block)[0] == {}


@pytest.mark.parametrize("output", [lambda x, w: x @ w.T, F.linear])
def test_an_embedding_that_the_forward_takes_for_its_output_layer_is_drawn_as_one(output):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.places, self.norm = nn.Embedding(20, 8), nn.Embedding(6, 8), nn.LayerNorm(8)

        def forward(self, ids):
            x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
            return output(self.norm(x), self.embed.weight)

    _, report = hessinit.init_(Net(), torch.randint(0, 20, (4, 6)), seed=0, return_report=True)
    for name, part in ("embed.weight", 1), ("places.weight", rules.SAME):
        assert "drawn for the output layer" in report[name].note
        assert report[name].std_drawn == pytest.approx(part * rules.curvature_neutral_std(8, 20, 1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("indices", "same"),
    [
        (lambda ids: torch.arange(6), True),
        (lambda ids: torch.arange(6)[None], True),
        (lambda ids: torch.zeros_like(ids), True),
        (lambda ids: torch.arange(6).expand_as(ids), True),
        (lambda ids: ids // 2, False),
        (lambda ids: ids[:, :1], False),
    ],
)
def test_an_embedding_of_what_is_the_same_for_every_sample_begins_small(indices, same):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.other, self.norm = nn.Embedding(20, 8), nn.Embedding(20, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids):
            return self.head(self.norm(self.embed(ids) + self.other(indices(ids))))

    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    _, report = hessinit.init_(Net(), ids, seed=0, return_report=True)
    assert report["embed.weight"].std == rules.INPUT_VARIANCE**0.5
    assert report["other.weight"].std == rules.INPUT_VARIANCE**0.5 * (rules.SAME if same else 1)
    _, one = hessinit.init_(Net(), ids[:1], seed=0, return_report=True)
    assert one["embed.weight"].std == rules.INPUT_VARIANCE**0.5  # of one sample all are the same


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_branches_of_a_post_norm_transformer_begin_at_a_quarter_and_stay(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = nn.Sequential(nn.Embedding(20, 8), encoder, nn.Linear(8, 20))
    ids = torch.randint(0, 20, (64, 6), generator=torch.Generator().manual_seed(0))
    _, report = hessinit.init_(net, (ids, ids), "cross_entropy", lr=0.1, seed=0, return_report=True)
    beside = {row.name for row in report if "beside a norm" in row.note}
    first, second = "1.layers.0.linear2.weight", ("1.layers.1.linear2.weight", "1.layers.1.self_attn.out_proj.weight")
    assert beside == (set() if norm_first else {first, *second})  # the first attention's joins no norm's output
    for name in beside:
        gain = report[name].gain
        fans = report[name].fan_in, report[name].fan_out
        assert report[name].std == rules.BESIDE_NORM * rules.curvature_neutral_std(*fans, gain)
        assert np.isnan(report[name].scale)
    _, alone = hessinit.init_(net, seed=0, return_report=True)
    assert ("beside a norm" in alone[first].note) != norm_first


class _Scaled(nn.Module):
    """A module of the user's own with a scale for each of eight features."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x):
        return (self.weight * self.function(x.to(torch.float32))).to(x.dtype)


def _centred(x):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize(
    ("function", "is_norm"),
    [
        (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), True),
        (lambda x: x / x.norm(dim=-1, keepdim=True), True),
        (_centred, True),
        (lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)), False),
        (lambda x: torch.softmax(x, -1), False),
        (lambda x: x - x.mean(-1, keepdim=True), False),
        (lambda x: 0 * x + 1, False),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-4])  # of signals, far below ε
def test_a_norm_of_the_users_own_is_one(function, is_norm, size):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 8), _Scaled(function), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(torch.relu(self.norm(self.one(x))))

    found = adapter.TorchNetwork(Net()).followers(size * torch.randn(4, 6))
    assert found["one.weight"].normed == is_norm
    assert found["two.weight"].depth == (1 if is_norm else 2)
    if is_norm:
        assert found["one.weight"].name == "relu"


class _Moved(nn.Module):
    """Takes the last axis to be the channels."""

    def forward(self, x):
        return x.movedim(1, -1)


@pytest.mark.parametrize(
    ("first", "is_blank"),
    [
        ([nn.Linear(32, 8), nn.LayerNorm(8)], True),
        ([nn.Linear(32, 8), _Scaled(_centred)], True),
        ([nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8), nn.RMSNorm(8)], True),
        ([nn.Linear(32, 8), nn.ReLU()], False),
        ([nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)], False),
        ([nn.Conv1d(6, 8, 1), nn.GroupNorm(2, 8)], False),
        ([nn.Conv1d(6, 8, 2, 2), _Moved(), nn.LayerNorm(8)], True),
        ([nn.Conv1d(6, 8, 20), _Moved(), nn.LayerNorm(8)], False),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_biases_keep_zeros_from_a_norm(first, is_blank, zeros):
    x = 3 * torch.randn(64, 6, 32, generator=torch.Generator().manual_seed(0))
    if zeros:
        x[:, 4:], x[..., 16:] = 0, 0
    net = nn.Sequential(*copy.deepcopy(first), nn.Flatten(), nn.LazyLinear(3))
    data = x, torch.arange(64) % 3
    _, report = hessinit.init_(net, data, "cross_entropy", lr=0.1, seed=0, return_report=True)
    expected = is_blank and zeros
    assert (report["0.bias"].std_drawn > 0) == expected
    if expected:
        rms = x.square().mean().sqrt().item()
        assert report["0.bias"].std == pytest.approx(report["0.weight"].std * rms, rel=1e-5)
        assert report["0.bias"].scale == report["0.weight"].scale
    assert not any("zeros" in line for line in report.warnings)
    assert not hessinit.init_(net, x, seed=0)[0].bias.any()  # the closed form alone


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.T,
        lambda x, w: x @ w.t().contiguous(),
        lambda x, w: F.linear(x, w.to(torch.float32) * 0.5),
        lambda x, w: torch.einsum("ni,ioh->noh", x, w.view(2, 3, 6).permute(2, 0, 1)).flatten(1),
    ],
)
def test_a_weight_that_is_turned_or_scaled_before_it_is_used_is_followed(product):
    class Own(nn.Linear):
        def forward(self, x):
            return product(x, self.weight)

    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Own(6, 6), nn.Tanh(), nn.Linear(6, 2))
    found = adapter.TorchNetwork(net).followers(torch.randn(4, 5))
    assert [(f.name, f.depth) for f in found.values()] == [("ReLU", 3), ("Tanh", 3), ("Tanh", 3)]


def test_lazy_meta_and_quantised_parameters_are_reported():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    _, report = hessinit.init_(lazy, return_report=True)
    assert all("not materialised" in row.note for row in report)
    _, report = hessinit.init_(lazy, torch.randn(3, 5), return_report=True)
    assert all(row.touched for row in report)
    assert report["0.weight"].shape == (4, 5)
    with torch.device("meta"):
        meta = mlp()
    _, report = hessinit.init_(meta, return_report=True)
    assert all(row.note == "left: on the meta device" for row in report)
    real = meta.to_empty(device="cpu")
    assert all(row.touched for row in hessinit.init_(real, return_report=True)[1])


def test_complex_weights_are_refused_unless_left():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, dtype=torch.complex64))
    before = state(net)
    with pytest.raises(TypeError, match="init_: model must have real parameters; got '1.weight' of complex64 in 1"):
        hessinit.init_(net)
    assert same(before, state(net))
    _, report = hessinit.init_(net, exclude="1.*", return_report=True)
    assert [row.touched for row in report] == [True, True, False, False]


def test_an_activation_without_a_gain_is_named_with_its_layer():
    class Steps(nn.Module):
        def forward(self, x):
            return torch.sign(x)

    net = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), steps=Steps(), out=nn.Linear(4, 2)))
    before = state(net)
    with pytest.raises(ValueError, match="init_: fc is followed by Steps, which has no gain"):
        hessinit.init_(net)
    assert same(before, state(net))


def test_a_weight_of_two_roles_has_the_scale_of_the_smaller():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(1000, 32), nn.LayerNorm(32)
            self.head = nn.Linear(32, 1000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.norm(self.embed(ids)))

    net, ids = Language(), torch.randint(0, 1000, (8, 20), generator=torch.Generator().manual_seed(0))
    for batch in (None, ids):
        _, report = hessinit.init_(net, batch, seed=0, return_report=True)
        assert report["embed.weight"].note == "drawn for head.weight"
        assert net.head.weight is net.embed.weight
        loss = F.cross_entropy(net(ids).flatten(0, 1), ids.roll(1).flatten()).item()
        assert loss == pytest.approx(math.log(1000), rel=0.1)


def test_what_a_checkpoint_brought_is_left():
    """As Hugging Face's ``from_pretrained`` marks it."""
    net = mlp()
    for parameter in net[0].parameters():
        parameter._is_hf_initialized = True
    before = state(net)
    _, report = hessinit.init_(net, return_report=True)
    assert report["0.weight"].note == "left: loaded from a checkpoint"
    assert torch.equal(net[0].weight, before["0.weight"])
    assert report["2.weight"].touched
    assert hessinit.init_(net, include="*", return_report=True)[1]["0.weight"].touched


def test_packed_projections_are_drawn_apart_whatever_layer_packs_them():
    class Conv1D(nn.Module):  # of GPT-2: (inputs, outputs)
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(inputs, outputs)), nn.Parameter(torch.ones(outputs))

    Conv1D.__module__ = "transformers.pytorch_utils"
    net = nn.ModuleDict(
        {"qkv": nn.Linear(8, 24), "c_attn": Conv1D(8, 24), "c_fc": Conv1D(8, 32), "fc": nn.Linear(8, 24)}
    )
    _, report = hessinit.init_(net, seed=0, return_report=True)
    fans = {row.name: (row.fan_in, row.fan_out) for row in report if row.role == "weight"}
    assert fans == {"qkv.weight": (8, 8), "c_attn.weight": (8, 8), "c_fc.weight": (8, 32), "fc.weight": (8, 24)}
    for query in (net["qkv"].weight[:8], net["c_attn"].weight.T[:8]):
        assert torch.allclose(query @ query.T, query.square().sum() / 8 * torch.eye(8), atol=1e-5)
    assert report["c_fc.bias"].note == "set to 0"


def test_a_forward_of_ones_own_shows_what_follows():
    net = Functional()
    batch = {"image": torch.randn(32, 3, 14, 14, generator=torch.Generator().manual_seed(0)), "y": torch.arange(32) % 4}
    _, report = hessinit.init_(
        net, batch, "cross_entropy", lr=0.1, forward=lambda m, b: (m(b["image"]), b["y"]), return_report=True
    )
    assert report["fc2.weight"].activation == "leaky_relu"


def test_buffers_are_named():
    _, report = hessinit.init_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), return_report=True)
    assert report.buffers == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert str(report).splitlines()[-1] == "3 buffers left as they are: " + ", ".join(report.buffers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    net = hessinit.init_(mlp().to(dtype), torch.randn(4, 20, dtype=dtype), seed=0)
    single = hessinit.init_(mlp(), torch.randn(4, 20), seed=0)
    assert net[2].weight.dtype == dtype
    if dtype != torch.float64:
        assert torch.equal(net[2].weight, single[2].weight.to(dtype))


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        raise RuntimeError("no such thing\nsecond line")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hessinit.init_(3), TypeError, "model must be a torch.nn.Module or a keras.Model; got int"),
        (lambda: hessinit.init_(mlp(), distribution="cauchy"), ValueError, "distribution must be one of"),
        (lambda: hessinit.init_(mlp(), nonlinearity="swosh"), ValueError, "got 'swosh'"),
        (lambda: hessinit.init_(mlp(), include="nope*"), ValueError, "include must match a parameter; 'nope.*0.weight"),
        (lambda: hessinit.init_(mlp(), exclude=[3]), TypeError, "exclude must be name globs; got 3"),
        (lambda: hessinit.init_(mlp(), seed=0.5), TypeError, "seed must be an integer or None; got 0.5"),
        (lambda: hessinit.init_(mlp(), seed=0, generator=torch.Generator()), ValueError, "must not both be given"),
        (lambda: hessinit.init_(mlp(), generator=3), TypeError, "generator must be a torch.Generator or None; got 3"),
        (lambda: hessinit.init_(mlp(), torch.full((2, 20), math.nan)), ValueError, "batch must be finite"),
        (lambda: hessinit.init_(mlp(), torch.zeros(2, 7)), ValueError, "batch must be inputs that the model accepts"),
        (lambda: hessinit.init_(Stubborn(), torch.zeros(2, 3)), ValueError, r"RuntimeError: no such thing\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message):
    with pytest.raises(error, match=f"^(init_|gain): .*{message}"):
        call()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_an_error_or_interruption_restores_every_tensor(monkeypatch, error, at):
    net = mlp()
    before = state(net)
    write, writes = adapter.TorchNetwork.write, []

    def failing(self, name, values):
        writes.append(name)
        if len(writes) > at:
            write(self, name, values * math.nan)  # half-written, then
            raise error("stop")
        write(self, name, values)

    monkeypatch.setattr(adapter.TorchNetwork, "write", failing)
    with pytest.raises(error):
        hessinit.init_(net, seed=0)
    assert len(writes) == at + 1
    assert same(before, state(net))


def test_the_bias_of_forget_gates_is_an_option():
    for net, count in (nn.LSTM(3, 4, num_layers=2, bidirectional=True), 4), (nn.LSTMCell(3, 4), 1):
        _, report = hessinit.init_(net, seed=0, forget_bias=1.5, return_report=True)
        assert sum(row.note == "set to 0, forget gate 1.5" for row in report) == count
        for name, bias in net.named_parameters():
            if "bias" in name:
                expected = torch.zeros(16)
                expected[4:8] = 1.5 if "bias_ih" in name else 0.0
                assert torch.equal(bias, expected)
        hessinit.init_(net, seed=0)
        assert all(not bias.any() for name, bias in net.named_parameters() if "bias" in name)
    with pytest.raises(ValueError, match="forget_bias must be a finite number or None; got nan"):
        hessinit.init_(nn.LSTM(3, 4), forget_bias=math.nan)


class Blocks(nn.Module):
    """Residual blocks without norms."""

    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(count)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Pooled(nn.Module):
    """Three convolutions with something done to the units of the first two."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        h = self.one(torch.tanh(self.a(x)))
        return self.c(self.two(torch.tanh(self.b(h)), h)).mean((2, 3))


def in_neutral_variances(report):
    """Of each weight but the first: its variance over that of the rule without pooling."""
    rows = [row for row in report if row.role == "weight"][1:]
    return [row.std**2 / rules.curvature_neutral_std(row.fan_in, row.fan_out, row.gain) ** 2 for row in rows]


@pytest.mark.parametrize(
    ("two", "first", "second"),
    [
        (lambda u, h: F.avg_pool2d(u, 2), 9, 4),
        (lambda u, h: F.avg_pool2d(u, kernel_size=(2, 1)), 9, 2),
        (lambda u, h: F.avg_pool2d(F.avg_pool2d(F.dropout(u, 0.0), 2), 2, 1), 9, 16),
        (lambda u, h: F.avg_pool2d(F.max_pool2d(u, 2), [2], 1), 9, 4),
        (lambda u, h: F.max_pool2d(u, 2), 9, 1),
        (lambda u, h: F.avg_pool2d(u, 6), 9, 1),  # of all positions
        (lambda u, h: F.avg_pool2d(u + h, 2), 1, 1),
        (lambda u, h: F.avg_pool2d(u, 2) + h[:, :, ::2, ::2], 1, 1),
    ],
    ids=["kernel", "axes", "twice", "list", "max", "whole map", "sum before", "sum after"],
)
def test_before_an_average_weights_have_as_many_times_the_variance(two, first, second):
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for one, factor in ((lambda u: u, 1), (lambda u: F.avg_pool2d(u, 3, 1, 1), first)):
        _, report = hessinit.init_(Pooled(one, two), x, seed=0, return_report=True)
        assert in_neutral_variances(report) == pytest.approx([second, 1])
        assert report["a.weight"].std == pytest.approx(rules.input_layer_std(18, float(x.square().mean()), factor))


def test_average_poolings_count_in_module_order_too():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d((2, 1)), nn.Conv2d(3, 4, 3), nn.AvgPool2d(2))
    net = nn.Sequential(net, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    _, report = hessinit.init_(net, return_report=True)
    assert in_neutral_variances(report) == pytest.approx([4, 1, 1])
    assert "for a mean of 2" in report["0.0.weight"].note
    assert "mean" not in report["4.weight"].note
    for kernel, factor in ((2, 2), (3, 3), (4, 1)):  # the last may well be of all positions
        one = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.AvgPool1d(kernel), nn.Conv1d(3, 2, 1))
        _, report = hessinit.init_(one, return_report=True)
        assert report["0.weight"].std == pytest.approx(rules.curvature_neutral_std(6, 9, 0.5**0.5, factor))


@pytest.mark.parametrize("traced", [False, True])
def test_residual_branches_keep_the_signal_of_fifty_blocks(traced):
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))

    def growth(**options):
        net, report = hessinit.init_(Blocks(50), x if traced else None, seed=0, return_report=True, **options)
        return (net(x).std() / x.std()).item(), report

    kept, report = growth(residual_branches="blocks.*.2.weight")
    assert 0.7 < kept < 3
    assert sum(row.note.endswith("one of 50 branches") for row in report) == 50
    assert growth(residual_branches=[])[0] > 1e4
    kept, report = growth()  # branches that a trace sees; the first is added to the data itself
    assert 0.7 < kept < 4 if traced else kept > 1e4
    assert sum(row.note.endswith("one of 49 branches") for row in report) == 49 * traced
    with pytest.raises(ValueError, match="residual_branches must match a parameter; 'nothing' matches none"):
        hessinit.init_(Blocks(1), residual_branches="nothing")


def test_the_report_prints_and_saves_every_row(tmp_path):
    net = mlp()
    _, report = hessinit.init_(net, seed=7, return_report=True)
    text = str(report)
    assert text.splitlines()[-1] == "6 of 6 parameters set; distribution orthogonal, seed 7"
    assert all(name in text for name, _ in net.named_parameters())
    report.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row.name for row in report]
    assert float(rows[0]["std"]) == report["0.weight"].std
    with pytest.raises(KeyError):
        report["nope"]
    assert len(report) == 6


def test_one_call_makes_a_deep_net_trainable_in_one_line():
    """A 20-layer tanh net: the signal and its slope keep their size, where torch's default loses both."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    grads = []
    for initialise in (hessinit.init_, lambda net: net):
        net = initialise(mlp(nn.Tanh, (128,) * 21))
        net(x).square().mean().backward()
        grads.append(net[0].weight.grad.norm().item())
    assert grads[0] > 1e3 * grads[1]
