"""`medtl submit`, `logs`, `stop`, `list`: runs on a Ray cluster elsewhere, through its job server."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.sizing import GPU_IMAGES_PER_S
from medtl_dist.cli.crossval import EpochsFrom, EpochsFromOption, Folds, Repeats
from medtl_dist.cli.train import ConfigFile, Overrides, Preset
from medtl_dist.config import Config, load_config
from medtl_dist.errors import MedtlError, UserError

if TYPE_CHECKING:
    from cluster.job_api import JobServer, Server
    from cluster.job_plan import Submission

Address = Annotated[
    str,
    typer.Option(
        envvar="MEDTL_ADDRESS", help="Ray's dashboard, http(s)://HOST:PORT. [env: MEDTL_ADDRESS]", show_envvar=False
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File of the cluster's token [default: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token]."),
]
CaBundle = Annotated[
    Path | None, typer.Option(help="PEM file of trusted authorities for https [default: the system's].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
Name = Annotated[
    str, typer.Option("--name", help="Run name; the run folder is STORE/runs/NAME, and the same name resumes.")
]
StorePlace = Annotated[
    str, typer.Option("--store", help="s3://bucket/prefix, gs://bucket/prefix, or a folder that every node mounts.")
]
Code = Annotated[
    str, typer.Option(metavar="wheel|image", help="Ship the code as a wheel, or use what the cluster's image holds.")
]
Wheel = Annotated[Path | None, typer.Option(help="Wheel to ship [default: built from the sources this runs from].")]
Wait = Annotated[bool, typer.Option(help="Follow the job, fetch its report, exit with its code.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results and report [default: runs/NAME].")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run and its GPU hours; nothing is sent.")]
Speed = Annotated[float, typer.Option("--images-per-s", help="Images/s that one GPU trains, for the estimate.")]
Test = Annotated[bool, typer.Option("--test", help="Score the test split once at the end; the ledger counts it.")]
Space = Annotated[str | None, typer.Option("--space", metavar="NAME|FILE", help="Search space; wins over tune.space.")]

submit_app = typer.Typer(
    name="submit", help="Run a config on a Ray cluster, as a job that survives this terminal.", no_args_is_help=True,
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


@submit_app.command()
def train(
    address: Address, name: Name, store: StorePlace, preset: Preset = None, config: ConfigFile = None,
    overrides: Overrides = None,
    test: Test = False, token_file: TokenFile = None, ca_bundle: CaBundle = None, code: Code = "wheel", wheel: Wheel = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option(help="Stop at a checkpoint after so many GPU hours, over all stages and resumed attempts.")
    ] = None,
    images_per_s: Speed = GPU_IMAGES_PER_S, wait: Wait = True, out: Out = None, dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train on a Ray cluster: `medtl train` there, its output, report and exit code here.

    The same command again attaches to the job, or goes on with it after it was stopped or lost; Ctrl-C leaves it running.

    Example: medtl submit train --preset resnet101 --set data.shards=sets/xrays --set cluster.num_workers=8 \\
        --address https://ray.example.org --token-file ~/.ray/token --name xrays-1 --store s3://bucket/medtl
    """
    from cluster.job_plan import planned

    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    submission = planned("train", resolved, name=name, store=store, test=test, max_gpu_hours=max_gpu_hours)
    _submit(
        submission, server_of(address, token_file, ca_bundle), code=code, wheel=wheel, wait=wait, out=out,
        dry_run=dry_run, images_per_s=images_per_s, trials=1, as_json=as_json,
    )  # fmt: skip


