"""The comparison: baselines, training, the store, the command."""

import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import dense_truth
from torch import nn

import hessinit
from hessinit import curvature, rules
from hessinit.experiments import cli, data, kappa, models, plots, sweep, training
from hessinit.experiments.baselines import DEFAULT_ROWS, INITIALIZERS
from hessinit.experiments.sweep import Plan, Store, summaries

MINI = data.load("fashion_mnist_mini")
FIRST = data.Dataset("first", "here", MINI.x_train[:640], MINI.y_train[:640], MINI.x_test[:100], MINI.y_test[:100])
RUN = training.Run("mlp", "torch", "first", "he_normal", "relu", "sgd", 0.1, 2, 64, 0)


def run(**changed):
    return training.Run(**{**vars(RUN), **changed})


# what the source of each initializer states of its weights (fan_in n, fan_out m, layer k)
STATED = {
    "torch_default": lambda n, m, k: math.sqrt(1 / (3 * n)),
    "keras_default": lambda n, m, k: math.sqrt(2 / (n + m)),
    "he_normal": lambda n, m, k: math.sqrt(2 / n),
    "he_uniform": lambda n, m, k: math.sqrt(2 / n),
    "glorot_normal": lambda n, m, k: math.sqrt(2 / (n + m)),
    "glorot_uniform": lambda n, m, k: math.sqrt(2 / (n + m)),
    "lecun_normal": lambda n, m, k: math.sqrt(1 / n),
    "orthogonal": lambda n, m, k: math.sqrt(1 / max(n, m)),
    "orthogonal_gain": lambda n, m, k: math.sqrt(2 / max(n, m)),
    "slides": lambda n, m, k: math.sqrt(2 / (n + m)) if k == 0 else 0.3 * 0.8796,
    "he_warmup": lambda n, m, k: math.sqrt(2 / n),
    "zero_output": lambda n, m, k: math.sqrt(2 / n) if k < 2 else 0.0,
    # before the fit, as for the budget
    **dict.fromkeys(("lsuv", "lsuv_package"), lambda n, m, k: math.sqrt(1 / max(n, m))),
    **dict.fromkeys(("gradinit", "metainit", "autoinit"), lambda n, m, k: math.sqrt(2 / n)),
    "balanced": lambda n, m, k: rules.curvature_neutral_std(n, m, rules.gain("relu")),
    "closed_form": lambda n, m, k: rules.curvature_neutral_std(n, m, rules.gain("relu")),
    "budget": lambda n, m, k: rules.curvature_neutral_std(n, m, rules.gain("relu")),  # before the fit to the step
    "budget_unpaired": lambda n, m, k: rules.curvature_neutral_std(n, m, rules.gain("relu")),
}
WIDTHS = [784, 128, 84, 10]


@pytest.mark.parametrize("name", [name for name in INITIALIZERS if name != "fixup"])  # which is for residual nets
def test_baselines_have_the_scale_that_their_source_states(name):
    generator = torch.Generator().manual_seed(0)
    net = models.torch_mlp(WIDTHS, "relu")
    INITIALIZERS[name].torch(net, "relu", generator)
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for k, (layer, (n, m)) in enumerate(zip(layers, itertools.pairwise(WIDTHS), strict=True)):
        assert layer.weight.square().mean().sqrt().item() == pytest.approx(STATED[name](n, m, k), rel=0.08)
        assert bool((layer.bias == 0).all()) == (name != "torch_default")


@pytest.mark.parametrize("name", [name for name, one in INITIALIZERS.items() if one.keras])
def test_keras_baselines_have_the_same_scale(name):
    initializers = [INITIALIZERS[name].keras(k, "relu", 3, 0) for k in range(3)]
    net = models.keras_mlp(WIDTHS, "relu", initializers)
    for k, (layer, (n, m)) in enumerate(zip(net.layers, itertools.pairwise(WIDTHS), strict=True)):
        std = float(np.sqrt(np.mean(np.square(np.asarray(layer.get_weights()[0])))))
        assert std == pytest.approx(STATED[name](n, m, k), rel=0.08)


