"""The budget on real models: what comes out, and that nothing else changes."""

import math

import numpy as np
import pytest
import torch
from cases import Undifferentiable
from torch import nn

import hessinit
from hessinit import curvature, rules
from hessinit.calibration import MAX_SCALE, MIN_SCALE, TURN_SCALES


def data(samples=128, inputs=20, classes=5, seed=0):
    x = torch.randn(samples, inputs, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(samples) % classes


def mlp(activation=nn.ReLU, inputs=20, classes=5):
    return nn.Sequential(nn.Linear(inputs, 32), activation(), nn.Linear(32, 16), activation(), nn.Linear(16, classes))


def state(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("lr", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_the_step_sharpness_is_the_one_asked_for(lr, activation):
    model, report = hessinit.init_(mlp(activation), data(), "cross_entropy", lr=lr, seed=0, return_report=True)
    found = float(curvature.step_sharpness(model, data(), "cross_entropy", lr))
    assert found == pytest.approx(report.calibration.after.sharpness, rel=1e-3)
    if report.calibration.solution.met:
        assert 0.7 * math.exp(-0.11) <= found <= 2 * math.exp(0.11)
        assert 0.29 <= report.calibration.after.level <= 2.06
    assert report.calibration.passes <= 30


def test_nets_with_norms_after_weights_are_asked_for_more_sharpness():
    def asked(*layers, **options):
        net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 5))
        if options.pop("adam", False):
            options["optimizer"] = torch.optim.Adam(net.parameters(), 1e-3)
        _, report = hessinit.init_(net, data(), "cross_entropy", **options or {"lr": 0.1}, seed=0, return_report=True)
        return report.calibration.budget

    for norm in nn.BatchNorm1d(32), nn.LayerNorm(32):
        assert asked(nn.Linear(20, 32), nn.Tanh(), norm) == pytest.approx((1.4, 2.0))
        assert asked(nn.Linear(20, 32), nn.Tanh(), norm, adam=True) == pytest.approx((0.36, 2.0), abs=0.01)
        assert asked(nn.Linear(20, 32), nn.Tanh(), norm, lr=0.1, budget=0.5) == (0.5, 0.5)
        assert asked(nn.Linear(20, 32), norm) == (0.0, 2.0)  # which a step should turn, and that is all
    assert asked(nn.BatchNorm1d(20), nn.Linear(20, 32)) == (0.7, 2.0)  # of the data, which is no weight's
    assert asked(nn.Linear(20, 32)) == (0.7, 2.0)


def test_optimizers_count_with_the_step_of_their_long_run():
    def scales(**options):
        model = mlp()
        made = options["make"](model.parameters())
        _, report = hessinit.init_(model, data(), "cross_entropy", optimizer=made, seed=0, return_report=True)
        return report.calibration

    plain = scales(make=lambda p: torch.optim.SGD(p, lr=0.1))
    momentum = scales(make=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    nesterov = scales(make=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True))
    for other in (momentum, nesterov):
        assert other.scales == pytest.approx(plain.scales, rel=1e-4)
        assert other.budget[0] == pytest.approx(0.7)
    adam = scales(make=lambda p: torch.optim.Adam(p, lr=1e-3))
    assert adam.budget[0] == pytest.approx(0.18, abs=0.01)
    large = scales(make=lambda p: torch.optim.Adam(p, lr=6e-3))
    decayed = scales(make=lambda p: torch.optim.AdamW(p, lr=6e-3, weight_decay=0.1))  # whose long run is a net of zeros
    assert decayed.before.sharpness == pytest.approx(large.before.sharpness, rel=0.05)
    assert decayed.scales == pytest.approx(large.scales, rel=0.1)


def test_both_ends_of_the_range_fall_with_the_layers_above_fifteen():
    for hidden, share in ((13, 1.0), (28, 0.5)):
        wide = [m for _ in range(hidden) for m in (nn.Linear(8, 8), nn.Tanh())]
        net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), *wide, nn.Linear(8, 5))
        _, report = hessinit.init_(net, data(), "cross_entropy", lr=0.1, seed=0, return_report=True)
        assert report.calibration.budget == pytest.approx((0.7 * share, 2 * share))
        _, report = hessinit.init_(net, data(), "cross_entropy", lr=0.1, budget=(0.5, 3.0), return_report=True)
        assert report.calibration.budget == (0.5, 3.0)


