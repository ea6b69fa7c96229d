"""results.json → the line that a terminal shows of a split."""

from __future__ import annotations

from typing import Any


def describe_auc(entry: dict[str, Any]) -> str:
    """``AUC 0.973 [0.961, 0.981] (how the interval was made)``, or why there is none."""
    if entry["auc"] is None:
        return f"AUC undefined ({entry['auc_undefined']})"
    text = f"AUC {entry['auc']:.3f}"
    if entry["auc_ci"] is not None:
        text += f" [{entry['auc_ci'][0]:.3f}, {entry['auc_ci'][1]:.3f}]"
    if entry.get("ci_method"):
        text += f" ({entry['ci_method']})"
    if entry.get("ci_warning"):
        text += f"; {entry['ci_warning']}"
    return text


def describe_size(entry: dict[str, Any]) -> str:
    groups = "" if entry.get("n_groups") is None else f" of {entry['n_groups']} patients"
    what = "patients" if entry.get("unit") == "patient" else f"images{groups}"
    return f"{entry['n']} {what}"
