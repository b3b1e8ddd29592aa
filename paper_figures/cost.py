"""What the figures of costs share: nets in float32 with random inputs and labels, their loss, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hessinit.experiments.models import torch_mlp

VOCABULARY, CONTEXT = 96, 128


def lenet() -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling, for images of 28 × 28."""
    return nn.Sequential(
        *[nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()],
        *[nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)],
    )


class Residual(nn.Module):
    """Two convolutions with batch norm beside the identity, or a narrow convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))
        narrow = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.short = nn.Identity() if channels == width else nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.short(x))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 of K. He et al., "Deep residual learning for image recognition", CVPR 2016, for 10 classes."""
    stem = [nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks, channels = [], width
    for stage in range(4):
        wide = width * 2**stage
        blocks += [Residual(channels, wide, 1 if stage == 0 else 2), Residual(wide, wide, 1)]
        channels = wide
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    """Causal attention and a two-layer net, each behind a layer norm and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (text, head, t, c)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    """A language model like GPT-2, of 10.7 million parameters: the logits of the next token at every position."""

    def __init__(self, width: int = 384, heads: int = 6, blocks: int = 6) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position.weight)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # what builds them, shape of an input
    "MLP": (lambda: torch_mlp((784, 512, 512, 10), "relu"), (784,)),
    "LeNet-5": (lenet, (1, 28, 28)),
    "ResNet-18": (resnet18, (3, 64, 64)),
    "GPT": (GPT, (CONTEXT,)),
    "small MLP": (lambda: torch_mlp((20, 8, 8, 10), "relu"), (20,)),
    "small GPT": (lambda: GPT(32, 2, 1), (CONTEXT,)),
}


class CrossEntropy(nn.CrossEntropyLoss):
    """With the classes on the last axis."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return super().forward(z.flatten(0, -2), y.flatten())


def problem(net: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net in evaluation mode with torch's own initial weights, inputs and targets."""
    torch.manual_seed(0)
    build, shape = NETS[net]
    if shape == (CONTEXT,):
        tokens, following = torch.randint(VOCABULARY, (2, samples, CONTEXT))
        return build().eval(), tokens, following
    return build().eval(), torch.randn(samples, *shape), torch.randint(10, (samples,))


def layers(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each layer."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def peak_memory(run: Callable[[], Any]) -> float:
    """Peak of the memory that torch hands out while something runs, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # negative where memory is given back
    del kept
    return float(np.cumsum(changes).max()) / 2**20
