"""A run's config and a few typed choices → Kubernetes manifests as plain data: ConfigMap, ServiceAccount, NetworkPolicy, and a
KubeRay RayJob (a training, a sweep, `medtl doctor` where a training would run) or RayCluster. Never string templates; what
reaches a shell holds no character that a shell reads."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from cluster.placement import (
    Store,
    checked_annotations,
    checked_image,
    checked_label,
    checked_name,
    checked_version,
    checked_words,
)
from cluster.pods import CONFIG_FOLDER, RUN_LABEL, PodNeeds, autoscaler_options, head_pod, submitter_pod, worker_pod
from cluster.sizing import OBJECT_STORE_BYTES, Shape, Tree
from cluster.sweep_pods import (
    ShippedSpace,
    check_weights,
    cluster_section,
    prefix_cache_gib,
    trials_at_once,
    tune_command,
    tune_section,
    workers_of_trial,
)
from cluster.trainings import check_ranks, placed_stages
from medtl_dist.config import Config, check_reached_alike
from medtl_dist.errors import UserError

JOB, SWEEP, CLUSTER, DOCTOR = "train", "tune", "cluster", "doctor"
DOCTOR_DEADLINE_S = 3600  # nodes may have to be made, and pull the image, before it begins
_ADDRESS = re.compile(r"(https?)://[A-Za-z0-9.-]+(?::([0-9]{1,5}))?(?:/|$)")
_GKE_IDENTITY = "iam.gke.io/gcp-service-account"


@dataclass(frozen=True)
class Target:
    """Everything about the place that a config does not say, and a sweep's space. Checked when it is made: a bad value cannot
    exist.

    Raises:
        UserError: what was given, and what is expected; see ``cluster.placement``.
    """

    name: str
    image: str
    shape: Shape
    store: Store | None = None
    kind: str = JOB
    space: ShippedSpace | None = None
    namespace: str | None = None
    queue: str | None = None
    spot: tuple[str, str] | None = None
    credentials_secret: str | None = None
    token_secret: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = 120
    deadline_s: int = 24 * 3600
    keep_s: int = 3600
    retries: int = 3
    allow_tag: bool = False
    ray_version: str = field(default_factory=lambda: importlib.metadata.version("ray"))

    def __post_init__(self) -> None:
        checked_name(self.name, self.kind)
        checked_image(self.image, allow_tag=self.allow_tag)
        for option, value in (
            ("--namespace", self.namespace),
            ("--queue", self.queue),
            ("--credentials-secret", self.credentials_secret),
            ("--token-secret", self.token_secret),
        ):
            if value is not None:
                checked_label(option, value)
        if self.spot is not None:
            checked_annotations("--spot", {self.spot[0]: self.spot[1]}, as_label=True)
        checked_annotations("--identity", self.identity)
        checked_version(self.ray_version)
        if self.kind not in (JOB, SWEEP, CLUSTER, DOCTOR):
            raise UserError(f"--kind {self.kind}: expected {JOB}, {SWEEP}, {CLUSTER} or {DOCTOR}.")
        if (self.kind == SWEEP) != (self.space is not None):
            raise UserError(f"--kind {self.kind}: a sweep has a --space, and nothing else has one.")
        if self.kind != CLUSTER and self.store is None:
            raise UserError("--store is missing: where run folders are written, s3://…, gs://… or /mnt/… with --claim.")
        if self.queue is not None and self.shape.elastic:
            raise UserError("--queue with --min-gpus: Kueue admits jobs of a fixed size; leave one of the two out.")
        numbers = (
            ("--deadline-h", self.deadline_s // 3600, 1),
            ("--retries", self.retries, 1),
            ("--grace-s", self.grace_s, 60),
        )
        for option, number, least in numbers:
            if number < least:
                raise UserError(f"{option} {number}: expected at least {least}.")

    @property
    def run_folder(self) -> str:
        if self.store is None:
            raise UserError("--store is missing: it holds the run folder.")
        return self.store.at(f"runs/{self.name}")


def render(config: Config, target: Target, *, open_test: bool = False, with_config: bool = True) -> list[Tree]:
    """The manifests of a run, in the order in which they are applied. ``config`` is adapted by :func:`config_for`.

    ``with_config=False`` leaves the ConfigMap to kustomize's generator.

    Of a doctor everything but the RayJob is the run's own, name included: it looks with the run's identity, through its
    network policy, at its config. An elastic shape is looked at in full size, since the doctor's pods are waited for.
    """
    if open_test and target.kind != JOB:
        raise UserError(f"--test with --kind {target.kind}: only a training scores the test split; leave --test out.")
    if config.transfer.stages and target.kind in (SWEEP, DOCTOR):
        what = "a sweep runs" if target.kind == SWEEP else "a doctor looks at the set of"
        raise UserError(f"--kind {target.kind} with transfer.stages: {what} single trainings; name a stage's config.")
    account, policy = service_account(target), network_policy(target, ports=_ports(config, target.space))
    if target.kind == CLUSTER:
        return [account, policy, ray_cluster(target)]
    config_map = [config_map_of(config_for(config, target), target)] if with_config else []
    if target.kind == DOCTOR:
        return [account, *config_map, policy, doctor_job(target)]
    if target.space is not None:
        job = ray_job(target, tune_command(target.run_folder, target.space), extra_cache_gib=prefix_cache_gib(config))
        return [account, *config_map, policy, job]
    return [account, *config_map, policy, ray_job(target, train_command(target, open_test=open_test))]


def config_for(config: Config, target: Target) -> Config:
    """The run's config as its pods read it: paths in the store, ranks and CPUs of the shape; of a sweep those of a trial.

    CPUs are said outright because a process in a pod sees the whole node's. Adapting twice changes nothing.

    Raises:
        UserError: a path that pods can't see, a login inside a URL, more ranks than the global batch has lanes for; of a sweep
            no room for one trial.
    """
    shape, store = target.shape, target.store
    if store is None:
        raise UserError("--store is missing: it holds shard sets and run folders.")
    for key, text in _strings(config.model_dump(mode="json")):
        if not text.isprintable():  # line separators among them, which YAML's versions read differently
            raise UserError(f"{key} = {text!r}: expected printable characters only.")
        if "://" in text and ("@" in text or "?" in text):
            raise UserError(
                f"{key} holds a URL with a login or a query: a ConfigMap is no place for secrets. Give the plain URL, and the "
                "credentials by --identity or --credentials-secret."
            )
    if not store.mounted:
        check_reached_alike(config)
    space = target.space
    check_ranks(config, shape.ranks if space is None else workers_of_trial(config))
    rank = shape.rank
    data: dict[str, Any] = {}
    if (
        config.data.shards is not None or not config.transfer.stages
    ):  # a chain's stages may each name a set of their own
        data["shards"] = store.place("data.shards", config.data.shards)
    if config.data.loader_workers is None:
        data["loader_workers"] = rank.loaders
    weights = ("weights", "second_weights")
    changes: dict[str, dict[str, Any]] = {
        "data": data,
        "train": {} if config.train.threads else {"threads": rank.cpus - rank.loaders},
        "model": {key: store.place_weights(getattr(config.model, key), f"model.{key}") for key in weights},
        "transfer": {"stages": placed_stages(config, store, rank)},
        "cluster": {
            "num_workers": shape.ranks,
            "use_gpu": shape.gpu,
            "cpus_per_worker": float(rank.cpus),
            "address": "auto",  # the job's own cluster or an error, never a new one on the head
        },
    }
    if space is not None:
        trials_at_once(config, shape)
        check_weights(space.space, store)
        changes["cluster"] |= cluster_section(config, shape)
        changes["tune"] = tune_section(config, space)
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    )


def train_command(target: Target, *, open_test: bool = False) -> list[str]:
    """The job's argv. It resumes by run name: a new run starts, an interrupted one goes on, a finished one ends at once."""
    command = ["medtl", "train", "--config", f"{CONFIG_FOLDER}/config.yaml", "--run-dir", target.run_folder, "--resume"]
    return command + (["--test"] if open_test else [])