def test_arrays_that_may_not_be_written_to_are_trained_on_as_copies():
    """A cluster hands out such."""
    frozen = replace(
        FIRST, **{name: getattr(FIRST, name).copy() for name in ("x_train", "y_train", "x_test", "y_test")}
    )
    for name in ("x_train", "y_train", "x_test", "y_test"):
        getattr(frozen, name).setflags(write=False)
    assert training.train(RUN, frozen).train_loss == training.train(RUN, FIRST).train_loss  # and no warning
    assert kappa.measure(redraws([0]), frozen) == kappa.measure(redraws([0]), FIRST)


def test_the_default_rows_are_those_of_the_slides_and_ours():
    assert len(DEFAULT_ROWS) == 10
    assert ("orthogonal", "relu") in DEFAULT_ROWS
    assert {initializer for initializer, _ in DEFAULT_ROWS} <= set(INITIALIZERS)


def test_a_run_is_plain_sgd_with_reshuffled_batches():
    """The same loop, written out."""
    result = training.train(RUN, FIRST)
    net = models.torch_mlp(WIDTHS, "relu")
    INITIALIZERS["he_normal"].torch(net, "relu", torch.Generator().manual_seed(0))
    rng = np.random.default_rng([0, 0])
    x, y = torch.from_numpy(FIRST.x_train), torch.from_numpy(FIRST.y_train)
    losses = []
    for _ in range(2):
        order = rng.permutation(640)
        for start in range(0, 640, 64):
            batch = order[start : start + 64]
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p -= 0.1 * g
            losses.append(loss.item())
    assert result.status == "ok"
    assert result.train_loss == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), rel=1e-4)
    assert result.last_fifth_loss == pytest.approx(np.mean(losses[-2:]), rel=1e-4)
    assert result.curve == ((20, pytest.approx(np.mean(losses), rel=1e-4)),)
    assert 0 < result.init_seconds < result.seconds
    assert 0.2 < result.test_accuracy <= 1


@pytest.mark.parametrize("optimizer", sweep.OPTIMIZERS)
@pytest.mark.parametrize("framework", sweep.FRAMEWORKS)
def test_an_optimizer_takes_the_steps_of_its_formula(framework, optimizer):
    """On inputs of zero the last bias alone is trained."""
    x, y = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 1])
    zeros = data.Dataset("zeros", "here", x, y, x, y, outputs=2)
    b, mean, square = np.zeros(2), np.zeros(2), np.zeros(2)
    lr, decay = 0.3, {"torch": 0.01, "keras": 0.004}[framework] if optimizer == "adamw" else 0.0
    for step in range(1, 4):
        p = np.exp(b) / np.exp(b).sum()
        g = p - [0.25, 0.75]
        mean, square = 0.9 * mean + (g if optimizer == "momentum" else 0.1 * g), 0.999 * square + 0.001 * g**2
        adam = mean / (1 - 0.9**step) / np.sqrt(square / (1 - 0.999**step))
        b = b * (1 - lr * decay) - lr * {"sgd": g, "momentum": mean}.get(optimizer, adam)
    result = training.train(run(framework=framework, optimizer=optimizer, lr=lr, epochs=3), zeros)
    log_p = b - np.log(np.exp(b).sum())
    assert result.train_loss == pytest.approx(-log_p @ [0.25, 0.75], rel=1e-5)


@pytest.mark.parametrize("name", models.PROBLEMS)
def test_every_problem_trains_and_the_budget_fits_it(name):
    """From more than 0.9 of the loss of a uniform guess, or of the mean, to less, in 40 steps of Adam."""
    problem = models.PROBLEMS[name]
    whole = MINI if problem.dataset == "auto" else data.load(problem.dataset)
    few = replace(whole, x_train=whole.x_train[:640], y_train=whole.y_train[:640], x_test=whole.x_test[:50])
    few = replace(few, y_test=few.y_test[:50])
    activation = problem.activations[0]
    one = run(problem=name, initializer="budget", activation=activation, optimizer="adam", lr=1e-3, epochs=4)
    result = training.train(one, few, num_samples=64)
    guess = 1.0 if few.loss == "mse" else math.log(few.outputs)
    assert result.status == "ok"
    assert result.last_fifth_loss < 0.9 * guess
    net = training.torch_net(name, few, "budget", activation, seed=0)
    batch, options = (torch.from_numpy(few.x_train), torch.from_numpy(few.y_train)), {"num_samples": 64, "seed": 0}
    optimizer = torch.optim.Adam(net.parameters(), 1e-5)
    _, report = hessinit.init_(net, batch, few.loss, optimizer=optimizer, return_report=True, **options)
    assert report.calibration.passes <= 30
    for name, (low, high) in report.calibration.bounds.items():
        assert low * 0.999 <= report.calibration.scales[name] <= high * 1.001


