"""The command line: ``hessinit compare``, ``hessinit figures`` and ``hessinit inspect``."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from hessinit.experiments.sweep import Plan, Store, Summary

app = typer.Typer(
    add_completion=False,
    help="Initial weights of neural networks from the curvature of their loss.",
)


@app.command()
def compare(
    initializers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names, of torch_default, keras_default, he_normal, he_uniform, glorot_normal, "
            "glorot_uniform, lecun_normal, orthogonal, orthogonal_gain, slides, he_warmup, zero_output, lsuv, "
            "lsuv_package, gradinit, metainit, autoinit, fixup, balanced, closed_form, budget and budget_unpaired; "
            "default: the rows of the slides' Figure 4, the closed form and the budget."
        ),
    ] = None,
    activation: Annotated[str | None, typer.Option(help="relu, tanh, gelu or silu, comma-separated.")] = None,
    problem: Annotated[
        str,
        typer.Option(
            help="mlp (784-128-84-10), mlp2, mlp6, mlp12, mlp30, mlp50, mlp100, mlp_wide, lenet, resnet_bn, resnet, "
            "vit, charlm, post_norm4, post_norm8, digits, friedman or, with transformers, gpt2, opt, bert, llama, "
            "gemma, falcon, gpt_neox, mixtral, convnext, regnet or poolformer; comma-separated."
        ),
    ] = "mlp",
    optimizer: Annotated[str, typer.Option(help="sgd, momentum (0.9), adam or adamw; comma-separated.")] = "sgd",
    lr: Annotated[str, typer.Option(help="Learning rates, comma-separated.")] = "0.01",
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the train set.")] = 2,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 64,
    dataset: Annotated[
        str,
        typer.Option(
            help="auto (the problem's own; of images the full set if on disk, else the subset), fashion_mnist, "
            "fashion_mnist_mini, digits, friedman, topics, or an .npz file."
        ),
    ] = "auto",
    framework: Annotated[str, typer.Option(help="torch or keras (backend: KERAS_BACKEND).")] = "torch",
    redraws: Annotated[int, typer.Option(help="Redraws of the initial weights for κ; 0 for none.")] = 100,
    validation: Annotated[int, typer.Option(help="Train samples kept back, to choose a learning rate by.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; with a cluster, tasks at once.")] = 2,
    backend: Annotated[
        str, typer.Option(help="Of joblib: loky, or dask or ray for a cluster, where these are installed.")
    ] = "loky",
    cluster: Annotated[str | None, typer.Option(help="Address of the cluster's scheduler.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of runs.csv, curves.csv, curvature.csv and curves.png.")] = Path(
        "runs"
    ),
) -> None:
    """Trains the same net from each initializer, over seeds, and prints what became of it.

    A stopped command, given again, goes on where it was. The table has means and sample standard deviations over seeds;
    "2 of 3" seeds means that one diverged. Train loss is that of the whole train set after training. κ is the curvature
    of the loss along each layer's gradient before training, the median over redraws. Of several problems or optimizers
    each has its table and its picture, curves-PROBLEM-OPTIMIZER.png.
    """
    from rich.console import Console

    from hessinit.experiments import parallel
    from hessinit.experiments.sweep import Plan, Store, rows_of

    if jobs < 1:
        raise ValueError(f"compare: jobs must be at least 1; got {jobs}.")
    lrs = _numbers(lr)
    plans = [
        Plan(
            rows=rows_of(initializers, activation, framework),
            lrs=lrs,
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            problem=one,
            optimizer=other,
            framework=framework,
            validation=validation,
            redraws=redraws,
        )
        for one, other in itertools.product(problem.split(","), optimizer.split(","))
    ]
    store, console = Store(out), Console()
    with parallel.on(backend, cluster):
        for plan in plans:
            picture = "curves.png" if len(plans) == 1 else f"curves-{plan.problem}-{plan.optimizer}.png"
            _compare(plan, dataset, store, jobs, out / picture, console)


def _compare(plan: Plan, dataset: str, store: Store, jobs: int, picture: Path, console: Console) -> None:
    """One problem and optimizer: runs, redraws, table and picture."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hessinit.experiments import data, plots
    from hessinit.experiments.kappa import medians
    from hessinit.experiments.models import PROBLEMS
    from hessinit.experiments.sweep import redraw, summaries, sweep

    problem = PROBLEMS[plan.problem]
    loaded = data.load(problem.dataset if dataset == "auto" else dataset)
    size = f"{len(loaded.x_train):,} train and {len(loaded.x_test):,} test samples"
    console.print(f"{loaded.name} from {loaded.source}: {size}", highlight=False)
    total = len(list(plan.runs(loaded.name)))
    done = len(store.rows_for(plan.runs(loaded.name)))
    if done:
        console.print(f"{done} of {total} runs found in {store.folder}", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, completed=done)
        runs = sweep(plan, loaded, store, jobs, lambda run, result: bar.advance(task))
        bar.stop_task(task)
        if plan.redraws:
            planned = list(plan.draws(loaded.name))
            left = len(store.missing_draws(planned))
            second = bar.add_task("redraws", total=len(planned), completed=len(planned) - left)
            redraw(plan, loaded, store, jobs, lambda group: bar.advance(second, len(group)))
    kappas = store.kappas_for(plan.draws(loaded.name))
    title = f"{problem.title} on {loaded.name}, {plan.optimizer}, {plan.framework}"
    console.print(title, highlight=False)
    console.print(_table(summaries(store.rows_for(runs)), medians(kappas)))
    plots.comparison(store.points_for(runs), kappas, title).savefig(picture, dpi=120)
    names = ["runs.csv", "curves.csv", *(["curvature.csv"] if plan.redraws else []), picture.name]
    console.print(f"Wrote {', '.join(names)} to {store.folder}", highlight=False)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"compare: lr must be numbers separated by commas; got {text!r}.") from None