def test_a_schedule_counts_with_its_peak():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01)
    assert optimizer.param_groups[0]["lr"] < 0.01
    warm = hessinit.init_(model, data(), "cross_entropy", optimizer=optimizer, seed=0)
    plain = hessinit.init_(mlp(), data(), "cross_entropy", lr=0.1, seed=0)
    for a, b in zip(state(warm), state(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


def few(optimizer=None, inputs=20, activation=nn.Tanh, **options):
    """A net of three layers with a budget for SGD at 0.1, or an optimizer, and its report."""
    model = mlp(activation, inputs)
    x = torch.randn(96, inputs, generator=torch.Generator().manual_seed(0))
    step = {"lr": 0.1} if optimizer is None else {"optimizer": optimizer(model.parameters())}
    return hessinit.init_(
        model, (x, torch.arange(96) % 5), "cross_entropy", seed=0, return_report=True, **step, **options
    )


def biases(model):
    return [model[k].bias.detach() for k in (0, 2, 4)]


@pytest.mark.parametrize(("activation", "odd"), [(nn.ReLU, 1), (nn.SiLU, 1), (nn.Tanh, 2), (nn.Softsign, 2)])
@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_a_first_layer_of_few_inputs_has_biases_that_share_its_scale(optimizer, activation, odd):
    factor = 1 if optimizer is None else 2 * odd
    model, report = few(optimizer, activation=activation)
    first, *others = biases(model)
    assert not any(bias.any() for bias in others)
    weight, bias = report["0.weight"], report["0.bias"]
    assert bias.std_drawn == pytest.approx(factor * (rules.INPUT_VARIANCE / 20) ** 0.5, rel=1e-4)
    assert bias.scale == weight.scale
    assert weight.scale != 1
    assert first.square().mean().sqrt().item() == pytest.approx(bias.std, rel=1e-4)
    assert abs(first.mean().item()) < bias.std / 2
    assert report.calibration.after.sharpness == pytest.approx(report.calibration.solution.best.sharpness)
    again, _ = few(optimizer, activation=activation)
    assert all(torch.equal(a, b) for a, b in zip(biases(again), biases(model), strict=True))
    units = report.calibration.after.units
    assert set(units) == {"0.weight", "2.weight", "4.weight"}


def test_the_step_sharpness_is_that_of_the_net_with_its_biases():
    model, report = few()
    x = torch.randn(96, 20, generator=torch.Generator().manual_seed(0))
    found = curvature.step_sharpness(model, (x, torch.arange(96) % 5), "cross_entropy", 0.1)
    assert found == pytest.approx(report.calibration.after.sharpness, rel=1e-3)


def test_biases_of_pairs_are_opposite():
    model, _ = few(mirrored=True)  # of tanh there are none
    assert not torch.allclose(model[0].bias[:16], -model[0].bias[16:])
    net = mlp()
    hessinit.init_(net, data(), "cross_entropy", lr=0.1, seed=0)
    assert torch.equal(net[0].bias[:16], -net[0].bias[16:])
    assert torch.equal(net[0].weight[:16], -net[0].weight[16:])


def test_all_biases_are_zero_where_inputs_are_many_or_not_known_to_a_chain():
    assert not any(bias.any() for bias in biases(few(inputs=rules.FEW_INPUTS + 1)[0]))
    assert few(inputs=rules.FEW_INPUTS)[0][0].bias.any()
    x, y = data()
    for net in (
        nn.Sequential(nn.Linear(20, 5)),
        nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)),
    ):
        hessinit.init_(net, (x, y), "cross_entropy", lr=0.1, seed=0)
        assert not net[0].bias.any()
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 100, 5))
    hessinit.init_(images, (torch.randn(32, 1, 12, 12), torch.arange(32) % 5), "cross_entropy", lr=0.1, seed=0)
    assert not images[0].bias.any()  # 9 numbers a unit, 144 a sample
    closed = hessinit.init_(mlp(), x, seed=0)
    assert not any(bias.any() for bias in biases(closed))


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.ReLU])
def test_the_level_may_be_twice_as_high_for_sgd_on_tables_unless_activations_are_homogeneous(activation):
    generator = torch.Generator().manual_seed(0)

    def level(inputs=20, bias=True, **options):
        x = torch.randn(96, inputs, generator=generator)
        net = nn.Sequential(nn.Linear(inputs, 32, bias), activation(), nn.Linear(32, 1))
        if "optimizer" in options:
            options["optimizer"] = options["optimizer"](net.parameters(), 0.001)
        net, report = hessinit.init_(net, (x, x[:, :1] / 2), "mse", seed=0, return_report=True, **options)
        assert report.calibration.before.level > 1.05
        return report.calibration.after.level

    assert (level(lr=0.01) > 1.05) == (activation is not nn.ReLU)
    assert level(lr=0.01) < 2.05
    assert level(lr=0.01, level=(0.3, 1.0)) < 1.05
    assert level(lr=0.01, inputs=rules.FEW_INPUTS + 1) < 1.05
    assert level(lr=0.01, bias=False) < 1.05
    assert level(optimizer=torch.optim.Adam) < 1.05


