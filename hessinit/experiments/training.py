"""One training run: a row of results and its loss curve."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hessinit.experiments import baselines, models
from hessinit.experiments.data import Dataset, Samples

EVERY = 20  # steps between points of a curve; a point is the mean loss of the batches since the last


@dataclass(frozen=True)
class Run:
    """What is trained. Two equal runs give equal results on one machine.

    ``validation`` samples of the train set, the same for every seed, are kept back.
    """

    problem: str
    framework: str
    dataset: str
    initializer: str
    activation: str
    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    seed: int
    validation: int = 0


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        train_loss: mean over all that was trained on, after training: cross-entropy, or mean squared error.
        validation_loss: the same of what was kept back; NaN where nothing was.
        last_fifth_loss: mean loss of the batches of the last fifth of the last epoch.
        test_accuracy: after training: share of right labels, or of the targets' variance that is explained.
        init_seconds: time of building and initialising the net, part of ``seconds``.
        seconds: initialization and training.
        status: "ok", or "diverged at step N"; training stops there, or at the end of that epoch. Or "failed: " and the
            error.
        curve: (step, mean loss since the last point).
    """

    train_loss: float
    validation_loss: float
    last_fifth_loss: float
    test_accuracy: float
    init_seconds: float
    seconds: float
    status: str
    curve: tuple[tuple[int, float], ...]

    def row(self) -> dict[str, Any]:
        """All but the curve."""
        row = asdict(self)
        del row["curve"]
        return row


def as_text(value: object) -> str:
    """A value as tables have it: six digits.

    Example:
        >>> as_text(1 / 3), as_text(7)
        ('0.333333', '7')
    """
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def train(run: Run, data: Dataset, **calibration: Any) -> Result:
    """Trains one net: batches reshuffled each epoch from the run's seed, the last short one kept.

    Args:
        run: what to train.
        data: on what.
        calibration: keywords of the fit, of an initializer that has one; of :func:`hessinit.init_` for the budget.
    """
    kept, held = data.split(run.validation)
    try:
        return {"torch": _train_torch, "keras": _train_keras}[run.framework](run, kept, held, calibration)
    except Exception as error:  # as of a method that is not for this net, or a package that is not installed
        nothing = math.nan
        status = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        return Result(nothing, nothing, nothing, nothing, nothing, nothing, status, ())


def torch_net(problem: str, data: Dataset, initializer: str, activation: str, seed: int) -> Any:
    """A net of a problem with its initial weights, before any fit to the step; the seed decides all of them."""
    import torch

    initialise = baselines.INITIALIZERS[initializer].torch
    assert initialise is not None  # checked when the sweep is planned
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = models.PROBLEMS[problem].torch(data, activation)
    initialise(model, activation, torch.Generator().manual_seed(seed))
    return model


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch, if it is in use, on one thread: layers this small are slower on more."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(threads)


def _orders(run: Run, samples: int) -> list[np.ndarray[Any, Any]]:
    """The order of samples in each epoch: the same for all initializers and both frameworks."""
    rng = np.random.default_rng([run.seed, 0])
    return [rng.permutation(samples) for _ in range(run.epochs)]


def _fit(
    run: Run,
    model: Any,
    x: Any,
    y: Any,
    calibration: dict[str, Any],
    loss: str | None = None,
    criterion: Callable[[Any, Any], Any] | None = None,
    optimizer: Any = None,
) -> None:
    """Fits the model, if the initializer does so."""
    initializer = baselines.INITIALIZERS[run.initializer]
    if initializer.fit is not None:
        options = {**initializer.options, **calibration}
        told = baselines.Fit(x, y, loss, criterion, optimizer, run.optimizer, run.lr, run.seed, options)
        initializer.fit(model, told)


def _ramp(run: Run, samples: int) -> Callable[[int], float]:
    """The learning rate's factor at a step, counted from zero."""
    steps = run.epochs * math.ceil(samples / run.batch_size)
    ramp = max(1, round(baselines.INITIALIZERS[run.initializer].warmup * steps))
    return lambda step: min(1.0, (step + 1) / ramp)


