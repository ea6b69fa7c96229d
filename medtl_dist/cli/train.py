"""`medtl train` and `medtl evaluate`: parse, call the library, print.

What needs torch is imported where it is used: `medtl --help` and the packing processes do without it.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medtl_dist.cli.headline import describe_auc, describe_size
from medtl_dist.config import FROM_STAGE, Config, load_config, validate
from medtl_dist.errors import Interrupted, UserError

if TYPE_CHECKING:
    from medtl_dist.storage import Folder

Preset = Annotated[str | None, typer.Option("--preset", help="Named config: resnet101, resnet101_head, classic, …")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; wins over the preset.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; wins over both. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")]


def train(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Run folder, made if missing; or an s3:// or gs:// address.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run-dir if it holds one.")] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Score the test split once at the end; the ledger counts it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and stop; nothing is opened or written.")
    ] = False,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(help="Stop at a checkpoint after so many hours × ranks, over all attempts and stages."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on a shard set, in this process or with Ray Train workers.

    Example: medtl train --preset resnet101 --set data.shards=my_set --set cluster.num_workers=2 --run-dir runs/first
    """
    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    if dry_run:
        typer.echo(resolved.to_yaml(), nl=False)
        return
    from medtl_dist.train.run_folder import default_run_folder

    run_train(
        resolved,
        run_dir or default_run_folder(resolved),
        resume=resume,
        test=test,
        as_json=as_json,
        max_gpu_hours=max_gpu_hours,
    )


def run_train(
    config: Config,
    run_dir: Path | str,
    *,
    resume: bool,
    test: bool,
    as_json: bool = False,
    max_gpu_hours: float | None = None,
) -> dict[str, Any]:
    """Train in ``run_dir``, write the report, print the outcome and return the results, of a chain its index."""
    from medtl_dist.storage import parse_place
    from medtl_dist.store_folder import folder_at
    from medtl_dist.train.setup import storage_of
    from medtl_dist.train.start import check_inputs

    config = with_absolute_paths(config)
    place = parse_place(run_dir)
    run_dir = place.url if place.remote else Path(place.url)
    folder_at(run_dir, storage_of(config))  # without: Amazon would be asked about the bucket, in vain for minutes
    if config.transfer.stages:
        return _run_chain(config, run_dir, resume=resume, test=test, as_json=as_json, max_gpu_hours=max_gpu_hours)
    check_inputs(config, open_test=test)  # a mistake is told at once, not after a cluster has started
    outcome, report_path, done = run_one(config, run_dir, resume=resume, test=test, max_gpu_hours=max_gpu_hours)
    if as_json:
        typer.echo(json.dumps(outcome))
    else:
        if done:
            typer.echo(f"{run_dir} had already finished.", err=True)
        print_outcome(outcome, report_path)
    return outcome


def run_one(
    config: Config, run_dir: Path | str, *, resume: bool, test: bool, max_gpu_hours: float | None = None
) -> tuple[dict[str, Any], str, bool]:
    """One training with its report: its results, the report, and whether it had finished before."""
    from medtl_dist.train.run_store import opened_run

    with opened_run(run_dir, config, resume=resume, say=_say) as place:
        return run_in(config, place, test=test, max_gpu_hours=max_gpu_hours)


def run_in(
    config: Config, place: Folder, *, test: bool, max_gpu_hours: float | None = None, whole: Folder | None = None
) -> tuple[dict[str, Any], str, bool]:
    """As ``run_one``, in a run folder that is open. ``whole``: that of the chain which the training and the limit belong to."""
    from medtl_dist.cli.follow import following
    from medtl_dist.report.build import build_report_in
    from medtl_dist.train import budget, results
    from medtl_dist.train.start import check_same_data

    done = place.exists("results.json")
    if done:
        check_same_data(config, results.read_results(place), place.url)
        done = not test or "test" in results.read_results(place)["splits"]
    if not done:
        budget.limit(place, max_gpu_hours, whole=whole)
        with following(place):
            try:
                _train_somewhere(config, place, test=test)
            except Interrupted:
                budget.raise_if_used_up(place, whole=whole)
                raise
    report_path = build_report_in(place)
    return results.read_results(place), report_path, done


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _run_chain(
    config: Config, run_dir: Path | str, *, resume: bool, test: bool, as_json: bool, max_gpu_hours: float | None = None
) -> dict[str, Any]:
    """A chain of trainings: each an ordinary run in a folder of its own below ``run_dir``."""
    from medtl_dist.storage import is_remote
    from medtl_dist.train import budget
    from medtl_dist.train.chain import CHAIN_FILE, check_chain, train_chain
    from medtl_dist.train.compare import COMPARE_FILE, compare_transfer, describe
    from medtl_dist.train.run_store import opened_part, opened_run

    def train_one(stage: Config, folder: Folder, open_test: bool) -> dict[str, Any]:
        with opened_part(folder, stage) as place:
            outcome, report_path, done = run_in(stage, place, test=open_test, max_gpu_hours=max_gpu_hours, whole=whole)
        if done:
            _say(f"{folder.url} had already finished.")
        if not as_json:
            print_outcome(outcome, report_path)
        return outcome

    budget.check(max_gpu_hours)
    check_chain(config, in_store=is_remote(run_dir), open_test=test)
    with opened_run(run_dir, config, resume=resume, say=_say) as whole:
        train = compare_transfer if config.transfer.compare else train_chain
        outcome = train(config, whole, train_one, say=_say, open_test=test)
    if as_json:
        typer.echo(json.dumps(outcome))
    elif config.transfer.compare:
        for line in describe(outcome):
            typer.echo(line)
        typer.echo(f"comparison {whole.url}/{COMPARE_FILE}")
    else:
        typer.echo(f"chain {whole.url}/{CHAIN_FILE}")
    return outcome


