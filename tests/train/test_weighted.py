"""A weighted epoch is used exactly as planned: over crashes, at other world sizes, and the audit counts against its plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.train.local import Job, config, execute, losses, together
from tests.train.test_audit import NAMES, SAMPLES, SHARDS
from vidfuse.config import Curriculum
from vidfuse.data.draws import Draws
from vidfuse.train.audit import Audit, audit
from vidfuse.train.errors import CheckpointError

DRAWS = Draws(
    np.arange(SAMPLES) + 1.0, np.arange(SAMPLES)[::-1].astype(float), Curriculum(difficulty="file", start=0.5, epochs=2)
)


def audited(folder, draws: Draws) -> Audit:
    entries = [json.loads(path.read_text()) for path in sorted((folder / "journal").iterdir())]
    return audit(entries, SHARDS, NAMES, lambda epoch: draws.uses(SAMPLES, seed=3, epoch=epoch))


def test_cut_off_and_resumed_at_another_world_size_it_is_the_unbroken_run(tmp_path):
    """Dies inside of epochs, with one worker and then with two."""
    settings = config(train__checkpoint_every_steps=2, train__micro_batch=2, train__validate_every_epochs=2)
    execute(Job(settings, tmp_path / "whole", draws=DRAWS))
    execute(Job(settings, tmp_path / "broken", crash_after=3, draws=DRAWS))
    cut = [Job(settings, tmp_path / "broken", crash_after=2, draws=DRAWS), Job(settings, tmp_path / "broken", draws=DRAWS)]
    together(cut, 2)
    whole, broken = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert len(whole) == 6 and broken == pytest.approx(whole, rel=1e-4)
    found = audited(tmp_path / "broken", DRAWS)
    assert found.exact and [(epoch.closed, epoch.once) for epoch in found.epochs] == [(True, SAMPLES)] * 2
    assert any("epoch 0: exactly as planned; of 21 samples 21 used as planned" in line for line in found.lines())
    plain = audited(tmp_path / "broken", Draws())
    assert not plain.exact and plain.epochs[0].repeated and plain.epochs[0].missing
    with pytest.raises(CheckpointError, match="other weights or difficulties of samples"):
        execute(Job(settings, tmp_path / "broken"))
