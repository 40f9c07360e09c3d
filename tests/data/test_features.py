"""Rows of cached tokens: where they are, what an unreadable one is; and which of its clips a video shows."""

from __future__ import annotations

import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from safetensors.torch import load_file

from tests.data.test_repeats import reader_of
from vidfuse.config import ConfigError, DataConfig, from_mapping
from vidfuse.data import clips
from vidfuse.data import features as features_module
from vidfuse.data.clips import ClipReader, Part, Video
from vidfuse.data.features import (
    BITS,
    CHECKS,
    MANIFEST,
    NAN,
    PART_VIDEOS,
    FeatureManifest,
    FeatureSet,
    PartRecord,
    Recipe,
    encode_checks,
    encode_part,
    open_features,
    part_name,
    parts_of_draw,
    row_checks,
)
from vidfuse.data.ranges import fetch
from vidfuse.data.shards import DataError, dump_record

RECIPE = Recipe(stream="motion", split="train", choices={"frames": 4}, content={"weights": "a" * 64, "packed set": "b"})
TOKENS, WIDTH, SAMPLES, DRAWS = 3, 4, PART_VIDEOS + 5, 2


def read(features: FeatureSet, draw: int, sample: int) -> tuple[np.ndarray, str]:
    (fetched,) = fetch(pickle.dumps(features.filesystem), [features.place(draw, sample)])
    return features.rows(draw, sample, fetched)


def numbers(draw: int, sample: int) -> np.ndarray:
    return np.arange(TOKENS * WIDTH, dtype=np.float32).reshape(TOKENS, WIDTH) + 100 * sample + 10_000 * draw


