"""Caches of frozen streams' tokens: training on them is training on clips; made again, stale, absent."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import support
from tests.train.local import losses
from vidfuse.config import Config, ConfigError, from_mapping, override
from vidfuse.data.features import MANIFEST, PART_VIDEOS
from vidfuse.data.feed import Feed, read_here
from vidfuse.data.frame_cache import versions
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World
from vidfuse.data.shards import DataError, read_index, read_manifest
from vidfuse.models.backbones import tiny_image
from vidfuse.on_ray import features, fit, preflight
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.storage import join, list_files, open_storage, read_bytes, write_bytes
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker

pytestmark = [pytest.mark.ray, pytest.mark.s3]
TRAIN, VALIDATION = 37, 6
LOSS = 1e-5  # relative, fp32
KEPT_IN_BF16 = 2e-2  # relative


@pytest.fixture(scope="module")
def config(s3, ray_cluster, tmp_path_factory) -> Config:
    """Both streams are frozen; one training video is corrupt."""
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": TRAIN, "validation": VALIDATION})
    url = s3.url("features")
    pack(prepare(read_layout(source, "ssv2"), source, url, 70_000))
    filesystem, root = open_storage(url)
    index = read_index(filesystem, root, "train", manifest=read_manifest(filesystem, root))
    path = join(root, index.shards[index.shard[5]])
    content = bytearray(read_bytes(filesystem, path))
    content[int(index.offset[5]) + 40 : int(index.offset[5] + index.size[5])] = bytes(int(index.size[5]) - 40)
    write_bytes(filesystem, path, bytes(content))
    tree = {
        "data": {"url": url, "classes": 3, "frames": 4, "size": 32, "flip": True, "views": 2, "block_bytes": 60_000},
        "model": {
            "semantic": {"name": "tiny_image", "grid": (4, 2, 2)},
            "motion": {"name": "tiny_motion"},
            "fusion": {"name": "cross_attention", "width": 24, "heads": 2, "dropout": 0.0},
        },
        "train": {"epochs": 3, "global_batch": 8, "micro_batch": 4, "precision": "fp32", "zero_stage": 0, "log_every_steps": 1},
        "features": {"precision": "fp32"},
        "run": {"storage": s3.url("runs")},
    }
    tree["data"] |= {"buffer_bytes": 2**23, "cpus_per_task": 0.2}
    return from_mapping(tree)


def cached(config: Config, *more: str) -> Config:
    return override(config, ["data.features=auto", *more])


def trained(config: Config, folder: Path, places: features.Places) -> tuple[list[float], list[dict]]:
    """Losses of a run in this process, and its records."""
    packed = replace(preflight.open_set(config), features=features.opened(places))
    feed = Feed(config, packed, World(1, 0, config.train.global_batch, config.train.micro_batch), read_here)
    run(config, LocalWorker(folder), feed, folder=folder, facts={})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses(folder), [line for line in lines if line["kind"] in ("validation", "event")]


def far(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def raw(config, tmp_path_factory):
    return trained(config, tmp_path_factory.mktemp("raw"), {})


@pytest.fixture(scope="module")
def places(config):
    told: list[str] = []
    made = fit.features_of(cached(config), lambda event: told.append(event["features"]))
    assert told and f"{2 * TRAIN + VALIDATION}/{2 * TRAIN + VALIDATION} videos (100 %)" in told[-1]
    return made


def test_training_on_cached_tokens_is_training_on_clips(config, raw, places, tmp_path):
    assert {split: sorted(some) for split, some in places.items()} == {
        key: ["motion", "semantic"] for key in ("train", "validation")
    }
    found, notes = trained(cached(config), tmp_path, places)
    assert len(found) == 15 and far(found, raw[0]) < LOSS
    assert [n["names"] for n in notes if n.get("what") == "unreadable"] == [
        n["names"] for n in raw[1] if n.get("what") == "unreadable"
    ]
    assert len([n for n in notes if n.get("what") == "unreadable"]) == 3
    for a, b in zip(notes, raw[1], strict=True):
        assert a["kind"] == b["kind"] and abs(a.get("loss", 0) - b.get("loss", 0)) < 1e-4


def test_nothing_is_decoded_where_all_tokens_are_cached(config, places):
    settings = cached(config)
    packed = replace(preflight.open_set(settings), features=features.opened(places))
    feed = Feed(settings, packed, World(1, 0, 8, 4), read_here)
    [batch, *_] = next(feed.train(0, feed.order(0)))
    assert batch.clips.shape[:2] == (4, 0)
    assert {name: of.values.dtype for name, of in batch.features.items()} == dict.fromkeys(
        ("motion", "semantic"), torch.float32
    )
    feed.close()


def test_training_videos_are_scored_on_testing_clips(config, places):
    """The cache of the training split has random crops of its videos."""
    settings = cached(config)
    packed = preflight.open_set(settings)
    world = World(1, 0, 8, 4)
    plain = Feed(settings, packed, world, read_here).score("train", clips=1, crops=1, micro_batch=4)
    feed = Feed(settings, replace(packed, features=features.opened(places)), world, read_here)
    for one, other in zip(plain, feed.score("train", clips=1, crops=1, micro_batch=4), strict=True):
        assert not other.features and one.clips.equal(other.clips) and other.clips.shape[1] == config.data.frames
    assert next(iter(feed.score("validation", clips=1, crops=1, micro_batch=4))).features


def test_a_trained_stream_sees_the_clips_of_the_cached_one(config, places, tmp_path):
    half = override(config, ["model.motion.frozen=false", "train.epochs=2"])
    settings = cached(half)
    found = features.provide(settings, preflight.open_set(settings), pytest.fail)
    assert {split: sorted(some) for split, some in found.items()} == {key: ["semantic"] for key in ("train", "validation")}
    assert found["train"]["semantic"] == places["train"]["semantic"]  # one cache for all that is joined with it
    a, _ = trained(half, tmp_path / "raw", {})
    b, _ = trained(settings, tmp_path / "cached", found)
    assert far(a, b) < LOSS


def test_through_ray_train_and_kept_in_bf16(config, raw):
    """The command's own path: what is missing is made first, and Ray Data streams it."""
    settings = cached(config, "features.precision=bf16", "run.name=cached", "cluster.workers=2", "cluster.cpus_per_worker=0.5")
    preflight.check(settings)
    result = fit.fit(settings, facts={}, on_progress=lambda _: None, stop=threading.Event())
    folder = fit.RunFolder.of(settings.run)
    lines = [json.loads(line) for line in read_bytes(folder.filesystem, join(folder.root, "metrics.jsonl")).splitlines()]
    assert result["state"] == "finished"
    assert far([line["loss"] for line in lines if line["kind"] == "train"], raw[0]) < KEPT_IN_BF16
    record = json.loads(read_bytes(folder.filesystem, join(folder.root, "run.json")))
    assert record["features of semantic, train"].startswith(join(settings.run.storage, "features", "train-semantic-"))


