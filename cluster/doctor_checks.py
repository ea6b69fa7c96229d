"""Facts of machines and services → findings, each with its remedy. Pure: what asks Ray or a store is in ``cluster.doctor``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from medtl_dist.errors import DataError, MedtlError, TrainingError, UserError

OK, WARNING, FAILED = "ok", "warning", "failed"
SHM_MIB = 1024  # below it NCCL within a node and Ray's object store fall back to slower ways, or fail
SKEW_WARNING_S, SKEW_S = (
    1.0,
    60.0,
)  # signatures of object stores are refused from some minutes on; logs get confusing early
SLOW_ALL_REDUCE_MIB_S = 100.0  # about a gigabit: ResNet101's gradients (170 MiB) then take two seconds a step
TIMEOUT_S = 1800.0
MIN_DRIVER = 525  # of CUDA 12's minor-version compatibility

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do. ``exit_code``: of the command where it failed."""

    check: str
    state: str
    text: str
    remedy: str = ""
    exit_code: int = 0

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def good(check: str, text: str) -> Finding:
    return Finding(check, OK, text)


def bad(check: str, text: str, remedy: str, kind: type[MedtlError] = UserError) -> Finding:
    return Finding(check, FAILED, text, remedy, kind.exit_code)


def of_error(check: str, error: MedtlError, remedy: str = "") -> Finding:
    """The finding of a probe that raised: its message says what to do."""
    return Finding(check, FAILED, error.message, remedy, error.exit_code)


def worst(findings: Sequence[Finding]) -> int:
    """The command's exit code: 0 without a failure, else the first failure's."""
    return next((finding.exit_code for finding in findings if finding.state == FAILED), 0)


def versions(found: Mapping[str, Facts]) -> Finding:
    """``found``: versions by place (client, manifest, a node); of a place that does not know one it is left out."""
    names = sorted({name for facts in found.values() for name in facts})
    apart = [name for name in names if len({str(facts[name]) for facts in found.values() if name in facts}) > 1]
    if not apart:
        shown = {name: next(facts[name] for facts in found.values() if name in facts) for name in names}
        return good(
            "versions", f"{', '.join(f'{name} {value}' for name, value in shown.items())} in {len(found)} places"
        )
    told = "; ".join(
        f"{name}: " + ", ".join(f"{place} {facts[name]}" for place, facts in found.items() if name in facts)
        for name in apart
    )
    return bad(
        "versions",
        f"they differ: {told}",
        "run one image everywhere, and set rayVersion to the Ray in it; reinstall the client to match",
    )


def authentication(asks_for_token: bool) -> Finding:
    if asks_for_token:
        return good("authentication", "the job server refuses who comes without the token, and takes ours")
    return bad(
        "authentication",
        "the job server runs code for whoever reaches it: it asks for no token",
        "start the cluster with RAY_AUTH_MODE=token (KubeRay: authOptions.mode: token)",
    )


def manifest_versions(text: str) -> dict[str, str]:
    """The Ray version that Kubernetes manifests declare. Raises UserError where they declare none, or several."""
    try:
        documents = [tree for tree in yaml.safe_load_all(text) if isinstance(tree, dict)]
    except yaml.YAMLError:
        raise UserError("--manifest: expected YAML, as `medtl k8s render` prints it.") from None
    specs = [tree.get("spec") or {} for tree in documents]
    found = {str(version) for spec in specs if (version := _ray_version(spec)) is not None}
    if len(found) != 1:
        raise UserError(f"--manifest: expected one rayVersion, found {', '.join(sorted(found)) or 'none'}.")
    return {"ray": found.pop()}


