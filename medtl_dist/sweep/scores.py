"""trial folders → the val scores that trials are compared by: labels and patients once, logits of every kept epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medtl_dist.metrics.intervals import Components, components
from medtl_dist.metrics.scores import group_codes
from medtl_dist.sweep.outcome import Outcome

UNKNOWN = -1


class Question(NamedTuple):
    """One AUC of the headline: the column of its logits, the rows whose answer is known, and the answers of those."""

    column: int
    rows: NDArray[np.bool_]
    positive: NDArray[np.bool_]


@dataclass(frozen=True)
class Val:
    """What all trials were scored on, in the index's order.

    labels: int64 [n], or label sets [n, classes] with -1 for unknown. groups: int64 [n] patients, None where unknown.
    """

    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    classes: tuple[str, ...]
    binary: bool

    def questions(self) -> list[Question]:
        """The classes whose AUC is defined; the headline is the mean of their AUCs."""
        found = []
        for column in [1] if self.binary else range(len(self.classes)):
            if self.labels.ndim == 2:
                rows = self.labels[:, column] != UNKNOWN
                positive = self.labels[rows, column] == 1
            else:
                rows = np.ones(len(self.labels), bool)
                positive = self.labels == column
            if 0 < int(positive.sum()) < len(positive):
                found.append(Question(column, rows, positive))
        return found

    def components(self, logits: NDArray) -> list[Components]:
        """DeLong's components of each question's AUC, of several questions with a place for every patient."""
        codes = np.arange(len(self.labels)) if self.groups is None else self.groups
        questions = self.questions()
        several = []
        for column, rows, positive in questions:
            found = components(positive, logits[rows, column], codes[rows])
            assert found is not None  # a question has both classes
            several.append(found if len(questions) == 1 else _spread(found, codes[rows], codes))
        return several


@dataclass(frozen=True)
class Scores:
    """Val logits by trial and epoch, float [n, classes]; ``notes`` says what could not be read."""

    val: Val
    epochs: Mapping[int, Mapping[int, NDArray]]
    notes: tuple[str, ...] = ()

    def at_best(self, outcome: Outcome) -> NDArray | None:
        """The logits of a trial's best epoch, or None where they were not kept."""
        return None if outcome.best is None else self.epochs.get(outcome.number, {}).get(outcome.best.epoch)


def read_scores(folder: Path, outcomes: Sequence[Outcome]) -> Scores | None:
    """What the trials of a sweep folder left of their val scores; None where not even the labels are there.

    The labels come from the first trial that has its predictions. A trial that scored other images, or whose files are
    damaged, has no scores, and a note says so.
    """
    notes: list[str] = []
    first: tuple[Val, list[str]] | None = None
    epochs: dict[int, dict[int, NDArray]] = {}
    of_best: dict[int, NDArray] = {}
    for outcome in outcomes:
        try:
            found = _predictions(folder / outcome.folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            notes.append(f"Trial {outcome.number}: its val predictions can't be read.")
            continue
        if found is None:
            continue
        val, keys, logits = found
        if first is None:
            first = val, keys
        elif keys != first[1] or not np.array_equal(val.labels, first[0].labels):
            notes.append(f"Trial {outcome.number}: it scored other images than the trials before it; not compared.")
            continue
        of_best[outcome.number] = logits
    if first is None:
        return None
    shape = (len(first[0].labels), len(first[0].classes))
    left_out = {int(note.split()[1].rstrip(":")) for note in notes}
    for outcome in (one for one in outcomes if one.number not in left_out):
        epochs[outcome.number], damaged = _kept_epochs(folder / outcome.folder, outcome, shape)
        if damaged:
            notes.append(f"Trial {outcome.number}: the val scores of {damaged} of its epochs can't be read.")
        if outcome.best is not None and outcome.number in of_best:
            epochs[outcome.number].setdefault(outcome.best.epoch, of_best[outcome.number])
    return Scores(first[0], epochs, tuple(notes))


def _predictions(run: Path) -> tuple[Val, list[str], NDArray] | None:
    """A trial's val rows as its own predictions have them, or None where it has none (yet)."""
    table_file, results_file = run / "predictions" / "val.parquet", run / "results.json"
    if not table_file.is_file() or not results_file.is_file():
        return None
    results: dict[str, Any] = json.loads(results_file.read_text(encoding="utf-8"))
    classes = tuple(str(name) for name in results["classes"])
    table = pq.read_table(table_file)
    logits = np.stack([table.column(f"logit_{name}").to_numpy() for name in classes], axis=1)
    if "label" in table.column_names:
        labels = table.column("label").to_numpy().astype(np.int64)
    else:
        sets = [table.column(f"label_{name}").fill_null(UNKNOWN).to_numpy() for name in classes]
        labels = np.stack(sets, axis=1).astype(np.int64)
    known = results["data"]["group_source"] != "none"
    groups = group_codes(table.column("group").to_pylist())[1] if known else None
    return Val(labels, groups, classes, results["task"] == "binary"), table.column("key").to_pylist(), logits


def _kept_epochs(run: Path, outcome: Outcome, shape: tuple[int, int]) -> tuple[dict[int, NDArray], int]:
    """The logits of the epochs whose AUC is defined, and how many files of them are damaged."""
    found: dict[int, NDArray] = {}
    damaged = 0
    for row in outcome.curve:
        file = run / "predictions" / "epochs" / f"{row.epoch:04d}.npy"
        if row.val_auc is None or not file.is_file():
            continue
        try:
            logits = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            logits = np.empty(0)
        if logits.shape != shape or logits.dtype.kind != "f" or not np.isfinite(logits).all():
            damaged += 1
        else:
            found[row.epoch] = logits
    return found, damaged


def _spread(found: Components, own: NDArray[np.int64], codes: NDArray[np.int64]) -> Components:
    """Components of some rows with a place for every patient, zero where none of the patient's answers is known."""
    patients, size = np.unique(own), int(codes.max()) + 1
    wholes = []
    for values in found[1:]:
        whole = np.zeros(size, values.dtype)
        whole[patients] = values
        wholes.append(whole)
    return Components(found.auc, *wholes)
