"""The whole config: YAML in, YAML out, dotted overrides, chains of stages. Precedence: preset < file < ``--set``.

Its keys are in ``sections``. A typo teaches: an unknown key's error lists the valid names.
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
from typing import Any, cast

import yaml
from pydantic import ValidationError, model_validator

from medtl_dist.errors import ConfigError, UserError
from medtl_dist.sections import Augment, Data, Evaluate, Model, Optim, Schedule, Section, Train, Transfer
from medtl_dist.sections_cluster import Cluster, Tune

# Where data lies and how it is fetched decides no number: these keys of ``data`` count neither in a run's identity nor in
# what --resume compares.
_PLACE_KEYS = {
    "shards", "loader_workers", "endpoint_url", "ca_bundle", "kms_key", "anonymous", "storage_timeout_s", "storage_retries",
    "cache_dir", "cache_mib",
}  # fmt: skip
_LOGGING_KEYS = {"collective_timeout_s", "mlflow_uri"}  # of ``train``, likewise


class Config(Section):
    """The whole tree. Every run folder holds it as ``config.yaml``, complete and rerunnable."""

    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    transfer: Transfer = Transfer()
    tune: Tune = Tune()
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


def check_reached_alike(config: Config) -> None:
    """Whether a chain's run folder can lie in a store: a stage's workers write there by the stage's own config.

    Raises UserError where that leads elsewhere.
    """
    for stage in stages_of(config):
        for key in ("endpoint_url", "ca_bundle", "kms_key"):
            whole, own = getattr(config.data, key), getattr(stage.config.data, key)
            if own != whole:
                raise UserError(
                    f"stage {stage.name}: data.{key} = {_masked(own)}, and the run folder is reached with {_masked(whole)}: in a "
                    f"store all stages' sets and the run folder are reached alike; give data.{key} once, for the whole config."
                )


def _counting(tree: dict[str, Any]) -> dict[str, Any]:
    """A dumped config less what decides no number: ``tune``, ``cluster``, places and time-outs, in the stages too."""
    kept = {section: keys for section, keys in tree.items() if section not in ("tune", "cluster")}
    for part in (kept, *(tree["transfer"]["stages"] if "transfer" in tree else [])):
        for section, left_out in (("data", _PLACE_KEYS), ("train", _LOGGING_KEYS)):
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
    a, b = (flat(_counting(config.model_dump(mode="json"))) for config in (one, other))
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]


def flat(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
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
    return f"{'.'.join(path[:2])} = {_masked(repr(fault['input']))} ({field.description}) Expected ", message


def _masked(value: Any) -> str:
    """What is refused may be an address with a password in it."""
    return re.sub(r"//[^/@'\"]*@", "//…@", str(value))
