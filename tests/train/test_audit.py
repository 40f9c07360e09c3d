"""The audit tells a run that used every sample once from one that did not, by what its ranks wrote down."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.train.local import Job, config, execute, packed, pull, together
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.train import audit as audits
from vidfuse.train.audit import audit
from vidfuse.train.journal import next_try
from vidfuse.train.ledger import Ledger, pack, unpack
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker

SAMPLES = 21
SHARDS = {"train-00000.tar": 10, "train-00001.tar": 11}
NAMES = [f"train-0000{int(i >= 10)}.tar/train{i}" for i in range(SAMPLES)]


def audited(folder) -> audits.Audit:
    entries = [json.loads(path.read_text()) for path in sorted((folder / "journal").iterdir())]
    return audit(entries, SHARDS, NAMES)


def test_an_unbroken_run_is_exact(tmp_path):
    execute(Job(config(), tmp_path))
    found = audited(tmp_path)
    assert found.exact and [(e.closed, e.once, e.missing) for e in found.epochs] == [(True, SAMPLES, ())] * 2
    assert found.spans == (audits.Span(1, 6, 1),) and found.interruptions == ()


def test_broken_twice_at_two_world_sizes_it_is_exact_and_says_what_was_redone(tmp_path):
    """A checkpoint every second step; cut off after 3 steps (alone), and after 2 more (two workers)."""
    settings = config(train__checkpoint_every_steps=2, train__micro_batch=2, train__validate_every_epochs=2)
    execute(Job(settings, tmp_path, crash_after=3))
    together([Job(settings, tmp_path, crash_after=2), Job(settings, tmp_path)], 2)
    found = audited(tmp_path)
    assert found.exact and [e.once for e in found.epochs if e.closed] == [SAMPLES] * 2
    assert [(s.first, s.last, s.workers) for s in found.spans] == [(1, 2, 1), (3, 4, 2), (5, 6, 2)]
    assert [(i.resumed, i.before, i.after, i.planned) for i in found.interruptions] == [(2, 1, 2, False), (4, 2, 2, False)]
    assert all(i.down_seconds is not None and i.down_seconds > 0 for i in found.interruptions)
    assert set(found.interruptions[0].parts) == {"new processes", "imports", "restore", "first step"}
    text = "\n".join(found.lines())
    assert "epoch 1: exactly once; of 21 samples 21 used once, 0 repeated, 0 missing, 0 unreadable" in text
    assert "steps 3 to 4: 2 workers" in text and "workers 1 -> 2" in text


class WrongFeed(Feed):
    """A feed that gives sample 3 in place of sample 7."""

    def train(self, epoch, left):
        for micro_batches in super().train(epoch, left):
            for batch in micro_batches:
                batch.samples[batch.samples == 7] = 3
            yield micro_batches


def test_a_sample_that_is_used_in_place_of_another_is_named(tmp_path):
    settings = config(train__epochs=1)
    worker = LocalWorker(tmp_path)
    feed = WrongFeed(settings, packed(), World(1, 0, 8, 4), pull)
    run(settings, worker, feed, folder=tmp_path, facts={})
    found = audited(tmp_path)
    assert not found.exact
    assert found.epochs[0].repeated == ((NAMES[3], 2),) and found.epochs[0].missing == (NAMES[7],)
    assert any("NOT exactly once" in line for line in found.lines())
    assert any(f"repeated: {NAMES[3]} 2 times" in line for line in found.lines())


def test_two_ranks_that_use_the_same_sample_are_seen():
    """Each rank's own ledger is in order; only the sum shows it (a union would not)."""
    ranks = [Ledger(SHARDS), Ledger(SHARDS)]
    ranks[0].mark(np.array([0, 1, -1]))
    ranks[1].mark(np.array([1, 2, -1]))
    whole = Ledger(SHARDS)
    whole.add(ranks[0].fresh + ranks[1].fresh)
    assert whole.merged[:4].tolist() == [1, 2, 1, 0]
    again = Ledger.from_json(SHARDS, json.loads(json.dumps(whole.to_json())))
    assert (again.merged == whole.merged).all() and again.left(np.arange(5)).tolist() == [3, 4]


def test_counts_are_packed_and_unpacked():
    counts = np.zeros(SAMPLES, np.uint8)
    assert pack(SHARDS, counts) == {"used": {}}
    counts[:10] = 1
    counts[[4, 12]] = 3, 1
    record = json.loads(json.dumps(pack(SHARDS, counts)))
    assert record["used"]["train-00000.tar"] == "all" and record["repeated"] == {"4": 3}
    assert (unpack(SHARDS, record) == counts).all()
    with pytest.raises(ValueError, match="of another manifest: it names other"):
        unpack(SHARDS, {"used": {"other": "all"}})
    with pytest.raises(ValueError, match=r"train-00001\.tar has 99 samples here"):
        unpack({"train-00000.tar": 10, "train-00001.tar": 99}, record)


def entry(number: int, kind: str, step: int, **facts):
    return {"kind": kind, "try": number, "step": step, "time": 100.0 * number + step, **facts}


def start(number: int, step: int, **facts):
    place = {"workers": 1, "before": None, "process": 100.0 * number, "began": 100.0 * number}
    return entry(number, "start", step, **place | facts)


def used(number: int, step: int, samples, *, closed: bool = False):
    counts = np.zeros(SAMPLES, np.uint8)
    counts[samples] = 1
    return entry(number, "used", step, epoch=0, closed=closed, unreadable=[], **pack(SHARDS, counts))


def test_a_checkpoint_that_never_came_to_be_falls_away_and_one_that_is_forgotten_is_missed():
    """The entry at step 5 was written, its checkpoint was not: the next try begins at 3 and does the rest again."""
    part = [start(1, 0), used(1, 3, range(9)), used(1, 5, range(9, 15))]
    good = audit([*part, start(2, 3), used(2, 8, range(9, SAMPLES), closed=True)], SHARDS, NAMES)
    assert good.exact and good.epochs[0].once == SAMPLES and good.interruptions[0].redone == 2
    lacking = audit([*part, start(2, 3), used(2, 8, range(15, SAMPLES), closed=True)], SHARDS, NAMES)
    assert not lacking.exact and lacking.epochs[0].missing == tuple(NAMES[9:15])
    twice = audit([*part, start(2, 5), used(2, 8, range(9, SAMPLES), closed=True)], SHARDS, NAMES)
    assert not twice.exact and twice.epochs[0].repeated == tuple((name, 2) for name in NAMES[9:15])


def test_an_epoch_that_still_runs_lacks_nothing_yet():
    found = audit([start(1, 0), used(1, 3, range(9))], SHARDS, NAMES)
    assert found.exact and not found.epochs[0].closed
    assert "epoch 0: not finished; of 21 samples 9 used once, 0 repeated, 12 to come, 0 unreadable" in found.lines()


def test_a_stop_in_order_is_no_interruption():
    found = audit([start(1, 0), used(1, 3, range(9)), entry(1, "end", 3, how="stopped"), start(2, 3, workers=2)], SHARDS, NAMES)
    assert found.interruptions[0].planned and "stopped in order at step 3, continued with 2 workers (1 before)" in found.lines()
    assert "0 interruptions, 0.0 s lost, 0 steps done twice" in found.lines()


def test_tries_are_numbered_on():
    assert next_try([]) == 1 and next_try(["00002-000000-start.json", "00011-000003-end.json"]) == 12
