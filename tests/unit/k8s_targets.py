"""Places to render a run for, one of each kind, for the tests of manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import Target, render, to_yaml
from cluster.placement import Store
from cluster.sizing import cpu_shape, gpu_shape
from cluster.sweep_pods import ShippedSpace, read_space, trial_shape
from cluster.trainings import training_shape, with_driver
from medtl_dist.config import Config, load_config

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, the same rules
IMAGE = "registry.example.org:5000/team/medtl:1.0@sha256:" + "0123456789abcdef" * 4
GPU = gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=None, global_batch_size=64, image_size_px=224)
ELASTIC = gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=0, global_batch_size=64, image_size_px=224)
CPU = cpu_shape(workers=2, cpus_per_worker=2)
S3 = Store("s3://bucket/team/medtl")
PVC = Store("/mnt/store", "claim-1")
CONFIG = load_config(preset="resnet101", overrides=["data.shards=sets/xrays"])
SWEPT = load_config(preset="resnet101", overrides=["data.shards=sets/xrays", "cluster.num_workers=4"])
HALVED = load_config(preset="resnet101", overrides=["data.shards=sets/xrays", "cluster.use_gpu=0.5"])
NAMED = read_space("resnet101", CONFIG)
FILE = ShippedSpace(
    "/etc/medtl/space.yaml",
    (Path(__file__).parents[2] / "tune_spaces/head_only.yaml").read_text(encoding="utf-8"),
    read_space("head_only", CONFIG).space,
)
_STAGES = """[
  {name: source, data: {shards: sets/source, global_batch_size: 512, image_size_px: 1024}, model: {weights: w/a.pth}},
  {name: shared, data: {shards: "s3://other/shared", loader_workers: 4}, train: {threads: null}},
  {name: target, data: {loader_workers: null}, train: {threads: 2, epochs: 3}},
]"""


def chained(stages: str = _STAGES, *overrides: str) -> Config:
    """A chain of the same network as CONFIG's, which names its last stage's set."""
    return load_config(
        preset="resnet101", overrides=["data.shards=sets/xrays", f"transfer.stages={stages}", *overrides]
    )


CHAIN = chained()
COMPARED = chained(_STAGES, "transfer.compare=true", "transfer.seeds=[3, 4]")
CHAINED = training_shape(CHAIN, gpus=8, gpus_per_worker=4, min_gpus=None)
SINGLE = trial_shape(CONFIG, NAMED.space, gpus=4, gpus_per_worker=1, min_gpus=None)
SHARED = trial_shape(HALVED, NAMED.space, gpus=2, gpus_per_worker=2, min_gpus=0)

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
    "sweep": Target("sweep-1", IMAGE, SINGLE, S3, kind="tune", space=NAMED),
    "sweep-file": Target("a" * 47, IMAGE, GPU, PVC, kind="tune", space=FILE, queue="q"),
    "sweep-shared": Target("sweep-1", IMAGE, SHARED, S3, kind="tune", space=FILE, credentials_secret="s3-login"),
    "sweep-cpu": Target("sweep-1", IMAGE, CPU, Store("gs://bucket"), kind="tune", space=NAMED),
    "chain": Target("chain-1", IMAGE, CHAINED, S3),
    "chain-cpu": Target("a" * 47, IMAGE, CPU, PVC, queue="q"),
    "compare": Target("chain-1", IMAGE, with_driver(CHAINED, COMPARED), PVC, credentials_secret="s3-login"),
    "cluster": Target("a" * 53, IMAGE, ELASTIC, kind="cluster"),
    "cluster-kueue": Target("notebook", IMAGE, CPU, PVC, kind="cluster", queue="q"),
}
CONFIGS = {  # of the others CONFIG
    "sweep-file": SWEPT, "sweep-shared": HALVED, "chain": CHAIN, "chain-cpu": CHAIN, "compare": COMPARED,
}  # fmt: skip


def rendered(name: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(to_yaml(render(CONFIGS.get(name, CONFIG), TARGETS[name])), Loader=LOADER))


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [m for m in manifests if m["kind"] == kind]
    return found


def changed_keys(shipped: dict[str, Any], laptop: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config is another on the cluster, by dotted key."""
    return {
        f"{section}.{key}": value
        for section, keys in shipped.items()
        for key, value in keys.items()
        if value != laptop[section][key]
    }
