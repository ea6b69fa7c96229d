"""What a training's kept boundaries are called, and which of them this process has open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medtl_dist.train.prefix import Prefix
from medtl_dist.train.prefix_store import Entry, Store


@dataclass
class PrefixCache:
    """One rank's way to the entries of its training; ``held`` are those that this process has open."""

    store: Store
    prefix: Prefix
    lineage: dict[str, Any]
    digests: list[str]
    held: dict[str, Entry]

    def name(self, shown: Mapping[str, Any], depth: int | None = None) -> str:
        """The name of the entry at ``depth`` (None: this training's) of what ``shown`` says."""
        depth = depth or self.prefix.depth
        told = self.lineage | {"depth": depth, "weights": self.digests[depth - 1], "shown": dict(shown)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:40]
