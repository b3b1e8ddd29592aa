"""A progress bar for work that takes more than a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, show: bool | None, length: int | None = None) -> Iterator[T]:
    """The items, with a bar on standard error.

    Args:
        items: to go through.
        label: in front of the bar.
        show: True, False, or None for only where standard error is a terminal and ``rich`` is installed.
        length: number of items; None for their own ``len``, if they have one.

    Raises:
        ImportError: ``show`` is True and ``rich`` is not installed.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        if show:
            raise ImportError("progress=True needs rich: pip install rich") from None
        yield from items
        return
    yield from rich_track(items, label, length, console=Console(stderr=True), transient=True)
