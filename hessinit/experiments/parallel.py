"""Many independent tasks in processes, of this machine or of a cluster, through joblib."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
BACKENDS = ("loky", "dask", "ray")


def each(
    work: Callable[..., Outcome], tasks: Sequence[Task], jobs: int, *others: Any
) -> Iterator[tuple[Task, Outcome]]:
    """Every task and its outcome ``work(task, *others)``, as they end.

    Args:
        work: a function that another process can import.
        tasks: in the order in which they begin.
        jobs: processes; 1 for this one.
        others: arguments that all share.
    """
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    if jobs == 1 or len(tasks) < 2:
        yield from ((task, work(task, *others)) for task in tasks)
        return
    as_they_end = get_active_backend()[0].supports_return_generator
    # Copy-on-write maps: processes share the images, and torch takes them without complaint.
    pool = Parallel(n_jobs=jobs, return_as="generator_unordered" if as_they_end else "list", mmap_mode="c")
    yield from pool(delayed(_one)(work, task, *others) for task in tasks)


def _one(work: Callable[..., Outcome], task: Task, *others: Any) -> tuple[Task, Outcome]:
    return task, work(task, *others)


@contextlib.contextmanager
def on(backend: str, cluster: str | None) -> Iterator[None]:
    """Where :func:`each` has its processes.

    Args:
        backend: ``"loky"``, this machine; ``"dask"`` or ``"ray"``, a cluster whose machines have this package.
        cluster: address of its scheduler; None for a cluster of this machine.

    Raises:
        ValueError: an unknown backend, one that is not installed, or a cluster for loky.
    """
    from joblib import parallel_config

    if backend not in BACKENDS:
        raise ValueError(f"compare: backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    if backend == "loky" and cluster is not None:
        raise ValueError(f"compare: cluster must be of dask or ray; got {cluster!r} with backend 'loky'.")
    with contextlib.ExitStack() as stack:
        try:
            if backend == "dask":
                stack.enter_context(importlib.import_module("dask.distributed").Client(cluster))
            elif backend == "ray":
                ray = importlib.import_module("ray")
                ray.init(address=cluster)
                stack.callback(ray.shutdown)
                importlib.import_module("ray.util.joblib").register_ray()
        except ImportError as error:
            raise ValueError(f"compare: backend {backend!r} must be installed; got {error}.") from error
        stack.enter_context(parallel_config(backend=backend))
        yield