def _train_somewhere(config: Config, place: Folder, *, test: bool) -> None:
    if config.cluster.num_workers > 0:
        from cluster.launch import launch_training  # Ray is imported only where it is used

        launch_training(config, place if place.remote else place.local_path, open_test=test)
        return
    from medtl_dist.run import LocalRun
    from medtl_dist.train.budget import budgeted
    from medtl_dist.train.loop import fit

    run = LocalRun(place)
    run.stop_on_signals()
    try:
        with budgeted(run) as limited:
            fit(config, limited, open_test=test)
    except Interrupted as error:
        if run.received == signal.SIGINT:
            typer.echo(error.message, err=True)
            raise KeyboardInterrupt from None
        raise
    finally:
        run.forget_signals()


def evaluate(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Folder or address of a finished run.")],
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="val [default] or test, counted in the ledger; with --data also train, or all [default]."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SET", help="Another shard set: external validation.")
    ] = None,
    class_map: Annotated[
        str | None, typer.Option("--class-map", metavar="THEIRS=OURS,…", help="With --data: classes of other names.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="With --data: folder in RUN/external [default: the set's name].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a split with a finished run's best checkpoint; the threshold stays the one fixed on val.

    Example: medtl evaluate runs/first --split test

    External validation: medtl evaluate runs/first --data other_hospital --class-map healthy=NORMAL,ill=PNEUMONIA
    """
    if data is None and (class_map is not None or name is not None):
        raise UserError("--class-map and --name are for another set: name it with --data SET.")
    if data is None and split not in ("val", "test", None):
        raise UserError(f"--split {split}: expected val or test.")
    from medtl_dist.train.run_store import opened_finished

    with opened_finished(run_dir, say=_say) as folder:
        if data is None:
            _evaluate_here(folder, split or "val", as_json=as_json)
            return
        from medtl_dist.cli.external import evaluate_elsewhere

        evaluate_elsewhere(folder, data, split=split, class_map=class_map, name=name, as_json=as_json)


def _evaluate_here(folder: Folder, split: str, *, as_json: bool) -> None:
    """Score a split of the run's own set, write its report again, and print the outcome."""
    from medtl_dist.report.build import build_report_in
    from medtl_dist.run import LocalRun
    from medtl_dist.train import results
    from medtl_dist.train.rescore import evaluate_run

    entry = evaluate_run(LocalRun(folder), split)
    report_path = build_report_in(folder)
    if as_json:
        typer.echo(json.dumps(entry))
        return
    print_outcome(results.read_results(folder), report_path)


def print_outcome(outcome: dict[str, Any], report_path: Path | str) -> None:
    """The few lines that a user reads at the end."""
    for split, entry in outcome["splits"].items():
        typer.echo(f"{split:5} {describe_auc(entry)}; {describe_size(entry)}")
    typer.echo(
        f"model {outcome['model']['backbone']}, {outcome['model']['weights']}; "
        f"best epoch {outcome['best_epoch'] + 1} of {outcome['epochs_run']}"
    )
    openings = outcome.get("test_openings")
    if openings:
        typer.echo(
            f"test  opened {openings['count']} time{'s' if openings['count'] != 1 else ''} "
            f"by {openings['configurations']} configuration{'s' if openings['configurations'] != 1 else ''}"
        )
    for caution in outcome["cautions"]:
        typer.echo(f"note  {caution}")
    typer.echo(f"report {report_path}")


def with_absolute_paths(config: Config) -> Config:
    """Workers run in another folder: every path is made absolute here, those of the stages too."""
    tree = config.model_dump(mode="json")
    for part in (tree, *tree["transfer"]["stages"]):
        _make_absolute(part)
    return validate(tree)


def _make_absolute(tree: dict[str, Any]) -> None:
    from medtl_dist.storage import parse_place

    data, model = tree.get("data") or {}, tree.get("model") or {}
    if data.get("shards") is not None:
        data["shards"] = parse_place(data["shards"]).url
    for key in ("ca_bundle", "cache_dir"):
        if data.get(key) is not None:
            data[key] = str(Path(data[key]).expanduser().absolute())
    tune = tree.get("tune") or {}
    if tune.get("prefix_cache_dir") is not None:
        tune["prefix_cache_dir"] = str(Path(tune["prefix_cache_dir"]).expanduser().absolute())
    for key in ("weights", "second_weights"):
        weights = model.get(key, "random")
        if weights not in ("imagenet", "random") and not weights.startswith(FROM_STAGE):
            remote = "://" in weights
            model[key] = parse_place(weights).url if remote else str(Path(weights).expanduser().absolute())
