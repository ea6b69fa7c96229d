"""What a config is made of: the sections, every key typed, described and bounded, so that a bad value cannot exist."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and without keys of its own invention."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and "bool" not in str(annotation):
            raise ValueError("a number or a name, not true or false")
        return value


class Data(Section):
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
    kms_key: str | None = Field(
        default=None,
        description="Key of AWS KMS (id, ARN, alias/NAME) for what is written to s3://; null: MEDTL_S3_KMS_KEY, else none.",
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


class Augment(Section):
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
    views: PositiveInt | None = Field(
        default=None,
        description="Different training views of an image, seen in turn over the epochs; null: a fresh one each epoch.",
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


class Model(Section):
    backbone: str = Field(
        default="resnet101", description="Name of a network (`medtl models` lists them), or timm/NAME."
    )
    weights: str = Field(
        default="imagenet",
        description="imagenet, random, a .pth or .safetensors file (path, s3://, gs://), or, in a stage of a chain, stage:NAME.",
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


class Optim(Section):
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


class Schedule(Section):
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


class Train(Section):
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
    max_nonfinite_steps: PositiveInt = Field(
        default=3,
        description="Stop after so many steps in a row whose loss is not finite; each is left out, and logged.",
    )
    threads: PositiveInt | None = Field(
        default=None, description="CPU threads per rank; null: the rank's share. Bits depend on it."
    )
    collective_timeout_s: PositiveInt = Field(
        default=300, description="Give up on a silent rank after so many seconds."
    )
    mlflow_uri: str | None = Field(
        default=None, description="MLflow tracking server for each epoch's numbers (extra mlflow); null: none."
    )

    @field_validator("mlflow_uri")
    @classmethod
    def _no_secret_in_an_address(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("http") and ("@" in value or "?" in value):
            raise ValueError(
                "an address without user, password or query; use MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return value


class Evaluate(Section):
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


class Transfer(Section):
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