def test_a_bias_that_is_left_stays():
    model = mlp()
    kept = model[0].bias.detach().clone()
    _, report = hessinit.init_(model, data(), "cross_entropy", lr=0.1, exclude="0.bias", seed=0, return_report=True)
    assert torch.equal(model[0].bias, kept)
    assert math.isnan(report["0.bias"].scale)


def test_with_biases_a_tanh_net_learns_an_even_function():
    """Without, it is an odd one, and Adam's small steps take long to change that."""
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    y = (x.square().sum(1, keepdim=True) - 2) / 2
    final = {True: 0.0, False: 0.0}
    for seed in range(3):
        for biased in final:
            net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
            nn.init.zeros_(net[0].bias)
            optimizer = torch.optim.Adam(net.parameters(), 1e-3)
            exclude = None if biased else "0.bias"
            hessinit.init_(net, (x, y), "mse", optimizer=optimizer, seed=seed, exclude=exclude)
            for _ in range(300):
                optimizer.zero_grad()
                loss = (net(x) - y).square().mean()
                loss.backward()
                optimizer.step()
            final[biased] += loss.item()
    assert final[True] < 0.7 * final[False]


@pytest.mark.parametrize("places", [[0, 1, 2], [0, 1, 0]])
def test_the_slopes_are_those_of_the_probe_itself(places):
    """Against central differences of the level, and of the trace with its column held."""
    from hessinit.objective import Objective
    from hessinit.probe import NetworkProbe, sgd_step

    model = mlp(nn.Tanh).double()
    x, y = data()
    objective = Objective("test", model, (x.double(), y), "cross_entropy")
    base = {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1}
    probe = NetworkProbe(objective, base, {}, places, sgd_step(0.1))
    theta = np.array([0.2, -0.1, 0.3])[: max(places) + 1]
    probe.measure(theta)
    trace, level = probe.slopes()
    held = []

    def at(t):
        _, r = probe.measure(t)

        def work(chunk):
            z, pull = objective.network.derivatives.vjp(chunk.outputs, objective.values(probe.trained))
            held.append(probe._rooted(chunk, z, objective.probe_stream(0)) if not held else held[0])
            return z, sum(float((g**2).sum()) for n, g in pull(held[0]).items() if n in probe.trained)

        return math.log(objective.over_data(work)), math.log(r)

    at(theta)
    for k in range(len(theta)):
        h = np.eye(len(theta))[k] * 1e-4
        up, down = at(theta + h), at(theta - h)
        assert trace[k] == pytest.approx((up[0] - down[0]) / 2e-4, abs=1e-5)
        assert level[k] == pytest.approx((up[1] - down[1]) / 2e-4, abs=1e-5)


def test_the_seed_decides_everything_and_nothing_else_changes():
    def made(global_seed):
        torch.manual_seed(global_seed)
        model = nn.Sequential(
            nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5)
        ).eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        before = torch.get_rng_state(), [b.clone() for b in model.buffers()]
        hessinit.init_(model, data(), "cross_entropy", optimizer=optimizer, seed=3)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before[1], strict=True))
        assert not any(m.training for m in model.modules())
        assert not optimizer.state
        assert all(p.grad is None for p in model.parameters())
        return state(model)

    assert all(torch.equal(a, b) for a, b in zip(made(0), made(1), strict=True))


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (data(), {}, ValueError, "init_: lr or optimizer must be given"),
        (data(), {"lr": 0.1}, ValueError, "init_: loss must be given"),
        (None, {"loss": "mse", "lr": 0.1}, ValueError, "init_: batch must be given"),
        (data(), {"loss": "cross_entropy", "lr": -1.0}, ValueError, "init_: lr must be a positive, finite number"),
        (data(), {"loss": "cross_entropy", "lr": "big"}, TypeError, "init_: lr must be a positive, finite number"),
        (data(), {"loss": "cross_entropy", "lr": 0.1, "level": (1.0, 0.3)}, ValueError, "init_: level must be a pair"),
        (data(), {"loss": "cross_entropy", "lr": 0.1, "max_scale": 0.5}, ValueError, "init_: max_scale must be"),
        (data(), {"loss": "cross_entropy", "lr": 0.1, "num_samples": 0}, ValueError, "init_: num_samples must be"),
        (data(), {"loss": "cross_entropy", "optimizer": "sgd"}, TypeError, "init_: optimizer must be"),
        (data(), {"loss": "cross_entropy", "lr": 0.1, "base": "old"}, ValueError, "init_: base must be"),
        ((math.nan * data()[0], data()[1]), {"loss": "mse", "lr": 0.1}, ValueError, "init_: batch must be finite"),
        ((data()[0], data()[1] + 7), {"loss": "cross_entropy", "lr": 0.1}, ValueError, "init_: labels must be in 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_leaves_every_weight(batch, options, error, message):
    model = mlp()
    before = state(model)
    with pytest.raises(error, match="^" + message):
        hessinit.init_(model, batch, **options)
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))