def test_only_missing_parts_are_made_again(config, places):
    filesystem, root = open_storage(places["train"]["motion"])
    names = [name for name in list_files(filesystem, root) if name.endswith(".safetensors")]
    assert len(names) == 2 * 3  # two clips each of 37 videos, 16 in a part
    before = {info.base_name: info.mtime_ns for info in filesystem.get_file_info([join(root, name) for name in names])}
    content = read_bytes(filesystem, join(root, names[1]))
    for name in (MANIFEST, names[1], names[1].replace(".safetensors", ".json")):
        filesystem.delete_file(join(root, name))
    assert fit.features_of(cached(config), lambda _: None) == places
    after = {info.base_name: info.mtime_ns for info in filesystem.get_file_info([join(root, name) for name in names])}
    assert [name for name in names if before[name] != after[name]] == [names[1]]
    assert read_bytes(filesystem, join(root, names[1])) == content


def test_a_damaged_part_costs_its_own_videos_and_is_made_again_alone(config, places):
    filesystem, root = open_storage(places["train"]["semantic"])
    names = [name for name in list_files(filesystem, root) if name.endswith(".safetensors")]
    damaged = join(root, names[0])
    content = read_bytes(filesystem, damaged)
    write_bytes(filesystem, damaged, content[:1024] + b"\x11" * (len(content) - 1024))
    settings = cached(config)
    feed = Feed(settings, replace(preflight.open_set(settings), features=features.opened(places)), World(1, 0, 8, 4), read_here)
    batches = [batch for step in feed.train(0, feed.order(0)) for batch in step]
    feed.close()
    errors = {error.key: error.reason for batch in batches for error in batch.errors}
    told = rf".*{names[0]}: row \d+ is not what was written; remove .*{names[0]} and run .*"
    lost = [key for key, reason in errors.items() if re.fullmatch(told, reason)]
    assert 0 < len(lost) <= PART_VIDEOS and len(errors) <= len(lost) + 1  # of the part's draw; one video is corrupt
    assert sum(int((batch.weights > 0).sum()) for batch in batches) == TRAIN - len(errors)
    filesystem.delete_file(damaged)
    before = {info.base_name: info.mtime_ns for info in filesystem.get_file_info([join(root, name) for name in names[1:]])}
    assert fit.features_of(settings, lambda _: None) == places
    after = {info.base_name: info.mtime_ns for info in filesystem.get_file_info([join(root, name) for name in names[1:]])}
    assert before == after and read_bytes(filesystem, damaged) == content


