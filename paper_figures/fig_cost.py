"""What curvature costs in time and memory, in units of the plain gradient, and the error that it has, by library.

Four nets in float32, random inputs, cross-entropy: an MLP 784-512-512-10 (ReLU, 512 samples), LeNet-5 (ReLU, 128 images
of 28 × 28), ResNet-18 (batch norm in evaluation mode, 64 images of 64 × 64) and a GPT of 10.7 million parameters (six
blocks of width 384, 96 tokens, 4 texts of 128). The gradient is the user's: ``model(x)``, the loss,
``torch.autograd.grad``.

* Time: operators are built and every operation is run once before the clock starts. A repetition runs all operations
  one after the other, the gradient first, and each time is divided by that gradient's; every repetition is a row.
* Memory: the peak of what torch's allocator has handed out since the operation began (its result included), from the
  allocations that ``torch.profiler`` records in one more run. Unlike the process's resident size it does not depend on
  what ran before; it does not see NumPy's arrays nor oneDNN's scratch space.
* Error: of a product, form or diagonal in full, the distance to ours in float64, relative to its length. Of a layer's
  trace or of a diagonal by one random vector, the standard deviation over its size (of traces the root mean square
  over layers), from 128 vectors, on the two large nets from 16: to an error ε it takes ``(error / ε)²`` of them. G and
  the exact H have one diagonal on the first three nets; on the GPT they do not.
* The largest eigenvalue is that of the exact Hessian, to 1 % of its value: each library with the loosest of some
  settings (tolerance, number of steps; in the table) that gets there. PyHessian keeps its graph over the steps of an
  eigenvalue, as we do; its product is from its loader, without one, as all libraries' are. That curvlinops' Lanczos
  takes at least 20 products is SciPy's default; its exact product on the GPT is off by the error in the table (the
  layer norms' weights), and so is its eigenvalue.
* Hutchinson: ``v ⊙ H v`` by a double backward pass, the estimator of AdaHessian (Z. Yao et al., AAAI 2021).
* Left out, all on the GPT: BackPACK, which has no rule for layer norm and attention; the diagonal in full, a backward
  pass for each of 49,152 outputs. A library that is not installed has no rows. The GPT's fused attention has neither
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
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from cost import CrossEntropy, layers, peak_memory, problem
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessinit import curvature
from hessinit.experiments import plots

SAMPLES = {"MLP": 512, "LeNet-5": 128, "ResNet-18": 64, "GPT": 4}
LONGEST = 6.0  # bar of times
VECTORS = {"MLP": 128, "LeNet-5": 128}  # behind the errors of random ones; of other nets 16
CLOSE = 0.01  # asked of eigenvalues
TRACES, DIAGONAL, FULL, TOP = "layer traces", "diagonal", "diagonal, in full", "largest eigenvalue"
RANDOM, SLOW = (TRACES, DIAGONAL), (FULL, TOP)
LABELS = {
    "gradient": "gradient",
    "quadratic form": "quadratic form $v^T\\!Gv$",
    "product": "product $Gv$",
    "exact product": "exact product $Hv$",
    "cross block": "cross block $G_{ab}v_b$",
    TRACES: "layers' traces, 1 probe",
    DIAGONAL: "diagonal, 1 probe",
    FULL: FULL,
    TOP: "largest eigenvalue of $H$",
}
COLOURS = {
    "PyTorch": plots.COLOURS["torch_default"],
    "hessinit": plots.COLOURS["closed_form"],
    "curvlinops": plots.COLOURS["he_normal"],
    "PyHessian": plots.COLOURS["glorot_normal"],
    "hessian-eigenthings": plots.COLOURS["slides"],
    "BackPACK": plots.COLOURS["orthogonal"],
    "Hutchinson": plots.COLOURS["lsuv"],
}
PACKAGES = {"PyTorch": "torch", "curvlinops": "curvlinops-for-pytorch", "BackPACK": "backpack-for-pytorch"}
PACKAGES |= {"Hutchinson": "torch"}


@dataclass(frozen=True)
class Work:
    """An operation that a library is asked for.

    Args:
        operation: one of ``LABELS``.
        library: one of ``COLOURS``.
        run: does it, with the setting for eigenvalues, with a seed for random ones; returns a number or tensors.
        settings: from the loosest to the strictest.
    """

    operation: str
    library: str
    run: Callable[[Any], Any]
    settings: Sequence[Any] = (0,)


def works(net: str, samples: int) -> Iterator[Work]:
    """All operations on a net, each in the libraries that have it."""
    model, x, y = problem(net, samples)
    criterion, parameters = CrossEntropy(), list(model.parameters())
    v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    yield Work("gradient", "PyTorch", lambda _: torch.autograd.grad(criterion(model(x), y), parameters))
    yield from ours(model, x, y, v, full="GPT" not in net)
    for library, peer in PEERS.items():
        if version(library) and not ("GPT" in net and library == "BackPACK"):
            for work in peer(copy.deepcopy(model), criterion, x, y, v):
                run = _unfused(work.run) if "GPT" in net else work.run
                yield Work(work.operation, library, run, work.settings)


def ours(model: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor], full: bool = False) -> Iterator[Work]:
    """This library's."""

    def operator(seed: int = 0, exact: bool = False) -> curvature.Hessian:
        return curvature.hessian(model, (x, y), "cross_entropy", exact=exact, seed=seed)

    approximate, exact, seeded = operator(), operator(exact=True), cache(operator)
    weights = [name for name, p in model.named_parameters() if p.ndim > 1]
    block, part, groups = approximate.block(weights[-1], weights[0]), {weights[0]: v[weights[0]]}, layers(model)
    yield Work("quadratic form", "hessinit", lambda _: approximate.quadratic_form(v))
    yield Work("product", "hessinit", lambda _: approximate @ v)
    yield Work("exact product", "hessinit", lambda _: exact @ v)
    yield Work("cross block", "hessinit", lambda _: block @ part)
    yield Work(TRACES, "hessinit", lambda seed: seeded(seed).traces(1, groups=groups))
    yield Work(DIAGONAL, "hessinit", lambda seed: seeded(seed).diagonal(1))
    yield Work(TOP, "hessinit", lambda tol: exact.eigsh(1, tol=tol)[0], (0.3, 0.1, 0.03, 0.01, 0.001))
    if full:
        yield Work(FULL, "hessinit", lambda _: approximate.diagonal())


