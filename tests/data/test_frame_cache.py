"""Clips kept on local disk: the same as decoded ones, fetched never again, bounded, and never the cause of a failure."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs as pafs

from tests import support
from vidfuse.config import ConfigError, from_mapping
from vidfuse.data import clips as module
from vidfuse.data import frame_cache
from vidfuse.data.clips import COSTS, ClipReader, Part
from vidfuse.data.frame_cache import FrameCache, key_of
from vidfuse.data.transforms import Box
from vidfuse.data.video import DecodeError

SHAPE = (4, 16, 16, 3)
ENTRY = 36 + int(np.prod(SHAPE))


@pytest.fixture
def work(monkeypatch):
    """Counts of videos fetched and of frames decoded since."""
    counts = {"fetched": 0, "decoded": 0}
    fetch, decode = module.fetch, module.decode_frames

    def fetching(filesystem, run):
        counts["fetched"] += len(run)
        return fetch(filesystem, run)

    def decoding(content, wanted, **options):
        counts["decoded"] += len(wanted)
        return decode(content, wanted, **options)

    monkeypatch.setattr(module, "fetch", fetching)
    monkeypatch.setattr(module, "decode_frames", decoding)
    monkeypatch.setattr(frame_cache, "_warned", set())
    return counts


def reader_of(root: str, cache: Path | None, *, clips: int = 1, crops: int = 1, flip: bool = False, **data) -> ClipReader:
    tree = {"classes": 3, "frames": 4, "size": 32, "flip": True, "frame_cache": cache and str(cache)} | data
    return ClipReader(pafs.LocalFileSystem(), root, from_mapping({"data": tree}).data, 3, clips, crops, flip)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*/*.clip"))


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a if name not in COSTS)


AUGMENT = {"rand_augment": {}, "erasing": {"probability": 1.0}}


@pytest.mark.parametrize(
    ("epochs", "options"),
    [
        ((0, 1, 2, 3), {"views": 2}),
        ((0, 1, 2), {"views": 3, "repeats": 2, "augment": AUGMENT}),
        ((None, None), {"clips": 2, "crops": 3, "flip": True}),
        ((0, None, 1), {"views": 1, "decoder": "decord"}),
    ],
)
def test_clips_are_those_that_are_decoded(videos, tmp_path, work, epochs, options):
    if options.get("decoder") == "decord":
        pytest.importorskip("decord")
    root, rows = videos
    testing = {name: options[name] for name in ("clips", "crops") if name in options}
    training = {name: value for name, value in options.items() if name not in (*testing, "flip")}
    flip = options.get("flip", False)
    plain, cached = (
        ClipReader(pafs.LocalFileSystem(), root, reader_of(root, cache, **training).data, 3, **testing, flip=flip)
        for cache in (None, tmp_path)
    )
    for _ in range(2):
        for epoch in epochs:
            part = Part(epoch, (rows[0], rows[2], None, rows[1]))
            assert same(plain.read(part), cached.read(part)), epoch
    work.update(fetched=0, decoded=0)
    for epoch in epochs:
        found = cached.read(Part(epoch, rows[:2]))
        assert found["weight"].all() and found["clip"].any()
    assert work == {"fetched": 0, "decoded": 0}


def test_only_what_is_not_there_is_decoded(videos, tmp_path, work):
    root, rows = videos
    reader = reader_of(root, tmp_path, views=3, repeats=2)
    reader.read(Part(0, rows[:1]))  # views 0 and 1
    assert len(entries(tmp_path)) == 2
    before = work["decoded"]
    reader.read(Part(1, rows[:1]))  # views 2 and 0
    assert work["fetched"] == 2 and work["decoded"] - before <= 4
    assert len(entries(tmp_path)) == 3


def test_clips_that_do_not_come_again_are_not_kept(videos, tmp_path, work):
    root, rows = videos
    reader_of(root, tmp_path).read(Part(0, rows[:2]))  # each use draws anew
    unnamed = tuple(video._replace(sha256=b"") for video in rows[:2])
    reader_of(root, tmp_path, views=1).read(Part(0, unnamed))
    assert not entries(tmp_path)


def test_unreadable_videos_are_not_kept_and_say_why_again(videos, tmp_path, work):
    root, rows = videos
    behind = rows[0]._replace(offset=10**9)
    reader = reader_of(root, tmp_path, views=1)
    first, second = (reader.read(Part(0, (rows[2], behind))) for _ in range(2))
    assert same(first, second) and not entries(tmp_path)
    assert first["weight"].tolist() == [0, 0] and all(first["error"]) and "truncated" in first["error"][1]
    assert work["fetched"] == 4


def test_a_view_that_fails_costs_the_whole_video_with_and_without_a_cache(videos, tmp_path, work, monkeypatch):
    """Frames from 30 on do not decode: a view without them was kept, and does not outlive its neighbour."""
    root, rows = videos
    decode = module.decode_frames

    def fading(content, wanted, **options):
        for number, frame in decode(content, wanted, **options):
            if number >= 30:
                raise DecodeError("faded")
            yield number, frame

    monkeypatch.setattr(module, "decode_frames", fading)
    readers = [reader_of(root, cache, clips=8, sampling="dense", stride=1) for cache in (None, tmp_path)]
    first = [reader_of(root, cache, clips=1, sampling="dense", stride=1) for cache in (None, tmp_path)]
    for pair in (first, readers, readers):
        a, b = (reader.read(Part(None, rows[:2])) for reader in pair)
        assert same(a, b)
    assert len(entries(tmp_path)) == 2 and not a["weight"].any() and not a["clip"].any()


def test_bytes_that_are_not_those_of_the_index_are_an_error_and_not_kept(videos, tmp_path, work):
    """They may well decode."""
    root, rows = videos
    other = rows[0]._replace(sha256=bytes(32))
    for cache in (tmp_path, None):
        read = reader_of(root, cache, views=1).read(Part(0, (other, rows[1])))
        assert read["weight"].tolist() == [0, 1] and not read["clip"][0].any()
        assert read["error"].tolist() == [
            f"{other.shard}\t{other.key}\taltered since it was packed: its sha256 is not the index's",
            "",
        ]
    assert len(entries(tmp_path)) == 1


def test_keys_tell_apart_whatever_changes_pixels():
    box = Box(0, 1, 2, 3)
    base = (b"a" * 32, np.array([0, 5, 9]), box, 32, "pyav")
    others = [
        (b"b" * 32, *base[1:]),
        (base[0], np.array([0, 5, 8]), *base[2:]),
        (*base[:2], Box(0, 1, 2, 3, mirrored=True), *base[3:]),
        (*base[:2], Box(1, 0, 2, 3), *base[3:]),
        (*base[:3], 33, "pyav"),
        (*base[:4], "decord"),
    ]
    assert len({key_of(*arguments) for arguments in [base, base, *others]}) == 1 + len(others)


def test_clips_of_a_former_version_are_not_used_and_go_first(videos, tmp_path, work, monkeypatch):
    root, rows = videos
    entry = ENTRY - int(np.prod(SHAPE)) + 4 * 32 * 32 * 3
    with monkeypatch.context() as former:
        former.setattr(frame_cache, "FORMAT", frame_cache.FORMAT - 1)
        reader_of(root, tmp_path, clips=2, frame_cache_bytes=3 * entry).read(Part(None, rows[:1]))
    (before,) = {tuple(entries(tmp_path))}
    assert len(before) == 2
    reader_of(root, tmp_path, clips=3, frame_cache_bytes=3 * entry).read(Part(None, rows[:1]))
    assert work["fetched"] == 2 and len(entries(tmp_path)) == 3 and not set(before) & set(entries(tmp_path))


# --- the folder ---


def clip_of(number: int) -> np.ndarray:
    return np.full(SHAPE, number, np.uint8)


def key(number: int) -> bytes:
    return hashlib.sha256(bytes([number])).digest()


def held(cache: FrameCache) -> list[int]:
    """Numbers of the clips that are there; looking does not use them."""
    return [n for n in range(100) if cache.path(key(n)).exists()]


def total(folder: Path) -> int:
    """Bytes of all entries, while none comes, goes or is given its name."""
    with frame_cache._locked(folder / "clips/bytes"):
        return _total(folder)


def _total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".clip", ".part"))


def test_the_bound_is_held_and_the_least_recently_used_go(tmp_path):
    cache = FrameCache(str(tmp_path), 4 * ENTRY)
    for number in range(4):
        cache.store(key(number), clip_of(number))
        os.utime(cache.path(key(number)), ns=(number, number))
    out = np.empty(SHAPE, np.uint8)
    assert cache.load(key(0), out) and (out == 0).all()  # now the most recent
    cache.store(key(4), clip_of(4))
    assert held(cache) == [0, 2, 3, 4]
    for number in range(5, 40):
        cache.store(key(number), clip_of(number))
        assert total(tmp_path) <= 4 * ENTRY and number in held(cache)
    assert not cache.load(key(0), out)


def test_a_clip_larger_than_the_bound_is_not_kept(tmp_path, work, caplog):
    cache = FrameCache(str(tmp_path), ENTRY - 1)
    for number in range(3):
        cache.store(key(number), clip_of(number))
    assert held(cache) == [] and len(caplog.records) == 1


def test_a_share_of_the_disk_is_left_free(tmp_path, monkeypatch, caplog):
    """Others write to a disk that holds 50 entries; the cache gives way to them, and takes what they give back."""
    others = [0]

    def usage(folder: Path) -> tuple:
        used = others[-1] * ENTRY + _total(Path(folder))
        return type(disk_usage(folder))(50 * ENTRY, used, 50 * ENTRY - used)

    disk_usage = shutil.disk_usage
    monkeypatch.setattr(frame_cache.shutil, "disk_usage", usage)
    cache = FrameCache(str(tmp_path), 40 * ENTRY)
    most = []
    for count in (0, 20, 45, 47, 5):
        others.append(count)
        for number in range(60):
            cache.store(key(number), clip_of(number))
        most.append(_total(tmp_path) // ENTRY)
    assert most == [40, 27, 2, 0, 40]
    assert len(caplog.records) == 1 and "with 6% of the disk left free" in caplog.text


def test_what_is_left_of_a_process_that_died_goes_when_there_is_no_room(tmp_path):
    cache = FrameCache(str(tmp_path), 3 * ENTRY)
    cache.store(key(0), clip_of(0))
    left = cache.path(key(0)).with_suffix(".x.part")
    left.write_bytes(bytes(ENTRY))
    os.utime(left, (1, 1))
    for number in range(1, 4):
        cache.store(key(number), clip_of(number))
    assert not left.exists() and total(tmp_path) <= 3 * ENTRY


def test_a_count_that_is_lost_is_made_again(tmp_path):
    cache = FrameCache(str(tmp_path), 3 * ENTRY)
    for number in range(3):
        cache.store(key(number), clip_of(number))
    for content in (b"", b"no number at all"):
        (cache.root / "bytes").write_bytes(content)
        cache.store(key(3), clip_of(3))
        assert total(tmp_path) <= 3 * ENTRY and 3 in held(cache)


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "pixel", "check", "other"])
def test_a_damaged_entry_is_decoded_again(videos, tmp_path, work, damage, caplog):
    root, rows = videos
    reader = reader_of(root, tmp_path, views=1)
    first = reader.read(Part(0, rows[:2]))
    a, b = entries(tmp_path)
    content = a.read_bytes()
    middle = len(content) // 2
    a.write_bytes(
        {
            "cut": content[:middle],
            "empty": b"",
            "longer": content + b"x",
            "pixel": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "check": content[:33] + bytes([content[33] ^ 1]) + content[34:],
            "other": b.read_bytes(),
        }[damage]
    )
    work.update(fetched=0)
    assert same(first, reader.read(Part(0, rows[:2])))
    assert work["fetched"] == 1 and a.read_bytes() == content
    assert ["is damaged" in record.message for record in caplog.records] == [True]
    assert same(first, reader.read(Part(0, rows[:2]))) and work["fetched"] == 1


# --- a folder that fails ---


def fails(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("broken", "number"),
    [("mkdir", errno.EROFS), ("replace", errno.EACCES), ("_locked", errno.EIO), ("open", errno.EIO), ("write", errno.ENOSPC)],
)
def test_a_folder_that_fails_costs_one_warning_and_nothing_else(videos, tmp_path, work, monkeypatch, caplog, broken, number):
    root, rows = videos
    plain = reader_of(root, None, views=1).read(Part(0, rows[:2]))
    if broken == "_locked":
        monkeypatch.setattr(frame_cache, "_locked", fails(number))
    elif broken == "write":
        monkeypatch.setattr(frame_cache, "_header", fails(number))  # after the file was made
    else:
        monkeypatch.setattr(Path, broken, fails(number))
    reader = reader_of(root, tmp_path, views=1)
    for _ in range(2):
        assert same(plain, reader.read(Part(0, rows[:2])))
    monkeypatch.undo()
    assert not entries(tmp_path) and not list(tmp_path.rglob("*.part"))
    assert 1 <= len(caplog.records) <= 2 and all(os.strerror(number) in record.message for record in caplog.records)


def test_a_file_in_place_of_the_folder(videos, tmp_path, work, caplog):
    root, rows = videos
    (tmp_path / "file").write_bytes(b"")
    plain = reader_of(root, None, views=1).read(Part(0, rows[:2]))
    assert same(plain, reader_of(root, tmp_path / "file", views=1).read(Part(0, rows[:2])))
    assert caplog.records


def test_a_folder_that_may_only_be_read_is_read(videos, work):
    """By a user who is not root, to whom permissions apply."""
    root, rows = videos
    with tempfile.TemporaryDirectory() as name:
        place, cache = Path(name), Path(name, "cache")
        place.chmod(0o755)
        shutil.copy(Path(root, "a.tar"), place)
        reader = reader_of(name, cache, views=1)
        first = reader.read(Part(0, rows[:1]))
        for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
            folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                logging.disable()
                again = reader.read(Part(0, rows[:1]))
                kept = same(first, again) and work["fetched"] == 1
                status = 0 if kept and reader.read(Part(0, rows[1:2]))["weight"].all() else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(entries(cache)) == 1
        for folder in [cache, *(path for path in cache.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)


def test_a_lock_that_is_not_let_go_costs_the_entry(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(frame_cache, "_warned", set())
    monkeypatch.setattr(frame_cache, "LOCK_SECONDS", 0.1)
    cache = FrameCache(str(tmp_path), 10 * ENTRY)
    cache.store(key(0), clip_of(0))
    with frame_cache._locked(cache.root / "bytes"):
        cache.store(key(1), clip_of(1))
    cache.store(key(2), clip_of(2))
    assert held(cache) == [0, 2] and len(caplog.records) == 1


# --- several at once ---

WORKER = """
import sys
from tests.data.test_frame_cache import *
cache, seed = FrameCache(sys.argv[1], 20 * ENTRY), int(sys.argv[2])
out, hits = np.empty(SHAPE, np.uint8), 0
print("ready", flush=True)
sys.stdin.readline()
for number in np.random.default_rng(seed).integers(0, 60, 600):
    number = int(number)
    if cache.load(key(number), out):
        assert (out == number).all()
        hits += 1
    else:
        cache.store(key(number), clip_of(number))
        assert total(Path(sys.argv[1])) <= 20 * ENTRY
