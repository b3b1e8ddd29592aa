"""Processes of ``torch.distributed`` that each hold a share of the data and act as one.

Every exchange begins with the question whether all are well, so that an error in one process raises in all of them, and
none waits for a sum that another will not send.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

Value = TypeVar("Value")


class TorchGroup:
    """A :class:`~hessinit.networks.base.Group` over a process group.

    Args:
        group: of ``torch.distributed``; every one of its processes makes the same calls in the same order.
    """

    def __init__(self, group: Any) -> None:
        self._group, self._heard = group, False
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        backend = dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends for all processes, or raises in all of them."""
        try:
            yield
        except BaseException as error:
            if not self._heard:
                self._ask(f"{type(error).__name__}: {error}")
            raise
        self._ask(None)

    def sum(self, sums: Any) -> Any:
        """Sums of numbers, arrays, or dicts of them with the same keys in all processes."""
        self._ask(None)
        leaves: list[Any] = []
        _leaves(sums, leaves)
        numbers = [np.asarray(x, np.float64) for x in leaves if not isinstance(x, torch.Tensor)]
        packed = torch.from_numpy(np.concatenate([x.ravel() for x in numbers])) if numbers else torch.zeros(0)
        packed = packed.to(self._device)
        dist.all_reduce(packed, group=self._group)
        parts = iter(np.split(packed.cpu().numpy(), np.cumsum([x.size for x in numbers])[:-1]) if numbers else [])
        added: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                total = leaf.detach().to(self._device, copy=True).contiguous()
                dist.all_reduce(total, group=self._group)
                added.append(total.to(leaf.device))
            else:
                part = next(parts).reshape(np.shape(leaf))
                added.append(part if isinstance(leaf, np.ndarray) else float(part))
        return _rebuilt(sums, iter(added))

    def first(self, value: Value) -> Value:
        """The first process's value."""
        self._ask(None)
        said = [value]
        dist.broadcast_object_list(said, dist.get_global_rank(self._group, 0), self._group, self._device)
        return said[0]

    def _ask(self, failure: str | None) -> None:
        said: list[str | None] = [None] * self.size
        dist.all_gather_object(said, failure, self._group)
        others = [f"process {rank} of {self.size}: {text}" for rank, text in enumerate(said) if text is not None]
        if failure is None and others:
            self._heard = True
            raise RuntimeError(f"stopped, as another process failed; {others[0]}")


def _leaves(tree: Any, found: list[Any]) -> None:
    for part in tree.values() if isinstance(tree, Mapping) else [tree]:
        if isinstance(part, Mapping):
            _leaves(part, found)
        else:
            found.append(part)


def _rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    return {key: _rebuilt(part, leaves) for key, part in tree.items()} if isinstance(tree, Mapping) else next(leaves)
