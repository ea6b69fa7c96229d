"""`medtl k8s render`: a run's config → Kubernetes manifests, printed or handed to kubectl."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.sizing import GPU_IMAGES_PER_S, LOADER_IMAGES_PER_S_CORE
from medtl_dist.cli.train import ConfigFile, Overrides, Preset
from medtl_dist.config import load_config
from medtl_dist.errors import UserError

if TYPE_CHECKING:
    from cluster.sizing import Shape

app = typer.Typer(
    name="k8s", help="Run on Kubernetes with KubeRay.", no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip


@app.callback()
def _group() -> None:
    """Run on Kubernetes with KubeRay."""  # keeps `render` a command of its own while there is no second one


@app.command()
def render(
    name: Annotated[str, typer.Option(help="Run name; the run folder is STORE/runs/NAME, and the same name resumes.")],
    image: Annotated[str, typer.Option(help="Image of head, workers and submitter, pinned: …@sha256:….")],
    preset: Preset = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    store: Annotated[
        str | None, typer.Option(help="s3://bucket/prefix, gs://bucket/prefix, or /mnt/… with --claim.")
    ] = None,
    claim: Annotated[str | None, typer.Option(help="PersistentVolumeClaim (ReadWriteMany) mounted at STORE.")] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="train|tune|cluster|doctor",
            help="A training, a sweep, a cluster to work on, or `medtl doctor` where the training would run.",
        ),
    ] = "train",
    space: Annotated[
        str | None,
        typer.Option("--space", metavar="NAME|FILE", help="--kind tune: search space; wins over tune.space."),
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs in all, one per rank; of a sweep for all trials at once; 0: on CPUs.")
    ] = 0,
    gpus_per_worker: Annotated[int, typer.Option(min=1, help="GPUs of each worker pod.")] = 1,
    min_gpus: Annotated[
        int | None, typer.Option(min=0, help="Let the autoscaler go down to so many GPUs [default: fixed size].")
    ] = None,
    cpu_workers: Annotated[int, typer.Option(min=1, help="Worker pods when --gpus is 0.")] = 2,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPUs of each when --gpus is 0.")] = 2,
    loader_speed: Annotated[
        float, typer.Option("--loader-images-per-s-core", help="Images/s that one core loads; the default is measured.")
    ] = LOADER_IMAGES_PER_S_CORE,
    gpu_speed: Annotated[
        float, typer.Option("--gpu-images-per-s", help="Images/s that one GPU trains; the default is assumed.")
    ] = GPU_IMAGES_PER_S,
    spot: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE", help="Node label (and taint) of spot nodes, for the workers.")
    ] = None,
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue.")] = None,
    identity: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Annotation of the service account (IRSA, Workload Identity)."),
    ] = None,
    credentials_secret: Annotated[
        str | None, typer.Option(help="Secret whose keys become environment variables; better: --identity.")
    ] = None,
    token_secret: Annotated[
        str | None, typer.Option(help="Secret with Ray's token as auth_token [default: KubeRay makes one].")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of everything [default: kubectl's].")] = None,
    grace_s: Annotated[int, typer.Option(help="Seconds between a pod's notice and its end.")] = 120,
    deadline_h: Annotated[int, typer.Option(min=1, max=8760, help="Hours after which the job is stopped.")] = 24,
    retries: Annotated[int, typer.Option(help="New clusters after the loss of one; each resumes.")] = 3,
    ray_version: Annotated[str | None, typer.Option(help="Ray in the image [default: the one installed here].")] = None,
    allow_tag: Annotated[bool, typer.Option("--allow-tag", help="Accept an image that is not pinned.")] = False,
    without_config: Annotated[
        bool, typer.Option("--without-config", help="Leave the ConfigMap to kustomize's configMapGenerator.")
    ] = False,
    test: Annotated[bool, typer.Option("--test", help="Score the test split once at the end.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Hand the manifests to `kubectl apply`.")] = False,
) -> None:
    """Print the manifests that run a config on Kubernetes; with --apply hand them to kubectl.

    \b
    Examples:
      medtl k8s render --preset resnet101 --set data.shards=sets/xrays --name xrays-1 --gpus 8 \\
          --image registry.example.org/medtl@sha256:… --store s3://bucket/medtl > run.yaml
      medtl k8s render --kind tune --preset resnet101 --space resnet101 --set data.shards=sets/xrays --name sweep-1 --gpus 4 \\
          --image … --store s3://bucket/medtl --apply
      medtl k8s render --kind cluster --name notebook --gpus 4 --min-gpus 0 --image … --apply
      medtl k8s render --kind doctor --preset resnet101 --set data.shards=sets/xrays --name xrays-1 --gpus 8 \\
          --image … --store s3://bucket/medtl --apply
    """
    from cluster.manifests import SWEEP, Target, to_yaml
    from cluster.manifests import render as manifests_of
    from cluster.placement import Store
    from cluster.sizing import cpu_shape
    from cluster.sweep_pods import describe_trials, read_space, trial_shape
    from cluster.trainings import training_shape, with_driver

    if claim is not None and store is None:
        raise UserError(f"--claim {claim} without --store: say where it is mounted, for example --store /mnt/store.")
    if space is not None and kind != SWEEP:
        raise UserError(
            f"--space {space} with --kind {kind}: only a sweep has a space; add --kind tune, or leave it out."
        )
    resolved = load_config(preset=preset, file=config, overrides=overrides or [])
    shipped = read_space(space or resolved.tune.space, resolved) if kind == SWEEP else None
    amounts: dict[str, Any] = {
        "gpus": gpus,
        "gpus_per_worker": gpus_per_worker,
        "min_gpus": min_gpus,
        "loader_images_per_s_core": loader_speed,
        "gpu_images_per_s": gpu_speed,
    }
    if not gpus:
        shape = cpu_shape(workers=cpu_workers, cpus_per_worker=cpus_per_worker)
    elif shipped is not None:
        shape = trial_shape(resolved, shipped.space, **amounts)
    else:
        shape = training_shape(resolved, **amounts)
    target = Target(
        name=name,
        image=image,
        shape=with_driver(shape, resolved),
        store=None if store is None else Store(store.rstrip("/"), claim),
        kind=kind,
        space=shipped,
        namespace=namespace,
        queue=queue,
        spot=None if spot is None else _pair("--spot", spot),
        credentials_secret=credentials_secret,
        token_secret=token_secret,
        identity=dict(_pair("--identity", text) for text in identity or ()),
        grace_s=grace_s,
        deadline_s=deadline_h * 3600,
        retries=retries,
        allow_tag=allow_tag,
        ray_version=ray_version or importlib.metadata.version("ray"),
    )
    text = to_yaml(manifests_of(resolved, target, open_test=test, with_config=not without_config))
    trials = "" if shipped is None else f"; {describe_trials(resolved, shape)}"
    typer.echo(describe(shape, loader_speed, gpu_speed) + trials, err=True)
    if apply:
        hand_to_kubectl(text)
    else:
        typer.echo(text, nl=False)


def describe(shape: Shape, loader_speed: float, gpu_speed: float) -> str:
    """One line for the terminal: how many pods of what size, and the speeds that the size follows from."""
    worker = shape.worker
    least = f" (at least {shape.min_pods})" if shape.elastic else ""
    gpus = f", {worker.gpus} GPU{'s' if worker.gpus > 1 else ''}" if worker.gpus else ""
    line = f"{shape.pods} worker pods{least} of {worker.cpus} CPUs, {worker.memory_gib} GiB{gpus}"
    if not shape.gpu:
        return line
    per = "GPU" if shape.ranks_per_gpu == 1 else "trial"
    return (
        f"{line}; {shape.rank.loaders} loader{'s' if shape.rank.loaders > 1 else ''} per {per}, from {loader_speed:g} images/s "
        f"per core (--loader-images-per-s-core) for {gpu_speed:g} images/s per GPU (--gpu-images-per-s)"
    )


def hand_to_kubectl(text: str) -> None:
    """`kubectl apply` with the user's own context. Raises UserError where there is no kubectl, or where it fails."""
    if shutil.which("kubectl") is None:
        raise UserError(
            "--apply needs kubectl on the PATH; without it, write the manifests to a file and apply them elsewhere."
        )
    done = subprocess.run(["kubectl", "apply", "--filename", "-"], input=text.encode(), check=False)
    if done.returncode:
        raise UserError(f"kubectl apply ended with exit code {done.returncode}; its message is above.")


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{option} {text}: expected KEY=VALUE.")
    return key, value
