"""Manifests of a run: valid by KubeRay's and Kubernetes' schemas, within our own rules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from k8s_policy import faults
from k8s_schema import manifest_errors, needs_crds
from k8s_targets import CONFIG, ELASTIC, IMAGE, TARGETS, changed_keys, of_kind, rendered

from cluster.manifests import config_for, render, to_yaml
from cluster.placement import Store
from medtl_dist.config import Config, load_config
from medtl_dist.errors import UserError


@needs_crds
@pytest.mark.parametrize("name", TARGETS)
def test_every_rendering_passes_the_schemas_strictly(name: str) -> None:
    assert [error for manifest in rendered(name) for error in manifest_errors(manifest)] == []


@pytest.mark.parametrize("name", TARGETS)
def test_every_rendering_keeps_our_rules(name: str) -> None:
    manifests = rendered(name)
    # A login is refused by the policy; a service account's address is none.
    assert faults(manifests) == []
    assert to_yaml(render(CONFIG, TARGETS[name])) == to_yaml(render(CONFIG, TARGETS[name]))


def _job(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return of_kind(manifests, "RayJob")["spec"]


def _head(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return _job(manifests)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def _group(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return _job(manifests)["rayClusterSpec"]["workerGroupSpecs"][0]


def _container(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return _group(manifests)["template"]["spec"]["containers"][0]


def _submitter(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return _job(manifests)["submitterPodTemplate"]["spec"]["containers"][0]


Break = Callable[[list[dict[str, Any]]], Any]
SEEDED: dict[str, tuple[str, Break, str]] = {
    "privileged": ("gpu", lambda m: _container(m)["securityContext"].update(privileged=True), "gpu: has privileges"),
    "capability": (
        "gpu",
        lambda m: _container(m)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        "gpu: has priv",
    ),
    "escalation": (
        "gpu",
        lambda m: _submitter(m)["securityContext"].pop("allowPrivilegeEscalation"),
        "submitter: allowPriv",
    ),
    "root": ("gpu", lambda m: _submitter(m)["securityContext"].update(runAsNonRoot=False), "submitter: runAsNonRoot"),
    "uid": ("gpu", lambda m: _head(m)["securityContext"].update(runAsUser=1000), "head: a fixed uid"),
    "writable root": ("gpu", lambda m: _container(m)["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRoot"),
    "seccomp": ("gpu", lambda m: _submitter(m)["securityContext"].pop("seccompProfile"), "submitter: no seccomp"),
    "autoscaler root": (
        "elastic",
        lambda m: _job(m)["rayClusterSpec"]["autoscalerOptions"].pop("securityContext"),
        "autoscaler: runAsNonRoot",
    ),
    "host network": ("gpu", lambda m: _head(m).update(hostNetwork=True), "head: hostNetwork"),
    "host path": (
        "gpu",
        lambda m: _head(m)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "is a hostPath",
    ),
    "size limit": ("gpu", lambda m: _head(m)["volumes"][2]["emptyDir"].clear(), "volume cache has no size limit"),
    "shm on disk": ("gpu", lambda m: _head(m)["volumes"][3]["emptyDir"].pop("medium"), "/dev/shm is not in memory"),
    "no shm": ("gpu", lambda m: _container(m)["volumeMounts"].pop(3), "no /dev/shm"),
    "no limit": ("gpu", lambda m: _container(m)["resources"]["limits"].pop("memory"), "gpu: requests and limits"),
    "gpu request": (
        "gpu",
        lambda m: _container(m)["resources"]["requests"].update({"nvidia.com/gpu": "1"}),
        "requests and",
    ),
    "toleration": ("gpu", lambda m: _group(m)["template"]["spec"].update(tolerations=[]), "does not tolerate"),
    "another image": ("gpu", lambda m: _submitter(m).update(image=IMAGE.replace("0123", "9999")), "2 different images"),
    "tag": (
        "gpu",
        lambda m: [c.update(image="medtl:latest") for c in (_submitter(m), _container(m), _head(m)["containers"][0])],
        "not pinned",
    ),
    "version": ("gpu", lambda m: _job(m)["rayClusterSpec"].update(rayVersion="2.9.0"), "rayVersion 2.9.0"),
    "literal token": (
        "gpu",
        lambda m: _container(m)["env"].append({"name": "RAY_AUTH_TOKEN", "value": "x"}),
        "RAY_AUTH_TOKEN is a literal",
    ),
    "login in config": (
        "gpu",
        lambda m: of_kind(m, "ConfigMap")["data"].update({"config.yaml": "data: {shards: 's3://key:secret@bucket'}"}),
        "looks like a credential",
    ),
    "secret": ("gpu", lambda m: m.append({"apiVersion": "v1", "kind": "Secret", "data": {}}), "a Secret's value"),
    "mode": ("gpu", lambda m: _job(m).update(submissionMode="K8sJob"), "submissionMode K8sJob:"),
    "no retry": ("gpu", lambda m: _job(m).update(backoffLimit=0), "backoffLimit is not set"),
    "no deadline": ("gpu", lambda m: _job(m).pop("activeDeadlineSeconds"), "activeDeadlineSeconds is not set"),
    "stays": ("gpu", lambda m: _job(m).pop("shutdownAfterJobFinishes"), "GPUs stay"),
    "no resume": (
        "gpu",
        lambda m: _job(m).update(entrypoint="medtl train --run-dir s3://b/runs/xrays-1"),
        "does not resume",
    ),
    "shell": ("gpu", lambda m: _job(m).update(entrypoint=_job(m)["entrypoint"] + "; id"), "what a shell reads"),
    "expansion": ("gpu", lambda m: _job(m).update(entrypoint=_job(m)["entrypoint"] + " $(HOME)"), "what a shell reads"),
    "negative": ("gpu", lambda m: _group(m).update(minReplicas=-1), "make no sense"),
    "inverted": ("elastic", lambda m: _group(m).update(minReplicas=3), "make no sense"),
    "unbounded": ("elastic", lambda m: _group(m).update(maxReplicas=2**31 - 1), "make no sense"),
    "no autoscaler": (
        "elastic",
        lambda m: _job(m)["rayClusterSpec"].update(enableInTreeAutoscaling=False),
        "autoscaler is on",
    ),
    "autoscaler v1": ("elastic", lambda m: _job(m)["rayClusterSpec"]["autoscalerOptions"].update(version="v1"), "v2"),
    "api access": ("gpu", lambda m: _head(m).update(automountServiceAccountToken=True), "head: access to Kubernetes"),
    "kueue runs": ("kueue", lambda m: _job(m).update(suspend=False), "Kueue needs"),
    "no auth": ("gpu", lambda m: _job(m)["rayClusterSpec"].pop("authOptions"), "no token authentication"),
    "open ray": ("gpu", lambda m: _container(m)["env"].pop(1), "start without a token"),
    "no policy": ("gpu", lambda m: m.remove(of_kind(m, "NetworkPolicy")), "no NetworkPolicy"),
    "open policy": ("gpu", lambda m: of_kind(m, "NetworkPolicy")["spec"]["ingress"].append({}), "lets anybody in"),
    "load balancer": (
        "gpu",
        lambda m: _job(m)["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
        "reachable from outside",
    ),
    "account": ("gpu", lambda m: _head(m).update(serviceAccountName="default"), "service account is not"),
    "busy head": (
        "gpu",
        lambda m: _job(m)["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "num-cpus",
    ),
    "grace": ("gpu", lambda m: _head(m).update(terminationGracePeriodSeconds=5), "no time for a checkpoint"),
    "restart": ("gpu", lambda m: _head(m).update(restartPolicy="Always"), "restartPolicy"),
    "ranks": (
        "gpu",
        lambda m: _group(m).update(maxReplicas=3, replicas=3, minReplicas=3),
        "ranks are not the workers' GPUs",
    ),
    "doctor again": ("doctor", lambda m: _job(m).update(backoffLimit=3), "asked again on a new cluster"),
    "doctor of a part": ("doctor", lambda m: _group(m).update(replicas=1, minReplicas=1), "does not see all nodes"),
    "doctor of the head": (
        "doctor",
        lambda m: _job(m).update(entrypoint=_job(m)["entrypoint"].replace(" --nodes", "")),
        "does not look at every node",
    ),
    "config map": (
        "gpu",
        lambda m: of_kind(m, "ConfigMap")["metadata"].update(name="other"),
        "ConfigMap is not the one",
    ),
}


@pytest.mark.parametrize("what", SEEDED)
def test_a_seeded_error_of_each_kind_is_caught(what: str) -> None:
    name, break_it, message = SEEDED[what]
    manifests = rendered(name)
    break_it(manifests)
    assert any(message in fault for fault in faults(manifests)), faults(manifests)


@needs_crds
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: _job(m).update(backofLimit=3), "/spec/backofLimit: unknown field"),
        (lambda m: _job(m)["rayClusterSpec"]["authOptions"].update(mode="tokens"), "is none of"),
        (lambda m: _group(m).update(replicas="2"), "is no integer"),
        (lambda m: _group(m).update(maxReplicas=2**31), "is out of range"),
        (lambda m: _job(m)["rayClusterSpec"].pop("headGroupSpec"), None),
        (lambda m: _group(m)["rayStartParams"].update({"num-cpus": 1}), "is no string"),
        (lambda m: _container(m)["resources"]["limits"].update(memory="30 GB"), "has a wrong length or pattern"),
        (lambda m: _container(m).update(securitycontext={}), "unknown field"),
        (lambda m: _container(m).pop("name"), "name"),
        (lambda m: _submitter(m)["env"].append({"name": "A", "value": 1}), "is no string"),
        (lambda m: of_kind(m, "NetworkPolicy")["spec"].update(podselector={}), "podselector"),
        (lambda m: of_kind(m, "ServiceAccount")["metadata"]["labels"].update(a=1), "1"),
        (lambda m: of_kind(m, "RayJob")["metadata"].update(annotation={}), "annotation"),
    ],
)
def test_the_schemas_catch_what_an_api_server_would(break_it: Break, message: str | None) -> None:
    manifests = rendered("gpu")
    break_it(manifests)
    if message is None:
        with pytest.raises(KeyError):  # no head: there is no pod to look at
            [manifest_errors(manifest) for manifest in manifests]
        return
    errors = [error for manifest in manifests for error in manifest_errors(manifest)]
    assert any(message in error for error in errors), errors


def test_the_config_is_the_laptops_but_for_places_and_sizes() -> None:
    shipped = yaml.safe_load(of_kind(rendered("gpu"), "ConfigMap")["data"]["config.yaml"])
    laptop = CONFIG.model_dump(mode="json")
    assert changed_keys(shipped, laptop) == {
        "data.shards": "s3://bucket/team/medtl/sets/xrays", "data.loader_workers": 2, "train.threads": 1,
        "cluster.num_workers": 8, "cluster.use_gpu": True, "cluster.cpus_per_worker": 3.0, "cluster.address": "auto",
    }  # fmt: skip
    once = config_for(CONFIG, TARGETS["gpu"])
    assert config_for(once, TARGETS["gpu"]) == once


def test_the_network_is_open_to_the_addresses_of_the_config_and_no_others() -> None:
    def ports(shards: str) -> list[int]:
        manifests = render(load_config(overrides=[f"data.shards={shards}"]), TARGETS["gpu"])
        https = of_kind(manifests, "NetworkPolicy")["spec"]["egress"][2]
        assert manifest_errors(of_kind(manifests, "NetworkPolicy")) == []
        return [port["port"] for port in https["ports"]]

    assert ports("set") == ports("https://data.example.org/set") == [443, 6443]
    assert ports("http://store.storage.svc:8333/set") == [443, 6443, 8333]
    assert ports("http://store.storage.svc") == [80, 443, 6443]


def test_identities_reach_the_service_account_and_the_network() -> None:
    assert of_kind(rendered("irsa"), "ServiceAccount")["metadata"]["annotations"] == TARGETS["irsa"].identity
    assert "169.254.169.254/32" not in str(of_kind(rendered("irsa"), "NetworkPolicy"))
    assert "169.254.169.254/32" in str(of_kind(rendered("gke"), "NetworkPolicy"))
    secret = [{"secretRef": {"name": "s3-login"}}]
    assert _container(rendered("secret"))["envFrom"] == _head(rendered("secret"))["containers"][0]["envFrom"] == secret
    assert "s3-login" not in str(_job(rendered("secret"))["submitterPodTemplate"])
    assert _job(rendered("kueue"))["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Xrays"}, "--name 'Xrays'"),
        ({"name": "a" * 48}, "at most 47 characters"),
        ({"name": "1a"}, "a letter first"),
        ({"name": "a-"}, "no - last"),
        ({"name": "a\n"}, "--name"),
        ({"name": "a" * 54, "kind": "cluster"}, "at most 53"),
        ({"image": "medtl:latest"}, "Pin the digest"),
        ({"image": "medtl@sha256:123"}, "expected an image reference"),
        ({"image": "me dtl"}, "expected an image reference"),
        ({"store": None}, "--store is missing"),
        ({"store": None, "kind": "doctor"}, "--store is missing"),
        ({"namespace": "a b"}, "--namespace 'a b'"),
        ({"queue": "-q"}, "--queue '-q'"),
        ({"queue": "q", "shape": ELASTIC}, "--queue with --min-gpus"),
        ({"credentials_secret": "A"}, "--credentials-secret"),
        ({"token_secret": ""}, "--token-secret"),
        ({"spot": ("a b", "c")}, "--spot"),
        ({"spot": ("a", "c d")}, "--spot"),
        ({"identity": {"a": "b\nc"}}, "--identity"),
        ({"kind": "crossval"}, "--kind crossval: expected train, tune, cluster or doctor"),
        ({"retries": 0}, "--retries"),
        ({"grace_s": 59}, "--grace-s 59: expected at least 60"),
        ({"ray_version": "latest"}, "--ray-version 'latest'"),
    ],
)
def test_a_bad_choice_is_one_line_that_says_what_is_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(TARGETS["gpu"], **changes)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("root", "claim", "message"),
    [
        ("/data", None, "expected s3://bucket/prefix"),
        ("s3://", None, "expected s3://bucket/prefix"),
        ("http://host/x", None, "expected s3://bucket/prefix"),
        ("s3://key:secret@bucket/x", None, "no login"),
        ("s3://bucket/$(id)", None, "expected s3://bucket/prefix"),
        ("s3://bucket/../x", None, "expected s3://bucket/prefix"),
        ("s3://bucket/x y", None, "expected s3://bucket/prefix"),
        ("/mnt/store", None, "PersistentVolumeClaim"),
        ("/mnt", "c", "a folder below it"),
        ("/mnt/store", "C", "--claim 'C'"),
        ("s3://bucket", "c", "give one of the two"),
    ],
)
def test_a_store_that_pods_could_not_share_is_refused(root: str, claim: str | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Store(root, claim)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        ("gpu", [], "data.shards is not set"),
        ("gpu", ["data.shards=/home/me/set"], "pods can't see this machine's folders"),
        ("gpu", ["data.shards=~/set"], "pods can't see this machine's folders"),
        ("gpu", ["data.shards=../set"], "pods can't see this machine's folders"),
        ("volume", ["data.shards=/mnt/other/set"], "pods can't see this machine's folders"),
        ("gpu", ["data.shards=a\u2028b"], "expected printable characters only"),
        ("gpu", ["data.shards=s3://key:secret@bucket/set"], "a ConfigMap is no place for secrets"),
        ("gpu", ["data.shards=s3://bucket/set?X-Amz-Signature=1"], "a ConfigMap is no place for secrets"),
        ("gpu", ["data.shards=set", "model.weights=/home/me/my.pth"], "pods can't see this machine's folders"),
        ("gpu", ["data.shards=set", "data.global_batch_size=4"], "8 workers are more than the 4 lanes"),
    ],
)
def test_a_config_that_pods_could_not_run_is_refused(target: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        render(load_config(overrides=overrides), TARGETS[target])
    assert message in caught.value.message


def test_paths_lie_in_the_store() -> None:
    def shipped(target: str, *overrides: str) -> Config:
        return config_for(load_config(overrides=list(overrides)), TARGETS[target])

    assert shipped("volume", "data.shards=sets/a").data.shards == "/mnt/store/sets/a"
    assert shipped("volume", "data.shards=/mnt/store/sets/a").data.shards == "/mnt/store/sets/a"
    assert shipped("gpu", "data.shards=./sets/a").data.shards == "s3://bucket/team/medtl/sets/a"
    assert shipped("gpu", "data.shards=gs://other/a").data.shards == "gs://other/a"
    assert shipped("volume", "data.shards=a", "model.weights=w/a.pth").model.weights == "/mnt/store/w/a.pth"
    assert shipped("gpu", "data.shards=a", "model.weights=w/a.pth").model.weights == "s3://bucket/team/medtl/w/a.pth"
    assert shipped("gpu", "data.shards=a", "model.weights=random").model.weights == "random"
    assert shipped("gpu", "data.shards=a", "model.second_weights=w/b.pth").model.second_weights.endswith(
        "/medtl/w/b.pth"
    )


def test_a_doctor_stands_where_the_run_would() -> None:
    run = dataclasses.replace(TARGETS["volume"], shape=ELASTIC)
    doctors = render(CONFIG, dataclasses.replace(run, kind="doctor"))
    of_run = render(CONFIG, run)
    # One identity, config and network policy: applying either leaves the other's alone.
    assert doctors[:3] == of_run[:3]
    doctor, job = doctors[3], of_run[3]
    assert (doctor["metadata"]["name"], job["metadata"]["name"]) == ("xrays-1-doctor", "xrays-1")
    cluster, wanted = doctor["spec"]["rayClusterSpec"], job["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["template"] == wanted["workerGroupSpecs"][0]["template"]
    assert [cluster["workerGroupSpecs"][0][key] for key in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 2]
    assert doctor["spec"]["activeDeadlineSeconds"] == 3600
    shorter = dataclasses.replace(run, kind="doctor", name="a" * 40, deadline_s=3600)
    assert render(CONFIG, shorter)[3]["metadata"]["name"] == "a" * 40 + "-doctor"
    with pytest.raises(UserError, match="at most 40 characters"):
        dataclasses.replace(run, kind="doctor", name="a" * 41)


def test_rendering_leaves_its_input_alone() -> None:
    before = copy.deepcopy(CONFIG), copy.deepcopy(TARGETS["irsa"])
    manifests = render(CONFIG, TARGETS["irsa"])
    of_kind(manifests, "ServiceAccount")["metadata"]["annotations"].clear()
    assert (CONFIG, TARGETS["irsa"]) == before
