"""Shards, their index and the manifest: the same bytes for the same samples, strict reading, faults in words."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
from pyarrow import fs as pafs

from vidfuse.data import shards, tars
from vidfuse.data.shards import DataError, Manifest, Recipe, SampleMeta, ShardInfo, ShardRecord, SplitInfo

VIDEOS = {"a-1": b"first video" * 100, "b_2": b"second", "c": b""}
FS = pafs.LocalFileSystem()
RECIPE = Recipe(layout="list", options={}, shard_bytes=64_000, transcode=None)


def meta(key: str, video: bytes = b"") -> SampleMeta:
    facts = {"key": key, "label": 1, "text": "täxt", "duration": 1.5, "frames": 12, "fps": 8.0, "width": 64, "height": 48}
    return SampleMeta(**facts, sha256=hashlib.sha256(video).hexdigest())


def tar_of(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def written() -> bytes:
    out = io.BytesIO()
    tars.write_shard(out, [(meta(key, video), "mp4", video) for key, video in VIDEOS.items()])
    return out.getvalue()


def walk(content: bytes) -> list:
    return list(tars.read_members(io.BytesIO(content)))


def test_a_shard_is_a_webdataset_tar_with_the_same_bytes_each_time():
    content = written()
    assert content == written()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["a-1.mp4", "a-1.json", "b_2.mp4", "b_2.json", "c.mp4", "c.json"]
        assert {(m.mtime, m.uname, m.uid) for m in tar.getmembers()} == {(0, "vidfuse", 0)}
        assert shards.parse_record(SampleMeta, tar.extractfile("a-1.json").read(), "") == meta("a-1", VIDEOS["a-1"])


def test_webdataset_reads_it(tmp_path):
    import webdataset

    (tmp_path / "x.tar").write_bytes(written())
    found = {s["__key__"]: s["mp4"] for s in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)}
    assert found == VIDEOS


def test_the_index_says_where_each_video_is():
    content = written()
    rows = tars.index_rows(io.BytesIO(content))
    assert {row.key: content[row.offset : row.offset + row.size] for row in rows} == VIDEOS
    assert [(row.label, row.suffix, row.frames, row.width, row.height) for row in rows] == [(1, "mp4", 12, 64, 48)] * 3


def test_reading_stops_at_no_length_without_a_word():
    """tarfile takes a shard that is cut between two members, or whose header is damaged, for a shorter one."""
    content = written()
    end = 512 * (2 + 4 + 2 * 3)  # blocks of the six headers and contents, roughly; any cut before the end mark counts
    for length in range(0, end, 97):
        with pytest.raises(DataError, match="cut off at byte"):
            walk(content[:length])
    third = content.index(b"b_2.mp4")
    with pytest.raises(DataError, match="damaged tar header at byte"):
        walk(content[:third] + b"X" + content[third + 1 :])
    with pytest.raises(DataError, match="zeros, and more data after them"):
        walk(content[:third] + bytes(512) + content[third + 512 :])


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.pyd", "a", "a.mp4.json", "a.MP4", "a/b.mp4", "../a.mp4", ".mp4", "a b.mp4", "ä.mp4"]
)
def test_other_members_are_refused(name):
    with pytest.raises(DataError, match=r"is not allowed in a shard|are allowed; rename"):
        walk(tar_of((name, b"x")))


def test_links_are_refused():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="not a regular file"):
        walk(out.getvalue())


def test_members_without_a_partner():
    json = meta("a").model_dump_json().encode()
    for members, words in (
        ([("a.mp4", b"x")], "a: the video has no json member after it"),
        ([("a.mp4", b"x"), ("b.mp4", b"x")], "a: the video has no json"),
        ([("a.json", json)], "a: the json member has no video before it"),
        ([("b.mp4", b"x"), ("a.json", json)], "a: the json member has no video"),
        ([("a.mp4", b"x"), ("a.json", b"{")], "a.json: not a SampleMeta"),
        ([("a.mp4", b"x"), ("a.json", json.replace(b"frames", b"flames"))], "a.json: not a SampleMeta: frames: Field required"),
    ):
        with pytest.raises(DataError) as error:
            tars.index_rows(io.BytesIO(tar_of(*members)))
        assert words in str(error.value)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "a\n", "x" * 91, "ü"])
def test_keys_that_a_shard_cannot_have(key):
    with pytest.raises(DataError, match="rename the video"):
        tars.write_shard(io.BytesIO(), [(meta(key), "mp4", b"")])


def test_suffixes_that_a_shard_cannot_have():
    with pytest.raises(DataError, match="'exe' is not allowed in a shard; allowed are mp4, webm"):
        tars.write_shard(io.BytesIO(), [(meta("a"), "exe", b"")])


# --- manifest and index ---


@pytest.fixture
def packed(tmp_path):
    """A set of one split with two shards, without the tars."""
    rows = tars.index_rows(io.BytesIO(written()))
    records = [
        ShardRecord(name=shards.shard_name("train", n), plan="p", bytes=9, sha256="0", samples=part, quarantined=())
        for n, part in enumerate((rows[:2], rows[2:]))
    ]
    index = shards.encode_index(records)
    infos = tuple(ShardInfo(name=r.name, samples=len(r.samples), bytes=9, sha256="0") for r in records)
    train = SplitInfo(
        samples=3, bytes=18, index="train.index.parquet", index_sha256=hashlib.sha256(index).hexdigest(), shards=infos
    )
    empty = train.model_copy(update={"samples": 0, "shards": (), "index": "x"})
    manifest = Manifest(
        dataset="d", classes=("x", "y"), splits={"train": train, "test": empty}, quarantined=0, plan="p", recipe=RECIPE
    )
    (tmp_path / "manifest.json").write_bytes(shards.dump_record(manifest))
    (tmp_path / "train.index.parquet").write_bytes(index)
    return tmp_path


def test_the_index_comes_back(packed):
    index = shards.read_index(FS, str(packed), "train")
    assert index.shards == ("train-00000.tar", "train-00001.tar")
    assert index.key.tolist() == list(VIDEOS)
    assert index.shard.tolist() == [0, 0, 1]
    assert index.size.tolist() == [len(video) for video in VIDEOS.values()]
    assert [digest.tobytes() for digest in index.sha256] == [hashlib.sha256(video).digest() for video in VIDEOS.values()]
    assert (index.offset.dtype, index.label.dtype, index.key.dtype, len(index)) == (np.int64, np.int32, object, 3)


def test_the_manifest_comes_back(packed):
    manifest = shards.read_manifest(FS, str(packed))
    assert shards.read_manifest(FS, f"{packed}/") == manifest
    shards.check_classes(manifest, 2)
    with pytest.raises(DataError, match=r"data.classes is 174, the packed set 'd' has 2 classes; set data.classes=2"):
        shards.check_classes(manifest, 174)


def test_the_version_names_the_content(packed):
    manifest = shards.read_manifest(FS, str(packed))
    train = manifest.splits["train"]
    assert len(manifest.version) == 16 and manifest.version == shards.read_manifest(FS, str(packed)).version
    others = [
        manifest.model_copy(update={"classes": ("x", "z")}),
        manifest.model_copy(update={"recipe": RECIPE.model_copy(update={"shard_bytes": 1})}),
        manifest.model_copy(update={"splits": {"train": train.model_copy(update={"index_sha256": "0"})}}),
    ]
    assert len({manifest.version, *(other.version for other in others)}) == 4


def test_splits_that_cannot_be_used(packed):
    for split, words in (("validate", "no split 'validate' in the packed set 'd'; it has"), ("test", "has no samples")):
        with pytest.raises(DataError, match=words):
            shards.read_index(FS, str(packed), split)


def test_no_packed_set(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no manifest.json in .*python -m jobs.pack"):
            shards.read_manifest(FS, str(root))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"format": 2', '"format": 1', "format 1, this version reads 2; update vidfuse, or pack again to another place"),
        ('"dataset"', '"data set"', "not a Manifest: dataset: Field required"),
        ("{", "", "not a Manifest: Invalid JSON"),
    ],
)
def test_a_manifest_that_is_none(packed, old, new, words):
    file = packed / "manifest.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=words):
        shards.read_manifest(FS, str(packed))


def test_a_manifest_without_shards(packed):
    manifest = shards.read_manifest(FS, str(packed))
    empty = manifest.model_copy(update={"splits": {}})
    (packed / "manifest.json").write_bytes(shards.dump_record(empty))
    with pytest.raises(DataError, match="lists no shards"):
        shards.read_manifest(FS, str(packed))


def test_an_index_that_is_not_the_manifests(packed):
    file = packed / "train.index.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"X")
    with pytest.raises(DataError, match="sha256 differs"):
        shards.read_index(FS, str(packed), "train")
    file.unlink()
    with pytest.raises(DataError, match=r"train.index.parquet: missing"):
        shards.read_index(FS, str(packed), "train")
    with pytest.raises(DataError, match="which is no shard of the manifest"):
        shards.decode_index(content, ("train-00000.tar",))
    with pytest.raises(DataError, match="not an index"):
        shards.decode_index(b"PAR1nonsense", ())
