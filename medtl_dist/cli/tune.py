"""`medtl tune`: parse, call the library, print. Ray is imported only when trials start."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from medtl_dist.cli.sweep_table import drawn_of, showing
from medtl_dist.cli.train import AsJson, ConfigFile, Overrides, Preset, print_outcome, run_one, with_absolute_paths
from medtl_dist.config import Config, load_config
from medtl_dist.errors import TrainingError, UserError
from medtl_dist.storage import Folder, is_remote
from medtl_dist.store_folder import StoreFolder, fetched

_MAX_SEEDS = 100


def tune(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    space: Annotated[
        str | None, typer.Option("--space", metavar="NAME|FILE", help="Search space; wins over tune.space.")
    ] = None,
    num_trials: Annotated[
        int | None, typer.Option("--num-trials", metavar="N", help="Trials in all; wins over tune.num_trials.")
    ] = None,
    sweep_dir: Annotated[
        str | None, typer.Option("--sweep-dir", help="Sweep folder, made if missing; or an s3:// or gs:// address.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the sweep in --sweep-dir; without other options as it was begun."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials, their resources and a time estimate, and stop.")
    ] = False,
    then: Annotated[
        str | None, typer.Option("--then", metavar="train", help="Afterwards: train retrains the winner in DIR/winner.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="K", help="--then train: with so many seeds.")] = 1,
    test: Annotated[
        bool, typer.Option("--test", help="--then train: score the winner's test split; the ledger counts it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Sweep over learning rate, frozen depth, schedule …: trials on Ray, ranked by exact validation AUC.

    The test split is never opened by a sweep, only for its retrained winner with --test. Killed or stopped, the same
    command with --resume goes on.

    Example: medtl tune --preset resnet101 --space resnet101 --set data.shards=my_set --num-trials 12 --sweep-dir sweeps/first
    """
    _check_options(then, seeds=seeds, test=test, dry_run=dry_run)
    given = preset is not None or config is not None or bool(overrides)
    asked, sweep = _asked(
        None if given or not resume else sweep_dir,
        lambda: load_config(preset=preset, file=config, overrides=overrides or []),
        space=space,
        num_trials=num_trials,
    )
    if test:
        from medtl_dist.train.start import check_inputs

        check_inputs(asked, open_test=True)  # told before the sweep, not after it
    if dry_run:
        _print_plan(sweep, as_json=as_json)
        return
    from cluster.sweep_folder import default_sweep_folder, sweep_place
    from medtl_dist.train.setup import storage_of

    folder = sweep_place(sweep_dir or default_sweep_folder(asked), storage_of(asked))
    found = _run(sweep, folder, resume=resume)
    if as_json and then is None:
        typer.echo(json.dumps(found))
    elif not as_json:
        _print_result(found, folder)
    if then is not None:
        winner = _train_winner(asked, folder, found, seeds=seeds, test=test, as_json=as_json)
        if as_json:
            typer.echo(json.dumps(found | {"winner_runs": winner}))


def _check_options(then: str | None, *, seeds: int, test: bool, dry_run: bool) -> None:
    if then not in (None, "train"):
        raise UserError(f"--then {then}: expected train, which retrains the winner.")
    if not 1 <= seeds <= _MAX_SEEDS:
        raise UserError(f"--seeds {seeds}: expected 1 to {_MAX_SEEDS}.")
    if then is None and (test or seeds > 1):
        option = "--test" if test else "--seeds"
        raise UserError(
            f"{option} is of the winner's training: add --then train. A sweep itself never opens the test split."
        )
    if dry_run and then is not None:
        raise UserError("--dry-run starts nothing, so there is nothing to do --then.")


def _asked(
    begun_at: str | None, load: Callable[[], Config], *, space: str | None, num_trials: int | None
) -> tuple[Config, Any]:
    """The config and its sweep: of the sweep that has begun at a path or an address, if one has, else what ``load`` returns."""
    with contextlib.ExitStack() as stack:
        begun: Path | None = None
        if begun_at is not None:
            from cluster.sweep_folder import begun_sweep

            begun = stack.enter_context(begun_sweep(begun_at))
        config = load() if begun is None else load_config(file=begun / "config.yaml")
        space_file: Path | None = None
        if begun is not None and space is None:
            space_file = begun / "space.yaml"
            if not is_remote(begun_at or ""):  # of a store it is a copy, for now, that no config should name
                space, space_file = str(space_file), None
        asked = with_absolute_paths(_with_tune(config, space=space, num_trials=num_trials))
        from cluster.sweep_trials import sweep_of

        return asked, sweep_of(asked, space_file)


def _with_tune(config: Config, *, space: str | None, num_trials: int | None) -> Config:
    """The options that have a key of their own, as if set; a space's file by its whole path."""
    from medtl_dist.config import validate

    keys: dict[str, Any] = {}
    if space is not None:
        keys["space"] = str(Path(space).expanduser().absolute()) if Path(space).expanduser().is_file() else space
    if num_trials is not None:
        keys["num_trials"] = num_trials
    tree = config.model_dump(mode="json")
    return validate(tree | {"tune": tree["tune"] | keys})


def _run(sweep: Any, folder: Folder, *, resume: bool) -> dict[str, Any]:
    """Run the sweep before the user's eyes and return its result."""
    from rich.console import Console

    from cluster.tune import run_sweep
    from medtl_dist.sweep.summary import SUMMARY, read_summary

    epochs: dict[int, int] = {}

    def started(specs: list[Any]) -> None:
        epochs.update({spec.number: spec.config.train.epochs for spec in specs})

    def epochs_of(number: int) -> int:
        known = epochs.get(number)
        return sweep.base.train.epochs if known is None else known

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with showing(console, epochs_of) as tell:
        run_sweep(sweep, folder.url, resume=resume, on_start=started, on_news=tell, say=console.print)
    if not isinstance(folder, StoreFolder):
        return read_summary(folder.local_path)
    with fetched(folder, (SUMMARY,)) as here:
        return read_summary(here)


