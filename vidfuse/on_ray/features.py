"""Caches of frozen streams' tokens: which ones a config asks for, and whether they are there.

Comes in: a config and its packed set. Goes out: for each split and stream that is cached the place of its cache, found or made by
`on_ray.featurizing`. A cache's folder is named by what the config asks for, and in it by what is behind these names (weights,
packed set, versions of what makes pixels); so one of other weights is known as such and refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyarrow import fs as pafs

from vidfuse.config import Config, ConfigError
from vidfuse.data.features import CHECKS, FORMAT, FeatureManifest, FeatureSet, Recipe, open_features
from vidfuse.data.feed import PackedSet
from vidfuse.data.frame_cache import versions
from vidfuse.data.shards import DataError
from vidfuse.models.parts import Tokens
from vidfuse.models.recognizer import Recognizer, stream_digest
from vidfuse.on_ray.storage import check_storage, join, list_files, open_storage
from vidfuse.on_ray.weights import local
from vidfuse.train.model import started

log = logging.getLogger(__name__)

TRAIN_FIELDS = ("views", "crop_area", "crop_aspect", "flip", "augment")
"""Fields of `data` that decide training's clips alone."""
CLIP_FIELDS = ("frames", "size", "sampling", "stride", "decoder")
"""Those that decide every clip."""
STREAM_FIELDS = ("name", "weights", "grid")

Places = dict[str, dict[str, str]]
"""URLs of caches by split and stream."""


@dataclass(frozen=True)
class Cache:
    """A cache that a config asks for."""

    recipe: Recipe
    url: str
    """Of its folder, whether it is there or not."""

    @property
    def family(self) -> str:
        """URL of the folder of all caches of these choices."""
        return self.url.rpartition("/")[0]


def check_grids(config: Config, model: Recognizer) -> None:
    """Refuse grids that are finer than their streams.

    Args:
        config: of the model.
        model: on the meta device.

    Raises:
        ConfigError: one is.
    """
    try:
        model.eval()(_clip(config))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def _clip(config: Config) -> torch.Tensor:
    return torch.empty((1, config.data.frames, 3, config.data.size, config.data.size), dtype=torch.uint8, device="meta")


def shapes(config: Config, model: Recognizer) -> dict[str, Tokens]:
    """Tokens of one clip of each stream that can be cached, without values; for a model on the meta device.

    Raises:
        ConfigError: no stream can be cached, a grid that is finer than a stream, or tokens with padding.
    """
    try:
        model.check_cacheable(model.cacheable or tuple(model.streams))
        found = {name: model.tokens(name, _clip(config)) for name in model.cacheable}
    except ValueError as error:
        raise ConfigError(f"data.features=auto: {error}") from None
    padded = [name for name, tokens in found.items() if tokens.mask is not None]
    if padded:
        raise ConfigError(
            f"data.features=auto: the {padded[0]} stream gives padding with its tokens, which is not cached; set it to off"
        )
    return found


def wanted(config: Config, packed: PackedSet) -> list[Cache]:
    """The caches of a config, of its training and its validation split; builds the model to hash its weights.

    Raises:
        ValueError: the model cannot be built.
    """
    model, _ = started(config, local)
    digests = {name: stream_digest(model, name) for name in model.cacheable}
    base = config.features.url or join(config.run.storage, "features")
    splits = dict.fromkeys((config.data.train_split, config.data.validation_split))
    caches = []
    for split in splits:
        for stream, digest in digests.items():
            content = {"weights": digest, "packed set": packed.manifest.version, **versions(config.data.decoder)}
            recipe = Recipe(stream=stream, split=split, choices=_choices(config, packed, stream, split), content=content)
            caches.append(Cache(recipe, join(base, recipe.folder, recipe.key)))
    return caches


def _choices(config: Config, packed: PackedSet, stream: str, split: str) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    data, part = tree["data"], tree["model"][stream]
    known = set(type(getattr(config.model, stream)).model_fields)
    options = {name: value for name, value in part.items() if name not in known}
    training = split == config.data.train_split
    random_weights = part["weights"] is None and config.model.weights is None
    autocast = config.train.precision == "bf16" and config.train.zero_stage == 0
    return {
        "format": FORMAT,
        "dataset": packed.manifest.dataset,
        "backbone": {name: part[name] for name in STREAM_FIELDS} | {"options": options, "start": config.model.weights},
        "arithmetic": f"{config.train.precision}{' autocast' if autocast else ''}",
        "precision": config.features.precision,
        "clips": {name: data[name] for name in CLIP_FIELDS + (TRAIN_FIELDS if training else ())},
        **({"seed": config.seed} if training or random_weights else {}),
    }


