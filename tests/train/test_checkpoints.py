"""Runs whose checkpoints are damaged, half-written or of something else: they go on as the unbroken run did, or say what is wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from tests.train.local import Job, config, execute, losses, packed, pull, relist, together
from vidfuse.config import override
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.train import checkpoint
from vidfuse.train.errors import CheckpointError
from vidfuse.train.loop import run
from vidfuse.train.shelf import FILES, Shelf
from vidfuse.train.worker import LocalWorker, read_checkpoints

OFTEN = {"train__zero_stage": 2, "train__checkpoint_every_steps": 2}
LISTED = (
    "model.safetensors",
    "state.json",
    "zero/latest",
    "zero/state/mp_rank_00_model_states.pt",
    "zero/state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)


def shelf_of(folder: Path) -> Shelf:
    return Shelf(pafs.LocalFileSystem(), str(folder))


def steps_of(folder: Path) -> list[int]:
    return [int(name.split("-")[1]) for name in shelf_of(folder).names()]


def events(folder: Path, what: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event" and line["what"] == what]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The losses of an unbroken run, and a run that was cut off after step 5 of 6, with checkpoints of steps 3 and 4."""
    root = tmp_path_factory.mktemp("runs")
    execute(Job(config(train__zero_stage=2), root / "whole"))
    execute(Job(config(**OFTEN), root / "broken", crash_after=5))
    assert steps_of(root / "broken") == [3, 4]
    return losses(root / "whole"), root / "broken"


@pytest.fixture
def broken(runs, tmp_path):
    return Path(shutil.copytree(runs[1], tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])


def test_the_list_has_every_file(runs):
    folder = runs[1]
    for name in shelf_of(folder).names():
        there = {str(p.relative_to(folder / name)) for p in (folder / name).rglob("*") if p.is_file()}
        assert set(shelf_of(folder).contents(name)[0]) == there - {FILES}
        assert set(LISTED) <= there, there


@pytest.mark.parametrize(
    ("path", "how"),
    [*((p, "flipped") for p in (*LISTED, FILES)), (LISTED[4], "truncated"), (LISTED[0], "missing"), (FILES, "missing")],
)
def test_a_damaged_last_checkpoint_is_passed_over(runs, broken, caplog, path, how):
    before, last = shelf_of(broken).names()
    damage(broken / last / path, how)
    with caplog.at_level(logging.ERROR):
        execute(Job(config(**OFTEN), broken))
    assert losses(broken) == runs[0]
    (event,) = events(broken, "damaged_checkpoint")
    assert (event["checkpoint"], event["file"], event["used"], event["step"]) == (last, path, before, 3)
    assert event["expected"] and event["found"] and event["expected"] != event["found"]
    assert any(
        last in r.message and path in r.message and event["found"] in r.message and before in r.message for r in caplog.records
    )
    names = shelf_of(broken).names()
    assert last not in names and steps_of(broken)[-2:] == [4, 6]
    assert set(names[:-2]) <= {read_checkpoints(broken)["best"]}


def test_no_good_checkpoint_is_an_error(broken):
    """And nothing is removed or begun anew."""
    names = shelf_of(broken).names()
    damage(broken / names[0] / LISTED[4], "flipped")
    damage(broken / names[1] / LISTED[0], "missing")
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run is good") as error:
        execute(Job(config(**OFTEN), broken))
    assert all(word in str(error.value) for word in (*names, LISTED[4], LISTED[0], "no such file", "sha256", "run.name"))
    assert shelf_of(broken).names() == names


def test_all_gone_but_known_is_an_error(broken):
    for name in shelf_of(broken).names():
        shutil.rmtree(broken / name)
    with pytest.raises(CheckpointError, match=r"checkpoints\.json names some, but there are none"):
        execute(Job(config(**OFTEN), broken))


