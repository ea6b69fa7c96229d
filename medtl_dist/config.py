"""Every knob, typed: YAML in, YAML out, dotted overrides. Precedence: preset < file < ``--set``.

A bad value cannot exist (pydantic, frozen) and a typo teaches: an unknown key's error lists the valid names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from medtl_dist.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and "bool" not in str(annotation):
            raise ValueError("a number or a name, not true or false")
        return value


class Data(_Section):
    shards: str | None = Field(default=None, description="Folder of the shard set (`medtl data pack` makes one).")
    image_size_px: PositiveInt | None = Field(
        default=None, description="Side of the network's square input; null: the backbone's own."
    )
    global_batch_size: PositiveInt = Field(
        default=32, description="Images per optimiser step over all workers; per-rank sizes are derived."
    )
    eval_batch_size: PositiveInt = Field(
        default=32, description="Images per evaluation batch, one fixed shape on every rank."
    )
    lanes: PositiveInt = Field(
        default=64, description="Upper limit of parallel read positions per epoch, hence of the world size."
    )
    loader_workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Decoding processes per rank; 0 decodes in the rank itself; null: from the rank's CPUs.",
    )
    normalisation: Literal["weights", "half"] = Field(
        default="weights", description="weights: what the pretrained network saw; half: mean 0.5, std 0.5 per channel."
    )
    eval_view: Literal["letterbox", "center_crop", "squash"] = Field(
        default="letterbox",
        description="How an image that is not square becomes one; training crops lie in the same frame.",
    )
    verify_checksums: bool = Field(
        default=True, description="Check each image's SHA-256 against the index when it is read."
    )


class Augment(_Section):
    """Training views. The defaults suit radiographs: no mirror (laterality), at least 0.8 of the area."""

    crop_area_min: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8, description="Smallest area of the random crop; 1: none."
    )
    horizontal_flip: bool = Field(default=False, description="Mirror half of the images. Wrong for radiographs.")
    rotation_deg: Annotated[float, Field(ge=0, le=180)] = Field(
        default=5.0, description="Largest random rotation, degrees."
    )
    brightness: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Largest random change of brightness, as a share of it."
    )
    contrast: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Largest random change of contrast, as a share of it."
    )


class Model(_Section):
    backbone: str = Field(
        default="resnet101", description="Name of a network (`medtl models` lists them), or timm/NAME."
    )
    weights: str = Field(default="imagenet", description="imagenet, random, or a .pth or .safetensors file.")
    frozen_depth: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        default=0,
        description="Stages kept as they are: 0 none, 1 the stem, … number of stages (or all): everything but the head.",
    )
    fold_frozen: bool = Field(
        default=False,
        description="Compute frozen convolutions with their BatchNorm folded in; in bf16 features change by some percent.",
    )
    zero_init_residual: bool = Field(
        default=False, description="Start residual branches at zero; for random weights only."
    )

    @model_validator(mode="after")
    def _zero_init_needs_random(self) -> Model:
        if self.zero_init_residual and self.weights != "random":
            raise ValueError("zero_init_residual = true needs weights = random: it would erase what was pretrained")
        return self


class Optim(_Section):
    name: Literal["sgd", "adamw"] = Field(default="adamw", description="Optimiser.")
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="Peak learning rate of the new head.")
    backbone_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Peak learning rate of the backbone; null: lr."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of sgd.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="Weight decay (decoupled in adamw).")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest gradient norm; null: no clipping."
    )


class Schedule(_Section):
    name: Literal["constant", "step", "cosine"] = Field(
        default="cosine", description="Course of the learning rate after warm-up."
    )
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Linear warm-up, epochs (fractions allowed)."
    )
    step_epochs: PositiveInt = Field(default=10, description="step: epochs between two drops.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(default=0.1, description="step: factor of each drop.")
    final_fraction: Fraction = Field(
        default=0.0, description="cosine: learning rate at the end, as a share of the peak."
    )


class Train(_Section):
    epochs: PositiveInt = Field(default=10, description="Passes over the training split.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Autocast type; auto: bf16 where the processor has it, else fp16 on a GPU, fp32 on a CPU.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="Seed of order, augmentation and initialisation."
    )
    class_weights: Literal["none", "balanced"] = Field(default="none", description="Weight of each class in the loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of the target spread over all classes."
    )
    accumulation_steps: PositiveInt = Field(
        default=1, description="Parts in which a rank's batch is computed, to save memory."
    )
    channels_last: bool = Field(default=True, description="Memory layout of convolutions.")
    early_stop_epochs: PositiveInt | None = Field(
        default=None, description="Stop after so many epochs without a better val AUC."
    )
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads per rank; null: the rank's share. Bits depend on it."
    )
    collective_timeout_s: PositiveInt = Field(
        default=300, description="Give up on a silent rank after so many seconds."
    )


class Evaluate(_Section):
    unit: Literal["image", "patient"] = Field(default="image", description="What the headline numbers count.")
    aggregate: Literal["mean", "max"] = Field(default="mean", description="How a patient's images become one score.")
    sensitivity: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Threshold: the highest that reaches this sensitivity on val; null: Youden's index, with a caution.",
    )
    bootstrap_samples: PositiveInt = Field(
        default=2000, description="Resamples of patients for the bootstrap interval."
    )


class Cluster(_Section):
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Ray Train workers; 0: in this process, no Ray."
    )
    use_gpu: bool | None = Field(default=None, description="One GPU per worker; null: where there is one.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(default=1.0, description="CPUs reserved for each worker.")
    address: str | None = Field(
        default=None, description="Address of a Ray cluster; null: RAY_ADDRESS, else start one here."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Restarts from the last checkpoint after a lost worker."
    )


class Config(_Section):
    """The whole tree. Every run folder holds it as ``config.yaml``, complete and rerunnable."""

    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    def to_yaml(self) -> str:
        """The complete tree as YAML, in declaration order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Hex digest of what decides the numbers: the tree less ``cluster``, places and time-outs."""
        tree = self.model_dump(
            mode="json",
            exclude={"cluster": True, "data": {"shards", "loader_workers"}, "train": {"collective_timeout_s"}},
        )
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key!r} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in ``text``. Raises ConfigError, naming ``where``, for anything that is not a plain YAML mapping."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{line}: {problem}. Expected sections like `optim:` with keys below them.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{where}: expected sections like `optim:` with keys below them, found {type(tree).__name__}."
        )
    return cast("dict[str, Any]", tree)


def preset_names() -> list[str]:
    """Names of the packaged presets, sorted."""
    files = resources.files("medtl_dist.presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset, its header included. Raises ConfigError listing the names there are."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(preset_names())}")
    return (resources.files("medtl_dist.presets") / f"{name}.yaml").read_text(encoding="utf-8")


def load_config(
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The config from ``preset`` < ``file`` < ``overrides`` (``section.key=value``, the value as YAML).

    Raises:
        ConfigError: unknown preset, unreadable file, unknown key (with the valid ones), or a refused value.
    """
    tree: dict[str, Any] = {}
    if preset is not None:
        _merge(tree, parse_yaml(preset_text(preset), f"preset {preset}"))
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"config {file}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})."
            ) from None
        _merge(tree, parse_yaml(text, f"config {file}"))
    for override in overrides:
        _merge(tree, _parse_override(override))
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> Config:
    """The typed config of a plain tree. Raises ConfigError with one line per fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A union reports a fault for each of its branches: one line per key, the expectations joined.
        expected: dict[str, list[str]] = {}
        for fault in error.errors():
            subject, message = _explain(fault)
            expected.setdefault(subject, []).append(message)
        raise ConfigError(
            "\n".join(subject + " or ".join(dict.fromkeys(m)) for subject, m in expected.items())
        ) from None


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configs differ and that count in :meth:`Config.sha256`, as ``key: one -> other``."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    place = ("cluster.", "data.shards", "data.loader_workers", "train.collective_timeout_s")
    return [f"{key}: {a[key]} -> {b[key]}" for key in a if a[key] != b[key] and not key.startswith(place)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {text}: expected section.key=value, for example --set optim.lr=0.001")
    leaf: Any = value
    if parts not in (["data", "shards"], ["model", "weights"]):  # a path is no YAML: " #" and ": " may occur in it
        with contextlib.suppress(yaml.YAMLError):
            leaf = yaml.safe_load(value)
    for part in reversed(parts):
        leaf = {part: leaf}
    return leaf


def _explain(fault: Any) -> tuple[str, str]:
    """One pydantic fault as a sentence in two parts: the key with what it was given, and what is expected of it."""
    # A union's branches ("int", "literal['all']") are appended to the path; what the user wrote are the model fields.
    path: list[str] = []
    section: Any = Config
    for part in fault["loc"]:
        path.append(str(part))
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            break
        section = fields[part].annotation
    if fault["type"] == "extra_forbidden":
        parent = Config if len(path) == 1 else Config.model_fields[path[0]].annotation
        valid = ", ".join(sorted(getattr(parent, "model_fields", {})))
        return f"unknown key {'.'.join(path)}; {path[0] if len(path) > 1 else 'the config'} has: {valid}", ""
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ").split(", unable to ")[0]
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{'.'.join(path) or 'config'} = {fault['input']!r}: ", "expected keys below it"
    if len(path) < 2:
        return f"{path[0]}: ", message
    field = Config.model_fields[path[0]].annotation.model_fields[path[1]]  # type: ignore[union-attr]
    return f"{'.'.join(path[:2])} = {fault['input']!r} ({field.description}) Expected ", message
