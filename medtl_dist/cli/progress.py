"""Progress bars of long steps, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of several stages: to be told the stage, what is done, and of how many. None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


@contextmanager
def one_bar(doing: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of one stage: to be told what is done, and of how many."""
    with stages_bar() as show:
        yield None if show is None else lambda done, total: show(doing, done, total)
