"""Runs in a store, brought here to be compared with runs on disk."""

from __future__ import annotations

from pathlib import Path

from medtl_dist.store_folder import StoreFolder


def copied(store: StoreFolder, to: Path) -> Path:
    """The whole run folder on disk, the checkpoints named by their steps."""
    for info in store.files():
        name = info.path.removeprefix(f"{store.path}/")
        head, _, tail = name.partition("/")
        if head == "checkpoints":
            step, _, rest = tail.partition("/")
            name = f"checkpoints/{step.partition('-')[0]}/{rest}"
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(info.path.removeprefix(f"{store.path}/")))
    return to
