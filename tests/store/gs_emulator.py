"""The emulator of Google's storage (PyPI: gcp-storage-emulator) with what it lacks: uploads that are conditional on a generation.

Run as a program: ``gs_emulator.py PORT [ignore]``; with ``ignore`` conditions are accepted and not looked at, as it came.
"""

from __future__ import annotations

import sys
import threading
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_one_at_a_time = threading.Lock()
_insert = objects.insert


def insert(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
    """As https://cloud.google.com/storage/docs/json_api/v1/objects/insert: 0 makes the upload succeed only where there is no live
    version of the object, else the answer is 412 Precondition Failed."""
    wanted = request.query.get("ifGenerationMatch", [None])[0]
    with _one_at_a_time:
        if wanted is not None:
            try:
                there = storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])["generation"]
            except NotFound:
                there = "0"
            if there != wanted:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        _insert(request, response, storage, *args, **kwargs)


if __name__ == "__main__":
    if "ignore" not in sys.argv:
        routes: Any = server.HANDLERS
        for _, methods in routes:
            for method, handler in methods.items():
                if handler is _insert:
                    methods[method] = insert
        objects.insert = insert
    server.create_server("127.0.0.1", int(sys.argv[1]), True, "sets").run()
