"""journal's files on a local disk ─► the run folder in a store: the newest content of each, now and then, beside the training.

Stores have no append: a file that has grown is put again as a whole. What can't be put is put with the next round; the
checkpoint, not the log, is what a run may not lose.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from medtl_dist.errors import DataError, MedtlError
from medtl_dist.store_folder import StoreFolder

_LAST_ROUND_S = 60.0
_APART_S = 0.5  # of two rounds, however much is urgent


class Outbox:
    """``here`` is a local folder; a file in it that is said to have ``changed`` reaches ``folder`` within seconds."""

    def __init__(self, folder: StoreFolder, *, kept: tuple[str, ...] = (), every_s: float) -> None:
        """``kept``: files that the run folder may hold already and that will grow. Raises MedtlError, see ``StoreFolder``."""
        self.here = Path(tempfile.mkdtemp(prefix="medtl-journal-"))
        self._folder, self._every_s = folder.once(), every_s
        self._pending: dict[str, None] = {}
        self._lock, self._ended, self._urgent = threading.Lock(), threading.Event(), threading.Event()
        for name in kept:
            try:
                (self.here / name).write_bytes(folder.read(name))
            except DataError:  # the run begins
                continue
        self._thread = threading.Thread(target=self._carry, daemon=True, name="medtl-outbox")
        self._thread.start()

    def changed(self, name: str, *, urgent: bool = False) -> None:
        """``urgent``: it is carried now, with all else that has changed."""
        with self._lock:
            self._pending[name] = None
        if urgent:
            self._urgent.set()

    def close(self) -> None:
        """One last round, of a minute at most."""
        self._ended.set()
        self._urgent.set()
        self._thread.join(_LAST_ROUND_S)
        shutil.rmtree(self.here, ignore_errors=True)

    def _carry(self) -> None:
        while True:
            self._urgent.wait(self._every_s)
            self._urgent.clear()
            last = self._ended.is_set()
            with self._lock:
                names, self._pending = list(self._pending), {}
            for name in names:
                try:
                    self._folder.write(name, (self.here / name).read_bytes())
                except (MedtlError, OSError):
                    self.changed(name)
            if last:
                return
            self._ended.wait(_APART_S)
