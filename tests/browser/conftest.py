"""A stage of its own (`make test-browser`): a plain `pytest` doesn't collect it, for it needs Chromium."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("MEDTL_STAGE_BROWSER") == "1" else ["test_*.py"]