def test_a_problem_whose_package_is_not_installed_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(models.PROBLEMS, "mlp", replace(models.PROBLEMS["mlp"], package="no_such_package"))
    with pytest.raises(ValueError, match=r"compare: problem mlp must have the package no_such_package; it is not inst"):
        Plan(rows=[("he_normal", "relu")])


def test_runs_repeat_and_seeds_matter():
    one, two, other = (training.train(run(seed=s), FIRST).train_loss for s in (1, 1, 2))
    assert one == two != other


def test_torch_and_keras_agree():
    """Same net, scale and batches; the spread of one seed is what differs."""
    losses = {
        framework: [
            training.train(run(framework=framework, initializer="closed_form", lr=0.05, seed=s), FIRST).train_loss
            for s in range(3)
        ]
        for framework in ("torch", "keras")
    }
    spread = max(np.std(v, ddof=1) for v in losses.values())
    assert abs(np.mean(losses["torch"]) - np.mean(losses["keras"])) < 4 * spread


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_diverged_run_is_a_row(framework):
    result = training.train(run(framework=framework, lr=1e12), FIRST)
    assert result.status.startswith("diverged at step ")
    assert math.isnan(result.last_fifth_loss)


def test_a_run_that_cannot_be_made_is_a_row(tmp_path):
    plan = Plan(rows=[("fixup", "relu"), ("he_normal", "relu")], seeds=1, epochs=1)
    runs = sweep.sweep(plan, FIRST, Store(tmp_path))
    rows = Store(tmp_path).rows_for(runs)
    assert rows[0]["status"].startswith("failed: ValueError: fixup_: model must have residual blocks")
    assert rows[0]["train_loss"] == "nan"
    assert rows[1]["status"] == "ok"
    assert [line.diverged for line in summaries(rows)] == [1, 0]