def test_an_interruption_leaves_every_weight():
    class Stopped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            calls.append(1)
            if len(calls) > 6:
                raise KeyboardInterrupt
            return self.net(x)

    calls = []
    model = Stopped()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        hessinit.init_(model, data(), "cross_entropy", lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))


@pytest.mark.parametrize(
    "case",
    ["inputs x 7", "1,000 classes", "batch of 1", "one layer", "zero inputs", "constant labels", "regression"],
)
def test_extremes_stay_within_the_bounds(case):
    model, (x, y), loss = mlp(), data(), "cross_entropy"
    if case == "inputs x 7":
        x = 7 * x
    elif case == "1,000 classes":
        model = mlp(classes=1000)
    elif case == "batch of 1":
        x, y = x[:1], y[:1]
    elif case == "one layer":
        model = nn.Sequential(nn.Linear(20, 5))
    elif case == "zero inputs":
        x = 0 * x
    elif case == "constant labels":
        y = 0 * y
    else:
        model, y, loss = mlp(classes=1), 100 + 30 * x[:, :1], "mse"
    _, report = hessinit.init_(model, (x, y), loss, lr=0.1, seed=0, return_report=True)
    assert all(MIN_SCALE * 0.999 <= s <= MAX_SCALE * 1.001 for s in report.calibration.scales.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert str(report).count("\n") >= len(report) + 3


def test_rescale_begins_a_shortcut_beside_a_batch_norm_at_a_quarter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.skip, self.head = (
                nn.Linear(20, 6),
                nn.BatchNorm1d(6),
                nn.Linear(20, 6),
                nn.Linear(6, 5),
            )

        def forward(self, x):
            return self.head(torch.relu(self.norm(self.one(x)) + self.skip(x)))

    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, report = hessinit.rescale_(
        model, data(), "cross_entropy", lr=1e-6, seed=0, budget=(1e-9, 2.0), level=(1e-3, 10.0), return_report=True
    )
    scales = {row.name: row.scale for row in report if row.role == "weight"}
    assert scales == {"one.weight": TURN_SCALES[1], "skip.weight": rules.BESIDE_NORM, "head.weight": 1}
    assert report["skip.weight"].std == pytest.approx(rules.BESIDE_NORM * report["skip.weight"].std_drawn)
    for name, p in model.named_parameters():
        assert torch.equal(p, scales.get(name, 1.0) * before[name])


def test_rescale_keeps_all_but_the_scale_of_the_weights():
    model = mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    _, report = hessinit.rescale_(model, data(), "cross_entropy", lr=0.1, seed=0, return_report=True)
    for name, p in model.named_parameters():
        factor = report[name].scale if p.ndim > 1 else 1.0
        assert torch.allclose(p, before[name] * factor)


def test_loaders_dicts_and_tokens():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=50, shuffle=True)
    model = mlp()
    order = torch.get_rng_state()
    _, report = hessinit.init_(model, loader, nn.CrossEntropyLoss(), lr=0.1, seed=0, return_report=True)
    assert report.calibration.samples == 128
    assert torch.equal(torch.get_rng_state(), order)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)

        def forward(self, ids):
            return self.head(torch.relu(self.embedding(ids)))

    ids = torch.arange(6000).reshape(300, 20) % 11
    batch = {"ids": ids, "labels": (ids + 1) % 11}
    _, report = hessinit.init_(Tokens(), batch, "cross_entropy", lr=1.0, seed=0, return_report=True)
    assert report.calibration.samples == 2048 // 20


