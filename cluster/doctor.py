"""A machine, or every node of a Ray cluster ─► findings (``cluster.doctor_checks``). Ray and torch are imported late."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Sequence
from typing import Any

from cluster import doctor_checks as checks
from cluster.doctor_checks import Finding
from medtl_dist.config import Config
from medtl_dist.errors import DataError, MedtlError
from medtl_dist.storage import Folder, parse_place

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "medtl_dist")
_ROUNDS, _TENSOR_MIB = 5, 16
_WAIT_S = 120.0


def installed_versions() -> dict[str, str]:
    """What this place runs; what is not installed is left out (the code of a job comes beside the installed packages)."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def here(config: Config | None, store: str | None, *, manifest: str | None = None, step: bool = False) -> list[Finding]:
    """Findings of this machine alone. Without ``config`` and ``store`` it is an image's health check: quick."""
    found = {"this machine": installed_versions()}
    if manifest is not None:
        found["manifest"] = checks.manifest_versions(manifest)
    needed = _gpus_needed(config)
    findings = [
        checks.versions(found),
        checks.gpus({"this machine": {"ray": 0} | gpu_facts()}, wanted=False, needed=needed),
        checks.shared_memory("this machine", shm_bytes()),
    ]
    if store is not None:
        failure = probe_store(store, config)
        findings.append(checks.stores(store, {"this machine": failure} if failure else {}, [], ["this machine"]))
    if config is not None:
        findings += [
            checks.timeouts(config.train.collective_timeout_s),
            *_data_findings([("this machine", probe_shards(config))], config),
        ]
        if step:
            findings.append(_step_finding(probe_step(config)))
    return findings


def nodes(config: Config | None, store: str | None, *, step: bool = False) -> list[Finding]:
    """Findings of every node of the cluster that this process can join (RAY_ADDRESS, or this machine's).

    Raises:
        UserError: there is none.
    """
    import ray

    from cluster.train import connected
    from medtl_dist.config import load_config

    base = config or load_config()
    joined = base.model_copy(update={"cluster": base.cluster.model_copy(update={"address": "auto"})})
    tree = None if config is None else config.model_dump(mode="json")
    with connected(joined):
        alive = [node for node in ray.nodes() if node["Alive"]]
        marker = f"doctor-{uuid.uuid4().hex}"
        failure = "" if store is None else _write_marker(store, marker, config)
        try:
            rows = {_name(node): _asked(node, tree, store, marker) for node in alive}
        finally:
            if store is not None and not failure:
                _place(store, config).delete(marker)
        findings = _node_findings(rows, config)
        if store is not None:
            failures = ({"the driver": failure} if failure else {}) | {
                n: r["store"] for n, r in rows.items() if r["store"]
            }
            unseen = [name for name, row in rows.items() if not row["seen"]]
            findings.append(checks.stores(store, failures, unseen, list(rows)))
        gpu = all(row["gpus"]["ray"] for row in rows.values())
        findings.append(_measure_all_reduce([_on(node) for node in alive], gpu=gpu))
        if config is not None and step:
            where: Any = ray.remote(step_of).options(num_cpus=0, num_gpus=1 if config.cluster.use_gpu else 0)
            findings.append(_step_finding(ray.get(where.remote(tree), timeout=_WAIT_S)))
        return findings


def _now() -> float:
    """A node's clock, as a function that Ray takes: builtins it refuses."""
    return time.time()


def _name(node: dict[str, Any]) -> str:
    return f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})"


def _on(node: dict[str, Any]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)


def _asked(node: dict[str, Any], tree: dict[str, Any] | None, store: str | None, marker: str) -> dict[str, Any]:
    """What a node tells of itself. Nodes are asked one after the other: an idle one answers fast, which bounds its clock."""
    import ray

    place = {"num_cpus": 0, "scheduling_strategy": _on(node)}
    probe: Any = ray.remote(probe_node).options(**place)
    row: dict[str, Any] = ray.get(probe.remote(tree, store, marker), timeout=_WAIT_S)
    clock: Any = ray.remote(_now).options(**place)
    began = time.time()
    theirs: Any = ray.get(clock.remote(), timeout=_WAIT_S)
    row["clock"] = (theirs - time.time(), theirs - began)
    row["gpus"]["ray"] = int(node["Resources"].get("GPU", 0))
    return row


