"""`medtl tune`: parse, call the library, print. Ray is imported only when trials start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from medtl_dist.cli.sweep_table import drawn_of, showing
from medtl_dist.cli.train import AsJson, ConfigFile, Overrides, Preset, print_outcome, run_one, with_absolute_paths
from medtl_dist.config import Config, load_config
from medtl_dist.errors import TrainingError, UserError

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
    sweep_dir: Annotated[Path | None, typer.Option("--sweep-dir", help="Sweep folder; made if missing.")] = None,
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
    sweep_dir = sweep_dir.absolute() if sweep_dir is not None else None
    if resume and not given and sweep_dir is not None and (sweep_dir / "space.yaml").is_file():
        asked = load_config(file=sweep_dir / "config.yaml")
        space = space or str(sweep_dir / "space.yaml")
    else:
        asked = load_config(preset=preset, file=config, overrides=overrides or [])
    asked = with_absolute_paths(_with_tune(asked, space=space, num_trials=num_trials))

    from cluster.tune import sweep_of

    sweep = sweep_of(asked)
    if test:
        from medtl_dist.train.start import check_inputs

        check_inputs(asked, open_test=True)  # told before the sweep, not after it
    if dry_run:
        _print_plan(sweep, as_json=as_json)
        return
    from cluster.sweep_folder import default_sweep_folder

    folder = sweep_dir or default_sweep_folder(asked).absolute()
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


def _run(sweep: Any, folder: Path, *, resume: bool) -> dict[str, Any]:
    """Run the sweep before the user's eyes and return its result."""
    from rich.console import Console

    from cluster.tune import run_sweep
    from medtl_dist.sweep.summary import read_summary

    epochs: dict[int, int] = {}

    def started(specs: list[Any]) -> None:
        epochs.update({spec.number: spec.config.train.epochs for spec in specs})

    def epochs_of(number: int) -> int:
        known = epochs.get(number)
        return sweep.base.train.epochs if known is None else known

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with showing(console, epochs_of) as tell:
        run_sweep(sweep, folder, resume=resume, on_start=started, on_news=tell)
    return read_summary(folder)


def _print_plan(sweep: Any, *, as_json: bool) -> None:
    from cluster.sweep_plan import plan_sweep
    from cluster.tune import check_trials, drawn_trials, specs_of

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


def _print_result(found: Mapping[str, Any], folder: Path) -> None:
    for line in result_lines(found):
        typer.echo(line)
    typer.echo(f"page   {folder / 'sweep.html'}")


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
    asked: Config, folder: Path, found: Mapping[str, Any], *, seeds: int, test: bool, as_json: bool
) -> list[dict[str, Any]]:
    """The winner's config once more, as ordinary runs in ``folder/winner/seed-N``, with ``train.seed`` and the next ones."""
    if found["winner"] is None:
        raise TrainingError(f"{folder}: no trial could be ranked, so there is no winner to train.")
    number = found["winner"]["trial"]
    winner = load_config(file=folder / found["winner"]["folder"] / "config.yaml")
    results = []
    for seed in range(winner.train.seed, winner.train.seed + seeds):
        # In a sweep a trial computes with its share of the machine; alone it has it all, unless the user has said otherwise.
        train = winner.train.model_copy(update={"seed": seed, "threads": asked.train.threads})
        place = folder / "winner" / f"seed-{seed}"
        typer.echo(f"training the winner, trial {number}, with seed {seed} in {place}", err=True)
        outcome, report_path, _ = run_one(winner.model_copy(update={"train": train}), place, resume=True, test=test)
        results.append({"seed": seed, "folder": str(place.relative_to(folder)), "results": outcome})
        if not as_json:
            print_outcome(outcome, report_path)
    return results