def _table(lines: list[Summary], kappas: Mapping[tuple[str, str], Sequence[float]]) -> object:
    from rich import box
    from rich.table import Table

    from hessinit.experiments.baselines import INITIALIZERS
    from hessinit.experiments.kappa import as_text

    table = Table("initializer", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for head in (*(["κ per layer"] if kappas else []), "lr", "train loss", "test\naccuracy", "time\nin s", "seeds"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            f"{INITIALIZERS[line.initializer].label}, {line.activation}",
            *([as_text(kappas.get((line.initializer, line.activation), [])) or "–"] if kappas else []),
            f"{line.lr:g}",
            f"{line.train_loss[0]:.3f} ± {line.train_loss[1]:.3f}",
            f"{line.test_accuracy[0]:.3f}",
            f"{line.seconds:.1f}",
            f"{line.seeds - line.diverged} of {line.seeds}" if line.diverged else str(line.seeds),
        )
    return table


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="Of scripts, such as fig3_error; default: all.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Make the tables anew first: hours for all.")] = False,
    folder: Annotated[Path, typer.Option(help="The folder paper_figures of a checkout.")] = Path("paper_figures"),
) -> None:
    """Draws the figures of the papers and of the README from their tables, a PNG and a PDF each.

    A stopped --recompute, given again, goes on where it was for the tables of training runs.
    """
    scripts = {path.stem: path for path in sorted(folder.glob("fig*.py"))}
    if not scripts:
        raise ValueError(f"figures: folder must be paper_figures of a checkout; got {str(folder)!r}.")
    for name in names or scripts:
        if name not in scripts:
            raise ValueError(f"figures: names must be of {', '.join(scripts)}; got {name!r}.")
    for name in names or scripts:
        print(name, flush=True)
        done = subprocess.run([sys.executable, scripts[name], *(["--recompute"] if recompute else [])], check=False)
        if done.returncode:
            raise ValueError(f"figures: {name} failed with exit code {done.returncode}.")


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="package.module:factory",
            help="A function or class that gives a model without arguments, or a model.",
        ),
    ],
    input_shape: Annotated[str, typer.Option(help="Shape of one sample, such as 1,28,28.")],
    batch_size: Annotated[int, typer.Option(min=2, help="Samples, from a standard normal distribution.")] = 64,
    integers: Annotated[
        int | None, typer.Option(min=1, help="For a model of tokens: samples are integers below this number.")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of classes, where the outputs are logits; 0 where they are none. Default: the outputs' last "
            "axis, of two or three.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the samples, and of the factory's draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Shows what the signals of a model are like before training, and warns of what is wrong with them.

    The model is one of your own code, found from the current directory as by python -m, with the weights that it has;
    none are set. Warned of are dead units, vanished and exploding signals, tied weights, and a first loss far from that
    of a uniform guess.
    """
    from hessinit import inspection

    try:
        shape = [int(size) for size in input_shape.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1:
        raise ValueError(f"inspect: input_shape must be positive integers with commas between; got {input_shape!r}.")
    with contextlib.redirect_stdout(sys.stderr):  # what the model's own code prints
        model = _model(target, seed)
        try:
            inputs = inspection.random_inputs(model, shape, batch_size=batch_size, integers=integers, seed=seed)
            found = inspection.inspect(model, inputs, classes=classes)
        except ValueError as error:
            tokens = integers is None and "embedding" in str(error).lower()
            hint = "; tokens need --integers" if tokens else "" if integers is None else f" --integers {integers}"
            raise ValueError(f"{error} (--input-shape {input_shape}{hint})") from error
    print(found.to_json() if as_json else found)


def _model(target: str, seed: int) -> Any:
    """The model that ``package.module:factory`` names or makes."""
    from hessinit.networks import wrap

    def failure(what: str, error: BaseException) -> ValueError:
        return ValueError(f"inspect: target must be {what}; got {target!r} and {type(error).__name__}: {error}")

    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"inspect: target must be package.module:factory; got {target!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise failure("importable", error) from error
    _set_seed(seed)
    with contextlib.suppress(TypeError):
        wrap(found, "inspect")
        return found  # a model is callable too
    try:
        made: Any = found() if callable(found) else found
    except (Exception, SystemExit) as error:
        raise failure("a factory that works without arguments", error) from error
    try:
        wrap(made, "inspect")
    except TypeError as error:
        raise ValueError(f"{str(error).rstrip('.')} from {target!r}.") from error
    return made


def _set_seed(seed: int) -> None:
    """Seeds every global random state that a factory may draw from."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(seed)


def main() -> None:
    """Runs the command line: exit code 2 and one line for bad input, 130 for an interruption."""
    # Read when NumPy is loaded. Beside other work, matrices this small take a hundred times longer on two threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        if code != 130:  # typer's word for an interruption
            sys.exit(code)
        raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        again = "; the same command goes on from here" if "compare" in sys.argv[1:2] else ""
        print(f"hessinit: stopped{again}.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a refusal of typer's own, whichever click it carries, has it
            raise
        message = str(error.format_message())
    print(f"hessinit: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
