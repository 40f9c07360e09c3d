"""The shelf of checkpoints on a disk: lists, damage, what stays. (On a real S3 server: tests/on_ray/test_checkpoints.py.)"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from vidfuse.train import shelf as shelf_module
from vidfuse.train.errors import CheckpointError, Damage, DamageError
from vidfuse.train.shelf import FILES, Shelf, merged, newest_good, patiently

CONTENT = {"state.json": b'{"step": 12}', "zero/state/rank_0.pt": bytes(range(256)) * 40, "zero/empty": b""}


def shelf_at(folder: Path) -> Shelf:
    return Shelf(pafs.LocalFileSystem(), str(folder))


def put(shelf: Shelf, number: int, *, metrics=None, keep=2, step=None, scratch: Path) -> str:
    name = f"step-{number if step is None else step:08d}-{number:04d}-abcd"
    source = scratch / f"source-{number}"
    for path, content in CONTENT.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content + str(number).encode())
    shelf.close(name, shelf.store(name, source), metrics or {})
    shelf.note(name, metrics or {}, keep=keep)
    return name


@pytest.fixture
def shelf(tmp_path):
    return shelf_at(tmp_path / "run")


def test_what_is_stored_comes_back_and_its_list_is_true(shelf, tmp_path):
    name = put(shelf, 1, scratch=tmp_path)
    shelf.verify(name)
    folder = shelf.fetch(name, tmp_path / "back")
    assert {p: (folder / p).read_bytes() for p in CONTENT} == {p: c + b"1" for p, c in CONTENT.items()}
    listed = json.loads((Path(shelf.root) / name / FILES).read_text())["files"]
    assert listed == {p: [len(c) + 1, hashlib.sha256(c + b"1").hexdigest()] for p, c in CONTENT.items()}


def damages(content: bytes):
    yield "flipped", bytes([content[0] ^ 1]) + content[1:]
    yield "flipped in the middle", content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :]
    yield "truncated", content[:-1]
    yield "longer", content + b"\0"
    yield "missing", None


@pytest.mark.parametrize("path", CONTENT)
def test_every_damage_of_a_file_is_named(shelf, tmp_path, path):
    name = put(shelf, 1, scratch=tmp_path)
    place = Path(shelf.root) / name / path
    whole = place.read_bytes()
    for what, content in damages(whole):
        place.unlink() if content is None else place.write_bytes(content)
        for read in (lambda: shelf.verify(name), lambda: shelf.fetch(name, tmp_path / "back")):
            with pytest.raises(DamageError) as error:
                read()
            damage = error.value.damage
            assert (damage.checkpoint, damage.file) == (name, path), what
            assert hashlib.sha256(whole).hexdigest()[:16] in damage.expected and damage.found != damage.expected
        place.write_bytes(whole)
    shelf.verify(name)


def test_every_flipped_bit_of_the_list_is_seen(shelf, tmp_path):
    """The list is no weaker than what it protects: whatever byte of it changes, the checkpoint is not taken for good."""
    name = put(shelf, 1, metrics={"top1": 0.25}, scratch=tmp_path)
    place = Path(shelf.root) / name / FILES
    whole = place.read_bytes()
    for at in range(len(whole)):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(DamageError):
            shelf.verify(name)


def test_files_that_are_not_wanted_are_not_read(shelf, tmp_path):
    name = put(shelf, 1, scratch=tmp_path)
    (Path(shelf.root) / name / "zero/state/rank_0.pt").write_bytes(b"damaged")
    folder = shelf.fetch(name, tmp_path / "back", ("state.json",))
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["state.json"]
    with pytest.raises(DamageError, match=r"model\.safetensors.*none in its list"):
        shelf.verify(name, ("model.safetensors",))


def test_a_folder_without_a_list_is_not_finished(shelf, tmp_path):
    name = put(shelf, 1, scratch=tmp_path)
    (Path(shelf.root) / name / FILES).unlink()
    with pytest.raises(DamageError, match="not written to its end"):
        shelf.verify(name)


def test_a_list_is_not_written_for_what_the_storage_does_not_have(shelf, tmp_path):
    name = "step-00000001-0001-abcd"
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(b"content")
    files = shelf.store(name, tmp_path / "source")
    (Path(shelf.root) / name / "a").write_bytes(b"con")
    with pytest.raises(OSError, match="3 bytes of a, 7 were written"):
        shelf.close(name, files, {})
    assert not (Path(shelf.root) / name / FILES).exists()


def test_order_is_that_of_writing(shelf, tmp_path):
    """After a fall back a lower step is newer; a step that was saved twice is there twice."""
    names = [put(shelf, n, step=s, keep=9, scratch=tmp_path) for n, s in ((1, 4), (2, 8), (3, 6), (10, 6), (9, 6))]
    assert shelf.names() == [names[i] for i in (0, 1, 2, 4, 3)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_n_and_the_best_stay(shelf, tmp_path, keep):
    scores = [0.1, 0.9, None, 0.3, None, 0.9, 0.2, None, None]
    for number, score in enumerate(scores, start=1):
        put(shelf, number, metrics={} if score is None else {"top1": score}, keep=keep, scratch=tmp_path)
        best = max((s, n) for n, s in enumerate(scores[:number], start=1) if s is not None)[1]
        expected = {*range(max(number - keep, 0) + 1, number + 1), best}
        assert {int(name.split("-")[2]) for name in shelf.names()} == expected
        assert (shelf.record()["last"].split("-")[2], shelf.record()["best"].split("-")[2]) == (f"{number:04d}", f"{best:04d}")


def test_what_is_damaged_or_not_finished_counts_for_nothing_and_goes(shelf, tmp_path):
    first, second, third = (put(shelf, n, metrics={"top1": n / 10}, scratch=tmp_path, keep=3) for n in (1, 2, 3))
    half = Path(shelf.root) / "step-00000004-0004-abcd"
    half.mkdir()
    (half / "state.json").write_text("{}")
    fifth = f"step-{5:08d}-0005-abcd"
    shelf.close(fifth, shelf.store(fifth, tmp_path / "source-1"), {})
    shelf.note(fifth, {}, keep=2, bad=(third,))
    assert shelf.names() == [second, fifth] and first not in shelf.names()
    assert shelf.record()["best"] == second


def test_a_later_try_is_not_touched_by_an_earlier_one(shelf, tmp_path):
    """A worker that was believed dead and still stores its checkpoint removes nothing that is newer."""
    put(shelf, 1, scratch=tmp_path)
    later = put(shelf, 7, scratch=tmp_path)
    put(shelf, 2, scratch=tmp_path, keep=1)
    assert later in shelf.names()


def test_a_damaged_record_is_made_anew(shelf, tmp_path):
    names = [put(shelf, n, metrics={"top1": 1 - n / 10}, keep=3, scratch=tmp_path) for n in (1, 2, 3)]
    before = shelf.record()
    for content in ("", "{", "[]", '{"last": 1}', "\0\0"):
        (Path(shelf.root) / "checkpoints.json").write_text(content)
        assert shelf.record() == before
    assert before["best"] == names[0]


def test_killed_while_removing(shelf, tmp_path, monkeypatch):
    """The list goes first."""
    name = put(shelf, 1, scratch=tmp_path)
    seen = []

    class Dying(type(shelf.filesystem)):
        def delete_dir(self, path):
            seen.append(path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Shelf(Dying(), shelf.root).remove(name)
    assert seen and (Path(shelf.root) / name / "state.json").exists()
    with pytest.raises(DamageError, match="not written to its end"):
        shelf.verify(name)


def test_the_rule_of_the_newest_good():
    bad = {"c": Damage("c", "x", "1", "2"), "b": Damage("b", FILES, "a list", shelf_module.UNFINISHED)}
    assert newest_good(["c", "b", "a"], bad.get, ever_whole=True) == ("a", (bad["c"], bad["b"]))
    assert newest_good(["b"], bad.get, ever_whole=False) == (None, (bad["b"],))
    assert newest_good([], bad.get, ever_whole=False) == (None, ())
    for names, ever in ((["c", "b"], False), (["b"], True), ([], True)):
        with pytest.raises(CheckpointError, match=r"no checkpoint of the run is good.*run\.name"):
            newest_good(names, bad.get, ever_whole=ever)


def test_two_ranks_may_not_write_the_same_file():
    assert merged([{"a": (1, "x")}, {"b": (2, "y"), "a": (1, "x")}]) == {"a": (1, "x"), "b": (2, "y")}
    with pytest.raises(OSError, match="two workers wrote a"):
        merged([{"a": (1, "x")}, {"a": (1, "z")}])


def test_patience_has_an_end_and_a_disk_has_none(monkeypatch):
    monkeypatch.setattr(shelf_module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(shelf_module, "RETRY_SECONDS", 0.5)
    asked = []

    def fails(error, times):
        def action():
            asked.append(error)
            if len(asked) <= times:
                raise error
            return "done"

        asked.clear()
        return action

    assert patiently(fails(OSError("AWS Error NETWORK_CONNECTION"), 3)) == "done" and len(asked) == 4
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        patiently(fails(OSError("AWS Error NETWORK_CONNECTION"), 10**9))
    assert 3 < len(asked) < 10
    for error in (OSError(28, "No space left on device"), FileNotFoundError(2, "x"), OSError("AWS Error ACCESS_DENIED")):
        with pytest.raises(OSError):
            patiently(fails(error, 1))
        assert len(asked) == 1
