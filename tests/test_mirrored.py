"""Units in pairs of opposite weights: where they are, and what they make of a net."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessinit
from hessinit import rules

GENERATOR = torch.Generator().manual_seed(0)
ROWS, IMAGES = torch.randn(16, 6, generator=GENERATOR), torch.randn(16, 2, 8, 8, generator=GENERATOR)


def mirrored(net, x, **options):
    """The names of the weights that say so."""
    _, report = hessinit.init_(net, x, seed=0, mirrored=True, return_report=True, **options)
    return {row.name for row in report if "mirrored" in row.note}


def from_linear(net, x):
    """How far a net is from a linear one, over its own size."""
    with torch.no_grad():
        return float((net(2 * x) - 2 * net(x) + net(0 * x)).norm() / net(x).norm())


class Function(nn.Module):
    """Three layers with something done to the units of the first."""

    def __init__(self, between, sizes=(6, 10, 10, 4)):
        super().__init__()
        self.between = between
        self.a, self.b, self.c = (nn.Linear(n, m) for n, m in pairwise(sizes))

    def forward(self, x):
        return self.c(F.relu(self.b(self.between(self, self.a(x)))))


PLAIN = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 3))
IMAGE = nn.Sequential(
    nn.Conv2d(2, 6, 3),
    nn.LeakyReLU(0.2),
    nn.AvgPool2d(2),
    nn.Conv2d(6, 4, 2),
    nn.SiLU(),
    nn.Flatten(),
    nn.Linear(16, 3),
)
NORMED = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 3))


@pytest.mark.parametrize(("net", "x"), [(PLAIN, ROWS), (IMAGE, IMAGES)])
def test_a_net_begins_as_a_linear_one(net, x):
    net = copy.deepcopy(net)
    weights = {name for name, parameter in net.named_parameters() if parameter.ndim > 1}
    assert mirrored(net, x) == weights
    assert from_linear(net, x) < 1e-5
    assert mirrored(net, x, exclude="*.bias") == weights
    hessinit.init_(net, x, seed=0)
    assert from_linear(net, x) > 0.05


def test_weights_have_the_scale_of_the_pair_and_their_law():
    net = copy.deepcopy(PLAIN)
    _, report = hessinit.init_(net, seed=0, mirrored=True, return_report=True)
    assert not [row for row in report if "mirrored" in row.note]  # nothing has gone through the net
    _, report = hessinit.init_(net, ROWS, seed=0, mirrored=True, return_report=True)
    for row in report:
        if row.role == "weight":
            assert row.std_drawn == pytest.approx(row.std, rel=1e-5)
            assert row.gain == pytest.approx(rules.pair_gain("gelu"))
    u = net[2].weight[:4, :5]
    assert torch.equal(net[2].weight, torch.cat([torch.cat([u, -u], 1), torch.cat([-u, u], 1)]))
    assert torch.allclose(u @ u.T, u.square().sum() / 4 * torch.eye(4), atol=1e-5)


def test_a_norm_before_the_activation_keeps_pairs():
    assert mirrored(copy.deepcopy(NORMED), ROWS) == {"0.weight", "4.weight"}


@pytest.mark.parametrize(
    "between",
    [
        lambda net, u: torch.tanh(u),
        lambda net, u: F.relu(u) + u,
        lambda net, u: F.relu(u) + net.c.bias.sum(),
        lambda net, u: F.relu(u).flip(-1),
        lambda net, u: F.relu(u)[:, torch.randperm(10)],
        lambda net, u: F.relu(u.view(-1, 2, 5).transpose(1, 2).reshape(-1, 10)),
        lambda net, u: F.layer_norm(F.relu(u), (10,)),
        lambda net, u: F.relu(F.relu(u) @ net.b.weight),
        lambda net, u: torch.cat([F.relu(u[:, :5]), u[:, 5:]], 1),
    ],
    ids=["odd", "skip", "sum", "flip", "permuted", "transposed", "normed after", "taken twice", "split"],
)
def test_units_that_go_elsewhere_or_lose_their_order_are_no_pairs(between):
    assert mirrored(Function(between), ROWS) - {"c.weight", "b.weight"} == set()


def test_both_sides_of_a_pair_must_be_ours_to_draw():
    relu = Function(lambda net, u: F.relu(u))
    assert mirrored(relu, ROWS) == {"a.weight", "b.weight", "c.weight"}
    assert mirrored(relu, ROWS, exclude="b.weight") == set()
    assert mirrored(relu, ROWS, exclude="a.weight") == {"b.weight", "c.weight"}
    relu.b.weight.requires_grad_(False)
    assert mirrored(relu, ROWS) == set()
    assert mirrored(Function(lambda net, u: F.relu(u), (6, 9, 10, 4)), ROWS) == {"b.weight", "c.weight"}  # odd


def test_grouped_shared_and_tied_layers_have_no_pairs():
    grouped = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    assert mirrored(grouped, IMAGES) == set()
    layer = nn.Linear(6, 6)
    assert mirrored(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 2)), ROWS) == set()


def test_the_budget_has_them_but_for_the_features_of_the_output_layer():
    y = torch.arange(16) % 3
    for asked, expected in ((None, 2), (True, 3), (False, 0)):
        _, report = hessinit.init_(
            copy.deepcopy(PLAIN), (ROWS, y), "cross_entropy", lr=0.1, mirrored=asked, return_report=True
        )
        assert sum("mirrored" in row.note for row in report) == expected


class Block(nn.Module):
    """A residual branch, a norm, and outputs of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)
        self.c, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.c(self.norm(x + self.b(F.relu(self.a(x))))))
        return self.one(h) + self.two(h)


def test_what_a_branch_takes_is_no_feature_and_what_any_output_layer_takes_is():
    y = torch.arange(16) % 3
    _, report = hessinit.init_(Block(), (ROWS, y), "cross_entropy", lr=0.1, return_report=True)
    assert {row.name for row in report if "mirrored" in row.note} == {"a.weight", "b.weight"}
    assert mirrored(Block(), ROWS) == {"a.weight", "b.weight", "c.weight", "one.weight", "two.weight"}
    end = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3), nn.Softmax(-1))
    _, report = hessinit.init_(end, (ROWS, torch.rand(16, 3)), "mse", lr=0.1, return_report=True)
    assert not [row for row in report if "mirrored" in row.note]


def test_they_train_plain_nets_of_thirty_relu_layers():
    """Where weights without pairs have hardly left chance."""
    x = torch.randn(512, 120, generator=torch.Generator().manual_seed(1))
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    final = []
    for pairs in (None, False):
        hidden = (m for k in range(29) for m in (nn.Linear(64 if k else 120, 64), nn.ReLU()))
        net = nn.Sequential(*hidden, nn.Linear(64, 4))
        hessinit.init_(net, (x, y), "cross_entropy", lr=0.03, seed=0, mirrored=pairs)
        optimizer = torch.optim.SGD(net.parameters(), 0.03)
        for step in range(200):
            rows = torch.arange(64) + 64 * (step % 8)
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        final.append(F.cross_entropy(net(x), y).item())
    assert final[0] < 0.02 < 0.2 < final[1]
