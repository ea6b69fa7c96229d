"""config and space → a sweep in its folder: what is drawn, what runs, what comes of it. Ray only below ``run_trials``."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.launch import has_own_cluster, set_environment
from cluster.node_cache import NodeFolder, cache_place, remove_on_nodes
from cluster.sweep_folder import opened_sweep
from cluster.sweep_mirror import Mirror
from cluster.sweep_trials import Sweep, check_trials, drawn_trials, specs_of
from cluster.trial_desk import Propose, waiting_numbers
from cluster.trial_state import TrialSpec, read_specs, write_specs
from cluster.trials import Stopped, run_trials, stopping_on_signals
from medtl_dist.config import Config
from medtl_dist.errors import Interrupted, TrainingError
from medtl_dist.sections_cluster import Tune
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome


def run_sweep(
    sweep: Sweep,
    place: Path | str,
    *,
    resume: bool,
    on_start: Callable[[list[TrialSpec]], None] = lambda _specs: None,
    say: Callable[[str], None] = lambda _text: None,
    on_news: Callable[[list[Outcome]], None] | None = None,
) -> list[Outcome]:
    """Run the sweep, or go on with it, and leave its table, ranking and page in its folder (a path or an address). How all trials
    ended. ``say`` is told what a person should know before the first trial starts.

    The test split is never opened here.

    Raises:
        UserError: the folder is another sweep's, or another driver is at work in it; no room on the cluster.
        KeyboardInterrupt: after Ctrl-C, once running trials have stopped and the results so far are written.
        Interrupted: likewise after SIGTERM; or the store can't be reached, then without a result.
    """
    tune = sweep.base.tune
    propose: Propose | None = None
    with (
        opened_sweep(place, sweep.base, sweep.space.to_yaml(), resume=resume, say=say) as folder,
        stopping_on_signals() as stopped,
    ):
        drawn = read_specs(folder.local_path)
        if drawn is None:
            drawn = drawn_trials(sweep)
            write_specs(folder, drawn)
        specs = specs_of(sweep, drawn)
        check_trials(specs or [TrialSpec(0, {}, sweep.base)])
        if tune.searcher == "optuna" and len(drawn) < tune.num_trials:
            from cluster.sweep_optuna import proposer

            propose = _announced(proposer(sweep, folder, drawn), on_start)
        on_start(specs)
        own_cluster = has_own_cluster(sweep.base)
        set_environment(own_cluster=own_cluster)
        known_as = folder.url if folder.remote else folder.local_path
        cache = cache_place(known_as, tune.prefix_cache_dir, own_cluster=own_cluster)
        outcomes = run_trials(
            folder,
            specs,
            sweep.base,
            stop_rule=_rule_of(sweep, specs),
            on_news=on_news,
            propose=propose,
            stopped=stopped,
            warm_options=warm_options(sweep.base, cache),
            at_end=lambda outcomes: _forget_cache(cache, tune, outcomes, connected=True),
        )
        _forget_cache(cache, tune, outcomes, connected=False)
        _write_result(folder, outcomes)
    _raise_if_stopped(stopped, outcomes, folder.url)
    return outcomes


def _write_result(place: Folder, outcomes: list[Outcome]) -> None:
    from medtl_dist.report.sweep_page import PAGE, build_sweep_page
    from medtl_dist.sweep.summary import SUMMARY, write_sweep
    from medtl_dist.sweep.table import TABLE

    folder = place.local_path
    if isinstance(place, Mirror):
        place.fetch_scores()
    try:
        write_sweep(folder, outcomes)
    except OSError as error:
        raise TrainingError(
            f"{folder}: its result can't be written ({error.strerror or error}). The trials are whole: free space, then the "
            "same command with --resume writes it."
        ) from None
    build_sweep_page(folder)
    if isinstance(place, Mirror):
        place.publish((TABLE, SUMMARY, PAGE))


def _forget_cache(cache: Path | NodeFolder, tune: Tune, outcomes: list[Outcome], *, connected: bool) -> None:
    """Delete the cache, which is made from patients' images, unless it is to be kept, or is needed when the sweep goes on."""
    if tune.keep_prefix_cache or waiting_numbers(outcomes):
        return
    if isinstance(cache, Path):
        shutil.rmtree(cache, ignore_errors=True)
    elif connected:
        remove_on_nodes(cache)
    else:
        cache.remove()


def warm_options(base: Config, cache: Path | NodeFolder) -> dict[str, Any]:
    """What a sweep's worker processes keep between trials."""
    tune = base.tune
    return {
        "keep_epoch_scores": True,
        "cache_dir": cache,
        "cache_mode": tune.prefix_cache,
        "cache_limit_mib": tune.prefix_cache_mib,
    }


def _rule_of(sweep: Sweep, specs: list[TrialSpec]) -> Any:
    if sweep.base.tune.scheduler == "none":
        return None
    from cluster.trial_stop import stop_rule_of

    # Optuna's trials are not drawn yet: they may be as long as the space lets them be.
    ends = [knob.sets(end) for knob in sweep.space.knobs if "train.epochs" in knob.config_keys() for end in knob.ends()]
    longest = [sets["train.epochs"] for sets in ends] + [spec.config.train.epochs for spec in specs]
    return stop_rule_of(sweep.base.tune, max([sweep.base.train.epochs, *longest]))


def _announced(propose: Propose, on_start: Callable[[list[TrialSpec]], None]) -> Propose:
    def proposing(outcomes: list[Outcome]) -> TrialSpec | None:
        spec = propose(outcomes)
        if spec is not None:
            on_start([spec])
        return spec

    return proposing


def _raise_if_stopped(stopped: Stopped, outcomes: list[Outcome], shown: str) -> None:
    left = len(waiting_numbers(outcomes))
    if stopped.received == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped.received is not None:
        raise Interrupted(
            f"{shown}: stopped as asked with {left} trials to go; the same command with --resume goes on."
        )
