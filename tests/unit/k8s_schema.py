"""Strict validation of manifests offline: KubeRay's kinds by their CRDs as an API server does it, built-in kinds and each pod
template by kubernetes-validate. Not seen: the CRDs' CEL rules, and what only the operator checks (see k8s_policy.py)."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.33"
CRDS = Path(os.environ.get("MEDTL_CRD_DIR", Path(__file__).parents[2] / "../shared/k8s-crds")).resolve()
needs_crds = pytest.mark.skipif(
    not (CRDS / "ray.io_rayjobs.yaml").exists(), reason="no KubeRay CRDs (v1.7.0) in MEDTL_CRD_DIR"
)

Tree = dict[str, Any]
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
}  # fmt: skip


@functools.cache
def crd_schema(plural: str) -> Tree:
    """The OpenAPI schema of ray.io/v1 ``plural``."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load((CRDS / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"), Loader=loader)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"]]
    return version["schema"]["openAPIV3Schema"]


def manifest_errors(manifest: Tree) -> list[str]:
    """What an API server with strict field validation would say of a manifest; the CRDs must be there for KubeRay's kinds."""
    if not manifest["apiVersion"].startswith("ray.io/"):
        return _builtin_errors(manifest)
    schema = crd_schema(manifest["kind"].lower() + "s")
    filled = with_defaults(schema, copy.deepcopy(manifest))
    filled.pop("metadata")
    errors = list(schema_errors(schema, filled, ""))
    for name, template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        errors += [f"{name}: {error}" for error in _builtin_errors(pod)]
    return errors + _builtin_errors({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})


def pod_templates(manifest: Tree) -> list[tuple[str, Tree]]:
    """Every pod template of a RayJob or RayCluster, the submitter's included."""
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    found = [("head", cluster["headGroupSpec"]["template"])]
    found += [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    return found + ([("submitter", spec["submitterPodTemplate"])] if "submitterPodTemplate" in spec else [])


def with_defaults(schema: Tree, value: Any) -> Any:
    """``value`` with the schema's defaults filled in, in place, as a server does before it validates."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, sub in properties.items():
            if key not in value and "default" in sub:
                value[key] = copy.deepcopy(sub["default"])
        extra = schema.get("additionalProperties")
        for key in value:
            with_defaults(properties.get(key, extra if isinstance(extra, dict) else {}), value[key])
    elif isinstance(value, list):
        for item in value:
            with_defaults(schema.get("items", {}), item)
    return value


def schema_errors(schema: Tree, value: Any, path: str) -> list[str]:
    """Faults of ``value`` against a structural schema; a field that the schema does not name is one."""
    if schema.get("x-kubernetes-int-or-string"):
        right = isinstance(value, int | str) and not isinstance(value, bool)
        return _text_errors(schema, str(value), path) if right else [f"{path}: {value!r} is neither integer nor string"]
    if value is None and schema.get("nullable"):
        return []
    wanted = schema.get("type")
    if wanted and (not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean")):
        return [f"{path}: {value!r} is no {wanted}"]
    errors = [f"{path}: {value!r} is none of {schema['enum']}"] if value not in schema.get("enum", [value]) else []
    if isinstance(value, dict):
        return errors + _object_errors(schema, value, path)
    if isinstance(value, list):
        errors += [f"{path}: too few items"] if len(value) < schema.get("minItems", 0) else []
        return errors + [
            e for i, item in enumerate(value) for e in schema_errors(schema.get("items", {}), item, f"{path}/{i}")
        ]
    if isinstance(value, str):
        errors += _text_errors(schema, value, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        size = {"int32": 2**31, "int64": 2**63}.get(schema.get("format", ""), float("inf"))
        errors += [] if low <= value <= high and -size <= value < size else [f"{path}: {value!r} is out of range"]
    return errors


def _object_errors(schema: Tree, value: Tree, path: str) -> list[str]:
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    errors = [f"{path}: {key} is missing" for key in schema.get("required", []) if key not in value]
    for key, item in value.items():
        if key in properties:
            errors += schema_errors(properties[key], item, f"{path}/{key}")
        elif isinstance(extra, dict):
            errors += schema_errors(extra, item, f"{path}/{key}")
        elif not extra and properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
            errors.append(f"{path}/{key}: unknown field")
    return errors


def _text_errors(schema: Tree, value: str, path: str) -> list[str]:
    fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    matches = re.search(schema.get("pattern", ""), value) is not None
    return [] if fits and matches else [f"{path}: {value!r} has a wrong length or pattern"]


def _builtin_errors(manifest: Tree) -> list[str]:
    """Cached by content: the library reads its schemas from files at every call."""
    return _builtin_errors_of(json.dumps(manifest, sort_keys=True))


@functools.cache
def _builtin_errors_of(text: str) -> list[str]:
    try:
        kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(getattr(error, "message", error))]
    return []