def _print_plan(sweep: Any, *, as_json: bool) -> None:
    from cluster.sweep_plan import plan_sweep
    from cluster.sweep_trials import check_trials, drawn_trials, specs_of

    specs = specs_of(sweep, drawn_trials(sweep))
    check_trials(specs)
    plan = plan_sweep(sweep.base, specs)
    if as_json:
        typer.echo(json.dumps(plan))
        return
    for line in plan_lines(plan):
        typer.echo(line)


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """What ``--dry-run`` prints."""
    lines = [
        f"trial {t['number']}: {t['epochs']} epochs; {drawn_of(t['overrides']) or 'the config itself'}"
        for t in plan["trials"]
    ]
    if not plan["trials"]:
        lines.append("trials are drawn while the sweep runs (tune.searcher = optuna)")
    resources, at_once = plan["resources"], plan["concurrency"]
    gpus = f", {resources['gpus']:g} GPUs" if resources["gpus"] else ""
    workers = f" in {resources['workers']} workers" if resources["workers"] > 1 else ""
    where = "as many at once as the cluster has room for" if at_once is None else f"{at_once} at once on this machine"
    lines.append(f"each reserves {resources['cpus']:g} CPUs{gpus}{workers}; {where}")
    for group in plan["groups"]:
        depth, size = group["frozen_depth"], group["cache_mib"]
        frozen = f"frozen to depth {depth} of {group['num_stages']}" if depth else "nothing frozen"
        cache = f"not cached ({group['uncached_because']})" if size is None else f"cache at most {size:.1f} MiB"
        trials = ", ".join(str(number) for number in group["trials"])
        lines.append(f"{group['backbone']} {frozen}: trials {trials}; {group['epoch_s']:.1f} s an epoch, {cache}")
    seconds = plan["estimate"]["seconds_at_most"]
    lines.append(
        f"about {seconds / 60:.1f} minutes at most (measured: a few steps of each depth in one process; no trial stopped, "
        "nothing cached)"
    )
    return lines


def _print_result(found: Mapping[str, Any], folder: Folder) -> None:
    for line in result_lines(found):
        typer.echo(line)
    typer.echo(f"page   {folder.url}/sweep.html")


def result_lines(found: Mapping[str, Any]) -> list[str]:
    """The few lines that a user reads at the end of a sweep."""
    winner, best = found["winner"], found["best"]
    lines = []
    if winner is None:
        lines.append("no trial can be ranked")
    else:
        lines.append(f"winner {_ranked_line(winner)}")
        if best["trial"] != winner["trial"]:
            lines.append(f"best   {_ranked_line(best)}")
            lines.append(f"rule   {found['rule']}")
        alike = [number for number in found["indistinguishable"] if number != best["trial"]]
        if alike:
            lines.append(f"alike  can't be told apart from the best: trial {', '.join(map(str, alike))}")
    for row in found["unranked"]:
        lines.append(f"not ranked: trial {row['trial']} ({row['state']}): {row['reason']}")
    for row in found["stops_by_depth"]:
        if row["stopped"]:
            lines.append(
                f"frozen to depth {row['frozen_depth']} of {row['num_stages']}: {row['stopped']} of {row['trials']} stopped early"
            )
    return lines + [f"note   {caution}" for caution in found["cautions"]]


def _ranked_line(row: Mapping[str, Any]) -> str:
    interval = "" if row["auc_ci"] is None else f" [{row['auc_ci'][0]:.3f}, {row['auc_ci'][1]:.3f}]"
    where = f"trial {row['trial']}: val AUC {row['auc']:.3f}{interval} after epoch {row['epoch'] + 1}"
    return f"{where}; {drawn_of(row['overrides']) or 'the config itself'}"


def _train_winner(
    asked: Config, folder: Folder, found: Mapping[str, Any], *, seeds: int, test: bool, as_json: bool
) -> list[dict[str, Any]]:
    """The winner's config once more, as ordinary runs in ``folder/winner/seed-N``, with ``train.seed`` and the next ones."""
    from medtl_dist.train.run_store import read_config_in

    if found["winner"] is None:
        raise TrainingError(f"{folder.url}: no trial could be ranked, so there is no winner to train.")
    number = found["winner"]["trial"]
    winner = read_config_in(_below(folder, found["winner"]["folder"]))
    results = []
    for seed in range(winner.train.seed, winner.train.seed + seeds):
        # In a sweep a trial computes with its share of the machine; alone it has it all, unless the user has said otherwise.
        train = winner.train.model_copy(update={"seed": seed, "threads": asked.train.threads})
        place = _below(folder, f"winner/seed-{seed}").url
        typer.echo(f"training the winner, trial {number}, with seed {seed} in {place}", err=True)
        outcome, report_path, _ = run_one(winner.model_copy(update={"train": train}), place, resume=True, test=test)
        results.append({"seed": seed, "folder": f"winner/seed-{seed}", "results": outcome})
        if not as_json:
            print_outcome(outcome, report_path)
    return results


def _below(folder: Folder, name: str) -> Folder:
    return folder.below(name) if isinstance(folder, StoreFolder) else Folder.local(folder.local_path / name)
