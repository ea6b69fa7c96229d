"""fit → MLflow, by option (extra ``mlflow``): each epoch's numbers on a tracking server, and never a wait for it.

Rank 0 puts what is to be logged into a queue; a thread hands it on. A server that is slow, away or refuses costs the run
nothing but these numbers, and one note. The MLflow run's id lies in the run folder, so that a resumed run goes on in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from medtl_dist.config import Config, flat
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Folder, redact

EXPERIMENT = "medtl_dist"
_FILE = "mlflow.json"
_CLOSE_S = 20.0
_MOST_CHARACTERS = 500  # of a parameter, as MLflow allows


class MlflowLog:
    """One training as one MLflow run, named as its run folder."""

    def __init__(self, config: Config, folder: Folder, note: Callable[[str], None]) -> None:
        """Raises UserError without the extra."""
        uri = config.train.mlflow_uri
        assert uri is not None
        # Read at every request: a server that does not answer is given up while there is still something to log.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise UserError('train.mlflow_uri needs MLflow: pip install "medtl_dist[mlflow]".') from None
        self._new_client: Callable[[], Any] = lambda: MlflowClient(tracking_uri=uri)
        self._config, self._folder, self._note = config, folder, note
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="medtl-mlflow", daemon=True)
        self._thread.start()

    def epoch(self, row: Mapping[str, Any], step: int) -> None:
        """Hand over an epoch's numbers; returns at once."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._waiting.put((step, numbers))

    def close(self) -> None:
        """Wait, not for long, until all is handed on."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        try:
            client = self._new_client()
            number = self._begin(client)
            while (item := self._waiting.get()) is not None:
                step, numbers = item
                for name, value in numbers.items():
                    client.log_metric(number, name, value, step=step)
            client.set_terminated(number)
        except Exception as error:  # whatever a server or a plug-in does: it is not the training's concern
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self._note(f"MLflow: the numbers are not logged there any more ({type(error).__name__}: {redact(reason)})")

    def _begin(self, client: Any) -> str:
        """The id of the MLflow run of this run folder: the one it had, or a new one with the config as parameters."""
        with contextlib.suppress(DataError, ValueError, KeyError, TypeError):
            number = json.loads(self._folder.read(_FILE))["run_id"]
            client.update_run(number, status="RUNNING")
            return number
        experiment = client.get_experiment_by_name(EXPERIMENT)
        place = experiment.experiment_id if experiment is not None else client.create_experiment(EXPERIMENT)
        number = client.create_run(place, run_name=self._folder.path.rsplit("/", 1)[-1]).info.run_id
        for key, value in flat(self._config.model_dump(mode="json")).items():
            client.log_param(number, key, str(value)[:_MOST_CHARACTERS])
        self._folder.write(_FILE, json.dumps({"run_id": number}).encode())
        return number
