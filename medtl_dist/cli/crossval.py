"""`medtl crossval`: parse, call the library, print."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medtl_dist.cli.headline import describe_auc
from medtl_dist.cli.train import AsJson, ConfigFile, Overrides, Preset
from medtl_dist.config import Config, load_config

if TYPE_CHECKING:
    from medtl_dist.storage import Folder


class EpochsFrom(enum.StrEnum):
    """Where a fold's number of epochs comes from."""

    fixed = "fixed"
    inner = "inner"


Folds = Annotated[int, typer.Option("--folds", help="Parts, each held out once; a patient is in one of them.")]
Repeats = Annotated[int, typer.Option("--repeats", help="How often the folds are dealt anew.")]
EpochsFromOption = Annotated[
    EpochsFrom,
    typer.Option("--epochs-from", help="fixed: train.epochs, the last counts; inner: the best on an inner val."),
]


def crossval(
    run_dir: Annotated[
        str,
        typer.Option(
            "--run-dir", help="Folder of the cross-validation, made if missing; or an s3:// or gs:// address."
        ),
    ],
    folds: Folds = 5,
    repeats: Repeats = 1,
    epochs_from: EpochsFromOption = EpochsFrom.fixed,
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; finished folds are not trained again.")] = False,
    keep_folds: Annotated[
        bool,
        typer.Option("--keep-folds", help="Keep the folds' shard sets (copies of patients' images) in RUN_DIR/sets."),
    ] = False,
    parallel: Annotated[
        bool,
        typer.Option("--parallel", help="Folds at once on Ray, as many as the cluster (or this machine) has room for."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cross-validate on a shard set's train and val; its test split is never opened.

    Example: medtl crossval --folds 5 --repeats 3 --preset resnet101 --set data.shards=my_set --run-dir runs/crossval
    """
    from medtl_dist.data.folds import Settings

    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    settings = Settings(folds, repeats, epochs_from.value)
    run_crossval(
        resolved,
        run_dir,
        settings,
        resume=resume,
        keep_sets=keep_folds,
        parallel=parallel,
        as_json=as_json,
    )


def run_crossval(
    config: Config,
    run_dir: Path | str,
    settings: Any,
    *,
    resume: bool,
    keep_sets: bool = False,
    parallel: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Cross-validate in ``run_dir`` (see ``train.crossval.Settings``), write the page, print the outcome and return it."""
    from medtl_dist.cli.train import run_in, with_absolute_paths
    from medtl_dist.report.crossval_page import build_crossval_page_in
    from medtl_dist.train.crossval import check_crossval, cross_validate, one_after_another
    from medtl_dist.train.run_store import opened_fold, opened_run

    def say(text: str) -> None:
        typer.echo(text, err=True)

    def train_one(fold: Config, folder: Folder) -> object:
        with opened_fold(folder, fold) as place:
            return run_in(fold, place, test=False)  # a split test is never opened

    config = with_absolute_paths(config)
    check_crossval(config, settings)
    with opened_run(run_dir, config, resume=resume, say=say) as folder:
        if parallel:
            from cluster.folds import folds_on_ray

            train_folds = folds_on_ray(folder, config)
        else:
            train_folds = one_after_another(train_one)
        outcome = cross_validate(
            config,
            folder,
            train_folds,
            settings,
            say=say,
            at_once=settings.folds * settings.repeats if parallel else 1,
            keep_sets=keep_sets,
        )
        page = build_crossval_page_in(folder)
    if as_json:
        typer.echo(json.dumps(outcome))
        return outcome
    for line in describe(outcome):
        typer.echo(line)
    typer.echo(f"page  {page}")
    return outcome


def describe(outcome: dict[str, Any]) -> list[str]:
    """The few lines that a user reads at the end."""
    lines = [f"folds {describe_auc(outcome)}; pairs within folds, {outcome['folds']} folds x {outcome['repeats']}"]
    spread = outcome["spread"]
    if spread is not None:
        lines.append(f"      single folds {spread['min']:.3f} to {spread['max']:.3f}, median {spread['median']:.3f}")
    if outcome["repeats"] > 1:
        defined = [f"{auc:.3f}" for auc in outcome["per_repeat"] if auc is not None]
        lines.append(f"      repeats {', '.join(defined)}")
    patients = "" if outcome["n_groups"] is None else f" of {outcome['n_groups']} patients"
    lines.append(f"data  {outcome['n']} {outcome['unit']}s{patients}, each held out once a repeat; test was not opened")
    return [*lines, *(f"note  {caution}" for caution in outcome["cautions"])]