def _node_findings(rows: dict[str, dict[str, Any]], config: Config | None) -> list[Finding]:
    wanted = config is not None and bool(config.cluster.use_gpu)
    findings = [
        checks.versions({"driver": installed_versions()} | {name: row["versions"] for name, row in rows.items()}),
        checks.gpus({name: row["gpus"] for name, row in rows.items()}, wanted=wanted, needed=_gpus_needed(config)),
        *(checks.shared_memory(name, row["shm"]) for name, row in rows.items()),
        checks.clocks({name: row["clock"] for name, row in rows.items()}),
    ]
    if config is not None:
        findings.append(checks.timeouts(config.train.collective_timeout_s))
        findings += _data_findings([(name, row["shards"]) for name, row in rows.items()], config)
    return findings


def probe_node(tree: dict[str, Any] | None, store: str | None, marker: str) -> dict[str, Any]:
    """Facts of the node that this runs on, as plain values."""
    from medtl_dist.config import validate

    config = None if tree is None else validate(tree)
    return {
        "versions": installed_versions(),
        "gpus": gpu_facts(),
        "shm": shm_bytes(),
        "store": "" if store is None else probe_store(store, config),
        "seen": True if store is None else _seen(store, marker, config),
        "shards": None if config is None else probe_shards(config),
    }


