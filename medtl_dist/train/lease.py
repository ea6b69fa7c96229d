"""run folder → one writer at a time: a lease that runs out, and a fencing number that grows with every holder.

``.lease/<number>`` is a lease. Who makes the file with the next number, which only one can, holds it and rewrites it every
quarter of its life; who finds the highest one released, not rewritten for longer than it lives, or that of a process which has
ended on this very machine, makes the next. Nobody ever removes the highest, so numbers only grow. A file's age is told by the
store's clock, by comparing it with one just written: no two machines' clocks are compared.

The number is the fence. A holder that lost its lease (a paused machine, a store out of reach) learns it by a look at the names
before it writes; what it had already under way goes to checkpoint folders of its own number, which its successors pass over.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from medtl_dist.create_only import create, store_is_safe
from medtl_dist.errors import DataError, Interrupted, MedtlError, UserError
from medtl_dist.storage import Folder
from medtl_dist.store_folder import Guard, StoreFolder, store_folder
from medtl_dist.train.process_mark import has_ended, mark_of_this_process

LEASES = ".lease"
_PROBE = "now-"
_SLACK_S = 2.0  # S3 tells times in whole seconds


class Shelf(Protocol):
    """Where leases lie: the six things that are done with them."""

    def names(self) -> list[str]: ...
    def create(self, name: str, data: bytes) -> bool: ...
    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes | None: ...
    def delete(self, name: str) -> None: ...
    def written(self, name: str) -> float | None:
        """When it was last written, in seconds of the store's clock; None: it is gone."""
        ...


@dataclass(frozen=True)
class FolderShelf:
    """The folder ``.lease`` of a run folder."""

    folder: Folder

    def names(self) -> list[str]:
        return self.folder.names()

    def create(self, name: str, data: bytes) -> bool:
        return create(self.folder, name, data)

    def put(self, name: str, data: bytes) -> None:
        self.folder.write(name, data)

    def get(self, name: str) -> bytes | None:
        try:
            return self.folder.read(name)
        except DataError:
            return None

    def delete(self, name: str) -> None:
        self.folder.delete(name)

    def written(self, name: str) -> float | None:
        folder = self.folder
        info = folder.info(name) if isinstance(folder, StoreFolder) else folder.fs.get_file_info(folder.at(name))
        return None if info.mtime_ns is None else info.mtime_ns / 1e9


@dataclass(frozen=True)
class Holder:
    """Who holds the lease, as it says itself; ``beat`` grows with every renewal."""

    number: int
    owner: str
    ttl_s: float
    beat: int
    token: str


@dataclass
class Lease:
    """A lease that is held. ``fence``: its number, higher than that of every holder before."""

    fence: int
    owner: str
    shelf: Shelf
    ttl_s: float
    token: str
    _beat: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raises Interrupted where another process has taken over, or the store can't be asked."""
        check_fence(self.shelf, self.fence)

    def renew(self) -> None:
        """Raises Interrupted, see ``check``."""
        self.check()
        with self._lock:
            self._beat += 1
            self.shelf.put(_name(self.fence), self._content(released=False))

    def release(self) -> None:
        with self._lock:
            self.shelf.put(_name(self.fence), self._content(released=True))

    def _content(self, *, released: bool) -> bytes:
        return _content(self.owner, self.ttl_s, self.token, self._beat, released=released)


def check_fence(shelf: Shelf, fence: int) -> None:
    """Raises Interrupted where there is a lease with a higher number than ``fence``."""
    newest = max(_numbers(shelf), default=0)
    if newest > fence:
        raise Interrupted(
            f"another process has taken over this run (lease {newest}, ours was {fence}): nothing more is written here."
        )


def acquire(shelf: Shelf, *, owner: str, ttl_s: float) -> Lease | Holder:
    """The lease, or who holds it. Never waits."""
    token = secrets.token_hex(8)
    while True:
        newest = max(_numbers(shelf), default=0)
        if newest:
            holder = _look(shelf, newest, ttl_s)
            if holder == "gone":
                continue
            if isinstance(holder, Holder):
                return holder
        number = newest + 1
        if not shelf.create(_name(number), _content(owner, ttl_s, token, 0, released=False)):
            continue
        numbers = _numbers(shelf)
        if max(numbers, default=number) > number:  # we were slow: others have come and gone
            shelf.delete(_name(number))
            continue
        for name in shelf.names():
            if name.isdigit() and int(name) < newest:
                shelf.delete(name)
        return Lease(number, owner, shelf, ttl_s, token)


def holder_of(shelf: Shelf) -> Holder | None:
    """Who holds the lease now; None: nobody."""
    while newest := max(_numbers(shelf), default=0):
        found = _look(shelf, newest, ttl_s=60.0)
        if found != "gone":
            return found
    return None


