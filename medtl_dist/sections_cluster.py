"""The sections that decide where and how often is trained, and no number of a single training: sweeps, and the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medtl_dist.sections import PositiveInt, Section


class Tune(Section):
    """A sweep over a search space; none of it decides a number of a single training."""

    space: str = Field(
        default="resnet101", description="Search space: a name (`medtl tune --help` lists them) or a YAML file."
    )
    num_trials: PositiveInt = Field(default=12, description="Trials in all; a grid has as many as it has points.")
    searcher: Literal["random", "grid", "optuna"] = Field(
        default="random", description="How trials are drawn; optuna (extra) learns from those that have ended."
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        default="asha", description="What stops a trial early: asha, median (below the running median), or none (FIFO)."
    )
    grace_epochs: PositiveInt = Field(default=1, description="Epochs that every trial gets before it can be stopped.")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        default=3, description="asha: one of so many trials goes on at each rung."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="Seed of what is drawn from the space.")
    max_trial_failures: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Further tries of a trial that crashed, each from its last checkpoint."
    )
    silence_timeout_s: PositiveInt | None = Field(
        default=7200,
        description="A trial without a sign of life (a step, a line of its log) for so long counts as crashed; let it be longer "
        "than scoring val once; null: wait for ever.",
    )
    prefix_cache: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Keep the frozen stages' outputs for all trials that share them; decides storage only, never a number.",
    )
    prefix_cache_mib: PositiveInt | None = Field(
        default=None, description="Size limit of that cache on each node; null: half of what is free on its disk."
    )
    prefix_cache_dir: str | None = Field(
        default=None,
        description="Folder on every node's local disk for that cache; null: in the sweep's folder; where that is in a store, or "
        "the cluster is not this machine's own, in each node's temporary folder.",
    )
    keep_prefix_cache: bool = Field(
        default=False, description="Keep it after the sweep; it is made from patients' images."
    )

    @field_validator("prefix_cache", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: object) -> object:
        """YAML reads on and off as true and false, on the command line as in a file."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Cluster(Section):
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Ray Train workers; 0: in this process, no Ray."
    )
    min_workers: PositiveInt | None = Field(
        default=None,
        description="Elastic training: go on with as few workers as this where nodes are lost; null: always num_workers.",
    )
    use_gpu: bool | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="One GPU per worker; null: where there is one; 0.5, say: half a GPU for each single-worker trial of a sweep.",
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(default=1.0, description="CPUs reserved for each worker.")
    address: str | None = Field(
        default=None, description="Address of a Ray cluster; null: RAY_ADDRESS, else start one here."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Restarts from the last checkpoint after a lost worker."
    )
    wait_for_workers_s: float = Field(default=600.0, ge=0, description="Wait so long for lost nodes, then exit 75.")
    stop_grace_s: PositiveInt = Field(default=120, description="Wait so long after SIGTERM for the last checkpoint.")

    @model_validator(mode="after")
    def _elastic_bounds(self) -> Cluster:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError("min_workers can't be above num_workers")
        if self.min_workers is not None and self.max_failures == 0:
            raise ValueError("min_workers needs max_failures above 0: a lost node is a restart")
        return self