def test_the_store_resumes_and_drops_curves_without_a_row(tmp_path):
    plan = Plan(rows=[("he_normal", "relu"), ("closed_form", "tanh")], seeds=2, epochs=3)
    seen = []
    runs = sweep.sweep(plan, FIRST, Store(tmp_path), on_run=lambda run, result: seen.append(run))
    assert seen == runs == list(plan.runs("first"))
    again = Store(tmp_path)
    assert sweep.sweep(plan, FIRST, again, on_run=seen.append) == runs
    assert len(seen) == 4
    rows = again.rows_for(runs)
    assert [row["initializer"] for row in rows] == ["he_normal", "closed_form"] * 2
    assert {"problem", "framework", "dataset", "lr", "epochs", "seed", "train_loss", "last_fifth_loss"} <= set(rows[0])
    assert {"test_accuracy", "init_seconds", "seconds", "status", "optimizer", "activation"} <= set(rows[0])
    with (tmp_path / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 4  # 30 steps, a point every 20
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    (tmp_path / "runs.csv").write_text("\n".join(lines[:-1]) + "\n")  # as if stopped before the last row
    half = Store(tmp_path)
    assert len(half.points) == 3
    more = []
    sweep.sweep(plan, FIRST, half, on_run=lambda run, result: more.append(run))
    assert more == [runs[-1]]
    # the same but for the times
    strip = [",".join(line.split(",")[:-3]) for line in (tmp_path / "runs.csv").read_text().splitlines()]
    assert strip == [",".join(line.split(",")[:-3]) for line in lines]


def test_a_line_cut_short_is_made_again(tmp_path):
    plan = Plan(rows=[("he_normal", "relu"), ("slides", "relu")], seeds=1, epochs=1)
    for _ in range(2):
        sweep.sweep(plan, FIRST, Store(tmp_path))
        assert [len((tmp_path / name).read_text().splitlines()) for name in ("runs.csv", "curves.csv")] == [3, 3]
        text = (tmp_path / "runs.csv").read_text()
        (tmp_path / "runs.csv").write_text(text[:-9])
    assert len(Store(tmp_path).points) == 1
    (tmp_path / "runs.csv").write_text(text[:9])  # of the header
    assert Store(tmp_path).points == []


@pytest.mark.parametrize("framework", sweep.FRAMEWORKS)
def test_samples_kept_back_are_not_trained_on_and_have_a_loss(framework):
    result = training.train(run(framework=framework, validation=128), FIRST)
    few, held = FIRST.split(128)
    assert len(few.x_train) == 512
    assert {row.tobytes() for row in few.x_train}.isdisjoint(row.tobytes() for row in held[0])
    without = training.train(run(framework=framework), few)
    assert result.train_loss == without.train_loss
    assert math.isnan(without.validation_loss)
    alike = data.Dataset("alike", "here", np.ones((9, 4), np.float32), np.zeros(9, int), few.x_test, few.y_test)
    alike = replace(alike, x_test=alike.x_train, y_test=alike.y_train)
    found = training.train(run(framework=framework, validation=4), alike)
    assert found.validation_loss == pytest.approx(found.train_loss, rel=1e-5)
    assert result.train_loss < result.validation_loss < 2.3
    with pytest.raises(ValueError, match="validation must leave samples to train on; got 640 of 640"):
        training.train(run(validation=640), FIRST)


def test_processes_give_the_same_results(tmp_path):
    plan = Plan(rows=[("he_normal", "relu"), ("orthogonal", "relu")], epochs=1, seeds=2)
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    runs = sweep.sweep(plan, FIRST, one)
    sweep.sweep(plan, FIRST, two, jobs=2)
    losses = [[row["train_loss"] for row in store.rows_for(runs)] for store in (one, two)]
    assert losses[0] == losses[1]


def redraws(seeds=(0,), **changed):
    plain = {"problem": "mlp", "framework": "torch", "dataset": "first", "initializer": "slides", "activation": "relu"}
    return [kappa.Redraw(**{**plain, **changed}, seed=seed) for seed in seeds]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_kappa_is_that_of_the_dense_approximate_hessian(activation, monkeypatch):
    """Of each weight alone, along its gradient, on the first images."""
    monkeypatch.setattr(kappa, "IMAGES", 20)
    monkeypatch.setitem(models.PROBLEMS, "mlp", models.Problem("small", (5, 4)))
    few = data.Dataset("few", "here", MINI.x_train[:120, 300:308], MINI.y_train[:120], MINI.x_test, MINI.y_test)
    (found,) = kappa.measure(redraws([3], activation=activation), few)
    net = models.torch_mlp([8, 5, 4, 10], activation)
    INITIALIZERS["slides"].torch(net, activation, torch.Generator().manual_seed(kappa.FIRST_SEED + 3))
    batch = torch.from_numpy(few.x_train[:20]).double(), torch.from_numpy(few.y_train[:20])
    for k, value in zip((0, 2, 4), found, strict=True):
        hessian, _, g = dense_truth(net.double(), batch, nn.functional.cross_entropy, names=[f"{k}.weight"])
        assert value == pytest.approx(float(g @ hessian @ g / (g @ g)), rel=1e-4)


def test_a_keras_redraw_is_that_of_a_model_built_anew():
    (_, found), (direct,) = (kappa.measure(redraws(s, framework="keras"), FIRST) for s in ([5, 2], [2]))
    initializers = [INITIALIZERS["slides"].keras(k, "relu", 3, 1000 * (kappa.FIRST_SEED + 2)) for k in range(3)]
    net = models.keras_mlp(WIDTHS, "relu", initializers)
    batch = FIRST.x_train[:100], FIRST.y_train[:100]
    anew = curvature.rayleigh(net, batch, "cross_entropy", params="*/kernel")
    assert found == direct == pytest.approx(list(anew.values()), rel=1e-5)


def test_redraws_are_stored_once_and_whatever_the_order(tmp_path):
    rows = [("he_normal", "relu"), ("closed_form", "tanh")]
    seen = []
    draws = sweep.redraw(Plan(rows=rows, redraws=2), FIRST, Store(tmp_path), on_draws=seen.extend)
    assert seen == draws
    before = (tmp_path / "curvature.csv").read_text()
    header, *lines = before.splitlines()
    assert header == "problem,framework,dataset,initializer,activation,seed,layer,kappa"
    assert len(lines) == 2 * 2 * 3
    more = []
    store = Store(tmp_path)
    sweep.redraw(Plan(rows=rows, redraws=3), FIRST, store, on_draws=more.extend)
    assert [(draw.initializer, draw.seed) for draw in more] == [("he_normal", 2), ("closed_form", 2)]
    assert (tmp_path / "curvature.csv").read_text().startswith(before)
    assert store.kappas_for(draws) == Store(tmp_path).kappas[:12]
    two = Store(tmp_path / "two")
    sweep.redraw(Plan(rows=rows[::-1], redraws=3), FIRST, two, jobs=2)
    assert sorted(map(str, two.kappas)) == sorted(map(str, store.kappas))


def test_medians_are_of_each_layer_and_leave_out_what_has_no_kappa():
    rows = [
        {"initializer": "a", "activation": "relu", "layer": layer, "kappa": value}
        for layer, values in (("dense1", "1 9 nan 2"), ("dense2", "nan nan"))
        for value in values.split()
    ]
    (found,) = kappa.medians(rows).items()
    assert found == (("a", "relu"), [2.0, pytest.approx(math.nan, nan_ok=True)])


def test_summaries_are_means_and_sample_deviations():
    base = {"initializer": "a", "activation": "relu", "lr": "0.1", "seconds": "2", "test_accuracy": "0.5"}
    rows = [
        {**base, "train_loss": str(v), "last_fifth_loss": str(v), "status": s}
        for v, s in [(1.0, "ok"), (2.0, "ok"), (6.0, "diverged at step 3")]
    ]
    (line,) = summaries(rows)
    assert line.train_loss == pytest.approx((3.0, math.sqrt(7)))
    assert (line.seeds, line.diverged, line.seconds) == (3, 1, 2.0)
    assert math.isnan(summaries(rows[:1])[0].train_loss[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [("nope", "relu")]}, "initializers must be one of torch_default.*budget_unpaired; got 'nope'"),
        ({"rows": [("he_normal", "nope")]}, "activation must be one of relu, tanh, gelu, silu; got 'nope'"),
        ({"problem": "nope"}, "problem must be one of mlp, .*friedman; got 'nope'"),
        ({"problem": "vit", "rows": [("he_normal", "tanh")]}, "activation must be one of gelu, relu; got 'tanh'"),
        (
            {"framework": "keras", "problem": "lenet", "rows": [("he_normal", "relu")]},
            "problem must be of keras: mlp, .*; got 'lenet'",
        ),
        ({"optimizer": "nope"}, "optimizer must be one of sgd, momentum, adam, adamw; got 'nope'"),
        ({"framework": "nope"}, "framework must be one of torch, keras"),
        ({"framework": "keras"}, "initializers must be of keras: keras_default.*; got 'torch_default'"),
        ({"lrs": [0.0]}, "lr must be finite and greater than 0; got 0.0"),
        ({"lrs": [math.nan]}, "lr must be"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"batch_size": -1}, "batch-size must be at least 1; got -1"),
        ({"redraws": -1}, "redraws must be at least 0; got -1"),
        ({"validation": -1}, "validation must be at least 0; got -1"),
    ],
)
def test_bad_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)