def doctor_command(target: Target) -> list[str]:
    """The argv of a look at every node: versions, GPUs, network, clocks, store, shards, and one step of the config."""
    store = target.store.root if target.store is not None else target.run_folder  # the latter raises
    return ["medtl", "doctor", "--nodes", "--config", f"{CONFIG_FOLDER}/config.yaml", "--store", store, "--step"]


def config_map_of(config: Config, target: Target) -> Tree:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(target, name=f"{target.name}-config"),
        "data": {"config.yaml": config.to_yaml(), **({} if target.space is None else target.space.files)},
    }


def service_account(target: Target) -> Tree:
    """The run's identity; ``target.identity`` are the annotations of IRSA or Workload Identity."""
    metadata = _metadata(target)
    if target.identity:
        metadata["annotations"] = dict(target.identity)
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata,
        "automountServiceAccountToken": False,
    }


def network_policy(target: Target, *, ports: Sequence[int] = ()) -> Tree:
    """The run's pods talk to each other; the operator asks the head; out go DNS, HTTPS, Kubernetes' API and ``ports``."""
    own = {"podSelector": {"matchLabels": {RUN_LABEL: target.name}}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }
    egress: list[Tree] = [
        {"to": [own]},
        {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
        {"ports": [{"protocol": "TCP", "port": port} for port in sorted({443, 6443, *ports})]},
    ]
    if _GKE_IDENTITY in target.identity:  # Workload Identity asks the node's metadata server
        hosts = ("169.254.169.254/32", "169.254.169.252/32")
        egress.append(
            {
                "to": [{"ipBlock": {"cidr": host}} for host in hosts],
                "ports": [{"protocol": "TCP", "port": port} for port in (80, 988)],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(target),
        "spec": {
            "podSelector": own["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}, {"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]}],
            "egress": egress,
        },
    }


