"""Losses: value, count, second derivative and its root, against autodiff of torch's own."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessinit import curvature, losses
from hessinit.networks import torch_loss
from hessinit.networks.torch_autodiff import TorchArrays

LOSSES = cases.losses()


def second(loss, z, y):
    return torch.autograd.functional.hessian(lambda u: loss(u.reshape(z.shape), y), z.reshape(-1))


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_second_derivative(name):
    torch_form, z, y = LOSSES[name]
    loss = torch_loss.translate(torch_form)
    assert isinstance(loss, losses.Custom) == (name == "callable")
    divisor = loss.count(tuple(z.shape), y) if loss.mean else 1.0
    torch.testing.assert_close(loss.total(z, y) / divisor, torch_form(z, y), rtol=1e-12, atol=0)
    true = second(torch_form, z, y)
    basis = torch.eye(z.numel(), dtype=z.dtype)
    product = torch.stack([loss.product(z, y, e.reshape(z.shape)).reshape(-1) for e in basis]) / divisor
    torch.testing.assert_close(product, true, rtol=1e-10, atol=1e-14)
    columns = list(loss.columns(z, y))
    rooted = sum(sign * torch.outer(c.reshape(-1), c.reshape(-1)) for sign, c in columns) / divisor
    torch.testing.assert_close(rooted, true, rtol=1e-10, atol=1e-14)
    assert loss.natural(z, y) is z


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "callable"])
def test_root_of_random_signs_is_unbiased(name):
    torch_form, z, y = LOSSES[name]
    loss = torch_loss.translate(torch_form)
    signs = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (4000, *z.shape)) * 2.0 - 1.0)
    traces = torch.stack([loss.root(z, y, e).square().sum() for e in signs])
    divisor = loss.count(tuple(z.shape), y) if loss.mean else 1.0
    true = torch.trace(second(torch_form, z, y)) * divisor
    error = traces.std() / 4000**0.5 + 1e-12 * true
    assert abs(traces.mean() - true) < 4 * error
    assert abs(traces.mean() - 1.1 * true) > 4 * error


def test_softmax_on_either_side_of_the_border_is_the_same_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain = curvature.hessian(body, (x, y), "cross_entropy")
    logs = curvature.hessian(nn.Sequential(body, nn.LogSoftmax(1)), (x, y), nn.NLLLoss())
    torch.testing.assert_close(logs.dense(), plain.dense(), rtol=1e-10, atol=1e-14)
    assert logs.exactness == "approximate"
    assert logs.block("0.2.*").exactness == "exact"
    one = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    target = (y[:, None] > 0).double()
    logits = curvature.hessian(one, (x, target), nn.BCEWithLogitsLoss())
    probabilities = curvature.hessian(nn.Sequential(one, nn.Sigmoid()), (x, target), nn.BCELoss())
    torch.testing.assert_close(probabilities.dense(), logits.dense(), rtol=1e-9, atol=1e-13)
    assert probabilities.block("0.2.*").exactness == "exact"
    # and the exact Hessian does not ask where the border is
    for pair in ((logs, plain), (probabilities, logits)):
        exact = [curvature.Hessian(h.objective, h.rows, h.cols, exact=True).dense() for h in pair]
        torch.testing.assert_close(*exact, rtol=1e-8, atol=1e-12)


def test_classes_last_where_only_that_fits_the_labels():
    loss = losses.named("cross_entropy", TorchArrays())
    z, y = torch.randn(2, 5, 3).double(), torch.randint(0, 3, (2, 5))
    loss.check(z, y)
    torch.testing.assert_close(loss.total(z, y) / 10, F.cross_entropy(z.reshape(10, 3), y.reshape(10)))
    both = torch.randn(2, 3, 3).double()
    labels = torch.randint(0, 3, (2, 3))
    torch.testing.assert_close(loss.total(both, labels) / 6, F.cross_entropy(both, labels))  # torch's axis wins


@pytest.mark.parametrize(
    ("loss", "z", "y", "message"),
    [
        ("cross_entropy", torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), "do not fit"),
        ("cross_entropy", torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), r"labels must be in 0 … 2; got 0 … 3"),
        ("cross_entropy", torch.zeros(4, 3), torch.tensor([0, 1, -1, 2]), r"got -1 … 2"),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]), "class weights"),
        ("mse", torch.zeros(4, 1), torch.zeros(4), r"targets of shape \(4,\) do not fit outputs of shape \(4, 1\)"),
        ("bce_with_logits", torch.zeros(4), torch.zeros(4, 1), "do not fit"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(loss, z, y, message):
    model = nn.Linear(1, 1)

    def forward(model, batch):
        return z + 0 * model.bias, y

    with pytest.raises(ValueError, match=f"^hessian: .*{message}"):
        curvature.hessian(model, (torch.zeros(4, 1), y), loss, forward=forward)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        ("entropy", ValueError, "loss must be one of cross_entropy, mse"),
        (3, TypeError, "loss must be a name"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, 'reduction "mean" or "sum"'),
        (lambda z, y: z, ValueError, r"loss must be a scalar; got one of shape \(4, 3\)"),
    ],
)
def test_what_is_not_a_scalar_loss(loss, kind, message):
    with pytest.raises(kind, match=f"^hessian: .*{message}"):
        curvature.hessian(nn.Linear(2, 3), (torch.ones(4, 2), torch.zeros(4, dtype=torch.long)), loss)
