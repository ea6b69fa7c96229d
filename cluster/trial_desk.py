"""events of running trials → what happens next: the one place where a sweep's state changes, each change on disk at once. No Ray.

A trial waits, runs, and ends finished, stopped or failed. What a crash of the driver leaves behind is read back by ``Desk``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.sweep_mirror import Mirror
from cluster.trial_queue import next_of, prefix_of
from cluster.trial_state import (
    Reserved,
    Signs,
    Trial,
    TrialSpec,
    epoch_of,
    epochs_logged,
    outcome_of,
    place_of,
    read_trial,
    signs_of,
    write_trial,
)
from medtl_dist.errors import MedtlError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome

# Asked for one more trial once nothing waits; None: there is none to come. It is told how the others stand.
Propose = Callable[[list[Outcome]], TrialSpec | None]


# Asking a cache that is not there takes microseconds, opening and checking one that is at least this long.
_USED_S = 1e-3
_LOOK_EVERY_S = 30.0


class Rule(Protocol):
    """What may stop a trial early: told of every epoch, it answers with a reason or None; or only told, of earlier ones."""

    def hear(self, number: int, epochs: int, val_auc: float | None) -> str | None: ...

    def recall(self, number: int, epochs: int, val_auc: float | None) -> None: ...


class Desk:
    """The trials of one sweep, as their driver sees them.

    ``stages``: frozen depth and number of stages of a config. ``max_failures``: further tries of a trial that crashed.
    ``silence_s``: a running trial without a sign of life for longer is ``silent``; None: no trial ever is.
    """

    def __init__(
        self,
        folder: Path | Folder,
        specs: Sequence[TrialSpec],
        *,
        reserved: Reserved,
        stages: Callable[[TrialSpec], tuple[int, int]],
        max_failures: int,
        rule: Rule | None = None,
        propose: Propose | None = None,
        silence_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._reserved, self._stages = place_of(folder), reserved, stages
        self._folder = self._place.local_path
        self._max_failures, self._rule, self._propose, self._clock = max_failures, rule, propose, clock
        self._since: dict[int, float] = {}
        self._silence_s, self._looked_at = silence_s, self._clock()
        # Of trials whose worker is there: their last signs of life, and since when there was nothing newer.
        self._signs: dict[int, tuple[Signs, float]] = {}
        self._told_to_stop: dict[int, str] = {}
        self._stages_of: dict[int, tuple[int, int]] = {}
        self.trials: dict[int, Trial] = {}
        for spec in specs:
            self._add(spec)
        self._take_up()

    # What the loop asks.

    def next_for(self, worker_prefix: str | None) -> Trial | None:
        """The trial that a free worker takes; None where none waits."""
        waiting = [trial.spec for trial in self.trials.values() if trial.number not in self._since and not trial.ended]
        if not waiting and self._propose is not None:
            spec = self._propose(self.outcomes())
            if spec is not None:
                self._add(spec)
                waiting = [spec]
        spec = next_of(waiting, worker_prefix, self._busy_prefixes())
        return None if spec is None else self.trials[spec.number]

    def num_sharing(self, trial: Trial) -> int:
        """How many trials with this one's prefix, itself included, have not ended."""
        prefix = prefix_of(trial.spec.config)
        return sum(not other.ended and prefix_of(other.spec.config) == prefix for other in self.trials.values())

    def outcomes(self) -> list[Outcome]:
        """All trials by number, those that have not ended too."""
        return [self._outcome(self.trials[number]) for number in sorted(self.trials)]

    def silent(self) -> list[int]:
        """Running trials that have shown no sign of life for too long: their process is there, and nothing comes of it.

        The trials' folders are looked at now and then only, however often this is asked.
        """
        now = self._clock()
        if self._silence_s is None or now - self._looked_at < min(_LOOK_EVERY_S, self._silence_s / 10):
            return []
        self._looked_at = now
        for number, (known, _) in list(self._signs.items()):
            signs = self._look_at(number)
            if signs is None:  # a store that can't be asked: nobody is blamed for it
                return []
            if signs != known:
                self._signs[number] = signs, now
        return [number for number, (_, since) in self._signs.items() if now - since > self._silence_s]

    def all_ended(self) -> bool:
        return all(trial.ended for trial in self.trials.values())

    # What the loop tells.

    def begun(self, number: int) -> None:
        """A worker takes the trial."""
        trial = self.trials[number]
        name = f"{trial.spec.name}/config.yaml"
        if not self._place.exists(name):  # with it the folder is a run's, whatever else lies there
            self._place.write(name, trial.spec.config.to_yaml().encode())
        trial.state, trial.reason = "running", None
        self._since[number] = self._clock()
        write_trial(self._place, trial)

    def up(self, number: int) -> None:
        """Its worker is there: the trial's clock starts now, without what a new process costs."""
        self._since[number] = self._clock()
        self._note_signs(number)

    def heard(self, number: int, row: Mapping[str, Any]) -> bool:
        """An epoch has ended; whether the trial is to stop now. It does so after its checkpoint, of its own accord."""
        trial = self.trials[number]
        spent = float(row.get("prefix_cache_s") or 0.0)
        if int(row["epoch"]) not in trial.curve and spent >= _USED_S:
            trial.cached_s = (trial.cached_s or 0.0) + spent
        trial.curve[int(row["epoch"])] = epoch_of(row, trial.seconds + self._busy(number))
        self._ask_rule(trial, int(row["epoch"]))
        write_trial(self._place, trial)
        self._note_signs(number)
        return number in self._told_to_stop

    def ended(self, number: int, end: Mapping[str, Any]) -> bool:
        """A worker says how its trial ended (see ``trial_run.train_trial``); whether that worker can take another one."""
        state, message = end["state"], end.get("message")
        if state == "crashed":
            self.lost(number, message or "crashed")
            return False
        trial = self._leave(number)
        if state == "stopped" and number not in self._told_to_stop:
            state, message = "waiting", None  # the driver itself was told to stop: --resume goes on from the checkpoint
        trial.state = state
        trial.reason = self._told_to_stop.get(number) if state == "stopped" else message
        write_trial(self._place, trial)
        return True

    def lost(self, number: int, cause: str) -> None:
        """The trial crashed, or its process died: it waits again, or has failed where its tries are used up."""
        trial = self._leave(number)
        if number in self._told_to_stop:  # what it was to do next was to end; its checkpoint is older than that news
            trial.state, trial.reason = "stopped", self._told_to_stop[number]
            write_trial(self._place, trial)
            return
        if trial.failures >= self._max_failures:
            tries = f"{trial.failures + 1} {'try' if trial.failures == 0 else 'tries'}"
            trial.state, trial.reason = "failed", f"crashed in {tries}: {cause}"
        else:
            trial.failures += 1
            trial.state, trial.reason = "waiting", f"crashed, to be tried again: {cause}"
        write_trial(self._place, trial)

    def closed(self) -> None:
        """The driver leaves: what still ran waits, so that nothing claims to be running."""
        place = self._place.once() if isinstance(self._place, Mirror) else self._place
        for number in list(self._since):
            trial = self._leave(number)
            trial.state = "waiting"
            try:
                write_trial(place, trial)
            except MedtlError:  # the store is gone; what runs there by its last word is taken up likewise
                place = Folder.local(self._folder)

    # How it does it.

    def _add(self, spec: TrialSpec) -> None:
        self.trials[spec.number] = read_trial(self._folder, spec)
        self._stages_of[spec.number] = self._stages(spec)

    def _take_up(self) -> None:
        """What an earlier driver knew, told to the rule again; epochs that it never heard of are heard now."""
        for number in sorted(self.trials):
            trial = self.trials[number]
            for epoch in sorted(trial.curve):
                if self._rule is not None:
                    self._rule.recall(number, epoch + 1, trial.curve[epoch].val_auc)
        for number in sorted(self.trials):
            trial = self.trials[number]
            if trial.state != "running":
                continue
            for row in epochs_logged(self._folder / trial.spec.name):
                if row["epoch"] not in trial.curve:
                    last = max((known.seconds for known in trial.curve.values()), default=trial.seconds)
                    trial.curve[row["epoch"]] = epoch_of(row, last + float(row.get("epoch_s") or 0.0))
                    self._ask_rule(trial, row["epoch"])
            # Until it was lost it was busy at least until its last epoch.
            trial.seconds = max([trial.seconds, *(known.seconds for known in trial.curve.values())])
            trial.state = "waiting"
            if number in self._told_to_stop:
                trial.state, trial.reason = "stopped", self._told_to_stop[number]
            write_trial(self._place, trial)

    def _ask_rule(self, trial: Trial, epoch: int) -> None:
        if self._rule is None:
            return
        reason = self._rule.hear(trial.number, epoch + 1, trial.curve[epoch].val_auc)
        if reason is not None and epoch + 1 < trial.spec.config.train.epochs:  # after its last epoch it ends anyway
            self._told_to_stop[trial.number] = reason

    def _leave(self, number: int) -> Trial:
        trial = self.trials[number]
        trial.seconds += self._busy(number)
        self._since.pop(number, None)
        self._signs.pop(number, None)
        return trial

    def _note_signs(self, number: int) -> None:
        # In a store the next look will do: it finds something new, and counts from then on.
        known = () if isinstance(self._place, Mirror) else signs_of(self._folder / self.trials[number].spec.name)
        self._signs[number] = known, self._clock()

    def _look_at(self, number: int) -> Signs | None:
        name = self.trials[number].spec.name
        return self._place.signs(name) if isinstance(self._place, Mirror) else signs_of(self._folder / name)

    def _busy(self, number: int) -> float:
        return self._clock() - self._since[number] if number in self._since else 0.0

    def _busy_prefixes(self) -> Collection[str]:
        return {prefix_of(self.trials[number].spec.config) for number in self._since}

    def _outcome(self, trial: Trial) -> Outcome:
        depth, num_stages = self._stages_of[trial.number]
        return outcome_of(
            trial, self._reserved, frozen_depth=depth, num_stages=num_stages, seconds=self._busy(trial.number)
        )


def waiting_numbers(outcomes: Iterable[Outcome]) -> list[int]:
    """The trials that have not ended."""
    return [outcome.number for outcome in outcomes if outcome.state in ("waiting", "running")]
