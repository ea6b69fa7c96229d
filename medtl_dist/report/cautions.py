"""Results → what a reader must know before believing the numbers, the gravest first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from medtl_dist.report.schema import Results
from medtl_dist.report.tables import openings, shown_splits
from medtl_dist.report.wording import split_name

RANDOM_WEIGHTS = "random initial weights"


@dataclass(frozen=True)
class Caution:
    """A caution in a few words and in a sentence or two. ``mark``: what results.json's own wording of it contains."""

    title: str
    text: str
    mark: str = "\0"


def cautions(results: Results) -> list[Caution]:
    """All cautions of a run. Those in results.json that say what one of ours says already are not repeated."""
    found = [
        *_about_leakage(results),
        *_about_the_split(results),
        *_about_the_interval(results),
        *_about_the_model(results),
    ]
    for text in results.cautions:
        if not any(caution.mark in text.lower() for caution in found):
            title, _, rest = text.partition(": ")
            short = rest and len(title) <= 60
            found.append(Caution(_sentence(title), _sentence(rest)) if short else Caution("Note.", _sentence(text)))
    return found


def _sentence(text: str) -> str:
    text = re.sub(r"\bval\b", "validation", text.strip())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _about_the_split(results: Results) -> Iterator[Caution]:
    if "test" not in results.splits:
        yield Caution(
            "Validation, not test.",
            "The best epoch was chosen on these same images, so the numbers are optimistic. "
            "When the recipe is settled, score the test split once: medtl evaluate RUN --split test.",
            "validation only",
        )
    elif results.test_openings is not None and results.test_openings.count > 1:
        yield Caution(
            f"Test split scored {openings(results)}.",
            "Each look makes it likelier that a good number is luck: what was picked after several looks is optimistic.",
            "opened",
        )


def _about_leakage(results: Results) -> Iterator[Caution]:
    leaks = (results.data.audit or {}).get("leaks")
    if leaks:
        yield Caution(
            "Leakage.",
            f"The audit of the data set found {leaks} {'leak' if leaks == 1 else 'leaks'} between its splits, so the numbers are "
            "optimistic. Make a set without: medtl data audit DEST --fix NEWDEST.",
            "leak",
        )


def _about_the_interval(results: Results) -> Iterator[Caution]:
    key = shown_splits(results)[0]
    entry = results.splits[key]
    if entry.auc is None and entry.auc_undefined:
        yield Caution("AUC undefined.", _sentence(entry.auc_undefined.removeprefix("undefined: ")), "undefined")
    reasons: dict[str, list[str]] = {}
    for item in (entry, entry.other_level):
        if item is not None and item.ci_warning:
            reasons.setdefault(_shortened(item.ci_warning), []).append(f"by {item.unit}")
    for reason, units in reasons.items():
        title = f"Unreliable interval ({split_name(key)}, {' and '.join(units)})."
        yield Caution(title, f"{_sentence(reason)} The true uncertainty may be larger.", "unreliable")
    if results.data.group_source == "none":
        yield Caution(
            "Independent images assumed.",
            "The data set doesn’t say which images are of one patient. If patients have several, the true interval is wider, "
            "and images of one patient may lie in training and in the scored split at once.",
            "independent images",
        )


def _shortened(warning: str) -> str:
    """A warning of many parts (one per class) as its first two; the table of classes has them all."""
    parts = [part.removeprefix("unreliable: ") for part in warning.split("; ")]
    more = f"; and {len(parts) - 2} more, see each class" if len(parts) > 2 else ""
    return "; ".join(parts[:2]) + more


def _about_the_model(results: Results) -> Iterator[Caution]:
    if RANDOM_WEIGHTS in results.model.weights.lower():
        yield Caution(
            "Random initial weights.",
            "The network was not pretrained. Expect more from the same run with pretrained weights.",
            "random initial",
        )
    entry = results.splits[shown_splits(results)[0]]
    threshold = entry.threshold or results.threshold
    if threshold is not None and threshold.caution:
        yield Caution("About the threshold.", _sentence(threshold.caution))
