"""sweep folder → sweep.html: one self-contained page, from sweep.json and sweep.parquet alone, the same bytes each time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medtl_dist.errors import DataError
from medtl_dist.report.cautions import Caution
from medtl_dist.report.page import render_page, write_page
from medtl_dist.report.sweep_charts import shown
from medtl_dist.report.sweep_figures import cache_table, depth_name, figures, parallel, stops_table
from medtl_dist.report.wording import MISSING, count, decimals, duration, interval, plural, typeset
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.sweep.summary import SUMMARY, read_summary
from medtl_dist.sweep.table import read_table

PAGE = "sweep.html"
_HEAD = ["Rank", "AUC", "95% interval", "Behind the best", "Frozen", "Best epoch", "Time", "State"]


@dataclass(frozen=True)
class Card:
    """The winner or the plain best: what it is, its AUC, and its knobs as (name, value)."""

    title: str
    trial: int
    auc: str
    interval: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class TrialRow:
    """A row of the table of all trials. ``cells`` are its numbers, ``said`` what else is to say, ``values`` its knobs."""

    trial: int
    chosen: bool
    cells: list[str]
    said: str
    values: list[str]


def build_sweep_page(folder: Path) -> Path:
    """Writes ``sweep.html`` into a sweep folder, all of it or nothing, and returns its path.

    Raises:
        DataError: sweep.json or sweep.parquet is missing, damaged, or they don't belong together.
        UserError: the folder can't be written.
    """
    folder = Path(folder)
    content, outcomes = read_summary(folder), read_table(folder)
    try:
        page = render(content, outcomes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise DataError(
            f"{folder / SUMMARY}: damaged, or not of the sweep beside it; the sweep writes it again: medtl tune --resume"
        ) from None
    return write_page(folder / PAGE, page)


def render(content: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The page, a pure function."""
    knobs = _varying(content)
    return render_page(
        "sweep.html",
        "sweep.css",
        name=content["sweep"],
        lead=_lead(content),
        sentence=_sentence(content),
        rule=content["rule"],
        cards=_cards(content, knobs),
        command=_command(content),
        cautions=_cautions(content),
        figures=figures(content, outcomes),
        parallel=parallel(content),
        head=_HEAD,
        knobs=knobs,
        rows=[_row(one, content, knobs) for one in _in_order(content, outcomes)],
        stops=stops_table(content),
        cache=cache_table(content),
        cache_sentence=_cache_sentence(content),
        importance_missing=content["importance"]["reason"],
        facts=_facts(content),
    )


def _lead(content: Mapping[str, Any]) -> str:
    states = ", ".join(f"{number} {state}" for state, number in content["states"].items())
    return f"{plural(content['num_trials'], 'trial')}: {states}"


def _sentence(content: Mapping[str, Any]) -> str:
    """The result in words."""
    winner, best = content["winner"], content["best"]
    if winner is None:
        return "No trial has an AUC that could be ranked."
    alike = plural(len(content["indistinguishable"]), "other trial")
    tail = (
        f" {alike.capitalize()} can’t be told apart from the plain best on these patients."
        if content["indistinguishable"]
        else ""
    )
    if winner["trial"] == best["trial"]:
        return (
            f"Trial {best['trial']} has the highest AUC, and no simpler trial is within one standard error of it.{tail}"
        )
    behind = winner["behind_best"]
    error = "" if behind["error"] is None else f", standard error {decimals(behind['error'])}"
    return (
        f"Trial {winner['trial']} is the simplest of those within one standard error of the highest AUC, trial "
        f"{best['trial']}’s: {decimals(behind['difference'])} behind it{error}.{tail}"
    )


def _cards(content: Mapping[str, Any], knobs: Sequence[str]) -> list[Card]:
    winner, best = content["winner"], content["best"]
    if winner is None:
        return []
    same = winner["trial"] == best["trial"]
    found = [_card("Winner, and plain best" if same else "Winner", winner, content, knobs)]
    return found if same else [*found, _card("Plain best", best, content, knobs)]


def _card(title: str, row: Mapping[str, Any], content: Mapping[str, Any], knobs: Sequence[str]) -> Card:
    values = content["knobs"][str(row["trial"])]
    facts = [("Frozen", depth_name(row["frozen_depth"], row["num_stages"])), ("Best epoch", count(row["epoch"] + 1))]
    facts += [(key, shown(values.get(key))) for key in knobs if key != "model.frozen_depth"]
    return Card(title, row["trial"], decimals(row["auc"]), interval(_bounds(row)), facts)


