"""`medtl evaluate RUN --data SET`: external validation, printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from medtl_dist.cli.headline import describe_auc, describe_size
from medtl_dist.cli.progress import one_bar

if TYPE_CHECKING:
    from medtl_dist.storage import Folder


def evaluate_elsewhere(
    folder: Folder, data: str, *, split: str | None, class_map: str | None, name: str | None, as_json: bool
) -> None:
    """Score another set with a finished run, write its page, and print both sets' numbers side by side."""
    from medtl_dist.report.external import build_external_page_in
    from medtl_dist.train.class_map import parse_class_map
    from medtl_dist.train.external import evaluate_external

    mapping = {} if class_map is None else parse_class_map(class_map)
    with one_bar("scoring") as show:
        content = evaluate_external(folder, data, split=split or "all", class_map=mapping, name=name, progress=show)
    page = build_external_page_in(folder.part(content["folder"].removeprefix(f"{folder.url}/")))
    if as_json:
        typer.echo(json.dumps(content))
        return
    entry = content["entry"]
    typer.echo(
        f"{content['name']} ({', '.join(content['splits'])})  {describe_auc(entry)}; {describe_size(entry)}{_prevalence(entry)}"
    )
    for own, told in content["own"].items():
        typer.echo(
            f"the run's {own}  {describe_auc(told | {'auc_undefined': 'see its report'})}; {told['n']} images{_prevalence(told)}"
        )
    threshold = content["threshold"]
    if threshold is not None and entry["sensitivity"]:
        rates = ", ".join(
            f"{rate} {entry[rate]['value']:.3f}"
            for rate in ("sensitivity", "specificity")
            if entry[rate]["value"] is not None
        )
        typer.echo(f"at the threshold that was fixed on val ({threshold['value']:.3f})  {rates}")
    renamed = [f"{theirs} = {ours}" for theirs, ours in content["class_map"].items() if theirs != ours]
    if renamed:
        typer.echo(f"classes  {', '.join(renamed)}")
    openings = content["test_openings"]
    if openings:
        times, by = openings["count"], openings["configurations"]
        typer.echo(
            f"its test split  opened {times} time{'s' if times != 1 else ''} by {by} configuration{'s' if by != 1 else ''}"
        )
    for caution in content["cautions"]:
        typer.echo(f"note  {caution}")
    typer.echo(f"page  {page}")


def _prevalence(entry: dict) -> str:
    return "" if entry.get("prevalence") is None else f"; prevalence {entry['prevalence']:.3f}"
