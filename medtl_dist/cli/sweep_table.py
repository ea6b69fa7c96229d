"""how a sweep's trials stand → a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from medtl_dist.sweep.outcome import Outcome

_ORDER = ("running", "finished", "stopped", "failed", "waiting")
_ROWS = 16  # a terminal of 24 lines shows them, the head and the summary


@contextmanager
def showing(console: Console, epochs_of: Callable[[int], int]) -> Iterator[Callable[[list[Outcome]], None]]:
    """A function to be told how the trials stand: it keeps a table up to date, or prints a line for each change."""
    began = time.monotonic()
    if not console.is_terminal:
        lines = Lines(console.print, epochs_of)
        yield lines.tell
        return
    with Live(console=console, auto_refresh=False) as live:

        def tell(outcomes: list[Outcome]) -> None:
            live.update(screen_of(outcomes, epochs_of, time.monotonic() - began), refresh=True)

        yield tell


class Lines:
    """What has changed since it was last told, a line each."""

    def __init__(self, say: Callable[[str], object], epochs_of: Callable[[int], int]) -> None:
        self._say, self._epochs_of = say, epochs_of
        self._known: dict[int, tuple[str, int, str | None]] = {}

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            now = (outcome.state, len(outcome.curve), outcome.reason)
            if self._known.get(outcome.number, ("waiting", 0, None)) != now:
                self._known[outcome.number] = now
                self._say(line_of(outcome, self._epochs_of(outcome.number)))


def line_of(outcome: Outcome, epochs: int) -> str:
    """``trial 3 running: epoch 2/5, val AUC 0.913 (best 0.921); optim.lr 0.01``."""
    last = outcome.curve[-1] if outcome.curve else None
    facts = [f"epoch {len(outcome.curve)}/{epochs}"]
    if last is not None:
        best = outcome.best
        auc = "undefined" if last.val_auc is None else f"{last.val_auc:.3f}"
        facts.append(f"val AUC {auc}" + (f" (best {best.val_auc:.3f})" if best is not None else ""))
    text = f"trial {outcome.number} {outcome.state}: {', '.join(facts)}"
    if drawn := drawn_of(outcome.overrides):
        text += f"; {drawn}"
    return text + (f"; {outcome.reason}" if outcome.reason else "")


def drawn_of(overrides: Mapping[str, object]) -> str:
    """``optim.lr 0.01, model.frozen_depth 4``."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in overrides.items()
    )


def screen_of(outcomes: Sequence[Outcome], epochs_of: Callable[[int], int], elapsed_s: float) -> Group:
    """The trials that say most, and a summary of all below them."""
    return Group(table_of(outcomes, epochs_of), Text(summary_of(outcomes, epochs_of, elapsed_s)))


def table_of(outcomes: Sequence[Outcome], epochs_of: Callable[[int], int]) -> Table:
    """Running trials, then the best, then what failed or waits."""
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "state", "epoch", "val AUC"):
        table.add_column(name, justify="right" if name in ("trial", "epoch", "val AUC") else "left", no_wrap=True)
    table.add_column("drawn", overflow="ellipsis", no_wrap=True)
    ranked = sorted(outcomes, key=lambda o: (_ORDER.index(o.state), -(_auc(o) or 0.0), o.number))
    running = [outcome for outcome in ranked if outcome.state == "running"]
    ended = sorted(
        (o for o in ranked if o.state in ("finished", "stopped")), key=lambda o: (-(_auc(o) or 0.0), o.number)
    )
    others = [outcome for outcome in ranked if outcome.state in ("failed", "waiting")]
    for outcome in (running + ended + others)[:_ROWS]:
        auc = _auc(outcome)
        table.add_row(
            str(outcome.number),
            outcome.state,
            f"{len(outcome.curve)}/{epochs_of(outcome.number)}",
            "–" if auc is None else f"{auc:.3f}",
            drawn_of(outcome.overrides),
        )
    return table


def summary_of(outcomes: Sequence[Outcome], epochs_of: Callable[[int], int], elapsed_s: float) -> str:
    """``best val AUC 0.931 (trial 4) · 2 running, 5 finished, 3 stopped, 1 failed, 1 waiting · 3:20, at most 1:40 left``."""
    counts = [f"{n} {state}" for state in _ORDER if (n := sum(outcome.state == state for outcome in outcomes))]
    parts = [", ".join(counts)]
    best = max((o for o in outcomes if _auc(o) is not None), key=lambda o: (_auc(o) or 0.0, -o.number), default=None)
    if best is not None:
        parts.insert(0, f"best val AUC {_auc(best):.3f} (trial {best.number})")
    left = seconds_left(outcomes, epochs_of)
    parts.append(_clock(elapsed_s) + ("" if left is None else f", at most {_clock(left)} left"))
    return " · ".join(parts)


def seconds_left(outcomes: Sequence[Outcome], epochs_of: Callable[[int], int]) -> float | None:
    """Time left if no further trial were stopped: what remains at the pace of the same frozen depth, shared by those running.

    None before the first epoch has ended.
    """
    pace: dict[int, list[float]] = {}
    for outcome in outcomes:
        if outcome.curve:
            pace.setdefault(outcome.frozen_depth, []).append(outcome.curve[-1].seconds / len(outcome.curve))
    if not pace:
        return None
    every = [seconds for some in pace.values() for seconds in some]
    total, running = 0.0, 0
    for outcome in outcomes:
        if outcome.state not in ("running", "waiting"):
            continue
        running += outcome.state == "running"
        here = pace.get(outcome.frozen_depth, every)
        total += max(0, epochs_of(outcome.number) - len(outcome.curve)) * sum(here) / len(here)
    return total / max(running, 1)


def _auc(outcome: Outcome) -> float | None:
    return outcome.best.val_auc if outcome.best is not None else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