@submit_app.command()
def tune(
    address: Address, name: Name, store: StorePlace, preset: Preset = None, config: ConfigFile = None,
    overrides: Overrides = None,
    space: Space = None, token_file: TokenFile = None, ca_bundle: CaBundle = None, code: Code = "wheel", wheel: Wheel = None,
    images_per_s: Speed = GPU_IMAGES_PER_S, wait: Wait = True, out: Out = None, dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Sweep on a Ray cluster: `medtl tune` there; a space file travels with the config.

    Example: medtl submit tune --preset resnet101 --space space.yaml --set tune.num_trials=24 --set data.shards=sets/xrays \\
        --address https://ray.example.org --name sweep-1 --store s3://bucket/medtl
    """
    from cluster.job_plan import planned

    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    named, text = _read_space(space if space is not None else resolved.tune.space)
    submission = planned("tune", resolved, name=name, store=store, space=named, space_text=text)
    _submit(
        submission, server_of(address, token_file, ca_bundle), code=code, wheel=wheel, wait=wait, out=out,
        dry_run=dry_run, images_per_s=images_per_s, trials=resolved.tune.num_trials, as_json=as_json,
    )  # fmt: skip


@submit_app.command()
def crossval(
    address: Address, name: Name, store: StorePlace, folds: Folds = 5, repeats: Repeats = 1,
    epochs_from: EpochsFromOption = EpochsFrom.fixed, preset: Preset = None, config: ConfigFile = None,
    overrides: Overrides = None,
    token_file: TokenFile = None, ca_bundle: CaBundle = None, code: Code = "wheel", wheel: Wheel = None,
    images_per_s: Speed = GPU_IMAGES_PER_S, wait: Wait = True, out: Out = None, dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Cross-validate on a Ray cluster: `medtl crossval --parallel` there, its output, report and exit code here.

    Example: medtl submit crossval --folds 5 --preset resnet101 --set data.shards=sets/xrays --address https://ray.example.org \\
        --name folds-1 --store s3://bucket/medtl
    """
    from cluster.job_plan import planned
    from medtl_dist.data.folds import Settings

    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    settings = Settings(folds, repeats, epochs_from.value)
    submission = planned("crossval", resolved, name=name, store=store, folds=settings)
    _submit(
        submission, server_of(address, token_file, ca_bundle), code=code, wheel=wheel, wait=wait, out=out,
        dry_run=dry_run, images_per_s=images_per_s, trials=folds * repeats, as_json=as_json,
    )  # fmt: skip


def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Run name.")],
    address: Address,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Wait for more until the job ends; exit with its code.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With -f: also fetch results and report into this folder.")] = None,
    token_file: TokenFile = None,
    ca_bundle: CaBundle = None,
) -> None:
    """Print what a submitted run has printed.

    Example: medtl logs xrays-1 -f --address https://ray.example.org
    """
    from cluster.job_files import without_frames
    from cluster.jobs import newest

    server = connect(server_of(address, token_file, ca_bundle))
    job = newest(server, _checked(name))
    if follow:
        raise typer.Exit(_follow(server, str(job["submission_id"]), out))
    typer.echo(without_frames(server.logs(str(job["submission_id"]))), nl=False)


def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Run name.")],
    address: Address,
    token_file: TokenFile = None,
    ca_bundle: CaBundle = None,
) -> None:
    """Stop a submitted run; the same `medtl submit` goes on with it from its last checkpoint.

    Example: medtl stop xrays-1 --address https://ray.example.org
    """
    from cluster.jobs import newest

    server = connect(server_of(address, token_file, ca_bundle))
    job = newest(server, _checked(name))
    stopped = server.stop(str(job["submission_id"])) if job.get("status") in ("PENDING", "RUNNING") else False
    typer.echo(
        f"{name}: asked to stop." if stopped else f"{name} had already ended ({str(job.get('status')).lower()})."
    )


def list_runs(
    address: Address, token_file: TokenFile = None, ca_bundle: CaBundle = None, as_json: AsJson = False
) -> None:
    """List the runs that were submitted to a cluster.

    Example: medtl list --address https://ray.example.org
    """
    from cluster.jobs import listed

    rows = listed(connect(server_of(address, token_file, ca_bundle)))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(job_line(row))
    if not rows:
        typer.echo("no runs were submitted to this cluster.", err=True)


def job_status(name: str, address: str, token_file: Path | None, ca_bundle: Path | None, *, as_json: bool) -> None:
    """`medtl status NAME --address`: where a submitted run stands, and the last lines it printed."""
    from cluster.job_files import without_frames
    from cluster.jobs import described, newest

    server = connect(server_of(address, token_file, ca_bundle))
    job = newest(server, _checked(name))
    lines = without_frames(server.logs(str(job["submission_id"]))).splitlines()
    facts = described(job) | {"last_lines": lines[-5:]}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(job_line(facts))
    for line in facts["last_lines"]:
        typer.echo(f"  {line}")


def job_line(row: dict[str, Any]) -> str:
    """One run in a line."""
    code = "" if row["exit_code"] is None else f", exit code {row['exit_code']}"
    seconds = "" if row["seconds"] is None else f", {row['seconds']:.0f} s"
    return f"{row['name']}: {row['kind']} {row['state']}{code}{seconds}, {row['run_folder']}"


def _checked(name: str) -> str:
    from cluster.job_plan import checked_run_name

    return checked_run_name(name)


def server_of(address: str, token_file: Path | None, ca_bundle: Path | None) -> Server:
    from cluster.job_api import Server, find_token

    return Server(address, find_token(token_file), ca_bundle)