def gpu_facts() -> dict[str, Any]:
    """GPUs as the driver shows them: none without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {"seen": 0, "driver": None}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {"seen": 0, "driver": None}
    lines = done.stdout.split() if done.returncode == 0 else []
    return {"seen": len(lines), "driver": lines[0] if lines else None}


def shm_bytes() -> int | None:
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return None
    return facts.f_blocks * facts.f_frsize


def _place(url: str, config: Config | None) -> Folder:
    """The store, reached as a run of this config would reach it. Raises MedtlError or OSError."""
    if config is None:
        return Folder.at_url(url)
    from medtl_dist.train.setup import storage_of

    return Folder.at_url(url, storage_of(config))


def probe_store(url: str, config: Config | None = None) -> str:
    """Write, read and delete a small file; "" where that works, else why not."""
    name, data = f"doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        if not parse_place(url).remote and not os.path.isdir(url):
            return "no such folder"  # which writing would make, on a node that does not mount the volume
        folder = _place(url, config)
        folder.write(name, data)
        same = folder.read(name) == data
        folder.delete(name)
    except MedtlError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error).splitlines()[0][:200]
    return "" if same else "what was written is not what is read"


def _write_marker(store: str, marker: str, config: Config | None) -> str:
    """Leave a file for the nodes to see; "" where that works, else why not."""
    failure = probe_store(store, config)
    if not failure:
        _place(store, config).write(marker, b"")
    return failure


def _seen(store: str, marker: str, config: Config | None) -> bool:
    try:
        return _place(store, config).exists(marker)
    except (OSError, MedtlError):
        return False


def probe_shards(config: Config) -> dict[str, Any]:
    """Open the set and read the rows of its first shard."""
    from medtl_dist.data.shards import read_shard_rows
    from medtl_dist.train.setup import open_shards

    try:
        dataset = open_shards(config)
        shard = dataset.shards("train")[0]
        return {"error": None, "rows": read_shard_rows(dataset, shard, ["key"]).num_rows, "name": dataset.name}
    except MedtlError as error:
        return {"error": error.message, "exit_code": error.exit_code}


def step_of(tree: dict[str, Any]) -> dict[str, Any]:
    """:func:`probe_step` of a config as plain values."""
    from medtl_dist.config import validate

    return probe_step(validate(tree))


def probe_step(config: Config) -> dict[str, Any]:
    """One training step with real images, in a folder that is thrown away."""
    import tempfile

    from medtl_dist.run import LocalRun
    from medtl_dist.train import losses
    from medtl_dist.train.loop import train_step
    from medtl_dist.train.start import start, train_stream

    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="medtl-doctor-") as folder:
            session = start(config, LocalRun(Folder.local(folder)), None)
            try:
                session.network.model.train()
                batch = next(train_stream(session))
                loss, _ = train_step(session, batch, losses.loss_weight(batch.labels, session.class_weights))
            finally:
                session.loader.close()
                session.journal.close()
        return {
            "error": None,
            "loss": float(loss),
            "seconds": time.monotonic() - began,
            "device": str(session.run.device),
        }
    except MedtlError as error:
        return {"error": error.message, "exit_code": error.exit_code}


def _step_finding(row: dict[str, Any]) -> Finding:
    if row["error"] is not None:
        return Finding("one step", checks.FAILED, row["error"], "", row["exit_code"])
    return checks.good("one step", f"trained on {row['device']} in {row['seconds']:.1f} s, start-up included")


def _data_findings(rows: Sequence[tuple[str, dict[str, Any]]], config: Config) -> list[Finding]:
    for place, row in rows:
        if row["error"] is not None:
            text = f"{config.data.shards} from {place}: {row['error']}"
            return [
                Finding("shards", checks.FAILED, text, "copy the set to where every node sees it", row["exit_code"])
            ]
    return [
        checks.good("shards", f"{rows[0][1]['name']} is read from {len(rows)} place{'s' if len(rows) != 1 else ''}")
    ]


def _gpus_needed(config: Config | None) -> int:
    return 0 if config is None else config.cluster.num_workers


def _measure_all_reduce(strategies: Sequence[Any], *, gpu: bool) -> Finding:
    """All-reduce of 16 MiB between one process per node; the first node's rank 0 is where they meet."""
    import ray
    from ray.exceptions import RayError

    size, backend = len(strategies), "nccl" if gpu else "gloo"
    if size < 2:
        return checks.all_reduce(size, None, backend)
    kind: Any = ray.remote(Reducer)
    actors: list[Any] = [
        kind.options(num_cpus=0, num_gpus=1 if gpu else 0, scheduling_strategy=s).remote() for s in strategies
    ]
    try:
        meeting = ray.get(actors[0].meeting.remote(), timeout=_WAIT_S)
        refs = [actor.measure.remote(meeting, rank, size, backend) for rank, actor in enumerate(actors)]
        seconds = max(ray.get(refs, timeout=_WAIT_S))
        wire_mib = 2 * (size - 1) / size * _TENSOR_MIB  # of the ring algorithm, per node
        return checks.all_reduce(size, wire_mib / seconds, backend)
    except (RayError, TimeoutError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return checks.all_reduce(size, None, backend, (lines or [type(error).__name__])[-1][:200])
    finally:
        for actor in actors:
            ray.kill(actor)


class Reducer:
    """A process on one node that takes part in the measurement."""

    def meeting(self) -> str:
        """An address of this node that the others can reach."""
        import socket

        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def measure(self, meeting: str, rank: int, size: int, backend: str) -> float:
        """Seconds of one all-reduce, the median of five after one to warm up."""
        import datetime
        import statistics

        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend, init_method=meeting, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
        )
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        tensor = torch.ones(_TENSOR_MIB * 2**20 // 4, device=device)
        seconds = []
        for _ in range(_ROUNDS + 1):
            began = time.monotonic()
            dist.all_reduce(tensor)
            tensor.flatten()[0].item()  # waits for the device
            seconds.append(time.monotonic() - began)
            tensor.fill_(1.0)
        dist.destroy_process_group()
        return statistics.median(seconds[1:])


def parsed_findings(log: str) -> list[Finding]:
    """The findings that a job printed as a line of JSON. Raises DataError where there are none."""
    import json

    for line in reversed(log.splitlines()):
        if line.startswith('{"findings": '):
            try:
                return [Finding(**row) for row in json.loads(line)["findings"]]
            except (ValueError, TypeError, KeyError):
                break
    raise DataError("the cluster's job printed no findings; `medtl logs` shows what it says.")
