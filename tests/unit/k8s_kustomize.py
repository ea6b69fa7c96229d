"""As much of kustomize as k8s/ uses, so that the overlays are checked without kubectl: resources, components, JSON patches,
ConfigMaps from files. `make test-k8s` compares it with kubectl itself. A file or path that is missing is an error here too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
KEYS = {"apiVersion", "kind", "resources", "components", "patches", "configMapGenerator", "generatorOptions"}


def build(folder: Path, given: list[Tree] | None = None) -> list[Tree]:
    """The manifests of a kustomization, or of a component applied to those ``given``."""
    spec = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(spec) <= KEYS, f"{folder}: this reader does not know {set(spec) - KEYS}"
    found = copy.deepcopy(given or [])
    for name in spec.get("resources", []):
        place = folder / name
        found += build(place) if place.is_dir() else list(yaml.safe_load_all(place.read_text(encoding="utf-8")))
    for generator in spec.get("configMapGenerator", []):
        _generate(found, folder, generator, spec["generatorOptions"])
    for name in spec.get("components", []):
        found = build(folder / name, found)
    for patch in spec.get("patches", []):
        targets = [m for m in found if m["kind"] == patch["target"]["kind"]]
        assert targets, f"{folder}: no {patch['target']['kind']} to patch"
        for target in targets:
            for step in yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8")):
                apply_step(target, step)
    return found


def apply_step(tree: Any, step: Tree) -> None:
    """One operation of a JSON patch (RFC 6902): add or replace."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:])
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    if isinstance(tree, list):
        if step["op"] == "add":
            position = len(tree) if last == "-" else int(last)
            assert position <= len(tree), f"{step['path']}: the list ends before"
            tree.insert(position, copy.deepcopy(step["value"]))
            return
        last = int(last)
        assert last < len(tree), f"{step['path']}: nothing there to {step['op']}"
    assert step["op"] in ("add", "replace"), step["op"]
    assert step["op"] == "add" or isinstance(last, int) or last in tree, f"{step['path']}: nothing there to replace"
    tree[last] = copy.deepcopy(step["value"])


def _generate(found: list[Tree], folder: Path, generator: Tree, options: Tree) -> None:
    assert options["disableNameSuffixHash"] is True, f"{folder}: a RayJob would not find a renamed ConfigMap"
    data = {name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    old = [m for m in found if m["kind"] == "ConfigMap" and m["metadata"]["name"] == generator["name"]]
    if generator.get("behavior", "create") == "replace":
        assert len(old) == 1, f"{folder}: no ConfigMap {generator['name']} to replace"
        old[0]["data"] = data
        return
    assert not old, f"{folder}: ConfigMap {generator['name']} is there already"
    metadata = {"name": generator["name"], "labels": options.get("labels", {})}
    found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