def test_the_picture_has_a_line_for_each_row(tmp_path, monkeypatch):
    drawn, densities, names = [], [], ("he_normal", "lsuv", "budget")
    band, density = plots._band, plots._densities
    monkeypatch.setattr(plots, "_band", lambda *a: drawn.append(a[4]) or band(*a))
    monkeypatch.setattr(plots, "_densities", lambda *a: density(*a) or densities.append(a[0].get_lines()))
    key = {"activation": "relu", "lr": "0.1", "seed": "0"}
    points = [
        {**key, "initializer": name, "step": str(step), "loss": str(1 / step)} for name in names for step in (20, 40)
    ]
    kappas = [
        {**key, "initializer": name, "layer": layer, "kappa": value}
        for name in names
        for layer, values in (("dense1", "1 2 nan 4"), ("dense2", "3 3"), ("dense3", "nan"))
        for value in values.split()
    ]
    plots.comparison(points, [])
    assert drawn == [f"{one.label}, relu" for one in map(INITIALIZERS.get, names)]
    assert densities == []
    plots.comparison(points, kappas, "both columns").savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert drawn == 2 * [f"{one.label}, relu" for one in map(INITIALIZERS.get, names)]
    assert [len(lines) for lines in densities] == [2] * len(names)  # of dense3 there is nothing to draw
    smooth, bar = densities[0]
    x, y = smooth.get_xdata(), smooth.get_ydata()
    assert np.trapezoid(y, np.log10(x)) == pytest.approx(1, abs=0.01)  # a density of log10 κ
    assert list(bar.get_xdata()) == [3, 3]


