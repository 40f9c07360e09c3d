"""When a checkpoint is due: the rule alone, and in a run."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest

from tests.train.local import Job, config, execute
from vidfuse.config import ConfigError, override
from vidfuse.train import due as due_module
from vidfuse.train.due import Due
from vidfuse.train.shelf import Shelf

LONG = 10**9


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(due_module, "time", Mock(monotonic=lambda: now[0]))
    return now


def due_of(**intervals) -> Due:
    return Due(config(**{f"train__checkpoint_every_{k}": v for k, v in intervals.items()}).train, samples=0)


def test_none_is_due_by_itself(clock):
    due = due_of()
    for step in range(1, 100):
        clock[0] += 3600
        due.passed(step, 8 * step, asked=due.asks())
    assert not due.now


def test_steps_are_multiples():
    due, saved = due_of(steps=3), []
    for step in range(1, 11):
        due.passed(step, step, asked=False)
        if due.now:
            saved.append(step)
            due.saved(step, step)
    assert saved == [3, 6, 9]


def test_samples_count_from_the_last_checkpoint():
    due, saved = due_of(samples=20), []
    for step in range(1, 11):
        due.passed(step, 8 * step, asked=False)
        if due.now or step == 5:  # another checkpoint, as after a validation, at 40
            saved.append(8 * step)
            due.saved(step, 8 * step)
    assert saved == [24, 40, 64]


def test_one_that_is_put_off_stays_due():
    due = due_of(steps=3)
    due.passed(3, 3, asked=False)
    due.passed(4, 4, asked=False)
    assert due.now


def ranks(clock, seconds: list[float], *, other: tuple[int, ...] = (), minutes: float = 1.0):
    """Steps at which each of two ranks, of which the first has a clock, saves: as `Run` calls it, the sums a step late."""
    dues, saved, pending = [due_of(minutes=minutes) for _ in range(2)], ([], []), False
    for step, passes in enumerate(seconds, start=1):
        asks = dues[0].asks()
        clock[0] += passes
        for due, steps in zip(dues, saved, strict=True):
            due.passed(step, step, asked=pending)
            if due.now or step in other:
                steps.append(step)
                due.saved(step, step)
        pending = asks
    assert saved[0] == saved[1]
    return saved[0]


def test_minutes_are_rank_0s_and_all_agree_a_step_later(clock):
    assert ranks(clock, [25] * 12) == [5, 10]  # asked before step 4 (75 s), heard after step 5; then again 75 s on


def test_a_slow_step_gives_one_checkpoint(clock):
    assert ranks(clock, [1, 500, 1, 1, 1, 1, 1, 1]) == [4]


def test_a_checkpoint_in_between_is_the_one_that_was_asked_for(clock):
    assert ranks(clock, [25] * 7, other=(4,)) == [4]
    assert ranks(clock, [25] * 8, other=(3,)) == [3, 8]


def test_intervals_in_a_run(tmp_path):
    """21 samples an epoch in steps of 8, 8 and 5; the end of epoch 1 is not validated, a checkpoint that is due there is made."""

    def steps(name, **intervals):
        changes = {f"train__checkpoint_every_{k}": v for k, v in intervals.items()}
        run = config(train__epochs=2, train__validate_every_epochs=2, train__keep_checkpoints=9, **changes)
        execute(Job(run, tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told = [line["step"] for line in lines if line["kind"] == "checkpoint"]
        assert [int(n.split("-")[1]) for n in Shelf(LOCAL, str(tmp_path / name)).names()] == told
        return told

    from pyarrow.fs import LocalFileSystem

    LOCAL = LocalFileSystem()  # noqa: N806
    assert steps("none") == [6]
    assert steps("steps", steps=3) == [3, 6]
    assert steps("samples", samples=12) == [2, 4, 6]
    assert steps("minutes", minutes=1e-9) == [2, 4, 6]  # asked for before step 1, heard after 2
    assert steps("long", minutes=LONG, samples=LONG, steps=LONG) == [6]


@pytest.mark.parametrize("setting", ["steps=0", "samples=0", "minutes=0", "minutes=-1", "steps=1.5"])
def test_an_interval_that_cannot_be(setting):
    with pytest.raises(ConfigError, match=f"checkpoint_every_{setting.split('=')[0]}"):
        override(config(), [f"train.checkpoint_every_{setting}"])


def test_none_kept_cannot_be():
    with pytest.raises(ConfigError, match="keep_checkpoints"):
        override(config(), ["train.keep_checkpoints=0"])
