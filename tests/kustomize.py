"""As much of kustomize as the manifests of cluster/kuberay use, so that they are tested without it; anything else is refused.

Order as kustomize's: resources, components, patches, namespace, labels, images, replacements.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "labels", "resources", "components", "patches", "images", "replacements"}
WITHOUT_NAMESPACE = {"Namespace"}


def build(folder: Path) -> list[Manifest]:
    """The manifests that `kubectl kustomize FOLDER` prints, in no order."""
    return _apply(folder, [])


def named(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    """Manifests by kind and name."""
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests}


def pod_templates(tree: Any, at: str = "") -> Iterator[tuple[str, Manifest]]:
    """Every pod template in a manifest, with where it is."""
    if isinstance(tree, Mapping):
        if "containers" in tree.get("spec", {}):
            yield at, dict(tree)
        for key, value in tree.items():
            yield from pod_templates(value, f"{at}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from pod_templates(value, f"{at}[{number}]")


def _apply(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    this = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(this) <= KNOWN, f"{folder}: {set(this) - KNOWN} is more than the tests resolve"
    for resource in this.get("resources", []):
        path = (folder / resource).resolve()
        manifests += build(path) if path.is_dir() else [m for m in yaml.safe_load_all(path.read_text()) if m]
    manifests = copy.deepcopy(manifests)  # anchors of YAML make one object of what patches tell apart
    manifests = [yaml.safe_load(yaml.dump(m, Dumper=_Plain)) for m in manifests]
    for component in this.get("components", []):
        manifests = _apply((folder / component).resolve(), manifests)
    for patch in this.get("patches", []):
        manifests = _patch(manifests, patch)
    for manifest in manifests:
        if "namespace" in this and manifest["kind"] not in WITHOUT_NAMESPACE:
            manifest["metadata"]["namespace"] = this["namespace"]
        for labels in this.get("labels", []):
            assert set(labels) == {"pairs"}
            manifest["metadata"].setdefault("labels", {}).update(labels["pairs"])
        for image in this.get("images", []):
            _rename(manifest, image)
    for replacement in this.get("replacements", []):
        _replace(manifests, replacement)
    return manifests


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _chosen(manifest: Manifest, select: Mapping[str, str]) -> bool:
    group = manifest["apiVersion"].rpartition("/")[0]
    has = {"group": group, "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    assert set(select) <= set(has)
    return all(has[key] == value for key, value in select.items())


def _patch(manifests: list[Manifest], patch: Mapping[str, Any]) -> list[Manifest]:
    chosen = [m for m in manifests if _chosen(m, patch["target"])]
    assert chosen, f"nothing to patch: {patch['target']}"
    change = yaml.safe_load(patch["patch"])
    if isinstance(change, Mapping):
        assert change.pop("$patch") == "delete", "of strategic patches only `$patch: delete` is resolved here"
        return [m for m in manifests if m not in chosen]
    for manifest in chosen:
        for step in change:
            _step(manifest, step)
    return manifests


def _step(manifest: Manifest, step: Mapping[str, Any]) -> None:
    """One operation of JSON Patch (RFC 6902)."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    place: Any = manifest
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    key: Any = last if isinstance(place, dict) else len(place) if last == "-" else int(last)
    match step["op"]:
        case "add" if isinstance(place, list):
            place.insert(key, step["value"])
        case "add":
            place[key] = step["value"]
        case "replace":
            assert key in place if isinstance(place, dict) else key < len(place), f"nothing at {step['path']}"
            place[key] = step["value"]
        case "remove":
            del place[key]
        case other:
            raise AssertionError(f"{other} is more than the tests resolve")


def _rename(tree: Any, image: Mapping[str, str]) -> None:
    if isinstance(tree, list):
        for value in tree:
            _rename(value, image)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key == "image" and isinstance(value, str) and value.rpartition(":")[0] == image["name"]:
                tree[key] = f"{image['newName']}:{image['newTag']}"
            else:
                _rename(value, image)


def _replace(manifests: list[Manifest], replacement: Mapping[str, Any]) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath").split(".")
    (origin,) = [m for m in manifests if _chosen(m, source)]
    value: Any = origin
    for part in path:
        value = value[part]
    for target in replacement["targets"]:
        (goal,) = [m for m in manifests if _chosen(m, target["select"])]
        for field in target["fieldPaths"]:
            *way, last = field.split(".")
            place: Any = goal
            for part in way:
                place = place[part]
            place[last] = copy.deepcopy(value)
