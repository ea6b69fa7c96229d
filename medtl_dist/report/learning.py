"""history.parquet → learning curves and their table. The file counts epochs from 0, people count from 1."""

from __future__ import annotations

from medtl_dist.report import charts
from medtl_dist.report.figures import Figure, Table
from medtl_dist.report.record import Record
from medtl_dist.report.svg import Told
from medtl_dist.report.wording import MISSING, decimals


def learning_figures(record: Record) -> list[Figure]:
    """Loss, and validation AUC, by epoch; none for a run without a history."""
    rows = record.history
    if not rows:
        return []
    epochs = [row.epoch - rows[0].epoch + 1 for row in rows]
    best = None if record.results.best_epoch is None else record.results.best_epoch - rows[0].epoch + 1
    losses = [("training", [row.train_loss for row in rows]), ("validation", [row.val_loss for row in rows])]
    aucs = [row.val_auc for row in rows]
    said = [f"{name} loss from {decimals(values[0])} to {decimals(values[-1])}" for name, values in losses]
    rise = f"From {decimals(aucs[0], missing='undefined')} to {decimals(aucs[-1], missing='undefined')}."
    return [
        Figure(
            "Loss",
            charts.learning_chart(
                Told("learning-loss", "Loss by epoch", "; ".join(said) + "."),
                epochs,
                losses,
                best,
                y_name="Cross-entropy loss",
            ),
            "A validation loss that rises while the training loss falls means that the model learns by heart.",
            legend=[(charts.swatch(f"line-{index}"), name) for index, (name, _) in enumerate(losses)],
        ),
        Figure(
            "Validation AUC",
            charts.learning_chart(
                Told("learning-auc", "Validation AUC by epoch", rise),
                epochs,
                [("validation", aucs)],
                best,
                y_name="AUC",
                ceiling=1.0,
                best_label=decimals,
            ),
            "The weights of the best epoch are the ones that were kept and scored.",
        ),
    ]


def history_table(record: Record) -> Table | None:
    """The learning curves' numbers, a row per epoch."""
    if not record.history:
        return None
    first = record.history[0].epoch
    rows = [
        [
            f"{row.epoch - first + 1}" + (" (best)" if row.epoch == record.results.best_epoch else ""),
            decimals(row.train_loss),
            decimals(row.val_loss),
            decimals(row.val_auc, missing="undefined"),
            decimals(row.val_average_precision),
            f"{row.lr:.2g}" if row.lr is not None else MISSING,
        ]
        for row in record.history
    ]
    head = ["Epoch", "Training loss", "Validation loss", "Validation AUC", "Average precision", "Learning rate"]
    return Table("Every epoch", head, rows)
