"""predictor + inputs → one table of scores: made part by part, each committed once, so that a killed run goes on.

``FILE.parts/`` holds ``identity.json`` (what is made by what), the listing, and ``part-NNNNN.parquet``, each renamed into
place whole. Which images a part holds is arithmetic (``data/partition.py``), and a part's bytes depend on nothing else:
whoever makes it, here or on a cluster, makes the same. When none is missing they become one file, in order.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from medtl_dist import __version__
from medtl_dist.data.dicom_window import Rendering, parse_window
from medtl_dist.data.encoding import Failure, Workers, open_workers
from medtl_dist.data.inputs import InputOptions, Inputs, kind_of, list_inputs
from medtl_dist.data.partition import whole_batches
from medtl_dist.data.seeing import Eye, Seen, eye_of, rendering_of, seen_part
from medtl_dist.errors import DataError, Interrupted, UserError
from medtl_dist.run import Folder
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import folder_at
from medtl_dist.train.predict_output import finish, part_table
from medtl_dist.train.predictor import Predictor, load_predictor, predict_logits
from medtl_dist.train.run_copy import scorable

PART_SIZE = 1024
_IDENTITY = "identity.json"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PredictOptions:
    """``inputs``: what INPUT is and how it is read; ``window``: of DICOM inputs, where the checkpoint says nothing;
    ``part_size``: images that an interruption costs at most; ``num_workers``: processes that decode, None: by the device."""

    inputs: InputOptions = field(default_factory=InputOptions)
    window: str | None = None
    part_size: int = PART_SIZE
    num_workers: int | None = None


@dataclass(frozen=True)
class Job:
    """All that makes a part, besides the predictor; picklable. ``run_folder``: a path, or an address, reached as ``storage``
    says; ``parts``: the folder; ``identity``: as in its file."""

    run_folder: str
    storage: StorageOptions
    parts: str
    inputs: Inputs
    eye: Eye
    identity: dict[str, Any]

    def path(self, number: int) -> Path:
        return Path(self.parts) / f"part-{number:05d}.parquet"


@dataclass(frozen=True)
class Outcome:
    """What an output holds: images scored, bad and left out on purpose; ``resumed``: parts found made; files written."""

    scored: int
    bad: int
    left_out: int
    resumed: int
    out: Path
    errors: Path | None
    patients: Path | None
    reasons: dict[str, int]
    notes: tuple[str, ...]


# What makes the missing parts: called with the job, their numbers, and a callback for each that is done (its images).
MakeParts = Callable[[Job, Predictor, Sequence[int], Callable[[int], None]], None]


def predict(
    run_folder: Path | str,
    source: str,
    out: Path,
    options: PredictOptions | None = None,
    *,
    make_parts: MakeParts | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Score every image of ``source`` with a finished run's best checkpoint and write ``out``, a Parquet file.

    ``run_folder``: a path, or the address of a run in a store.
    Bad images are listed in ``out``'s ``.errors.parquet`` and counted in the outcome; patients, where they are known, get a
    row each in ``.patients.parquet``. Called again after an interruption it goes on; called again afterwards it tells
    what was made. ``make_parts``: None scores in this process.

    Raises:
        UserError: no run, nothing to score, or ``out`` is of another run, checkpoint or input.
        DataError: a damaged checkpoint or shard set.
        Interrupted: a store can't be reached, or a worker process was killed.
    """
    options = options or PredictOptions()
    out = _checked(out).absolute()
    run = folder_at(run_folder)
    with scorable(run) as here:
        predictor = load_predictor(here, _device())
    parts = out.with_name(f"{out.name}.parts")
    with _locked(out, parts):
        job, notes = plan_job(run, predictor, source, parts, options, progress)
        outcome, resumed = _already(out, job), len(job.inputs.spans)
        if outcome is None:
            _begin(job, out)
            missing = [number for number in range(len(job.inputs.spans)) if not job.path(number).is_file()]
            resumed = len(job.inputs.spans) - len(missing)
            done = sum(len(span) for n, span in enumerate(job.inputs.spans) if n not in set(missing))
            total = job.inputs.num_images

            def count(images: int) -> None:
                nonlocal done
                done += images
                if progress is not None:
                    progress("scoring", done, total)

            (make_parts or _parts_here(options.num_workers))(job, predictor, missing, count)
            try:
                outcome = finish(job.path, len(job.inputs.spans), out, predictor, job.identity)
            except OSError as error:
                raise _unwritable(out, error) from None
        shutil.rmtree(parts, ignore_errors=True)
    return Outcome(out=out, resumed=resumed, notes=(*predictor.notes, *job.inputs.notes, *notes), **outcome)


