"""The methods of others: what the paper of each states, on nets where a simpler rule would not have it."""

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from hessinit import curvature
from hessinit.experiments import baselines, data, learned, models, plots, rivals, sweep, training
from hessinit.experiments.baselines import INITIALIZERS

WHOLE = data.load("fashion_mnist_mini")
FEW = replace(WHOLE, x_train=WHOLE.x_train[:256], y_train=WHOLE.y_train[:256], x_test=WHOLE.x_test[:50])
FEW = replace(FEW, y_test=FEW.y_test[:50])
X, Y = torch.from_numpy(FEW.x_train), torch.from_numpy(FEW.y_train)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def drawn(problem, initializer="he_normal", activation="relu", seed=0):
    return training.torch_net(problem, FEW, initializer, activation, seed)


def outputs_of_layers(net, x):
    """By name, of linear and convolutional layers, and of attention its projections and its output."""
    found = {}

    def keep(name):
        def hook(module, args, out):
            if isinstance(module, nn.MultiheadAttention):
                thirds = zip("qkv", args, module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=False)
                found.update({f"{name}.{part}": linear(a, w, b) for part, a, w, b in thirds})
                out = out[0]
            found[name] = out

        return hook

    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        net(x)
    return found


def residual_net(depth, width=8):
    """Blocks of torch_resnet, all of one width."""
    block = type(models.torch_resnet(4, norm=False).stage1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(*(block(width, width) for _ in range(depth)), nn.Flatten(), nn.Linear(16 * width, 10))
    baselines._he(net, "relu", generator())
    return net


def transformer(depth=3, width=16):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        block = [
            nn.TransformerEncoderLayer(width, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        net = nn.Sequential(*block, nn.Flatten(), nn.Linear(6 * width, 10))
    baselines._he(net, "gelu", generator())
    return net


@pytest.mark.parametrize(("problem", "scale"), [("mlp6", 1), ("mlp6", 7), ("lenet", 7), ("resnet", 7), ("vit", 7)])
def test_lsuv_gives_every_layer_unit_variance_the_first_included(problem, scale):
    net, x = drawn(problem, "lsuv", models.PROBLEMS[problem].activations[-1]), scale / X.std() * X[:64]
    rivals.lsuv_(net, x)
    variances = [float(out.var(correction=0)) for out in outputs_of_layers(net, x).values()]
    assert len(variances) == {"mlp6": 6, "lenet": 5, "resnet": 10, "vit": 1 + 3 * 6 + 1}[problem]
    assert variances == [pytest.approx(1, abs=0.1)] * len(variances)


def test_lsuv_leaves_a_layer_without_variance_and_those_behind_it():
    net = drawn("mlp6", "lsuv")
    before = [p.clone() for p in net.parameters()]
    rivals.lsuv_(net, torch.zeros_like(X))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    with torch.no_grad():
        net[4].weight.zero_()
    rivals.lsuv_(net, X)
    assert float(net[:3](X).detach().var(correction=0)) == pytest.approx(1, abs=1e-3)
    assert all(torch.equal(net[k].weight, before[k]) for k in (6, 8, 10))


def test_the_lsuv_package_gives_unit_variance_too_and_leaves_the_random_state():
    pytest.importorskip("lsuv")
    net = drawn("mlp6", "lsuv_package")
    state = torch.get_rng_state()
    rivals.lsuv_package_(net, X, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    variances = [float(out.var()) for out in outputs_of_layers(net, X).values()]
    assert variances == [pytest.approx(1, abs=0.21)] * 6  # its tolerance is of the deviation
    again = drawn("mlp6", "lsuv_package")
    rivals.lsuv_package_(again, X, seed=0)
    assert torch.equal(net[0].weight, again[0].weight)
    rivals.lsuv_package_(again, torch.zeros_like(X), seed=0)
    assert not again[0].weight.abs().max() < 1e6  # why there is ours


def test_without_the_lsuv_package_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lsuv", None)
    with pytest.raises(ImportError, match="the package lsuv must be installed. Run pip install lsuv."):
        rivals.lsuv_package_(drawn("mlp"), X, seed=0)


def after_a_step(net, x, y, lr, adam):
    """Loss, and norm of the gradient before."""
    gradient = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    moved = {
        name: p - lr * (g.sign() if adam else g) for (name, p), g in zip(net.named_parameters(), gradient, strict=True)
    }
    norm = torch.cat([g.flatten() for g in gradient]).norm(1 if adam else 2)
    with torch.no_grad():
        return float(cross_entropy(torch.func.functional_call(net, moved, (x,)), y)), norm.item()


@pytest.mark.parametrize(("adam", "lr"), [(False, 0.1), (True, 1e-3)])
def test_gradinit_lowers_the_loss_after_a_step_within_its_bound(adam, lr):
    """Of a bound that the net does not keep at first, and that binds: without it the norm would grow."""
    x, y = 3 * X[:128], Y[:128]
    net = drawn("mlp")
    before, norm = after_a_step(net, x, y, lr, adam)
    gamma, options = 0.95 * norm, {"adam": adam, "steps": 50, "scale_lr": 0.02}
    start = [p.detach().clone() for p in net.parameters() if p.ndim > 1]
    learned.gradinit_(net, x, y, cross_entropy, lr=lr, gamma=gamma, generator=generator(), **options)
    after, norm = after_a_step(net, x, y, lr, adam)
    assert after < 0.92 * before
    assert norm <= gamma * (1 + 1e-5)
    for weight, one in zip([p for p in net.parameters() if p.ndim > 1], start, strict=True):
        scale = ((weight * one).sum() / one.square().sum()).item()
        assert torch.allclose(weight, scale * one, atol=1e-6)  # one number a tensor
        assert scale >= 0.01 - 1e-6


@pytest.mark.parametrize(("adam", "lr"), [(False, 0.1), (True, 1e-3)])
def test_gradinit_lowers_a_norm_above_its_bound_even_at_the_cost_of_loss(adam, lr):
    """Of a net trained for ten steps, whose loss would fall as its norm grew."""
    net, (x, y) = drawn("mlp"), (X[:128], Y[:128])
    optimizer, options = torch.optim.SGD(net.parameters(), 0.1), {"adam": adam, "lr": lr, "steps": 40, "scale_lr": 0.02}
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    loss, norm = after_a_step(net, x, y, lr, adam)
    learned.gradinit_(net, x, y, cross_entropy, gamma=0.7 * norm, generator=generator(), **options)
    after, lower = after_a_step(net, x, y, lr, adam)
    assert lower <= 0.7 * norm * (1 + 1e-5)
    assert after > loss


def test_gradinit_is_for_the_step_that_it_is_told():
    """Of two nets fitted for a small and a large step each is the better one after its own."""
    x, y = X[:128], Y[:128]
    nets = {lr: drawn("mlp") for lr in (1e-3, 0.3)}
    for lr, net in nets.items():
        learned.gradinit_(net, x, y, cross_entropy, lr=lr, adam=False, gamma=math.inf, generator=generator(), steps=100)
    loss = {(of, at): after_a_step(nets[of], x, y, at, False)[0] for of in nets for at in nets}
    assert loss[1e-3, 1e-3] < loss[0.3, 1e-3]
    assert loss[0.3, 0.3] < loss[1e-3, 0.3]


def test_gradinits_scales_have_a_lower_bound():
    net = nn.Sequential(nn.Linear(4, 3))
    start = net[0].weight.detach().clone()
    x, y = normal(20, 4).repeat_interleave(3, 0), torch.arange(60) % 3  # the inputs tell nothing of the labels
    learned.gradinit_(net, x, y, cross_entropy, lr=1e-6, adam=True, generator=generator(), steps=100, scale_lr=0.05)
    assert torch.allclose(net[0].weight, 0.01 * start)


def test_the_gradient_quotient_is_that_of_the_dense_hessian():
    net = models.torch_mlp([3, 4, 3], "tanh").double()
    x, y, eps = normal(8, 3).double(), torch.arange(8) % 3, 1e-2
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    sizes = [p.numel() for p in net.parameters()]

    def loss(vector):
        parts = vector.split(sizes)
        named = {n: v.view_as(p) for (n, p), v in zip(net.named_parameters(), parts, strict=True)}
        return cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    g, hessian = torch.func.grad(loss)(flat), torch.func.hessian(loss)(flat)
    expected = ((g - hessian @ g) / (g + torch.where(g >= 0, eps, -eps)) - 1).abs().mean()
    found = learned.gradient_quotient(cross_entropy(net(x), y), list(net.parameters()), eps)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_metainit_lowers_the_gradient_quotient_by_norms_alone_and_without_data():
    x, y = normal(256, 784, seed=5), torch.randint(10, (256,), generator=generator(6))

    def quotient(net):
        return learned.gradient_quotient(cross_entropy(net(x), y), list(net.parameters())).item()

    net, other = drawn("mlp"), drawn("mlp")
    before, start = quotient(net), [p.detach().clone() for p in net.parameters()]
    learned.metainit_(net, X, Y, cross_entropy, generator=generator(), steps=40)
    assert quotient(net) < 0.1 * before
    for parameter, one in zip(net.parameters(), start, strict=True):
        same = parameter if parameter.ndim == 1 else parameter * (one.norm() / parameter.norm())
        assert torch.allclose(same, one, atol=1e-5)
    learned.metainit_(other, 5 * X, Y, cross_entropy, generator=generator(), steps=40)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


WIDTHS = [64, *[512] * 10]


def variances_of(net, x):
    return np.array([float(out.var()) for out in outputs_of_layers(net, x).values()])


@pytest.mark.parametrize(("activation", "depth"), [("tanh", 10), ("relu", 10), ("gelu", 5), ("silu", 5)])
def test_autoinit_keeps_the_variance_of_a_deep_net_at_one(activation, depth):
    """On average over draws: that of one draw wanders with depth, and for GELU and SiLU one is no stable variance."""
    x = 0.7 + 2 * normal(512, 64)
    found, he = [], []
    for seed in range(4):
        net = models.torch_mlp(WIDTHS[: depth + 1], activation)
        rivals.autoinit_(net, x, generator(seed))
        found.append(variances_of(net, x))
        baselines._he(net, activation, generator(seed))
        he.append(variances_of(net, x))
    assert np.mean(found, 0) == pytest.approx(1, abs=0.15)
    assert np.abs(np.mean(he, 0) - 1).max() > 0.5


def test_autoinits_variances_are_those_of_its_formula():
    x = 0.7 + 2 * normal(4096, 1, 12, 12)
    maxima = np.random.default_rng(0).normal(size=(400_000, 4)).max(1)
    net = nn.Sequential(nn.Conv2d(1, 400, 5), nn.MaxPool2d(2), nn.Conv2d(400, 50, 3), nn.ReLU(), nn.AvgPool2d(2))
    net.extend([nn.Flatten(), nn.Linear(50, 2000)])
    rivals.autoinit_(net, x, generator())
    relu = 0.5 / math.pi + (0.5 - 0.5 / math.pi) / 4  # E u² of the mean of four: mean² + variance / 4
    squares = [(0.7**2 + 4) * 25, np.mean(maxima**2) * 400 * 9, relu * 50]
    for layer, square in zip((net[0], net[2], net[6]), squares, strict=True):
        assert layer.weight.var().item() == pytest.approx(1 / square, rel=0.03)
        assert layer.weight.abs().max().item() < 2.3 / square**0.5  # truncated
        assert not layer.bias.any()


def test_autoinit_names_a_module_that_it_cannot_follow_and_changes_nothing():
    net = drawn("resnet")
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"autoinit_: model must be a chain of .*; got Block at 'net.stage1'"):
        rivals.autoinit_(net, X, generator())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_fixup_makes_every_block_the_identity_and_the_output_zero():
    net, x = residual_net(3), normal(5, 8, 4, 4).relu()  # as the block's last activation leaves it
    rivals.fixup_(net)
    assert torch.equal(net[:3](x), x)
    assert not net(x).any()
    deep, h = transformer(3), normal(5, 6, 16)
    rivals.fixup_(deep)
    assert torch.equal(deep[:3](h), h)
    assert not deep(h).any()


def test_fixup_scales_what_is_inside_branches_by_their_number():
    net, he = residual_net(4), residual_net(4)
    rivals.fixup_(net)
    assert torch.allclose(net[1].conv1.weight, he[1].conv1.weight / math.sqrt(4))  # L = 4, m = 2
    deep, plain = transformer(3), transformer(3)
    rivals.fixup_(deep)
    ratio = (deep[0].self_attn.in_proj_weight / plain[0].self_attn.in_proj_weight).chunk(3)
    assert [part.mean().item() for part in ratio] == pytest.approx([1, 1, 6**-0.5])  # two branches a block
    assert torch.allclose(deep[2].linear1.weight, plain[2].linear1.weight / math.sqrt(6))


def test_fixup_ends_a_normed_branch_at_the_norms_scale():
    net = drawn("resnet_bn", "fixup")
    assert not net.net.stage2.norm2.weight.any()
    assert net.net.stage2.conv2.weight.any()


def test_fixup_steps_change_the_outputs_by_as_much_at_any_depth():
    x, y = normal(32, 8, 4, 4), torch.arange(32) % 10

    def change(depth, fixup):
        net = residual_net(depth)
        if fixup:
            rivals.fixup_(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.02)
        first = net(x).detach()
        for _ in range(4):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
        return (net(x) - first).norm().item()

    assert change(32, True) == pytest.approx(change(4, True), rel=0.5)
    assert not change(32, False) < 10 * change(4, False)  # He's, which may be NaN


def test_fixup_needs_residual_blocks():
    with pytest.raises(ValueError, match="fixup_: model must have residual blocks, .*; got Sequential without"):
        rivals.fixup_(drawn("mlp"))


@pytest.mark.parametrize(
    ("problem", "initializer"), [("lenet", "zero_output"), ("vit", "zero_output"), ("vit", "fixup")]
)
def test_the_first_loss_of_a_zero_output_is_that_of_no_guess(problem, initializer):
    net = drawn(problem, initializer)
    assert cross_entropy(net(X), Y).item() == pytest.approx(math.log(10), abs=1e-6)
    assert sum(not p.any() for p in net.parameters() if p.ndim > 1) == (1 if initializer == "zero_output" else 7)


@pytest.mark.parametrize(("problem", "activation"), [("mlp", "relu"), ("mlp", "tanh"), ("lenet", "tanh")])
def test_balanced_layers_have_equal_curvatures_and_the_same_product_of_scales(problem, activation):
    net = drawn(problem, "closed_form", activation)
    batch = X[:16], Y[:16]

    def traces():
        found = curvature.layer_traces(net, batch, "cross_entropy", None, params="*weight", progress=False)
        return np.array(list(found.values()))

    def product():
        return sum(p.norm().log().item() for p in net.parameters() if p.ndim > 1)

    before, logs = traces(), product()
    rivals.balanced_(net, batch, "cross_entropy", 0, num_probes=None)
    assert before.max() > 2 * before.min()
    assert traces() == pytest.approx(traces().mean(), rel=0.01)
    assert product() == pytest.approx(logs, abs=1e-4)


def test_balancing_keeps_factors_within_four_and_their_product_at_one():
    net = drawn("mlp", "closed_form")
    with torch.no_grad():
        net[0].weight *= 1e-4
    start = [p.norm().item() for p in net.parameters() if p.ndim > 1]
    rivals.balanced_(net, (X[:16], Y[:16]), "cross_entropy", 0)
    factors = [p.norm().item() / one for p, one in zip([p for p in net.parameters() if p.ndim > 1], start, strict=True)]
    assert max(max(factors), 1 / min(factors)) == pytest.approx(4, rel=1e-4)
    assert math.prod(factors) == pytest.approx(1, rel=1e-4)


def test_balancing_leaves_a_net_no_worse():
    """A residual net may have no balance; the spread does not grow."""
    net = drawn("resnet", "closed_form")
    batch, spread = (X[:32], Y[:32]), []
    for _ in range(2):
        found = curvature.layer_traces(net, batch, "cross_entropy", 8, params="*weight", seed=0, progress=False)
        logs = np.log(list(found.values()))
        spread.append(np.abs(logs - logs.mean()).max())
        rivals.balanced_(net, batch, "cross_entropy", 0)
    assert spread[1] <= spread[0] * (1 + 1e-6)


@pytest.mark.parametrize("framework", sweep.FRAMEWORKS)
def test_warm_up_raises_the_learning_rate_over_the_first_tenth(framework):
    """On inputs of zero the last bias alone is trained: 30 steps, of which three are of a third, two thirds and all."""
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 1])
    zeros = data.Dataset("zeros", "here", x, y, x, y, outputs=2)
    run = training.Run("mlp", framework, "zeros", "he_warmup", "relu", "sgd", 0.3, 15, 2, 0)
    orders = training._orders(run, 4)
    b = np.zeros(2)
    for step, batch in enumerate((rows for order in orders for rows in np.split(order, 2)), 1):
        p = np.exp(b) / np.exp(b).sum()
        b = b - 0.3 * min(1, step / 3) * (p - np.eye(2)[y[batch]].mean(0))
    log_p = b - np.log(np.exp(b).sum())
    assert training.train(run, zeros).train_loss == pytest.approx(-log_p @ [0.25, 0.75], rel=1e-5)


QUICK = {"gradinit": {"steps": 4}, "metainit": {"steps": 4}, "budget": {"num_samples": 32}}
QUICK["budget_unpaired"] = QUICK["budget"]


@pytest.mark.parametrize("name", [name for name, one in INITIALIZERS.items() if one.torch])
def test_every_initializer_trains_and_repeats(name):
    if name == "lsuv_package":
        pytest.importorskip("lsuv")
    problem = "resnet" if name == "fixup" else "mlp"
    runs = [training.Run(problem, "torch", "few", name, "relu", "sgd", 0.01, 1, 64, seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, two, other = (training.train(run, FEW, **QUICK.get(name, {})) for run in runs)
    assert one.status == "ok"
    assert math.isfinite(one.train_loss)
    assert one.train_loss == two.train_loss != other.train_loss
    assert one.test_accuracy == two.test_accuracy
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]


FITTED = [name for name, one in INITIALIZERS.items() if one.fit and not name.startswith("budget")]


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_changes_weights_alone(name):
    if name == "lsuv_package":
        pytest.importorskip("lsuv")
    net = drawn("resnet_bn", name)
    if name == "autoinit":
        net = nn.Sequential(nn.Linear(784, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    net[1].eval()
    buffers = [b.clone() for b in net.buffers()]
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    few = baselines.Fit(X[:32], Y[:32], "cross_entropy", cross_entropy, None, "sgd", 0.1, 0, QUICK.get(name, {}))
    INITIALIZERS[name].fit(net, few)
    assert len(buffers) > 2
    assert all(torch.equal(b, old) for b, old in zip(net.buffers(), buffers, strict=True))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert name == "balanced" or not torch.equal(torch.cat([p.detach().flatten() for p in net.parameters()]), before)


def test_the_batch_of_a_fit_is_drawn_by_its_seed():
    fit = baselines.Fit(torch.arange(1000), torch.arange(1000), None, None, None, "sgd", 0.1, 3)
    (x, y), (again, _), (other, _) = fit.batch(), fit.batch(), replace(fit, seed=4).batch()
    assert len(set(x.tolist())) == 256
    assert torch.equal(x, y)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_every_initializer_has_a_colour():
    assert set(plots.COLOURS) == set(INITIALIZERS)
    named = ("lsuv", "gradinit", "metainit", "autoinit", "fixup", "zero_output", "balanced", "he_warmup", "budget")
    assert all(plots.COLOURS[a] != plots.COLOURS[b] for a, b in itertools.combinations(named, 2))