def wheel_of(code: str, wheel: Path | None) -> Callable[[], bytes] | None:
    """What makes the code to ship; None where the cluster's image holds it. Raises UserError for options that contradict."""
    from cluster.job_package import build_wheel, checked_wheel

    if code not in ("wheel", "image") or (code == "image" and wheel is not None):
        raise UserError(f"--code {code}: expected wheel, or image (without --wheel).")
    if code == "image":
        return None
    return build_wheel if wheel is None else lambda: checked_wheel(wheel)


def connect(server: Server) -> JobServer:
    """The job server, with a word on a token that travels in the clear."""
    from cluster.job_api import JobServer

    if server.in_the_clear:
        typer.echo(
            "note: http to another machine: the token travels unencrypted; use https, or a tunnel to it.", err=True
        )
    return JobServer(server)


def _read_space(space: str | None) -> tuple[str | None, str | None]:
    """A space's name, or the text of its file. Raises UserError for a file that can't be read."""
    if space is None or not (Path(space).suffix in (".yaml", ".yml") or "/" in space):
        return space, None
    try:
        return None, Path(space).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--space {space}: can't be read ({getattr(error, 'strerror', None) or 'no text'}).") from None


def _submit(
    submission: Submission, where: Server, *, code: str, wheel: Path | None, wait: bool, out: Path | None,
    dry_run: bool, images_per_s: float, trials: int, as_json: bool,
) -> None:  # fmt: skip
    from cluster.job_plan import described, estimate
    from cluster.jobs import submit

    make = wheel_of(code, wheel)
    if dry_run:
        count = functools.partial(_counts, folds=None if submission.folds is None else submission.folds.folds)
        hours = estimate(submission.config, count, images_per_s=images_per_s, trials=trials)
        shipped = "in the image" if code == "image" else f"wheel {wheel}" if wheel else "wheel, built from the sources"
        facts = described(submission, address=where.address, code=shipped, hours=hours)
        typer.echo(json.dumps(facts, indent=1))
        if hours["gpu_hours_at_most"] is None:
            typer.echo("note: a set can't be read from here, so the GPU hours are unknown.", err=True)
        return
    server = connect(where)
    placed = submit(server, submission, make)
    typer.echo(
        f"{submission.name}: {placed.news} as {placed.submission_id}; run folder {submission.run_folder}", err=True
    )
    if not wait and placed.news != "finished":
        if as_json:
            typer.echo(
                json.dumps(
                    {"submission_id": placed.submission_id, "news": placed.news, "run_folder": submission.run_folder}
                )
            )
        return
    raise typer.Exit(_follow(server, placed.submission_id, out or Path("runs") / submission.name, as_json=as_json))


def _counts(config: Config, *, folds: int | None = None) -> dict[str, int] | None:
    """Images of each split where the set can be read from here; of ``folds``, of a fold that is one part of so many."""
    from medtl_dist.data.shards import open_dataset
    from medtl_dist.storage import StorageOptions

    data = config.data
    options = StorageOptions(
        endpoint_url=data.endpoint_url, ca_bundle=data.ca_bundle, anonymous=data.anonymous, timeout_s=5, retries=0
    )  # an estimate is not worth a long wait
    try:
        dataset = open_dataset(data.shards or "", options, check_files=False)
    except MedtlError:
        return None
    counts = {split: sum(shard.samples for shard in dataset.shards(split)) for split in dataset.splits}
    if folds is None:
        return counts
    total = counts.get("train", 0) + counts.get("val", 0)
    return {"train": total - total // folds, "val": math.ceil(total / folds)}


def _follow(server: JobServer, submission_id: str, out: Path | None, *, as_json: bool = False) -> int:
    """Print the job's lines until it ends, fetch what it hands over, and return its exit code."""
    from cluster.job_files import save, unframed
    from cluster.jobs import exit_code, follow

    job, log = follow(server, submission_id, lambda line: typer.echo(line, err=as_json))
    code = exit_code(job)
    files = unframed(log) if code == 0 else None
    if files is not None and out is not None:
        for path in save(files, out):
            typer.echo(f"fetched {path}", err=True)
    if as_json and files is not None:
        index = next(
            (
                files[name]
                for name in ("results.json", "chain.json", "compare.json", "sweep.json", "crossval.json")
                if name in files
            ),
            "{}",
        )
        typer.echo(json.dumps(json.loads(index)))
    if code == 75:
        typer.echo(f"{submission_id} was stopped or lost; the same `medtl submit` goes on with it.", err=True)
    return code