def _bounds(row: Mapping[str, Any]) -> tuple[float, float] | None:
    return (row["auc_ci"][0], row["auc_ci"][1]) if row["auc_ci"] else None


def _varying(content: Mapping[str, Any]) -> list[str]:
    """Knobs that differ between trials, in the order of their keys."""
    rows = list(content["knobs"].values())
    return [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if len({shown(row.get(key)) for row in rows}) > 1
    ]


def _command(content: Mapping[str, Any]) -> str:
    """The command that trains the winner's recipe again, from the sweep's own config."""
    if content["winner"] is None:
        return ""
    parts = ["medtl train --config SWEEP/config.yaml"]
    for key, value in content["winner"]["overrides"].items():
        # An own line of the block each; shlex, since a value may hold what a shell reads as its own.
        parts.append("--set " + shlex.quote(f"{key}={_as_yaml(value)}"))
    return " \\\n  ".join(parts)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _cautions(content: Mapping[str, Any]) -> list[Caution]:
    found = []
    for text in content["cautions"]:
        title, _, rest = typeset(text).partition(": ")
        found.append(Caution(f"{title}.", rest[:1].upper() + rest[1:]) if rest else Caution("Note.", title))
    return found


def _in_order(content: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Ranked trials by rank, then the others by number."""
    places = {row["trial"]: place for place, row in enumerate(content["ranking"])}
    return sorted(outcomes, key=lambda one: (places.get(one.number, len(places)), one.number))


def _row(one: Outcome, content: Mapping[str, Any], knobs: Sequence[str]) -> TrialRow:
    ranked = {row["trial"]: (place, row) for place, row in enumerate(content["ranking"], start=1)}
    reasons = {row["trial"]: row["reason"] for row in content["unranked"]}
    values = content["knobs"][str(one.number)]
    place, row = ranked.get(one.number, (None, None))
    epochs = count(len(one.curve))
    behind = row["behind_best"] if row is not None else None
    cells = [
        count(place),
        decimals(row["auc"]) if row is not None else "not ranked",
        interval(_bounds(row)) if row is not None else "",
        decimals(behind["difference"]) if behind is not None else MISSING,
        f"{one.frozen_depth} of {one.num_stages}",
        f"{count(row['epoch'] + 1)} of {epochs}" if row is not None else f"{MISSING} of {epochs}",
        duration(one.seconds),
        one.state,
    ]
    roles = []
    if row is not None:
        is_winner = one.number == content["winner"]["trial"]
        is_best = one.number == content["best"]["trial"]
        roles = [word for word, yes in (("winner", is_winner), ("plain best", is_best)) if yes]
        roles += ["can’t be told apart from the best"] if row["indistinguishable"] else []
        roles += ["within one standard error"] if row["within_one_error"] and not is_best else []
    said = [*roles, reasons.get(one.number) or one.reason or ""]
    if one.attempts > 1:
        said.append(f"{one.attempts} starts")
    chosen = content["winner"] is not None and one.number == content["winner"]["trial"]
    told = "; ".join(text for text in said if text)
    return TrialRow(one.number, chosen, cells, told, [shown(values.get(key)) for key in knobs])


def _cache_sentence(content: Mapping[str, Any]) -> str:
    cache = content["cache"]
    if not cache["by_depth"]:
        return "No trial used the cache of frozen stages’ outputs."
    busy = content["cost"]["busy_s"]
    return (
        f"Sharing the frozen stages’ outputs saved about {duration(cache['saved_s'])}, where the trials took "
        f"{duration(busy)} in all. Estimated: without it every epoch would have cost what filling the cache did"
        f"{'' if cache['views'] == 1 else ', per view'}."
    )


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = content["cost"]
    facts = [
        ("Metric", content["metric"]),
        ("Winner’s rule", content["rule"]),
        ("Time of all trials together", duration(cost["busy_s"])),
        ("CPU hours", f"{cost['cpu_hours']:.2f}"),
        ("GPU hours", f"{cost['gpu_hours']:.2f}" if cost["gpu_hours"] else ""),
        ("Epochs", count(cost["epochs"])),
        ("Restarts after failures", count(cost["restarts"]) if cost["restarts"] else ""),
    ]
    return [(name, value) for name, value in facts if value]