def _summary(losses: np.ndarray[Any, Any], run: Run, samples: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Loss of the last fifth of the last epoch, and the curve, from one loss a step."""
    per_epoch = math.ceil(samples / run.batch_size)
    full = len(losses) == per_epoch * run.epochs
    last = float(losses[-max(1, per_epoch // 5) :].mean()) if full else math.nan
    ends = list(range(EVERY, len(losses) + 1, EVERY)) or [len(losses)]  # a run shorter than that has one point
    return last, tuple((end, float(losses[max(end - EVERY, 0) : end].mean())) for end in ends)


def _train_torch(run: Run, data: Dataset, held: Samples, calibration: dict[str, Any]) -> Result:
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    own = ("model", "networks.torch", "experiments.rivals", "experiments.learned")
    for module in ("torch._dynamo", *(f"hessinit.{name}" for name in own)):
        importlib.import_module(module)  # so that the first run's init_seconds hold no import
    x, y, x_held, y_held, x_test, y_test = tensors(data.x_train, data.y_train, *held, data.x_test, data.y_test)

    def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if data.loss == "mse":
            return mse_loss(outputs, targets)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    with one_thread():
        start = time.perf_counter()
        model = torch_net(run.problem, data, run.initializer, run.activation, run.seed)
        optimizer = _torch_optimizer(run, model)
        _fit(run, model, x, y, calibration, data.loss, loss_of, optimizer)
        schedule = None
        if baselines.INITIALIZERS[run.initializer].warmup:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _ramp(run, len(x)))
        init_seconds = time.perf_counter() - start
        steps = []
        status = "ok"
        for order in _orders(run, len(x)):
            for batch in torch.from_numpy(order).split(run.batch_size):
                optimizer.zero_grad()
                loss = loss_of(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                steps.append(loss.detach())
            if not torch.stack(steps).isfinite().all():
                status = f"diverged at step {int(torch.stack(steps).isfinite().long().argmin()) + 1}"
                break
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            train_loss = float(loss_of(_outputs(model, x), y))
            validation_loss = math.nan
            if len(x_held):
                validation_loss = float(loss_of(_outputs(model, x_held), y_held))
            outputs = _outputs(model, x_test)
            if data.loss == "mse":
                accuracy = 1 - float(mse_loss(outputs, y_test) / y_test.var())
            else:
                accuracy = float((outputs.argmax(-1) == y_test).float().mean())
    last_fifth, curve = _summary(torch.stack(steps).numpy(), run, len(x))
    return Result(train_loss, validation_loss, last_fifth, accuracy, init_seconds, seconds, status, curve)


def tensors(*arrays: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Arrays as tensors: copies of those that may not be written to, as a cluster's may not."""
    import torch

    return tuple(torch.from_numpy(np.require(array, requirements="W")) for array in arrays)


def _outputs(model: Any, x: Any) -> Any:
    """Of a large batch, in parts, so that they stay in the cache."""
    import torch

    return torch.cat([model(part) for part in x.split(1000)])


def _torch_optimizer(run: Run, model: Any) -> Any:
    """As a user would write it: defaults, momentum 0.9."""
    from torch import optim

    kind, keywords = {
        "sgd": (optim.SGD, {}),
        "momentum": (optim.SGD, {"momentum": 0.9}),
        "adam": (optim.Adam, {}),
        "adamw": (optim.AdamW, {}),
    }[run.optimizer]
    return kind(model.parameters(), lr=run.lr, **keywords)


def _keras_optimizer(run: Run) -> Any:
    from keras import optimizers

    if run.optimizer in ("sgd", "momentum"):
        return optimizers.SGD(run.lr, momentum=0.9 if run.optimizer == "momentum" else 0.0)
    return {"adam": optimizers.Adam, "adamw": optimizers.AdamW}[run.optimizer](run.lr)


def _train_keras(run: Run, data: Dataset, held: Samples, calibration: dict[str, Any]) -> Result:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    class Losses(keras.callbacks.Callback):
        """One loss a step, from Keras's running mean over the epoch; and the learning rate of the next."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.total = 0.0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if initializer.warmup:
                self.model.optimizer.learning_rate = run.lr * factor(len(steps))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            total = float(logs["loss"]) * min((batch + 1) * run.batch_size, len(data.x_train))
            size = min(run.batch_size, len(data.x_train) - batch * run.batch_size)
            steps.append((total - self.total) / size)
            self.total = total
            if not math.isfinite(total):
                self.model.stop_training = True

    steps: list[float] = []
    sizes = models.PROBLEMS[run.problem].widths(data)
    initializer, factor = baselines.INITIALIZERS[run.initializer], _ramp(run, len(data.x_train))
    make = initializer.keras
    assert make is not None  # checked when the sweep is planned
    start = time.perf_counter()
    depth = len(sizes) - 1
    model = models.keras_mlp(
        sizes, run.activation, [make(k, run.activation, depth, 1000 * run.seed) for k in range(depth)]
    )
    if data.loss == "mse":
        loss, metric = keras.losses.MeanSquaredError(), "r2_score"
    else:
        loss, metric = keras.losses.SparseCategoricalCrossentropy(from_logits=True), "accuracy"
    model.compile(_keras_optimizer(run), loss, metrics=[metric])
    _fit(run, model, data.x_train, data.y_train, calibration)
    init_seconds = time.perf_counter() - start
    recorder = Losses()
    status = "ok"
    for order in _orders(run, len(data.x_train)):
        x, y = data.x_train[order], data.y_train[order]
        model.fit(x, y, run.batch_size, epochs=1, shuffle=False, verbose=0, callbacks=[recorder])
        if not math.isfinite(steps[-1]):
            status = f"diverged at step {len(steps)}"
            break
    seconds = time.perf_counter() - start
    train_loss, _ = model.evaluate(data.x_train, data.y_train, 1024, verbose=0)
    validation_loss = model.evaluate(*held, 1024, verbose=0)[0] if len(held[0]) else math.nan
    _, accuracy = model.evaluate(data.x_test, data.y_test, 1024, verbose=0)
    last_fifth, curve = _summary(np.array(steps), run, len(data.x_train))
    losses = float(train_loss), float(validation_loss), last_fifth
    return Result(*losses, float(accuracy), init_seconds, seconds, status, curve)