Peer = Iterator[Work]


def curvlinops(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> Peer:
    """Its products, and SciPy's eigenvalues of them."""
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    settings = {"params": list(model.parameters()), "data": [(x, y)], "check_deterministic": False}
    approximate = GGNLinearOperator(model, criterion, **settings)
    exact, vectors = HessianLinearOperator(model, criterion, **settings), list(v.values())
    yield Work("product", "", lambda _: approximate @ vectors)
    yield Work("exact product", "", lambda _: exact @ vectors)

    def largest(tol: float) -> Any:
        return eigsh(exact.to_scipy(), 1, tol=tol, return_eigenvectors=False)

    yield Work(TOP, "", largest, (0.3, 0.1, 0.03, 0.01, 0.001))


def pyhessian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> Peer:
    """Its product over a loader, and its power iteration."""
    from pyhessian import hessian

    computation, vectors = hessian(model, criterion, dataloader=[(x, y)], cuda=False), list(v.values())
    yield Work("exact product", "", lambda _: computation.dataloader_hv_product(vectors)[1])

    def largest(tol: float) -> Any:
        torch.manual_seed(0)
        values, _ = hessian(model, criterion, data=(x, y), cuda=False).eigenvalues(tol=tol)
        model.zero_grad()
        return values[0]

    yield Work(TOP, "", largest, (1e-1, 1e-2, 1e-3, 1e-4, 1e-5))


def eigenthings(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> Peer:
    """Its products and its Lanczos."""
    from hessian_eigenthings import (
        GGNOperator,
        HessianOperator,
        lanczos,
        supervised_forward,
        supervised_loss,
        supervised_loss_of_output,
    )

    data, flat = [(x, y)], torch.cat([t.reshape(-1) for t in v.values()])
    exact = HessianOperator(model, data, supervised_loss(criterion))
    approximate = GGNOperator(model, data, supervised_forward, supervised_loss_of_output(criterion))
    yield Work("product", "", lambda _: approximate.matvec(flat))
    yield Work("exact product", "", lambda _: exact.matvec(flat))
    steps = (4, 6, 8, 10, 12, 16, 20, 30)
    yield Work(TOP, "", lambda number: lanczos(exact, k=1, max_iter=number, seed=0).eigenvalues, steps)


def backpack(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> Peer:
    """Its diagonals, from labels drawn by the model and from all columns of R; the gradient comes with them."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagGGNMC

    names = {id(p): name for name, p in model.named_parameters()}
    groups = layers(model)
    extended = extend(model, use_converter=True).eval()
    loss = extend(nn.CrossEntropyLoss())

    def diagonal(extension: Any, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        with backpack(extension):
            loss(extended(x), y).backward()
        found = {names[id(p)]: getattr(p, extension.savefield) for p in extended.parameters()}
        for p in extended.parameters():
            p.grad = None
            delattr(p, extension.savefield)
        return {name: found[name] for name in v}

    one, full = DiagGGNMC(mc_samples=1), DiagGGNExact()
    yield Work(TRACES, "", lambda seed: _by_layer(diagonal(one, seed), groups))
    yield Work(DIAGONAL, "", lambda seed: diagonal(one, seed))
    yield Work(FULL, "", lambda seed: diagonal(full, seed))


def hutchinson(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, v: Mapping[str, Tensor]) -> Peer:
    """``v ⊙ H v`` for random signs v, and its sums over layers."""
    parameters, groups = list(model.parameters()), layers(model)

    def diagonal(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        signs = [torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1.0 for p in parameters]
        gradient = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
        product = torch.autograd.grad(gradient, parameters, signs)
        return {name: s * h for name, s, h in zip(v, signs, product, strict=True)}

    yield Work(TRACES, "", lambda seed: _by_layer(diagonal(seed), groups))
    yield Work(DIAGONAL, "", diagonal)


PEERS: dict[str, Callable[..., Peer]] = {
    "curvlinops": curvlinops,
    "PyHessian": pyhessian,
    "hessian-eigenthings": eigenthings,
    "BackPACK": backpack,
    "Hutchinson": hutchinson,
}


def _by_layer(diagonal: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    return {layer: float(sum(diagonal[name].sum() for name in names)) for layer, names in groups.items()}


def version(library: str) -> str:
    """Of the installed package, or nothing."""
    try:
        return importlib.metadata.version(PACKAGES.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unfused(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def unfused(setting: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return run(setting)

    return unfused


def references(net: str, samples: int) -> dict[str, Tensor]:
    """What each operation without random numbers should give: ours in float64."""
    model, x, y = problem(net, samples)
    v = {name: torch.randn_like(p).double() for name, p in model.named_parameters()}
    x = x.double() if x.is_floating_point() else x
    todo = ours(model.double(), x, y, v, full="GPT" not in net)
    return {w.operation: _flat(w.run(w.settings[-1])) for w in todo if w.operation not in RANDOM}


def error(work: Work, references: Mapping[str, Tensor], vectors: int) -> tuple[Any, float]:
    """The setting that an operation takes, and its error as the module's docstring has it."""
    if work.operation == "gradient":
        work.run(0)
        return 0, 0.0
    if work.operation in RANDOM:
        draws = torch.stack([_flat(work.run(seed)) for seed in range(vectors)])
        mean, variance = draws.mean(0), draws.var(0)
        if work.operation == TRACES:
            return 0, float((variance / mean**2).mean() ** 0.5)
        return 0, float((variance.sum() / (mean.square().sum() - variance.sum() / vectors)).abs() ** 0.5)
    true = references[work.operation]
    for setting in work.settings:
        found = float((_flat(work.run(setting)) - true).norm() / true.norm())
        if work.operation != TOP or found <= CLOSE:
            break
    assert found < 0.1, f"{work.operation}, {work.library}: off by {found:.1e}"
    return setting, found


def _flat(result: Any) -> Tensor:
    """Numbers or tensors, in a sequence or by name, as one vector in float64."""
    parts = result.values() if isinstance(result, Mapping) else result
    parts = parts if isinstance(parts, Iterable) and not isinstance(parts, Tensor) else [parts]
    return torch.cat([torch.as_tensor(part).detach().reshape(-1).double() for part in parts])


def compute(
    samples: Mapping[str, int] = SAMPLES,
    repetitions: int = 9,
    slow_repetitions: int = 3,
    done: Iterable[Mapping[str, str]] = (),
) -> Iterator[dict[str, Any]]:
    """One row a net, operation, library and repetition, of the nets that are not done."""
    finished = {row["net"] for row in done}
    for net, batch in ((net, batch) for net, batch in samples.items() if net not in finished):
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # of the other libraries
            true = references(net, batch)
            todo = []
            for work in works(net, batch):
                setting, off = error(work, true, VECTORS.get(net, 16))
                run = partial(work.run, setting)
                todo.append((work, run, setting, off, math.nan if work.operation == TOP else peak_memory(run)))
            rows, gradient = [], float("nan")
            for repetition in range(repetitions):
                gc.collect()
                for work, run, setting, off, peak in todo:
                    if work.operation in SLOW and repetition >= slow_repetitions:
                        continue
                    start = perf_counter()
                    run()
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
                            "setting": setting,
                            "error": off,
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
    made.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False)
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


ROWS = (  # of the README: operation, what it is called there, libraries besides ours
    ("quadratic form", "`vᵀGv`", ()),
    ("product", "`G v`", ("curvlinops", "hessian-eigenthings")),
    ("exact product", "exact `H v`", ("PyHessian", "hessian-eigenthings")),
    (TRACES, "all layers' traces, one probe", ("BackPACK", "Hutchinson")),
    (DIAGONAL, "diagonal, one probe", ("BackPACK", "Hutchinson")),
    (FULL, FULL, ("BackPACK",)),
    (TOP, "largest eigenvalue of `H`, to 1 %", ("curvlinops", "PyHessian", "hessian-eigenthings")),
)


def readme_rows(table: Any) -> list[list[str]]:
    """An operation and library a row: median time in gradients; of random ones the error of one probe in brackets."""
    medians, found = table.groupby(["operation", "library", "net"])[["ratio", "error"]].median(), []
    for operation, name, libraries in ROWS:
        for library in ("hessinit", *libraries):
            cells = []
            for key in ((operation, library, net) for net in SAMPLES):
                if key not in medians.index:
                    cells.append("–")
                    continue
                ratio, off = medians.loc[key]
                error = f" ({off:.1%})" if off < 0.1 else f" ({off:.0%})"
                cells.append((f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}") + error * (operation in RANDOM))
            found.append([name if library == "hessinit" else f"… {library}", *cells])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.figure_script(Path(__file__).with_suffix(""), compute, draw)
