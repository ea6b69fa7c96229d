"""numbers → words: one way of writing each kind of number, and the sentences a reader without statistics can follow."""

from __future__ import annotations

import datetime

MISSING = "–"
_THIN = "\u00a0"  # no-break space: a number and its unit stay on one line


def decimals(value: float | None, digits: int = 3, *, missing: str = MISSING) -> str:
    """A share, AUC or score with ``digits`` decimals; "> 0.999" where rounding would claim a perfect 1 (or a plain 0)."""
    if value is None:
        return missing
    shown = f"{value:.{digits}f}"
    smallest = 10.0**-digits
    if value < 1 and float(shown) == 1:
        return f">{_THIN}{1 - smallest:.{digits}f}"
    if value > 0 and float(shown) == 0:
        return f"<{_THIN}{smallest:.{digits}f}"
    return shown


def percent(value: float | None, *, missing: str = MISSING) -> str:
    """A share as per cent with one decimal; "> 99.9%" where rounding would claim all of them."""
    if value is None:
        return missing
    if value < 1 and f"{value * 100:.1f}" == "100.0":
        return f">{_THIN}99.9%"
    if value > 0 and f"{value * 100:.1f}" == "0.0":
        return f"<{_THIN}0.1%"
    return f"{value * 100:.1f}%"


def level(value: float) -> str:
    """A confidence level as per cent, without needless decimals."""
    return f"{value * 100:g}%"


def count(value: float | None) -> str:
    """A count with thousands set apart."""
    return MISSING if value is None else f"{value:,.0f}"


def plural(number: float | None, noun: str) -> str:
    """``1 image``, ``2 images``; the noun's plural is regular or ends in s already (``class``, ``patients``)."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{count(number)}{_THIN}{noun}{ending}"


def millions(value: int | None) -> str:
    """A number of parameters: in millions above one million."""
    return count(value) if value is None or value < 1_000_000 else f"{value / 1e6:.1f}{_THIN}million"


def interval(bounds: tuple[float, float] | None, *, as_percent: bool = False) -> str:
    """``0.941 to 0.969``; empty where there is none."""
    if bounds is None:
        return ""
    write = percent if as_percent else decimals
    return f"{write(bounds[0])} to {write(bounds[1])}"


def duration(seconds: float | None) -> str:
    """Seconds as the two largest of h, min, s."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f}{_THIN}s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours:,}{_THIN}h {minutes}{_THIN}min"
    return f"{minutes}{_THIN}min {left}{_THIN}s" if minutes else f"{left}{_THIN}s"


def moment(stamp: str | None) -> str:
    """An ISO time stamp as ``22 November 2026, 14:05 UTC``; any other text as it is."""
    if not stamp:
        return MISSING
    try:
        time = datetime.datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    if time.tzinfo is not None:
        time = time.astimezone(datetime.UTC)
    return f"{time.day} {time:%B %Y, %H:%M}{' UTC' if time.tzinfo is not None else ''}"


def pair_counts(auc: float, bounds: tuple[float, float] | None) -> tuple[str, str, str]:
    """(of how many pairs, ranked correctly, interval) for the AUC's plain meaning.

    100 pairs, or the next power of ten at which an AUC that is not exactly 1 doesn't round to all of them.
    """
    base = 100
    while auc < 1 and round(auc * base) == base and base < 1_000_000:
        base *= 10
    spread = "" if bounds is None else f"{count(round(bounds[0] * base))} to {count(round(bounds[1] * base))}"
    return count(base), count(round(auc * base)), spread


def pairs_sentence(
    auc: float, bounds: tuple[float, float] | None, *, unit: str, positive: str, confidence: float
) -> str:
    """What a binary AUC means, in pairs of one image (or patient) with and one without the finding."""
    base, right, spread = pair_counts(auc, bounds)
    said = f" ({level(confidence)} interval: {spread})" if spread else ""
    return (
        f"In {base} pairs of one {unit} with {positive} and one without, the model gives the higher score to the one with "
        f"{positive} in {'all' if auc == 1 else 'about'} {right}{said}. Guessing gives 50 of 100."
    )


def macro_sentence(auc: float, *, unit: str, num_classes: int, num_defined: int | None) -> str:
    """What a one-vs-rest macro AUC means; without an interval in pairs, since it is a mean of several AUCs."""
    base, right, _ = pair_counts(auc, None)
    some = num_defined is not None and num_defined < num_classes
    of = f"the {num_defined} of {num_classes} classes present" if some else f"{num_classes} classes"
    return (
        f"For each class in turn, take {base} pairs of one {unit} of that class and one of another: the model gives the "
        f"first the higher score for the class in {'all' if auc == 1 else 'about'} {right} of them (mean over {of}). "
        "Guessing gives 50 of 100."
    )


def several_labels_sentence(auc: float, *, unit: str, num_classes: int, num_defined: int | None) -> str:
    """What a macro AUC means where an image may have several classes, or be unknown for some."""
    base, right, _ = pair_counts(auc, None)
    some = num_defined is not None and num_defined < num_classes
    of = f"the {num_defined} of {num_classes} classes that have both" if some else f"{num_classes} classes"
    return (
        f"For each class in turn, take {base} pairs of one {unit} known to have it and one known not to: the model gives the "
        f"first the higher score for the class in {'all' if auc == 1 else 'about'} {right} of them (mean over {of}). "
        f"Guessing gives 50 of 100. What is unknown of {'an image' if unit == 'image' else f'a {unit}'} is counted nowhere."
    )


def typeset(text: str) -> str:
    """Typewriter apostrophes and comparison signs as a printer sets them."""
    return text.replace("'", "’").replace(">=", "≥")


def how_the_interval_was_made(method: str | None, unit: str) -> str:
    """The interval's method, then why it is that one, in plain words."""
    if not method:
        return ""
    stated = f"How the interval was made: {typeset(method)}."
    lowered = method.lower()
    if "every patient has one" in lowered or "over patients" in lowered:
        return stated
    if "one-sided" in lowered:
        return f"{stated} No error was seen; were the true AUC below the bound, one would probably have been."
    if "independent" in lowered:
        return f"{stated} It treats every {unit} as if it came from a different patient."
    if "cluster" in lowered:
        return f"{stated} Images of one patient resemble each other, so it counts patients, not images."
    return stated


def rule(text: str) -> str:
    """The threshold's rule in plain words."""
    lowered = text.lower()
    if "youden" in lowered:
        return "the score at which sensitivity + specificity is largest (Youden’s index)"
    if lowered.startswith("sensitivity"):
        return f"the highest score that reached {typeset(text)}"
    return text or "a fixed score"


SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def split_name(name: str) -> str:
    """``val`` is jargon; ``validation`` is the word."""
    return SPLIT_NAMES.get(name, name)
