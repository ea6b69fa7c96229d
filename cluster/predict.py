"""Batch inference on Ray Data: actors that hold the model make the parts of an output; the core says what a part is.

A part is the same file whoever makes it, so a lost actor or node costs the parts in progress, and the same command, with a
cluster or without, goes on. Rows of scores never pass through Ray, only the numbers of parts. Run folder, inputs and output
must lie where every node finds them at the same path (or, but the output, in a store); an actor that does not says so.
A run in a store is fetched by each actor, with its node's credentials and by the endpoint of the run's config.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medtl_dist.config import Config
from medtl_dist.errors import BY_NAME, DataError, MedtlError, UserError
from medtl_dist.train.predict import Job, MakeParts, has_parts, load_for, score_part
from medtl_dist.train.predictor import Predictor

_MAX_BLOCKS = 1000  # of Ray Data's: each is a task and a few messages


def parts_on_ray(address: str | None, num_actors: int | None) -> MakeParts:
    """What makes parts on the cluster at ``address``; ``local`` or None (without RAY_ADDRESS): one of its own here.

    ``num_actors``: models at once; None: one per GPU of the cluster, else one per ``cluster.cpus_per_worker`` CPUs.
    Raises UserError: fewer than one.
    """
    if num_actors is not None and num_actors < 1:
        raise UserError(f"--actors {num_actors}: at least 1 expected")

    def make(job: Job, predictor: Predictor, missing: Sequence[int], count: Callable[[int], None]) -> None:
        if missing:  # each actor loads a predictor of its own
            _make(job, predictor.config, missing, count, address, num_actors)

    return make


def _make(
    job: Job,
    config: Config,
    missing: Sequence[int],
    count: Callable[[int], None],
    address: str | None,
    num_actors: int | None,
) -> None:
    from cluster.launch import set_environment

    cluster = config.cluster.model_copy(
        update={"address": address, "num_workers": num_actors or 1, "min_workers": None}
    )
    config = config.model_copy(update={"cluster": cluster})
    set_environment(own_cluster=address == "local" or (address is None and "RAY_ADDRESS" not in os.environ))
    import ray  # reads the variables above when it is imported, and not again

    from cluster.train import connected

    with connected(config):
        layout = _layout(config, ray.cluster_resources(), num_actors, len(missing))
        _quiet()
        parts = ray.data.from_items(list(missing), override_num_blocks=min(len(missing), _MAX_BLOCKS))
        made = parts.map_batches(
            _Maker,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(job, layout.cpus),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=layout.num_actors),
            num_cpus=layout.cpus,
            num_gpus=1 if layout.gpus else None,
        )
        for row in made.iter_rows():
            if row["error"]:
                raise BY_NAME.get(str(row["error"]), MedtlError)(str(row["message"]))
            count(int(row["images"]))


@dataclass(frozen=True)
class _Layout:
    num_actors: int
    cpus: float
    gpus: bool


def _layout(config: Config, resources: dict[str, Any], num_actors: int | None, num_parts: int) -> _Layout:
    """How many models at once, and with what each. Raises UserError: more than the cluster can hold would wait for ever."""
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    use_gpu = gpus > 0 if config.cluster.use_gpu is None else bool(config.cluster.use_gpu)
    per_actor = config.cluster.cpus_per_worker
    room = min(int(cpus // per_actor), gpus if use_gpu else int(cpus // per_actor))
    if room < 1 or (num_actors or 1) > room:
        what = f"{cpus:g} CPUs and {gpus} GPUs" if use_gpu else f"{cpus:g} CPUs"
        raise UserError(
            f"--actors {num_actors or 1}: the cluster's {what} have room for {room} of {per_actor:g} CPUs"
            f"{' and a GPU' if use_gpu else ''} each; lower it, or add nodes"
        )
    return _Layout(min(num_actors or room, num_parts), per_actor, use_gpu)


class _Maker:
    """An actor's model. What cannot go on is returned: Ray would retry whatever is raised."""

    def __init__(self, job: Job, cpus: float) -> None:
        self._job = job
        self._failure: MedtlError | None = None
        try:
            if not has_parts(job):
                raise DataError(
                    f"{job.parts} is not seen from every node of the cluster: the output (and run folder and inputs) must lie in "
                    "a folder that all nodes share, at the same path"
                )
            self._predictor = load_for(job, threads=max(1, int(cpus)))
        except MedtlError as error:
            self._failure = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        number, images = int(batch["item"][0]), 0
        failure = self._failure
        if failure is None:
            try:
                images = self._make(number)
            except MedtlError as error:
                failure = error
        told = ("", "") if failure is None else (type(failure).__name__, failure.message)
        return {"images": [images], "error": [told[0]], "message": [told[1]]}

    def _make(self, number: int) -> int:
        from medtl_dist.data.encoding import open_workers

        if self._job.path(number).is_file():  # a task that Ray runs again
            return len(self._job.inputs.spans[number])
        with open_workers(1, 0) as workers:  # actors are the parallelism
            return score_part(self._job, self._predictor, number, workers)


def _quiet() -> None:
    """Ray Data's bars and logs would write between the lines of ours."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