@pytest.mark.parametrize("momenta", [(0.0, 0.0), (0.9, 0.9), (0.9, 0.0)])
def test_the_report_tells_of_the_first_step(momenta):
    """Predicted and real change of the loss, against a step of the optimizer itself; momenta differ by layer."""
    net, (x, y) = mlp(nn.Tanh), data()
    groups = [{"params": net[k].parameters(), "momentum": m} for k, m in zip((0, 2), momenta, strict=True)]
    optimizer = torch.optim.SGD([*groups, {"params": net[4].parameters(), "momentum": momenta[0]}], lr=0.05)
    _, report = hessinit.init_(net, (x, y), "cross_entropy", optimizer=optimizer, seed=0, return_report=True)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in net.named_parameters()}
    step = {name: -0.05 * g for name, g in gradient.items()}
    form = float(curvature.hessian(net, (x, y), "cross_entropy").quadratic_form(step))
    optimizer.step()
    after = report.calibration.after
    assert after.loss == pytest.approx(loss.item(), rel=1e-5)
    predicted = sum(float((gradient[name] * d).sum()) for name, d in step.items()) + form / 2
    assert after.predicted == pytest.approx(predicted, rel=1e-3)
    with torch.no_grad():
        actual = nn.functional.cross_entropy(net(x), y) - loss
    assert after.actual == pytest.approx(actual.item(), rel=1e-3)
    assert after.actual < 0


def test_a_step_into_what_is_not_finite_is_said_and_no_error():
    """A first step of 1e38 overflows; the point itself does not."""
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    report = hessinit.init_(net, (x, torch.randn(16, 2)), "mse", lr=1e30, budget=1.0, seed=0, return_report=True)[1]
    assert not math.isfinite(report.calibration.before.actual)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_checkpointed_net_has_the_scales_of_the_same_one_without():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[4](checkpoint(lambda x: self[3](self[2](self[1](self[0](x)))), x, use_reentrant=False))

    plain, kept = mlp(nn.Tanh), Checkpointed(*mlp(nn.Tanh))
    reports = [
        hessinit.init_(net, data(), "cross_entropy", lr=0.1, seed=0, return_report=True)[1] for net in (plain, kept)
    ]
    assert reports[1].calibration.scales == pytest.approx(reports[0].calibration.scales, rel=1e-5)
    assert reports[1].calibration.passes == reports[0].calibration.passes


def test_the_passes_of_a_plain_net_are_few():
    """A probe takes a gradient, a JVP and a forward pass; one forward and three backward passes give its slopes."""
    calls = []
    net = mlp()
    net.register_forward_hook(lambda *_: calls.append(1))
    calibration = hessinit.init_(net, data(), "cross_entropy", lr=0.1, seed=0, return_report=True)[1].calibration
    probes = len(calibration.solution.points)
    assert calibration.passes <= probes * 7
    assert len(calls) <= probes * 4 + 4


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("momenta", [(0.9, 0.9), (0.9, 0.5)])
def test_a_long_way_ends_within_the_limit_of_passes(activation, momenta):
    net = mlp(activation)
    groups = [{"params": p, "momentum": momenta[p.ndim - 1]} for p in net.parameters()]
    optimizer = torch.optim.SGD(groups, lr=1e-4)
    _, report = hessinit.init_(net, data(), "cross_entropy", optimizer=optimizer, seed=0, return_report=True)
    calibration = report.calibration
    assert 20 < calibration.passes <= 30
    assert len(calibration.solution.points) >= 4
    assert calibration.after.sharpness > 10 * calibration.before.sharpness


def test_an_operation_without_second_derivatives_costs_accuracy_alone():
    """By finite differences; the operation is the identity."""

    class Opaque(nn.Tanh):
        def forward(self, x):
            return Undifferentiable.apply(super().forward(x))

    scales = []
    for activation in (nn.Tanh, Opaque):
        _, report = hessinit.rescale_(
            hessinit.init_(mlp(activation), seed=0), data(), "cross_entropy", lr=0.1, seed=0, return_report=True
        )
        scales.append(list(report.calibration.scales.values()))
    assert scales[1] == pytest.approx(scales[0], rel=0.01)
    assert max(scales[0]) > 1.1


def test_the_first_step_is_that_of_the_net_with_its_frozen_biases_set_to_zero():
    net, (x, y) = mlp(nn.Tanh), data()
    net[2].bias.requires_grad_(False).fill_(5.0)
    _, report = hessinit.init_(net, (x, y), "cross_entropy", lr=0.05, include="*", seed=0, return_report=True)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0 if p.grad is None else 0.05 * p.grad
        assert report.calibration.after.actual == pytest.approx(
            (nn.functional.cross_entropy(net(x), y) - loss).item(), rel=1e-2
        )
