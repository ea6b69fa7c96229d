"""Every knob, typed: YAML in, YAML out, dotted overrides. Precedence: preset < file < ``--set``.

A bad value cannot exist (pydantic, frozen) and a typo teaches: an unknown key's error lists the valid names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from medtl_dist.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# Where data lies and how it is fetched decides no number: these keys of ``data`` count neither in a run's identity nor in
# what --resume compares.
_PLACE_KEYS = {
    "shards", "loader_workers", "endpoint_url", "ca_bundle", "anonymous", "storage_timeout_s", "storage_retries",
    "cache_dir", "cache_mib",
}  # fmt: skip


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
    shards: str | None = Field(
        default=None,
        description="Shard set (`medtl data pack` makes one): a folder, or an s3://, gs:// or https:// address.",
    )
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
    sampling: Literal["natural", "class", "domain"] = Field(
        default="natural",
        description="natural: every training image once an epoch; class, domain: by weight, see sampling_weights.",
    )
    sampling_weights: dict[str, Annotated[float, Field(ge=0, le=100)]] | None = Field(
        default=None,
        description="How often each image of a class (or domain) appears per epoch, 1 where not named; null: so that "
        "all classes (or domains) appear equally often.",
    )
    normalisation: Literal["weights", "half"] = Field(
        default="weights", description="weights: what the pretrained network saw; half: mean 0.5, std 0.5 per channel."
    )
    eval_view: Literal["letterbox", "center_crop", "squash"] = Field(
        default="letterbox",
        description="How an image that is not square becomes one; training crops lie in the same frame.",
    )
    verify_checksums: bool = Field(
        default=True,
        description="Check each image's SHA-256 against the index when it is read; false: only what comes from a store.",
    )
    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint other than Amazon's; null: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL."
    )
    ca_bundle: str | None = Field(
        default=None, description="PEM file of the authorities to trust; null: AWS_CA_BUNDLE, else the system's."
    )
    anonymous: bool = Field(default=False, description="Read a public bucket without credentials.")
    storage_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="A store silent for so many seconds has failed to answer."
    )
    storage_retries: Annotated[int, Field(ge=0)] = Field(
        default=5, description="Further tries of a read from a store that gained nothing."
    )
    cache_dir: str | None = Field(
        default=None, description="Folder on a local disk for what was read from a store; null: no cache."
    )
    cache_mib: PositiveInt = Field(
        default=16384, description="Size limit of the cache; the least recently used goes first."
    )

    @model_validator(mode="after")
    def _weights_need_sampling(self) -> Data:
        if self.sampling_weights is not None and self.sampling == "natural":
            raise ValueError("sampling_weights needs sampling = class or domain")
        return self


# What each named set gives the keys of ``augment``; radiograph is the fields' own defaults.
_NO_AUGMENTATION = {"crop_area_min": 1.0, "rotation_deg": 0.0, "brightness": 0.0, "contrast": 0.0}
_SLIDE = {
    "crop_area_min": 0.64,
    "horizontal_flip": True,
    "right_angles": True,
    "rotation_deg": 0.0,
    "stain_jitter": 0.15,
}
AUGMENT_SETS: dict[str, dict[str, Any]] = {
    "none": _NO_AUGMENTATION,
    "radiograph": {},
    "histology": _SLIDE | {"stain_model": "hematoxylin_eosin"},
    "cytology": _SLIDE | {"stain_model": "color"},
}


class Augment(_Section):
    """Training views. The defaults suit radiographs: no mirror (laterality), at least 0.8 of the area."""

    name: Literal["none", "radiograph", "histology", "cytology"] = Field(
        default="radiograph",
        description="Set that gives the keys below their values; a key that is given keeps its own.",
    )
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
    right_angles: bool = Field(default=False, description="Turn by 0, 90, 180 or 270 degrees. For slides.")
    stain_jitter: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Largest random change of the amount of each stain, as a share of it. For slides."
    )
    stain_model: Literal["hematoxylin_eosin", "color"] = Field(
        default="hematoxylin_eosin", description="Stains that are told apart; color: each colour channel by itself."
    )
    mixup_alpha: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Blend each image with another, its share from Beta(alpha, alpha); 0: off."
    )
    cutmix_alpha: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Paste a box of another image, its area from Beta(alpha, alpha); 0: off."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_the_set(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name")
        return (AUGMENT_SETS.get(name, {}) if isinstance(name, str) else {}) | given


class Model(_Section):
    backbone: str = Field(
        default="resnet101", description="Name of a network (`medtl models` lists them), or timm/NAME."
    )
    weights: str = Field(
        default="imagenet",
        description="imagenet, random, a .pth or .safetensors file, or, in a stage of transfer.stages, stage:NAME.",
    )
    join: Literal["concat", "serial"] | None = Field(
        default=None,
        description="Two networks as one: concat, both networks' pooled features under a new head; serial, the backbone's "
        "last feature map (1x1 convolution, resized) into second_backbone; null: one network.",
    )
    second_backbone: str | None = Field(default=None, description="join: name of the second network.")
    second_weights: str = Field(
        default="imagenet",
        description="join: weights of the second network, as weights; unused where that file holds both.",
    )
    keep_head: bool = Field(
        default=True,
        description="Take the head of a weights file too, where it has as many outputs; false: a new head in any case.",
    )
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

    @model_validator(mode="after")
    def _joining_needs_two(self) -> Model:
        if (self.join is None) != (self.second_backbone is None):
            raise ValueError("join and second_backbone go together: give both, or neither")
        if self.join is not None and self.zero_init_residual:
            raise ValueError("zero_init_residual = true is for one network; with join leave it false")
        return self


class Optim(_Section):
    name: Literal["sgd", "adamw"] = Field(default="adamw", description="Optimiser.")
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="Peak learning rate of the new head.")
    backbone_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Peak learning rate of the backbone; null: lr."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of sgd.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="Weight decay (decoupled in adamw).")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Factor on the learning rate per stage from the head down: the last stage learns at this share of "
        "backbone_lr, the one below it at its square, and so on; 1: all stages alike.",
    )
    decay_norms_and_biases: bool = Field(
        default=True, description="Weight decay on normalisation layers and biases too; false: on weights alone."
    )
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
    loss: Literal["cross_entropy", "focal"] = Field(default="cross_entropy", description="What is minimised.")
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = Field(
        default=2.0, description="focal: how much what is already right is played down; 0 is cross_entropy."
    )
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        default="none",
        description="Weight of each class in the loss: none, balanced, or by name, for example {PNEUMONIA: 3}; the others 1. "
        "Of several labels an image: of a class's positives, its negatives weighing 1.",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of the target spread over all classes."
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay per step of a moving average of the weights, which is then what is scored and kept; null: none.",
    )
    accumulation_steps: PositiveInt = Field(
        default=1, description="Parts in which a rank's batch is computed, to save memory."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Compute each learning stage twice instead of keeping its activations: less memory."
    )
    sync_batchnorm: bool = Field(
        default=False, description="BatchNorm over the batches of all workers together; on GPUs only."
    )
    channels_last: bool = Field(default=True, description="Memory layout of convolutions.")
    early_stop_epochs: PositiveInt | None = Field(
        default=None, description="Stop after so many epochs without a better val AUC."
    )
    unfreeze: dict[PositiveInt, Annotated[int, Field(ge=0)]] = Field(
        default={},
        description="Stages still frozen from an epoch (from 0) on, for example {2: 4, 5: 0}; before, model.frozen_depth.",
    )
    checkpoint_every_steps: PositiveInt | None = Field(
        default=None, description="Checkpoints within an epoch, every so many steps; null: at the ends of epochs."
    )
    checkpoint_every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Checkpoints within an epoch, so many minutes after the last; null: none by the clock.",
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
    views: Literal["one", "mirror", "right_angles"] = Field(
        default="one",
        description="Views whose outputs are averaged: the image; it and its mirror image; both at all right angles (8).",
    )
    bootstrap_samples: PositiveInt = Field(
        default=2000, description="Resamples of patients for the bootstrap interval."
    )


class Transfer(_Section):
    """A chain of trainings, each from the best checkpoint of the one before: source, perhaps shared, then target."""

    stages: list[dict[str, Any]] = Field(
        default=[],
        description="Two or more stages: a name, and below data, augment, model, optim, schedule, train and evaluate what "
        "differs from the keys of the whole config; [] trains once.",
    )
    compare: bool = Field(
        default=False, description="Train the last stage alone as well, from model.weights, and compare the two."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=[], description="compare: seeds of train.seed with which both are trained; []: train.seed alone."
    )

    @model_validator(mode="after")
    def _comparing_needs_stages(self) -> Transfer:
        if self.compare and not self.stages:
            raise ValueError("compare = true needs stages")
        if self.seeds and not self.compare:
            raise ValueError("seeds need compare = true; one training has train.seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice")
        return self


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
    transfer: Transfer = Transfer()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _stages_are_configs(self) -> Config:
        stages_of(self)
        return self

    @model_validator(mode="after")
    def _rare_classes_are_favoured_once(self) -> Config:
        if self.data.sampling == "class" and self.train.class_weights == "balanced":
            raise ValueError(
                "data.sampling = class and train.class_weights = balanced correct the same twice: choose one"
            )
        return self

    def to_yaml(self) -> str:
        """The complete tree as YAML, in declaration order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Hex digest of what decides the numbers: the tree less ``cluster``, places and time-outs."""
        tree = _counting(self.model_dump(mode="json"))
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """One training of a chain; ``config`` is complete, and its ``model.weights`` may be ``stage:NAME`` of an earlier one."""

    name: str
    config: Config


_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_STAGE_SECTIONS = ("data", "augment", "model", "optim", "schedule", "train", "evaluate")
FROM_STAGE = "stage:"  # what model.weights begins with where it names a stage


def stages_of(config: Config) -> list[Stage]:
    """The stages of ``config.transfer``, each the whole config with its own keys in it; [] where there are none.

    A stage that names no weights starts from the one before it. A stage that names a set of augmentations starts from
    that set.

    Raises:
        ConfigError: a stage without a name of its own, with an unknown or refused key, or with weights from a stage that is
            not before it or has another network.
    """
    whole = config.model_dump(mode="json", exclude={"transfer"})
    stages: list[Stage] = []
    for number, entry in enumerate(config.transfer.stages, start=1):
        name = entry.get("name")
        where = f"transfer.stages, stage {number}"
        if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name) or name in [stage.name for stage in stages]:
            raise ConfigError(
                f"{where}: name = {name!r}: expected a name of its own of at most 40 of a-z, 0-9, - and _, such as source."
            )
        where += f" ({name})"
        own = {section: keys for section, keys in entry.items() if section != "name"}
        for section, keys in own.items():
            if section not in _STAGE_SECTIONS:
                raise ConfigError(f"{where}: unknown key {section}; a stage has: name, {', '.join(_STAGE_SECTIONS)}")
            if not isinstance(keys, Mapping):
                raise ConfigError(f"{where}: {section} = {keys!r}: expected keys below it")
        tree = {section: dict(keys) | dict(own.get(section, {})) for section, keys in whole.items()}
        if "name" in own.get("augment", {}):
            tree["augment"] = dict(own["augment"])
        if stages and "weights" not in own.get("model", {}):
            tree["model"] |= {"weights": FROM_STAGE + stages[-1].name, "zero_init_residual": False} | own.get(
                "model", {}
            )
        try:
            stage = Stage(name, validate(tree))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}") from None
        _check_origin(stage, stages, where)
        stages.append(stage)
    if len(stages) == 1:
        raise ConfigError("transfer.stages: one stage is no chain; give two or more, or put its keys into the config.")
    return stages


def _check_origin(stage: Stage, before: list[Stage], where: str) -> None:
    """Raises ConfigError where the stage's weights can't come from the stage that they name."""
    model = stage.config.model
    asked = [("backbone", model.backbone, "weights", model.weights)]
    if model.join is not None:
        asked.append(("second_backbone", str(model.second_backbone), "second_weights", model.second_weights))
    for key, backbone, weights_key, weights in asked:
        if not weights.startswith(FROM_STAGE):
            continue
        origin = next((one for one in before if FROM_STAGE + one.name == weights), None)
        if origin is None:
            earlier = ", ".join(one.name for one in before) or "none"
            raise ConfigError(
                f"{where}: model.{weights_key} = {weights}: there is no such stage before it (there are: {earlier})."
            )
        theirs = origin.config.model
        both = (theirs.join, theirs.backbone, theirs.second_backbone) == (
            model.join,
            model.backbone,
            model.second_backbone,
        )
        if both and key == "backbone":
            return  # everything comes from there
        if theirs.backbone != backbone or theirs.join is not None:
            name = (
                theirs.backbone
                if theirs.join is None
                else f"{theirs.backbone}+{theirs.second_backbone} ({theirs.join})"
            )
            raise ConfigError(
                f"{where}: model.{key} = {backbone} can't start from stage {origin.name}, which is a {name}: give the same "
                f"backbone, or model.{weights_key} (imagenet, random, a file, stage:NAME)."
            )


def _counting(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped config less what decides no number: ``cluster``, places and time-outs, in the stages too."""
    kept = {section: keys for section, keys in tree.items() if section != "cluster"}
    for part in (kept, *(tree["transfer"]["stages"] if "transfer" in tree else [])):
        for section, left_out in (("data", _PLACE_KEYS), ("train", {"collective_timeout_s"})):
            if section in part:
                part[section] = {key: value for key, value in part[section].items() if key not in left_out}
    return kept


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
    a, b = (_flat(_counting(config.model_dump(mode="json"))) for config in (one, other))
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]


def _flat(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


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
    if ".".join(parts) not in (
        "data.shards",
        "data.ca_bundle",
        "model.weights",
        "model.second_weights",
    ):  # no YAML: " #" and ": " may occur in a path
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
        return f"{path[0]}: " if path else "", message
    field = Config.model_fields[path[0]].annotation.model_fields[path[1]]  # type: ignore[union-attr]
    return f"{'.'.join(path[:2])} = {fault['input']!r} ({field.description}) Expected ", message
