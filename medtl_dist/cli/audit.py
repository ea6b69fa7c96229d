"""`medtl data audit`: leaks, duplicates and oddities of a shard set, and a set without the leaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medtl_dist.cli import data_options as options
from medtl_dist.cli.progress import stages_bar

if TYPE_CHECKING:
    from medtl_dist.data.audit import Audit

_SHOWN = 10


def audit(
    dest: options.Place,
    accept: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Pairs that may stay, with a reason each (YAML or CSV); recorded in the set's dataset.json.",
        ),
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(metavar="NEWDEST", help="Write a set without the leaks: duplicates joined, groups in one split."),
    ] = None,
    workers: options.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as JSON.")] = False,
) -> None:
    """Search a shard set for leakage between splits, duplicates, odd images and shortcuts.

    Confirmed leakage ends with exit code 4. Candidates are listed and left to you. --fix writes a new set; of a joined
    group every image goes where the most protected one is (test before val before train).

    \b
    Examples:
      medtl data audit sets/xrays
      medtl data audit sets/xrays --accept accepted.yaml
      medtl data audit sets/xrays --fix sets/xrays-mended
      medtl data audit s3://bucket/sets/xrays
    """
    from medtl_dist.data.audit import audit as run_audit
    from medtl_dist.data.audit import record, refuse_leaks
    from medtl_dist.data.audit_accept import read_accepted
    from medtl_dist.data.audit_fix import fix as run_fix
    from medtl_dist.data.shards import open_dataset
    from medtl_dist.errors import UserError
    from medtl_dist.storage import parse_place

    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least 1 expected")
    place = parse_place(dest)
    if accept and place.remote and fix is None:
        raise UserError(
            f"--accept writes into the set's dataset.json, and {place.url} is in a store: download the set, accept there, "
            "and upload it; or write a set without the other leaks: --fix NEWDEST"
        )
    if fix is not None and "://" in str(fix):
        raise UserError(f"--fix {fix}: a folder expected; write the set there, then upload it")
    dataset = open_dataset(dest)
    accepted = read_accepted(accept, dataset) if accept else {}
    with stages_bar() as progress:
        found = run_audit(dataset, accepted=accepted, num_workers=workers, progress=progress)
        if fix is not None:
            mended, after = run_fix(found, fix, accepted=accepted, num_workers=workers, progress=progress)
            dataset, audited = mended, after
        else:
            audited = found
            if accept:
                dataset = record(dataset, found.summary)
    if as_json:
        facts = {"folder": dataset.folder, "sha256": dataset.sha256, **audited.summary}
        facts["findings"] = [finding.as_dict() for finding in audited.findings]
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        for line in lines_of(found):
            typer.echo(line)
        if fix is not None:
            for line in [*_changes(fix, dataset.info["fix"]), *lines_of(audited)]:
                typer.echo(line)
    refuse_leaks(dataset, audited.summary)


def lines_of(found: Audit) -> list[str]:
    """The readable lines of an audit."""
    summary, limit = found.summary, found.threshold
    confirmed = (
        "too few pairs of other groups for a threshold: only identical pixels are confirmed"
        if limit.confirmed is None
        else f"confirmed from {limit.confirmed}, candidates from {limit.candidate} "
        f"(pairs of other groups: median {limit.null_median}, largest {limit.null_largest}); "
        f"expected by chance: {limit.expected_false['confirmed']} confirmed, {limit.expected_false['candidates']} candidates"
    )
    counts = (
        f"{summary['images']:,} images; {summary['identical_images']:,} in {summary['identical_sets']:,} sets of "
        f"identical ones, {summary['near_pairs']:,} near-identical pairs, {summary['candidate_pairs']:,} candidates"
    )
    lines = [f"{found.seen.dataset.folder}: {counts}", f"threshold: {confirmed}"]
    for finding in found.findings:
        lines.append(f"{finding.level}: {finding.text}")
        lines += [f"  {_item(item)}" for item in finding.items[:_SHOWN] if "keys" in item or "key" in item]
        if len(finding.items) > _SHOWN:
            lines.append(f"  … {len(finding.items) - _SHOWN:,} more (--json)")
    if not any(finding.level == "leakage" for finding in found.findings):
        lines.append("no leakage between splits was found")
    return lines


def _item(item: dict[str, Any]) -> str:
    if "keys" not in item:
        return " ".join(str(value) for value in item.values())
    splits = " / ".join(dict.fromkeys(item["splits"]))
    classes = " / ".join(dict.fromkeys(str(name) for name in item["classes"]))
    why = f"  accepted: {item['reason']}" if "reason" in item else ""
    return f"{item['keys'][0]} {item['keys'][1]}  {splits}  {classes}  {item['score']:.3f} {item['how']}{why}"


def _changes(fix: str, changes: dict[str, Any]) -> list[str]:
    moved = ", ".join(f"{move['samples']:,} from {move['from']} to {move['to']}" for move in changes["moved"])
    joined = f"{changes['joined_groups']:,} groups joined into {changes['into_groups']:,}"
    private = f"{fix}.private"
    return [
        f"{fix}: {joined}; images moved: {moved or 'none'}",
        f"{private} names files and patients: keep it apart from the set, and do not share it"
        if Path(private).is_dir()
        else f"no {private}: there was none beside the audited set, whose own still leads from keys to files",
    ]