@pytest.fixture(params=["bf16", "fp32"])
def cache(tmp_path, request):
    """Two draws of a split, two parts each; sample 7 could not be read."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[request.param]
    records, header = [], 0
    for draw in range(DRAWS):
        for first in range(0, SAMPLES, PART_VIDEOS):
            rows = np.stack([numbers(draw, first + row) for row in range(PART_VIDEOS)])
            bits = torch.from_numpy(rows).to(dtype).view(torch.int16 if request.param == "bf16" else torch.int32).numpy()
            bits = bits.view(BITS[request.param])
            unreadable = {7: "s\tk\tbroken"} if first == 0 else {}
            for row in unreadable:
                bits[row] = NAN[request.param]
            content, header = encode_part(bits, request.param)
            name = part_name(len(records))
            (tmp_path / f"{name}.safetensors").write_bytes(content)
            checks = tuple(row_checks(bits.data, len(bits)))
            records.append(PartRecord(name=f"{name}.safetensors", bytes=len(content), checks=checks, unreadable=unreadable))
            (tmp_path / f"{name}.json").write_bytes(dump_record(records[-1]))
    manifest = FeatureManifest(
        recipe=RECIPE,
        samples=SAMPLES,
        draws=DRAWS,
        views=1,
        tokens=TOKENS,
        width=WIDTH,
        precision=request.param,
        positions=((0.5, 0.5, 0.5),) * TOKENS,
        header_bytes=header,
        checks=zlib.crc32(encode_checks(records)),
        parts=tuple(records),
    )
    (tmp_path / CHECKS).write_bytes(encode_checks(records))
    (tmp_path / MANIFEST).write_bytes(dump_record(manifest))
    return tmp_path, request.param


def values_of(bits: np.ndarray, precision: str) -> torch.Tensor:
    return torch.from_numpy(np.array(bits)).view({"bf16": torch.bfloat16, "fp32": torch.float32}[precision]).float()


def test_a_row_is_that_of_its_video_and_draw(cache):
    root, precision = cache
    features, _ = open_features(pafs.LocalFileSystem(), str(root))
    assert parts_of_draw(SAMPLES) == 2
    for draw in range(DRAWS):
        for sample in (0, 1, PART_VIDEOS - 1, PART_VIDEOS, SAMPLES - 1):
            bits, reason = read(features, draw, sample)
            assert reason == "" and bits.shape == (1, TOKENS, WIDTH)
            torch.testing.assert_close(
                values_of(bits, precision)[0], torch.from_numpy(numbers(draw, sample)), rtol=4e-3, atol=0
            )


def test_a_part_is_a_safetensors_file_that_anyone_can_read(cache):
    root, precision = cache
    tokens = load_file(root / f"{part_name(0)}.safetensors")["tokens"]
    assert tokens.shape == (PART_VIDEOS, TOKENS, WIDTH)
    assert tokens.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def test_an_unreadable_row_says_why(cache):
    features, _ = open_features(pafs.LocalFileSystem(), str(cache[0]))
    assert read(features, 1, 7)[1] == "s\tk\tbroken"


def test_a_part_that_was_cut_off_is_told(cache):
    root, _ = cache
    path = root / f"{part_name(1)}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    features, _ = open_features(pafs.LocalFileSystem(), str(root))
    with pytest.raises(DataError, match="is shorter than it was written; remove"):
        read(features, 0, 2 * PART_VIDEOS - 1)


def test_a_row_that_is_not_what_was_written_is_told_with_its_part(cache):
    root, _ = cache
    features, manifest = open_features(pafs.LocalFileSystem(), str(root))
    path = root / f"{part_name(2)}.safetensors"
    content = bytearray(path.read_bytes())
    content[manifest.header_bytes + 4 * features.row_bytes + 1] ^= 1  # a bit of row 4 in the second draw's first part
    path.write_bytes(content)
    for sample in (3, 5):
        assert read(features, 1, sample)[1] == ""
    with pytest.raises(DataError, match=rf"{part_name(2)}\.safetensors: row 4 is not what was written; remove {path} and run"):
        read(features, 1, 4)


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content[:-1] + bytes([content[-1] ^ 1])])
def test_checks_that_are_not_what_was_written_are_told(cache, damage):
    root, _ = cache
    path = root / CHECKS
    path.write_bytes(damage(path.read_bytes()))
    features, _ = open_features(pafs.LocalFileSystem(), str(root))
    with pytest.raises(DataError, match=rf"^{path} is not what was written; remove {path} and run"):
        read(features, 0, 0)


def test_a_damaged_row_costs_its_own_video(cache):
    root, _ = cache
    path = root / f"{part_name(0)}.safetensors"
    features, manifest = open_features(pafs.LocalFileSystem(), str(root))
    content = bytearray(path.read_bytes())
    content[manifest.header_bytes + 4 * features.row_bytes + 1] ^= 1
    path.write_bytes(content)
    reader = ClipReader(pafs.LocalFileSystem(), "", DataConfig(classes=3), 0, features=(features,), decodes=False)
    columns = reader.read(Part(None, tuple(Video(s, "a.tar", f"k{s}", 0, 0, 1, 8, 32, 32) for s in (3, 4, 5))))
    assert columns["weight"].tolist() == [1, 0, 1] and columns["error"].tolist()[::2] == ["", ""]
    shard, key, reason = columns["error"][1].split("\t")
    assert (shard, key) == ("a.tar", "k4") and reason.startswith(
        f"{path}: row 4 is not what was written; remove {path} and run"
    )


def test_checks_are_read_once_by_a_process(cache, monkeypatch):
    features, _ = open_features(pafs.LocalFileSystem(), str(cache[0]))
    asked: list[str] = []
    plain = features_module.read_range
    monkeypatch.setattr(features_module, "read_range", lambda state, path, *of: asked.append(path) or plain(state, path, *of))
    for sample in range(SAMPLES):
        read(features, 0, sample)
    assert asked == [f"{cache[0]}/{CHECKS}"]


def test_rows_that_lie_side_by_side_take_one_request(cache, monkeypatch):
    features, _ = open_features(pafs.LocalFileSystem(), str(cache[0]))
    config = DataConfig(classes=3, views=DRAWS)
    reader = ClipReader(pafs.LocalFileSystem(), "", config, 0, features=(features,), decodes=False)
    requests = []
    monkeypatch.setattr(clips, "fetch", lambda state, run: requests.append(len(run)) or fetch(state, run))
    samples = [3, 4, 5, 7, PART_VIDEOS, PART_VIDEOS + 1, 2]
    columns = reader.read(Part(1, tuple(Video(s, "a.tar", f"k{s}", 0, 0, 1, 8, 32, 32) for s in samples)))
    assert sorted(n for n in requests if n) == [1, 2, 4]
    assert (
        columns["error"].tolist() == [""] * 3 + ["s\tk\tbroken"] + [""] * 3
        and columns["weight"].tolist() == [1] * 3 + [0] + [1] * 3
    )
    for sample, row in zip(samples, columns["tokens.motion"], strict=True):
        assert sample == 7 or np.array_equal(row, read(features, 1, sample)[0][0])


def test_another_format_is_told(cache):
    path = cache[0] / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="format 99, this version of vidfuse reads 4"):
        open_features(pafs.LocalFileSystem(), str(cache[0]))


@pytest.mark.parametrize("content", ['{"format": 3,', "", "[1]"])
def test_a_manifest_that_is_cut_off_is_named(cache, content):
    (cache[0] / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=rf"{MANIFEST} is damaged; remove .*{MANIFEST} and run `python -m jobs.features`"):
        open_features(pafs.LocalFileSystem(), str(cache[0]))


def test_names_follow_what_is_asked_for_and_what_is_behind_it():
    other_weights = RECIPE.model_copy(update={"content": {**RECIPE.content, "weights": "c" * 64}})
    other_clips = RECIPE.model_copy(update={"choices": {"frames": 8}})
    assert other_weights.folder == RECIPE.folder and other_weights.key != RECIPE.key
    assert other_clips.folder != RECIPE.folder and other_clips.key == RECIPE.key
    assert other_weights.differences(RECIPE) == [f"weights: {'a' * 12} there, {'c' * 12} now"]
    upgraded = RECIPE.model_copy(update={"content": {**RECIPE.content, "pyav": "15.0.0.dev20261123"}})
    assert upgraded.key != RECIPE.key and upgraded.differences(RECIPE) == ["pyav: none there, 15.0.0.dev20261123 now"]


# --- which clip ---


def test_epochs_show_the_clips_of_a_video_in_turn(videos):
    root, rows = videos
    anew, turns = reader_of(root, 1), reader_of(root, 1, views=2)
    for epoch in range(4):
        shown = turns.read(Part(epoch, rows[:2]))["clip"]
        assert np.array_equal(shown, anew.read(Part(epoch % 2, rows[:2]))["clip"])


def test_repeats_and_uses_take_the_next_clips(videos):
    root, rows = videos
    one, two = reader_of(root, 1, views=5), reader_of(root, 2, views=5)
    clips = [one.read(Part(epoch, rows[:1]))["clip"][0] for epoch in range(5)]
    again = rows[0]._replace(use=1)
    shown = two.read(Part(1, (rows[0], again)))["clip"]
    assert all(np.array_equal(a, clips[v]) for a, v in zip(shown, (2, 3, 4, 0), strict=True))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"repeats": 3, "views": 2}}, "repeats is 3, and a video has only 2 different clips"),
        ({"data": {"repeats": 2, "features": "auto"}}, "repeats is 2, and a video has only 1 different clips"),
        ({"data": {"views": 0}}, "data.views"),
        ({"data": {"features": "yes"}}, "data.features"),
        ({"data": {"features": "auto"}}, "every stream of this model is trained"),
        (
            {"data": {"features": "auto"}, "model": {"motion": {"name": "tiny_motion"}}, "train": {"mixing": {}}},
            "train.mixing mixes clips",
        ),
        ({"model": {"motion": {"name": "tiny_motion", "grid": [0, 1, 1]}}}, "at least one cell"),
    ],
)
def test_configs_that_cannot_be(tree, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(tree)


def test_features_make_the_number_of_clips_finite():
    config = from_mapping({"data": {"features": "auto"}, "model": {"motion": {"name": "tiny_motion"}}})
    assert config.data.views == 1
