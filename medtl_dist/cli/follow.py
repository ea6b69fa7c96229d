"""run folder → terminal: notes and epochs as they are logged, and a live line where a terminal is attached."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from medtl_dist.errors import MedtlError
from medtl_dist.storage import Folder
from medtl_dist.store_folder import StoreFolder

_EVERY_S, _EVERY_S_IN_STORE = 0.5, 5.0


@contextlib.contextmanager
def following(run_folder: Folder | Path) -> Iterator[None]:
    """Print what the run logs while the block runs. It reads files only, so it serves a cluster's run as well."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    folder = run_folder if isinstance(run_folder, Folder) else Folder.local(run_folder)
    every_s = _EVERY_S
    if isinstance(folder, StoreFolder):
        folder, every_s = folder.once(), _EVERY_S_IN_STORE
    seen = len(_read(folder, "log.jsonl"))
    _forget_progress(folder)  # an earlier attempt's
    done = threading.Event()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[facts]}"), console=console,
        disable=not console.is_terminal, transient=True,
    )  # fmt: skip

    def follow() -> None:
        nonlocal seen
        task = bar.add_task("starting", total=None, facts="")
        while True:
            last_round = done.wait(every_s)
            seen = _print_new_lines(console, _read(folder, "log.jsonl"), seen)
            row = _read_progress(folder)
            if row:
                bar.update(
                    task,
                    description=f"epoch {min(row['epoch'] + 1, row['epochs'])}/{row['epochs']}",
                    total=row["steps"],
                    completed=row["step"],
                    facts=progress_facts(row),
                )
            if last_round:
                return

    with bar:
        thread = threading.Thread(target=follow, name="follow", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    _forget_progress(folder)


def progress_facts(row: dict[str, Any]) -> str:
    """Two short lines, so that 80 columns show them whole: where the run is and how long it takes; how it is doing."""
    place, state = [f"step {row['step']}/{row['steps']}"], []
    if row.get("seconds_left") is not None:
        minutes, seconds = divmod(round(row["seconds_left"]), 60)
        place.append(f"{minutes}:{seconds:02d} left")
    if row.get("images_per_s") is not None:
        place.append(f"{row['images_per_s']:.1f} images/s")
    if row.get("data_wait_fraction") is not None:
        state.append(f"{row['data_wait_fraction']:.0%} waiting for data")
    if row.get("loss") is not None:
        state.append(f"loss {row['loss']:.3f}")
    if row.get("best_val_auc") is not None:
        state.append(f"best val AUC {row['best_val_auc']:.3f}")
    return " · ".join(place) + "\n" + " · ".join(state)


def epoch_line(row: dict[str, Any]) -> str:
    """One finished epoch in a line, and another one for each rank that holds the others up."""
    auc = "undefined" if row["val_auc"] is None else f"{row['val_auc']:.3f}"
    line = (
        f"epoch {row['epoch'] + 1}: train loss {row['train_loss']:.3f}, val loss {row['val_loss']:.3f}, val AUC {auc}, "
        f"{row['images_per_s']:.1f} images/s, {row['data_wait_fraction']:.0%} waiting for data, {row['epoch_s']:.0f} s"
    )
    slow = (
        f"  slow: rank {rank['rank']} on {rank['host']}, {rank['slowness']:.1f} times the others' own time a step "
        f"(data {rank['data_wait_s']:.2g} s, forward pass {rank['forward_s']:.2g} s)"
        for rank in row.get("stragglers", ())
    )
    return "\n".join([line, *slow])


def _print_new_lines(console: Console, log: bytes, seen: int) -> int:
    """Print the complete lines of the log from byte ``seen`` on; return where the next ones start."""
    complete = log[seen : log.rfind(b"\n") + 1]
    for line in complete.splitlines():
        row = json.loads(line)
        console.print(row["text"] if row["kind"] == "note" else epoch_line(row), markup=False)
    return seen + len(complete)


def _read_progress(folder: Folder) -> dict[str, Any] | None:
    try:
        return json.loads(_read(folder, "progress.json"))
    except ValueError:
        return None


def _read(folder: Folder, name: str) -> bytes:
    """The file's bytes; none where there is no file, or a store can't be asked just now."""
    try:
        return folder.read(name)
    except MedtlError:
        return b""


def _forget_progress(folder: Folder) -> None:
    with contextlib.suppress(MedtlError):
        folder.delete("progress.json")
