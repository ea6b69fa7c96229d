"""A process that asks for a lease at a given moment; it imports no torch."""

from __future__ import annotations

import time
from typing import Any

from medtl_dist.errors import UserError
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import store_folder
from medtl_dist.train.lease import held_lease


def race(url: str, endpoint: str, start: float, queue: Any) -> None:
    """Puts the fence it got into the queue, or the message of the refusal."""
    folder = store_folder(url, StorageOptions(endpoint_url=endpoint))
    while time.time() < start:
        time.sleep(0.001)
    try:
        with held_lease(folder, owner="racer", ttl_s=60, wait=False) as held:
            queue.put(held.fence)
            time.sleep(1)
    except UserError as error:
        queue.put(error.message)
