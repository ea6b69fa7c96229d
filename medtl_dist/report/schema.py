"""results.json, typed: the part of schema version 1 that a report needs.

Keys that the classes don't name are ignored, so that a newer tool may add some; a value of another type or a NaN is refused.
Shares and scores lie in [0, 1]; an interval is (low, high); null means undefined or unknown.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Interval = tuple[float, float]  # low, high


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Rate(_Part):
    """A share with its interval, and how the interval was made."""

    value: float | None = None
    ci: Interval | None = None
    method: str | None = None


class Threshold(_Part):
    """The score from which on an image counts as positive, and the rule that chose it."""

    value: float
    rule: str = ""
    fixed_on: str = "val"
    caution: str | None = None


class RocCurve(_Part):
    """Points of a ROC curve, shares in [0, 1]."""

    fpr: list[float]
    tpr: list[float]

    @model_validator(mode="after")
    def _same_length(self) -> RocCurve:
        if len(self.fpr) != len(self.tpr):
            raise ValueError("fpr and tpr differ in length")
        return self


class PrCurve(_Part):
    """Points of a precision-recall curve, shares in [0, 1], in the order of the threshold."""

    recall: list[float]
    precision: list[float]

    @model_validator(mode="after")
    def _same_length(self) -> PrCurve:
        if len(self.recall) != len(self.precision):
            raise ValueError("recall and precision differ in length")
        return self


class Curves(_Part):
    """The two curves of one class against the rest; null where the class or the rest is absent."""

    roc: RocCurve | None = None
    pr: PrCurve | None = None


class CalibrationBin(_Part):
    """Images of similar score: their mean score and the share of them that is positive."""

    score_mean: float
    observed: float
    n: int
    ci: Interval | None = None


class Histogram(_Part):
    """Counts of scores between ``edges``, by true class."""

    edges: list[float]
    positive: list[float]
    negative: list[float]

    @model_validator(mode="after")
    def _fits_its_edges(self) -> Histogram:
        if not len(self.edges) - 1 == len(self.positive) == len(self.negative):
            raise ValueError("a histogram of n bins needs n + 1 edges")
        return self


class ClassEntry(_Part):
    """One class against the rest."""

    auc: float | None = None
    auc_ci: Interval | None = None
    auc_undefined: str | None = None
    ci_warning: str | None = None
    average_precision: float | None = None
    prevalence: float | None = None
    n_positive: int | None = None
    n_positive_groups: int | None = None
    curves: Curves | None = None
    # Of several labels an image: each class has images of its own, those whose answer is known, and its own threshold.
    n: int | None = None
    n_unknown: int | None = None
    threshold: Threshold | None = None
    sensitivity: Rate | None = None
    specificity: Rate | None = None
    ppv: Rate | None = None


class Macro(_Part):
    """Unweighted means over the classes whose AUC is defined."""

    auc: float | None = None
    average_precision: float | None = None
    n_defined: int | None = None


class MixedGroups(_Part):
    """Groups whose images don't all have one label."""

    count: int = 0
    groups: list[str] = []
    left_out_of_patient_level: int = 0


class SplitEntry(_Part):
    """What ``metrics.summary.summarise`` returns for one split and one unit."""

    n: int
    auc: float | None
    unit: str = "image"
    aggregate: str | None = None
    n_groups: int | None = None
    n_positive: int | None = None
    n_negative: int | None = None
    n_positive_groups: int | None = None
    n_negative_groups: int | None = None
    prevalence: float | None = None
    auc_undefined: str | None = None
    auc_ci: Interval | None = None
    auc_ci_bootstrap: Interval | None = None
    ci_method: str | None = None
    ci_level: float = 0.95
    ci_warning: str | None = None
    average_precision: float | None = None
    average_precision_chance: float | None = None
    loss: float | None = None
    accuracy: Rate | None = None
    balanced_accuracy: Rate | None = None
    sensitivity: Rate | None = None
    specificity: Rate | None = None
    ppv: Rate | None = None
    npv: Rate | None = None
    f1: Rate | None = None
    confusion: list[list[int]] | None = None
    threshold: Threshold | None = None
    brier: float | None = None
    ece: float | None = None
    calibration: list[CalibrationBin] | None = None
    curves: Curves | None = None
    histogram: Histogram | None = None
    per_class: dict[str, ClassEntry] | None = None
    macro: Macro | None = None
    mixed_label_groups: MixedGroups | None = None
    other_level: SplitEntry | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers_are_rates(cls, raw: Any) -> Any:
        """A measure without an interval may be written as a bare number."""
        if not isinstance(raw, dict):
            return raw
        names = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "ppv", "npv", "f1")
        bare = {name: {"value": raw[name]} for name in names if isinstance(raw.get(name), int | float)}
        return {**raw, **bare}


