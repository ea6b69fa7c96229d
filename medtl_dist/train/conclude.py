"""fit → predictions and results: the best checkpoint, scored once more on whole splits."""

from __future__ import annotations

from typing import Any

from medtl_dist import collectives
from medtl_dist.collectives import agreed
from medtl_dist.data.subset import epochs_fixed
from medtl_dist.errors import DataError, MedtlError
from medtl_dist.train import checkpoint, results
from medtl_dist.train.evaluate import Predictions, score_split
from medtl_dist.train.prefix_cache import kept_val
from medtl_dist.train.session import Session
from medtl_dist.train.state import best_row, disk_error


def conclude(session: Session, *, open_test: bool) -> None:
    """Score the best checkpoint on val, and on test where asked, and write predictions, history and results. Collective."""
    run = session.run
    best = _best_checkpoint(session)
    weights = agreed(lambda: checkpoint.load(run.folder, best["checkpoint"])[0])
    session.scorer.model.load_state_dict(weights)
    splits = ["val"] + (["test"] if open_test else [])
    scored: dict[str, Predictions] = {}
    for split in splits:
        kept = kept_val(session) if split == "val" else None
        predictions = score_split(
            session.scorer,
            session.dataset,
            split,
            rank=run.rank,
            world_size=run.world_size,
            loader=session.loader,
            kept=kept,
        )
        if predictions is not None:
            scored[split] = predictions
    failure: MedtlError | None = None
    if run.rank == 0:
        try:
            results.write(session, best, scored)
        except MedtlError as error:
            failure = error
        except OSError as error:
            failure = disk_error(run, error)
    collectives.raise_together(failure)  # nobody leaves before the results are written


def _best_checkpoint(session: Session) -> dict[str, Any]:
    """The best epoch's row whose checkpoint verifies, told loudly where it is not the best one; of a fold with fixed epochs
    the last epoch's and no other. The same on every rank."""
    chosen: dict[str, Any] | None = None
    failure: MedtlError | None = None
    if session.run.rank == 0:
        rows = list(session.position.history)
        if epochs_fixed(session.dataset):
            rows = rows[-1:]
        best = best_row(rows)
        while chosen is None and (row := best_row(rows)) is not None:
            try:
                checkpoint.verify(session.run.folder, row["checkpoint"])
                chosen = row
            except DataError as error:
                # Epochs that were never the best have had their checkpoints deleted on purpose: no news.
                if row is best or row["checkpoint"] in checkpoint.steps(session.run.folder):
                    session.journal.note(f"best checkpoint passed over: {error.message}")
                rows.remove(row)
        if chosen is None:
            failure = DataError(f"{session.run.folder.path}: no checkpoint verifies; train again in a new run folder.")
    collectives.raise_together(failure)
    result = collectives.from_rank_0(chosen)
    assert result is not None
    return result