def find(cache: Cache) -> tuple[FeatureSet, FeatureManifest] | None:
    """A cache, if it is there and whole: with all of its files, at their sizes.

    Raises:
        DataError: it is damaged, or in its place is another one.
    """
    filesystem, root = open_storage(cache.url)
    try:
        opened, manifest = open_features(filesystem, root)
    except FileNotFoundError:
        return None
    if manifest.recipe != cache.recipe:
        raise DataError(f"{cache.url} is the cache of something else; remove it")
    if lost(filesystem, root, manifest):
        return None
    opened.check()
    return opened, manifest


def lost(filesystem: Any, root: str, manifest: FeatureManifest) -> list[str]:
    """Names of a cache's files that are not there at their sizes."""
    found = list_files(filesystem, root)
    return [*(part.name for part in manifest.parts if found.get(part.name) != part.bytes), *({CHECKS} - found.keys())]


def check_fresh(cache: Cache) -> None:
    """Refuse where caches of the same choices are of other content (`Recipe.content`), and this one is not there.

    Raises:
        DataError: it names them and says what differs.
    """
    filesystem, family = open_storage(cache.family)
    others = []
    for info in filesystem.get_file_info(pafs.FileSelector(family, allow_not_found=True)):
        if info.type == pafs.FileType.Directory and info.base_name != cache.recipe.key:
            try:
                _, manifest = open_features(filesystem, info.path)
            except FileNotFoundError:
                continue  # it was never finished
            others.append((info.base_name, manifest.recipe))
    if others:
        name, recipe = others[0]
        raise DataError(
            f"cached features of the {cache.recipe.stream} stream for {cache.recipe.split!r}, {join(cache.family, name)}, are stale: "
            f"{'; '.join(cache.recipe.differences(recipe))}. `python -m jobs.features` with this config makes them anew beside the old "
            "ones; or set data.features=off"
        )


def check(config: Config, model: Recognizer) -> None:
    """Refuse what cannot be cached, and a place that cannot be used, before long work.

    Args:
        config: of a run with data.features=auto.
        model: of it, on the meta device.

    Raises:
        ConfigError, StorageError: one clear message.
    """
    shapes(config, model)
    if config.features.url is not None:
        check_storage(config.features.url, write=config.features.absent == "compute")


def provide(
    config: Config,
    packed: PackedSet,
    compute: Callable[[Sequence[Cache]], None],
    *,
    on_found: Callable[[str], None] = log.info,
) -> Places:
    """Places of the caches that a training uses: all that are there, and those that are made now if so configured.

    Args:
        config: `data.features`, `features`.
        packed: its packed set.
        compute: makes caches.
        on_found: is told in words what is used.

    Raises:
        DataError: a cache is stale.
    """
    if config.data.features == "off":
        return {}
    caches = wanted(config, packed)
    missing = [cache for cache in caches if find(cache) is None]
    for cache in missing:
        check_fresh(cache)
    if missing and config.features.absent == "compute":
        compute(missing)
        missing = []
    places: Places = {}
    for cache in caches:
        if cache in missing:
            on_found(
                f"no cached features of the {cache.recipe.stream} stream for {cache.recipe.split!r}: it runs on every clip"
            )
            continue
        on_found(f"cached features of the {cache.recipe.stream} stream for {cache.recipe.split!r}: {cache.url}")
        places.setdefault(cache.recipe.split, {})[cache.recipe.stream] = cache.url
    return places


def opened(places: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, FeatureSet]]:
    """The caches at some places, for `PackedSet.features`."""
    return {split: {name: open_features(*open_storage(url))[0] for name, url in some.items()} for split, some in places.items()}


def words(cache: Cache) -> str:
    """What a cache holds, and where it is.

    Raises:
        DataError: it is not there.
    """
    found = find(cache)
    if found is None:
        raise DataError(f"{cache.url} is not there")
    made = found[1]
    size = sum(part.bytes for part in made.parts) / 1e6
    clips = f"{made.samples} videos x {made.draws} clips" if made.draws > 1 else f"{made.samples} videos"
    return f"{clips} x {made.tokens} tokens of width {made.width}, {made.precision}, {size:,.1f} MB: {cache.url}"
