"""One table of small models, batches and losses, every kind of layer and loss that curvature is asked about."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    model: nn.Module
    batch: Any
    loss: Any = "cross_entropy"
    torch_loss: Any = F.cross_entropy  # the same loss, for the truth
    options: Any = None


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(x + self.conv(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.rnn = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


class Attention(nn.Module):
    """Self-attention by the module, by the function, or both; the head tied to the embedding."""

    def __init__(self, function):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = None if function else nn.MultiheadAttention(4, 2, batch_first=True)
        self.qkv = nn.Linear(4, 12) if function else None
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x)
        if self.attention is not None:
            h = self.attention(h, h, h, need_weights=False)[0]
        else:
            q, k, v = self.qkv(h).chunk(3, -1)
            h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return self.head(F.gelu(x + h)).transpose(1, 2)  # classes on axis 1


class Shared(nn.Module):
    """One module called twice, and registered twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Square(torch.autograd.Function):
    """No forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Undifferentiable(torch.autograd.Function):
    """The identity, with neither forward mode nor second derivatives."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(Square.apply(self.fc(x)))


def _images(n=4, size=6):
    return torch.randn(n, 1, size, size)


def _labels(n, classes):
    return torch.arange(n) % classes


def _mlp(activation, outputs=3, last=None):
    layers = [nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, outputs)]
    return nn.Sequential(*layers, *([last] if last else []))


def _lenet(activation):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), activation(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 5), activation(), nn.Linear(5, 3)
    )


def _frozen():
    model = _mlp(nn.Tanh)
    model[0].weight.requires_grad_(False)
    return model


def _old_weight_norm():
    with_hooks = nn.Linear(4, 5)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(with_hooks)
    return nn.Sequential(with_hooks, nn.Tanh(), nn.Linear(5, 3))


def models():
    """Models of every kind, in float64, weights and data the same every time."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), _labels(6, 3)
    dropout = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3))
    norms = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.GroupNorm(2, 6), nn.Linear(6, 3))
    batch_norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    pool = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    inplace = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ELU(inplace=True), nn.Linear(5, 3)
    )
    table = {
        "relu mlp": Case(_mlp(nn.ReLU), (x, y)),
        "tanh mlp": Case(_mlp(nn.Tanh), (x, y)),
        "gelu mlp": Case(_mlp(nn.GELU), (x, y)),
        "lenet tanh": Case(_lenet(nn.Tanh), (_images(), _labels(4, 3))),
        "conv relu max-pool": Case(pool, (_images(), _labels(4, 3))),
        "residual": Case(Residual(), (_images(), _labels(4, 4))),
        "batch norm, training": Case(batch_norm, (x, y)),
        "batch norm, evaluation": Case(copy.deepcopy(batch_norm).eval(), (x, y)),
        "layer and group norm": Case(norms, (x, y)),
        "dropout off": Case(dropout, (x, y)),
        "lstm": Case(Recurrent(nn.LSTM), (torch.randint(0, 7, (4, 3)), _labels(4, 3))),
        "gru": Case(Recurrent(nn.GRU), (torch.randint(0, 7, (4, 3)), _labels(4, 3))),
        "attention module, tied": Case(Attention(False), (torch.randint(0, 5, (2, 3)), torch.randint(0, 5, (2, 3)))),
        "attention function, tied": Case(Attention(True), (torch.randint(0, 5, (2, 3)), torch.randint(0, 5, (2, 3)))),
        "shared module": Case(Shared(), (torch.randn(5, 3), _labels(5, 2))),
        "in place": Case(inplace, (x, y)),
        "weight norm": Case(nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), (x, y)),
        "weight norm by hooks": Case(_old_weight_norm(), (x, y)),
        "frozen": Case(_frozen(), (x, y)),
        "checkpointed": Case(Checkpointed(), (torch.randn(5, 3), _labels(5, 2))),
        "compiled": Case(torch.compile(_mlp(nn.Tanh), backend="eager"), (x, y)),
        "no forward mode": Case(CustomFunction(), (torch.randn(5, 3), _labels(5, 2))),
    }
    return {name: Case(c.model.double(), _double(c.batch), c.loss, c.torch_loss) for name, c in table.items()}


def losses():
    """(loss, outputs, targets, the torch loss that is its truth)."""
    torch.manual_seed(1)
    z, y = torch.randn(6, 3).double(), torch.tensor([0, 2, -100, 1, 1, 0])
    weight, target = torch.tensor([0.5, 1.0, 2.0]).double(), torch.randn(6, 3).double()
    soft, binary = torch.softmax(torch.randn(6, 3).double(), 1), (torch.rand(6, 3) > 0.5).double()
    pixels, labels = torch.randn(2, 3, 4).double(), torch.tensor([[0, 1, 2, 0], [2, 2, -100, 1]])
    counts = torch.tensor([0.0, 3.0, 1.0]).double().expand(6, 3)
    modules = {
        "cross-entropy": (nn.CrossEntropyLoss(), z, y),
        "weights": (nn.CrossEntropyLoss(weight=weight), z, y),
        "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), z, y),
        "weights and smoothing": (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2), z, y),
        "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), z, y.clamp(min=0)),
        "soft targets": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=weight), z, soft),
        "positions": (nn.CrossEntropyLoss(weight=weight), pixels, labels),
        "sum": (nn.CrossEntropyLoss(reduction="sum", weight=weight), z, y),
        "mse": (nn.MSELoss(), z, target),
        "mse sum": (nn.MSELoss(reduction="sum"), z, target),
        "bce with logits": (nn.BCEWithLogitsLoss(), z, binary),
        "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=weight, weight=weight), z, binary),
        "poisson": (nn.PoissonNLLLoss(), z, counts),
        "poisson rates": (nn.PoissonNLLLoss(log_input=False), z.exp(), counts),
        "huber": (nn.HuberLoss(delta=0.7), z, target),
        "smooth l1": (nn.SmoothL1Loss(beta=0.6), z, target),
        "callable": (lambda a, b: (torch.cosh(a - b)).mean(), z, target),
        "partial": (_partial(F.cross_entropy, label_smoothing=0.3), z, y),
    }
    return modules


def _partial(function, **keywords):
    from functools import partial

    return partial(function, **keywords)


def _double(batch):
    return tuple(t.double() if t.is_floating_point() else t for t in batch)