def _look(shelf: Shelf, number: int, ttl_s: float) -> Holder | Literal["gone"] | None:
    """The holder of a lease that has not run out; None: it has, was released, or its process ended; "gone": look again."""
    content = shelf.get(_name(number))
    if content is None:
        return "gone"
    try:
        row = json.loads(content)
        holder = Holder(number, str(row["owner"]), float(row["ttl_s"]), int(row["beat"]), str(row["token"]))
        if row["released"] or has_ended(str(row.get("process") or "")):
            return None
    except (ValueError, KeyError, TypeError):  # being written
        holder = Holder(number, "unknown", ttl_s, 0, "")
    probe = _PROBE + secrets.token_hex(8)
    shelf.put(probe, b"")
    now = shelf.written(probe)
    shelf.delete(probe)
    written = shelf.written(_name(number))
    if now is None or written is None:
        return "gone"
    return holder if now - written <= holder.ttl_s + _SLACK_S else None


@contextmanager
def held_lease(
    folder: Folder,
    *,
    owner: str,
    ttl_s: float,
    say: Callable[[str], None] = lambda text: None,
    wait: bool = True,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Hold the run folder's lease, renewed in a thread, and release it at the end.

    ``owner``: shown to others. ``wait``: a lease that is held is watched until it is renewed, which its holder does every
    quarter of its life (then it is alive, and this raises), or has run out (then it is taken over); else this raises at once.
    ``say``: is told about the waiting.

    Raises:
        UserError: another holder is alive; or the store has no conditional writes.
        Interrupted: the store can't be reached.
    """
    place = folder.below(LEASES) if isinstance(folder, StoreFolder) else Folder(folder.fs, folder.at(LEASES))
    if isinstance(place, StoreFolder) and not store_is_safe(place):
        raise UserError(
            f"{folder.url}: this store makes a file twice that should be made once (it ignores "
            f"{'ifGenerationMatch' if place.place.scheme == 'gs' else 'If-None-Match'}), so two runs could write there at once; "
            "use another store for run folders."
        )
    shelf = FolderShelf(place)
    found = acquire(shelf, owner=owner, ttl_s=ttl_s)
    first = found if isinstance(found, Holder) else None
    while isinstance(found, Holder):
        assert first is not None
        if not wait or (found.number, found.beat) != (first.number, first.beat):
            raise UserError(
                f"{folder.url}: {found.owner} is writing in this run folder; wait for it or stop it. A lease that is no longer "
                f"renewed runs out after {found.ttl_s:.0f} s."
            )
        if found is first:
            say(f"waiting up to {first.ttl_s:.0f} s for {first.owner}, who may have been killed, to renew its lease")
        pause(min(1.0, found.ttl_s / 8))
        found = acquire(shelf, owner=owner, ttl_s=ttl_s)
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(found, ended), daemon=True, name="medtl-lease")
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        with suppress(MedtlError, OSError):  # it runs out by itself
            # Who leaves because a store is gone doesn't wait for it once more.
            last = place.once() if isinstance(place, StoreFolder) else place
            replace(found, shelf=FolderShelf(last)).release()


def _keep(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(lease.ttl_s / 4):
        try:
            lease.renew()
        except Interrupted:
            if lost(lease):
                return
        except (MedtlError, OSError):
            continue  # the store may come back in time


def lost(lease: Lease) -> bool:
    """Whether it is known that another process has taken over."""
    with suppress(MedtlError, OSError):
        return max(_numbers(lease.shelf), default=0) > lease.fence
    return False


def fenced(folder: StoreFolder, fence: int, leased_at: str | None = None) -> StoreFolder:
    """The folder as the holder of a lease writes in it: asking before it writes whether the lease is still its own.

    ``leased_at``: the address of the folder whose lease it is, of which this one is a part; None: it is its own.
    """
    whole = folder if leased_at is None else store_folder(leased_at, folder.options)
    shelf = FolderShelf(whole.below(LEASES))
    return replace(folder, fence=fence, leased_at=whole.url, guard=Guard(lambda: check_fence(shelf, fence)))


def _numbers(shelf: Shelf) -> list[int]:
    return [int(name) for name in shelf.names() if name.isdigit()]


def _name(number: int) -> str:
    return f"{number:08d}"


def _content(owner: str, ttl_s: float, token: str, beat: int, *, released: bool) -> bytes:
    process = mark_of_this_process()
    row = {"owner": owner, "ttl_s": ttl_s, "token": token, "beat": beat, "released": released, "process": process}
    return json.dumps(row).encode()
