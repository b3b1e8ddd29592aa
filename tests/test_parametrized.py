"""Weights that a module computes from other parameters are written through."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import hessinit
from hessinit import curvature

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
WEIGHT_NORMS = {"new": parametrizations.weight_norm, "old": old_weight_norm}


def net(wrap=lambda layer: layer):
    return nn.Sequential(wrap(nn.Linear(20, 30)), nn.Tanh(), wrap(nn.Linear(30, 40)), nn.Tanh(), nn.Linear(40, 3))


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 20, generator=generator), torch.randint(0, 3, (64,), generator=generator)


def effective(model, x):
    model(x)  # the older hooks compute weights here
    return [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("wrap", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
@pytest.mark.parametrize("traced", [False, True])
def test_the_effective_weights_are_those_of_the_plain_model_up_to_the_draw(wrap, traced):
    x, _ = data()
    batch = x if traced else None
    plain, normed = hessinit.init_(net(), batch, seed=0), net(wrap)
    _, report = hessinit.init_(normed, batch, seed=0, return_report=True)
    for ours, theirs in zip(effective(normed, x), effective(plain, x), strict=True):
        assert ours.square().mean() == pytest.approx(theirs.square().mean().item(), rel=1e-4)
    assert [row.name for row in report] == [name for name, _ in normed.named_parameters()]
    assert all(row.touched for row in report)
    assert [row.depth for row in report if row.role == "weight"] == [3, 3, 3]
    assert sum("through WeightNorm" in row.note for row in report) == 2


@pytest.mark.parametrize("wrap", WEIGHT_NORMS.values(), ids=WEIGHT_NORMS)
def test_the_budget_scales_a_weight_norm(wrap):
    model, batch = net(wrap), data()
    hessinit.init_(model, batch, "cross_entropy", lr=0.1, seed=0)
    assert 0.6 < curvature.step_sharpness(model, batch, "cross_entropy", 0.1) < 2.1


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, old_spectral_norm], ids=["new", "old"])
def test_a_spectral_norm_takes_the_draw_and_keeps_its_scale_and_its_buffers(wrap):
    torch.manual_seed(0)
    model, (x, y) = net(wrap).train(), data()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, report = hessinit.init_(model, (x, y), "cross_entropy", lr=0.1, seed=0, return_report=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert sum("through SpectralNorm" in row.note for row in report) == 2
    assert [row.scale == row.scale for row in report if row.role == "weight"] == [False, False, True]
    for _ in range(50):
        weights = effective(model, x)
    assert [torch.linalg.matrix_norm(w, 2).item() for w in weights[:2]] == pytest.approx([1, 1], rel=1e-3)


def test_a_parametrization_without_freedom_or_inverse_is_left_and_said():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).T

    square = nn.Linear(4, 4)
    parametrize.register_parametrization(square, "weight", Symmetric())
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.ReLU(), square)
    before = [p.detach().clone() for p in model.parameters()]
    _, report = hessinit.init_(model, seed=0, return_report=True)
    notes = {row.name: row.note for row in report if "original" in row.name}
    assert set(notes.values()) == {"left: parametrized by Orthogonal", "left: parametrized by Symmetric"}
    for row, parameter, saved in zip(report, model.parameters(), before, strict=True):
        assert row.touched or torch.equal(parameter, saved)


def test_rescale_leaves_them_and_an_error_restores_them():
    model, (x, y) = net(parametrizations.weight_norm), data()
    _, report = hessinit.rescale_(model, (x, y), "cross_entropy", lr=0.1, seed=0, return_report=True)
    assert sum(row.note == "left: parametrized by WeightNorm" for row in report) == 4
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="finite"):
        hessinit.init_(model, (x * float("nan"), y), "cross_entropy", lr=0.1, seed=0)
    assert all(map(torch.equal, model.parameters(), before))
