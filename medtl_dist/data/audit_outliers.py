"""fingerprints ─► what is odd about single images or the whole set: polarity, brightness, sizes, empty classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtl_dist.data.audit_scan import Scan
from medtl_dist.data.findings import Finding
from medtl_dist.data.fingerprint import NEGATIVE, coefficients, is_blank, stat, variant_name, variant_operator

# Median agreement of images with the set's mean from which "upside down" and "negative" mean anything.
_COMMON_LOOK = 0.4
_MIN_IMAGES = 8
# An image counts as turned when turning it back brings it so much nearer to the set's look.
_TURN_GAIN = 0.25
# Robust standard deviations (1.4826 · median absolute deviation) from the median.
_FAR = 6.0


def outliers(seen: Scan) -> list[Finding]:
    """Findings about single images and about the set as a whole; none of them is leakage."""
    blank = is_blank(seen.records)
    found = [
        _images(seen, "blank_images", "warning", np.flatnonzero(blank), "blank"),
        *_against_the_set(seen, ~blank),
        _intensity(seen, ~blank),
        *_single_class_splits(seen),
        _mixed_colour(seen),
        _window(seen),
    ]
    return [finding for finding in found if finding is not None]


def _images(
    seen: Scan, kind: str, level: str, places: NDArray, text: str, facts: dict[int, dict[str, Any]] | None = None
) -> Finding | None:
    if not len(places):
        return None
    items = [
        {"key": seen.key(place), "split": seen.dataset.splits[seen.split[place]], **(facts or {}).get(place, {})}
        for place in places.tolist()
    ]
    return Finding(kind, level, len(places), f"{len(places):,} image{'s' if len(places) > 1 else ''}: {text}", items)


def _against_the_set(seen: Scan, shown: NDArray[np.bool_]) -> list[Finding | None]:
    """Images whose negative, or turned copy, looks like the set while they themselves do not."""
    places = np.flatnonzero(shown)
    if len(places) < _MIN_IMAGES:
        return []
    coefs = coefficients(seen.records[places])
    coefs /= np.maximum(np.linalg.norm(coefs, axis=1, keepdims=True), 1e-6)
    look = np.median(coefs, axis=0)
    look /= max(float(np.linalg.norm(look)), 1e-6)
    own = coefs @ look
    middle, usual = np.quantile(own, (0.5, 0.05))
    if middle < _COMMON_LOOK:
        return []  # no common look to be different from
    negative = places[(own < -0.1) & (-own >= min(usual, middle / 2))]
    turns = np.stack([(coefs[:, order] * sign) @ look for order, sign in map(variant_operator, range(NEGATIVE))])
    best = turns.argmax(axis=0)
    turned = (turns.max(axis=0) >= middle) & (own < usual) & (turns.max(axis=0) - own > _TURN_GAIN)
    facts = {int(places[i]): {"how": variant_name(int(best[i]))} for i in np.flatnonzero(turned)}
    return [
        _images(
            seen, "opposite_polarity", "warning", negative,
            "like the negative of the others; is MONOCHROME1 or an inversion mislabelled?",
        ),
        _images(seen, "turned_images", "warning", places[turned], "turned, compared with the others", facts),
    ]  # fmt: skip


def _intensity(seen: Scan, shown: NDArray[np.bool_]) -> Finding | None:
    far = np.zeros(len(seen), bool)
    for name in ("mean", "std"):
        values = stat(seen.records, name)
        middle = np.median(values)
        spread = max(1.0, 1.4826 * float(np.median(np.abs(values - middle))))
        far |= np.abs(values - middle) > _FAR * spread
    means, stds = stat(seen.records, "mean"), stat(seen.records, "std")
    places = np.flatnonzero(far & shown)
    facts = {int(place): {"mean": int(means[place]), "std": int(stds[place])} for place in places}
    return _images(seen, "unusual_intensity", "note", places, "far brighter, darker or flatter than the set", facts)


def _single_class_splits(seen: Scan) -> list[Finding]:
    found = []
    for position, split in enumerate(seen.dataset.splits):
        labels = np.unique(seen.label[seen.split == position])
        if len(labels) == 1:
            text = f"split {split} has images of one class only: no AUC can be computed on it"
            found.append(Finding("one_class_split", "warning", 1, text, [{"split": split}]))
    return found


def _mixed_colour(seen: Scan) -> Finding | None:
    grey = stat(seen.records, "grey") > 0
    if seen.dataset.channels == 1 or grey.all() or not grey.any():
        return None
    minority = np.flatnonzero(grey if grey.sum() * 2 <= len(grey) else ~grey)
    which = "grey" if grey.sum() * 2 <= len(grey) else "in colour"
    return _images(seen, "mixed_colour", "note", minority, f"{which}, unlike the others")


def _window(seen: Scan) -> Finding | None:
    window = seen.dataset.info["preprocessing"].get("window")
    if window is None or "tags" not in str(window):
        return None
    text = (
        "intensity windows came from the files' tags: vendors and sites set them differently, so a model may learn the "
        "site; compare with --window percentile"
    )
    return Finding("vendor_windows", "note", 1, text)
