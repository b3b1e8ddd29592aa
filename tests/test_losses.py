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
    assert all(column.shape == z.shape for _, column in columns)
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


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


P = double([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])  # rows of probabilities
LOGS = double([-(8**0.5), 0, 8**0.5])  # of mean square 16 / 3


def of(kind, *options, **keywords):
    return kind(TorchArrays(), *options, **keywords)


@pytest.mark.parametrize("axis", [None, 1, -1])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([[0], [2]]), double([0, 2]), double([[0], [2]])])
def test_probabilities_have_the_loss_and_the_curvature_of_their_logs(labels, axis):
    """Labels also as Keras has them: with an axis of classes, and of any type."""
    if labels.is_floating_point() and axis != -1:
        with pytest.raises(ValueError, match=r"^labels must be integers; got torch.float64$"):
            of(losses.CrossEntropy, axis=axis).check(P, labels)
        return
    loss = of(losses.CrossEntropy, outputs=losses.PROBABILITIES, axis=axis, ignore_index=None)
    loss.check(P, labels)
    unnormed, u = double([[2.0], [8.0]]) * P, double([[1, 2, 4], [0, 1, 0]])
    assert float(loss.total(P, labels)) == pytest.approx(np.log(2) + np.log(4 / 3))
    assert float(loss.total(unnormed, labels)) == pytest.approx(np.log(2) + np.log(4 / 3))  # Keras divides by the sum
    torch.testing.assert_close(loss.product(P, labels, u), double([[2 - 7, 8 - 7, 16 - 7], [-1, 8 - 1, -1]]))
    for row, column in enumerate(loss.columns(P[:1], labels[:1])):  # R Rᵀ = diag(1/p) − 1 1ᵀ, as p sums to 1
        expected = torch.eye(3).double()[row] / P[0].sqrt() - P[0].sqrt()[row]
        torch.testing.assert_close(column[1], expected[None])
    assert loss.count(tuple(P.shape), labels) == 2


def test_probabilities_of_zero_and_one_cost_what_keras_says():
    certain = double([[1.0, 0.0]])
    loss = of(losses.CrossEntropy, outputs=losses.PROBABILITIES)
    cost = [float(loss.total(certain, torch.tensor([k]))) for k in (0, 1)]
    assert cost == pytest.approx([1e-7, -np.log(1e-7)], rel=1e-6)
    entry = of(losses.BinaryCrossEntropy, outputs=losses.PROBABILITIES)
    ends, right = double([1.0, 0.0]), double([1.0, 0.0])
    assert float(entry.total(ends, right)) == pytest.approx(2e-7, rel=1e-6)
    assert float(entry.total(ends, 1 - right)) == pytest.approx(-2 * np.log(1e-7))
    assert entry.second(ends, right).tolist() == pytest.approx([1e7, 1e7], rel=1e-6)
    assert entry.natural(ends, right).tolist() == pytest.approx([-np.log(1e-7), np.log(1e-7)])


def test_classes_last_where_asked_for():
    z, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(10).reshape(2, 5) % 3
    for labels in (y, y[..., None]):
        loss = of(losses.CrossEntropy, axis=-1)
        loss.check(z, labels)
        torch.testing.assert_close(
            loss.total(z, labels), F.cross_entropy(z.reshape(10, 3), y.reshape(10), reduction="sum")
        )
        assert loss.count((2, 5, 3), labels) == 10
    images = z.movedim(-1, 1)[..., None]  # (2, 3, 5, 1)
    of(losses.CrossEntropy).check(images, y[..., None])
    with pytest.raises(ValueError, match=r"labels of shape \(2, 5, 1\)"):
        of(losses.CrossEntropy).check(images, y[:, :4, None])


@pytest.mark.parametrize(
    ("loss", "labels", "count"),
    [
        (of(losses.CrossEntropy), [0, 2, 1, 1], 4),
        (of(losses.CrossEntropy, ignore_index=1), [0, 2, 1, 1], 2),
        (of(losses.CrossEntropy, weight=double([1, 2, 4])), [0, 2, 1, 1], 9),
        (of(losses.CrossEntropy, weight=double([1, 2, 4]), ignore_index=1), [0, 2, 1, 1], 5),
        (of(losses.Custom), [0, 2, 1, 1], 4),
    ],
)
def test_what_a_mean_divides_by(loss, labels, count):
    assert loss.count((4, 3), torch.tensor(labels)) == count