def plan_job(
    run: Folder,
    predictor: Predictor,
    source: str,
    parts: Path,
    options: PredictOptions,
    progress: Progress | None = None,
) -> tuple[Job, list[str]]:
    """List the inputs and say what makes the output, and what the user should know of it. Raises: as ``predict``."""
    kind = kind_of(source) if options.inputs.kind == "auto" else options.inputs.kind
    rendering, notes = _rendering(predictor, kind, options.window)
    part_size = whole_batches(options.part_size, predictor.batch_size) if options.part_size > 0 else options.part_size
    inputs = list_inputs(
        source,
        options.inputs,
        parts,
        rendering=rendering,
        part_size=part_size,
        storage=predictor.storage,
        progress=None if progress is None else lambda done, total: progress("reading headers", done, total),
    )
    if inputs.dataset is not None and inputs.dataset.channels != predictor.preprocessing["channels"]:
        ours = "grey" if predictor.preprocessing["channels"] == 1 else "RGB"
        notes.append(f"the model's images are {ours} and the set's are not: they are converted")
    eye = eye_of(predictor.preprocessing, rendering if kind == "dicom" else None)
    identity = {
        "model": predictor.identity(),
        "input": {"kind": inputs.kind, "place": inputs.dataset.folder if inputs.dataset else _place(source)},
        "input_digest": inputs.digest,
        "rendering": None if eye.recipe is None or eye.recipe.rendering is None else eye.recipe.rendering.as_json(),
        "group": options.inputs.group,
        "part_size": part_size,
        "tool_version": __version__,
    }
    return Job(run.url, predictor.storage, str(parts), inputs, eye, identity), notes


def score_part(job: Job, predictor: Predictor, number: int, workers: Workers) -> int:
    """Make a part and commit it; returns how many images it holds.

    Raises: DataError, a shard or the listing can't be read; Interrupted, the disk is full.
    """
    seen: list[Seen] = []
    logits: list[Any] = []
    waiting: list[int] = []  # rows with an image and no logits yet

    def flush() -> None:
        found = predict_logits(predictor, [seen[row].image for row in waiting])  # type: ignore[misc]
        for row, values in zip(waiting, found, strict=True):
            logits[row] = values
            seen[row] = seen[row]._replace(image=_DONE)
        waiting.clear()

    with contextlib.closing(seen_part(job.inputs, number, job.eye, workers)) as images:  # type: ignore[type-var]
        for one in images:
            seen.append(one)
            logits.append(None)
            if not isinstance(one.image, Failure):
                waiting.append(len(seen) - 1)
            if len(waiting) == predictor.batch_size:
                flush()
    if waiting:
        flush()
    sink = io.BytesIO()
    pq.write_table(part_table(predictor, job.inputs, seen, logits), sink)
    path = job.path(number)
    try:
        Folder.local(path.parent).write(path.name, sink.getvalue())
    except OSError as error:
        raise _unwritable(path, error) from None
    return len(seen)


def _unwritable(path: Path, error: OSError) -> Interrupted:
    return Interrupted(
        f"{path} can't be written ({error.strerror or error}): free space; the same command then goes on"
    )


_DONE = Failure("")  # in the place of pixels that are no longer needed


def _parts_here(num_workers: int | None) -> MakeParts:
    def make(job: Job, predictor: Predictor, missing: Sequence[int], count: Callable[[int], None]) -> None:
        images = sum(len(job.inputs.spans[number]) for number in missing)
        with open_workers(_num_decoders(num_workers, predictor), images) as workers:
            for number in missing:
                count(score_part(job, predictor, number, workers))

    return make


def _num_decoders(num_workers: int | None, predictor: Predictor) -> int:
    """With a GPU the CPUs decode; on a CPU decoding shares the computing threads."""
    if num_workers is not None:
        return num_workers
    if predictor.scorers[0].device.type != "cuda":
        return 1
    return min(8, max(torch.get_num_threads() - 1, 1))