class Excluded(_Part):
    """Images left out for one reason, of one split and class."""

    reason: str
    samples: int
    groups: int | None = None
    split: str | None = None
    class_: str | None = Field(None, alias="class")


class SplitCounts(_Part):
    """What a split of the shard set holds."""

    samples: int
    groups: int | None = None
    classes: dict[str, int] = {}


class Data(_Part):
    """The shard set that the run used."""

    name: str = ""
    sha256: str | None = None
    group_source: str = "none"
    found: int | None = None
    excluded: list[Excluded] | None = None
    splits: dict[str, SplitCounts] = {}
    preprocessing: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None


class Model(_Part):
    """What was trained, and from where its weights came."""

    backbone: str = ""
    frozen_depth: int | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    weights: str = ""
    weights_sha256: str | None = None


class Throughput(_Part):
    """How fast the run went; the share is of the training time, in [0, 1]."""

    images_per_s: float | None = None
    data_wait_fraction: float | None = None


class Training(_Part):
    """How the work was divided."""

    world_size: int | None = None
    precision: str | None = None
    precision_note: str | None = None
    device: str | None = None
    global_batch_size: int | None = None
    dropped_per_epoch: int | None = None


class Provenance(_Part):
    """Enough to make the run again, or to tell that another one is not the same."""

    config_sha256: str | None = None
    dataset_sha256: str | None = None
    versions: dict[str, str] = {}
    commit: str | None = None
    started: str | None = None
    finished: str | None = None


class TestOpenings(_Part):
    """The ledger: how often, and by how many configurations, this data set's test split was scored."""

    __test__ = False  # pytest would take the name for a test class

    count: int
    configurations: int | None = None


class Results(_Part):
    """results.json."""

    run: str
    task: str
    classes: list[str] = Field(min_length=2)
    splits: dict[str, SplitEntry]
    positive_class: str | None = None
    best_epoch: int | None = None
    epochs_run: int | None = None
    epochs_planned: int | None = None
    stopped_early: bool | None = None
    threshold: Threshold | None = None
    model: Model = Model()
    throughput: Throughput = Throughput()
    timing_s: dict[str, float | None] = {}
    training: Training = Training()
    data: Data = Data()
    provenance: Provenance = Provenance()
    test_openings: TestOpenings | None = None
    cautions: list[str] = []

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several of the classes, or be unknown for some."""
        return self.task == "multilabel"

    @property
    def binary(self) -> tuple[str, str] | None:
        """(negative, positive) class of a task of two classes; None for more, or several an image."""
        if len(self.classes) != 2 or self.several_labels:
            return None
        positive = 0 if self.positive_class == self.classes[0] != self.classes[1] else 1
        return self.classes[1 - positive], self.classes[positive]

    @model_validator(mode="after")
    def _fits_together(self) -> Results:
        if not {"val", "test"} & set(self.splits):
            raise ValueError("splits holds neither val nor test")
        side = len(self.classes)
        for name, entry in self.splits.items():
            for item in (entry, entry.other_level):
                counts = item.confusion if item is not None else None
                if counts is not None and [len(row) for row in counts] != [side] * side:
                    raise ValueError(f"splits.{name}.confusion is not {side} × {side}")
        return self
