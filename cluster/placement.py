"""What a user types about a Kubernetes cluster, checked: names, images, places in a store, words of a command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from medtl_dist.errors import UserError

# KubeRay appends 6 characters to a RayJob's name for its cluster's, whose Services must stay within 63.
NAME_LIMITS = {"train": 47, "tune": 47, "cluster": 53, "doctor": 40}  # a doctor's RayJob is called NAME-doctor

_LABEL_1035 = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_LABEL_1123 = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9@%+=:,./_-]+")
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"{_PART}(?::[0-9]{{1,5}})?(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?P<digest>@sha256:[0-9a-f]{{64}})?"
)
_STORE = re.compile(r"((?:s3|gs)://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|/mnt)((?:/[A-Za-z0-9._=+-]+)*)")
_KEY = re.compile(r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_ANNOTATION_VALUE = re.compile(r"[ -~]{1,1024}")


def checked_name(name: str, kind: str) -> str:
    """A run name that KubeRay can use. Raises UserError."""
    limit = NAME_LIMITS.get(kind, min(NAME_LIMITS.values()))
    if not _LABEL_1035.fullmatch(name) or len(name) > limit:
        raise UserError(
            f"--name {name!r}: expected at most {limit} characters of a-z, 0-9 and -, a letter first and no - last; "
            "KubeRay makes the names of pods and services from it."
        )
    return name


def checked_label(option: str, name: str) -> str:
    """The name of a namespace, queue, claim or Secret. Raises UserError."""
    if not _LABEL_1123.fullmatch(name) or len(name) > 63:
        raise UserError(f"{option} {name!r}: expected at most 63 characters of a-z, 0-9 and -, and no - first or last.")
    return name


def checked_image(image: str, *, allow_tag: bool) -> str:
    """An image reference pinned by digest: head, workers and submitter then run the same bytes for ever. Raises UserError."""
    match = _IMAGE.fullmatch(image) if len(image) <= 1000 else None
    if match is None:
        raise UserError(
            f"--image {image!r}: expected an image reference such as registry.example.org/medtl@sha256:<64 hex digits>."
        )
    if match["digest"] is None and not allow_tag:
        raise UserError(
            f"--image {image}: a tag can be moved to another image while a run goes on. Pin the digest, …@sha256:<64 hex digits> "
            "(your registry and `docker buildx imagetools inspect` show it), or add --allow-tag."
        )
    return image


def checked_annotations(option: str, pairs: Mapping[str, str], *, as_label: bool = False) -> None:
    """Keys and values of annotations or, more narrowly, of labels. Raises UserError."""
    pattern = _LABEL_VALUE if as_label else _ANNOTATION_VALUE
    for key, value in pairs.items():
        if not _KEY.fullmatch(key) or not pattern.fullmatch(value):
            raise UserError(
                f"{option} {key!r}={value!r}: expected a Kubernetes key=value, such as cloud.example.org/kind=spot."
            )


def checked_words(command: Sequence[str]) -> list[str]:
    """A command whose words no shell reads as anything but themselves.

    The operator writes the entrypoint into a bash script in the submitter, Kubernetes expands ``$(NAME)`` in it, and Ray hands
    it to a second shell on the head. Words that need no quoting pass all of them unchanged; anything else is refused.
    Raises UserError.
    """
    for word in command:
        if not _WORD.fullmatch(word):
            raise UserError(
                f"{word!r} would be part of a command line: use letters, digits and @ % + = : , . / _ - only."
            )
    return list(command)


def checked_version(version: str) -> str:
    """A version of Ray as KubeRay reads it. Raises UserError."""
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){2}", version):
        raise UserError(f"--ray-version {version!r}: expected the version of Ray in the image, such as 2.60.0.")
    return version


@dataclass(frozen=True)
class Store:
    """Where shard sets and run folders lie: an object-store prefix, or a mounted volume (``claim``).

    Raises:
        UserError: a store that pods on several nodes could not share, or with characters that a shell reads.
    """

    root: str
    claim: str | None = None

    def __post_init__(self) -> None:
        match = _STORE.fullmatch(self.root)
        if match is None or {".", ".."} & set(match[2].split("/")):
            raise UserError(
                f"--store {self.root!r}: expected s3://bucket/prefix, gs://bucket/prefix, or /mnt/… with --claim; letters, "
                "digits and . _ = + - between slashes, no login."
            )
        if self.mounted and self.claim is None:
            raise UserError(
                f"--store {self.root}: a folder of each pod's own is lost with it, and pods don't share it. Name a "
                "PersistentVolumeClaim that all nodes can write (ReadWriteMany) with --claim, or use an object store."
            )
        if self.mounted and self.root == "/mnt":
            raise UserError("--store /mnt: name a folder below it, such as /mnt/store.")
        if self.claim is not None:
            checked_label("--claim", self.claim)
            if not self.mounted:
                raise UserError(
                    f"--claim {self.claim} with --store {self.root}: a claim is mounted at /mnt/…; give one of the two."
                )

    @property
    def mounted(self) -> bool:
        return self.root.startswith("/")

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def place(self, key: str, path: str | None) -> str:
        """A config's path as pods see it: URLs stay, relative ones lie in the store. Raises UserError for what pods can't see."""
        if path is None:
            raise UserError(f"{key} is not set: name the shard set, a URL or a path relative to --store.")
        if "://" in path:
            return path
        pure = PurePosixPath(path)
        inside = self.mounted and pure.is_relative_to(self.root)
        if path.startswith("~") or ".." in pure.parts or (pure.is_absolute() and not inside):
            raise UserError(
                f"{key} = {path!r}: pods can't see this machine's folders. Copy it to {self.root}, and give a URL or the path "
                "relative to that."
            )
        return path if inside else self.at(str(pure))

    def place_weights(self, weights: str, key: str) -> str:
        """The value of ``model.weights`` or ``second_weights``; a file lies in the store, or at an address. Raises UserError."""
        if not weights.endswith((".pth", ".pt", ".safetensors")):
            return weights  # imagenet, random, another stage's
        return self.place(key, weights)
