"""What curvature costs in time and memory, in units of the plain gradient, beside other libraries.

Four nets in float32, random inputs, cross-entropy: an MLP 784-512-512-10 (ReLU, 512 samples), LeNet-5 (ReLU, 128 images
of 28 × 28), a ResNet-8 (batch norm in evaluation mode, 128 images) and a causal transformer (four blocks of width 128,
96 tokens, 16 texts of 64). The gradient is the user's: ``model(x)``, the loss, ``torch.autograd.grad``.

* Time: operators are built and every operation is run once before the clock starts. A repetition runs all operations
  one after the other, the gradient first, and each time is divided by that gradient's; every repetition is a row.
* Memory: the peak of what torch's allocator has handed out since the operation began (its result included), from the
  allocations that ``torch.profiler`` records in one more run. Unlike the process's resident size it does not depend on
  what ran before; it does not see NumPy's arrays nor oneDNN's scratch space.
* The same work: before the clock starts, other libraries' results are compared with ours (to 1e-3; of one random vector
  by the trace, averaged over several). curvlinops and PyHessian read the data anew for every product, as we do. The
  largest eigenvalue is that of the exact Hessian: ours as it comes, which is to a residual of 1e-4, curvlinops'
  operator in SciPy's ``eigsh`` to the same, PyHessian's power iteration as it comes, until a step changes the value by
  less than 1e-3, which leaves it up to 5 % off.
* Left out, all on the transformer: BackPACK, which has no rule for layer norm and attention; curvlinops' exact product
  and eigenvalue, which are off by 3e-3, in the layer norms' weights (``torch.func.jvp`` of ``torch.func.jacrev`` loses
  a part of their derivative); PyHessian's eigenvalue, for its time; the diagonal in full, a backward pass for each of
  98,304 outputs. A library that is not installed has no rows. The transformer's fused attention has neither
  forward-mode nor second derivatives: other libraries run under ``sdpa_kernel(SDPBackend.MATH)``, which ours sets by
  itself; the gradient keeps the fused kernel.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hessinit import curvature
from hessinit.experiments import plots
from hessinit.experiments.models import torch_mlp

SAMPLES = {"MLP": 512, "LeNet-5": 128, "ResNet-8": 128, "transformer": 16}
VOCABULARY, CONTEXT = 96, 64
LONGEST = 6.0  # bar of times
PROBES = 64  # of averages that are compared over libraries
FULL, TOP = "diagonal, in full", "largest eigenvalue"  # slow: repeated less often
LABELS = {
    "gradient": "gradient",
    "quadratic form": "quadratic form $v^T\\!Gv$",
    "product": "product $Gv$",
    "exact product": "exact product $Hv$",
    "cross block": "cross block $G_{ab}v_b$",
    "layer traces": "layers' traces, 1 probe",
    "diagonal": "diagonal, 1 probe",
    FULL: FULL,
    TOP: "largest eigenvalue of $H$",
}
COLOURS = {
    "PyTorch": plots.COLOURS["torch_default"],
    "hessinit": plots.COLOURS["closed_form"],
    "curvlinops": plots.COLOURS["he_normal"],
    "PyHessian": plots.COLOURS["glorot_normal"],
    "BackPACK": plots.COLOURS["orthogonal"],
}
PACKAGES = {
    "PyTorch": "torch",
    "hessinit": "hessinit",
    "curvlinops": "curvlinops-for-pytorch",
    "PyHessian": "pyhessian",
    "BackPACK": "backpack-for-pytorch",
}


class LeNet(nn.Sequential):
    """LeNet-5 with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__(
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
        self.short = nn.Identity() if stride == 1 else nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.short(x))


class ResNet(nn.Sequential):
    """Three residual blocks of widths 16, 32, 64."""

    def __init__(self) -> None:
        super().__init__(
            *[nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()],
            *[Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)],
            *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)],
        )


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


class Transformer(nn.Module):
    """A small language model: the logits of the next token at every position."""

    def __init__(self, width: int = 128, heads: int = 4, blocks: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position.weight)))


class CrossEntropy(nn.CrossEntropyLoss):
    """With the classes on the last axis."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return super().forward(z.flatten(0, -2), y.flatten())


def problem(net: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A net with torch's own initial weights, inputs and targets."""
    torch.manual_seed(0)
    if net == "transformer":
        tokens, following = torch.randint(VOCABULARY, (2, samples, CONTEXT))
        return Transformer().eval(), tokens, following
    made = torch_mlp((784, 512, 512, 10), "relu") if net == "MLP" else LeNet() if net == "LeNet-5" else ResNet()
    shape = (784,) if net == "MLP" else (1, 28, 28)
    return made.eval(), torch.randn(samples, *shape), torch.randint(10, (samples,))


