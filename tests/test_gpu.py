"""The same on an accelerator as on the CPU; skipped where there is none."""

import pytest
import torch
from torch import nn

import hessinit
from hessinit import curvature

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")


def net():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def data(device):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return x.to(device), y.to(device)


def test_a_seed_means_the_same_weights_on_every_device():
    on = {device: hessinit.init_(net().to(device), data(device)[0], seed=0) for device in ("cpu", "cuda")}
    for ours, theirs in zip(*(model.parameters() for model in on.values()), strict=True):
        assert theirs.device.type == "cuda"
        assert torch.allclose(ours, theirs.cpu(), rtol=1e-4)


def test_the_budget_is_that_of_the_cpu_and_the_random_state_stays():
    found = []
    for device in ("cpu", "cuda"):
        state = torch.cuda.get_rng_state()
        model = hessinit.init_(net().to(device), data(device)[0], seed=0)
        _, report = hessinit.init_(model, data(device), "cross_entropy", lr=0.1, seed=0, return_report=True)
        found.append([row.scale for row in report if row.role == "weight"])
        assert torch.equal(state, torch.cuda.get_rng_state())
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_curvature_is_that_of_the_cpu():
    model = hessinit.init_(net(), data("cpu")[0], seed=0)
    ours = curvature.layer_traces(model, data("cpu"), "cross_entropy", seed=0)
    theirs = curvature.layer_traces(model.to("cuda"), data("cuda"), "cross_entropy", seed=0)
    assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=1e-3)
