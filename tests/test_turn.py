"""Weights whose scale the next norm takes out: a step turns them by the same angle, whatever its optimizer and rate."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import hessinit
from hessinit import curvature
from hessinit.calibration import TURN, TURN_SCALES

X, Y = torch.randn(192, 20, generator=torch.Generator().manual_seed(0)), torch.arange(192) % 5
BEFORE_NORMS = ("0.weight", "3.weight", "6.weight")
OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr / 50),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr / 50, weight_decay=0.1),
}


def net(norm=nn.BatchNorm1d, **options):
    layers = [m for n in (20, 32, 32) for m in (nn.Linear(n, 32), norm(32, **options), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 5))


def first_step(model, optimizer):
    """How far the first step moves each weight, found out by taking it."""
    tried = copy.deepcopy(model)
    own = type(optimizer)(tried.parameters())
    own.param_groups[0].update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    nn.functional.cross_entropy(tried(X), Y).backward()
    own.step()
    return {n: (p.detach() - dict(model.named_parameters())[n].detach()) for n, p in tried.named_parameters()}


def angle(model, optimizer, grown=1.0):
    """The geometric mean over the weights before norms."""
    step, weights = first_step(model, optimizer), dict(model.named_parameters())
    return grown * math.exp(np.mean([math.log(step[n].norm() / weights[n].detach().norm()) for n in BEFORE_NORMS]))


def calibrated(model, optimizer, function=hessinit.init_, **options):
    return function(model, (X, Y), "cross_entropy", optimizer=optimizer, seed=0, return_report=True, **options)[1]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.003, 0.03, 0.3])
def test_a_step_turns_them_by_the_angle_asked_for(norm, kind, lr):
    model = net(norm)
    optimizer = OPTIMIZERS[kind](model.parameters(), lr)
    report = calibrated(model, optimizer)
    (scale,) = {report[name].scale for name in BEFORE_NORMS}
    found = angle(model, optimizer, grown=10.0 if kind == "momentum" else 1.0)
    if TURN_SCALES[0] < scale < TURN_SCALES[1]:
        assert found == pytest.approx(TURN, rel=0.02)
    else:
        assert (found < TURN) == (scale == TURN_SCALES[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_report_is_of_the_whole_step(kind):
    model = hessinit.init_(net(), seed=0)
    optimizer = OPTIMIZERS[kind](model.parameters(), 0.1)
    grown = 10.0 if kind == "momentum" else 1.0

    def sharpness():  # of the first step, which momentum makes ten times as long
        return grown * float(curvature.step_sharpness(model, (X, Y), "cross_entropy", optimizer))

    before = sharpness()
    done = calibrated(model, optimizer, hessinit.rescale_).calibration
    assert done.before.sharpness == pytest.approx(before, rel=1e-3)
    assert done.after.sharpness == pytest.approx(sharpness(), rel=0.01)
    traces = curvature.layer_traces(model, (X, Y), "cross_entropy", params=["0.weight"], num_probes=50)
    assert done.after.curvature["0.weight"] == pytest.approx(traces["0"], rel=0.3)
    moved, step = copy.deepcopy(model), first_step(model, optimizer)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p += step[name]
        losses = [float(nn.functional.cross_entropy(m(X), Y)) for m in (model, moved)]
    assert done.after.actual == pytest.approx(losses[1] - losses[0], rel=0.02, abs=1e-3)
    assert done.passes <= 30


def test_their_own_scale_does_not_matter():
    """Nor does what it was before, as the norm takes it out."""
    ends = []
    for factor in (1.0, 3.0):
        model = hessinit.init_(net(eps=1e-12), seed=0)
        with torch.no_grad():
            for name in BEFORE_NORMS:
                model.get_parameter(name).mul_(factor)
        calibrated(model, torch.optim.SGD(model.parameters(), 0.1), hessinit.rescale_)
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_another_budget_turns_them_in_proportion():
    found = []
    for c in (0.7, 1.4):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        calibrated(model, optimizer, budget=(c, 4.0))
        found.append(angle(model, optimizer))
    assert found[1] == pytest.approx(2 * found[0], rel=0.02)


def test_a_step_too_sharp_for_them_does_not_shrink_the_others():
    """A deep net of batch norms without shortcuts has a gradient that explodes, and turns back by itself."""
    layers = [m for _ in range(40) for m in (nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(20, 5))
    report = calibrated(model, torch.optim.SGD(model.parameters(), 0.1))
    done = report.calibration
    assert done.after.sharpness > 10
    assert done.solution.met
    assert done.after.level >= 0.29
    assert "(asked for at most 2, and of weights before norms to turn by 0.035: met)" in str(report)


def test_a_net_that_ends_in_a_norm_has_nothing_else_to_scale():
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5), nn.BatchNorm1d(5))
    report = calibrated(model, torch.optim.SGD(model.parameters(), 0.1))
    assert report["0.weight"].scale == report["3.weight"].scale != 1
    assert len(report.calibration.solution.points) == 1


def test_without_a_gradient_they_stay_as_they_are():
    model = net()
    nothing = X, torch.full((len(X), 5), 0.2)
    with torch.no_grad():
        model[-1].weight.zero_()
    _, report = hessinit.rescale_(model, nothing, "cross_entropy", lr=0.1, seed=0, return_report=True)
    assert {report[name].scale for name in BEFORE_NORMS} == {1.0}
