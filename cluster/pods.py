"""Typed needs → pod templates as plain data, every one of them within PodSecurity `restricted`."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.sizing import SHM_GIB, Resources, Tree

HOME = "/home/medtl"  # writable in the image for any uid of group 0; an emptyDir here
CACHE = "/cache"
CONFIG_FOLDER = "/etc/medtl"
RUN_LABEL = "medtl/run"  # KubeRay selects by labels of its own (app.kubernetes.io/name among them): leave those alone


@dataclass(frozen=True)
class PodNeeds:
    """What all pods of a run share."""

    run: str
    image: str
    cache_gib: int = 20  # pretrained weights
    tmp_gib: int = 10
    grace_s: int = 120
    store_claim: str | None = None
    store_path: str | None = None
    credentials_secret: str | None = None


def container_security() -> Tree:
    """Of every container. No uid: the image's is 1000, and OpenShift assigns one of its own."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def head_pod(needs: PodNeeds, resources: Resources, *, api_access: bool, config_map: str | None) -> Tree:
    """The head: GCS, dashboard and the training driver. ``api_access``: the autoscaler beside it asks Kubernetes for pods."""
    ports = [
        {"containerPort": 6379, "name": "gcs-server"},
        {"containerPort": 8265, "name": "dashboard"},
        {"containerPort": 10001, "name": "client"},
    ]
    pod = _ray_pod(needs, _ray_container("ray-head", needs, resources, ports), api_access=api_access)
    if config_map is not None:
        spec = pod["spec"]
        spec["volumes"].append({"name": "config", "configMap": {"name": config_map}})
        spec["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    return pod


def worker_pod(needs: PodNeeds, resources: Resources, *, spot: tuple[str, str] | None) -> Tree:
    """A worker; with GPUs it tolerates the taint that keeps other pods off GPU nodes, with ``spot`` that of spot nodes."""
    pod = _ray_pod(needs, _ray_container("ray-worker", needs, resources, []), api_access=False)
    tolerations = []
    if resources.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if spot is not None:
        key, value = spot
        pod["spec"]["nodeSelector"] = {key: value}
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    pod["spec"]["tolerations"] = tolerations
    return pod


def submitter_pod(needs: PodNeeds) -> Tree:
    """The pod that hands the entrypoint to the head and follows its log; it sees neither data nor credentials."""
    container = {
        "name": "ray-job-submitter",
        "image": needs.image,
        "env": [_env("HOME", HOME), _env("RAY_USAGE_STATS_ENABLED", "0")],
        "resources": Resources(1, 1).as_tree(),
        "securityContext": container_security(),
        "volumeMounts": _mounts("tmp", "home"),
    }
    return _pod(needs, container, [_scratch("tmp", 1), _scratch("home", 1)], api_access=False)


def autoscaler_options() -> Tree:
    """The autoscaler's sidecar: version 2, restricted like every other container."""
    return {
        "version": "v2",
        "idleTimeoutSeconds": 300,
        "upscalingMode": "Default",
        "imagePullPolicy": "IfNotPresent",
        "resources": Resources(1, 1).as_tree(),
        "securityContext": container_security(),
        "env": [_env("HOME", HOME)],
        "volumeMounts": _mounts("tmp", "home"),  # the head's own volumes: Ray's session folder is shared through /tmp
    }


def _ray_pod(needs: PodNeeds, container: Tree, *, api_access: bool) -> Tree:
    volumes = [
        _scratch("tmp", needs.tmp_gib),
        _scratch("home", 2),
        _scratch("cache", needs.cache_gib),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_GIB}Gi"}},
    ]
    if needs.store_claim is not None:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": needs.store_claim}})
    pod = _pod(needs, container, volumes, api_access=api_access)
    if needs.store_claim is not None:
        # A new volume belongs to root. OpenShift assigns the group itself: take fsGroup out there.
        pod["spec"]["securityContext"] |= {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
    return pod


def _pod(needs: PodNeeds, container: Tree, volumes: list[Tree], *, api_access: bool) -> Tree:
    return {
        "metadata": {"labels": {RUN_LABEL: needs.run}},
        "spec": {
            "automountServiceAccountToken": api_access,
            "containers": [container],
            "enableServiceLinks": False,
            "restartPolicy": "Never",  # a lost pod is replaced by a new one; autoscaler v2 insists
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "serviceAccountName": needs.run,
            "terminationGracePeriodSeconds": needs.grace_s,
            "volumes": volumes,
        },
    }


def _ray_container(name: str, needs: PodNeeds, resources: Resources, ports: list[Tree]) -> Tree:
    mounts = [*_mounts("tmp", "home", "cache"), {"name": "shm", "mountPath": "/dev/shm"}]
    if needs.store_claim is not None:
        mounts.append({"name": "store", "mountPath": needs.store_path})
    secret = needs.credentials_secret
    return {
        "name": name,
        "image": needs.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            _env("HOME", HOME),
            # The operator sets this and the token (authOptions). Said here too, a Ray that gets no token, from an
            # operator too old to know that option, refuses to start instead of starting open.
            _env("RAY_AUTH_MODE", "token"),
            _env("TORCH_HOME", f"{CACHE}/torch"),  # pretrained weights
            _env("RAY_USAGE_STATS_ENABLED", "0"),  # nothing about a hospital's jobs leaves it unasked
        ],
        "envFrom": [] if secret is None else [{"secretRef": {"name": secret}}],
        "ports": ports,
        "resources": resources.as_tree(),
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }


def _mounts(*names: str) -> list[Tree]:
    return [{"name": name, "mountPath": {"tmp": "/tmp", "home": HOME, "cache": CACHE}[name]} for name in names]


def _scratch(name: str, gib: int) -> Tree:
    return {"name": name, "emptyDir": {"sizeLimit": f"{gib}Gi"}}


def _env(name: str, value: str) -> Tree:
    return {"name": name, "value": value}