@pytest.fixture
def here(monkeypatch, capsys):
    """The command in this process: its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hessinit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=printed.out, stderr=printed.err)

    return run


def command(*arguments, **keywords):
    """The command in a process of its own."""
    code = "from hessinit.experiments.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, **keywords
    )


ALONE = ("compare", "--jobs", "1")
SHORT = (
    *(*ALONE, "--dataset", "fashion_mnist_mini", "--epochs", "1", "--redraws", "3"),
    *("--initializers", "he_normal,closed_form"),
)


def test_the_command_prints_a_table_and_writes_four_files(here, tmp_path):
    done = here(*SHORT, "--seeds", "2", "--lr", "0.01,0.1", "--out", str(tmp_path / "a" / "b"))
    assert done.returncode == 0, done.stderr
    assert "fashion_mnist_mini from the package: 6,000 train" in done.stdout
    assert "closed form, relu" in done.stdout
    with (tmp_path / "a" / "b" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"ok"}
    loss = {
        (name, lr): np.mean([float(r["train_loss"]) for r in rows if (r["initializer"], r["lr"]) == (name, lr)])
        for name in ("he_normal", "closed_form")
        for lr in ("0.01", "0.1")
    }
    assert loss["closed_form", "0.01"] < loss["he_normal", "0.01"] - 0.1
    assert f"{loss['closed_form', '0.01']:.3f} ±" in done.stdout
    medians = kappa.medians(Store(tmp_path / "a" / "b").kappas)
    assert len(medians) == 2
    for values in medians.values():
        assert done.stdout.count(f" {kappa.as_text(values)} ") == 2  # a line a learning rate
    files = ["curvature.csv", "curves.csv", "curves.png", "runs.csv"]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == files


def test_the_command_without_redraws_measures_none_and_with_them_trains_nothing_again(here, tmp_path):
    done = here(*SHORT, "--seeds", "1", "--redraws", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "κ" not in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv", "curves.png", "runs.csv"]
    runs, picture = (tmp_path / "runs.csv").read_text(), (tmp_path / "curves.png").read_bytes()
    done = here(*SHORT, "--seeds", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "κ per layer" in done.stdout
    assert (tmp_path / "runs.csv").read_text() == runs
    assert (tmp_path / "curves.png").read_bytes() != picture
    assert len(Store(tmp_path).kappas) == 2 * 3 * 3


def test_several_problems_and_optimizers_in_one_command(here, tmp_path):
    some = (*ALONE, "--dataset", "digits", "--redraws", "0", "--epochs", "1", "--seeds", "1", "--lr", "0.01")
    names = ("--problem", "digits,mlp6", "--optimizer", "momentum,adam", "--initializers", "he_normal,budget")
    done = here(*some, *names, "--validation", "200", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = Store(tmp_path).rows
    assert {(row["problem"], row["optimizer"]) for row in rows} == set(
        itertools.product(("digits", "mlp6"), ("momentum", "adam"))
    )
    assert all(0 < float(row["validation_loss"]) < 10 for row in rows)
    assert len(list(tmp_path.glob("curves-*-*.png"))) == 4
    assert done.stdout.count("budget, relu") == 4


def test_a_cluster_has_the_results_of_one_machine(tmp_path):
    pytest.importorskip("dask.distributed")
    some = ("compare", "--dataset", "digits", "--problem", "digits", "--redraws", "0", "--epochs", "1", "--seeds", "2")
    arguments = (*some, "--initializers", "he_normal,budget")
    for jobs in (("--jobs", "1"), ("--jobs", "2", "--backend", "dask")):
        done = command(*arguments, *jobs, "--out", str(tmp_path / jobs[1]))
        assert done.returncode == 0, done.stderr
    one, two = (Store(tmp_path / name).rows for name in "12")
    losses = [{(row["initializer"], row["seed"]): row["train_loss"] for row in rows} for rows in (one, two)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_keras_default_rows_run_through_the_command(here, tmp_path):
    np.savez(
        tmp_path / "few.npz",
        **{
            k: v[:128]
            for k, v in zip(("x_train", "y_train", "x_test", "y_test"), data.read_npz(data.MINI), strict=True)
        },
    )
    arguments = (*ALONE, "--framework", "keras", "--dataset", str(tmp_path / "few.npz"), "--seeds", "1")
    done = here(*arguments, "--epochs", "1", "--redraws", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert len(Store(tmp_path / "out").kappas) == 8 * 3  # none of the budget, which has no weights without a step
    with (tmp_path / "out" / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initializers", "nope"], "initializers must be one of torch_default"),
        (["--lr", "0"], "lr must be finite and greater than 0; got 0.0"),
        (["--lr", "fast"], "lr must be numbers separated by commas; got 'fast'"),
        (["--seeds", "many"], "--seeds"),
        (["--jobs", "0"], "jobs must be at least 1; got 0"),
        (["--redraws", "-1"], "redraws must be at least 0; got -1"),
        (["--problem", "mlp,nope"], "friedman; got 'nope'"),
        (["--optimizer", "sgd,nope"], "optimizer must be one of sgd, momentum, adam, adamw; got 'nope'"),
        (["--backend", "nope"], "backend must be one of loky, dask, ray; got 'nope'"),
        (["--cluster", "here"], "cluster must be of dask or ray; got 'here' with backend 'loky'"),
        (["--dataset", "mnist"], "dataset must be one of auto"),
        (["--out", "/dev/null/x"], "out must be a folder that can be written"),
        (["--nope"], "--nope"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(here, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here("compare", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("hessinit: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.csv"))


def test_bad_data_is_one_line_and_exit_code_two(here, tmp_path):
    raw = dict(zip(("x_train", "y_train", "x_test", "y_test"), data.read_npz(data.MINI), strict=True))
    np.savez(tmp_path / "nan.npz", **{**raw, "x_train": np.full((6000, 784), np.nan)})
    np.savez(tmp_path / "labels.npz", **{**raw, "y_train": raw["y_train"] + 5})
    for name, message in (("nan", "must be finite"), ("labels", "must be integers 0 … 9")):
        done = here("compare", "--dataset", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / "out"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr


def test_a_folder_of_other_files_is_refused(here, tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    done = here(*SHORT, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "with other columns" in done.stderr
    assert (tmp_path / "runs.csv").read_text() == "a,b\n1,2\n"


def test_an_interruption_leaves_whole_files_and_the_command_goes_on(here, tmp_path):
    code = "from hessinit.experiments.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *SHORT, "--jobs", "2", "--seeds", "40", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline, runs = time.monotonic() + 120, tmp_path / "runs.csv"
    while not (runs.exists() and runs.stat().st_size) and time.monotonic() < deadline:  # written after the curves
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "hessinit: stopped; the same command goes on from here."
    store = Store(tmp_path)
    assert 0 < len(store.rows) < 80
    assert all(len(row) == len(sweep.COLUMNS) and row["status"] == "ok" for row in store.rows)
    seeds = max(int(row["seed"]) for row in store.rows) + 1
    done = here(*SHORT, "--seeds", str(seeds), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{len(store.rows)} of {2 * seeds} runs found in" in done.stdout.replace("\n", " ")


def test_help_names_the_command():
    done = command()
    assert done.returncode == 0
    assert "compare" in done.stdout
