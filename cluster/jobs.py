"""Submission ─► Ray job: submitted once under its name, attached to while it runs, taken up again after it was lost.

A job's id is the run's name; a later attempt's is ``NAME.2``, ``NAME.3`` (no name holds a dot). Ray's server accepts an id once,
so of two submitters at the same moment one starts the job and the other attaches to it.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster import job_files, job_package
from cluster.job_api import JobServer
from cluster.job_plan import Submission
from medtl_dist.errors import Interrupted, UserError

LIVE = ("PENDING", "RUNNING")
MAX_ATTEMPTS = 1000
_LOG_BYTES_PER_S = 200_000  # the server sends a log whole each time: a long one is asked for less often
_PATIENCE_S = 300.0  # without an answer

Job = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Placed:
    """Where a submission ended up: ``news`` is submitted, resumed, attached or finished."""

    submission_id: str
    news: str


def attempts(jobs: Sequence[Job], name: str) -> list[tuple[int, Job]]:
    """The name's jobs with their numbers, the newest last; other programs' jobs of the same id are none of ours."""
    found: list[tuple[int, Job]] = []
    for job in jobs:
        first, dot, number = str(job.get("submission_id") or "").partition(".")
        ours = first == name and (not dot or (number.isdecimal() and int(number) > 1))
        if ours and (job.get("metadata") or {}).get("medtl_name") == name:
            found.append((int(number or 1), job))
    return sorted(found, key=lambda pair: pair[0])


def newest(server: JobServer, name: str) -> Job:
    """The name's newest attempt. Raises UserError where there is none."""
    found = attempts(server.jobs(), name)
    if not found:
        raise UserError(f"{server.address} has no job named {name}; `medtl list --address …` shows what it has.")
    return found[-1][1]


def submit(server: JobServer, submission: Submission, wheel: Callable[[], bytes] | None) -> Placed:
    """Start the run's job, unless it runs (attach to it) or has finished.

    ``wheel`` makes the code to ship; None: the cluster's image holds it. It is called only when a job is to start.

    Raises:
        UserError: the name is that of another run, or the cluster's Ray is of another version than the shipped code needs.
    """
    for _ in range(3):  # a second round where another submitter was faster
        past = attempts(server.jobs(), submission.name)
        if past:
            number, job = past[-1]
            _check_same(job, submission)
            if job.get("status") in LIVE:
                return Placed(str(job["submission_id"]), "attached")
            if job.get("status") == "SUCCEEDED" and not (
                submission.test and job["metadata"].get("medtl_test") != "yes"
            ):
                return Placed(str(job["submission_id"]), "finished")
        else:
            number = 0
        if number >= MAX_ATTEMPTS:
            raise UserError(f"--name {submission.name}: {number} attempts are enough; submit it under another name.")
        submission_id = submission.name if number == 0 else f"{submission.name}.{number + 1}"
        request = request_of(
            server,
            submission_id,
            submission.entrypoint,
            files=submission.files,
            metadata=submission.metadata,
            wheel=wheel,
        )
        if server.submit(request):
            return Placed(submission_id, "resumed" if number else "submitted")
        if number == 0 and not attempts(server.jobs(), submission.name):
            raise UserError(
                f"--name {submission.name}: {server.address} has a job of this id that medtl did not submit."
            )
    raise Interrupted(f"--name {submission.name}: others keep submitting it; try again.")


def request_of(
    server: JobServer,
    submission_id: str,
    entrypoint: str,
    *,
    files: Mapping[str, str],
    metadata: Mapping[str, str],
    wheel: Callable[[], bytes] | None,
) -> dict[str, Any]:
    """The body of Ray's POST /api/jobs/, its packages uploaded."""
    environment: dict[str, Any] = {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}}
    if wheel is not None:
        _check_version(server)
        code = job_package.reproducible(wheel())
        environment["py_modules"] = [server.upload(job_package.package_name(code), code)]
    folder = job_package.zipped(files)
    environment["working_dir"] = server.upload(job_package.package_name(folder), folder)
    return {
        "entrypoint": entrypoint,
        "submission_id": submission_id,
        "runtime_env": environment,
        "metadata": dict(metadata),
    }


def _check_version(server: JobServer) -> None:
    theirs, ours = str(server.version().get("ray_version")), importlib.metadata.version("ray")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(
            f"{server.address} runs Ray {theirs}, this program is made for {ours}: give the cluster an image with Ray {ours}, "
            "or use --code image with an image of medtl_dist made for it."
        )


def _check_same(job: Job, submission: Submission) -> None:
    theirs = job.get("metadata") or {}
    if theirs.get("medtl_digest") != submission.digest:
        raise UserError(
            f"--name {submission.name} is a {theirs.get('medtl_kind')} run of another config, in "
            f"{theirs.get('medtl_run_folder')}; submit the same one to go on with it, or choose another name."
        )


def follow(server: JobServer, submission_id: str, say: Say, *, poll_s: float = 1.0) -> tuple[Job, str]:
    """Wait for the job, saying what it prints as it comes; returns its last record and its whole log.

    Raises:
        Interrupted: no answer for five minutes, or the server no longer knows the job (its head was replaced).
    """
    said, heard = 0, time.monotonic()
    while True:
        try:
            job = server.job(submission_id)
            log = server.logs(submission_id) if job is not None else ""
        except Interrupted:
            if time.monotonic() - heard > _PATIENCE_S:
                raise
            time.sleep(poll_s)
            continue
        if job is None:
            raise Interrupted(
                f"{server.address} no longer knows {submission_id}: was the head replaced? Submit it again to resume."
            )
        heard, ended = time.monotonic(), job.get("status") not in LIVE
        said = _say_new(log, said, say, ended=ended)
        if ended:
            return job, log
        time.sleep(max(poll_s, len(log) / _LOG_BYTES_PER_S))


def _say_new(log: str, said: int, say: Say, *, ended: bool) -> int:
    """Say the whole lines after the first ``said`` characters of what a person reads of the log."""
    text = job_files.without_frames(log)
    complete = len(text) if ended else text.rfind("\n") + 1
    for line in text[said:complete].splitlines():
        say(line)
    return max(said, complete)


def exit_code(job: Job) -> int:
    """The command's own exit code; 75 where the job was stopped or lost without one: the same submission goes on."""
    if job.get("status") == "SUCCEEDED":
        return 0
    code = job.get("driver_exit_code")
    return code if isinstance(code, int) and 0 < code < 128 and job.get("status") == "FAILED" else 75


def described(job: Job) -> dict[str, Any]:
    """A job's facts for `medtl status` and `medtl list`, from fields that hold no secret; Ray's own message can quote the log."""
    metadata = job.get("metadata") or {}
    start, end = job.get("start_time"), job.get("end_time")
    running_s = ((end or time.time() * 1000) - start) / 1000 if start else None
    return {
        "name": metadata.get("medtl_name"),
        "kind": metadata.get("medtl_kind"),
        "attempt": job.get("submission_id"),
        "state": str(job.get("status")).lower(),
        "exit_code": None if job.get("status") in LIVE else exit_code(job),
        "seconds": None if running_s is None else round(running_s, 1),
        "run_folder": metadata.get("medtl_run_folder"),
    }


def listed(server: JobServer) -> list[dict[str, Any]]:
    """The newest attempt of every run that medtl submitted, by name."""
    jobs = server.jobs()
    names = sorted({str(name) for job in jobs if (name := (job.get("metadata") or {}).get("medtl_name"))})
    return [described(found[-1][1]) for name in names if (found := attempts(jobs, name))]