@dataclass(frozen=True)
class Work:
    """An operation that a library is asked for.

    Args:
        operation: one of ``LABELS``.
        library: one of ``PACKAGES``.
        run: does it; returns one number or tensors.
        steady: for a random operation, what all libraries should give alike.
    """

    operation: str
    library: str
    run: Callable[[], Any]
    steady: Callable[[], Any] | None = None


def works(net: str, samples: int) -> Iterator[Work]:
    """All operations on a net, each in the libraries that have it."""
    model, x, y = problem(net, samples)
    criterion, parameters = CrossEntropy(), list(model.parameters())
    yield Work("gradient", "PyTorch", lambda: torch.autograd.grad(criterion(model(x), y), parameters))

    operator = curvature.hessian(model, (x, y), "cross_entropy")
    exact = curvature.hessian(model, (x, y), "cross_entropy", exact=True)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    layers: dict[str, list[str]] = {}
    for name in operator.rows:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    weights = [name for name, p in model.named_parameters() if p.ndim > 1]
    block, part = operator.block(weights[-1], weights[0]), {weights[0]: v[weights[0]]}
    yield Work("quadratic form", "hessinit", lambda: operator.quadratic_form(v))
    yield Work("product", "hessinit", lambda: operator @ v)
    yield Work("exact product", "hessinit", lambda: exact @ v)
    yield Work("cross block", "hessinit", lambda: block @ part)
    yield Work("layer traces", "hessinit", lambda: operator.traces(1, groups=layers))
    yield Work("diagonal", "hessinit", lambda: operator.diagonal(1), lambda: operator.trace(PROBES))
    yield Work(TOP, "hessinit", lambda: exact.eigsh(k=1)[0])
    if net != "transformer":
        yield Work(FULL, "hessinit", operator.diagonal)

    for library, peer in PEERS.items():
        if version(library) and (net, library) != ("transformer", "BackPACK"):
            for work in peer(copy.deepcopy(model), criterion, x, y, list(v.values())):
                if net != "transformer":
                    yield work
                elif work.operation == "product" or (library, work.operation) == ("PyHessian", "exact product"):
                    yield replace(work, run=_unfused(work.run))


