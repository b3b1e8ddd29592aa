"""Any stack of supported layers: every parameter is accounted for, finite, and the first loss is that of a guess."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import hessinit
from hessinit.calibration import MAX_SCALE, MIN_SCALE

CLASSES = 5
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.ELU, nn.PReLU, nn.Identity)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Sequence(nn.Module):
    """A recurrent or attention layer on rows taken as sequences of length 1."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = x[:, None]
        y = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return (y[0] if isinstance(y, tuple) else y)[:, 0]


DENSE = (
    lambda n, m: nn.Linear(n, m),
    lambda n, m: weight_norm(nn.Linear(n, m)),
    lambda n, m: nn.Sequential(Residual(nn.Linear(n, n)), nn.Linear(n, m, bias=False)),
    lambda n, m: Sequence(nn.LSTM(n, m, batch_first=True)),
    lambda n, m: Sequence(nn.GRU(n, m, num_layers=2, batch_first=True)),
    lambda n, m: nn.Sequential(Sequence(nn.MultiheadAttention(n, 2, batch_first=True)), nn.Linear(n, m)),
    lambda n, m: nn.Sequential(
        Sequence(nn.TransformerEncoderLayer(n, 2, 2 * n, 0.0, batch_first=True)), nn.Linear(n, m)
    ),
)
DENSE_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm, lambda n: nn.Dropout(0.3), lambda n: nn.Identity())
CONV = (
    lambda n, m: nn.Conv2d(n, m, 3, padding=1),
    lambda n, m: nn.Conv2d(n, m, 3, 2, padding=2, dilation=2),
    lambda n, m: nn.Conv2d(n, m, 3, padding=1, groups=2, bias=False),
    lambda n, m: nn.ConvTranspose2d(n, m, 2, 2),
    lambda n, m: nn.Sequential(Residual(nn.Conv2d(n, n, 1)), nn.Conv2d(n, m, 1)),
)
CONV_NORMS = (nn.BatchNorm2d, lambda n: nn.GroupNorm(2, n), nn.InstanceNorm2d, lambda n: nn.Identity())


@st.composite
def stacks(draw):
    """A model and its inputs."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    even = st.integers(2, 6).map(lambda k: 2 * k)
    activation = st.sampled_from(ACTIVATIONS)
    width, layers = draw(even), []
    kind = draw(st.sampled_from(["rows", "images", "tokens"]))
    x = {
        "rows": lambda: torch.randn(24, width),
        "images": lambda: torch.randn(24, width, 8, 8),
        "tokens": lambda: torch.randint(0, 11, (24,)),
    }[kind]()
    if kind == "images":
        for _ in range(draw(st.integers(1, 3))):
            out = draw(even)
            made = draw(st.sampled_from(CONV))(width, out)
            layers += [made, draw(st.sampled_from(CONV_NORMS))(out), draw(activation)()]
            width = out
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        width *= 4
    elif kind == "tokens":
        layers += [nn.Embedding(11, width, padding_idx=draw(st.sampled_from([None, 3])))]
    for _ in range(draw(st.integers(0, 3))):
        out = draw(even)
        made = draw(st.sampled_from(DENSE))(width, out)
        layers += [made, draw(st.sampled_from(DENSE_NORMS))(out), draw(activation)()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)), x


@settings(derandomize=True, deadline=None, max_examples=60)
@given(stacks(), st.sampled_from(["sgd", "adam"]))
def test_every_parameter_is_accounted_for_and_the_first_loss_is_that_of_a_guess(stack, optimizer):
    model, x = stack
    y = torch.arange(len(x)) % CLASSES
    frozen = model[-1].bias
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    step = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](model.parameters(), 1e-2)
    _, report = hessinit.init_(model, (x, y), "cross_entropy", optimizer=step, seed=0, return_report=True)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert [row.name for row in report] == list(named)
    assert torch.equal(frozen, kept)
    for row in report:
        parameter = named[row.name]
        assert parameter.isfinite().all()
        assert row.touched or torch.equal(parameter, before[row.name]), row
        assert math.isnan(row.scale) or MIN_SCALE * 0.999 <= row.scale <= MAX_SCALE * 1.001
    loss = F.cross_entropy(model(x), y).item()
    assert 0.3 * math.log(CLASSES) < loss < math.log(CLASSES) + 1.5
