"""Our own rules for a run's manifests, beyond what schemas say; each fault is a sentence that names the place."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from k8s_schema import Tree, pod_templates

# PodSecurity "restricted": https://kubernetes.io/docs/concepts/security/pod-security-standards/
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY")
_LOGIN = re.compile(
    r"://[^/\s]*@|(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])|X-Amz-Signature|BEGIN [A-Z ]*PRIVATE KEY"
)


def faults(manifests: list[Tree]) -> list[str]:
    """Everything that is wrong with the manifests of one run, applied together."""
    found = [f"{key}: looks like a credential" for key, text in _texts(manifests) if _LOGIN.search(text)]
    for manifest in manifests:
        if manifest["kind"] == "Secret":
            found.append("a Secret's value in a manifest")
        if manifest["kind"] in ("RayJob", "RayCluster"):
            found += _run_faults(manifest, manifests)
    return found


def _run_faults(run: Tree, manifests: list[Tree]) -> list[str]:
    spec = run["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    found = [fault for name, template in pod_templates(run) for fault in _pod_faults(name, template)]
    containers = [(name, c) for name, template in pod_templates(run) for c in template["spec"]["containers"]]
    if "autoscalerOptions" in cluster:
        containers.append(("autoscaler", cluster["autoscalerOptions"]))
    for name, container in containers:
        found += _container_faults(name, container)
    found += _equal_versions(cluster, [c["image"] for _, c in containers if "image" in c])
    found += [*_scale_faults(run, cluster), *_network_faults(run, manifests), *_auth_faults(cluster)]
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("head: work may land on it (num-cpus is not 0)")
    return found + (list(_job_faults(run, manifests)) if run["kind"] == "RayJob" else [])


def _pod_faults(name: str, template: Tree) -> Iterator[str]:
    spec = template["spec"]
    for key in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if spec.get(key):
            yield f"{name}: {key}"
    for volume in spec["volumes"]:
        (kind,) = set(volume) - {"name"}
        if kind not in _VOLUMES:
            yield f"{name}: volume {volume['name']} is a {kind}"
        if kind == "emptyDir" and "sizeLimit" not in volume["emptyDir"]:
            yield f"{name}: volume {volume['name']} has no size limit"
        if volume["name"] == "shm" and volume["emptyDir"].get("medium") != "Memory":
            yield f"{name}: /dev/shm is not in memory"
    mounted = {m["mountPath"] for c in spec["containers"] for m in c["volumeMounts"]}
    if name != "submitter" and not {"/dev/shm", "/cache"} <= mounted:
        yield f"{name}: no /dev/shm or no cache"
    if spec.get("terminationGracePeriodSeconds", 0) < 60:
        yield f"{name}: no time for a checkpoint"
    if spec.get("restartPolicy") != "Never":
        yield f"{name}: restartPolicy is not Never"
    if "runAsUser" in spec["securityContext"]:
        yield f"{name}: a fixed uid, which OpenShift refuses"
    gpus = any("nvidia.com/gpu" in c["resources"]["limits"] for c in spec["containers"] if "limits" in c["resources"])
    if gpus and not any(t["key"] == "nvidia.com/gpu" for t in spec.get("tolerations", [])):
        yield f"{name}: does not tolerate GPU nodes' taint"


def _container_faults(name: str, container: Tree) -> Iterator[str]:
    security = container.get("securityContext", {})
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True}
    for key, value in wanted.items():
        if security.get(key) is not value:
            yield f"{name}: {key} is not {value}"
    if security.get("privileged") or security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{name}: has privileges or capabilities"
    if security.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name}: no seccomp profile"
    if "runAsUser" in security:
        yield f"{name}: a fixed uid, which OpenShift refuses"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{name}: a host port"
    limits, requests = (container.get("resources", {}).get(key, {}) for key in ("limits", "requests"))
    if not {"cpu", "memory"} <= set(limits) or limits != requests:
        yield f"{name}: requests and limits of CPU, memory and GPUs are not equal"
    for entry in container.get("env", []):
        if _SECRET_NAME.search(entry["name"]) and "value" in entry:
            yield f"{name}: {entry['name']} is a literal"


def _equal_versions(cluster: Tree, images: list[str]) -> Iterator[str]:
    if len(set(images)) != 1:
        yield f"{len(set(images))} different images"
    if not all(re.search(r"@sha256:[0-9a-f]{64}$", image) for image in images):
        yield "an image that is not pinned by digest"
    if cluster.get("rayVersion") != importlib.metadata.version("ray"):
        yield f"rayVersion {cluster.get('rayVersion')} is not the client's"


def _scale_faults(run: Tree, cluster: Tree) -> Iterator[str]:
    elastic = False
    for group in cluster["workerGroupSpecs"]:
        low, now, high = (group[key] for key in ("minReplicas", "replicas", "maxReplicas"))
        if not 0 <= low <= now <= high <= 1000 or high < 1:
            yield f"{group['groupName']}: replicas {low} ≤ {now} ≤ {high} make no sense"
        elastic = elastic or low < high
    if elastic != cluster["enableInTreeAutoscaling"]:
        yield "the autoscaler is on and the size is fixed, or the other way round"
    if elastic and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        yield "not autoscaler v2"
    for name, template in pod_templates(run):
        if template["spec"].get("automountServiceAccountToken") is not (elastic and name == "head"):
            yield f"{name}: access to Kubernetes' API is on without need, or off where the autoscaler needs it"
    if "kueue.x-k8s.io/queue-name" in run["metadata"]["labels"] and (elastic or not run["spec"].get("suspend")):
        yield "Kueue needs suspend: true and a fixed size"


def _network_faults(run: Tree, manifests: list[Tree]) -> Iterator[str]:
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    for name, template in pod_templates(run):
        labels = template["metadata"]["labels"].items()
        closed = [p for p in policies if p["podSelector"].get("matchLabels", {}).items() <= labels]
        if not any({"Ingress", "Egress"} <= set(p["policyTypes"]) for p in closed):
            yield f"{name}: no NetworkPolicy selects it"
        if template["spec"].get("serviceAccountName") not in accounts:
            yield f"{name}: its service account is not among the manifests"
    for policy in policies:
        if any("from" not in rule for rule in policy["ingress"]) or any(not rule for rule in policy["egress"]):
            yield "the NetworkPolicy lets anybody in or out"
    if cluster_service(run) not in (None, "ClusterIP") or "enableIngress" in str(run):
        yield "the head is reachable from outside"


def cluster_service(run: Tree) -> str | None:
    return run["spec"].get("rayClusterSpec", run["spec"])["headGroupSpec"].get("serviceType")


def _auth_faults(cluster: Tree) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if {"name": "RAY_AUTH_MODE", "value": "token"} not in group["template"]["spec"]["containers"][0]["env"]:
            yield "a Ray that would start without a token"


def _job_faults(run: Tree, manifests: list[Tree]) -> Iterator[str]:
    spec, name = run["spec"], run["metadata"]["name"]
    if spec.get("submissionMode") != "K8sJobMode" or "submitterPodTemplate" not in spec:
        yield f"submissionMode {spec.get('submissionMode')}: the submitter's pod is not ours to restrict"
    words = shlex.split(spec["entrypoint"])
    doctor, sweep = (words[:2] == ["medtl", kind] for kind in ("doctor", "tune"))
    folder_option = "--sweep-dir" if sweep else "--run-dir"
    for key in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if not spec.get(key, 0) >= 1 and not (doctor and key == "backoffLimit"):
            yield f"{key} is not set"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "GPUs stay when the job has ended"
    if " ".join(words) != spec["entrypoint"] or not re.fullmatch(r"[A-Za-z0-9@%+=:,./_ -]+", spec["entrypoint"]):
        yield "the entrypoint holds what a shell reads"
    if doctor:
        yield from _doctor_faults(spec, words)
    elif "--resume" not in words or not words[words.index(folder_option) + 1].endswith(f"/runs/{name}"):
        yield "the entrypoint does not resume by run name"
    configs = [m for m in manifests if m["kind"] == "ConfigMap"]
    mounted = {
        v["configMap"]["name"]
        for v in spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "configMap" in v
    }
    if {m["metadata"]["name"] for m in configs} != mounted:
        yield "the head's ConfigMap is not the one beside it"
        return
    config, groups = yaml.safe_load(configs[0]["data"]["config.yaml"]), spec["rayClusterSpec"]["workerGroupSpecs"]
    yield from _config_faults(config)
    yield from _trial_faults(config, groups) if sweep else _rank_faults(config, groups)
    if sweep:
        yield from _space_faults(words, configs[0]["data"])


def _doctor_faults(spec: Tree, words: list[str]) -> Iterator[str]:
    if not {"--nodes", "--step", "--store", "--config"} <= set(words):
        yield "a doctor that does not look at every node, the store and the config"
    if spec.get("backoffLimit") != 0:
        yield "a doctor that is asked again on a new cluster"
    if any(group["replicas"] != group["maxReplicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]):
        yield "a doctor that does not see all nodes"


def _config_faults(config: Tree) -> Iterator[str]:
    if config.get("cluster", {}).get("address") != "auto":
        yield "without cluster.address the driver may start a Ray of its own on the head"
    for stage in config.get("transfer", {}).get("stages") or [
        {}
    ]:  # each trains the whole config with its own keys in it
        data, model, train = (config.get(key, {}) | stage.get(key, {}) for key in ("data", "model", "train"))
        if not re.match(r"(s3|gs)://|/mnt/", data.get("shards") or ""):
            yield "pods can't see data.shards"
        for key in ("weights", "second_weights"):
            if re.search(r"\.(pth|pt|safetensors)$", model.get(key, "")) and not re.match(r"\w+://|/mnt/", model[key]):
                yield f"pods can't see model.{key}"
        if train.get("threads") is None or data.get("loader_workers") is None:
            yield "threads would follow the node's CPUs, not the pod's"


def _rank_faults(config: Tree, groups: list[Tree]) -> Iterator[str]:
    place = config.get("cluster", {})
    ranks, cpus, gpus = place.get("num_workers", 0), place.get("cpus_per_worker", 0), place.get("use_gpu")
    there = [(g["maxReplicas"], _limits(g)) for g in groups]
    if sum(n * float(limits["cpu"]) for n, limits in there) != ranks * cpus:
        yield "the config's ranks don't fill the workers' CPUs"
    if sum(n * int(limits.get("nvidia.com/gpu", 0)) for n, limits in there) != (ranks if gpus else 0):
        yield "the config's ranks are not the workers' GPUs"


def _trial_faults(config: Tree, groups: list[Tree]) -> Iterator[str]:
    place, tune = config.get("cluster", {}), config.get("tune", {})
    cpus, share, held = place["cpus_per_worker"], float(place.get("use_gpu") or 0), 0.0
    for group in groups:
        here = float(_limits(group)["cpu"]) / cpus
        gpus = int(_limits(group).get("nvidia.com/gpu", 0))
        if here % 1:
            yield "trials don't fill the workers' CPUs"
        if (here if share else 0) != (gpus * (1 // share) if share else gpus):
            yield "trials at once are not the workers' GPUs"
        held += group["maxReplicas"] * here
        yield from _cache_faults(tune, group["template"]["spec"])
    if held < max(place.get("num_workers", 0), 1):
        yield "no room for one trial"


def _cache_faults(tune: Tree, pod: Tree) -> Iterator[str]:
    if tune.get("prefix_cache") == "off":
        return
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume.get("emptyDir") for volume in pod["volumes"]}
    volume = volumes.get(mounts.get(tune.get("prefix_cache_dir"), ""))
    if volume is None or "medium" in volume:
        yield "the prefix cache is not on a volume of the pod's own"
    elif (
        not tune.get("prefix_cache_mib")
        or int(volume["sizeLimit"].removesuffix("Gi")) - 10 < tune["prefix_cache_mib"] / 1024
    ):
        yield "the prefix cache can outgrow its volume, which evicts the pod"


def _space_faults(words: list[str], files: Tree) -> Iterator[str]:
    folder, _, file = words[words.index("--space") + 1].rpartition("/")
    if folder and (folder != "/etc/medtl" or file not in files):
        yield "the sweep's space is not beside its config"
    if "--test" in words or "--then" in words:
        yield "a sweep that opens the test split"


def _limits(group: Tree) -> Tree:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from _texts(value, f"{key}/{name}")
    if isinstance(tree, str):
        yield key, tree
