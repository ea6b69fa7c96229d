"""Places to render a run for, one of each kind, for the tests of manifests."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.manifests import Target, render, to_yaml
from cluster.placement import Store
from cluster.sizing import cpu_shape, gpu_shape
from medtl_dist.config import load_config

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, the same rules
IMAGE = "registry.example.org:5000/team/medtl:1.0@sha256:" + "0123456789abcdef" * 4
GPU = gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=None, global_batch_size=64, image_size_px=224)
ELASTIC = gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=0, global_batch_size=64, image_size_px=224)
CPU = cpu_shape(workers=2, cpus_per_worker=2)
S3 = Store("s3://bucket/team/medtl")
PVC = Store("/mnt/store", "claim-1")
CONFIG = load_config(preset="resnet101", overrides=["data.shards=sets/xrays"])

TARGETS = {
    "gpu": Target("xrays-1", IMAGE, GPU, S3),
    "cpu": Target("xrays-1", IMAGE, CPU, Store("gs://bucket"), namespace="1e3"),
    "elastic": Target("a", IMAGE, ELASTIC, S3, spot=("cloud.example.org/kind", "spot"), grace_s=60),
    "kueue": Target("a" * 47, IMAGE, GPU, S3, queue="0o17", token_secret="ray-token"),
    "volume": Target("xrays-1", IMAGE, GPU, PVC),
    "secret": Target("xrays-1", IMAGE, GPU, S3, credentials_secret="s3-login"),
    "irsa": Target(
        "xrays-1", IMAGE, GPU, S3, identity={"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/medtl"}
    ),
    "gke": Target(
        "xrays-1", IMAGE, GPU, S3, identity={"iam.gke.io/gcp-service-account": "medtl@project.iam.gserviceaccount.com"}
    ),
    "doctor": Target("a" * 40, IMAGE, ELASTIC, PVC, kind="doctor", spot=("cloud.example.org/kind", "spot")),
    "doctor-kueue": Target("xrays-1", IMAGE, CPU, S3, kind="doctor", queue="q", credentials_secret="s3-login"),
    "cluster": Target("a" * 53, IMAGE, ELASTIC, kind="cluster"),
    "cluster-kueue": Target("notebook", IMAGE, CPU, PVC, kind="cluster", queue="q"),
}


def rendered(name: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(to_yaml(render(CONFIG, TARGETS[name])), Loader=LOADER))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [m for m in manifests if m["kind"] == kind]
    return found