def curvlinops(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Iterator[Work]:
    """Its products."""
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    settings = {"params": list(model.parameters()), "data": [(x, y)], "check_deterministic": False}
    approximate = GGNLinearOperator(model, criterion, **settings)
    exact = HessianLinearOperator(model, criterion, **settings)
    yield Work("product", "curvlinops", lambda: approximate @ v)
    yield Work("exact product", "curvlinops", lambda: exact @ v)
    yield Work(TOP, "curvlinops", lambda: eigsh(exact.to_scipy(), 1, tol=1e-4, return_eigenvectors=False))


def pyhessian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Iterator[Work]:
    """Its product over a loader, that is without a graph kept from one product to the next."""
    from pyhessian import hessian

    computation = hessian(model, criterion, dataloader=[(x, y)], cuda=False)
    yield Work("exact product", "PyHessian", lambda: computation.dataloader_hv_product(v)[1])
    yield Work(TOP, "PyHessian", lambda: computation.eigenvalues()[0])


def backpack(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Iterator[Work]:
    """Its diagonals, from labels drawn by the model and from all columns of R; the gradient comes with them."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagGGNMC

    extended = extend(model, use_converter=True).eval()
    loss = extend(nn.CrossEntropyLoss())

    def diagonal(extension: Any) -> list[Tensor]:
        with backpack(extension):
            loss(extended(x), y).backward()
        found = [getattr(p, extension.savefield) for p in extended.parameters()]
        for p in extended.parameters():
            p.grad = None
            delattr(p, extension.savefield)
        return found

    one, many, full = DiagGGNMC(mc_samples=1), DiagGGNMC(mc_samples=PROBES), DiagGGNExact()
    yield Work("diagonal", "BackPACK", lambda: diagonal(one), lambda: sum(d.sum() for d in diagonal(many)))
    yield Work(FULL, "BackPACK", lambda: diagonal(full))


PEERS = {"curvlinops": curvlinops, "PyHessian": pyhessian, "BackPACK": backpack}


def version(library: str) -> str:
    """Of the installed package, or nothing."""
    try:
        return importlib.metadata.version(PACKAGES[library])
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unfused(run: Callable[[], Any]) -> Callable[[], Any]:
    def unfused() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    return unfused


def check(todo: Sequence[Work]) -> None:
    """Runs everything once, and compares the libraries' results."""
    ours: dict[str, Tensor] = {}
    for work in todo:
        result = work.run()
        if work.steady is not None:
            result = work.steady()
        parts = result.values() if isinstance(result, Mapping) else result
        parts = parts if isinstance(parts, Iterable) and not isinstance(parts, Tensor) else [parts]
        found = torch.cat([torch.as_tensor(part).detach().reshape(-1).double() for part in parts])
        expected = ours.setdefault(work.operation, found)
        error = float((found - expected).norm() / expected.norm())
        most = 0.2 if work.steady is not None else 0.1 if (work.operation, work.library) == (TOP, "PyHessian") else 1e-3
        assert error < most, f"{work.operation}, {work.library}: off by {error:.1e}"


def peak_memory(run: Callable[[], Any]) -> float:
    """Peak of the memory that torch hands out while something runs, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # negative where memory is given back
    del kept
    return float(np.cumsum(changes).max()) / 2**20


def compute(
    samples: Mapping[str, int] = SAMPLES, repetitions: int = 15, full_repetitions: int = 3
) -> Iterator[dict[str, Any]]:
    """One row a net, operation, library and repetition."""
    for net, batch in samples.items():
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # of the other libraries
            todo = list(works(net, batch))
            check(todo)
            peaks = [math.nan if work.operation == TOP else peak_memory(work.run) for work in todo]
            rows, gradient = [], float("nan")
            for repetition in range(repetitions):
                gc.collect()
                for work, peak in zip(todo, peaks, strict=True):
                    if work.operation in (FULL, TOP) and repetition >= full_repetitions:
                        continue
                    start = perf_counter()
                    work.run()
                    seconds = perf_counter() - start
                    gradient = seconds if work.operation == "gradient" else gradient
                    rows.append(
                        {
                            "net": net,
                            "samples": batch,
                            "operation": work.operation,
                            "library": work.library,
                            "version": version(work.library),
                            "torch": torch.__version__,
                            "threads": torch.get_num_threads(),
                            "peak_mib": peak,
                            "repetition": repetition,
                            "seconds": seconds,
                            "ratio": seconds / gradient,
                        }
                    )
        yield from rows


def draw(table: Any) -> Any:
    """A row of panels a net: times in units of the gradient's (medians and quartiles), and peak memory."""
    nets = list(dict.fromkeys(table.net))
    made, axes = plots.figure(len(nets), 2, 4.4, 3.1)
    for (times, memory), net in zip(axes, nets, strict=True):
        here = table[table.net == net]
        top, ticks = 0.0, {}
        for operation in (name for name in LABELS if name in set(here.operation)):
            libraries = [name for name in COLOURS if name in set(here.library[here.operation == operation])]
            for place, library in enumerate(libraries):
                rows = here[(here.operation == operation) & (here.library == library)]
                low, middle, high = rows.ratio.quantile([0.25, 0.5, 0.75])
                _bar(times, top - place, middle, LONGEST, COLOURS[library], (low, high))
                if operation != TOP:
                    _bar(memory, top - place, rows.peak_mib.iloc[0], math.inf, COLOURS[library])
            ticks[LABELS[operation]] = top - (len(libraries) - 1) / 2
            top -= len(libraries) + 0.5
        seconds = here.seconds[here.operation == "gradient"].median()
        times.set(xlim=(0, LONGEST), title=f"{net}, {here.samples.iloc[0]} samples: gradient {1e3 * seconds:.0f} ms")
        times.axvline(1, color=COLOURS["PyTorch"], linewidth=0.8)
        times.set_yticks(list(ticks.values()), list(ticks))
        memory.set_yticks(list(ticks.values()), [])
        memory.margins(x=0.15)
        for panel in (times, memory):
            panel.grid(visible=False, axis="y")
            panel.set_ylim(top + 0.8, 0.8)
    axes[-1, 0].set_xlabel(f"time / time of the gradient (cut off at {LONGEST:.0f})")
    axes[-1, 1].set_xlabel("peak memory, MiB")
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS[name], label=name) for name in COLOURS if name in set(table.library)]
    made.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False)
    return made


def _bar(
    axes: Any, y: float, value: float, longest: float, colour: str, quartiles: tuple[float, float] | None = None
) -> None:
    """A bar with its value, cut off at the longest."""
    axes.barh(y, min(value, longest), 0.9, color=colour)
    end = value
    if quartiles is not None and value < longest:
        axes.plot(quartiles, (y, y), color="black", linewidth=1)
        end = quartiles[1]
    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    inside = end > 0.9 * longest
    axes.annotate(
        text,
        (min(end, longest), y),
        (-3 if inside else 3, 0),
        textcoords="offset points",
        ha="right" if inside else "left",
        va="center",
        fontsize=9,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
