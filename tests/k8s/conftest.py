"""A stage of its own (`make test-k8s`): a plain `pytest` doesn't collect it, for it needs kubectl."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("MEDTL_STAGE_K8S") == "1" else ["test_*.py"]