def ray_job(target: Target, command: list[str], *, extra_cache_gib: int = 0) -> Tree:
    """A RayJob that runs ``command`` on a cluster of its own, and again on a new one after the loss of its head.

    ``extra_cache_gib``: room in the workers' cache volume beyond a training's.
    """
    queue = {} if target.queue is None else {"kueue.x-k8s.io/queue-name": target.queue}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(target, labels=queue),
        "spec": {
            "activeDeadlineSeconds": target.deadline_s,
            "backoffLimit": target.retries,
            "entrypoint": shlex.join(checked_words(command)),
            "rayClusterSpec": _cluster_spec(
                target, config_map=f"{target.name}-config", extra_cache_gib=extra_cache_gib
            ),
            "shutdownAfterJobFinishes": True,
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 3},
            "submitterPodTemplate": submitter_pod(_needs(target)),
            "suspend": target.queue is not None,  # Kueue starts what it admits
            "ttlSecondsAfterFinished": target.keep_s,
        },
    }


def doctor_job(target: Target) -> Tree:
    """`medtl doctor` on a cluster like the run's, once: what it finds is not mended by a new cluster."""
    whole = replace(target, shape=replace(target.shape, min_pods=target.shape.pods))
    job = ray_job(whole, doctor_command(target))
    job["metadata"]["name"] = f"{target.name}-doctor"
    job["spec"] |= {"activeDeadlineSeconds": min(target.deadline_s, DOCTOR_DEADLINE_S), "backoffLimit": 0}
    return job


def ray_cluster(target: Target) -> Tree:
    """A RayCluster for interactive use: it stays until it is deleted."""
    queue = {} if target.queue is None else {"kueue.x-k8s.io/queue-name": target.queue}
    spec = _cluster_spec(target, config_map=None)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(target, labels=queue),
        "spec": spec | ({"suspend": True} if target.queue is not None else {}),
    }


def _cluster_spec(target: Target, *, config_map: str | None, extra_cache_gib: int = 0) -> Tree:
    shape, needs = target.shape, _needs(target)
    workers = replace(needs, cache_gib=needs.cache_gib + extra_cache_gib)
    auth = {"mode": "token"} | ({} if target.token_secret is None else {"secretName": target.token_secret})
    start = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    spec: Tree = {
        "rayVersion": target.ray_version,
        "authOptions": auth,
        "enableInTreeAutoscaling": shape.elastic,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", **start},  # no rank lands on the head
            "serviceType": "ClusterIP",
            "template": head_pod(needs, shape.head, api_access=shape.elastic, config_map=config_map),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if shape.gpu else "cpu",
                "replicas": shape.pods,
                "minReplicas": shape.min_pods,
                "maxReplicas": shape.pods,
                "rayStartParams": start,
                "template": worker_pod(workers, shape.worker, spot=target.spot),
            }
        ],
    }
    if shape.elastic:
        spec["autoscalerOptions"] = autoscaler_options()
    return spec


def _needs(target: Target) -> PodNeeds:
    store = target.store
    return PodNeeds(
        run=target.name,
        image=target.image,
        grace_s=target.grace_s,
        store_claim=store.claim if store else None,
        store_path=store.root if store and store.claim else None,
        credentials_secret=target.credentials_secret,
    )


def _metadata(target: Target, *, name: str | None = None, labels: Mapping[str, str] | None = None) -> Tree:
    metadata: Tree = {
        "name": name or target.name,
        "labels": {RUN_LABEL: target.name, "app.kubernetes.io/managed-by": "medtl", **(labels or {})},
    }
    return metadata if target.namespace is None else metadata | {"namespace": target.namespace}


def _ports(config: Config, shipped: ShippedSpace | None) -> list[int]:
    """Ports of the addresses that the config and a sweep's space name, such as an object store's own."""
    trees = [config.model_dump(mode="json"), shipped.space.model_dump(mode="json") if shipped else {}]
    found = [_ADDRESS.match(text) for tree in trees for _, text in _strings(tree)]
    return [int(match[2] or {"http": 80, "https": 443}[match[1]]) for match in found if match]


def _strings(tree: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, Mapping):
        return [pair for name, value in tree.items() for pair in _strings(value, f"{key}.{name}" if key else str(name))]
    if isinstance(tree, list):
        return [pair for value in tree for pair in _strings(value, key)]
    return [(key, tree)] if isinstance(tree, str) else []


class _Dumper(yaml.SafeDumper):
    """Strings that any YAML version could take for something else are quoted: PyYAML leaves 1e3 and 0o17 bare, which kubectl
    reads as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if not text.replace("\n", "").isprintable():
        style = '"'  # escaped
    elif "\n" in text:
        style = "|"
    elif not (text[:1].isalpha() or text[:1] == "/") or text.lower() in ("y", "n", "yes", "no", "on", "off"):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(manifests: list[Tree]) -> str:
    """The manifests as one YAML stream, keys sorted, the same bytes for the same input."""
    return yaml.dump_all(
        manifests, Dumper=_Dumper, sort_keys=True, allow_unicode=True, explicit_start=True, width=10**6
    )