def test_two_ranks_pass_over_a_damaged_checkpoint_together(tmp_path):
    settings = config(**OFTEN)
    together([Job(settings, tmp_path / "whole"), Job(settings, tmp_path / "run", crash_after=5)], 2)
    last = shelf_of(tmp_path / "run").names()[-1]
    damage(tmp_path / "run" / last / "zero/state/zero_pp_rank_1_mp_rank_00_optim_states.pt", "flipped")
    together([Job(settings, tmp_path / "run")], 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert events(tmp_path / "run", "damaged_checkpoint")[0]["checkpoint"] == last


# --- killed ---


def _killed(folder: Path, where: str, at: int) -> None:
    """A run whose process is gone, without a word, in its `at`-th checkpoint."""
    count = [0]

    def dying(original):
        def it(*arguments, **options):
            count[0] += 1
            if count[0] == at:
                os._exit(9)
            return original(*arguments, **options)

        return it

    owner, name = {
        "writing": (checkpoint, "save_file"),
        "hashing": (Shelf, "listed_in_place"),
        "listing": (Shelf, "close"),
        "noting": (Shelf, "note"),
    }[where]
    setattr(owner, name, dying(getattr(owner, name)))
    execute(Job(config(**OFTEN), folder))
    os._exit(0)


@pytest.mark.parametrize(
    ("where", "at", "left"), [("writing", 3, 3), ("hashing", 3, 3), ("listing", 3, 3), ("noting", 3, 4), ("writing", 1, None)]
)
def test_killed_while_a_checkpoint_is_written(runs, tmp_path, where, at, left):
    """The one before is as it was; a checkpoint whose list is written counts, even if nothing else says so yet."""
    process = get_context("spawn").Process(target=_killed, args=(tmp_path, where, at))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    with LocalWorker(tmp_path).latest_checkpoint() as found:
        assert (found.folder and checkpoint.read_state(found.folder).step) == left
    execute(Job(config(**OFTEN), tmp_path))
    assert losses(tmp_path) == runs[0]
    assert shelf_of(tmp_path).record()["last"] == shelf_of(tmp_path).names()[-1]


# --- what stays ---


def test_the_last_n_and_the_best_stay_in_a_run(tmp_path):
    execute(Job(config(train__epochs=4, train__keep_checkpoints=1), tmp_path))
    record = read_checkpoints(tmp_path)
    assert set(shelf_of(tmp_path).names()) == {record["last"], record["best"]}
    execute(Job(config(train__epochs=7, train__keep_checkpoints=3), tmp_path))
    assert steps_of(tmp_path)[-3:] == [15, 18, 21]


def test_only_validated_weights_have_a_score(tmp_path):
    """A checkpoint at the end of an epoch that is not validated does not get an earlier score."""
    changes = {"validate_every_epochs": 2, "checkpoint_every_steps": 3, "keep_checkpoints": 9, "epochs": 3}
    execute(Job(config(**{f"train__{k}": v for k, v in changes.items()}), tmp_path))
    assert steps_of(tmp_path) == [3, 6, 9]
    assert sorted(int(name.split("-")[1]) for name in read_checkpoints(tmp_path)["scores"]) == [6, 9]


# --- another run ---


def test_harmless_settings_may_be_others(runs, broken):
    changed = ["train.checkpoint_every_steps=null", "train.checkpoint_every_samples=50", "train.checkpoint_every_minutes=5"]
    changed += [
        "train.keep_checkpoints=5",
        "train.log_every_steps=1",
        "run.storage=s3://elsewhere/runs",
        "data.url=s3://other/set",
    ]
    changed += ["train.epochs=3", "cluster.workers=4", "data.block_bytes=1000000", "evaluate.clips=5"]
    execute(Job(override(config(**OFTEN), changed), broken))
    assert len(losses(broken)) == 9


@pytest.mark.parametrize("setting", ["seed=9", "data.frames=2", "train.learning_rate=0.5", "train.global_batch=4"])
def test_what_alters_the_numbers_is_named_and_nothing_else(broken, setting):
    with pytest.raises(CheckpointError) as error:
        execute(Job(override(config(**OFTEN), [setting, "train.keep_checkpoints=5", "train.epochs=9"]), broken))
    assert setting.partition("=")[0] + ": " in str(error.value)
    assert "keep_checkpoints" not in str(error.value) and "epochs" not in str(error.value)


def execute_on(set_, folder):
    settings = config(**OFTEN)
    feed = Feed(settings, set_, World(1, 0, settings.train.global_batch, settings.train.micro_batch), pull)
    return run(settings, LocalWorker(folder), feed, folder=folder, facts={})


def altered(plan="memory", index="", count=21):
    made = packed(count)
    splits = {**made.manifest.splits, "train": made.manifest.splits["train"].model_copy(update={"index_sha256": index})}
    return replace(made, manifest=made.manifest.model_copy(update={"plan": plan, "splits": splits}))


@pytest.mark.parametrize(
    ("set_", "words"),
    [
        (altered(plan="another"), f"was trained on version {packed().manifest.version} of packed set 'memory', data.url holds"),
        (altered(index="f" * 64), "its samples are others, or in other places"),
        (altered(count=50), f"holds version {altered(count=50).manifest.version}"),
    ],
)
def test_another_set_is_refused(broken, set_, words):
    with pytest.raises(CheckpointError) as error:
        execute_on(set_, broken)
    assert words in str(error.value) and "run.name" in str(error.value)


def test_a_ledger_with_shards_of_another_manifest_is_refused(broken):
    name = shelf_of(broken).names()[-1]
    state = json.loads((broken / name / "state.json").read_text())
    state["ledger"]["used"] = {"other-00000.tar": "all"}
    (broken / name / "state.json").write_text(json.dumps(state))
    relist(broken / name)
    with pytest.raises(CheckpointError, match=r"the ledger is of another manifest: it names other-00000\.tar.*give the set"):
        execute(Job(config(**OFTEN), broken))
    assert np.isfinite(losses(broken)).all()