@pytest.mark.parametrize("name", ["pyav", "OpenCV"])
def test_a_cache_of_another_decoder_is_refused_by_name(config, places, monkeypatch, name):
    made_by = versions(config.data.decoder)
    monkeypatch.setattr(features, "versions", lambda decoder: {**versions(decoder), name: "99.1"})
    with pytest.raises(DataError, match=rf"are stale: {name}: {re.escape(made_by[name])} there, 99\.1 now\. `python -m jobs"):
        fit.features_of(cached(config), lambda _: None)


def test_other_weights_are_refused_by_name_and_may_be_made_beside(config, tmp_path):
    weights = tmp_path / "weights.safetensors"
    settings = cached(config, f"model.semantic.weights={weights}", f"features.url={tmp_path / 'cache'}", "data.views=1")

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(tiny_image.build(frames=4, size=32).state_dict(), weights)

    write(1)
    first = fit.features_of(settings, lambda _: None)
    write(2)
    with pytest.raises(
        DataError, match=r"semantic stream for 'train', .*train-semantic-.* are stale: weights: \w{12} there, \w{12} now"
    ):
        fit.features_of(settings, lambda _: None)
    done = support.run_job("features", "--config", _saved(settings, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "train, motion" in done.stdout and "(was there)" in done.stdout
    second = fit.features_of(settings, lambda _: pytest.fail("all is there"))
    assert second["train"]["semantic"] != first["train"]["semantic"]
    assert second["train"]["motion"] == first["train"]["motion"]


def _saved(config: Config, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(config.to_yaml())
    return str(path)


def test_raw_is_what_is_done_where_it_is_asked_for(config, tmp_path):
    settings = cached(config, f"features.url={tmp_path}", "features.absent=raw")
    told: list[str] = []
    assert features.provide(settings, preflight.open_set(settings), pytest.fail, on_found=told.append) == {}
    assert len(told) == 4 and "it runs on every clip" in told[0] and not list(tmp_path.iterdir())


def test_a_grid_that_is_too_fine_is_told_before_long_work(config):
    with pytest.raises(ConfigError, match=r"semantic\.grid: a grid of 9 x 2 x 2 cells .* has cells without a token"):
        preflight.check(cached(config, "model.semantic.grid=[9,2,2]"))


def test_a_stream_that_is_not_finite_is_told(config, tmp_path):
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    state = tiny_image.build(frames=4, size=32).state_dict()
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = torch.full_like(state[name], float("inf"))
    save_file(state, weights)
    settings = cached(config, f"model.semantic.weights={weights}", f"features.url={tmp_path / 'cache'}", "data.views=1")
    with pytest.raises(DataError, match="semantic stream gives numbers that are not finite for sample"):
        fit.features_of(settings, lambda _: None)
