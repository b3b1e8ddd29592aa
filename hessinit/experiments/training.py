"""One training run: a row of results and its loss curve."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hessinit.experiments import baselines, models
from hessinit.experiments.data import CLASSES, Dataset

EVERY = 20  # steps between points of a curve; a point is the mean loss of the batches since the last


@dataclass(frozen=True)
class Run:
    """What is trained. Two equal runs give equal results on one machine."""

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


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        train_loss: mean cross-entropy over the whole train set, after training.
        last_fifth_loss: mean loss of the batches of the last fifth of the last epoch.
        test_accuracy: after training.
        init_seconds: time of the initialization, part of ``seconds``.
        seconds: initialization and training.
        status: "ok", or "diverged at step N"; training stops there, or at the end of that epoch.
        curve: (step, mean loss since the last point).
    """

    train_loss: float
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


def train(run: Run, data: Dataset) -> Result:
    """Trains one net: plain SGD, batches reshuffled each epoch from the run's seed, the last short one kept."""
    return {"torch": _train_torch, "keras": _train_keras}[run.framework](run, data)


def widths(problem: str, data: Dataset) -> list[int]:
    """Of the net: pixels, hidden layers, classes."""
    return [data.x_train.shape[1], *models.HIDDEN[problem], CLASSES]


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


def _summary(losses: np.ndarray[Any, Any], run: Run, samples: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Loss of the last fifth of the last epoch, and the curve, from one loss a step."""
    per_epoch = math.ceil(samples / run.batch_size)
    full = len(losses) == per_epoch * run.epochs
    last = float(losses[-max(1, per_epoch // 5) :].mean()) if full else math.nan
    ends = list(range(EVERY, len(losses) + 1, EVERY)) or [len(losses)]  # a run shorter than that has one point
    return last, tuple((end, float(losses[max(end - EVERY, 0) : end].mean())) for end in ends)


def _train_torch(run: Run, data: Dataset) -> Result:
    import torch
    from torch.nn.functional import cross_entropy

    for module in ("hessinit.model", "hessinit.networks.torch"):
        importlib.import_module(module)  # so that the first run's init_seconds hold no import
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    initialise = baselines.INITIALIZERS[run.initializer].torch
    assert initialise is not None  # checked when the sweep is planned
    with one_thread():
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            model = models.torch_mlp(widths(run.problem, data), run.activation)
        start_init = time.perf_counter()
        initialise(model, run.activation, torch.Generator().manual_seed(run.seed))
        init_seconds = time.perf_counter() - start_init
        optimizer = torch.optim.SGD(model.parameters(), lr=run.lr)
        steps = []
        status = "ok"
        for order in _orders(run, len(x)):
            for batch in torch.from_numpy(order).split(run.batch_size):
                optimizer.zero_grad()
                loss = cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                steps.append(loss.detach())
            if not torch.stack(steps).isfinite().all():
                status = f"diverged at step {int(torch.stack(steps).isfinite().long().argmin()) + 1}"
                break
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            train_loss = float(cross_entropy(model(x), y))
            correct = model(torch.from_numpy(data.x_test)).argmax(1) == torch.from_numpy(data.y_test)
    last_fifth, curve = _summary(torch.stack(steps).numpy(), run, len(x))
    return Result(train_loss, last_fifth, float(correct.float().mean()), init_seconds, seconds, status, curve)


def _train_keras(run: Run, data: Dataset) -> Result:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    class Losses(keras.callbacks.Callback):
        """One loss a step, from Keras's running mean over the epoch."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.total = 0.0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            total = float(logs["loss"]) * min((batch + 1) * run.batch_size, len(data.x_train))
            size = min(run.batch_size, len(data.x_train) - batch * run.batch_size)
            steps.append((total - self.total) / size)
            self.total = total
            if not math.isfinite(total):
                self.model.stop_training = True

    steps: list[float] = []
    sizes = widths(run.problem, data)
    make = baselines.INITIALIZERS[run.initializer].keras
    assert make is not None  # checked when the sweep is planned
    start = time.perf_counter()
    depth = len(sizes) - 1
    initializers = [make(k, run.activation, depth, 1000 * run.seed) for k in range(depth)]
    model = models.keras_mlp(sizes, run.activation, initializers)
    init_seconds = time.perf_counter() - start
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(run.lr), loss, metrics=["accuracy"])
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
    _, accuracy = model.evaluate(data.x_test, data.y_test, 1024, verbose=0)
    last_fifth, curve = _summary(np.array(steps), run, len(data.x_train))
    return Result(float(train_loss), last_fifth, float(accuracy), init_seconds, seconds, status, curve)