print(hits)
"""


def test_an_entry_that_is_not_written_yet_is_counted(tmp_path):
    cache = FrameCache(str(tmp_path), 4 * ENTRY)
    cache.store(key(0), clip_of(0))
    cache._reserve(cache.path(key(0)).with_suffix(".of-a-slow-writer.part"), ENTRY)
    (cache.root / "bytes").unlink()
    for number in range(2, 8):
        cache.store(key(number), clip_of(number))
        assert total(tmp_path) <= 4 * ENTRY


def test_two_processes_and_their_threads_share_it(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(seed)], cwd=support.REPO, **pipes) for seed in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    said = [process.communicate("go\n", timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all(int(out) > 50 for out, _ in said) and not any("frame_cache" in err for _, err in said)
    cache = FrameCache(str(tmp_path), 20 * ENTRY)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cache.store(key(number), clip_of(number)), range(60)))
    assert total(tmp_path) <= 20 * ENTRY and not list(tmp_path.rglob("*.part"))


# --- the config ---


def test_a_run_may_take_or_leave_it():
    a, b = (from_mapping({"data": data}) for data in ({}, {"frame_cache": "/tmp/x", "frame_cache_bytes": 10**9}))
    assert a.digest() == b.digest()


@pytest.mark.parametrize("place", ["cache", "s3://bucket/cache", "~/cache"])
def test_a_place_that_is_no_local_folder_is_refused(place):
    with pytest.raises(ConfigError, match="named from its root"):
        from_mapping({"data": {"frame_cache": place}})


def test_what_cannot_be_a_cache_is_refused_before_training(tmp_path):
    from vidfuse.on_ray import preflight  # late: the processes above import this file, and it DeepSpeed

    (tmp_path / "file").write_bytes(b"")
    preflight._check_frame_cache(from_mapping({"data": {"frame_cache": str(tmp_path / "new")}}).data)
    for data, words in (
        ({"frame_cache": str(tmp_path / "file")}, "data.frame_cache: .*a file, a folder is needed"),
        ({"frame_cache": str(tmp_path / "file/below")}, "data.frame_cache: .*cannot be written"),
        ({"frame_cache": str(tmp_path), "frame_cache_bytes": 1000}, "data.frame_cache_bytes: 1,000 do not hold one clip"),
    ):
        with pytest.raises(ConfigError, match=words):
            preflight._check_frame_cache(from_mapping({"data": data}).data)
    with pytest.raises(ConfigError, match="frame_cache_bytes"):
        from_mapping({"data": {"frame_cache_bytes": 0}})