def _rendering(predictor: Predictor, kind: str, window: str | None) -> tuple[Rendering | None, list[str]]:
    """How DICOM inputs become pixels, and what the user should know of it. Raises UserError."""
    trained = rendering_of(predictor.preprocessing)
    if window is not None:
        if kind != "dicom" or trained is not None:
            why = "the checkpoint says how DICOM becomes pixels" if trained is not None else f"the input is a {kind}"
            raise UserError(f"--window {window}: {why}; leave it out")
        trained = parse_window(window)
        return trained, ["the run was trained on image files: whether --window makes the same pixels, nobody knows"]
    if kind in ("folder", "table", "medmnist") and trained is not None:
        return trained, ["the run was trained on DICOM: image files are taken as they are, without its window"]
    return trained, []


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _place(source: str) -> str:
    return str(Path(source).absolute())


def _checked(out: Path) -> Path:
    """Raises UserError where a Parquet file can't be made."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):  # Path has made one slash of two
        raise UserError(
            f"--out {out}: parts are renamed into place, so the output lies in a folder; copy it to a store after"
        )
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: the scores are a Parquet file; name it FILE.parquet")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder as {out.absolute().parent}; make it first")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    return out


@contextlib.contextmanager
def _locked(out: Path, parts: Path) -> Iterator[None]:
    """The folder of parts, made and held by this process alone. Raises UserError."""
    try:
        parts.mkdir(mode=0o700, exist_ok=True)
        lock = (parts / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--out {out}: {parts} can't be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another process is writing it; wait for it or stop it") from None
        yield


def _already(out: Path, job: Job) -> dict[str, Any] | None:
    """What a finished output holds, if it is this job's; None where there is none yet. Raises UserError: another job's."""
    if not out.exists():
        return None
    try:
        told = pq.read_schema(out).metadata or {}
        made = json.loads(told[b"medtl"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        raise UserError(f"--out {out} exists and is not of `medtl predict`; name another file") from None
    if made["identity"] != job.identity:
        raise _other(out, made["identity"], job.identity)
    found = made["outcome"]
    paths = {name: None if found[name] is None else out.with_name(found[name]) for name in ("errors", "patients")}
    return found | paths


def _begin(job: Job, out: Path) -> None:
    """Write down what is made by what, or compare with what was. Raises UserError: the parts are of another job."""
    file = Path(job.parts) / _IDENTITY
    if file.is_file():
        try:
            before = json.loads(file.read_bytes())
        except ValueError:
            raise DataError(f"{file} is damaged; delete {job.parts} to start again") from None
        if before != job.identity:
            raise _other(out, before, job.identity)
        return
    Folder.local(job.parts).write(_IDENTITY, json.dumps(job.identity, indent=1).encode())


def _other(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    differing = [name for name in now if before.get(name) != now[name]]
    if {"input", "group"} & set(differing):
        differing = [name for name in differing if name != "input_digest"]  # which follows
    words = {
        "model": "another run or checkpoint",
        "input": "another input",
        "input_digest": "an input that has changed since",
    }
    told = ", ".join(words.get(name, f"another {name.replace('_', ' ')}") for name in differing)
    what = f"{out} (or {out.name}.parts)"
    return UserError(f"--out {what} was begun with {told}; delete it to start again, or name another file")


def has_parts(job: Job) -> bool:
    """Whether this process sees the job's own folder of parts."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((Path(job.parts) / _IDENTITY).read_bytes()) == job.identity
    return False


def load_for(job: Job, *, threads: int) -> Predictor:
    """The job's predictor in another process, computing with ``threads``. Raises: as ``load_predictor``; DataError, it is
    not the one that the job began with."""
    with scorable(folder_at(job.run_folder, job.storage)) as here:
        predictor = load_predictor(here, _device())
    torch.set_num_threads(threads)
    if predictor.identity() != job.identity["model"] or job.identity["tool_version"] != __version__:
        raise DataError(
            f"{job.run_folder}: this node has another checkpoint, precision, device or medtl_dist than where the job began"
        )
    return predictor