@pytest.mark.parametrize(
    ("loss", "z", "y", "level"),
    [
        # Class-centred logits: what is added to all of them does not count.
        (of(losses.CrossEntropy), LOGS[None] + 5, torch.tensor([0]), 16 / 3),
        (of(losses.CrossEntropy), (LOGS[None] + double([[5], [7]])), torch.tensor([0, 1]), 16 / 3),
        (of(losses.CrossEntropy, axis=None), LOGS[None, None] + 5, torch.tensor([[0]]), 16 / 3),
        (of(losses.CrossEntropy, outputs=losses.LOG_PROBABILITIES), LOGS[None], torch.tensor([0]), 16 / 3),
        (of(losses.CrossEntropy, outputs=losses.PROBABILITIES), LOGS.exp()[None], torch.tensor([0]), 16 / 3),
        # The targets' standard deviation, column by column; their size where all are the same; one where all are 0.
        (of(losses.SquaredError), double([[6, 0], [6, 0]]), double([[1, 10], [5, 14]]), 18 / 4),
        (of(losses.SquaredError), double([[6], [6]]), double([[3], [3]]), 36 / 9),
        (of(losses.Huber), double([[6], [6]]), double([[0], [0]]), 36),
        # The outputs of any other loss, seen before the last sigmoid.
        (of(losses.BinaryCrossEntropy), double([3, 5]), double([0, 1]), 17),
        (
            of(losses.BinaryCrossEntropy, outputs=losses.PROBABILITIES),
            torch.sigmoid(double([3, 5])),
            double([0, 1]),
            17,
        ),
        (of(losses.PoissonNLL), double([3, 5]), double([0, 9]), 17),
    ],
)
def test_level_is_a_mean_square_in_units_of_the_loss(loss, z, y, level):
    square, number = loss.level(z, y)
    assert float(square) / number == pytest.approx(level)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_targets_must_be_finite_where_they_are_no_labels(bad):
    for kind in (losses.SquaredError, losses.BinaryCrossEntropy, losses.CrossEntropy):
        of(kind).check(P, P)
        with pytest.raises(ValueError, match=r"^targets must be finite; got NaN or infinity$"):
            of(kind).check(P, P + double([[0], [bad]]))


def test_labels_are_classes_or_ignored():
    of(losses.CrossEntropy, ignore_index=-100).check(P, torch.tensor([0, -100]))
    with pytest.raises(ValueError, match=r"^labels must be in 0 … 2; got -100 … 0"):
        of(losses.CrossEntropy).check(P, torch.tensor([0, -100]))
    with pytest.raises(ValueError, match=r"^the outputs are a scalar: cross-entropy needs an axis of classes$"):
        of(losses.CrossEntropy).check(double(1), torch.tensor(0))


def test_smoothed_targets_of_two_classes_are_half_each_in_the_limit():
    z, y = double([0.3, -2.0]), double([1, 0])
    for smoothing, smooth in (1.0, double([0.5, 0.5])), (0.2, double([0.9, 0.1])):
        loss = of(losses.BinaryCrossEntropy, label_smoothing=smoothing)
        torch.testing.assert_close(loss.total(z, y), F.binary_cross_entropy_with_logits(z, smooth, reduction="sum"))


def test_a_callable_is_a_mean_over_samples_or_a_sum():
    mean = of(losses.Custom, function=lambda z, y: (z - y).square().mean())
    summed = of(losses.Custom, False, function=lambda z, y: (z - y).square().sum())
    z, y = double([[1, 2], [3, 4], [5, 6]]), torch.zeros(3, 2).double()
    assert (float(mean.total(z, y)), mean.count((3, 2), y)) == (pytest.approx(91 / 6 * 3), 3)
    assert float(summed.total(z, y)) == 91
    scalar = of(losses.Custom, function=lambda z, y: z)
    assert (float(scalar.total(double(2), None)), scalar.count((), None)) == (2, 1)


def test_losses_go_by_names_with_options():
    arrays = TorchArrays()
    assert losses.named("BCE-with-logits", arrays) == losses.BinaryCrossEntropy(arrays)
    assert losses.named("huber", arrays, delta=2.0) == losses.Huber(arrays, delta=2.0)


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
