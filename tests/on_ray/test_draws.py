"""Files of weights and difficulties are read from storage before workers start; what is not there is said."""

from __future__ import annotations

import numpy as np
import pytest

from tests.train.local import packed
from vidfuse.config import DataConfig
from vidfuse.data.draws import Draws
from vidfuse.data.shards import DataError
from vidfuse.on_ray import preflight

INDEX = packed(8).indices["train"]


def test_each_setting_makes_its_draws(tmp_path):
    path = tmp_path / "values.csv"
    path.write_text("key,value\n" + "".join(f"train{i},{i + 1}\n" for i in range(8)))
    assert preflight._draws(DataConfig(), INDEX) == Draws() and preflight._draws(DataConfig(), INDEX).digest == ""
    weighted = preflight._draws(DataConfig(weighting=str(path)), INDEX)
    assert weighted.weights.tolist() == list(range(1, 9)) and weighted.difficulty is None
    balanced = preflight._draws(DataConfig(weighting="balanced"), INDEX)
    assert np.allclose(balanced.weights, 0.5)
    eased = preflight._draws(DataConfig(curriculum={"difficulty": str(path), "start": 0.5}), INDEX)
    assert np.flatnonzero(eased.uses(8, seed=0, epoch=0)).tolist() == [0, 1, 2, 3]
    assert len({d.digest for d in (weighted, balanced, eased)}) == 3


def test_a_file_that_is_not_there_is_named(tmp_path):
    for settings, field in (
        ({"weighting": str(tmp_path / "none.csv")}, r"data\.weighting"),
        ({"curriculum": {"difficulty": str(tmp_path / "none.csv")}}, r"data\.curriculum\.difficulty"),
    ):
        with pytest.raises(DataError, match=rf"{field}: there is no file .*none\.csv"):
            preflight._draws(DataConfig(**settings), INDEX)
    with pytest.raises(DataError, match=r"data\.weighting: there is no file"):
        preflight._draws(DataConfig(weighting=str(tmp_path)), INDEX)