def _ray_version(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return None
    return (spec.get("rayClusterSpec") or spec).get("rayVersion")


def shared_memory(place: str, total_bytes: int | None) -> Finding:
    remedy = (
        "give the pod a memory-backed emptyDir at /dev/shm, as `medtl k8s render` does, or docker run --shm-size=2g"
    )
    if total_bytes is None:
        return Finding("/dev/shm", WARNING, f"{place} has none", remedy)
    mib = total_bytes / 2**20
    if mib < SHM_MIB:
        return Finding("/dev/shm", WARNING, f"{mib:,.0f} MiB on {place}, expected at least {SHM_MIB:,}", remedy)
    return good("/dev/shm", f"{mib:,.0f} MiB on {place}")


def clocks(offsets_s: Mapping[str, tuple[float, float]]) -> Finding:
    """``offsets_s``: a node's clock against ours, as the bounds that the request's start and end set.

    The true offset lies within the bounds, so what is told is the least that it can be.
    """
    least = {place: 0.0 if low <= 0 <= high else min(abs(low), abs(high)) for place, (low, high) in offsets_s.items()}
    place, skew = max(least.items(), key=lambda pair: pair[1], default=("", 0.0))
    if skew < SKEW_WARNING_S:
        return good("clocks", f"{len(least)} nodes agree within a second")
    text, remedy = (
        f"the clock of {place} is at least {skew:.1f} s off",
        "let the nodes keep time (chrony, systemd-timesyncd)",
    )
    if skew >= SKEW_S:
        return bad("clocks", text, remedy + ": object stores refuse signed requests from there")
    return Finding("clocks", WARNING, text, remedy)


def all_reduce(nodes: int, mib_per_s: float | None, backend: str, error: str = "") -> Finding:
    """``mib_per_s``: bytes over the wire per second and node; None: it did not come about."""
    if nodes < 2:
        return good("all-reduce", "one node: nothing to reduce between nodes")
    if mib_per_s is None:
        return bad(
            "all-reduce",
            f"{backend} between {nodes} nodes failed: {error}",
            "open all TCP ports between the nodes, and name the right interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
            TrainingError,
        )
    text = f"{backend} between {nodes} nodes, {mib_per_s:,.0f} MiB/s"
    if mib_per_s < SLOW_ALL_REDUCE_MIB_S:
        return Finding(
            "all-reduce",
            WARNING,
            text,
            "a slow network: put the nodes closer together, or choose the fast interface by NCCL_SOCKET_IFNAME",
        )
    return good("all-reduce", text)


def gpus(nodes: Mapping[str, Facts], *, wanted: bool | None, needed: int) -> Finding:
    """``nodes``: per node ``ray`` (GPUs that Ray offers there), ``seen`` (that the driver shows) and ``driver`` (its version)."""
    offered = sum(int(facts.get("ray") or 0) for facts in nodes.values())
    seen = sum(int(facts.get("seen") or 0) for facts in nodes.values())
    for place, facts in nodes.items():
        if int(facts.get("ray") or 0) > int(facts.get("seen") or 0):
            return bad(
                "GPUs", f"Ray offers {facts['ray']} on {place}, its driver shows {facts.get('seen') or 0}",
                "install the driver and the device plugin there, or correct num-gpus",
            )  # fmt: skip
        major = re.match(r"[0-9]+", str(facts.get("driver") or ""))
        if major and int(major[0]) < MIN_DRIVER:
            return bad(
                "GPUs",
                f"driver {facts['driver']} on {place} is too old for this torch",
                f"install driver {MIN_DRIVER} or newer",
            )
    if wanted and offered < needed:
        return bad(
            "GPUs", f"{needed} are wanted (cluster.num_workers with cluster.use_gpu), {offered} are offered",
            "lower cluster.num_workers, add nodes, or set cluster.use_gpu=false",
        )  # fmt: skip
    drivers = ", ".join(sorted({str(facts["driver"]) for facts in nodes.values() if facts.get("driver")}))
    return good("GPUs", f"{max(offered, seen)}" + (f", driver {drivers}" if drivers else ""))


def timeouts(collective_timeout_s: float) -> Finding:
    text = f"train.collective_timeout_s = {collective_timeout_s:g}"
    if collective_timeout_s > TIMEOUT_S:
        return Finding(
            "time-outs", WARNING, text, "a silent loss of the network stays unseen for that long; 120 is plenty"
        )
    return good("time-outs", text)


def stores(url: str, failures: Mapping[str, str], unseen: Sequence[str], places: Sequence[str]) -> Finding:
    """``failures``: by node, why it can't write; ``unseen``: nodes that did not see the file that the driver wrote."""
    if failures:
        place, reason = next(iter(failures.items()))
        return bad(
            "storage", f"{url} from {place} (and {len(failures) - 1} more): {reason}",
            "mount the folder there writable, or give every node the credentials (service account, AWS_*)", DataError,
        )  # fmt: skip
    if unseen:
        return bad(
            "storage", f"{url} is another folder on {', '.join(unseen)}: what one node writes is not there",
            "mount one shared volume (NFS, ReadWriteMany) at this path on every node, or use s3:// or gs://", DataError,
        )  # fmt: skip
    return good(
        "storage", f"{url} is written, read and cleaned from {len(places)} place{'s' if len(places) != 1 else ''}"
    )
