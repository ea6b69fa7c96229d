"""`medtl doctor`: what would keep a run from working here or on a cluster, each finding with its remedy."""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medtl_dist.cli.jobs import AsJson, CaBundle, Code, TokenFile, Wheel, connect, server_of, wheel_of
from medtl_dist.cli.train import ConfigFile, Overrides, Preset
from medtl_dist.config import Config, load_config
from medtl_dist.errors import UserError

if TYPE_CHECKING:
    from cluster.doctor_checks import Finding
    from cluster.job_api import JobServer

_CONFIG_FILE = "config.yaml"


def doctor(
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    store: Annotated[
        str | None, typer.Option(help="Where run folders go; written, read and cleaned as a trial.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Look at every node of this cluster, http(s)://HOST:PORT.")
    ] = None,
    token_file: TokenFile = None,
    ca_bundle: CaBundle = None,
    code: Code = "wheel",
    wheel: Wheel = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="Run inside a Ray cluster: look at all of its nodes.")] = False,
    manifest: Annotated[Path | None, typer.Option(help="Compare versions with these Kubernetes manifests.")] = None,
    step: Annotated[
        bool, typer.Option("--step", help="Also train one step of the config, in a throw-away folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a run from working: versions, storage, shards, GPUs, network, clocks, /dev/shm.

    \b
    Examples:
      medtl doctor                                   (this machine; an image's health check)
      medtl doctor --preset resnet101 --set data.shards=s3://bucket/sets/xrays --store s3://bucket/medtl --step \\
          --address https://ray.example.org --token-file ~/.ray/token
    """
    asked = preset is not None or config is not None or bool(overrides)
    resolved = load_config(preset=preset, file=config, overrides=overrides or []) if asked else None
    if resolved is not None and resolved.transfer.stages:
        raise UserError("transfer.stages: doctor looks at one set and trains one step: give it a stage's config.")
    if resolved is not None and resolved.data.shards is None:
        raise UserError("data.shards is not set: give the set to look at with --set data.shards=…")
    if step and resolved is None:
        raise UserError("--step trains a step of a config: name one with --preset or --config.")
    text = _read(manifest)
    if address is not None:
        server = connect(server_of(address, token_file, ca_bundle))
        findings = _from_outside(server, resolved, store, manifest=text, step=step, code=code, wheel=wheel)
    elif nodes:
        from cluster.launch import set_environment

        set_environment(own_cluster=False)
        from cluster.doctor import nodes as look_at_nodes

        findings = look_at_nodes(resolved, store, step=step)
    else:
        from cluster.doctor import here

        findings = here(resolved, store, manifest=text, step=step)
    raise typer.Exit(_tell(findings, as_json=as_json))


def _tell(findings: Sequence[Finding], *, as_json: bool) -> int:
    from cluster.doctor_checks import worst

    if as_json:
        typer.echo(json.dumps({"findings": [finding.as_row() for finding in findings]}))
        return worst(findings)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.state:8}{finding.check:{width}}  {finding.text}")
        if finding.remedy:
            typer.echo(f"{'':8}{'':{width}}  → {finding.remedy}")
    return worst(findings)


def _from_outside(
    server: JobServer,
    config: Config | None,
    store: str | None,
    *,
    manifest: str | None,
    step: bool,
    code: str,
    wheel: Path | None,
) -> list[Finding]:
    """Run `medtl doctor --nodes` as a job, and add what only the client can know: authentication, its own versions."""
    from cluster import doctor_checks as checks
    from cluster.doctor import installed_versions, parsed_findings
    from cluster.job_plan import checked_store
    from cluster.jobs import follow, request_of

    theirs = {"ray": str(server.version().get("ray_version"))}
    found = {"client": {"ray": installed_versions().get("ray", "none")}, "cluster": theirs}
    if manifest is not None:
        found["manifest"] = checks.manifest_versions(manifest)
    findings = [checks.authentication(server.asks_for_token()), checks.versions(found)]
    if checks.worst(findings):
        return findings
    words = ["python", "-m", "medtl_dist.cli.main", "doctor", "--nodes", "--json"]
    if store is not None:
        words += ["--store", checked_store(store)]
    files: dict[str, str] = {}
    if config is not None:
        words += ["--config", _CONFIG_FILE] + (["--step"] if step else [])
        files[_CONFIG_FILE] = config.to_yaml()
    name = f"doctor-{uuid.uuid4().hex[:8]}"
    request = request_of(server, name, shlex.join(words), files=files, metadata={}, wheel=wheel_of(code, wheel))
    server.submit(request)
    _, log = follow(server, name, lambda _line: None)
    return findings + parsed_findings(log)


def _read(manifest: Path | None) -> str | None:
    if manifest is None:
        return None
    try:
        return manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--manifest {manifest}: can't be read.") from None
